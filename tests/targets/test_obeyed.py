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
