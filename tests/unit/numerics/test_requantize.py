# SPDX-License-Identifier: Apache-2.0
"""Requantization in integers, against Python's own integers and fractions."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qhw.errors import RangeError
from qhw.numerics import (
    ROUNDING_RULES,
    fixed_point_multiplier,
    rescale_fixed_point,
    rescale_float32,
    rescale_shift,
)
from qhw.numerics.requantize import FixedPointCodes
from qhw.numerics.requantize_int64 import rescale_int64
from qhw.testing.reference import round_exact

DOUBLE = ("double", "double_half_to_plus_infinity")
ALL_RULES = (*ROUNDING_RULES, *DOUBLE)


def int32(x: int) -> int:
    """What a C int32 keeps of x."""
    return (x + 2**31) % 2**32 - 2**31


def gemmlowp(x: int, multiplier: int, right: int) -> int:
    """MultiplyByQuantizedMultiplier of TFLite's default build, statement by statement, shift counted to the right."""
    a = int32(x * 2 ** max(-right, 0))
    product = a * multiplier
    nudge = 2**30 if product >= 0 else 1 - 2**30
    high = abs(product + nudge) // 2**31 * (1 if product + nudge >= 0 else -1)  # C division truncates
    exponent = max(right, 0)
    mask = 2**exponent - 1
    remainder, threshold = high & mask, (mask >> 1) + (1 if high < 0 else 0)
    return (high >> exponent) + (1 if remainder > threshold else 0)


def exact(x: int, multiplier: int, right: int, bits: int, rule: str) -> int:
    """By the definition, in fractions."""
    if rule not in DOUBLE:
        return round_exact(Fraction(x * multiplier) / Fraction(2) ** (bits + right), rule)
    register = x * 2 ** max(-right, 0)
    register = (register + 2**bits) % 2 ** (bits + 1) - 2**bits
    high = round_exact(Fraction(register * multiplier, 2**bits), "half_to_plus_infinity")
    last = "half_away_from_zero" if rule == "double" else "half_to_plus_infinity"
    return round_exact(Fraction(high, 2 ** max(right, 0)), last)


@st.composite
def near_ties(draw, bits=31):
    """Accumulators of every size whose product lies on a tie of one of the roundings, or next to one."""
    multiplier = draw(st.integers(2 ** (bits - 1), 2**bits - 1) | st.sampled_from([2 ** (bits - 1), 2**bits - 1]))
    right = draw(st.integers(-8, 31))
    unit = Fraction(2) ** (bits + draw(st.sampled_from([0, right])))
    reach = 2 ** draw(st.integers(1, bits))
    code = draw(st.integers(-reach, reach))
    x = math.floor((code + Fraction(1, 2)) * unit / multiplier) + draw(st.integers(-1, 1))
    assume(-(2**bits) <= x < 2**bits)
    return x, multiplier, right


PLAIN = st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(2**30, 2**31 - 1), st.integers(-8, 31))


@given(case=PLAIN | near_ties())
@settings(max_examples=600, deadline=None)
def test_double_rounding_is_gemmlowp_s(case):
    x, multiplier, right = case
    found = rescale_fixed_point(torch.tensor([x]), torch.tensor([multiplier]), torch.tensor([right]))
    assert found.tolist() == [gemmlowp(x, multiplier, right)] == [exact(x, multiplier, right, 31, "double")]


@pytest.mark.parametrize("rule", ALL_RULES)
@given(case=PLAIN | near_ties())
@settings(max_examples=250, deadline=None)
def test_every_rule_is_the_definition(rule, case):
    x, multiplier, right = case
    tensors = torch.tensor([x]), torch.tensor([multiplier]), torch.tensor([right])
    expected = [exact(x, multiplier, right, 31, rule)]
    assert rescale_fixed_point(*tensors, rounding=rule).tolist() == expected
    assert rescale_int64(*tensors, 31, rule).tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("bits", [1, 7, 8, 15, 16])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_narrower_multipliers(rule, bits, data):
    x, multiplier, right = data.draw(near_ties(bits))
    tensors = torch.tensor([x]), torch.tensor([multiplier]), torch.tensor([right])
    assert rescale_fixed_point(*tensors, bits=bits, rounding=rule).tolist() == [exact(x, multiplier, right, bits, rule)]


