# SPDX-License-Identifier: Apache-2.0
"""Requantization against LiteRT's kernels: 0 codes differ, on runs where neighbouring arithmetic differs.

Every run counts only if mutants of the arithmetic, a rounding or the place of the zero point changed, give other codes
on it. Scales come in three kinds: random; short decimals, whose ratios put accumulators next to ties; powers of two,
which put them on ties.
"""

import itertools
import platform

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("ai_edge_litert")

from qhw.numerics import fixed_point_multiplier, rescale_fixed_point, round_real, shift_right
from tests import litert_support as litert

KINDS = ("random", "decimal", "power_of_two")
# Of conv's arithmetic: rounded once by three rules, the last of two roundings by two others, the zero point early.
MUTANTS = (
    "half_away_from_zero",
    "half_even",
    "half_to_plus_infinity",
    "double_half_even",
    "double_half_to_plus_infinity",
    "zero_point_before",
)


def requantize(acc: Tensor, ratio: Tensor, zero_point: int, how: str = "double") -> Tensor:
    """Codes before the clamp; `how` is a rounding, or a mutant of "double"."""
    multiplier, shift = fixed_point_multiplier(ratio)
    if how not in ("double_half_even", "zero_point_before"):
        return rescale_fixed_point(acc, multiplier, shift, rounding=how) + zero_point  # type: ignore[arg-type]
    high, right = rescale_fixed_point(acc, multiplier, shift.clamp(max=0)), shift.clamp(min=0)
    if how == "double_half_even":
        return shift_right(high, right, "half_even") + zero_point
    return shift_right(high + (zero_point << right), right, "half_away_from_zero")


