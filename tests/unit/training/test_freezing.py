# SPDX-License-Identifier: Apache-2.0
"""`qhw.freeze`: the codes that were trained, legal scales, merged batch norms, and what can no longer be met."""

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn

import qhw
from qhw.errors import CalibrationError, PlanError, TrainingError
from qhw.numerics import LearnedQuantizer, fake_quantize, legal_scale, quantize
from qhw.training import DoubleForward, KeptNorm
from tests.training_support import images, network, quantized, randomize, steps, trainable

TREATMENTS = {
    "static": {"per": "tensor"},
    "static per channel": {"train": {"without": ["kept_batch_norm"]}},
    "kept": {},
    "double forward": {"train": {"prefer": ["double_forward"]}},
    "double forward per tensor": {"per": "tensor", "train": {"prefer": ["double_forward"]}},
    "frozen double forward": {
        "train": {"prefer": ["double_forward"], "options": {"double_forward": {"freeze_after": 2}}}
    },
    "re-estimated": {"train": {"prefer": ["kept_batch_norm", "reestimated_ranges"]}},
    "lsq+": {"train": {"prefer": ["lsq_plus"]}},
}
SCALES = {
    "float32": "",
    "power of two": ', scale = { kind = "power_of_two" }',
    "bounded": ', scale = { kind = "power_of_two", exponent_min = -6, exponent_max = -2 }',
    "listed": ', scale = { kind = "enumerated", values = [0.01, 0.02, 0.05, 0.1, 0.2] }',
}


def layers(result, kind):
    return [module for module in result.modules() if isinstance(module, kind)]


def trained_codes(result):
    """Group -> codes that the trained model computes with in eval mode, channel signs of its batch norm applied."""
    found = {}
    tensors = dict(result.module.named_parameters())
    for point in result.plan.points:
        if point.role != "weight":
            continue
        weight = tensors[point.tensor].detach()
        quantizer = result.quantizer(point.group)
        layer = result.trained_form.layers.get(point.operator)
        weight = layer.folded(weight) if isinstance(layer, DoubleForward) else weight
        codes = quantize(quantizer(weight).detach(), quantizer.qparams).long()
        if isinstance(layer, KeptNorm):
            sign = layer.batch_norm.weight.detach().sign().reshape(-1, *[1] * (codes.dim() - 1)).long()
            codes = (codes * sign).clamp(quantizer.quant_min, quantizer.quant_max)
        found[point.group] = codes
    return found


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_frozen_codes_and_outputs_are_those_of_the_trained_model(treatment):
    result = trainable(**TREATMENTS[treatment])
    losses = steps(result, 5, lr=2e-3)
    assert losses[0] != losses[-1]
    step = float(result.quantizer("11").scale.detach())
    with torch.no_grad():
        expected = result(images())
    codes = trained_codes(result)
    frozen = qhw.freeze(result)
    assert frozen is not result and not frozen.training and frozen.trained_form is None
    for point in frozen.plan.points:
        if point.role == "weight":
            assert torch.equal(frozen.codes(point).long(), codes[point.group]), point.name
    # A merged batch norm rounds its sums in another order, and biases are rounded to input * weight scale: both far
    # below one code of an activation, but for a tie that falls the other way: one code, and what follows from it.
    with torch.no_grad():
        assert float((frozen(images()) - expected).abs().max()) < 2.5 * step


def test_without_batch_norms_to_merge_outputs_are_equal_to_the_bit():
    result = trainable(per="tensor")
    steps(result)
    with torch.no_grad():
        expected = result(images())
    frozen = qhw.freeze(result)
    frozen.set_enabled(False, [point.group for point in frozen.plan.points if point.role == "bias"])
    with torch.no_grad():
        assert torch.equal(frozen(images()), expected)


@pytest.mark.parametrize("kind", SCALES)
def test_frozen_scales_are_legal_and_zero_points_in_range(kind):
    result = trainable(activation=SCALES[kind])
    start = {group: result.quantizer(group).scale.detach().clone() for group in ("input", "0", "3", "6", "11")}
    steps(result, 6, lr=0.5 if kind != "float32" else 0.05)  # others move by whole steps
    frozen = qhw.freeze(result)
    work = result.trained_form
    for group, qparams in frozen.encodings().items():
        role = work.group(group)[0].role
        if role == "bias":
            continue
        assert torch.equal(legal_scale(qparams.scale.double(), work.grid(group), "nearest"), qparams.scale)
        assert qparams.scale.dtype == torch.float32 and qparams.zero_point.dtype == torch.int32
        assert bool(((qparams.zero_point >= qparams.quant_min) & (qparams.zero_point <= qparams.quant_max)).all())
    assert any(not torch.equal(frozen.encodings()[group].scale, scale) for group, scale in start.items())
    if kind == "bounded":
        scales = torch.stack([frozen.encodings()[group].scale for group in start])
        assert float(scales.min()) >= 2.0**-6 and float(scales.max()) <= 2.0**-2


