# SPDX-License-Identifier: Apache-2.0
"""k-means against the optimum by dynamic programming; palettes: nearest entries, codes, tables of channels."""

import itertools
import math
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhw.errors import RangeError
from qhw.numerics import (
    FakeQuantizer,
    Grid,
    PaletteElements,
    PerAxis,
    PerTensor,
    QParams,
    cluster_rows,
    dequantize,
    fake_quantize,
    quantize,
)


def cost(x: np.ndarray, centres: np.ndarray) -> float:
    """Squared distance of each value to the nearest centre, summed."""
    return float((np.abs(x[:, None] - centres).min(1) ** 2).sum())


def optimum(x: np.ndarray, count: int) -> float:
    """The least cost there is: clusters are runs of the sorted values, tried by dynamic programming."""
    x = np.sort(x)
    first, second = np.concatenate([[0], x.cumsum()]), np.concatenate([[0], (x**2).cumsum()])
    start, end = np.triu_indices(len(x) + 1, 1)
    run = np.full((len(x) + 1, len(x) + 1), np.inf)
    run[start, end] = second[end] - second[start] - (first[end] - first[start]) ** 2 / (end - start)
    best = np.concatenate([[0.0], np.full(len(x), np.inf)])
    for _ in range(count):
        best = np.minimum((best[:, None] + run).min(0), np.where(np.arange(len(x) + 1) == 0, 0.0, np.inf))
    return max(float(best[-1]), 0.0)


def by_hand(x: np.ndarray, count: int) -> float:
    """As `optimum`, over every partition: what the dynamic program is checked by."""
    x = np.sort(x)
    return min(
        sum(float(((part - part.mean()) ** 2).sum()) for part in np.split(x, cuts))
        for cuts in itertools.combinations(range(1, len(x)), count - 1)
    )


def test_the_dynamic_program_finds_the_least_cost() -> None:
    x = np.random.default_rng(0).normal(size=9)
    assert optimum(x, 3) == pytest.approx(by_hand(x, 3))


@pytest.mark.parametrize("kind", ["normal", "laplace", "clusters", "uniform", "outlier"])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_clusters_come_near_the_optimum(kind: str, count: int) -> None:
    rng = np.random.default_rng(len(kind) + count)
    rows = np.stack([_sample(rng, kind, 200) for _ in range(6)])
    found = cluster_rows(torch.from_numpy(rows), count).numpy()
    assert (np.diff(found) >= 0).all()
    ratios = [cost(x, centres) / optimum(x, count) for x, centres in zip(rows, found, strict=True)]
    assert min(ratios) >= 1 - 1e-9
    # 200 values are cut at 192 places, then moved by Lloyd's iterations; measured: 1.003 at most.
    assert max(ratios) <= 1.01


@pytest.mark.parametrize("count", [1, 3, 16])
def test_few_values_are_clustered_in_the_best_way_there_is(count: int) -> None:
    rows = np.stack([_sample(np.random.default_rng(seed), "laplace", 40) for seed in range(4)])
    for x, centres in zip(rows, cluster_rows(torch.from_numpy(rows), count).numpy(), strict=True):
        assert cost(x, centres) == pytest.approx(optimum(x, count), rel=1e-9)


def _sample(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    if kind == "clusters":
        return rng.choice([-3.0, -1.0, 0.0, 0.5, 2.0], size) + rng.normal(size=size) * 0.02
    if kind == "outlier":
        return np.concatenate([rng.normal(size=size - 1), [40.0]])
    return {"normal": rng.normal, "laplace": rng.laplace, "uniform": rng.uniform}[kind](size=size)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12), st.integers(1, 5))
def test_clusters_are_means_of_what_is_nearest(values: list[float], count: int) -> None:
    x = np.array(values)
    (found,) = cluster_rows(torch.from_numpy(x)[None], count).numpy()
    assert cost(x, found) <= cost(x, np.array([x.mean()])) + 1e-6
    if len(set(values)) <= 1:
        assert cost(x, found) == 0


def test_rows_of_different_lengths_are_clustered_each_by_itself() -> None:
    x = torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    short = x.clone()
    short[1, 13:] = math.nan
    found = cluster_rows(short, 4)
    assert torch.equal(found[0], cluster_rows(x[:1], 4)[0])
    assert torch.equal(found[1], cluster_rows(x[1:2, :13], 4)[0])


def palette_of(w: torch.Tensor, axis: int | None = 0, **fields: Any) -> PaletteElements:
    return PaletteElements(2, "float32", **fields).filled(w, axis)


