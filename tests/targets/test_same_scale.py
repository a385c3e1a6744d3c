# SPDX-License-Identifier: Apache-2.0
"""Sums, concatenations and pools: the white paper's two treatments of each (its section 2.8), from plan to output.

A file that extends the shipped one says which; the simulated output is compared with the same arithmetic by hand.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qhw
from qhw.extension import Registry
from qhw.numerics import QParams
from qhw.schema import parse_target

JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": lambda a, b: a + b,
    "Concat": lambda a, b: torch.cat([a, b], 1),
}
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "MaxPool": lambda x: F.max_pool2d(x, 2),
    "AveragePool": lambda x: F.avg_pool2d(x, 2),
    "GlobalAveragePool": lambda x: x.mean(dim=(2, 3)),
}
# The rule -> which tensors share a scale: l and r of the branches, o of what joins or pools them.
JOINED = {"none": ["l", "o", "r"], "inputs": ["lr", "o"], "input_output": ["lo", "r"], "all": ["lor"]}
POOLED = {"none": ["l", "o"], "inputs": ["l", "o"], "input_output": ["lo"], "all": ["lo"]}
CASES = [(kind, rule, wanted) for kind in JOINS for rule, wanted in JOINED.items()]
CASES += [(kind, rule, wanted) for kind in POOLS for rule, wanted in POOLED.items()]


class Net(nn.Module):
    """Two convolutions of unlike ranges and what joins them, or one and what pools it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.left = nn.Conv2d(3, 4, 1)
        if kind in JOINS:
            self.right = nn.Conv2d(3, 4, 1)
            with torch.no_grad():
                self.right.weight.mul_(5.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind in JOINS:
            return JOINS[self.kind](self.left(x), self.right(x))
        return POOLS[self.kind](self.left(x))


def net(kind: str) -> Net:
    torch.manual_seed(0)
    return Net(kind).eval()


@pytest.fixture(scope="module")
def data() -> Tensor:
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def quantize(registry: Registry, data: Tensor) -> Callable[[str, str], Any]:
    """Quantize for the shipped target, but with this rule for this operator."""

    def make(kind: str, rule: str) -> Any:
        lines = ["schema_version = 1", 'name = "test/tied"', 'extends = "whitepaper/generic-int8"']
        lines.append(f'operators.{kind} = {{ same_scale = "{rule}", source = "memory" }}')
        target = parse_target("\n".join(lines), find_base=registry.target_path)
        return qhw.quantize(net(kind), target, example_inputs=data[:2], calibration=data, pipeline="ranges-ptq")

    return make


def groups(result: Any) -> dict[str, str]:
    """The scale of each tensor behind the input: l, r, and o."""
    letters = {"left": "l", "right": "r"}
    return {letters.get(p.operator, "o"): p.group for p in result.plan.points if p.role in ("activation", "edge")}


def on(x: Tensor, qparams: QParams) -> Tensor:
    """Equation 7, by hand."""
    shape = (-1, *(1,) * (x.ndim - 1)) if qparams.scale.ndim else ()
    scale, zero_point = qparams.scale.reshape(shape), qparams.zero_point.reshape(shape)
    codes = torch.clamp(torch.round(x / scale) + zero_point, qparams.quant_min, qparams.quant_max)
    return scale * (codes - zero_point)


def by_hand(kind: str, result: Any, x: Tensor) -> Tensor:
    """The float model, each tensor on the grid that the result has for it."""
    model, encodings, scales = net(kind), result.encodings(), groups(result)

    def convolved(name: str) -> Tensor:
        layer = getattr(model, name)
        weight, bias = on(layer.weight, encodings[f"{name}.weight"]), on(layer.bias, encodings[f"{name}.bias"])
        return on(F.conv2d(on(x, encodings["x"]), weight, bias), encodings[scales[name[0]]])

    if kind in JOINS:
        return on(JOINS[kind](convolved("left"), convolved("right")), encodings[scales["o"]])
    return on(POOLS[kind](convolved("left")), encodings[scales["o"]])


@pytest.mark.parametrize(("kind", "rule", "wanted"), CASES)
def test_the_rule_decides_which_tensors_share_a_scale_and_the_output_obeys(
    kind: str, rule: str, wanted: list[str], quantize: Callable[[str, str], Any], data: Tensor
) -> None:
    result = quantize(kind, rule)
    found = groups(result)
    shared = {group: "".join(sorted(k for k, g in found.items() if g == group)) for group in found.values()}
    assert sorted(shared.values()) == wanted
    with torch.no_grad():
        simulated, expected = result(data), by_hand(kind, result, data)
    step = float(result.encodings()[found["o"]].scale)
    # The same float operations but for the order of a convolution's sums: a value on a tie may land one code away.
    difference = (simulated - expected).abs()
    assert float(difference.max()) < 1.01 * step
    assert float((difference < 0.01 * step).float().mean()) > 0.999


@pytest.mark.parametrize(("kind", "tied"), [("Add", "inputs"), ("Concat", "all"), ("MaxPool", "input_output")])
def test_tied_tensors_have_one_scale_and_zero_point_that_covers_both(
    kind: str, tied: str, quantize: Callable[[str, str], Any], data: Tensor
) -> None:
    free, result = quantize(kind, "none"), quantize(kind, tied)
    alone, (shared,) = groups(free), {g for k, g in groups(result).items() if kind != "Add" or k != "o"}
    scales = {letter: float(free.encodings()[group].scale) for letter, group in alone.items()}
    found = float(result.encodings()[shared].scale)
    if kind == "MaxPool":
        assert scales["o"] < found  # the pooled values miss what is below the largest of four
    else:
        # The wide branch decides: its range is five times the other's, whose own grid was finer.
        assert scales["l"] * 3 < found
        assert found == pytest.approx(scales["r"], rel=0.2)
    with torch.no_grad():
        assert not torch.equal(free(data), result(data))


@pytest.mark.parametrize(("kind", "rule"), [("Add", "none"), ("Concat", "none"), ("MaxPool", "input_output")])
def test_the_shipped_file_says_what_the_paper_does(kind: str, rule: str, registry: Registry) -> None:
    spec = parse_target(registry.target_path("whitepaper/generic-int8").read_text())
    assert spec.operators[kind].same_scale == rule
    assert spec.operators["AveragePool"].same_scale == spec.operators["GlobalAveragePool"].same_scale == "input_output"