def test_gammas_that_turned_negative_flip_codes_and_what_has_no_counterpart_is_said(caplog):
    result = trainable(network(), low=-8, high=7)
    norm = layers(result, KeptNorm)[2].batch_norm
    quantizer = result.quantizer("6.weight")
    weight = dict(result.module.named_parameters())["6.weight"]
    with torch.no_grad():
        norm.weight[0] = -norm.weight[0]
        norm.weight[1] = -norm.weight[1]
        weight[0, 0, 0, 0] = -50.0  # code -8, whose negative is no code
        assert float(quantizer(weight)[0, 0, 0, 0] / quantizer.scale[0]) == pytest.approx(-8)
    signs = norm.weight.detach().sign().reshape(-1, 1, 1, 1)
    plain = quantize(weight.detach(), quantizer.qparams)
    lost = int(((plain == -8) & (signs < 0)).sum())
    assert lost >= 1
    before = trained_codes(result)["6.weight"]
    with caplog.at_level(logging.WARNING, logger="qhw"):
        frozen = qhw.freeze(result)
    remark = f"{lost} codes -8 of channels with gamma < 0 became 7"
    assert f"6.weight: {remark}." in caplog.text
    point = next(point for point in frozen.plan.points if point.group == "6.weight")
    assert torch.equal(frozen.codes(point).long(), before)
    assert int(frozen.codes(point)[0, 0, 0, 0]) == 7
    report = next(report for report in frozen.steps if report.algorithm == "learned_ranges")
    assert report.sites["6.weight"] == {"remark": remark}


def test_a_gamma_of_zero_leaves_the_offset_alone():
    result = trainable()
    norm = layers(result, KeptNorm)[0].batch_norm
    with torch.no_grad():
        norm.weight[3] = 0.0
        expected = result(images())
    frozen = qhw.freeze(result)
    encodings = frozen.encodings()
    assert bool(torch.isfinite(encodings["0.weight"].scale).all())
    assert float(encodings["0.weight"].scale[3]) > 1e-6
    assert not frozen.float_graph.tensor("0.weight")[3].any()
    torch.testing.assert_close(frozen.float_graph.tensor("0.bias")[3].detach(), norm.bias[3].detach())
    with torch.no_grad():
        assert float((frozen(images()) - expected).abs().max()) < 2.5 * float(encodings["11"].scale)
    qhw.freeze(qhw.trainable(frozen))


def test_training_goes_on_behind_a_freeze():
    one, other = (trainable(seed_independent) for seed_independent in (network(), network()))
    first = steps(one, 4)
    second = steps(other, 4)
    assert first == second
    frozen = qhw.freeze(one)
    codes = {p.name: frozen.codes(p).clone() for p in frozen.plan.points if p.role == "weight"}
    one.train()
    assert steps(one, 3, lr=0.1) == steps(other, 3, lr=0.1)
    for point in frozen.plan.points:  # and it does not reach into what was frozen
        if point.role == "weight":
            assert torch.equal(frozen.codes(point), codes[point.name])


@pytest.mark.parametrize("treatment", ["static", "kept", "double forward"])
def test_a_frozen_result_is_trained_again(treatment):
    words = dict(TREATMENTS[treatment])
    train = words.pop("train", {})
    result = trainable(train=train, **words)
    steps(result)
    frozen = qhw.freeze(result)
    step = float(frozen.quantizer("11").scale)
    with torch.no_grad():
        expected = frozen(images())
    again = qhw.trainable(frozen)
    assert again is frozen
    with torch.no_grad():
        assert float((again(images()) - expected).abs().max()) < 2.5 * step
    steps(again, 2)
    twice = qhw.freeze(again)
    assert [report.stage for report in twice.steps].count("train") == len(
        [step for step in twice.plan.steps if step.stage == "train"]
    )
    assert len(twice.steps) == len(twice.plan.steps)


def batches_of(data):
    return [data[start : start + 32] for start in range(0, len(data), 32)]