@pytest.mark.parametrize("rule", ALL_RULES)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(0, 31),
    kind=st.sampled_from(["random", "power_of_two", "decimal"]),
    dtype=st.sampled_from([torch.int64, torch.float64, torch.float32]),
)
@settings(max_examples=60, deadline=None)
def test_the_fast_path_equals_the_plain_one(rule, seed, size, kind, dtype):
    generator = torch.Generator().manual_seed(seed)
    acc = torch.randint(-(2**size), 2**size, (3, 5, 200), generator=generator)
    acc = acc.to(dtype).long().clamp(-(2**31), 2**31 - 1)
    ratio = torch.rand(5, 1, dtype=torch.float64, generator=generator) * 2.0 ** -int(seed % 20)
    if kind == "power_of_two":
        ratio = 2.0 ** ratio.log2().round()
    if kind == "decimal":
        ratio = (ratio * 1000 + 1).round() / 1000
    multiplier, shift = fixed_point_multiplier(ratio)
    found = rescale_fixed_point(acc.to(dtype), multiplier, shift, rounding=rule)
    assert found.dtype == torch.int64
    assert torch.equal(found, rescale_int64(acc.to(dtype).long(), multiplier, shift, 31, rule))


@pytest.mark.parametrize("rule", ALL_RULES)
def test_the_fast_path_equals_the_plain_one_in_several_pieces(rule):
    generator = torch.Generator().manual_seed(3)
    multiplier, shift = fixed_point_multiplier(torch.rand(7, 1, 1, dtype=torch.float64, generator=generator) / 50)
    for shape in ((11, 7, 64, 64), (1, 7, 400, 401)):
        for reach in (2**20, 2**26):
            acc = torch.randint(-reach, reach, shape, generator=generator)
            found = rescale_fixed_point(acc, multiplier, shift, rounding=rule)
            assert torch.equal(found, rescale_int64(acc, multiplier, shift, 31, rule))


@pytest.mark.parametrize("rule", ROUNDING_RULES)
@given(
    x=st.integers(-(2**61) + 1, 2**61 - 1),
    multiplier=st.integers(2**30, 2**31 - 1) | st.sampled_from([2**30, 3 * 2**29]),
    right=st.integers(0, 62),
)
@settings(max_examples=200, deadline=None)
def test_wide_accumulators_round_once(rule, x, multiplier, right):
    found = rescale_fixed_point(torch.tensor([x]), torch.tensor(multiplier), torch.tensor(right), rounding=rule)
    assert found.tolist() == [exact(x, multiplier, right, 31, rule)]


@pytest.mark.parametrize("rule", ROUNDING_RULES)
@given(unit=st.integers(-(2**29), 2**29), right=st.integers(0, 31), off=st.integers(-1, 1))
@settings(max_examples=100, deadline=None)
def test_wide_accumulators_on_ties(rule, unit, right, off):
    x = (2 * unit + 1) * 2**right + off  # times 2**30 over 2**31: a half, and its neighbours
    assume(abs(x) < 2**61)
    found = rescale_fixed_point(torch.tensor([x]), torch.tensor(2**30), torch.tensor(right), rounding=rule)
    assert found.tolist() == [exact(x, 2**30, right, 31, rule)]


