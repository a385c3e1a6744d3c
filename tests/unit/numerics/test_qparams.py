# SPDX-License-Identifier: Apache-2.0
"""QParams: what is refused, equality, bits, and the saved form."""

import copy
import json

import pytest
import torch
from safetensors.torch import load, save

from qhw.errors import RangeError
from qhw.numerics import PerAxis, PerGroup, PerTensor, QParams


def per_axis(scale, zero_point, quant_min=-128, quant_max=127, axis=0):
    return QParams(
        torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), quant_min, quant_max, PerAxis(axis)
    )


@pytest.mark.parametrize(
    ("quant_min", "quant_max", "bits"),
    [
        (-128, 127, 8),
        (-127, 127, 8),
        (0, 255, 8),
        (0, 256, 9),
        (-8, 7, 4),
        (-7, 7, 4),
        (-2, 1, 2),
        (-1, 0, 1),
        (0, 1, 1),
        (-1, 1, 2),
        (-64, 64, 8),
        (-(2**31), 2**31 - 1, 32),
        (-300, -200, 10),
    ],
)
def test_bits_are_those_of_the_smallest_integer_that_holds_the_codes(quant_min, quant_max, bits):
    qparams = QParams(torch.tensor(1.0), torch.tensor(quant_min, dtype=torch.int32), quant_min, quant_max, PerTensor())
    assert qparams.bits == bits
    assert qparams.signed == (quant_min < 0)


def test_symmetric_means_every_zero_point_is_zero():
    assert per_axis([1.0, 2.0], [0, 0]).is_symmetric
    assert not per_axis([1.0, 2.0], [0, 1]).is_symmetric


@pytest.mark.parametrize(
    ("scale", "got"),
    [(0.0, "0.0"), (-1.0, "-1.0"), (float("nan"), "nan"), (float("inf"), "inf")],
    ids=["zero", "negative", "nan", "infinite"],
)
def test_a_scale_that_is_not_positive_and_finite_is_refused(scale, got):
    with pytest.raises(RangeError, match=f"scale must be positive and finite; got {got}"):
        per_axis([1.0, scale], [0, 0])


@pytest.mark.parametrize("zero_point", [-129, 128])
def test_a_zero_point_off_the_grid_is_refused(zero_point):
    with pytest.raises(RangeError, match=rf"zero_point must lie in \[-128, 127\]; got {zero_point}. Clamp it"):
        per_axis([1.0, 1.0], [0, zero_point])


def test_bounds_in_the_wrong_order_are_refused():
    with pytest.raises(RangeError, match="quant_min must be below quant_max; got 7 and 7"):
        per_axis([1.0], [7], 7, 7)


def test_other_dtypes_are_refused():
    with pytest.raises(
        RangeError, match=r"scale must be float32 and zero_point int32; got torch.float64 and torch.int32"
    ):
        QParams(torch.tensor(1.0).double(), torch.tensor(0, dtype=torch.int32), 0, 255, PerTensor())


def test_a_zero_point_of_another_shape_is_refused():
    with pytest.raises(RangeError, match=r"zero_point must have the scale's shape \(2,\); got \(1,\). Expand it"):
        per_axis([1.0, 2.0], [0])


@pytest.mark.parametrize(
    ("granularity", "shape", "wanted"),
    [
        (PerTensor(), (1,), r"\(\)"),
        (PerAxis(0), (), r"\(channels,\)"),
        (PerAxis(0), (2, 2), r"\(channels,\)"),
        (PerGroup(1, 2), (3,), "of the tensor's rank"),
    ],
    ids=["per_tensor-needs-a-scalar", "per_axis-not-a-scalar", "per_axis-not-a-matrix", "per_group-needs-its-axis"],
)
def test_a_scale_of_another_rank_is_refused(granularity, shape, wanted):
    with pytest.raises(RangeError, match=f"scale must have shape {wanted} for Per"):
        QParams(torch.ones(shape), torch.zeros(shape, dtype=torch.int32), 0, 255, granularity)


def test_a_tensor_with_other_channels_is_refused_by_name():
    message = r"fc1\.weight: scale must have shape \(3,\) for PerAxis\(axis=0\); got \(2,\). Compute it for this tensor"
    with pytest.raises(RangeError, match=message):
        per_axis([1.0, 2.0], [0, 0]).check_fits((3, 5), "fc1.weight")


def test_equal_by_value_and_different_in_each_field():
    base = per_axis([1.0, 2.0], [0, 3])
    assert base == per_axis([1.0, 2.0], [0, 3])
    assert base == copy.deepcopy(base)
    assert base != per_axis([1.0, 2.5], [0, 3])
    assert base != per_axis([1.0, 2.0], [0, 4])
    assert base != per_axis([1.0, 2.0], [0, 3], quant_min=-127)
    assert base != per_axis([1.0, 2.0], [0, 3], quant_max=126)
    assert base != per_axis([1.0, 2.0], [0, 3], axis=1)
    assert base != "qparams"
    with pytest.raises(TypeError, match="unhashable"):
        hash(base)


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(2), PerGroup(1, 4)], ids=lambda g: type(g).__name__)
def test_saved_form_passes_through_safetensors_and_json(granularity):
    shape = {PerTensor: (), PerAxis: (3,), PerGroup: (3, 2)}[type(granularity)]
    qparams = QParams(torch.full(shape, 0.1), torch.full(shape, 7, dtype=torch.int32), 0, 15, granularity)
    tensors, header = qparams.as_dict()
    assert QParams.from_dict(load(save(tensors)), json.loads(json.dumps(header))) == qparams


@pytest.mark.parametrize(
    "change",
    [{"granularity": {"kind": "per_row"}}, {"granularity": {"kind": "per_axis", "dim": 0}}, {"quant_min": "low"}],
    ids=["unknown-granularity", "unknown-field", "not-a-number"],
)
def test_a_damaged_saved_form_is_refused(change):
    tensors, header = per_axis([1.0], [0]).as_dict()
    with pytest.raises(RangeError, match="qparams: saved form is damaged"):
        QParams.from_dict(tensors, {**header, **change})


def test_a_saved_form_without_its_scale_is_refused():
    tensors, header = per_axis([1.0], [0]).as_dict()
    del tensors["scale"]
    with pytest.raises(RangeError, match=r"saved form is damaged \(KeyError\('scale'\)\)"):
        QParams.from_dict(tensors, header)


def test_to_keeps_the_values():
    assert per_axis([1.0, 2.0], [0, 3]).to("cpu") == per_axis([1.0, 2.0], [0, 3])
