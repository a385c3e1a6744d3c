# SPDX-License-Identifier: Apache-2.0
"""MinMax and Histogram: counts by hand, and the same bytes for any split, order and merge."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhw.errors import CalibrationError, RangeError
from qhw.numerics import Histogram, MinMax, PerAxis

EDGES = [float(np.float32(v)) for v in (0.0, -0.0, 1.0, -1.0, 2.0, 1e30, -1e30, 3.4e38, 1e-40, -1e-45, 2.0**-112)]
values = (
    st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(EDGES) | st.floats(-4, 4, width=32)
)


def state(histogram):
    return histogram.bin_width, histogram.counts.tolist(), histogram.min.item(), histogram.max.item(), histogram.count


def filled(*parts):
    histogram = Histogram()
    for part in parts:
        histogram.update(torch.tensor(part, dtype=torch.float32))
    return histogram


@given(st.lists(values, min_size=1, max_size=40), st.data())
@settings(max_examples=150, deadline=None)
def test_a_histogram_does_not_depend_on_split_order_or_merging(numbers, data):
    expected = state(filled(numbers))
    shuffled = data.draw(st.permutations(numbers))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(numbers)), max_size=4)))
    parts = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(numbers)], strict=True)]
    assert state(filled(*parts)) == expected
    merged = Histogram()
    for part in data.draw(st.permutations(parts)):
        merged.merge(filled(part))
    assert state(merged) == expected


@given(st.lists(values, min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_every_value_is_counted_in_its_own_bin(numbers):
    histogram = filled(numbers)
    width = histogram.bin_width
    largest = max(abs(x) for x in numbers)
    # The narrowest power of two that puts the largest value inside 8,192 bins, not below 2**-125.
    assert width == 2.0**-125 or width * 4096 <= largest
    assert width >= 2.0**-125 and largest < width * 8192
    expected = np.zeros(2 * 8192 - 1, dtype=np.int64)
    for x in numbers:
        expected[8191 + math.trunc(x / width)] += 1
    np.testing.assert_array_equal(histogram.counts.numpy(), expected)
    assert (histogram.min.item(), histogram.max.item()) == (min(numbers), max(numbers))


def test_zeros_first_leave_the_bins_as_narrow_as_zeros_last():
    # frexp(0) is 0: taken as it is, zeros alone would set the outer edge to 1.
    assert state(filled([0.0], [2.0**-20])) == state(filled([2.0**-20, 0.0])) == state(filled([2.0**-20], [0.0]))
    assert filled([0.0], [2.0**-20]).bin_width == 2.0**-32


def test_bins_by_hand():
    # Largest value 1.5 < 2, so w = 2 / 8192 = 2**-12. 1.5 is in bin 6144; -w/2 and 0 share the middle bin; -w is in -1.
    w = 2.0**-12
    histogram = filled([1.5, -w / 2, 0.0, -w, 2.5 * w])
    assert histogram.bin_width == w
    assert {index - 8191: count for index, count in enumerate(histogram.counts.tolist()) if count} == {
        -1: 1,
        0: 2,
        2: 1,
        6144: 1,
    }
    edges, centres = histogram.edges, histogram.centres
    assert len(edges) == 16384 and len(centres) == 16383
    assert edges[[0, 8190, 8191, 8192, 8193, -1]].tolist() == [-2.0, -2 * w, -w, w, 2 * w, 2.0]
    assert centres[[8190, 8191, 8192]].tolist() == [-1.5 * w, 0.0, 1.5 * w]


def test_edges_are_those_of_numpy():
    x = torch.relu(torch.randn(2000, generator=torch.Generator().manual_seed(0)))
    histogram = filled(x.tolist(), (-x[:100]).tolist())
    everything = torch.cat([x, -x[:100]]).double().numpy()
    expected, _ = np.histogram(everything, bins=histogram.edges.numpy())
    np.testing.assert_array_equal(histogram.counts.numpy(), expected)


def test_a_large_tensor_is_counted_in_chunks():
    x = torch.randn(3, 200_001, generator=torch.Generator().manual_seed(0))
    whole, rows = Histogram(), Histogram()
    whole.update(x.t())
    for row in x:
        rows.update(row)
    assert state(whole) == state(rows)
    assert int(whole.counts.sum()) == whole.count == 600_003


@given(st.lists(st.lists(values, min_size=2, max_size=2), min_size=1, max_size=12), st.data())
@settings(max_examples=100, deadline=None)
def test_a_range_per_channel_does_not_depend_on_split_order_or_merging(rows, data):
    cut = data.draw(st.integers(0, len(rows)))
    shuffled = data.draw(st.permutations(rows))
    first, second = MinMax(PerAxis(1)), MinMax(PerAxis(1))
    first.update(torch.tensor(shuffled[:cut], dtype=torch.float32).reshape(-1, 2))
    second.update(torch.tensor(shuffled[cut:], dtype=torch.float32).reshape(-1, 2))
    second.merge(first)
    assert second.min.tolist() == np.float32(rows).min(0).tolist()
    assert second.max.tolist() == np.float32(rows).max(0).tolist()
    assert second.count == 2 * len(rows)


@pytest.mark.parametrize("statistic", [MinMax, Histogram])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(statistic, bad):
    seen = statistic(name="layer1.relu")
    with pytest.raises(RangeError, match=r"layer1\.relu: values must be finite; got (nan|-?inf) in 1 of 1 ranges"):
        seen.update(torch.tensor([1.0, bad, 2.0]))
    assert seen.count == 0


@pytest.mark.parametrize("statistic", [MinMax, Histogram])
def test_nothing_seen_is_said_by_name(statistic):
    seen = statistic(name="fc")
    seen.update(torch.empty(0, 4))
    seen.merge(statistic())
    for bound in ("min", "max"):
        with pytest.raises(CalibrationError, match=r"fc: a range needs at least one value; got none. Pass calibration"):
            getattr(seen, bound)


@pytest.mark.parametrize("statistic", [MinMax, Histogram])
def test_one_element(statistic):
    seen = statistic()
    seen.update(torch.tensor(-0.7))
    assert seen.min == seen.max == torch.tensor(-0.7)
    assert seen.count == 1


def test_a_statistic_keeps_no_gradient():
    seen = MinMax()
    seen.update(torch.ones(3, requires_grad=True))
    assert not seen.max.requires_grad


def test_the_order_of_the_memory_changes_no_statistic() -> None:
    x = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    for other in (x.to(memory_format=torch.channels_last), x.transpose(0, 3).contiguous().transpose(0, 3), x[:, ::2]):
        same, seen, plain = Histogram(), MinMax(), other.clone(memory_format=torch.contiguous_format)
        same.update(plain)
        histogram = Histogram()
        histogram.update(other)
        seen.update(other)
        assert torch.equal(histogram.counts, same.counts)
        assert (seen.min, seen.max) == (plain.min(), plain.max())
