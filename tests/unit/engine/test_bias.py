# SPDX-License-Identifier: Apache-2.0
"""Biases that do not fit their width: made to fit, clamped or refused, as the target says; and scales of their own."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qhw.errors import PlanError, RangeError
from qhw.schema import TargetSpec

Quantize = Callable[..., Any]
RULE = 'biases.b = { bits = 32, scale = "input*weight" }'
PER_CHANNEL = 'zero_point = 0, per = "out_channel" }'


def layer(bias: list[float]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, len(bias), 1)).eval()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor(bias))  # type: ignore[union-attr,arg-type,operator]
    return model


def spec(target_with: Callable[..., TargetSpec], rule: str, per: str = "out_channel") -> TargetSpec:
    return target_with((RULE, f"biases.b = {{ {rule} }}"), (PER_CHANNEL, PER_CHANNEL.replace("out_channel", per)))


def fraction(values: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in values.flatten().tolist()]


@pytest.mark.parametrize("per", ["tensor", "out_channel"])
@pytest.mark.parametrize("word", ["", ', out_of_range = "enlarge_scale"', ', out_of_range = "unknown"'])
def test_weights_get_the_smallest_scale_with_which_a_bias_fits(
    per: str, word: str, images: Tensor, quantize: Quantize, target_with: Callable[..., TargetSpec]
) -> None:
    model = layer([4.0, -0.001, 3.0])
    narrow = quantize(model, images[:32], spec(target_with, f'bits = 12, scale = "input*weight"{word}', per))
    wide = quantize(model, images[:32], spec(target_with, 'bits = 32, scale = "input*weight"', per))
    codes = narrow.codes(narrow.plan.point("0.bias")).tolist()
    assert all(-(2**11) <= code < 2**11 for code in codes)
    assert codes[0] >= 2**11 - 2  # no larger than needed: 4.0 takes the whole width
    before, after = (fraction(r.encodings()["0.weight"].scale) for r in (wide, narrow))
    assert all(new >= old for new, old in zip(after, before, strict=True))
    if per == "out_channel":
        assert after[1] == before[1]  # a bias that fits changes nothing


def test_a_bias_is_clamped_where_the_target_saturates_it(
    images: Tensor, quantize: Quantize, target_with: Callable[..., TargetSpec], caplog: pytest.LogCaptureFixture
) -> None:
    model = layer([4.0, -0.001, -3.0])
    rule = 'bits = 12, scale = "input*weight", out_of_range = "saturate"'
    result = quantize(model, images[:32], spec(target_with, rule))
    wide = quantize(model, images[:32], spec(target_with, 'bits = 32, scale = "input*weight"'))
    found, free = (r.codes(r.plan.point("0.bias")).tolist() for r in (result, wide))
    assert found == [2**11 - 1, free[1], -(2**11)]
    assert torch.equal(result.encodings()["0.weight"].scale, wide.encodings()["0.weight"].scale)
    assert "0.bias: 2 biases do not fit biases.b.bits = 12 and are clamped." in caplog.text


@pytest.mark.parametrize("word", ["refuse", "wrap"])
def test_a_bias_is_an_error_where_the_target_refuses_it(
    word: str, images: Tensor, quantize: Quantize, target_with: Callable[..., TargetSpec]
) -> None:
    rule = f'bits = 12, scale = "input*weight", out_of_range = "{word}"'
    message = rf'^0\.bias: needs \d+ bits at scale input\*weight; biases\.b has 12, out_of_range = "{word}"\. Let a fit'
    with pytest.raises(PlanError, match=message):
        quantize(layer([4.0, -0.001, -3.0]), images[:32], spec(target_with, rule))
    assert quantize(layer([0.0, 0.0, 0.0]), images[:32], spec(target_with, rule))


def test_weights_whose_scales_end_below_what_a_bias_needs(
    images: Tensor, quantize: Quantize, target_with: Callable[..., TargetSpec]
) -> None:
    ends = target_with(
        (RULE, RULE.replace("32", "12")), (PER_CHANNEL, PER_CHANNEL.replace(" }", ", scale = { max = 0.01 } }"))
    )
    with pytest.raises(PlanError, match=r"^0\.bias: needs \d+ bits at scale input\*weight; biases\.b has 12\. Let a"):
        quantize(layer([4e3, 0.0, 0.0]), images[:32], ends)


def test_operators_that_share_a_weight_have_biases_on_the_scale_that_it_has_in_the_end(
    images: Tensor, quantize: Quantize, target_with: Callable[..., TargetSpec]
) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.sin(self.a(x)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Tied().eval()
    with torch.no_grad():
        model.b.bias.fill_(50.0)  # the second needs coarser weights than the first
    result = quantize(model, images[:32], spec(target_with, 'bits = 12, scale = "input*weight"'))
    found = result.encodings()
    first = next(p for p in result.plan.points if p.role == "input").group
    assert torch.equal(found["a.bias"].scale, found[first].scale * found["a.weight"].scale)


def test_a_product_of_scales_past_float32_is_named(
    images: Tensor, quantize: Quantize, target_with: Callable[..., TargetSpec]
) -> None:
    model = layer([0.0, 0.0, 0.0])
    with torch.no_grad():
        model[0].weight.mul_(1e25)  # type: ignore[operator,union-attr]
    fixed = target_with(
        (
            "a8 = { bits = 8, signed = true,",
            'a8 = { bits = 8, signed = true, scale = { kind = "fixed", values = [1e30] },',
        )
    )
    with pytest.raises(RangeError, match=r"^0: input scale times weight scale must be a finite float32; got inf\. Sca"):
        quantize(model, images[:32], fixed)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), st.booleans())
def test_a_bias_of_its_own_scale_meets_the_sum_by_a_shift(
    images: Tensor,
    quantize: Quantize,
    target_with: Callable[..., TargetSpec],
    values: list[float],
    per_channel: bool,
) -> None:
    per = "out_channel" if per_channel else "tensor"
    rule = f'bits = 8, scale = "own", align = "shift", per = "{per}"'
    result = quantize(layer(values), images[:32], spec(target_with, rule, per))
    found = result.encodings()
    point = next(p for p in result.plan.points if p.role == "input")
    unit = fraction((found[point.group].scale * found["0.weight"].scale).expand(3))
    scale = fraction(found["0.bias"].scale.expand(3))
    for one, own, real in zip(unit, scale, values, strict=True):
        ratio = own / one
        assert ratio.denominator == 1 and ratio.numerator & (ratio.numerator - 1) == 0  # 1, 2, 4, ...
        assert abs(Fraction(real)) <= 127 * own
        if per_channel and ratio > 1:
            assert abs(Fraction(real)) > 127 * own / 2  # half as coarse would not do


SHIFTED = 'bits = 8, scale = "own", align = "shift", shift = { min = -7, max = -7 }'


def ratio_to_the_sum(result: Any) -> list[Fraction]:
    """Scale of the bias over input scale times weight scale, channel by channel."""
    found = result.encodings()
    group = next(p.group for p in result.plan.points if p.role == "input")
    unit = fraction((found[group].scale * found["0.weight"].scale).expand(3))
    return [own / one for own, one in zip(fraction(found["0.bias"].scale.expand(3)), unit, strict=True)]


@pytest.mark.parametrize("bias", [[0.0, 0.0, 0.0], [0.01, -0.02, 0.0], [0.5, -0.25, 0.1], [40.0, -3.0, 0.0]])
def test_a_bias_is_shifted_no_other_way_than_the_target_can(
    bias: list[float], images: Tensor, quantize: Quantize, target_with: Callable[..., TargetSpec]
) -> None:
    result = quantize(layer(bias), images[:32], spec(target_with, SHIFTED, "tensor"))
    assert ratio_to_the_sum(result) == [128, 128, 128]
    free = quantize(layer(bias), images[:32], spec(target_with, SHIFTED.split(", shift")[0], "tensor"))
    codes, scale = result.codes(result.plan.point("0.bias")), float(result.encodings()["0.bias"].scale)
    assert codes.tolist() == [round(value / scale) for value in bias]
    before, after = (float(r.encodings()["0.weight"].scale) for r in (free, result))
    assert after == before if max(map(abs, bias)) < 1 else after > 10 * before  # 127 * 128 units hold no 40
    assert max(map(abs, codes.tolist())) <= 127


def test_a_bias_past_the_longest_shift_does_what_the_target_says(
    images: Tensor, quantize: Quantize, target_with: Callable[..., TargetSpec], caplog: pytest.LogCaptureFixture
) -> None:
    model = layer([40.0, -0.1, 0.0])
    clamped = quantize(model, images[:32], spec(target_with, f'{SHIFTED}, out_of_range = "saturate"', "tensor"))
    assert clamped.codes(clamped.plan.point("0.bias")).tolist()[0] == 127
    assert "0.bias: 1 biases do not fit biases.b.bits = 8 and are clamped." in caplog.text
    message = (
        r"^0\.bias: needs 1\d bits at scale input\*weight times 2\^7; biases\.b has 8, out_of_range = \"refuse\"\."
    )
    with pytest.raises(PlanError, match=message):
        quantize(model, images[:32], spec(target_with, f'{SHIFTED}, out_of_range = "refuse"', "tensor"))
