# SPDX-License-Identifier: Apache-2.0
"""`qhw.trainable`: what it computes is what the result did; what it refuses, it refuses in one line."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import qhw
from qhw.errors import PlanError, ResultError, TrainingError
from qhw.numerics import FakeQuantizer, LearnedQuantizer, quantize
from qhw.training import DoubleForward, KeptNorm, TrainingForm
from qhw.training.batch_norm import SyncedBatchNorm
from tests.training_support import images, network, quantized, randomize, steps, trainable

PIPELINES = ("ranges-ptq", "whitepaper-ptq", "whitepaper-qat")


def weight_codes(result):
    """Weight group -> codes, of a settled result or of one that trains."""
    found = {}
    tensors = dict(result.module.named_parameters())
    for point in result.plan.points:
        if point.role == "weight":
            found[point.group] = quantize(tensors[point.tensor].detach(), result.quantizer(point.group).qparams)
    return found


def biases_off(result):
    groups = [point.group for point in result.plan.points if point.role == "bias"]
    result.set_enabled(False, groups)
    return result


def layers(result, kind):
    return [module for module in result.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_with_static_folding_it_computes_what_the_result_did_to_the_bit(pipeline):
    result = quantized(per="tensor", pipeline=pipeline)
    expected = biases_off(copy.deepcopy(result))(images())
    qhw.trainable(result)
    assert not layers(result, KeptNorm)
    assert torch.equal(result(images()), expected)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_kept_batch_norms_leave_codes_to_the_bit_and_outputs_within_one_code(pipeline):
    result = quantized(pipeline=pipeline)
    expected, codes = biases_off(copy.deepcopy(result))(images()), weight_codes(result)
    step = float(result.quantizer("11").scale)
    qhw.trainable(result)
    assert len(layers(result, KeptNorm)) == 3
    assert all(torch.equal(found, codes[group]) for group, found in weight_codes(result).items())
    # Sums are rounded in another order, so a tie of an activation may fall the other way: one code, and what it moves.
    assert float((result(images()) - expected).detach().abs().max()) < 1.5 * step


def test_codes_next_to_a_tie_stay():
    model = network()
    result = quantized(model, low=-128, high=127)
    with torch.no_grad():  # every weight within float rounding of a tie
        weight = result.float_graph.tensor("0.weight")
        scale = result.quantizer("0.weight").scale.reshape(-1, 1, 1, 1)
        weight.copy_(((weight / scale).floor() + 0.5) * scale)
    codes = weight_codes(result)
    qhw.trainable(result)
    assert all(torch.equal(found, codes[group]) for group, found in weight_codes(result).items())


def test_every_layer_computes_what_it_did_but_for_float_rounding():
    result = quantized()
    before, after = {}, {}

    def watched(result, into):
        for module in result.modules():
            if isinstance(module, FakeQuantizer):
                module.register_forward_hook(lambda module, _, output: into.setdefault(module.name, output.detach()))
        return result(images())

    watched(biases_off(copy.deepcopy(result)), before)
    watched(qhw.trainable(result), after)
    assert torch.equal(after["input"], before["input"])
    for name, share in (("0", 0.0), ("3", 0.01), ("6", 0.02)):
        # The sums differ by float rounding: but for a tie here and there, and what follows from it, codes are equal.
        differs = ((after[name] - before[name]).abs() > 0.5 * result.quantizer(name).scale).float().mean()
        assert float(differs) <= share, name


@pytest.mark.parametrize("pipeline", ["whitepaper-ptq", "whitepaper-qat"])
def test_equalization_before_kept_batch_norms_keeps_the_statistics_in_step(pipeline):
    model = network()
    with torch.no_grad():  # unbalanced channels, so that equalization moves them by orders of magnitude
        model[0].weight.mul_(torch.logspace(-2, 2, 8).reshape(-1, 1, 1, 1))
        model[1].running_mean.mul_(torch.logspace(-2, 2, 8))
        model[1].running_var.mul_(torch.logspace(-4, 4, 8))
    result = quantized(model, pipeline=pipeline)
    assert any(step.algorithm == "cross_layer_equalization" for step in result.plan.steps)
    float_graph = result.float_graph.copy()
    qhw.trainable(result).set_enabled(False)
    # Quantizers off, running statistics: the float model, equalized.
    torch.testing.assert_close(result(images()), float_graph.module(images()), rtol=1e-4, atol=1e-5)
    if pipeline == "whitepaper-qat":
        # With the batch's own statistics it is the original model, too: equalization moves no function.
        result.train()
        torch.testing.assert_close(result(images()), model.train()(images()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["kept", "double"])
def test_in_training_the_float_model_with_its_batch_norms_comes_back(how):
    model = network()
    train = {"prefer": ["double_forward"]} if how == "double" else {}
    result = trainable(model, train=train)
    assert len(layers(result, DoubleForward if how == "double" else KeptNorm)) == 3
    result.set_enabled(False)
    result.train()
    model.train()
    for _ in range(2):
        torch.testing.assert_close(result(images()), model(images()), rtol=1e-3, atol=1e-4)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for layer, norm in zip(layers(result, KeptNorm) + layers(result, DoubleForward), norms, strict=True):
        # The bias in front of a batch norm is gone: its running mean is that much lower.
        torch.testing.assert_close(layer.batch_norm.running_var, norm.running_var, rtol=1e-3, atol=1e-5)
        assert layer.batch_norm.momentum == norm.momentum
        assert layer.batch_norm.eps == norm.eps
    result.eval()
    model.eval()
    torch.testing.assert_close(result(images()), model(images()), rtol=1e-3, atol=1e-4)


def test_dropout_switches_with_the_mode():
    result = trainable(network(dropout=0.5), per="tensor")
    assert torch.equal(result(images()), result(images()))
    result.train()
    assert not torch.equal(result(images()), result(images()))


def test_momentum_none_averages_over_the_batches_of_training():
    result = trainable(network(momentum=None))
    norm = layers(result, KeptNorm)[0].batch_norm
    assert norm.momentum is None
    means = []
    norm.register_forward_hook(lambda module, given, _: means.append(given[0].mean((0, 2, 3)).detach()))
    result.train()
    for number in range(3):
        result(images(seed=number))
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-6)


class Shapes(nn.Module):
    """Batch norms behind a linear layer and convolutions of one and three dimensions, grouped."""

    def __init__(self):
        super().__init__()
        self.line = nn.Sequential(nn.Conv1d(2, 6, 3, groups=2, bias=False), nn.BatchNorm1d(6), nn.ReLU())
        self.space = nn.Sequential(nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4), nn.ReLU())
        self.flat = nn.Sequential(nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        y = self.line(x)
        return self.flat(self.space(y.reshape(-1, 1, 6, 3, 2)).flatten(1)[:, :36])


def test_batch_norms_of_every_rank_are_kept():
    torch.manual_seed(0)
    model = randomize(Shapes())
    data = torch.randn(24, 2, 8)
    result = quantized(model, data)
    qhw.trainable(result)
    kept = layers(result, KeptNorm)
    assert len(kept) == 3
    result.set_enabled(False)
    torch.testing.assert_close(result(data), model(data), rtol=1e-4, atol=1e-5)
    result.train()
    torch.testing.assert_close(result(data), model.train()(data), rtol=1e-3, atol=1e-4)
    with pytest.raises(TrainingError, match=r"^flat\.1: a batch in training must hold 2 values per channel"):
        result(data[:1])


@pytest.mark.parametrize("gamma", [0.0, -0.7, 1e-20])
def test_a_channel_with_any_gamma_is_kept(gamma):
    model = network()
    with torch.no_grad():
        model[1].weight[2] = gamma
    result = quantized(model)
    expected = result(images())
    step = float(result.quantizer("11").scale)
    qhw.trainable(result)
    assert float((result(images()) - expected).detach().abs().max()) < 1.5 * step
    steps(result, 2)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in result.parameters())


class SharedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.b(torch.relu(self.norm(self.a(x))))).mean((2, 3))


def test_a_batch_norm_that_is_not_folded_stays_and_counts_all_processes():
    torch.manual_seed(0)
    model = randomize(SharedNorm())
    result = trainable(model)
    assert not layers(result, KeptNorm)
    norms = layers(result, SyncedBatchNorm)
    assert len(norms) == 1 and norms[0].running_mean.shape == (4,)
    result.set_enabled(False)
    result.train()
    torch.testing.assert_close(result(images()), model.train()(images()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norms[0].running_mean, model.norm.running_mean)
    assert int(norms[0].num_batches_tracked) == int(model.norm.num_batches_tracked)
    frozen = qhw.freeze(result)
    state = frozen.float_graph.module.state_dict()
    assert torch.equal(state["norm.running_mean"], norms[0].running_mean)


def test_the_plan_gains_steps_of_training_before_those_of_fit():
    result = quantized()
    before = result.plan
    assert not any(step.stage == "train" for step in before.steps)
    qhw.trainable(result)
    stages = [step.stage for step in result.plan.steps]
    assert stages.count("train") == 2
    assert stages.index("train") > max(i for i, stage in enumerate(stages) if stage not in ("train", "fit"))
    assert all(later != "train" for earlier, later in pairwise(stages) if earlier == "fit")
    assert [step for step in result.plan.steps if step.stage != "train"] == list(before.steps)
    refused = {refusal.algorithm for refusal in result.plan.refused if refusal.stage == "train"}
    assert {"double_forward", "lsq_plus", "reestimated_ranges"} <= refused


def test_a_plan_that_holds_steps_of_training_is_obeyed():
    result = quantized(pipeline="whitepaper-qat", without=["kept_batch_norm"])
    plan = result.plan
    qhw.trainable(result)
    assert result.plan is plan
    assert not layers(result, KeptNorm)


def test_wishes_plan_training_anew():
    options = {"learned_ranges": {"domain": "log2"}}
    result = trainable(train={"without": "kept_batch_norm", "options": options}, pipeline="whitepaper-qat")
    assert not layers(result, KeptNorm)
    assert {module.domain for module in layers(result, LearnedQuantizer)} == {"log2"}
    chosen = [step.algorithm for step in result.plan.steps if step.stage == "train"]
    assert chosen == ["learned_ranges"]


def test_fixed_scales_get_no_gradient_and_shared_points_one_parameter():
    result = trainable(activation=', scale = { kind = "fixed", values = [0.03125] }')
    quantizers = {name: result.quantizer(name) for name in ("input", "0", "3", "6", "11")}
    assert not any(isinstance(quantizer, LearnedQuantizer) for quantizer in quantizers.values())
    groups = qhw.parameter_groups(result, 1e-3)
    assert sum(len(group["params"]) for group in groups if group["name"] == "quantizers") == 4  # weights alone


@pytest.mark.parametrize("given", [None, "model.qhw", nn.Linear(2, 2), 3])
def test_what_is_no_result_is_refused(given):
    message = rf"^trainable: takes a result of qhw\.quantize or qhw\.load; got {type(given).__name__}\. Quantize"
    with pytest.raises(TrainingError, match=message):
        qhw.trainable(given)


def test_a_second_call_is_refused():
    with pytest.raises(TrainingError, match=r"^trainable: the result is being trained already\. Freeze it first"):
        qhw.trainable(trainable())


def test_a_call_that_fails_leaves_the_result_as_it_was():
    result = quantized()
    expected, plan = result(images()), result.plan
    with pytest.raises(PlanError, match=r"^--without: no algorithm 'kept'"):
        qhw.trainable(result, without=["kept"])
    with pytest.raises(TrainingError, match=r"^trainable: pipeline 'ranges-ptq' trains nothing here"):
        qhw.trainable(result, pipeline="ranges-ptq")
    assert result.plan is plan and result.trained_form is None
    assert torch.equal(result(images()), expected)
    result.codes(result.plan.points[1])


def test_batch_norms_are_settled_first_whatever_the_user_prefers():
    one, other = trainable(), trainable(train={"prefer": ["learned_ranges"]})
    assert next(step.algorithm for step in other.plan.steps if step.stage == "train") == "learned_ranges"
    assert len(layers(other, KeptNorm)) == 3
    assert torch.equal(one(images()), other(images()))
    assert steps(one, 2) == steps(other, 2)


def test_a_batch_norm_is_taken_out_once_and_before_its_weight_gets_a_quantizer():
    result = quantized()
    form = TrainingForm(result, result.plan)
    form.keep_norm("0")
    with pytest.raises(TrainingError, match=r"^0: its batch norm was taken out already\. Take it out once\."):
        form.fold_each_step("0")
    form.set_quantizer("3.weight", LearnedQuantizer(form.qparams["3.weight"], form.grid("3.weight")))
    with pytest.raises(TrainingError, match=r"^3: its weight has a quantizer already, on the scales with the batch"):
        form.keep_norm("3")
    with pytest.raises(TrainingError, match=r"^3\.weight: must get a qhw\.numerics\.FakeQuantizer; got Identity\.$"):
        form.set_quantizer("3.weight", torch.nn.Identity())
    with pytest.raises(TrainingError, match=r"^11: no batch norm was folded into it\. Leave it out, or quantize again"):
        form.fold_each_step("11")
    with pytest.raises(TrainingError, match=r"^2: is no batch norm that was folded\. Leave it out, or plan again"):
        form.holder_of("2")
    with pytest.raises(TrainingError, match=r"^2: its weight is not quantized, so its batch norm stays folded"):
        form.weight_group("2")
    tensor = quantized(per="tensor")
    with pytest.raises(TrainingError, match=r"^0: a batch norm is kept on scales per output channel only\. Fold it\."):
        TrainingForm(tensor, tensor.plan).keep_norm("0")


def test_a_batch_norm_in_a_transposed_convolution_stays_there():
    torch.manual_seed(0)
    layers = nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)
    result = quantized(randomize(nn.Sequential(*layers)))
    form = TrainingForm(result, result.plan)
    with pytest.raises(
        TrainingError, match=r"^0: its batch norm cannot be taken out of ConvTranspose\. Leave it out\.$"
    ):
        form.fold_each_step("0")


def test_a_step_whose_algorithm_is_not_installed_is_named():
    result = quantized(pipeline="whitepaper-qat")
    others = [step for step in result.plan.steps if step.stage != "train"]
    gone = next(step for step in result.plan.steps if step.stage == "train").model_copy(update={"algorithm": "gone"})
    result.plan = result.plan.model_copy(update={"steps": (*others, gone)})
    with pytest.raises(
        PlanError, match=r"^plan: step 'gone' has no algorithm here\. Install its plugin, or plan again\.$"
    ):
        qhw.trainable(result)


def test_a_pipeline_that_does_not_say_how_it_trains_is_named():
    result = quantized()
    result.plan = result.plan.model_copy(update={"pipeline": "strange"})
    with pytest.raises(TrainingError, match=r"^trainable: pipeline 'strange' does not say how .* Pass pipeline="):
        qhw.trainable(result)


def test_while_it_trains_it_has_no_codes():
    result = trainable()
    point = result.plan.points[1]
    asked = (
        result.encodings,
        lambda: result.quantizer("0.bias"),
        lambda: result.codes(point),
        lambda: result.float_graph,
    )
    for ask in asked:
        with pytest.raises(ResultError, match=r"^result: it is being trained.*Call qhw\.freeze\(result\) first"):
            ask()
