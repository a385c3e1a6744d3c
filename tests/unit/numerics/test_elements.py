# SPDX-License-Identifier: Apache-2.0
"""Listed elements by hand; qparams, quantize and its gradients on elements; what is refused."""

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qhw.errors import RangeError
from qhw.numerics import (
    FakeQuantizer,
    FloatElements,
    Grid,
    LearnedQuantizer,
    ListedElements,
    PerAxis,
    PerGroup,
    PerTensor,
    QParams,
    cross_entropy_qparams,
    dequantize,
    fake_quantize,
    mse_qparams_from_histogram,
    mse_qparams_from_tensor,
    qparams_from_range,
    quantize,
)
from qhw.numerics.statistics import Histogram

E4M3 = FloatElements(4, 3, 448.0)
BIPOLAR = ListedElements((-1.0, 1.0), (-1, 1))
ODD = ListedElements((-4.0, -1.0, 0.5, 3.0), (2, 1, 0, 3))


def grid(elements: Any, **fields: Any) -> Grid:
    return Grid(*elements.code_bounds, 0, elements=elements, **fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_listed_elements_round_to_the_nearest_and_ties_to_the_even_code(dtype: torch.dtype) -> None:
    # Middles by hand: -2.5 (codes 2, 1: to the even 2), -0.25 (1, 0: to 0, upwards), 1.75 (0, 3: to 0, downwards).
    x = torch.tensor([-9.0, -2.5, -2.4999, -0.25, -0.2501, 1.75, 1.7501, 8.0, math.inf, -math.inf], dtype=dtype)
    expected = [-4.0, -4.0, -1.0, 0.5, -1.0, 0.5, 3.0, 3.0, 3.0, -4.0]
    assert ODD.round_to(x).tolist() == expected
    assert ODD.round_to(x).dtype == dtype
    assert ODD.round_to(torch.tensor([math.nan], dtype=dtype)).isnan().all()


def test_a_tie_between_codes_that_are_both_odd_goes_upwards() -> None:
    assert BIPOLAR.round_to(torch.tensor([-0.0, 0.0, -1e-30])).tolist() == [1.0, 1.0, -1.0]


def test_listed_codes_are_what_is_stored() -> None:
    assert ODD.encode(torch.tensor([-4.0, -1.0, 0.5, 3.0])).tolist() == [2, 1, 0, 3]
    assert ODD.decode(torch.tensor([0, 1, 2, 3])).tolist() == [0.5, -1.0, -4.0, 3.0]
    assert BIPOLAR.decode(torch.tensor([-1, 0, 1])).tolist()[::2] == [-1.0, 1.0]
    assert BIPOLAR.decode(torch.tensor([0])).isnan().all()
    assert (BIPOLAR.bits, ODD.bits, BIPOLAR.has_zero, BIPOLAR.code_bounds) == (1, 2, False, (-1, 1))
    assert BIPOLAR.encode(torch.ones(2)).dtype == torch.int8


@pytest.mark.parametrize(
    ("values", "codes", "message"),
    [
        ((1.0, -1.0), (0, 1), "finite and ascending"),
        ((0.0,), (0,), "two or more"),
        ((0.0, math.inf), (0, 1), "finite"),
        ((-1.0, 1.0), (0, 0), "one code for each of 2 values"),
        ((1.0, 2.0), (0, 1), "must reach from 0 or below to 0 or above"),
    ],
)
def test_lists_that_are_no_elements_are_refused(values: Any, codes: Any, message: str) -> None:
    with pytest.raises(RangeError, match=message):
        ListedElements(values, codes)


def test_ranges_cover_by_the_highest_element() -> None:
    qparams = qparams_from_range(torch.tensor(-3.0), torch.tensor(7.0), grid(E4M3))
    assert (float(qparams.scale), int(qparams.zero_point)) == (7.0 / 448, 0)
    # {-4 ... 3}: 7 / 3 above, 3 / 4 below
    assert float(qparams_from_range(torch.tensor(-3.0), torch.tensor(7.0), grid(ODD)).scale) == np.float32(7 / 3)


def test_codes_and_back_are_the_fake_quantized_reals() -> None:
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)) * 3
    for elements in (E4M3, BIPOLAR, ODD):
        for granularity in (PerTensor(), PerAxis(1), PerGroup(0, 16)):
            qparams = mse_qparams_from_tensor(x, grid(elements), granularity)
            codes = quantize(x, qparams)
            assert torch.equal(dequantize(codes, qparams), fake_quantize(x, qparams))
            low, high = elements.code_bounds
            assert low <= int(codes.min()) and int(codes.max()) <= high
            assert qparams.bits == elements.bits


def test_fake_quantize_is_scale_times_the_nearest_element_of_the_quotient() -> None:
    qparams = QParams(torch.tensor(0.5), torch.tensor(0, dtype=torch.int32), *ODD.code_bounds, PerTensor(), ODD)
    assert fake_quantize(torch.tensor([-9.0, 0.1, 0.9]), qparams).tolist() == [-2.0, 0.25, 1.5]