def test_weights_go_to_the_nearest_entry_of_their_groups_table() -> None:
    w = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(1))
    palette = palette_of(w, group_channels=4)
    assert palette.table is not None and tuple(palette.table.shape) == (2, 1, 1, 4)
    found = palette.round_to(w)
    tables = palette.table.reshape(2, 4).numpy()
    for channel in range(6):
        entries = tables[channel // 4]
        wanted = entries[np.abs(w[channel].numpy()[..., None] - entries).argmin(-1)]
        assert np.array_equal(found[channel].numpy(), wanted)
    assert torch.equal(palette.decode(palette.encode(found)), found)
    assert palette.encode(found).dtype == torch.uint8 and int(palette.encode(found).max()) < 4


def test_channels_may_lie_along_another_axis() -> None:
    w = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    along, across = palette_of(w.t().contiguous(), 0, group_channels=2), palette_of(w, 1, group_channels=2)
    assert torch.equal(across.round_to(w), along.round_to(w.t().contiguous()).t())
    assert across.table is not None and tuple(across.table.shape) == (1, 4, 4)


def test_a_tie_goes_to_the_lower_entry_and_nan_stays() -> None:
    table = torch.tensor([[-1.0, 0.0, 1.0, 4.0]])
    palette = PaletteElements(2, "float32").with_tensors({"table": table})
    x = torch.tensor([-0.5, 0.5, 2.5, 2.6, 99.0, math.nan])
    assert palette.round_to(x)[:5].tolist() == [-1.0, 0.0, 1.0, 4.0, 4.0]
    assert palette.round_to(x)[5].isnan()
    assert palette.round_to(x.double()).dtype == torch.float64


@pytest.mark.parametrize("entry", ["float16", "bfloat16", "int8"])
def test_entries_are_of_their_type(entry: Any) -> None:
    w = torch.randn(4, 50, generator=torch.Generator().manual_seed(2)) * (40 if entry == "int8" else 1)
    table = PaletteElements(4, entry).filled(w, 0).table
    assert table is not None and table.unique().numel() > 8
    dtype = torch.int8 if entry == "int8" else getattr(torch, entry)
    assert torch.equal(table.to(dtype).float(), table)


def test_codes_reals_and_copies() -> None:
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    palette = palette_of(w, group_channels=1)
    scale = torch.tensor([1.0, 2.0, 0.5, 1.0])
    qparams = QParams(scale, torch.zeros(4, dtype=torch.int32), 0, 3, PerAxis(0), palette)
    assert torch.equal(dequantize(quantize(w, qparams), qparams), fake_quantize(w, qparams))
    assert qparams.bits == 2 and palette.beside_bits == 4 * 4 * 32
    kept, header = qparams.as_dict()
    fresh = PaletteElements(2, "float32", 1)
    assert QParams.from_dict(kept, header, fresh) == qparams
    assert palette.is_of(fresh) and not fresh.is_of(fresh) and palette != fresh
    quantizer = FakeQuantizer(qparams)
    assert set(quantizer.state_dict()) == {"elements_table", "scale", "zero_point"}
    copied = deepcopy(quantizer)
    assert torch.equal(copied(w), fake_quantize(w, qparams))
    quantizer.elements_table.mul_(2)
    assert not torch.equal(quantizer(w), copied(w))


def test_weights_may_train_on_a_palette() -> None:
    w = torch.randn(2, 6, requires_grad=True)
    palette = palette_of(w.detach())
    qparams = QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), 0, 3, PerTensor(), palette)
    FakeQuantizer(qparams)(w).sum().backward()
    assert w.grad is not None and torch.equal(w.grad, torch.ones_like(w))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PaletteElements(9, "float16"), "index_bits must be 1 to 8; got 9"),
        (lambda: PaletteElements(2, "float16").round_to(torch.zeros(2)), "has no look-up table yet"),
        (lambda: PaletteElements(1, "float16", table=torch.tensor([[2.0, 1.0]])), "entries must be finite and ascend"),
        (lambda: PaletteElements(1, "float16", table=torch.zeros(1, 3)), r"must be float32 \[groups among ones, 2\]"),
        (
            lambda: palette_of(torch.randn(4, 6), group_channels=1).round_to(torch.zeros(4)),
            "do not fit a tensor of shape",
        ),
    ],
)
def test_palettes_that_are_none_are_refused(make: Any, message: str) -> None:
    with pytest.raises(RangeError, match=message):
        make()


def test_a_grid_of_a_palette_has_its_codes() -> None:
    palette = PaletteElements(4, "int8", has_scale=True)
    grid = Grid(*palette.code_bounds, 0, elements=palette)
    assert (grid.quant_min, grid.quant_max) == (0, 15)
    assert (palette.is_absolute, PaletteElements(4, "float16").is_absolute) == (False, True)