def test_by_hand():
    # 0.5 as 2**30 / 2**31. First rounding: 3 * 0.5 = 1.5 -> 2, -3 * 0.5 = -1.5 -> -1 (upwards). No second one.
    half, none, acc = torch.tensor(2**30), torch.tensor(0), torch.tensor([3, -3, 1, -1])
    assert rescale_fixed_point(acc, half, none).tolist() == [2, -1, 1, 0]
    assert rescale_fixed_point(acc, half, none, rounding="half_away_from_zero").tolist() == [2, -2, 1, -1]
    assert rescale_fixed_point(acc, half, none, rounding="half_even").tolist() == [2, -2, 0, 0]
    # 0.125: the high multiply leaves a half of 10 and of -10, 5 and -5; by 4 rounded 1.25 -> 1; 6 / 4 = 1.5 -> 2, away.
    eighth, two = torch.tensor(2**30), torch.tensor(2)
    assert rescale_fixed_point(torch.tensor([10, -10, 12, -12]), eighth, two).tolist() == [1, -1, 2, -2]
    # Twice rounded: 11 / 8 = 1.375 is nearest to 1, but 5.5 -> 6 and 6 / 4 -> 2.
    assert rescale_fixed_point(torch.tensor([11]), eighth, two).tolist() == [2]
    assert rescale_fixed_point(torch.tensor([11]), eighth, two, rounding="half_even").tolist() == [1]


def test_what_overflows_to_the_left_is_lost_as_in_an_int32():
    # 2**30 shifted left twice is 0 in 32 bits; 2**29 + 1 keeps 4 - 2**31.
    acc = torch.tensor([2**30, 2**29 + 1])
    found = rescale_fixed_point(acc, torch.tensor(2**30), torch.tensor(-2))
    assert found.tolist() == [0, (4 - 2**31) // 2]
    # Once rounded it is exact.
    found = rescale_fixed_point(acc, torch.tensor(2**30), torch.tensor(-2), rounding="half_even")
    assert found.tolist() == [2**31, 2**30 + 2]


@given(ratio=st.floats(2.0**-32, 2.0**30, exclude_max=True), bits=st.integers(1, 31))
@settings(max_examples=400, deadline=None)
def test_the_multiplier_is_the_nearest_one(ratio, bits):
    multiplier, shift = (int(t) for t in fixed_point_multiplier(torch.tensor(ratio, dtype=torch.float64), bits=bits,
                                                                shift_min=-62, shift_max=62))  # fmt: skip
    assert 2 ** (bits - 1) <= multiplier < 2**bits
    unit = Fraction(2) ** -(bits + shift)
    error = abs(Fraction(ratio) - multiplier * unit)
    # Half a unit; a carry halves the significand, whose unit then is twice what it was before.
    assert error <= unit / 2
    exponent = math.frexp(ratio)[1]
    significand = round_exact(Fraction(ratio) * Fraction(2) ** (bits - exponent), "half_away_from_zero")
    assert multiplier * unit == significand * Fraction(2) ** (exponent - bits)


def test_multipliers_by_hand():
    ratio = torch.tensor([0.5, 1.0, 0.75, 0.0072, 1 - 2.0**-40, 2.0**-32, 2.0**30 - 1], dtype=torch.float64)
    multiplier, shift = fixed_point_multiplier(ratio)
    assert shift.tolist() == [0, -1, 0, 7, -1, 31, -30]
    # 0.0072 * 2**7 = 0.9216; 1 - 2**-40 rounds up to 1, which is 2**30 one exponent on.
    expected = [2**30, 2**30, 3 * 2**29, round(Fraction(0.0072) * 2**38), 2**30, 2**30, 2**31 - 2]
    assert multiplier.tolist() == expected


def test_ratios_beyond_the_shifts():
    ratio = torch.tensor([0.0, 2.0**-33, 2.0**30, 1e30, 0.5], dtype=torch.float64)
    multiplier, shift = fixed_point_multiplier(ratio, out_of_range="saturate")
    assert multiplier.tolist() == [0, 0, 2**31 - 1, 2**31 - 1, 2**30]
    assert shift.tolist() == [0, 0, -30, -30, 0]
    multiplier, shift = fixed_point_multiplier(ratio, out_of_range="zero_scale")
    assert multiplier.tolist() == [0, 0, 0, 0, 2**30]
    assert shift.tolist() == [0, 0, 0, 0, 0]
    for bad in (ratio[0], ratio[1], ratio[2], ratio[3]):
        message = rf"must be at least 2\*\*-32 and below 2\*\*30 for right shifts of -30 to 31; got {bad.item():.6g}"
        with pytest.raises(RangeError, match=message.replace("+", r"\+")):
            fixed_point_multiplier(bad)


def test_a_multiplier_of_zero_gives_zero_by_every_rule():
    acc = torch.tensor([-(2**31), -1, 0, 5])
    for rule in ALL_RULES:
        assert rescale_fixed_point(acc, torch.tensor(0), torch.tensor(0), rounding=rule).tolist() == [0, 0, 0, 0]


def test_channels_broadcast_and_nothing_gives_nothing():
    multiplier, shift = fixed_point_multiplier(torch.tensor([[0.5], [0.25]], dtype=torch.float64))
    assert rescale_fixed_point(torch.tensor([8, -8]), multiplier, shift).tolist() == [[4, -4], [2, -2]]
    assert rescale_fixed_point(torch.zeros(2, 0, dtype=torch.int64), multiplier, shift).shape == (2, 0)
    assert rescale_fixed_point(torch.tensor(8), torch.tensor(2**30), torch.tensor(1)).tolist() == 2


@pytest.mark.parametrize("rule", ROUNDING_RULES)
@given(
    x=st.integers(-(2**31), 2**31) | st.integers(-(2**62), 2**62),
    multiplier=st.floats(-4.0, 4.0, width=32) | st.sampled_from([0.5, 0.25, 1e30, 2.0**-30]),
)
@settings(max_examples=200, deadline=None)
def test_float32_is_one_conversion_and_one_product(rule, x, multiplier):
    product = float32(Fraction(float32(x)) * Fraction(multiplier))
    expected = max(-(2**62), min(2**62, round_exact(Fraction(product), rule)))
    found = rescale_float32(torch.tensor([x]), torch.tensor([multiplier], dtype=torch.float32), rounding=rule)
    assert found.tolist() == [expected]


def float32(x) -> float:
    """The float32 next to an exact number, half to even, by hand: no double rounding through float64."""
    x = Fraction(x)
    if x == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(x))) - 23, -149)
    while abs(x) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    while abs(x) < Fraction(2) ** (exponent + 23) and exponent > -149:
        exponent -= 1
    return float(round_exact(x / Fraction(2) ** exponent) * Fraction(2) ** exponent)