@pytest.mark.parametrize("make", [FakeQuantizer, lambda q: LearnedQuantizer(q, grid(ODD))], ids=["fixed", "learned"])
def test_gradients_pass_within_half_a_step_beyond_the_ends(make: Any) -> None:
    qparams = QParams(torch.tensor(2.0), torch.tensor(0, dtype=torch.int32), *ODD.code_bounds, PerTensor(), ODD)
    quantizer = make(qparams)
    # Ends at scale 2: -4 - 1.5 and 3 + 1.25, times 2.
    x = torch.tensor([-11.1, -10.9, 0.0, 8.4, 8.6], requires_grad=True)
    quantizer(x).backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert x.grad is not None and x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]
    if isinstance(quantizer, LearnedQuantizer):
        # d/ds: the end itself outside, element less quotient inside
        wanted = 1 * -4 + 2 * (-4 + 5.45) + 3 * (0.5 - 0.0) + 4 * (3 - 4.2) + 5 * 3
        assert quantizer.scale_parameter.grad is not None
        assert float(quantizer.scale_parameter.grad) == pytest.approx(wanted, rel=1e-5)


def test_a_learned_scale_keeps_the_elements() -> None:
    start = qparams_from_range(torch.tensor(-3.0), torch.tensor(7.0), grid(E4M3))
    learned = LearnedQuantizer(start, grid(E4M3), domain="log2")
    assert learned.qparams == start
    x = torch.linspace(-7, 7, 50)
    assert torch.equal(learned(x), fake_quantize(x, start))


def brute_force(x: np.ndarray, scale: float, elements: ListedElements) -> float:
    """Squared error, each value beside all elements."""
    reals = np.array(elements.values) * scale
    return float((np.abs(x[:, None] - reals).min(1) ** 2).sum())


@pytest.mark.parametrize("elements", [BIPOLAR, ODD], ids=["bipolar", "odd"])
def test_the_search_finds_the_scale_of_least_squared_error(elements: ListedElements) -> None:
    x = np.random.default_rng(3).normal(size=4000).astype(np.float32)
    found = mse_qparams_from_tensor(torch.from_numpy(x), grid(elements))
    most = max(x.max() / elements.highest, -x.min() / -elements.lowest)
    best = min(brute_force(x, s, elements) for s in np.linspace(0.001, 1.0, 1000) * most)
    assert brute_force(x, float(found.scale), elements) <= best * 1.0005
    histogram = Histogram()
    histogram.update(torch.from_numpy(x))
    seen = mse_qparams_from_histogram(histogram, grid(elements))
    # Values count as the centres of bins 2^-11 wide: the scale moves by less than that.
    assert brute_force(x, float(seen.scale), elements) <= best * 1.002


def test_a_normal_weight_on_two_codes_gets_the_mean_magnitude() -> None:
    # For {-1, 1} the squared error is least at the mean of |x| (Rastegari et al., 2016, eq. 6).
    x = torch.randn(10000, generator=torch.Generator().manual_seed(1))
    assert float(mse_qparams_from_tensor(x, grid(BIPOLAR)).scale) == pytest.approx(float(x.abs().mean()), rel=0.01)


def test_the_padding_of_a_ragged_group_adds_no_error() -> None:
    x = torch.full((5, 1), 0.25)
    x[4] = 3.0
    found = mse_qparams_from_tensor(x, grid(BIPOLAR), PerGroup(0, 4))
    assert found.scale.flatten().tolist() == [0.25, 3.0]


def test_clipping_counts_as_much_as_is_said() -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    ternary = ListedElements((-2.0, -1.0, 0.0, 1.0, 2.0), (-2, -1, 0, 1, 2))
    plain, heavy = (float(mse_qparams_from_tensor(x, grid(ternary), clipping_weight=w).scale) for w in (1.0, 10.0))
    assert heavy > plain
    integers = Grid(-2, 2, 0)
    assert heavy == float(mse_qparams_from_tensor(x, integers, clipping_weight=10.0).scale)


def test_the_loss_of_logits_reads_elements() -> None:
    logits = torch.randn(200, 10, generator=torch.Generator().manual_seed(2)) * 4
    listed = ListedElements(tuple(map(float, range(-8, 8))), tuple(range(-8, 8)))
    found, wanted = cross_entropy_qparams(logits, grid(listed)), cross_entropy_qparams(logits, Grid(-8, 7, 0))
    assert float(found.scale) == float(wanted.scale)


def test_elements_are_part_of_what_is_equal_saved_and_copied() -> None:
    qparams = qparams_from_range(torch.tensor(-3.0), torch.tensor(7.0), grid(E4M3))
    assert qparams != qparams_from_range(torch.tensor(-3.0), torch.tensor(7.0), grid(FloatElements(4, 3, 240.0)))
    assert QParams.from_dict(*qparams.as_dict(), E4M3) == qparams
    assert qparams.to("cpu") == qparams and replace(qparams) == qparams
    with pytest.raises(RangeError, match="its codes stand for other numbers than its format says"):
        QParams.from_dict(*qparams.as_dict())
    quantizer = deepcopy(FakeQuantizer(qparams))
    assert quantizer.qparams == qparams and "FloatElements" in repr(quantizer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid(0, 255, None, elements=E4M3), "elements need zero_point 0; got None"),
        (lambda: Grid(0, 127, 0, elements=E4M3), r"must be the codes of the elements, \(0, 255\)"),
        (lambda: Grid(-8, 7, scale_kind="e8m0"), "an e8m0 scale need zero_point 0; got None"),
        (
            lambda: QParams(torch.tensor(1.0), torch.tensor(1, dtype=torch.int32), 0, 255, PerTensor(), E4M3),
            "codes with elements need zero_point 0",
        ),
        (
            lambda: quantize(torch.zeros(()), mse_qparams_from_tensor(torch.ones(()), grid(E4M3)), "floor"),
            "elements round to the nearest one; got rounding 'floor'",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_with_elements_is_refused(make: Any, message: str) -> None:
    with pytest.raises(RangeError, match=message):
        make()
