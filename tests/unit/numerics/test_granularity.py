# SPDX-License-Identifier: Apache-2.0
"""Granularity: parameter shapes, broadcasting and ranges, against loops over every element."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhw.errors import RangeError
from qhw.numerics import PerAxis, PerGroup, PerTensor, expand, parameter_shape, range_of
from qhw.numerics.granularity import to_rows
from qhw.testing import reference


@st.composite
def shapes_and_granularities(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    axis = draw(st.integers(0, len(shape) - 1))
    kind = draw(st.sampled_from(["tensor", "axis", "group"]))
    if kind == "tensor":
        return shape, PerTensor(), {}
    if kind == "axis":
        return shape, PerAxis(axis), {"axis": axis}
    size = draw(st.integers(1, 6))
    return shape, PerGroup(axis, size), {"axis": axis, "group_size": size}


@pytest.mark.parametrize(
    ("granularity", "shape", "expected"),
    [
        pytest.param(PerTensor(), (32, 16, 8, 8), (), id="per_tensor-has-one-scale"),
        pytest.param(PerAxis(0), (64, 3, 7, 7), (64,), id="per_axis0-of-a-convolution-weight"),
        pytest.param(PerGroup(1, 32), (64, 96), (64, 3), id="per_group-divides-evenly"),
        pytest.param(PerGroup(1, 32), (64, 100), (64, 4), id="per_group-ragged-last-group"),
        pytest.param(PerGroup(1, 32), (64, 100, 3, 3), (64, 4, 3, 3), id="per_group-other-axes-keep-their-indices"),
        pytest.param(PerGroup(0, 8), (3,), (1,), id="per_group-larger-than-the-axis"),
    ],
)
def test_parameter_shape(granularity, shape, expected):
    assert parameter_shape(granularity, shape) == expected


@given(shapes_and_granularities())
@settings(max_examples=80, deadline=None)
def test_expand_gives_every_element_its_own_parameter(case):
    shape, granularity, keywords = case
    parameter = np.arange(int(np.prod(parameter_shape(granularity, shape))), dtype=np.float32)
    parameter = parameter.reshape(parameter_shape(granularity, shape))
    expanded = expand(torch.from_numpy(parameter), granularity, shape).expand(shape)
    np.testing.assert_array_equal(expanded.numpy(), reference.expand(parameter, shape, **keywords))


@given(shapes_and_granularities(), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_range_of_finds_lowest_and_highest_of_each_share(case, seed):
    shape, granularity, keywords = case
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    size = parameter_shape(granularity, shape)
    owner = reference.expand(np.arange(int(np.prod(size)), dtype=np.float32).reshape(size), shape, **keywords)
    low, high = range_of(torch.from_numpy(x), granularity)
    rows = to_rows(torch.from_numpy(x), granularity)
    assert low.shape == high.shape == size
    for index in range(int(np.prod(size))):
        share = x[owner == index]
        assert low.flatten()[index] == share.min()
        assert high.flatten()[index] == share.max()
        # A padded row holds its share and zeros, so the sorted non-zero elements are the same.
        row = rows[index].numpy()
        np.testing.assert_array_equal(np.sort(row[row != 0]), np.sort(share))


@pytest.mark.parametrize(
    ("granularity", "shape", "expected"),
    [
        pytest.param(PerTensor(), (0, 3), (), id="per_tensor"),
        pytest.param(PerAxis(1), (0, 3), (3,), id="per_axis-empty-batch"),
        pytest.param(PerAxis(0), (0, 3), (0,), id="per_axis-no-channels"),
        pytest.param(PerGroup(1, 2), (0, 3), (0, 2), id="per_group"),
    ],
)
def test_range_of_an_empty_tensor_is_zero(granularity, shape, expected):
    low, high = range_of(torch.empty(shape), granularity)
    assert low.shape == high.shape == expected
    assert not low.any() and not high.any()


def test_range_of_keeps_nan_visible():
    low, high = range_of(torch.tensor([[1.0, float("nan")], [2.0, 3.0]]), PerAxis(0))
    assert low.isnan().tolist() == [True, False]
    assert high.isnan().tolist() == [True, False]


def test_an_axis_the_tensor_lacks_is_refused():
    with pytest.raises(RangeError, match=r"conv\.weight: PerAxis\(axis=2\) needs 3 axes; got shape \(4, 5\)"):
        parameter_shape(PerAxis(2), (4, 5), "conv.weight")


def test_a_negative_axis_is_refused():
    with pytest.raises(RangeError, match=r"PerAxis\(axis=-1\): axis must be 0 or more; got -1. Count axes from"):
        PerAxis(-1)


def test_an_empty_group_is_refused():
    with pytest.raises(RangeError, match=r"group_size must be 1 or more; got 0. Use PerTensor instead"):
        PerGroup(0, 0)
