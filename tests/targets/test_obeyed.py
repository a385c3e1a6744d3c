# SPDX-License-Identifier: Apache-2.0
"""Every field family the planner reads, changed in the text of a shipped file: the plan follows."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qhw.decisions import QuantPlan
from qhw.engine.grids import grid_of
from qhw.errors import PlanError, TargetError
from qhw.graph import QuantPoint
from qhw.schema import TargetSpec, parse_target

WHITEPAPER, ORT = "whitepaper/generic-int8", "onnxruntime/cpu-x86-vnni"
LITERT, ESP = "google/litert-int8", "espressif/esp32-p4"
ALL = pytest.mark.parametrize("name", [WHITEPAPER, ORT, LITERT, ESP])
Edit = Callable[..., TargetSpec]
Planner = Callable[[TargetSpec, str], QuantPlan]


@pytest.fixture
def edit(targets_root: Path) -> Edit:
    """A shipped target with one line of one table replaced; an empty replacement removes the line."""

    def edited(name: str, table: str, field: str, value: str | None) -> TargetSpec:
        lines = (targets_root / f"{name}.toml").read_text().splitlines()
        start = lines.index(f"[{table}]")
        index = next(i for i in range(start + 1, len(lines)) if lines[i].startswith(f"{field} = "))
        assert not any(line.startswith("[") for line in lines[start + 1 : index]), f"{table} has no {field}"
        lines[index] = f"{field} = {value}" if value is not None else ""
        # The file's source does not say the new value, and may name a field that is gone.
        source = next(i for i in range(index, len(lines)) if lines[i].startswith("source = "))
        lines[source] = 'source = "memory"'
        return parse_target("\n".join(lines), name_of_file=f"{name}.toml")

    return edited


@pytest.fixture
def shipped(targets_root: Path) -> Callable[[str], TargetSpec]:
    return lambda name: parse_target((targets_root / f"{name}.toml").read_text(), name_of_file=f"{name}.toml")


def written(plan: QuantPlan, operator: str) -> QuantPoint:
    return next(p for p in plan.points if p.role == "activation" and p.operator == operator)


def where(plan: QuantPlan, operator: str) -> str:
    return next(op.where for op in plan.operators if op.name == operator)


def subjects(plan: QuantPlan) -> set[str]:
    return {note.subject for note in plan.notes}


@ALL
def test_without_fused_relu_is_an_operator_of_its_own(name: str, edit: Edit, plan: Planner) -> None:
    made = plan(edit(name, "operators.Conv", "fused", "[]"), "conv")
    assert next(op for op in made.operators if op.name == "conv").members == ("conv",)
    # ONNX Runtime has no integer Relu: it goes to the host, and the convolution's range stays open.
    assert where(made, "relu") == ("host" if name == ORT else "accelerator")
    assert written(made, "conv").minimum is None


@ALL
def test_without_same_scale_a_maximum_pool_has_a_scale_of_its_own(name: str, edit: Edit, plan: Planner) -> None:
    made = plan(edit(name, "operators.MaxPool", "same_scale", '"none"'), "pools")
    assert written(made, "maximum").group != written(made, "conv").group


@pytest.mark.parametrize(("name", "kind"), [(LITERT, "Concat"), (ESP, "Concat"), (ESP, "Add")])
def test_without_same_scale_branches_keep_their_scales(name: str, kind: str, edit: Edit, plan: Planner) -> None:
    made = plan(edit(name, f"operators.{kind}", "same_scale", None), "branches" if kind == "Concat" else "residual")
    joined = "concat" if kind == "Concat" else "add"
    assert len({written(made, operator).group for operator in ("left", "right", joined)}) == 3


@pytest.mark.parametrize(("rule", "scales"), [("inputs", 2), ("all", 1)])
def test_same_scale_can_be_asked_of_the_white_papers_sum(rule: str, scales: int, edit: Edit, plan: Planner) -> None:
    made = plan(edit(WHITEPAPER, "operators.Add", "same_scale", f'"{rule}"'), "residual")
    assert len({written(made, operator).group for operator in ("left", "right", "add")}) == scales


def test_a_wider_limit_takes_the_grouped_convolution_in(edit: Edit, plan: Planner) -> None:
    made = plan(edit(ESP, "operators.Conv", "limits", '{ groups = ["1", "channels", 2] }'), "depthwise")
    assert where(made, "grouped") == "accelerator"


@pytest.mark.parametrize("limit", ['{ groups = ["1"] }', "{ rank = { max = 3 } }"])
def test_a_narrower_limit_leaves_the_depthwise_convolution_to_the_host(limit: str, edit: Edit, plan: Planner) -> None:
    made = plan(edit(ESP, "operators.Conv", "limits", limit), "depthwise")
    assert where(made, "depthwise") == "host"


def test_without_fixed_output_softmax_is_calibrated(edit: Edit, plan: Planner) -> None:
    made = plan(edit(LITERT, "operators.Softmax", "fixed_output.a8", None), "perceptron")
    assert written(made, "softmax").fixed is None
    ranged = {site for step in made.steps if step.stage == "activation_range" for site in step.sites}
    assert written(made, "softmax").group in ranged


def test_another_fixed_output_is_taken(edit: Edit, plan: Planner) -> None:
    spec = edit(LITERT, "operators.Softmax", "fixed_output.a8", "{ scale = 0.0078125, zero_point = 0 }")
    fixed = written(plan(spec, "perceptron"), "softmax").fixed
    assert fixed is not None
    assert (fixed.scale, fixed.zero_point) == (1 / 128, 0)


def test_a_fixed_zero_point_that_is_no_code_is_refused(edit: Edit) -> None:
    with pytest.raises(TargetError, match=r"-129 is not a code of format 'a8' \(-128 to 127\)"):
        edit(LITERT, "operators.Softmax", "fixed_output.a8", "{ scale = 0.00390625, zero_point = -129 }")


@ALL
def test_an_operator_without_kernels_goes_to_the_host(name: str, edit: Edit, plan: Planner) -> None:
    made = plan(edit(name, "operators.Gemm", "kernels", "[]"), "perceptron")
    assert {where(made, "hidden"), where(made, "logits")} == {"host"}
    assert made.accelerator_macs == 0


@ALL
def test_a_chip_that_refuses_host_operators_refuses_the_model(name: str, edit: Edit, plan: Planner) -> None:
    spec = edit(name, "operators.Gemm", "kernels", "[]")
    with pytest.raises(PlanError, match=r'runs whole models only \(fallback = "refuse"\), and cannot run hidden'):
        plan(spec.model_copy(update={"fallback": "refuse"}), "perceptron")


@ALL
def test_the_first_weight_format_is_the_one_chosen(name: str, edit: Edit, plan: Planner) -> None:
    kernel = {WHITEPAPER: "mac", ORT: "mac_u8", LITERT: "mac", ESP: "mac8"}[name]
    made = plan(edit(name, f"kernels.{kernel}", "weight", '["w8t", "w8"]'), "conv")
    assert made.point("conv.weight").format == "w8t"


def test_the_first_kernel_is_the_one_chosen(edit: Edit, plan: Planner) -> None:
    made = plan(edit(ESP, "operators.Conv", "kernels", '["mac16", "mac8"]'), "conv")
    assert [made.point(name).format for name in ("conv.weight", "conv.bias", "conv")] == ["w16", "wide", "s16"]


@pytest.mark.parametrize(("name", "bias"), [(WHITEPAPER, "wide"), (ORT, "wide"), (LITERT, "wide"), (ESP, "narrow")])
@pytest.mark.parametrize("bits", ['"float"', '"unknown"'])
def test_a_bias_without_a_width_stays_float(name: str, bias: str, bits: str, edit: Edit, plan: Planner) -> None:
    made = plan(edit(name, f"biases.{bias}", "bits", bits), "conv")
    assert not [point for point in made.points if point.role == "bias"]
    assert (f"biases.{bias}.bits" in subjects(made)) is (bits == '"unknown"')


@ALL
def test_an_unknown_accumulator_and_rounding_are_said_in_the_plan(
    name: str, edit: Edit, shipped: Callable[[str], TargetSpec], plan: Planner
) -> None:
    accumulator, rule = ("narrow", "shift") if name == ESP else ("sum", "rescale")
    assert f"accumulators.{accumulator}.bits" not in subjects(plan(shipped(name), "conv"))
    made = plan(edit(name, f"accumulators.{accumulator}", "bits", '"unknown"'), "conv")
    assert f"accumulators.{accumulator}.bits" in subjects(made)
    made = plan(edit(name, f"requantize.{rule}", "rounding", '"unknown"'), "conv")
    assert f"requantize.{rule}.rounding" in subjects(made)


@pytest.mark.parametrize("name", [WHITEPAPER, ORT, LITERT])
def test_float_outputs_are_not_quantized(name: str, edit: Edit, plan: Planner) -> None:
    made = plan(edit(name, "boundary", "outputs", '"float"'), "perceptron")
    assert "softmax" not in {point.operator for point in made.points if point.role == "activation"}


@pytest.mark.parametrize(
    ("name", "form", "field", "value", "seen"),
    [
        (WHITEPAPER, "a8", "bits", "7", ("quant_max", 127)),
        (ORT, "u8", "signed", "true", ("quant_min", -128)),
        (LITERT, "w8", "codes", "[-64, 63]", ("quant_min", -64)),
        (LITERT, "a8", "zero_point", "0", ("zero_point", 0)),
        (ESP, "s8", "scale", '{ kind = "float32" }', ("scale_kind", "float32")),
    ],
    ids=["bits", "signed", "codes", "zero_point", "scale"],
)
def test_a_changed_format_changes_the_grid(
    name: str,
    form: str,
    field: str,
    value: str,
    seen: tuple[str, object],
    edit: Edit,
    shipped: Callable[[str], TargetSpec],
) -> None:
    attribute, wanted = seen
    changed = edit(name, f"formats.{form}", field, value)
    assert getattr(grid_of(shipped(name), form), attribute) != wanted
    assert getattr(grid_of(changed, form), attribute) == wanted


# What a target says of kernels, operators, biases and the whole network, in small files: with the fact, without it.

SMALL = """
schema_version = 1
name = "acme/npu"
fallback = "host"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.u8 = { bits = 8, signed = false, per = "tensor" }
formats.a16 = { bits = 16, signed = true, zero_point = 0, per = "tensor" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
formats.w4 = { codes = [-7, 7], zero_point = 0, per = "out_channel" }
formats.w16 = { codes = [-32767, 32767], zero_point = 0, per = "out_channel" }
formats.t8 = { codes = [-127, 127], zero_point = 0, per = "tensor" }
biases.wide = { bits = 32, scale = "input*weight" }
accumulators.sum = { bits = 32, overflow = "wrap" }
requantize.own = { kind = "float64", rounding = "half_even" }
kernels.mac = { input = ["a8"], weight = ["w8", "t8"], output = ["a8"], bias = "wide", accumulator = "sum" }
kernels.few = { input = ["a8"], weight = ["w4"], output = ["a8"], bias = "wide", accumulator = "sum" }
kernels.wide = { input = ["a16"], weight = ["w8", "w16"], output = ["a16", "a8"], bias = "wide" }
kernels.unary = { input = ["a8", "a16"], output = ["a8", "a16"] }
kernels.to_float = { input = ["a8"] }
operators.Conv = { kernels = ["mac"], fused = ["Relu"] }
operators.DepthwiseConv = { kernels = ["mac"] }
operators.Gemm = { kernels = ["mac"], fused = ["Relu"] }
operators.Add = { kernels = ["unary"] }
operators.Concat = { kernels = ["unary"] }
operators.Relu = { kernels = ["unary"] }
operators.MaxPool = { kernels = ["unary"] }
operators.AveragePool = { kernels = ["unary"] }
operators.GlobalAveragePool = { kernels = ["unary"] }
operators.Softmax = { kernels = ["unary"] }
operators.Flatten = { same_scale = "input_output" }
"""


def small(*changes: tuple[str, str], more: str = "") -> TargetSpec:
    text = SMALL
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return parse_target(text + more)


def formats(plan: QuantPlan) -> dict[str, str]:
    return {point.name: point.format for point in plan.points}


def decided(plan: QuantPlan, operator: str) -> tuple[str, str]:
    found = next(op for op in plan.operators if op.name == operator)
    return found.where, found.subject


def kernel(plan: QuantPlan, operator: str) -> str | None:
    return next(op.kernel for op in plan.operators if op.name == operator)


def test_a_float_result_has_no_point_and_its_operator_runs_here(plan: Planner) -> None:
    without = plan(small(), "perceptron")
    assert written(without, "softmax").format == "a8"
    made = plan(
        small(('Softmax = { kernels = ["unary"] }', 'Softmax = { kernels = ["to_float"], output = "float" }')),
        "perceptron",
    )
    assert decided(made, "softmax") == ("accelerator", "operators.Softmax.kernels")
    assert kernel(made, "softmax") == "to_float"
    assert "softmax" not in {p.operator for p in made.points}


def test_a_kernel_without_an_output_needs_that_its_result_is_float(plan: Planner) -> None:
    made = plan(small(('Softmax = { kernels = ["unary"] }', 'Softmax = { kernels = ["to_float"] }')), "perceptron")
    assert decided(made, "softmax") == ("host", "kernels.to_float.output")


def test_parameters_in_float_have_no_points(plan: Planner) -> None:
    change = (
        'operators.Conv = { kernels = ["mac"], fused',
        'operators.Conv = { kernels = ["mac"], parameters = "float", fused',
    )
    assert {p.role for p in plan(small(), "conv").points} == {"input", "weight", "bias", "activation"}
    made = plan(small(change), "conv")
    assert decided(made, "conv") == ("accelerator", "operators.Conv.kernels")
    assert {p.role for p in made.points} == {"input", "activation"}


@pytest.mark.parametrize(("may", "format_of_result"), [("true", "a16"), ("false", "a8")])
def test_an_operator_that_keeps_its_precision_gives_the_width_it_reads(
    may: str, format_of_result: str, plan: Planner
) -> None:
    change = ('MaxPool = { kernels = ["unary"] }', f'MaxPool = {{ kernels = ["grow"], may_change_precision = {may} }}')
    rows = 'kernels.grow = { input = ["a8"], output = ["a16", "a8"] }\n'
    assert written(plan(small(change, more=rows), "pools"), "maximum").format == format_of_result


def test_weights_too_have_the_width_of_an_operator_that_keeps_it(plan: Planner) -> None:
    change = (
        'operators.Conv = { kernels = ["mac"]',
        'operators.Conv = { kernels = ["wide"], may_change_precision = %s',
    )
    for may, weight, result in (("true", "w8", "a16"), ("false", "w16", "a16")):
        made = plan(small((change[0], change[1] % may)), "conv")
        assert (formats(made)["conv.weight"], written(made, "conv").format) == (weight, result)


def test_no_kernel_of_one_width_leaves_it_to_the_host(plan: Planner) -> None:
    rows = 'kernels.grow = { input = ["a8"], output = ["a16"] }\n'
    change = ('MaxPool = { kernels = ["unary"] }', 'MaxPool = { kernels = ["grow"], may_change_precision = false }')
    made = plan(small(change, more=rows), "pools")
    assert decided(made, "maximum") == ("host", "operators.MaxPool.may_change_precision")


def test_a_kernel_can_take_in_other_operators_than_its_kind(plan: Planner) -> None:
    """onnxruntime folds a Relu into an asymmetric result alone."""
    rows = 'kernels.plain = { input = ["a16"], weight = ["w8"], output = ["a16"], bias = "wide", fused = [] }\n'
    spec = small(('operators.Conv = { kernels = ["mac"]', 'operators.Conv = { kernels = ["mac", "plain"]'), more=rows)
    members = {op.name: op.members for op in plan(spec, "conv").operators}
    assert members["conv"] == ("conv", "relu")
    made = plan(spec, "conv", formats={"conv": "a16"})
    assert (kernel(made, "conv"), decided(made, "relu")) == ("plain", ("accelerator", "operators.Relu.kernels"))
    assert {op.name: op.members for op in made.operators}["conv"] == ("conv",)


def test_the_cheapest_kernel_is_preferred(plan: Planner) -> None:
    both = ('operators.Conv = { kernels = ["mac"]', 'operators.Conv = { kernels = ["few", "mac"]')
    assert kernel(plan(small(both), "conv"), "conv") == "few"
    cost = ('kernels.few = { input = ["a8"], weight', 'kernels.few = { preference_cost = 1.5, input = ["a8"], weight')
    assert kernel(plan(small(both, cost), "conv"), "conv") == "mac"


def test_the_cheapest_format_is_preferred(plan: Planner) -> None:
    wide = (
        'kernels.mac = { input = ["a8"], weight = ["w8", "t8"]',
        'kernels.mac = { input = ["a8"], weight = ["t8", "w8"]',
    )
    assert formats(plan(small(wide), "conv"))["conv.weight"] == "t8"
    cost = ("formats.t8 = {", "formats.t8 = { preference_cost = 1.0,")
    assert formats(plan(small(wide, cost), "conv"))["conv.weight"] == "w8"


def test_a_bias_of_too_many_channels_leaves_the_operator_to_another_kernel(plan: Planner) -> None:
    rule = ("biases.wide = { bits = 32,", "biases.wide = { max_channels = %d, bits = 32,")
    assert decided(plan(small((rule[0], rule[1] % 4)), "conv"), "conv")[0] == "accelerator"  # 4 channels
    assert decided(plan(small((rule[0], rule[1] % 3)), "conv"), "conv") == ("host", "kernels.mac.bias")
    rows = 'kernels.other = { input = ["a8"], weight = ["w8"], output = ["a8"], bias = "b" }\nbiases.b.bits = 40\n'
    spec = small(
        (rule[0], rule[1] % 3),
        ('operators.Conv = { kernels = ["mac"]', 'operators.Conv = { kernels = ["mac", "other"]'),
        more=rows,
    )
    assert kernel(plan(spec, "conv"), "conv") == "other"


@pytest.mark.parametrize(("per", "weight"), [("out_channel", "w8"), ("tensor", "t8")])
def test_one_multiplier_for_all_channels_leaves_weights_one_scale(per: str, weight: str, plan: Planner) -> None:
    spec = small(
        ('accumulator = "sum" }\nkernels.few', 'accumulator = "sum", requantize = "own" }\nkernels.few'),
        ('requantize.own = { kind = "float64",', f'requantize.own = {{ per = "{per}", kind = "float64",'),
    )
    assert formats(plan(spec, "conv"))["conv.weight"] == weight


@pytest.mark.parametrize(("asked", "weight"), [("out_channels", "w8"), ("out_channels/groups", "t8")])
def test_the_number_of_scales_of_a_grouped_convolution(asked: str, weight: str, plan: Planner) -> None:
    change = (
        'DepthwiseConv = { kernels = ["mac"] }',
        f'DepthwiseConv = {{ kernels = ["mac"], weight_scales = "{asked}" }}',
    )
    assert formats(plan(small(change), "depthwise"))["depthwise.weight"] == weight


def test_a_group_divides_the_inputs_and_is_the_largest_that_does(plan: Planner) -> None:
    row = ('weight = ["w8", "t8"], output = ["a8"], bias = "wide"', 'weight = ["g8", "t8"], output = ["a8"]')
    group = 'formats.g8 = { codes = [-127, 127], zero_point = 0, per = "group", group_size = %s }\n'
    made = plan(small(row, more=group % "[2, 3, 4]"), "perceptron")  # 8 inputs, then 6
    assert {p.name: p.group_size for p in made.points if p.role == "weight"} == {"hidden.weight": 4, "logits.weight": 3}
    made = plan(small(row, more=group % "4"), "perceptron")
    assert {name: form for name, form in formats(made).items() if name.endswith(".weight")} == {
        "hidden.weight": "g8",
        "logits.weight": "t8",  # 4 does not divide 6
    }


def test_an_integer_bias_needs_one_scale_per_channel(plan: Planner) -> None:
    group = 'formats.g8 = { codes = [-127, 127], zero_point = 0, per = "group", group_size = 2 }\n'
    row = 'weight = ["w8", "t8"], output = ["a8"], bias = "wide"'
    made = plan(small((row, row.replace('"w8", "t8"', '"g8"')), more=group), "perceptron")
    assert decided(made, "hidden") == ("host", "kernels.mac.weight")
    made = plan(
        small(
            (row, row.replace('"w8", "t8"', '"g8"').replace('"wide"', '"real"')),
            more=group + 'biases.real = { bits = "float" }\n',
        ),
        "perceptron",
    )
    assert decided(made, "hidden")[0] == "accelerator"


def test_aligned_operands_have_one_format_and_scales_of_their_own(plan: Planner) -> None:
    """The left branch has 16 bits, the right one 8: where they are aligned, one is requantized."""
    spec = small(('operators.Conv = { kernels = ["mac"]', 'operators.Conv = { kernels = ["mac", "wide"]'))
    aligned = spec.operators["Add"].model_copy(update={"same_scale": "aligned"})
    free = plan(spec, "residual", formats={"left": "a16", "right": "a8"})
    assert not [p for p in free.points if p.role == "edge" and p.operator == "add"]
    made = plan(spec.model_copy(update={"operators": {**spec.operators, "Add": aligned}}), "residual",
                formats={"left": "a16", "right": "a8"})  # fmt: skip
    joined = [p for p in made.points if p.role in ("edge", "activation") and p.operator == "add"]
    assert len([p for p in joined if p.role == "edge"]) >= 1
    read = {p.format for p in made.points if "add" in p.consumers} | {p.format for p in joined}
    assert len(read) == 1
    assert len({p.group for p in made.points if "add" in p.consumers or p in joined}) >= 3


# The edge of the network, and the network as a whole


def test_inputs_in_float_leave_their_readers_to_the_host(plan: Planner) -> None:
    spec = small(more='boundary.inputs = "float"\n')
    made = plan(spec, "perceptron")
    assert decided(made, "hidden") == ("host", "boundary.inputs")
    assert decided(made, "logits")[0] == "accelerator"


def test_an_input_has_a_format_of_the_edge_and_is_requantized_where_no_kernel_reads_it(plan: Planner) -> None:
    assert formats(plan(small(), "perceptron"))["x"] == "a8"
    made = plan(small(more='boundary.input_formats = ["u8"]\n'), "perceptron")
    assert (formats(made)["x"], formats(made)["hidden.input.0"]) == ("u8", "a8")


def test_a_result_has_a_format_of_the_edge(plan: Planner) -> None:
    out = 'formats.out32 = { bits = 32, signed = true, zero_point = 0, per = "tensor" }\n'
    made = plan(small(more=out + 'boundary.output_formats = ["a8", "out32"]\n'), "conv")
    assert written(made, "conv").legal == ("a8", "out32")
    made = plan(small(more=out + 'boundary.output_formats = ["out32"]\n'), "residual")
    assert {name: form for name, form in formats(made).items() if name in ("left", "right")} == {
        "left": "a8",
        "right": "a8",
    }
    assert out and "out32" in formats(made).values()


@pytest.mark.parametrize("most", [1, 2, 3])
def test_layers_past_the_most_are_the_hosts(most: int, plan: Planner) -> None:
    made = plan(small(more=f"network.max_layers = {most}\n"), "perceptron")
    layers = ["hidden", "logits", "softmax"]
    assert [decided(made, name)[0] for name in layers[:most]] == ["accelerator"] * most
    assert [decided(made, name) for name in layers[most:]] == [("host", "network.max_layers")] * (3 - most)


def test_tensors_of_too_high_a_rank_are_the_hosts(plan: Planner) -> None:
    assert decided(plan(small(more="network.max_rank = 4\n"), "conv"), "conv")[0] == "accelerator"
    assert decided(plan(small(more="network.max_rank = 3\n"), "conv"), "conv") == ("host", "network.max_rank")


def test_weights_that_do_not_fit_are_the_hosts(plan: Planner) -> None:
    """48 weights of 8 inputs and 18 of 6, in bytes of w8; in w4 a half of that."""
    bytes_of = {"hidden": 48, "logits": 18}
    for most, here in ((66, {"hidden", "logits"}), (65, {"hidden"}), (47, {"logits"}), (17, set())):
        made = plan(small(more=f"network.max_weight_bytes = {most}\n"), "perceptron")
        assert {name for name in bytes_of if decided(made, name)[0] == "accelerator"} == here
        assert {decided(made, name)[1] for name in set(bytes_of) - here} <= {"network.max_weight_bytes"}
    half = small(
        ('kernels.mac = { input = ["a8"], weight = ["w8", "t8"]', 'kernels.mac = { input = ["a8"], weight = ["w4"]'),
        more="network.max_weight_bytes = 33\n",
    )
    assert decided(plan(half, "perceptron"), "logits")[0] == "accelerator"


def test_a_network_past_its_limits_is_refused_where_there_is_no_host(plan: Planner) -> None:
    spec = small(('fallback = "host"', 'fallback = "refuse"'), more="network.max_layers = 1\n")
    with pytest.raises(
        PlanError, match=r"cannot run logits \(Gemm: 1 layers come before it, which is the most, network"
    ):
        plan(spec, "perceptron")


def test_all_behind_the_first_on_the_host_is_there(plan: Planner) -> None:
    gone = ('MaxPool = { kernels = ["unary"] }', "MaxPool = { kernels = [] }")
    hosted = [decided(plan(small(gone), "pools"), name)[0] for name in ("conv", "maximum", "average")]
    assert hosted == ["accelerator", "host", "accelerator"]
    made = plan(small(gone, ('fallback = "host"', 'fallback = "single_partition"')), "pools")
    assert [decided(made, name) for name in ("conv", "maximum", "average")] == [
        ("accelerator", "operators.Conv.kernels"),
        ("host", "operators.MaxPool.kernels"),
        ("host", "fallback"),
    ]


def test_a_view_on_the_host_ends_the_single_partition(plan: Planner) -> None:
    change = ('Flatten = { same_scale = "input_output" }', "Flatten = { kernels = [] }")
    partition = ('fallback = "host"', 'fallback = "single_partition"')
    assert decided(plan(small(partition), "flat"), "head")[0] == "accelerator"
    assert decided(plan(small(change), "flat"), "head")[0] == "accelerator"
    assert decided(plan(small(change, partition), "flat"), "head") == ("host", "fallback")


# Coupled choices


def test_granularity_and_symmetry_are_coupled_as_formats_are(plan: Planner) -> None:
    """Per channel implies symmetric, per tensor asymmetric: there is no third."""
    free = 'formats.free8 = { bits = 8, signed = true, zero_point = "free", per = "tensor" }\n'
    spec = small(('weight = ["w8", "t8"]', 'weight = ["w8", "free8"]'), more=free)
    made = plan(spec, "conv")
    assert made.point("conv.weight").legal == ("w8", "free8")
    assert [(spec.formats[name].per, spec.formats[name].zero_point) for name in made.point("conv.weight").legal] == [
        ("out_channel", 0),
        ("tensor", "free"),
    ]
    assert formats(plan(spec, "conv", formats={"conv.weight": "free8"}))["conv.weight"] == "free8"
    with pytest.raises(PlanError, match=r"conv\.weight: no kernel of Conv holds weights in 't8'\. It holds: w8, free8"):
        plan(spec, "conv", formats={"conv.weight": "t8"})


def test_widths_can_be_mixed_operator_by_operator(plan: Planner) -> None:
    spec = small(('Gemm = { kernels = ["mac"]', 'Gemm = { kernels = ["mac", "few", "wide"]'))
    made = plan(spec, "perceptron", formats={"hidden.weight": "w4", "logits": "a16", "logits.weight": "w16"})
    found = formats(made)
    assert [found[name] for name in ("x", "hidden.weight", "hidden", "logits.weight", "logits")] == [
        "a8", "w4", "a8", "w16", "a16",
    ]  # fmt: skip
    assert (kernel(made, "hidden"), kernel(made, "logits"), found["logits.input.0"]) == ("few", "wide", "a16")
    assert found["softmax"] == "a8"