class Scales:
    """Draws of one kind."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.generator = kind, torch.Generator().manual_seed(seed)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers from low to high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def draw(self, low: float, high: float, *shape: int) -> Tensor:
        """float32 scales, spread evenly over the decades between low and high."""
        uniform = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        scale = low * (high / low) ** uniform
        if self.kind == "power_of_two":
            scale = 2.0 ** scale.log2().round()
        if self.kind == "decimal":  # one or two digits
            unit = 10.0 ** scale.log10().floor() / self.integers(0, 1, *shape).mul(9).add(1)
            scale = (scale / unit).round() * unit
        return scale.float()


def codes_beside_ties(scales: Scales, ratio: Tensor) -> Tensor:
    """int32 accumulators, one per ratio, at most two units from the middle between two codes."""
    code = scales.integers(-140, 140, *ratio.shape)
    acc = ((code + 0.5) / ratio).round().long() + scales.integers(-2, 2, *ratio.shape)
    return acc.clamp(-(2**31), 2**31 - 1)


def check(found: Tensor, expected: Tensor, mutants: dict[str, Tensor]) -> None:
    """No code differs from LiteRT's, and some of every mutant's do."""
    assert int((found != expected).sum()) == 0
    differing = {name: int((mutant != expected).sum()) for name, mutant in mutants.items()}
    assert min(differing.values()) > 0, f"{expected.numel()} codes do not tell these apart: {differing}"


def clamped(values: Tensor) -> Tensor:
    return values.clamp(-128, 127)


def single_accumulators(kind: str, seed: int) -> tuple[Tensor, Tensor, Tensor, float, int]:
    """Accumulators, weight scales, ratios, output scale, zero point: the bias is the accumulator, the input is 0."""
    scales = Scales(kind, seed)
    out = float(scales.draw(0.01, 1.0))
    weight = scales.draw(out * 2.0**-20, out * 2.0**6, 20_000)
    ratio = weight.double() / torch.tensor(out, dtype=torch.float32).double()
    return codes_beside_ties(scales, ratio), weight, ratio, out, int(scales.integers(-100, 100))


def run_single_accumulators(operator: str, case: tuple[Tensor, Tensor, Tensor, float, int], optimized=False) -> Tensor:
    acc, weight, _, out, zero_point = case
    count, output = len(acc), litert.Encoding(out, zero_point)
    x = litert.Codes(torch.zeros(1, 1, 1, 1), 1.0)
    if operator == "CONV_2D":
        w = litert.Codes(torch.zeros(count, 1, 1, 1), weight)
        return torch.from_numpy(litert.conv_2d(x, w, acc, output, optimized=optimized)).flatten().long()
    if operator == "DEPTHWISE_CONV_2D":
        w = litert.Codes(torch.zeros(1, 1, 1, count), weight, axis=3)
        return torch.from_numpy(litert.depthwise_conv_2d(x, w, acc, output, optimized=optimized)).flatten().long()
    w = litert.Codes(torch.zeros(count, 1), weight)
    x = litert.Codes(torch.zeros(1, 1), 1.0)
    return torch.from_numpy(litert.fully_connected(x, w, acc, output, optimized=optimized)).flatten().long()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operator", ["CONV_2D", "DEPTHWISE_CONV_2D"])
def test_accumulators_beside_ties(operator, kind):
    for seed in range(3):
        case = single_accumulators(kind, seed)
        acc, _, ratio, _, zero_point = case
        expected = run_single_accumulators(operator, case)
        mutants = {how: clamped(requantize(acc, ratio, zero_point, how)) for how in MUTANTS}
        check(clamped(requantize(acc, ratio, zero_point)), expected, mutants)


@pytest.mark.parametrize("operator", ["CONV_2D", "DEPTHWISE_CONV_2D"])
def test_what_overflows_to_the_left_wraps(operator):
    scales = Scales("random", 0)
    acc, weight = scales.integers(-(2**31), 2**31 - 1, 5000), scales.draw(1.0, 2.0**20, 5000)
    expected = run_single_accumulators(operator, (acc, weight, weight.double(), 1.0, 0))
    exact = clamped(requantize(acc, weight.double(), 0, "half_even"))
    check(clamped(requantize(acc, weight.double(), 0)), expected, {"exact": exact})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operator", ["CONV_2D", "DEPTHWISE_CONV_2D"])
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="seen on x86 only")
def test_the_optimized_kernels_send_the_last_ties_upwards(operator, kind):
    case = single_accumulators(kind, 7)
    acc, _, ratio, _, zero_point = case
    expected = run_single_accumulators(operator, case, optimized=True)
    mutants = {"double": clamped(requantize(acc, ratio, zero_point))}
    check(clamped(requantize(acc, ratio, zero_point, "double_half_to_plus_infinity")), expected, mutants)


@pytest.mark.parametrize("kind", KINDS)
def test_fully_connected_multiplies_in_float64(kind):
    # The reference kernel has no fixed point: round(double(acc) * (sx * sw / sy)), half away from zero.
    case = single_accumulators(kind, 11)
    acc, _, ratio, _, zero_point = case
    expected = run_single_accumulators("FULLY_CONNECTED", case)
    product = acc.double() * ratio
    mutants = {
        "half_even": clamped(product.round().long() + zero_point),
        "double": clamped(requantize(acc, ratio, zero_point)),
    }
    if kind != "power_of_two":
        del mutants["half_even"]
    check(clamped(round_real(product, "half_away_from_zero").long() + zero_point), expected, mutants)


# What a fused activation keeps, as reals; below 0 nothing is left to tell mutants apart that differ only there.
ACTIVATIONS = {
    "NONE": (None, None, MUTANTS),
    "RELU_N1_TO_1": (-1.0, 1.0, MUTANTS),
    "RELU6": (0.0, 6.0, ("half_away_from_zero", "half_even", "double_half_even")),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_whole_convolutions(activation):
    lowest, highest, names = ACTIVATIONS[activation]
    found, expected = [], []
    mutants: dict[str, list[Tensor]] = {how: [] for how in names}
    for kind, seed in itertools.product(KINDS, range(4)):
        scales = Scales(kind, seed)
        # Small weights keep the multiplier large and its shift short: ties come often.
        x, w = scales.integers(-128, 127, 3, 6, 33, 33), scales.integers(-15, 15, 40, 6, 3, 3)
        bias, zero_x, zero_y = scales.integers(-500, 500, 40), int(scales.integers(-128, 127)), 5
        scale_x, scale_w, scale_y = scales.draw(0.01, 0.03, 1), scales.draw(0.01, 0.03, 40), scales.draw(0.01, 0.03, 1)
        acc = F.conv2d(x - zero_x, w, bias, stride=2)
        ratio = (scale_x.double() * scale_w.double() / scale_y.double()).reshape(-1, 1, 1)
        ends = (-128.0 if lowest is None else lowest / scale_y, 127.0 if highest is None else highest / scale_y)
        low, high = (int(round_real(torch.as_tensor(end), "half_away_from_zero")) for end in ends)
        low, high = (low, high) if lowest is None else (max(low + zero_y, -128), min(high + zero_y, 127))
        y = litert.conv_2d(
            litert.Codes(x.permute(0, 2, 3, 1), float(scale_x), zero_x),
            litert.Codes(w.permute(0, 2, 3, 1), scale_w),
            bias,
            litert.Encoding(float(scale_y), zero_y),
            stride=2,
            activation=activation,
        )
        expected.append(torch.from_numpy(y).permute(0, 3, 1, 2).long())
        found.append(requantize(acc, ratio, zero_y).clamp(low, high))
        for how, results in mutants.items():
            results.append(requantize(acc, ratio, zero_y, how).clamp(low, high))
    check(torch.stack(found), torch.stack(expected), {how: torch.stack(results) for how, results in mutants.items()})


EVERY_PAIR = torch.arange(-128, 128).reshape(-1, 1).expand(256, 256), torch.arange(-128, 128).expand(256, 256)


def add(a, b, scales, zeros, how: str = "double") -> Tensor:
    """LiteRT's ADD: operands shifted left by 20 bits, halved at least, summed, rescaled."""
    scale_a, scale_b, scale_y = (s.double() for s in scales)
    twice = 2 * torch.maximum(scale_a, scale_b)
    preshift = 0 if how == "no_preshift" else 20
    last = "double" if how == "no_preshift" else how
    x = requantize((a - zeros[0]) << preshift, scale_a / twice, 0)
    y = requantize((b - zeros[1]) << preshift, scale_b / twice, 0)
    return clamped(requantize(x + y, twice / (2.0**preshift * scale_y), zeros[2], last))


