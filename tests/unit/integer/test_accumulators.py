# SPDX-License-Identifier: Apache-2.0
"""Accumulator proofs by brute force: every input of small layers, every partial sum, witnesses replayed."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qhw.errors import IntegerError
from qhw.integer import IntegerModel, prove_accumulators
from qhw.schema import parse_target
from tests import integer_support as reference
from tests.integer_support import Grid, fill, quantized

CODES = [-2, -1, 0, 1]
TINY = 'bits = 2, signed = true, per = "tensor"'


def result_of(model: nn.Module, shape: tuple[int, ...], zero: int, biases: Any, seed: int, **spec_of: Any) -> Any:
    """Random 3-bit weights with a zero point, 2-bit inputs: the result, its weights and its biases as integers."""
    rng = np.random.default_rng(seed)
    weight = model.get_parameter("weight")
    x = Grid(0.5, zero, -2, 1)
    w = Grid(0.25, 1, -4, 3)
    w_q = rng.integers(-4, 4, tuple(weight.shape))
    fill(weight, w.reals(w_q))
    grids = {"input": x, "weight": w, "result": Grid(1.0)}
    bias = getattr(model, "bias", None)
    if bias is not None:
        b_q = np.array([biases] * len(bias)) if isinstance(biases, int) else np.array(biases)
        grids["bias"] = Grid(0.125, 0, -(2**31), 2**31 - 1)
        fill(bias, grids["bias"].reals(b_q))
    spec = reference.target(activation=TINY, weight='bits = 3, signed = true, per = "tensor"', **spec_of)
    return quantized(model, spec, torch.zeros(2, *shape), grids), w_q - 1


def products_of(model: nn.Module, weights: Any, x: Any) -> list[list[list[int]]]:
    """Per output channel and position, the products of one sample [*shape]: one by one, from the operator's rule."""
    if isinstance(model, nn.Linear):
        return [[[int(a) * int(b) for a, b in zip(x, row, strict=True)]] for row in weights]
    assert isinstance(model, nn.Conv1d | nn.ConvTranspose1d)
    (k,), (s,), (d,) = model.kernel_size, model.stride, model.dilation
    p = 0 if model.padding == "same" else int(model.padding[0])
    channels, size = x.shape
    groups = model.groups
    if model.padding == "same":  # the odd zero comes behind
        count = size
    elif isinstance(model, nn.Conv1d):
        count = (size + 2 * p - d * (k - 1) - 1) // s + 1
    else:
        count = (size - 1) * s - 2 * p + d * (k - 1) + 1 + model.output_padding[0]
    found: list[list[list[int]]] = [[[] for _ in range(count)] for _ in range(model.out_channels)]
    per_in, per_out = channels // groups, model.out_channels // groups
    for out, i, tap in itertools.product(range(model.out_channels), range(per_in), range(k)):
        group = out // per_out
        for j in range(size):
            if isinstance(model, nn.Conv1d):
                at, rest = divmod(j + p - tap * d, s)
                weight = weights[out, i, tap]
            else:
                at, rest = j * s + tap * d - p, 0
                weight = weights[group * per_in + i, out % per_out, tap]
            if rest == 0 and 0 <= at < count:
                found[out][at].append(int(weight) * int(x[group * per_in + i, j]))
    return found


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda b: nn.Linear(4, 3, b), (4,)),
    "conv": (lambda b: nn.Conv1d(2, 2, 2, bias=b), (2, 3)),
    "padded": (lambda b: nn.Conv1d(1, 2, 3, padding=1, bias=b), (1, 5)),
    "only-padding-fits": (lambda b: nn.Conv1d(1, 1, 3, padding=1, bias=b), (1, 2)),
    "strided": (lambda b: nn.Conv1d(1, 2, 2, stride=3, bias=b), (1, 5)),
    "full-window-off-centre": (lambda b: nn.Conv1d(1, 2, 2, padding="same", bias=b), (1, 2)),
    "dilated": (lambda b: nn.Conv1d(1, 2, 2, dilation=2, padding=1, bias=b), (1, 4)),
    "depthwise": (lambda b: nn.Conv1d(2, 2, 2, groups=2, bias=b), (2, 3)),
    "grouped": (lambda b: nn.Conv1d(2, 4, 2, groups=2, bias=b), (2, 2)),
    "transposed": (lambda b: nn.ConvTranspose1d(1, 2, 2, bias=b), (1, 4)),
    "only-padding-fits-dilated": (lambda b: nn.Conv1d(1, 2, 3, padding=2, dilation=2, bias=b), (1, 4)),
    "strided-over-the-border": (lambda b: nn.Conv1d(1, 2, 3, stride=3, padding=1, bias=b), (1, 3)),
    "transposed-strided": (lambda b: nn.ConvTranspose1d(1, 2, 3, stride=2, padding=1, bias=b), (1, 4)),
    "transposed-far-strided": (lambda b: nn.ConvTranspose1d(1, 2, 2, stride=3, bias=b), (1, 3)),
    "transposed-output-padding": (
        lambda b: nn.ConvTranspose1d(1, 2, 4, stride=2, padding=1, output_padding=1, bias=b), (1, 3)
    ),
    "transposed-dilated": (lambda b: nn.ConvTranspose1d(1, 2, 3, stride=2, dilation=2, padding=2, bias=b), (1, 4)),
    "transposed-grouped": (lambda b: nn.ConvTranspose1d(2, 4, 2, groups=2, bias=b), (2, 2)),
    "transposed-one-pixel": (lambda b: nn.ConvTranspose1d(2, 2, 3, stride=2, padding=1, bias=b), (2, 1)),
}  # fmt: skip