@pytest.mark.parametrize("count", [64, 80, 65])
def test_statistics_are_those_of_the_calibration_data(count):
    data = images(count, seed=9)
    result = trainable()
    steps(result)
    running = [layer.batch_norm.running_mean.clone() for layer in layers(result, KeptNorm)]
    state = {name: value.clone() for name, value in result.state_dict().items()}
    frozen = qhw.freeze(result, calibration=data)
    assert all(torch.equal(value, state[name]) for name, value in result.state_dict().items())
    # By numpy: the first layer's products on the quantized input, their mean and unbiased variance per batch of 32,
    # each by its number of samples; a last batch of one sample is left out.
    weight = dict(result.module.named_parameters())["0.weight"].detach()
    product = torch.nn.functional.conv2d(
        result.quantizer("input")(data), result.quantizer("0.weight")(weight), padding=1
    ).detach()
    parts = [part.numpy().astype(np.float64) for part in batches_of(product) if len(part) > 1]
    shares = [len(part) for part in parts]
    mean = np.average([part.mean((0, 2, 3)) for part in parts], axis=0, weights=shares)
    var = np.average([part.var((0, 2, 3), ddof=1) for part in parts], axis=0, weights=shares)
    norm = layers(result, KeptNorm)[0].batch_norm
    gamma, beta = (p.detach().numpy().astype(np.float64) for p in (norm.weight, norm.bias))
    expected = beta - gamma * mean / np.sqrt(var + norm.eps)
    # Running averages in float32 over three batches.
    np.testing.assert_allclose(frozen.float_graph.tensor("0.bias").detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(frozen.folded_norms["0"].inner_std.numpy(), np.sqrt(var + norm.eps), rtol=1e-5)
    assert not np.allclose(running[0].numpy(), mean, rtol=1e-3)


def test_statistics_of_double_forward_are_estimated_anew_too():
    data = images(64, seed=9)
    result = trainable(train=TREATMENTS["frozen double forward"]["train"])
    steps(result)
    state = {name: value.clone() for name, value in result.state_dict().items()}
    frozen = qhw.freeze(result, calibration=data)
    assert all(torch.equal(value, state[name]) for name, value in result.state_dict().items())
    assert layers(result, DoubleForward)[0].freeze_after == 2
    weight = dict(result.module.named_parameters())["0.weight"].detach()
    product = torch.nn.functional.conv2d(result.quantizer("input")(data), weight, padding=1).detach()
    var = np.mean([part.numpy().astype(np.float64).var((0, 2, 3), ddof=1) for part in batches_of(product)], axis=0)
    np.testing.assert_allclose(frozen.folded_norms["0"].inner_std.numpy(), np.sqrt(var + 1e-5), rtol=1e-4)


def test_calibration_without_batch_norms_changes_nothing_and_without_batches_is_refused():
    result = trainable(per="tensor")
    with torch.no_grad():
        assert torch.equal(qhw.freeze(result, calibration=images())(images()), qhw.freeze(result)(images()))
    with pytest.raises(CalibrationError, match=r"^calibration: holds no sample\. Pass at least one batch\."):
        qhw.freeze(trainable(), calibration=[])


def test_steps_of_fit_run_again(monkeypatch):
    result = trainable()
    steps(result)
    frozen = qhw.freeze(result)
    names = [report.algorithm for report in frozen.steps]
    assert names == [step.algorithm for step in result.plan.steps]
    assert names[-1] == "requantization_fit" and frozen.steps[-1].stage == "fit"
    assert frozen.provenance["trained"] is True
    trained = next(report for report in frozen.steps if report.algorithm == "kept_batch_norm")
    assert trained.summary == "3 sites trained"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("quantizers.0_weight.scale_parameter", r"quantizers\.0_weight\.scale_parameter"),
        ("quantizers.0.zero_point", r"quantizers\.0\.zero_point"),
        ("11.weight", r"11\.weight"),
        ("batch_norms.3.batch_norm.running_var", r"batch_norms\.3\.batch_norm\.running_var"),
    ],
)
def test_a_parameter_that_is_no_number_is_named(name, said, value):
    result = trainable()
    with torch.no_grad():
        result.module.state_dict()[name].flatten()[0] = value
    with pytest.raises(TrainingError, match=rf"^{said}: became NaN or infinite in training \(1 tensors in all\)\. Go"):
        qhw.freeze(result)


def test_a_scale_at_its_lower_bound_is_reported(caplog):
    result = trainable(per="tensor")
    quantizer = result.quantizer("3")
    start = float(quantizer.scale.detach())
    with torch.no_grad():
        quantizer.scale_parameter.fill_(-11.0)
    assert float(quantizer.scale.detach()) == pytest.approx(start / 1024)
    with caplog.at_level(logging.WARNING, logger="qhw"):
        frozen = qhw.freeze(result)
    remark = "its scale was driven to its lower bound, and it quantizes next to nothing"
    assert f"3: {remark}." in caplog.text
    report = next(report for report in frozen.steps if report.algorithm == "learned_ranges")
    assert report.sites == {"3": {"remark": remark}}
    assert report.summary == f"9 sites trained; 3: {remark}"
    assert float(frozen.encodings()["3"].scale) == pytest.approx(start / 1024)