def mul(a, b, scales, zeros, how: str = "double") -> Tensor:
    """LiteRT's MUL: the ratio is formed in float32, left to right."""
    scale_a, scale_b, scale_y = scales
    ratio = (scale_a * scale_b / scale_y).double()
    return clamped(requantize((a - zeros[0]) * (b - zeros[1]), ratio, zeros[2], how))


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["ADD", "MUL"])
def test_every_pair_of_codes(operator):
    ours, theirs = (add, litert.add) if operator == "ADD" else (mul, litert.mul)
    more = ("no_preshift",) if operator == "ADD" else ()
    found, expected = [], []
    mutants: dict[str, list[Tensor]] = {how: [] for how in (*MUTANTS, *more)}
    for kind, seed in itertools.product(KINDS, range(12)):
        draws = Scales(kind, seed)
        scales = [*draws.draw(0.01, 0.1, 2), draws.draw(0.01, 0.2)]
        if operator == "MUL":
            scales[2] = draws.draw(0.005, 0.5)
        zeros = [int(z) for z in draws.integers(-60, 60, 3)]
        operands = [litert.Codes(q, float(s), z) for q, s, z in zip(EVERY_PAIR, scales, zeros, strict=False)]
        output = litert.Encoding(float(scales[2]), zeros[2])
        expected.append(torch.from_numpy(theirs(*operands, output)).long())
        found.append(ours(*EVERY_PAIR, scales, zeros))
        for how, results in mutants.items():
            results.append(ours(*EVERY_PAIR, scales, zeros, how))
    check(torch.stack(found), torch.stack(expected), {how: torch.stack(results) for how, results in mutants.items()})


# Scales a, b and c of short decimals with a * b / c = 1/8 but for their rounding, and how a ratio is formed from them.
RATIOS = {
    "float64": lambda a, b, c: a.double() * b.double() / c.double(),
    "product in float32": lambda a, b, c: (a * b).double() / c.double(),
    "float32": lambda a, b, c: (a * b / c).double(),
}


@pytest.mark.parametrize(
    ("operator", "own"), [("conv", "float64"), ("conv with one scale", "float64"), ("mul", "float32")]
)
def test_how_the_ratio_is_formed(operator, own):
    draws = Scales("decimal", 0)
    found: dict[str, list[Tensor]] = {name: [] for name in RATIOS}
    expected = []
    for _ in range(20):
        i, j = (int(n) for n in draws.integers(2, 99, 2))
        scales = a, b, c = torch.tensor([i / 100, j / 100, 8 * i * j / 10_000])
        if operator == "mul":
            x, y = (litert.Codes(q, float(s)) for q, s in zip(EVERY_PAIR, (a, b), strict=True))
            result, acc = litert.mul(x, y, litert.Encoding(float(c))), EVERY_PAIR[0] * EVERY_PAIR[1]
        else:
            acc = torch.arange(-1000, 1000)  # times 1/2 these lie on ties of the first rounding
            x = litert.Codes(torch.zeros(1, 1, 1, 1), float(a))
            w = litert.Codes(torch.zeros(2000, 1, 1, 1), b.expand(2000) if operator == "conv" else float(b))
            result = litert.conv_2d(x, w, acc, litert.Encoding(float(c))).reshape(-1)
        expected.append(torch.from_numpy(result).long())
        for name, ratio in RATIOS.items():
            found[name].append(clamped(requantize(acc, ratio(*scales), 0)))
    results = {name: torch.stack(codes) for name, codes in found.items()}
    ours = results.pop(own)
    if operator == "mul":
        del results["product in float32"]  # gives the same codes here
    check(ours, torch.stack(expected), results)
