# SPDX-License-Identifier: Apache-2.0
"""greenwaves/gap9-ne16 in integers, against the steps of the vendor's model: sum * multiplier, + bias, >> shift, clamp.

What the compiler folds into the bias is folded here too: zero points, and the bias times the channel's multiplier.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.errors import QhwError
from qhw.integer import IntegerModel
from qhw.schema import parse_target
from tests.integer_support import convolution


class Layers(nn.Module):
    """3x3, depthwise 3x3 and 1x1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3)
        self.deep = nn.Conv2d(8, 8, 3, groups=8)
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(torch.relu(self.deep(torch.relu(self.first(x)))))
        return found


def normquant(acc: Any, real: Any, bias: Any, zero: int) -> Any:
    """code = (acc * mult + bias) >> shift, with the multiplier of 8 bits nearest to a channel's real factor."""
    mult, shift = np.empty(len(real), np.int64), np.empty(len(real), np.int64)
    for channel, factor in enumerate(real):
        power = 0
        while np.rint(factor * 2.0**power) < 128:  # the most significant of the 8 bits is set
            power += 1
        mult[channel], shift[channel] = int(np.rint(factor * 2.0**power)), power
    assert ((mult >= 128) & (mult <= 255) & (shift <= 31)).all()
    column = (-1, 1, 1)
    folded = bias * mult + (zero << shift)
    assert (np.abs(folded) < 2**31).all()
    return np.clip((acc * mult.reshape(column) + folded.reshape(column)) >> shift.reshape(column), 0, 255)


@pytest.fixture(scope="module")
def file(targets_root: Path) -> str:
    return (targets_root / "greenwaves" / "gap9-ne16.toml").read_text()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def quantized(text: str, x: Tensor, weights: str = "w8") -> Any:
    target = parse_target(text)
    return qhw.quantize(
        Layers().eval(),
        target,
        example_inputs=x,
        calibration=x,
        pipeline="ranges-ptq",
        formats={"*.weight": weights},
    )


@pytest.mark.parametrize("weights", ["w8", "w5", "w2"])
def test_a_bias_is_added_behind_the_multiplier_and_nothing_is_rounded(file: str, x: Tensor, weights: str) -> None:
    result = quantized(file, x, weights)
    assert {op.where for op in result.plan.operators} == {"accelerator"}
    found = {name: values.numpy().astype(np.int64) for name, values in IntegerModel(result).codes(x).items()}
    grids = result.encodings()
    groups = {point.tensor: point.group for point in result.plan.points}
    limit = {"w8": 127, "w5": 15, "w2": 1}[weights]
    for name, source, written, count in (
        ("first", "x", "relu", 1),
        ("deep", "relu", "relu_1", 8),
        ("last", "relu_1", "last", 1),
    ):
        weight, bias = (
            result.codes(result.plan.point(f"{name}.{kind}")).numpy().astype(np.int64) for kind in ("weight", "bias")
        )
        assert np.abs(weight).max() == limit
        zero_in, zero_out = (int(grids[groups[tensor]].zero_point) for tensor in (source, written))
        acc = convolution(found[source] - zero_in, weight, [1, 1], [(0, 0), (0, 0)], [1, 1], count)
        scales = [
            np.asarray(grids[key].scale, np.float64) for key in (groups[source], f"{name}.weight", groups[written])
        ]
        codes = normquant(acc, scales[0] * scales[1] / scales[2], bias, zero_out)
        np.testing.assert_array_equal(found[written], np.maximum(codes, zero_out) if written != "last" else codes)


CHANGES = [
    ('rounding = "floor"', 'rounding = "half_to_plus_infinity"'),
    ('applied = "after_multiplier"', 'applied = "before_requantize"'),
    ("multiplier_bits = 8", "multiplier_bits = 16"),
]


@pytest.mark.parametrize(("clause", "other"), CHANGES[::2], ids=["rounding", "bits"])
def test_each_clause_decides(file: str, x: Tensor, clause: str, other: str) -> None:
    assert clause in file
    one, two = (IntegerModel(quantized(text, x)).codes(x)["relu"] for text in (file, file.replace(clause, other)))
    assert int((one != two).sum()) > 50  # of 1568


def test_a_bias_before_the_multiplier_gives_the_same_sum(file: str, x: Tensor) -> None:
    clause, other = CHANGES[1]
    one, two = (IntegerModel(quantized(text, x)).codes(x)["relu"] for text in (file, file.replace(clause, other)))
    assert torch.equal(one, two)  # (acc + b) m = acc m + b m: what must fit 32 bits differs, and no code


def test_kernels_of_another_size_run_in_software(file: str) -> None:
    for text, where in ((file, "host"), (file.replace("kernel = [[1, 1], [3, 3]], ", ""), "accelerator")):
        plan = qhw.plan(
            nn.Conv2d(3, 4, 5).eval(),
            parse_target(text),
            torch.zeros(1, 3, 9, 9),
            calibration=[torch.zeros(1, 3, 9, 9)],
        )
        assert plan.operators[0].where == where


def test_a_bias_has_24_bits(file: str, x: Tensor) -> None:
    model = Layers().eval()
    with torch.no_grad():
        model.first.bias.mul_(1e6)  # type: ignore[union-attr]
    result = qhw.quantize(model, parse_target(file), example_inputs=x, calibration=x, pipeline="ranges-ptq")
    assert result.codes(result.plan.point("first.bias")).abs().max() < 2**23
    refusing = file.replace("storage_bits = [32]\n", 'storage_bits = [32]\nout_of_range = "refuse"\n')
    with pytest.raises(QhwError):
        qhw.quantize(
            model,
            parse_target(refusing),
            example_inputs=x,
            calibration=x,
            without=["requantization_fit"],
            pipeline="ranges-ptq",
        )