def test_a_constraint_that_can_no_longer_be_met_is_named():
    words = {"bias": 16, "rule": ', out_of_range = "refuse"', "per": "tensor"}
    result = trainable(without=["requantization_fit"], **words)
    with torch.no_grad():
        dict(result.module.named_parameters())["11.bias"][2] = 1e4
    message = r"^11\.bias: needs \d+ bits at scale input\*weight; biases\.sum has 16, out_of_range = \"refuse\"\."
    with pytest.raises(PlanError, match=message):
        qhw.freeze(result)
    mended = trainable(**words)  # a step of the stage fit lets the scales of the weights grow
    with torch.no_grad():
        dict(mended.module.named_parameters())["11.bias"][2] = 1e4
    start = mended.quantizer("11.weight").scale.detach()
    assert float(qhw.freeze(mended).quantizer("11.weight").scale) > float(start)


def test_biases_fit_after_training():
    result = trainable(bias=12, rule=', out_of_range = "enlarge_scale"')
    steps(result, 4, lr=0.05)
    frozen = qhw.freeze(result)
    for point in frozen.plan.points:
        if point.role == "bias":
            qparams = frozen.encodings()[point.group]
            assert (qparams.quant_min, qparams.quant_max) == (-2048, 2047)
            bias = frozen.float_graph.tensor(point.tensor).detach()
            assert float((bias / qparams.scale).abs().max()) <= 2047.5


def test_narrow_biases_train_as_they_will_be_rounded():
    result = trainable(bias=12, rule=', out_of_range = "enlarge_scale"', per="tensor")
    name = "11.bias"
    quantizer = result.quantizer(name)
    bias = dict(result.module.named_parameters())[name]
    scale = result.quantizer("6").scale * result.quantizer("11.weight").scale
    expected = (bias / scale).round().clamp(-2048, 2047) * scale
    assert torch.equal(quantizer(bias), expected)
    quantizer(bias).sum().backward()
    assert torch.equal(bias.grad, torch.ones_like(bias))
    result.zero_grad()
    with torch.no_grad():
        expected = result(images())
        assert torch.equal(qhw.freeze(result)(images()), expected)


class Up(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=groups)
        self.down = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.up(torch.relu(self.down(x))).mean((2, 3))


@pytest.mark.parametrize("groups", [1, 2])
def test_biases_of_transposed_convolutions_follow_the_scales_of_their_groups(groups):
    torch.manual_seed(0)
    result = quantized(Up(groups).eval(), bias=12, rule=', out_of_range = "enlarge_scale"')
    with torch.no_grad():
        expected = result(images())
        trained = qhw.trainable(result)
        assert torch.equal(trained(images()), expected)
        assert torch.equal(qhw.freeze(trained)(images()), expected)


@pytest.mark.parametrize("given", [None, "x", nn.Linear(2, 2)])
def test_what_is_not_being_trained_is_refused(given):
    with pytest.raises(TrainingError, match=r"^freeze: takes a result that qhw\.trainable made trainable"):
        qhw.freeze(given)
    with pytest.raises(TrainingError, match=r"^freeze: takes a result.*Call qhw\.trainable\(result\) first"):
        qhw.freeze(quantized())


def test_a_quantizer_that_does_more_than_round_is_frozen_as_it_computes():
    class Shrinking(LearnedQuantizer):
        def forward(self, x):
            return fake_quantize(x * 0.5, self.qparams)

    result = quantized(per="tensor")
    trained = qhw.trainable(result)
    quantizer = trained.quantizer("11.weight")
    quantizer.__class__ = Shrinking
    with torch.no_grad():
        expected = trained(images())
        frozen = qhw.freeze(trained)
        frozen.set_enabled(False, [point.group for point in frozen.plan.points if point.role == "bias"])
        assert torch.equal(frozen(images()), expected)


def test_a_copy_in_the_midst_of_training_freezes_on_its_own():
    result = trainable()
    steps(result, 2)
    copied = copy.deepcopy(result)
    assert steps(result, 2, lr=0.05) == steps(copied, 2, lr=0.05)
    steps(result, 2, lr=0.05)
    one, other = qhw.freeze(result), qhw.freeze(copied)
    assert not torch.equal(one.float_graph.tensor("11.weight"), other.float_graph.tensor("11.weight"))
    assert torch.equal(other.float_graph.tensor("11.weight"), copied.module.get_parameter("11.weight"))


def test_random_networks_keep_their_signs():
    assert float(randomize(network(3), 3)[1].weight.detach().min()) < 0  # what the tests above rely on