def test_float32_takes_floats_and_cuts_what_int64_cannot_hold():
    acc = torch.tensor([3.0, -3.0, 1e30])
    assert rescale_float32(acc, torch.tensor(0.5)).tolist() == [2, -2, 2**62]
    assert rescale_float32(torch.tensor([2**31]), torch.tensor([[3e38], [-3e38]])).tolist() == [[2**62], [-(2**62)]]


@pytest.mark.parametrize("rule", ROUNDING_RULES)
@given(x=st.integers(-(2**40), 2**40), shift=st.integers(-20, 62))
@settings(max_examples=200, deadline=None)
def test_a_shift_is_the_rounded_quotient(rule, x, shift):
    expected = round_exact(Fraction(x) / Fraction(2) ** shift, rule)
    assert rescale_shift(torch.tensor([x]), torch.tensor(shift), rounding=rule).tolist() == [expected]


ONE, F64 = torch.tensor([1]), torch.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fixed_point_multiplier(torch.tensor(0.5)), "ratio must be float64; got torch.float32"),
        (lambda: fixed_point_multiplier(torch.tensor(-1.0, dtype=F64)), "must be a finite number from 0 on; got -1"),
        (lambda: fixed_point_multiplier(torch.tensor(math.nan, dtype=F64)), "finite number from 0 on; got nan"),
        (lambda: fixed_point_multiplier(torch.tensor(math.inf, dtype=F64)), "finite number from 0 on; got inf"),
        (lambda: fixed_point_multiplier(torch.tensor(0.5, dtype=F64), bits=32), "bits must lie in 1 to 31; got 32"),
        (
            lambda: fixed_point_multiplier(torch.tensor(0.5, dtype=F64), shift_min=2, shift_max=1),
            "shift_min must not exceed shift_max; got 2 and 1",
        ),
        (lambda: rescale_fixed_point(ONE, ONE, ONE, bits=0), "bits must lie in 1 to 31; got 0"),
        (lambda: rescale_fixed_point(ONE.int(), ONE, ONE), "acc must be int64, float32 or float64; got torch.int32"),
        (lambda: rescale_fixed_point(ONE, ONE.int(), ONE), "multiplier must be int64; got torch.int32"),
        (lambda: rescale_fixed_point(ONE, ONE * 2**31, ONE), "multiplier must lie in 0 to 2147483647; got 2147483648"),
        (lambda: rescale_fixed_point(ONE, ONE, ONE * 63), "shift must lie in -62 to 62; got 63"),
        (
            lambda: rescale_fixed_point(ONE, ONE, ONE, rounding="half_up"),
            "rounding must be one of half_even, .*, double, double_half_to_plus_infinity; got 'half_up'",
        ),
        (
            lambda: rescale_fixed_point(ONE * 2**31, ONE, ONE),
            "a double rounding with 31 bits takes accumulators of 32 bits; got 2147483648",
        ),
        (
            lambda: rescale_fixed_point(torch.tensor([math.nan]), ONE, ONE),
            "a double rounding with 31 bits takes accumulators of 32 bits",
        ),
        (
            lambda: rescale_fixed_point(ONE * 2**61, ONE * 2**30, ONE, rounding="half_even"),
            r"a product past 2\*\*62 needs \|acc\| < 2\*\*61 and bits \+ shift >= 31; got 2305843009213693952 and 32",
        ),
        (
            lambda: rescale_fixed_point(ONE * 2**30, ONE * 2**30, ONE * -50, rounding="half_even"),
            "1152921504606846976 shifted left must fit int64",
        ),
        (lambda: rescale_float32(ONE.double(), ONE.float()), "acc must be int64 or float32; got torch.float64"),
        (lambda: rescale_float32(ONE, ONE.double()), "multiplier must be finite float32; got torch.float64"),
        (lambda: rescale_float32(ONE, ONE / 0), "multiplier must be finite float32"),
        (lambda: rescale_float32(ONE, ONE.float(), rounding="double"), "rounding must be one of .*; got 'double'"),
        (lambda: rescale_shift(ONE.float(), ONE), "acc must be int64; got torch.float32"),
        (lambda: rescale_shift(ONE, ONE * -63), "shift must lie in -62 to 62; got -63"),
        (lambda: rescale_shift(ONE * 4, ONE * -61), "4 shifted left must fit int64"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(call, message):
    with pytest.raises(RangeError, match=message):
        call()


@pytest.mark.parametrize("rounding", [*ROUNDING_RULES, "double", "double_half_to_plus_infinity"])
@pytest.mark.parametrize("bound", [2**7, 2**20, 2**30], ids=["exact", "near ties decided in integers", "in int64"])
def test_prepared_codes_are_the_clamped_result_with_its_zero_point(rounding: str, bound: int) -> None:
    generator = torch.Generator().manual_seed(bound)
    acc = torch.randint(-bound, bound, (2, 5, 70, 300), generator=generator)
    shift = torch.randint(0, 12, (5, 1, 1), generator=generator)
    multiplier = torch.randint(2**30, 2**31, (5, 1, 1), generator=generator)
    found = FixedPointCodes.of(multiplier, shift, 31, rounding)(acc, -7, -100, 90, torch.float32)  # type: ignore[arg-type]
    assert found.dtype == torch.float32
    exact = rescale_int64(acc, multiplier, shift, 31, rounding) - 7
    assert torch.equal(found, exact.clamp(-100, 90).float())


GRIDS = st.sampled_from(
    [(-128, -128, 127), (-128, -128, 3), (0, 0, 255), (-7, -100, 90), (17, 17, 127), (3000, -32768, 32767)]
)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ALL_RULES)
@given(data=st.data(), grid=GRIDS, size=st.integers(1, 30), bits=st.sampled_from([31, 31, 16, 8, 1]))
@settings(max_examples=150, deadline=None)
def test_codes_of_bounded_accumulators_are_the_definition(rule, data, grid, size, bits):
    multiplier, right = data.draw(near_ties(bits))[1:]
    zero_point, low, high = grid
    prepared = FixedPointCodes.of(torch.tensor([multiplier]), torch.tensor([right]), bits, rule)
    codes_of = prepared.bounded(zero_point, low, high, 2**size)
    assume(codes_of is not None)
    # Ties of the one rounding or the first of two, those behind the zero point, both ends, and what is next to them.
    unit = Fraction(2) ** (bits + right) / multiplier
    codes = data.draw(st.lists(st.integers(low - zero_point - 2, high - zero_point + 2), min_size=4, max_size=4))
    near = [
        math.floor((code + Fraction(1, 2)) * scale) for code in codes for scale in (unit, unit / 2 ** max(right, 0))
    ]
    acc = [x + off for x in (*near, 0, 2**size, -(2**size)) for off in (-1, 0, 1) if abs(x + off) <= 2**size]
    expected = [min(max(exact(x, multiplier, right, bits, rule) + zero_point, low), high) for x in acc]
    for carried in (torch.int64, torch.float64, torch.float32)[: 3 if size <= 24 else 2]:
        for kept in (torch.float32, torch.int64):
            found = torch.empty(len(acc), dtype=kept)
            codes_of(torch.tensor(acc).to(carried), found)
            assert found.tolist() == expected


