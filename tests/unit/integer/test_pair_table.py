# SPDX-License-Identifier: Apache-2.0
"""Functions of two codes by table: the function itself, for every pair, layout in memory and broadcast."""

import pytest
import torch
from torch import Tensor

from qhw.integer.pair_table import by_table
from qhw.numerics import PerTensor, QParams

LAYOUTS = {"plain": torch.contiguous_format, "last": torch.channels_last}


def grid(low: int, high: int) -> QParams:
    return QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), low, high, PerTensor())


def function(values: list[Tensor]) -> Tensor:
    """No two pairs of nearby codes have one value, and the order of operands counts."""
    return values[0] * 1000 + values[1]


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", [*LAYOUTS, "pixels", "channels"])
@pytest.mark.parametrize("ends", [((0, 255), (0, 255)), ((-128, 127), (-128, 127)), ((0, 255), (-8, 7))])
def test_the_table_is_the_function_in_any_layout(
    first: str, second: str, ends: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"pixels": (9, 1, 40, 41), "channels": (1, 7, 1, 1)}
    (a, b) = ends
    x = torch.randint(a[0], a[1] + 1, (9, 7, 40, 41), generator=generator).float()
    y = torch.randint(b[0], b[1] + 1, shapes.get(second, (9, 7, 40, 41)), generator=generator).float()
    x = x.contiguous(memory_format=LAYOUTS[first])
    y = y.contiguous(memory_format=LAYOUTS.get(second, torch.contiguous_format))
    found = by_table(function, grid(*a), grid(*b))  # type: ignore[arg-type]
    assert found is not function
    assert torch.equal(found([x, y]), function([x, y]))
    if a == b:
        assert torch.equal(found([y, x]), function([y, x]))
    if first == "last" and second in LAYOUTS:
        assert found([x, y]).is_contiguous(memory_format=torch.channels_last)
