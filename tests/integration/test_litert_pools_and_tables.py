# SPDX-License-Identifier: Apache-2.0
"""What LiteRT's reference kernels do in pools, means and lookup functions, as formulas: 0 codes differ."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("ai_edge_litert")

from qhw.numerics import fixed_point_multiplier, rescale_fixed_point, round_real
from tests import litert_support as litert


def codes(seed: int, *shape: int) -> Tensor:
    """Random int8 codes."""
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed))


def differing(found: Tensor, expected: np.ndarray) -> int:
    return int((found != torch.from_numpy(expected).long()).sum())


@pytest.mark.parametrize(("size", "padding"), [(2, "VALID"), (3, "SAME"), (4, "VALID")])
def test_an_average_pool_averages_codes_half_away_from_zero(size, padding):
    # The zero point stays out of it, and SAME divides by the number of codes that lie inside.
    x = codes(size, 4, 13, 13, 8)
    expected = litert.average_pool_2d(litert.Codes(x, 0.1, 7), size=size, padding=padding)
    edge = size - 1 if padding == "SAME" else 0
    image = F.pad(torch.stack([x.double(), torch.ones(x.shape).double()]), (0, 0, *(edge // 2, edge - edge // 2) * 2))
    sums, counts = image.unfold(2, size, 1).unfold(3, size, 1).sum((-2, -1))
    assert differing(round_real(sums / counts, "half_away_from_zero").long(), expected) == 0
    assert differing((sums / counts).round().long(), expected) > 0


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
def test_a_max_pool_takes_the_largest_code(padding):
    x = codes(1, 2, 9, 9, 4)
    expected = litert.max_pool_2d(litert.Codes(x, 0.1, 7), size=3, stride=1, padding=padding)
    image = F.pad(x, (0, 0, 1, 1, 1, 1), value=-128) if padding == "SAME" else x
    assert differing(image.unfold(1, 3, 1).unfold(2, 3, 1).amax((-2, -1)), expected) == 0


def test_a_concatenation_copies_codes():
    a, b = codes(2, 2, 3, 3, 4), codes(3, 2, 3, 3, 5)
    output = litert.Encoding(0.1, 7)
    expected = litert.concatenation([litert.Codes(a, 0.1, 7), litert.Codes(b, 0.1, 7)], output)
    assert differing(torch.cat([a, b], 3), expected) == 0


def test_a_mean_divides_its_multiplier_by_the_count():
    # m / 2**shift ~ sx / sy, then m becomes floor(m * 2**k / count) and the shift k more, k = floor(log2(count)).
    draw = np.random.default_rng(0)
    found, unfolded, expected = [], [], []
    for seed in range(60):
        side = int(draw.integers(2, 9))
        scale_x = np.float32(draw.uniform(0.01, 0.1))
        scale_y = np.float32(scale_x * draw.choice([1.0, 0.5, draw.uniform(0.3, 1.2)]))
        zero_x, zero_y = int(draw.integers(-128, 128)), int(draw.integers(-20, 20))
        x, count = codes(seed, 8, side, side, 32), side * side
        y = litert.mean(litert.Codes(x, scale_x, zero_x), litert.Encoding(scale_y, zero_y), keep_dims=False)
        acc, ratio = (x - zero_x).sum((1, 2)), torch.tensor(float(scale_x) / float(scale_y), dtype=torch.float64)
        multiplier, shift = fixed_point_multiplier(ratio)
        more = count.bit_length() - 1
        folded = (multiplier << more) // count, shift + more
        found.append((rescale_fixed_point(acc, *folded) + zero_y).clamp(-128, 127))
        whole = fixed_point_multiplier(ratio / count)
        unfolded.append((rescale_fixed_point(acc, *whole) + zero_y).clamp(-128, 127))
        expected.append(y)
    assert differing(torch.stack(found), np.stack(expected)) == 0
    assert differing(torch.stack(unfolded), np.stack(expected)) > 0


@pytest.mark.parametrize(
    ("operator", "function", "scale", "zero_point"),
    [(litert.logistic, torch.sigmoid, 1 / 256, -128), (litert.tanh, torch.tanh, 1 / 128, 0)],
    ids=["logistic", "tanh"],
)
def test_lookup_functions_are_evaluated_in_float32(operator, function, scale, zero_point):
    draw = np.random.default_rng(0)
    q = torch.arange(-128, 128)
    for _ in range(50):
        scale_x, zero_x = torch.tensor(draw.uniform(0.005, 0.2), dtype=torch.float32), int(draw.integers(-128, 128))
        y = operator(litert.Codes(q.reshape(1, 16, 16, 1), float(scale_x), zero_x)).reshape(-1)
        real = function((q - zero_x).float() * scale_x)
        code = round_real(real / scale, "half_away_from_zero").long() + zero_point
        assert differing(code.clamp(-128, 127), y) == 0