@pytest.mark.parametrize("rule", ALL_RULES)
def test_codes_of_bounded_accumulators_by_pieces_and_in_place(rule):
    generator = torch.Generator().manual_seed(5)
    multiplier, shift = fixed_point_multiplier(torch.rand(7, 1, 1, dtype=torch.float64, generator=generator) / 500)
    codes_of = FixedPointCodes.of(multiplier, shift, 31, rule).bounded(-5, -128, 127, 2**20)
    acc = torch.randint(-(2**20), 2**20 + 1, (23, 7, 64, 64), generator=generator)
    expected = (rescale_int64(acc, multiplier, shift, 31, rule) - 5).clamp(-128, 127)
    for values in (acc.float(), acc.float().contiguous(memory_format=torch.channels_last)):
        codes_of(values, values)
        assert torch.equal(values.long(), expected)
    sample = acc[0].float()
    codes_of(sample, sample)
    assert torch.equal(sample.long(), expected[0])


@pytest.mark.parametrize(
    ("rule", "right", "largest", "is_proven"),
    [
        # Quotients up to 384, a code and the zero point, in units of 2**-(31 + 13), and a half: 385 * 2**44 <= 2**53.
        ("half_to_plus_infinity", 13, 2**30, True),
        ("half_to_plus_infinity", 14, 2**30, False),
        # The bound of the sum keeps them below, whatever the shift.
        ("half_even", 30, 2**21, True),
        ("half_even", 20, 2**23, False),
        ("double", 20, 2**22 - 1, True),
        ("double", 20, 2**23, False),
        # Nothing but 0 comes out; and 1 shifted left leaves the register.
        ("half_even", 40, 2**30, True),
        ("floor", 40, 2**30, False),
        ("double", -2, 2**29, False),
        ("double", -2, 2**29 - 1, True),
    ],
)
def test_what_float64_alone_proves(rule, right, largest, is_proven):
    prepared = FixedPointCodes.of(torch.tensor([2**31 - 1]), torch.tensor([right]), 31, rule)
    assert (prepared.bounded(-128, -128, 127, largest) is not None) == is_proven
