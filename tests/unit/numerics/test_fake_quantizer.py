# SPDX-License-Identifier: Apache-2.0
"""The straight-through gradient against plain autograd, torch.compile, and the module around it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhw.errors import RangeError
from qhw.numerics import FakeQuantizer, PerAxis, PerGroup, PerTensor, QParams, expand, fake_quantize

PER_TENSOR = QParams(torch.tensor(0.5), torch.tensor(-1, dtype=torch.int32), -8, 7, PerTensor())
PER_AXIS = QParams(torch.tensor([0.1, 0.5, 2.0]), torch.tensor([0, -8, 7], dtype=torch.int32), -8, 7, PerAxis(1))
PER_GROUP = QParams(
    torch.tensor([[0.1, 0.5]]).repeat(4, 1),
    torch.tensor([[3, 0]], dtype=torch.int32).repeat(4, 1),
    -8,
    7,
    PerGroup(1, 2),
)
ALL = pytest.mark.parametrize(
    "qparams", [PER_TENSOR, PER_AXIS, PER_GROUP], ids=["per_tensor", "per_axis1", "per_group"]
)


def straight_through(x, qparams):
    """Fake quantization from differentiable pieces: only rounding is told to pass its gradient."""
    shape = tuple(x.shape)
    scale = expand(qparams.scale, qparams.granularity, shape)
    zero_point = expand(qparams.zero_point, qparams.granularity, shape)
    quotient = x / scale
    code = quotient + (quotient.round() - quotient).detach() + zero_point
    return (code.clamp(qparams.quant_min, qparams.quant_max) - zero_point) * scale


@ALL
@given(seed=st.integers(0, 2**31), spread=st.sampled_from([0.1, 1.0, 10.0]))
@settings(max_examples=40, deadline=None)
def test_gradient_matches_autograd_through_the_pieces(qparams, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, generator=generator) * spread
    weight = torch.randn(4, 3, generator=generator)
    got, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    (fake_quantize(got, qparams) * weight).sum().backward()
    (straight_through(expected, qparams) * weight).sum().backward()
    # Autograd multiplies by scale and divides by it again: one rounding each.
    torch.testing.assert_close(got.grad, expected.grad, rtol=2e-7 * 2, atol=0)


def test_gradient_by_hand_at_the_ends_of_the_grid():
    # scale 0.5, zero point -1, codes -8 ... 7. 4.25 / 0.5 = 8.5 ties to 8, code 7; 4.26 gives 9, code 8, outside.
    # -3.74 / 0.5 = -7.48 gives -7, code -8; -3.75 / 0.5 = -7.5 ties to -8, code -9, outside. NaN passes.
    x = torch.tensor([4.25, 4.26, -3.74, -3.75, 0.0, float("nan")], requires_grad=True)
    fake_quantize(x, PER_TENSOR).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_gradient_has_the_dtype_of_x(dtype):
    x = torch.tensor([0.3, 9.0], dtype=dtype, requires_grad=True)
    fake_quantize(x, PER_TENSOR).sum().backward()
    assert x.grad.dtype == dtype
    assert x.grad.tolist() == [1.0, 0.0]


def test_gradient_at_the_ends_of_a_32_bit_grid():
    # Codes past 2**22 are kept in float64, where the half beyond the last code is exact.
    qparams = QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), -(2**31), 2**31 - 1, PerTensor())
    x = torch.tensor([2.0**31, 2.0**31 - 128, -(2.0**31), -(2.0**31) - 256], requires_grad=True)
    fake_quantize(x, qparams).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_the_graph_keeps_x_itself_for_the_backward_pass():
    kept = []
    x = torch.randn(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fake_quantize(x, PER_TENSOR)
    assert [t.data_ptr() for t in kept if t.numel() == 8] == [x.data_ptr()]


@ALL
def test_compiles_as_one_graph_with_the_same_values_and_gradient(qparams):
    module = FakeQuantizer(qparams)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    eager_x, compiled_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    eager, result = module(eager_x), compiled(compiled_x)
    assert torch.equal(result, eager)
    eager.sum().backward()
    result.sum().backward()
    assert torch.equal(compiled_x.grad, eager_x.grad)


def test_compiles_the_function_under_a_dynamic_batch():
    compiled = torch.compile(lambda x: fake_quantize(x, PER_AXIS), backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 5):
        x = torch.randn(batch, 3, generator=torch.Generator().manual_seed(batch))
        assert torch.equal(compiled(x), fake_quantize(x, PER_AXIS))


@ALL
def test_module_equals_function(qparams):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)) * 3
    assert torch.equal(FakeQuantizer(qparams)(x), fake_quantize(x, qparams))
    floor = FakeQuantizer(qparams, rounding="floor")(x)
    assert torch.equal(floor, fake_quantize(x, qparams, "floor"))
    assert not torch.equal(floor, fake_quantize(x, qparams))


def test_disabled_returns_the_input_itself():
    module = FakeQuantizer(PER_TENSOR)
    module.enabled = False
    x = torch.tensor([0.3])
    assert module(x) is x
    module.enabled = True
    assert module(x).tolist() == [0.5]


def test_state_dict_carries_scale_and_zero_point():
    source = FakeQuantizer(PER_AXIS)
    blank = QParams(torch.ones(3), torch.zeros(3, dtype=torch.int32), -8, 7, PerAxis(1))
    copy_ = FakeQuantizer(blank)
    copy_.load_state_dict(source.state_dict())
    assert sorted(source.state_dict()) == ["scale", "zero_point"]
    assert copy_.qparams == source.qparams == PER_AXIS
    assert bool((blank.scale == 1).all()), "the caller's qparams must stay as they were"


def test_deepcopy_is_independent():
    module = FakeQuantizer(PER_TENSOR)
    twin = copy.deepcopy(module)
    twin.scale.fill_(2.0)
    twin.enabled = False
    assert module.enabled
    assert module.qparams == PER_TENSOR


def test_qparams_check_what_a_state_dict_brought():
    module = FakeQuantizer(PER_TENSOR)
    module.load_state_dict({"scale": torch.tensor(0.0), "zero_point": torch.tensor(0, dtype=torch.int32)})
    with pytest.raises(RangeError, match=r"scale must be positive and finite; got 0.0"):
        _ = module.qparams


def test_repr_names_grid_granularity_and_switch():
    module = FakeQuantizer(PER_AXIS)
    assert repr(module) == "FakeQuantizer([-8, 7], PerAxis(axis=1), half_even)"
    module.enabled = False
    assert repr(module) == "FakeQuantizer([-8, 7], PerAxis(axis=1), half_even, enabled=False)"


def test_a_tensor_that_does_not_fit_is_refused_by_name():
    with pytest.raises(RangeError, match=r"relu1: scale must have shape \(4,\) for PerAxis\(axis=1\); got \(3,\)"):
        FakeQuantizer(PER_AXIS, name="relu1")(torch.zeros(2, 4))
