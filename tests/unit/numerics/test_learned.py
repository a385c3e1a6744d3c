# SPDX-License-Identifier: Apache-2.0
"""Gradients of scale and zero point: by hand at the clipping edges, against plain autograd, in pieces, compiled."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhw.errors import RangeError
from qhw.numerics import (
    Grid,
    LearnedQuantizer,
    PerAxis,
    PerGroup,
    PerTensor,
    QParams,
    expand,
    fake_quantize,
    learned_fake_quantize,
)
from qhw.numerics.learned import NO_CLIP, clipped

FREE = Grid(-8, 7)
SYMMETRIC = Grid(-8, 7, zero_point=0)


def qparams(scale, zero_point=0, granularity=None, low=-8, high=7):
    scale = torch.tensor(scale)
    zero = torch.full_like(scale, zero_point, dtype=torch.int32)
    return QParams(scale, zero, low, high, granularity or (PerAxis(0) if scale.dim() else PerTensor()))


def reference(x, scale, zero_point, low, high):
    """Eq. 7 from differentiable pieces in float64; rounding alone is told to pass its gradient (eq. 36)."""

    def rounded(t):
        return t + (t.round() - t).detach()

    zero = rounded(zero_point)
    return scale * (torch.clamp(rounded(x / scale) + zero, low, high) - zero)


def gradients(function, *tensors, upstream):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    function(*leaves).backward(upstream)
    return [leaf.grad for leaf in leaves]


def test_gradients_by_hand_inside_and_at_the_edges():
    # s = 0.5, z = 1, codes -8 .. 7: the real ends are -4.5 and 3.0; u = round(x / s) + z.
    x = torch.tensor([0.6, -4.5, -4.76, 3.0, 3.24, 3.26, -50.0, 50.0])
    # u:              2,   -8,   -9,    7,   7,    8,    -99,   101
    by_x = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    # round(x/s) - x/s inside; -8 - 1 = -9 and 7 - 1 = 6 outside
    by_scale = [1 - 1.2, 0.0, -9.0, 0.0, 6 - 6.48, 6.0, -9.0, 6.0]
    by_zero = [0.0, 0.0, -0.5, 0.0, 0.0, -0.5, -0.5, -0.5]
    for i, value in enumerate(x):
        found = gradients(
            lambda *leaves: learned_fake_quantize(*leaves, -8, 7),
            value.reshape(1),
            torch.tensor(0.5),
            torch.tensor(1.0),
            upstream=torch.ones(1),
        )
        assert found[0].item() == by_x[i]
        assert found[1].item() == pytest.approx(by_scale[i], abs=1e-6)
        assert found[2].item() == by_zero[i]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    low=st.sampled_from([-128, -8, 0, -127]),
    high=st.sampled_from([127, 7, 255]),
    kind=st.sampled_from(["tensor", "axis", "group"]),
)
def test_gradients_are_those_of_plain_autograd(data, low, high, kind):
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 6, 4)
    granularity = {"tensor": PerTensor(), "axis": PerAxis(1), "group": PerGroup(1, 4)}[kind]
    parameter_shape = {"tensor": (), "axis": (6,), "group": (3, 2, 4)}[kind]
    scale = torch.rand(parameter_shape, generator=generator) * 0.2 + 0.01
    zero_point = torch.rand(parameter_shape, generator=generator) * (high - low) + low
    x = torch.randn(shape, generator=generator) * float(scale.mean()) * (high - low) / 2
    upstream = torch.randn(shape, generator=generator)

    def ours(x, scale, zero):
        return learned_fake_quantize(x, expand(scale, granularity, shape), expand(zero, granularity, shape), low, high)

    def theirs(x, scale, zero):
        return reference(x, expand(scale, granularity, shape), expand(zero, granularity, shape), low, high)

    # The quotient is rounded in float32: an input whose float64 quotient is next to a tie is moved off it.
    quotient = x.double() / expand(scale, granularity, shape).double()
    x = torch.where(((quotient % 1) - 0.5).abs() < 1e-4, torch.zeros_like(x), x)
    found = gradients(ours, x, scale, zero_point, upstream=upstream)
    wanted = gradients(theirs, x.double(), scale.double(), zero_point.double(), upstream=upstream.double())
    assert torch.equal(found[0], wanted[0].float())
    for mine, expected in zip(found[1:], wanted[1:], strict=True):
        # A float32 sum of up to 72 terms of at most 255 in size each.
        torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("layout", ["rows", "channels_last", "strided"])
def test_pieces_give_what_one_piece_gives(layout, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, 50, 50, generator=generator)  # 160,000 elements: more than one piece
    upstream = torch.randn(x.shape, generator=generator)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        x = x.transpose(1, 2)
        upstream = upstream.transpose(1, 2)
    tensors = x, torch.tensor(0.02), torch.tensor(3.4)

    def run(*leaves):
        return learned_fake_quantize(*leaves, -128, 127)

    values, found = run(*tensors), gradients(run, *tensors, upstream=upstream)
    monkeypatch.setattr("qhw.numerics.learned.fits_pieces", lambda *_: False)
    assert torch.equal(values, run(*tensors))
    whole = gradients(run, *tensors, upstream=upstream)
    assert torch.equal(found[0], whole[0])
    # In pieces the scale's gradient is a difference of two sums whose terms grad * y / s are up to 4 * 128 in size:
    # float32 sums of 2^17 such terms in 64 lanes err by some 2^-24 * 512 * 2^11 / 64 = 0.001 each.
    for mine, expected in zip(found[1:], whole[1:], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=0.02)


@pytest.mark.parametrize("learns_zero", [True, False], ids=["zero learns", "zero stays"])
@pytest.mark.parametrize("zero_point", [-128.0, 3.4, 127.0])
@pytest.mark.parametrize("scale", [0.02, 0.011, 0.1])
@pytest.mark.parametrize(
    "clip", [(0.0, math.inf), (0.0, 2.0), (-1.0, 1.5), (-math.inf, 0.5), (-1.0, math.inf), (0.5, 1.0), (-9.0, 9.0)]
)
def test_a_clip_on_the_way_is_the_clip_in_front(clip, scale, zero_point, learns_zero):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, 1000, generator=generator) * 2
    upstream = torch.randn(x.shape, generator=generator)
    x.flatten()[:3] = torch.tensor([clip[0] if math.isfinite(clip[0]) else 0.0, clip[1], 0.0]).clamp(-99, 99)
    tensors = (x, torch.tensor(scale), torch.tensor(zero_point))[: 3 if learns_zero else 2]

    def fused(x, scale, zero=None):
        zero = torch.tensor(zero_point) if zero is None else zero
        return learned_fake_quantize(x, scale, zero, -128, 127, clip=clip)

    def apart(x, scale, zero=None):
        zero = torch.tensor(zero_point) if zero is None else zero
        return learned_fake_quantize(clipped(x, clip), scale, zero, -128, 127)

    assert torch.equal(fused(*tensors), apart(*tensors))
    found, wanted = gradients(fused, *tensors, upstream=upstream), gradients(apart, *tensors, upstream=upstream)
    assert torch.equal(found[0], wanted[0])
    for mine, expected in zip(found[1:], wanted[1:], strict=True):
        # Sums of 150,000 float32 terms grad * y / s of up to 4 * 255 in size, in another order: as in pieces, above.
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=0.05)
    small = (x[0, :2, :9], *tensors[1:])  # too small for pieces: the clip runs in front
    assert torch.equal(fused(*small), apart(*small))
    for mine, expected in zip(
        gradients(fused, *small, upstream=upstream[0, :2, :9]),
        gradients(apart, *small, upstream=upstream[0, :2, :9]),
        strict=True,
    ):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("clip", [NO_CLIP, (0.0, math.inf), (-1.0, 1.5), (0.1, 0.9)])
@pytest.mark.parametrize("lies_alike", [True, False])
def test_what_is_made_again_has_the_gradients_of_what_is_kept(clip, lies_alike):
    # Eighths: factor u + offset is exact, in whatever order it is computed.
    u = torch.randint(-30, 30, (4, 8, 16, 16), generator=torch.Generator().manual_seed(0)) / 8
    u = u if lies_alike else u.transpose(2, 3)
    factor, offset = torch.tensor([0.5, 0.25] * 4), torch.tensor([0.125, -0.25] * 4)
    shape = (1, 8, 1, 1)
    x = torch.addcmul(offset.reshape(shape), u, factor.reshape(shape)).contiguous()
    tensors, upstream = (x, torch.tensor(0.07)), torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def run(made_of):
        return lambda x, scale: learned_fake_quantize(x, scale, None, -8, 7, clip=clip, made_of=made_of)

    again = gradients(run((u, factor, offset)), *tensors, upstream=upstream)
    kept = gradients(run(None), *tensors, upstream=upstream)
    assert all(map(torch.equal, again, kept))


def test_clips_are_those_of_torch():
    x = torch.tensor([-2.0, 0.0, 0.5, 1.0, 3.0]).requires_grad_()
    assert torch.equal(clipped(x, (0.0, math.inf)), torch.relu(x))
    clipped(x, (0.0, 1.0)).sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert clipped(x, NO_CLIP) is x


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(0)])
def test_no_zero_point_is_a_zero_point_of_zero(granularity):
    x = torch.randn(6, 1000, generator=torch.Generator().manual_seed(1))
    scale = torch.full((6,) if granularity == PerAxis(0) else (), 0.1)
    zero = torch.zeros_like(scale)
    upstream = torch.ones_like(x)

    def run(x, scale, zero=None):
        zero = None if zero is None else expand(zero, granularity, (6, 1000))
        return learned_fake_quantize(x, expand(scale, granularity, (6, 1000)), zero, -8, 7)

    assert torch.equal(run(x, scale), run(x, scale, zero))
    found, wanted = gradients(run, x, scale, upstream=upstream), gradients(run, x, scale, zero, upstream=upstream)
    assert all(map(torch.equal, found, wanted[:2]))


@pytest.mark.parametrize("zero_point", [0, 3])
@pytest.mark.parametrize("scale", [0.13, [0.1, 0.2, 0.3]])
def test_values_are_those_of_fake_quantize(scale, zero_point):
    given = qparams(scale, zero_point)
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(LearnedQuantizer(given, FREE)(x), fake_quantize(x, given))


def test_codes_past_float32_keep_their_grid():
    given = qparams(1e-6, 0, low=-(2**31), high=2**31 - 1)
    x = torch.tensor([1.0, -3000.0, 5000.0])
    module = LearnedQuantizer(given, Grid(-(2**31), 2**31 - 1))
    assert torch.equal(module(x), fake_quantize(x, given))


def test_half_precision_comes_back_in_its_own_dtype():
    x = torch.randn(64).bfloat16().requires_grad_()
    module = LearnedQuantizer(qparams(0.1), FREE)
    module(x).float().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert module.scale_parameter.grad.dtype == torch.float32


def test_powers_of_two_are_learned_through_their_logarithm():
    grid = Grid(-8, 7, zero_point=0, scale_kind="power_of_two")
    module = LearnedQuantizer(qparams(0.25), grid)
    assert module.scale_parameter.item() == 0.0
    x = torch.tensor([0.3])
    module(x).backward(torch.ones(1))
    # d x_hat / ds = round(1.2) - 1.2; ds / d log2(s) = s ln 2
    assert module.scale_parameter.grad.item() == pytest.approx((1 - 1.2) * 0.25 * 0.6931472, rel=1e-5)
    with torch.no_grad():
        module.scale_parameter.fill_(-0.4)
    assert module.scale.item() == 0.25
    with torch.no_grad():
        module.scale_parameter.fill_(-0.6)
    assert module.scale.item() == 0.125
    assert module.qparams.scale.item() == 0.125


@settings(max_examples=50, deadline=None)
@given(exponent=st.floats(-126, 100), domain=st.sampled_from(["linear", "log2"]))
def test_training_starts_from_the_scale_to_the_bit(exponent, domain):
    scale = float(torch.tensor(2.0**exponent).clamp(min=2.0**-126))
    module = LearnedQuantizer(qparams(scale), FREE, domain=domain)
    assert module.scale.item() == scale
    assert module.qparams.scale.item() == scale
    assert not module.is_at_smallest
    with torch.no_grad():
        module.scale_parameter.add_(1.5 if domain == "log2" else scale)
    assert module.scale.item() == pytest.approx(scale * (2**1.5 if domain == "log2" else 2))


def test_listed_scales_stay_on_the_list():
    grid = Grid(-8, 7, zero_point=0, scale_kind="enumerated", scale_values=(0.1, 0.2, 0.5))
    module = LearnedQuantizer(qparams(0.2), grid)
    with torch.no_grad():
        module.scale_parameter.fill_(0.36)
    assert module.scale.item() == pytest.approx(0.5)
    module(torch.tensor([0.3])).backward(torch.ones(1))
    assert module.scale_parameter.grad.item() == pytest.approx(1 - 0.6)


def test_a_fixed_scale_does_not_learn():
    grid = Grid(0, 255, zero_point=0, scale_kind="fixed", scale_values=(1 / 256,))
    module = LearnedQuantizer(qparams(1 / 256, low=0, high=255), grid)
    assert not [p for p in module.parameters() if p.requires_grad]


def test_a_prescribed_zero_point_does_not_learn_and_a_free_one_does():
    assert [n for n, _ in LearnedQuantizer(qparams(0.1), SYMMETRIC).named_parameters()] == ["scale_parameter"]
    names = [n for n, _ in LearnedQuantizer(qparams(0.1, 2), FREE).named_parameters()]
    assert names == ["scale_parameter", "zero_point"]


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-12])
def test_a_scale_stays_positive_wherever_it_is_driven(value):
    module = LearnedQuantizer(qparams(0.5), SYMMETRIC)
    with torch.no_grad():
        module.scale_parameter.fill_(value)
    assert module.scale.item() == 0.5 / 1024
    assert module.is_at_smallest
    x = torch.randn(100, requires_grad=True)
    module(x).square().sum().backward()
    assert torch.isfinite(module.scale_parameter.grad)
    assert torch.isfinite(x.grad).all()


def test_a_scale_that_is_not_finite_is_named():
    module = LearnedQuantizer(qparams(0.5), SYMMETRIC, name="conv1.weight")
    with torch.no_grad():
        module.scale_parameter.fill_(float("nan"))
    with pytest.raises(RangeError, match=r"conv1.weight: its learned scale or zero point is NaN or infinite\. Lower"):
        _ = module.qparams


@pytest.mark.parametrize("count", [10, 10_000])
@pytest.mark.parametrize("what", ["scale_parameter", "zero_point"])
def test_what_is_no_number_spreads_and_raises_nothing(what, count):
    module = LearnedQuantizer(qparams(0.5), FREE)
    with torch.no_grad():
        getattr(module, what).fill_(float("nan"))
    x = torch.randn(count, requires_grad=True)
    y = module(x)
    assert bool(y.isnan().all())
    y.sum().backward()


@pytest.mark.parametrize("mask", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("count", [16, 2**13], ids=["whole", "in pieces"])
def test_what_a_mask_hides_counts_as_the_lowest_code(count, mask):
    """By hand, eq. 38: half the elements are 0.5, on the grid of 0.25, and half are hidden."""
    x = torch.full((count,), 0.5)
    x[::2] = mask
    x.requires_grad_()
    quantizer = LearnedQuantizer(qparams(0.25), Grid(-8, 7), domain="linear")
    y = quantizer(x)
    assert torch.equal(y.detach(), torch.where(x.detach() < 0, -2.0, 0.5))
    y.sum().backward()
    assert torch.equal(x.grad, (x.detach() > 0).float())
    assert quantizer.scale_parameter.grad.item() == -8 * count / 2  # inside, 2 - 0.5 / 0.25 is 0


def test_the_gradient_scale_multiplies_both_and_leaves_x_alone():
    x = torch.linspace(-8, 8, 101)

    def run(factor):
        module = LearnedQuantizer(qparams(0.5, 1), FREE, gradient_scale=factor)
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        return leaf.grad, module.scale_parameter.grad, module.zero_point.grad

    plain, scaled = run(1.0), run(0.125)
    assert torch.equal(plain[0], scaled[0])
    assert torch.equal(plain[1] * 0.125, scaled[1])
    assert torch.equal(plain[2] * 0.125, scaled[2])


def test_the_zero_point_moves_by_whole_codes():
    module = LearnedQuantizer(qparams(0.5, 1), FREE)
    x = torch.tensor([0.0, 3.4])
    with torch.no_grad():
        module.zero_point.fill_(1.4)
    assert module(x)[1].item() == 3.0  # code clamp(7 + 1) = 7 stands for (7 - 1) * 0.5
    with torch.no_grad():
        module.zero_point.fill_(-0.6)
    assert module(x)[1].item() == 3.5
    assert module.qparams.zero_point.item() == -1


def test_it_compiles_in_one_graph():
    module = LearnedQuantizer(qparams([0.1, 0.2, 0.3], 2), FREE)
    x = torch.randn(3, 40, requires_grad=True)
    module(x).sum().backward()
    eager = x.grad.clone(), module.scale_parameter.grad.clone()
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    x.grad = None
    compiled.zero_grad()
    compiled(x).sum().backward()
    assert torch.equal(x.grad, eager[0])
    torch.testing.assert_close(compiled.scale_parameter.grad, eager[1])


def test_a_state_dict_brings_everything_back():
    first, second = (LearnedQuantizer(qparams(s, 1), FREE) for s in (0.5, 0.1))
    second.load_state_dict(first.state_dict())
    x = torch.randn(50)
    assert torch.equal(first(x), second(x))
    assert torch.equal(first.start_scale, second.start_scale)
