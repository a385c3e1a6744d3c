# SPDX-License-Identifier: Apache-2.0
"""MinMax and Histogram: counts by hand, and the same bytes for any split, order and merge."""

import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhw.errors import CalibrationError, RangeError
from qhw.numerics import Histogram, MinMax, PerAxis, PerGroup, PerTensor
from qhw.numerics.statistics import MinMaxSeries, percentile_range_of, running_average

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


def series_of(batches, first=0, step=1):
    series = MinMaxSeries("fc", first=first, step=step)
    for batch in batches:
        series.update(torch.tensor(batch, dtype=torch.float32))
    return series


@given(st.lists(st.lists(values, max_size=4), min_size=1, max_size=9), st.data())
@settings(max_examples=100, deadline=None)
def test_a_series_split_among_processes_is_that_of_one(batches, data):
    batches = [[1.0], *batches]
    whole = series_of(batches)
    if data.draw(st.booleans()):
        parts = [series_of(batches[rank::3], rank, 3) for rank in range(3)]
    else:
        cut = data.draw(st.integers(0, len(batches)))
        parts = [series_of(batches[:cut]), series_of(batches[cut:], cut)]
    merged = MinMaxSeries("fc")
    for part in data.draw(st.permutations(parts)):
        merged.merge(pickle.loads(pickle.dumps(part)))  # noqa: S301
    # By numpy; a batch without elements has no range.
    expected = np.array([[np.float32(b).min(), np.float32(b).max()] for b in batches if b], dtype=np.float64)
    for series in (whole, merged):
        np.testing.assert_array_equal(series.min.numpy(), expected[:, 0])
        np.testing.assert_array_equal(series.max.numpy(), expected[:, 1])
        assert series.min.dtype == torch.float64


def test_updates_of_several_tensors_become_one_per_micro_batch():
    series = series_of([[1.0], [-5.0, 2.0], [3.0], [4.0], [], [0.5]])
    series.join_updates(3)
    assert (series.min.tolist(), series.max.tolist()) == ([-5.0, 3.0, 0.5], [2.0, 4.0, 0.5])
    with pytest.raises(CalibrationError, match="fc: 3 updates must fall into equal parts; got 2 micro-batches"):
        series.join_updates(2)


def test_a_micro_batch_seen_twice_is_refused_by_name():
    with pytest.raises(CalibrationError, match="fc: micro-batches must be seen once; got number 1 from both"):
        series_of([[1.0], [2.0]]).merge(series_of([[3.0]], first=1))


def test_a_series_refuses_what_is_not_finite_and_says_when_nothing_was_seen():
    with pytest.raises(RangeError, match="fc: values must be finite; got nan"):
        series_of([[1.0, float("nan")]])
    for bound in ("min", "max"):
        with pytest.raises(CalibrationError, match="fc: a range needs at least one value; got none"):
            getattr(series_of([[]]), bound)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20), st.sampled_from([0.0, 0.5, 0.9]))
def test_the_moving_average_is_that_of_its_definition(numbers, momentum):
    expected = Fraction(numbers[0])
    for number in numbers[1:]:
        expected = Fraction(momentum) * expected + (1 - Fraction(momentum)) * Fraction(number)
    found = running_average(torch.tensor(numbers, dtype=torch.float32), momentum)
    # Two float64 roundings a step, of values up to the largest.
    assert abs(Fraction(found.item()) - expected) <= Fraction(1, 2**47) * max(abs(Fraction(n)) for n in numbers)
    assert found.dtype == torch.float64


def test_the_moving_average_of_a_constant_is_the_constant():
    x = torch.full((50, 2), 0.1)
    assert torch.equal(running_average(x, 0.9), x[0].double())


def quantile(x, percentile):
    """floor(n * (100 - percentile) %) values left out at each end, by sorting."""
    ordered = np.sort(x.reshape(-1))
    left_out = math.floor(ordered.size * (1 - Fraction(str(percentile)) / 100))
    return ordered[left_out], ordered[ordered.size - 1 - left_out]


@pytest.mark.parametrize("percentile", [100.0, 99.99, 99.9, 90.0, 50.1])
@pytest.mark.parametrize("size", [1, 2, 9_999, 10_000, 20_000])
def test_percentiles_of_a_histogram_are_those_of_numpy_to_a_bin(size, percentile):
    x = np.float32(np.random.default_rng(size).standard_t(3, size) + 0.5)
    histogram = filled(x.tolist())
    low, high = (bound.item() for bound in histogram.percentile_range(percentile))
    exact_low, exact_high = quantile(x, percentile)
    width = histogram.bin_width
    # The middle bin is two widths.
    assert exact_low - 2 * width <= low <= exact_low
    assert exact_high <= high <= exact_high + 2 * width
    if percentile == 100.0 or (size < 1000 and percentile > 99.0):
        assert (low, high) == (x.min(), x.max())


def test_ten_thousand_values_leave_out_one_at_each_end():
    # 10,000 * (100 - 99.99) / 100 is 0.99999... in binary.
    x = torch.arange(10_000.0)
    assert filled(x.tolist()).percentile_range(99.99)[1].item() < 10_000 - 1 + 1e-3
    low, high = percentile_range_of(x, PerTensor(), 99.99)
    assert (low.item(), high.item()) == (1.0, 9_998.0)


@pytest.mark.parametrize("numbers", [[0.0] * 5, [3.0] * 5, [-2.0], [-1.0, -4.0, -1.5]], ids=str)
def test_percentiles_of_few_values_are_the_range(numbers):
    low, high = filled(numbers).percentile_range(99.99)
    assert (low.item(), high.item()) == (min(numbers), max(numbers))


def test_percentiles_of_an_empty_histogram_are_refused():
    with pytest.raises(CalibrationError, match="fc: a range needs at least one value; got none"):
        Histogram("fc").percentile_range(99.0)


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(0), PerAxis(1), PerGroup(1, 7)], ids=str)
@pytest.mark.parametrize("percentile", [100.0, 90.0, 60.0])
def test_percentiles_of_a_tensor_are_exact_for_each_share(granularity, percentile):
    x = np.float32(np.random.default_rng(3).normal(size=(6, 17)))
    shares = {
        PerTensor(): [x],
        PerAxis(0): list(x),
        PerAxis(1): list(x.T),
        PerGroup(1, 7): [x[row, start : start + 7] for row in range(6) for start in (0, 7, 14)],
    }[granularity]
    low, high = percentile_range_of(torch.from_numpy(x), granularity, percentile)
    expected = [quantile(share, percentile) for share in shares]
    assert list(zip(low.flatten().tolist(), high.flatten().tolist(), strict=True)) == expected


def test_percentiles_of_no_element_and_of_nan():
    low, high = percentile_range_of(torch.empty(2, 0), PerAxis(0), 99.0)
    assert (low.tolist(), high.tolist()) == ([0.0, 0.0], [0.0, 0.0])
    low, _ = percentile_range_of(torch.tensor([[1.0, float("nan")], [2.0, 3.0]]), PerAxis(0), 99.0)
    assert math.isnan(low[0]) and low[1] == 2.0