@pytest.mark.parametrize("zero", [-2, 0])
@pytest.mark.parametrize("bias", [None, 40, -40], ids=["no-bias", "positive-bias", "negative-bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_no_input_and_no_order_leaves_the_bound_and_the_witness_attains_it(name: str, bias: Any, zero: int) -> None:
    make, shape = LAYERS[name]
    model = make(bias is not None)
    result, weights = result_of(model, shape, zero, bias, seed=len(name))
    (proof,) = prove_accumulators(result)
    channels = len(proof.bounds.lowest)
    low, high = [0] * channels, [0] * channels
    ends = {}
    for codes in itertools.product(CODES, repeat=int(np.prod(shape))):
        centred = np.array(codes).reshape(shape) - zero
        for channel, places in enumerate(products_of(model, weights, centred)):
            for place, products in enumerate(places):
                b = bias or 0
                # The highest partial sum of any order takes what is positive first, the bias included.
                high[channel] = max(high[channel], sum(p for p in products if p > 0) + max(b, 0))
                low[channel] = min(low[channel], sum(p for p in products if p < 0) + min(b, 0))
                ends[codes, channel, place] = sum(products) + b
    lowest, highest = proof.bounds.lowest.tolist(), proof.bounds.highest.tolist()
    assert (lowest, highest) == (low, high)
    bits = max(max(b, -a - 1).bit_length() + 1 for a, b in zip(lowest, highest, strict=True))
    assert proof.bits_needed == bits
    found = proof.witness
    assert found is not None
    # The witness is an input, its value the one that brute force gives, and its peak the bound.
    codes = tuple(int(v) for v in found.operand.flatten())
    assert found.operand.shape == (1, *shape)
    place = found.position[0] if found.position else 0
    assert found.value == ends[codes, found.channel, place]
    assert found.peak in (lowest[found.channel], highest[found.channel])
    assert max(max(highest), -min(lowest) - 1) == max(found.peak, -found.peak - 1)
    replayed = IntegerModel(result).accumulators(proof.operator, found.operand)[0]
    assert int(replayed[(found.channel, *found.position)]) == found.value


def test_a_bias_of_the_other_sign_counts_in_the_peak_and_not_in_the_value() -> None:
    # 3 inputs of code 1 - (-2) = 3 by weight 2: 18 on the way, 8 in the end.
    model = nn.Linear(3, 1)
    fill(model.weight, torch.full((1, 3), 0.5))
    fill(model.bias, torch.tensor([-1.25]))
    grids = {
        "input": Grid(0.5, -2, -2, 1), "weight": Grid(0.25, 0, -4, 3),
        "bias": Grid(0.125, 0, -(2**31), 2**31 - 1), "result": Grid(1.0),
    }  # fmt: skip
    spec = reference.target(
        activation=TINY, weight=TINY.replace("2", "3"), accumulator='bits = 5, overflow = "saturate"'
    )
    (proof,) = prove_accumulators(quantized(model, spec, torch.zeros(2, 3), grids))
    assert proof.witness is not None
    assert (proof.witness.value, proof.witness.peak) == (8, 18)
    assert (proof.bits_needed, proof.headroom, proof.overflowing_channels) == (6, -1, 1)
    assert proof.witness.operand.tolist() == [[1, 1, 1]]


def test_the_channel_that_overflows_is_witnessed_where_another_reaches_as_far_below_zero() -> None:
    # Centred inputs are 0 to 3. Channel 0 reaches -9 + 0, channel 1 reaches 9: 9 = 01001 needs as many bits as -9.
    # With -8 (4 bits) beside 8 (5 bits), only channel 1 overflows 4 bits.
    model = nn.Linear(1, 2, bias=False)
    x = Grid(0.5, -2, -2, 0)  # centred 0, 1, 2
    fill(model.weight, torch.tensor([[-1.0], [1.0]]))  # codes -4 and 4
    spec = reference.target(
        activation=TINY, weight='bits = 4, signed = true, per = "tensor"', accumulator='bits = 4, overflow = "wrap"'
    )
    result = quantized(
        model, spec, torch.zeros(2, 1), {"input": x, "weight": Grid(0.25, 0, -8, 7), "result": Grid(1.0)}
    )
    (proof,) = prove_accumulators(result)
    assert (proof.bounds.lowest.tolist(), proof.bounds.highest.tolist()) == ([-8, 0], [0, 8])
    assert proof.overflowing_channels == 1
    assert proof.witness is not None
    assert (proof.witness.channel, proof.witness.value) == (1, 8)


class AddMm(nn.Module):
    """bias + x @ weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, input: Tensor) -> Tensor:
        return torch.addmm(self.bias, input, self.weight)


def test_a_constant_on_the_right_is_proven_too() -> None:
    torch.manual_seed(0)
    result = reference.calibrated(AddMm(), reference.target(weight=reference.S8), torch.randn(5, 4))
    (proof,) = prove_accumulators(result)
    assert proof.witness is not None
    replayed = IntegerModel(result).accumulators(proof.operator, proof.witness.operand)[0]
    assert int(replayed[proof.witness.channel]) == proof.witness.value


def test_a_twelve_bit_accumulator_overflows_and_wraps_with_its_witness() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 3)
    spec = reference.target(accumulator='bits = 12, overflow = "wrap"')
    result = reference.calibrated(model, spec, torch.randn(8, 16))
    (proof,) = prove_accumulators(result)
    assert proof.bits == 12
    assert proof.bits_needed > 12
    assert proof.overflowing_channels == 3
    assert proof.witness is not None
    replayed = IntegerModel(result).accumulators("gemm", proof.witness.operand)[0, proof.witness.channel]
    assert int(replayed) != proof.witness.value
    assert (int(replayed) - proof.witness.value) % 2**12 == 0
    assert -(2**11) <= int(replayed) < 2**11


@pytest.mark.parametrize(
    "overflow", ['overflow = "saturate"', 'overflow = "unknown"', ""], ids=["saturate", "unknown", "absent"]
)
def test_a_sum_that_overflows_in_a_way_that_is_not_defined_is_proven_and_not_executed(overflow: str) -> None:
    torch.manual_seed(0)
    spec = reference.target(accumulator=f"bits = 12, {overflow}".rstrip(", "))
    result = reference.calibrated(nn.Linear(16, 3), spec, torch.randn(8, 16))
    assert next(prove_accumulators(result)).headroom == 12 - next(prove_accumulators(result)).bits_needed
    with pytest.raises(IntegerError, match=r"accumulator may need \d+ bits, accumulators\.acc\.bits = 12"):
        IntegerModel(result)


# Accumulators that saturate, and pairs of products.

SATURATE = 'overflow = "saturate", products_per_step = 1, order = "channel_fastest", bias_added = "PLACE"'


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("bias", [40, -40])
@pytest.mark.parametrize("name", ["linear", "padded", "grouped", "only-padding-fits"])
def test_a_bias_moves_what_a_saturating_sum_reaches_by_its_place(name: str, bias: int, place: str) -> None:
    make, shape = LAYERS[name]
    text = f"bits = 9, {SATURATE.replace('PLACE', place)}"
    model = make(True)
    result, weights = result_of(model, shape, -2, bias, seed=len(name), accumulator=text)
    (proof,) = prove_accumulators(result)
    channels = len(proof.bounds.lowest)
    low, high = [10**6] * channels, [-(10**6)] * channels
    for codes in itertools.product(CODES, repeat=int(np.prod(shape))):
        centred = np.array(codes).reshape(shape) + 2
        for channel, places in enumerate(products_of(model, weights, centred)):
            for products in places:
                sums = [bias, *products] if place == "first" else [*products, bias]
                prefixes = list(itertools.accumulate(sums))
                high[channel] = max(high[channel], *prefixes)
                low[channel] = min(low[channel], *prefixes)
    assert proof.bounds.highest.tolist() == high
    assert proof.bounds.lowest.tolist() == low
    assert proof.witness is not None
    assert proof.witness.peak in (high[proof.witness.channel], low[proof.witness.channel])


def test_a_proof_needs_neither_the_requantization_nor_the_accumulator() -> None:
    torch.manual_seed(0)
    text = reference.text().replace(', accumulator = "acc", requantize = "r"', "")
    result = reference.calibrated(nn.Linear(16, 3), parse_target(text), torch.randn(8, 16))
    (proof,) = prove_accumulators(result)
    assert (proof.path, proof.bits, proof.headroom, proof.overflowing_channels) == (None, None, None, 0)
    assert proof.witness is not None


def test_layers_are_proven_in_the_order_in_which_they_run() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(64, 2)
    )
    result = reference.calibrated(model, reference.target(), torch.randn(4, 3, 6, 6))
    proofs = list(prove_accumulators(result))
    assert [proof.operator for proof in proofs] == ["0", "2", "4"]
    for proof in proofs:
        assert proof.witness is not None
        replayed = IntegerModel(result).accumulators(proof.operator, proof.witness.operand)[0]
        assert int(replayed[(proof.witness.channel, *proof.witness.position)]) == proof.witness.value


PAIR_TARGET = 'bits = 32, overflow = "wrap", pairwise = { bits = 4, overflow = "saturate", operands = "FORM" }'


@pytest.mark.slow
@pytest.mark.parametrize("order", ["channel_fastest", "kernel_fastest"])
@pytest.mark.parametrize("form", ["centred", "stored", "unsigned"])
@pytest.mark.parametrize("name", ["linear", "conv", "padded", "strided", "depthwise", "grouped"])
def test_what_pairs_of_products_reach_is_what_brute_force_finds_and_their_witness_shows(
    name: str, form: str, order: str
) -> None:
    make, shape = LAYERS[name]
    model, zero = make(True), -1
    text = f'{PAIR_TARGET.replace("FORM", form)}, order = "{order}"'
    result, weights = result_of(model, shape, zero, 5, seed=len(name), accumulator=text)
    (proof,) = prove_accumulators(result)
    weights = weights if form == "centred" else weights + 1
    lift = {"centred": -zero, "stored": 0, "unsigned": 2}[form]
    channels = len(proof.bounds.lowest)
    low, high = [10**6] * channels, [-(10**6)] * channels
    for codes in itertools.product(CODES, repeat=int(np.prod(shape))):
        seen = np.array(codes).reshape(shape)
        for channel, places in enumerate(pairs_of(model, weights, seen + lift, zero + lift, order)):
            high[channel] = max(high[channel], *places)
            low[channel] = min(low[channel], *places)
    assert proof.pairs is not None
    assert (proof.pairs.bounds.lowest.tolist(), proof.pairs.bounds.highest.tolist()) == (low, high)
    assert proof.pairs.overflowing.tolist() == [b > 7 or a < -8 for a, b in zip(low, high, strict=True)]
    assert proof.overflowing_channels == int(proof.pairs.overflowing.sum())
    found = proof.pairs.witness
    assert found is not None
    assert found.peak in (low[found.channel], high[found.channel])
    # Every pair of that channel pulls the same way, so that the sum itself comes out wrong.
    replayed = int(
        IntegerModel(result).accumulators(proof.operator, found.operand)[(0, found.channel, *found.position)]
    )
    assert replayed < found.value if found.peak > 7 else replayed > found.value if found.peak < -8 else True


def pairs_of(model: nn.Module, weights: Any, x: Any, border: int, order: str) -> list[list[int]]:
    """Sums of two neighbouring products, per output channel: of one sample as it is multiplied."""
    if isinstance(model, nn.Linear):
        rows = [(x.tolist(), row.tolist()) for row in weights]
        return [[sum(a * b for a, b in zip(xs[i : i + 2], ws[i : i + 2], strict=True)) for i in range(0, len(xs), 2)]
                for xs, ws in rows]  # fmt: skip
    assert isinstance(model, nn.Conv1d)
    (k,), (s,), (d,), p = model.kernel_size, model.stride, model.dilation, int(model.padding[0])
    padded = np.pad(x, [(0, 0), (p, p)], constant_values=border)
    per_in, per_out = weights.shape[1], len(weights) // model.groups
    found: list[list[int]] = []
    for out, row in enumerate(weights):
        start = out // per_out * per_in
        found.append([])
        for at in range(0, padded.shape[1] - d * (k - 1), s):
            met = padded[start : start + per_in, at : at + d * (k - 1) + 1 : d]
            xs, ws = (met.T.ravel(), row.T.ravel()) if order == "channel_fastest" else (met.ravel(), row.ravel())
            found[out] += [int(xs[i : i + 2] @ ws[i : i + 2]) for i in range(0, len(xs), 2)]
    return found


@pytest.mark.parametrize(
    ("left_out", "is_safe"), [('order = "channel_fastest"', True), ('operands = "unsigned"', True), ("", False)]
)
def test_pairs_that_the_target_leaves_open_are_bounded_for_all_and_not_witnessed(left_out: str, is_safe: bool) -> None:
    text = f'{PAIR_TARGET.replace("FORM", "unsigned")}, order = "channel_fastest"'
    make, shape = LAYERS["conv"]
    proofs = [
        next(prove_accumulators(result_of(make(True), shape, -1, 5, seed=4, accumulator=accumulator)[0]))
        for accumulator in (text, text.replace(f", {left_out}", "") if left_out else text)
    ]
    stated, open_ = (proof.pairs for proof in proofs)
    assert stated is not None and open_ is not None
    assert bool((open_.bounds.lowest <= stated.bounds.lowest).all())
    assert bool((open_.bounds.highest >= stated.bounds.highest).all())
    assert (open_.witness is None) == is_safe


def test_pairs_of_a_transposed_convolution_are_bounded_for_any_two() -> None:
    make, shape = LAYERS["transposed"]
    text = f'{PAIR_TARGET.replace("FORM", "centred")}, order = "channel_fastest"'
    result, weights = result_of(make(True), shape, -1, 5, seed=4, accumulator=text)
    (proof,) = prove_accumulators(result)
    assert proof.pairs is not None and proof.pairs.witness is None
    largest = [
        sorted((max(int(w) * -1, int(w) * 2) for w in weights[:, out].ravel()), reverse=True)[:2] for out in (0, 1)
    ]
    assert proof.pairs.bounds.highest.tolist() == [sum(two) for two in largest]
