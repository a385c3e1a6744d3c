# SPDX-License-Identifier: Apache-2.0
"""Sums that saturate on the way and pairs of products in narrow registers, against loops over Python integers."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qhw
from qhw.errors import IntegerError
from qhw.integer import IntegerModel
from tests import integer_support as reference
from tests.integer_support import Grid, fill, quantized

pytestmark = pytest.mark.slow

PHASES = (Phase.explicit, Phase.generate)
ORDERS = ("channel_fastest", "kernel_fastest")
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def accumulator(bits: int, step: Any = None, order: str = "", bias: str = "", pairs: str = "") -> str:
    """The text of an accumulator that saturates."""
    fields = [f'bits = {bits}, overflow = "{"saturate" if step is not None else "wrap"}"']
    if step is not None:
        fields.append(f"products_per_step = {step if isinstance(step, int) else chr(34) + step + chr(34)}")
    fields += [f'order = "{order}"'] if order else []
    fields += [f'bias_added = "{bias}"'] if bias else []
    fields += [f"pairwise = {{ {pairs} }}"] if pairs else []
    return ", ".join(fields)


def stopped(value: int, bits: int, overflow: str = "saturate") -> int:
    half = 2 ** (bits - 1)
    return max(-half, min(half - 1, value)) if overflow == "saturate" else (value + half) % (2 * half) - half


def summed(
    xs: list[int], ws: list[int], bias: int | None, *, bits: int, step: int | None, first: bool, pair: Any = None
) -> int:
    """One accumulator, product by product; `pair` is bits and overflow of a register of two products."""
    total = stopped(bias, bits) if bias is not None and first else 0
    products = [x * w for x, w in zip(xs, ws, strict=True)]
    width = len(products) if step is None else step
    for at in range(0, len(products), width):
        part = products[at : at + width]
        if pair is not None:
            part = [stopped(sum(part[i : i + 2]), *pair) for i in range(0, len(part), 2)]
        total = stopped(total + sum(part), bits)
    return total if bias is None or first else stopped(total + bias, bits)


def outputs(x: Any, w: Any, facts: Any, order: str, fill_with: int = 0) -> Iterator[tuple[tuple[int, ...], Any, Any]]:
    """Index of each output, and the inputs and weights that it meets, in order: x [n, in, *size]."""
    stride, edges, dilation, groups = facts
    x = np.pad(x, [(0, 0), (0, 0), *edges], constant_values=fill_with)
    kernel = w.shape[2:]
    size = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    per_in, per_out = w.shape[1], w.shape[0] // groups
    for index in itertools.product(range(len(x)), range(len(w)), *map(range, size)):
        n, out, *place = index
        start = out // per_out * per_in
        window = tuple(
            slice(p * s, p * s + d * (k - 1) + 1, d) for p, s, d, k in zip(place, stride, dilation, kernel, strict=True)
        )
        met = x[(n, slice(start, start + per_in), *window)]
        if order == "channel_fastest":
            yield index, np.moveaxis(met, 0, -1).ravel().tolist(), np.moveaxis(w[out], 0, -1).ravel().tolist()
        else:
            yield index, met.ravel().tolist(), w[out].ravel().tolist()


def convolution(data: Any) -> tuple[nn.Module, tuple[int, ...], Any]:
    """A random convolution, the shape of its input, and what `outputs` needs."""
    draw = data.draw
    dims = draw(st.integers(1, 3))
    groups, per_in, per_out = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    if draw(st.booleans()):
        groups, per_in = draw(st.integers(2, 3)), 1  # depthwise
    kernel, stride, dilation = ([draw(st.integers(1, 2 if dims == 3 else 3)) for _ in range(dims)] for _ in range(3))
    padding = [draw(st.integers(0, 1)) for _ in range(dims)]
    size = [d * (k - 1) + 1 + draw(st.integers(0, 2)) for k, d in zip(kernel, dilation, strict=True)]
    model = CONVOLUTIONS[dims](
        groups * per_in, groups * per_out, kernel, stride, padding, dilation, groups, draw(st.booleans())
    )
    shape = draw(st.integers(1, 2)), groups * per_in, *size
    return model, shape, (stride, [(p, p) for p in padding], dilation, groups)


def lowered(model: nn.Module, spec: Any, x: Grid, w: Grid, w_q: Any, b_q: Any, shape: tuple[int, ...]) -> IntegerModel:
    fill(model.get_parameter("weight"), w.reals(w_q))
    grids = {"input": x, "weight": w, "result": Grid(2.0)}
    if b_q is not None:
        grids["bias"] = Grid(np.float32(x.scale) * np.float32(w.scale), 0, -(2**31), 2**31 - 1)
        fill(model.get_parameter("bias"), grids["bias"].reals(b_q))
    return IntegerModel(quantized(model, spec, torch.zeros(2, *shape[1:]), grids))


def found_sums(model: IntegerModel, x_q: Any) -> Any:
    (name,) = model.sites
    return model.accumulators(name, torch.from_numpy(x_q)).numpy()


@settings(max_examples=60, phases=PHASES, deadline=None)
@given(st.data())
def test_a_convolution_saturates_where_a_loop_over_its_products_does(data: Any) -> None:
    draw = data.draw
    model, shape, facts = convolution(data)
    order, place = draw(st.sampled_from(ORDERS)), draw(st.sampled_from(["first", "last"]))
    step, bits = draw(st.sampled_from([1, 2, 3, 4, "all"])), draw(st.integers(10, 16))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x, w = Grid(0.5, int(rng.integers(-128, 128))), Grid(0.25, int(rng.integers(-20, 21)))
    x_q, w_q = x.codes(rng, *shape), w.codes(rng, *model.get_parameter("weight").shape)
    b_q = None if model.bias is None else rng.integers(-(2**bits), 2**bits, len(w_q))
    spec = reference.target(weight=reference.S8, accumulator=accumulator(bits, step, order, place))
    found = found_sums(lowered(model, spec, x, w, w_q, b_q, shape), x_q)
    kinds = {"bits": bits, "step": None if step == "all" else step, "first": place == "first"}
    for index, xs, ws in outputs(x.centred(x_q), w.centred(w_q), facts, order):
        assert found[index] == summed(xs, ws, None if b_q is None else int(b_q[index[1]]), **kinds)


FORMS = ("centred", "stored", "unsigned")


def multiplied(x: Grid, form: str) -> int:
    """What is added to a centred input before it is multiplied."""
    if form == "centred":
        return 0
    return x.zero_point + (128 if form == "unsigned" and x.low < 0 else 0)


@settings(max_examples=60, phases=PHASES, deadline=None)
@given(st.data())
def test_pairs_of_products_leave_their_register_where_a_loop_says_so(data: Any) -> None:
    draw = data.draw
    model, shape, facts = convolution(data)
    order, form = draw(st.sampled_from(ORDERS)), draw(st.sampled_from(FORMS))
    overflow, bits = draw(st.sampled_from(["saturate", "wrap"])), draw(st.integers(12, 16))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = draw(st.sampled_from([(-128, 127), (0, 255), (-127, 127)]))
    x, w = Grid(0.5, int(rng.integers(low, high + 1)), low, high), Grid(0.25, int(rng.integers(-5, 6)))
    x_q, w_q = x.codes(rng, *shape), w.codes(rng, *model.get_parameter("weight").shape)
    b_q = None if model.bias is None else rng.integers(-3000, 3000, len(w_q))
    activation = reference.S8 if low == -128 else reference.U8
    if low == -127:
        activation = 'codes = [-127, 127], per = "tensor"'
    pairs = f'bits = {bits}, overflow = "{overflow}", operands = "{form}"'
    spec = reference.target(
        activation=activation, weight=reference.S8, accumulator=accumulator(32, order=order, pairs=pairs)
    )
    found = found_sums(lowered(model, spec, x, w, w_q, b_q, shape), x_q)
    offset = multiplied(x, form)
    w_seen = w.centred(w_q) if form == "centred" else w_q
    # What zero points add is known exactly: the sum of centred products minus that of what is multiplied.
    centred = {i: sum(map(int.__mul__, a, b)) for i, a, b in outputs(x.centred(x_q), w.centred(w_q), facts, order)}
    for index, xs, ws in outputs(x.centred(x_q) + offset, w_seen, facts, order, fill_with=offset):
        exact = sum(map(int.__mul__, xs, ws))
        kept = summed(xs, ws, None, bits=64, step=None, first=False, pair=(bits, overflow))
        bias = 0 if b_q is None else int(b_q[index[1]])
        assert found[index] == kept + centred[index] - exact + bias


@settings(max_examples=30, phases=PHASES, deadline=None)
@given(st.data())
def test_linear_operators_and_products_of_activations_sum_in_ascending_order(data: Any) -> None:
    draw = data.draw
    inner, bits = draw(st.integers(1, 9)), draw(st.integers(9, 15))
    step, has_pairs = draw(st.sampled_from([2, 4, "all"])), draw(st.booleans())
    place, overflow = draw(st.sampled_from(["first", "last"])), draw(st.sampled_from(["saturate", "wrap"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pair = (draw(st.integers(10, 15)), overflow) if has_pairs else None
    text = f'bits = {pair[0]}, overflow = "{overflow}", operands = "centred"' if pair else ""
    spec = reference.target(weight=reference.S8, accumulator=accumulator(bits, step, "channel_fastest", place, text))
    kinds: Any = {"bits": bits, "step": None if step == "all" else step, "first": place == "first", "pair": pair}
    x, y = Grid(0.5, int(rng.integers(-128, 128))), Grid(0.25, int(rng.integers(-128, 128)))
    x_q, y_q = x.codes(rng, 3, 2, inner), y.codes(rng, 3, inner, 4)
    if draw(st.booleans()):
        graph = quantized(
            reference.FunctionOf(torch.matmul), spec, (x.reals(x_q), y.reals(y_q)),
            {"inputs_0": x, "inputs_1": y, "result": Grid(2.0)},
        )  # fmt: skip
        model = IntegerModel(graph)
        (name,) = model.sites
        found = model.accumulators(name, torch.from_numpy(x_q), torch.from_numpy(y_q))
        for n, i, j in np.ndindex(3, 2, 4):
            xs, ys = x.centred(x_q)[n, i].tolist(), y.centred(y_q)[n, :, j].tolist()
            assert int(found[n, i, j]) == summed(xs, ys, None, **kinds)
        return
    w_q, b_q = y.codes(rng, 4, inner), rng.integers(-500, 500, 4)
    w = Grid(0.25, 0)
    found = found_sums(lowered(nn.Linear(inner, 4), spec, x, w, w_q, b_q, x_q.shape), x_q)
    for n, i, j in np.ndindex(3, 2, 4):
        assert found[n, i, j] == summed(x.centred(x_q)[n, i].tolist(), w_q[j].tolist(), int(b_q[j]), **kinds)


# Mutants: every field that decides is obeyed.

BASE = {"bits": 14, "step": 1, "order": "channel_fastest", "bias": "first"}


def codes_with(pairs: str = "", **changed: Any) -> Any:
    rng = np.random.default_rng(3)
    model = nn.Conv2d(4, 3, 3, padding=1)
    x, w = Grid(0.5, -100), Grid(0.25)
    x_q, w_q, b_q = x.codes(rng, 2, 4, 6, 6), w.codes(rng, 3, 4, 3, 3), rng.integers(-5000, 5000, 3)
    spec = reference.target(weight=reference.S8, accumulator=accumulator(**(BASE | changed), pairs=pairs))
    return found_sums(lowered(model, spec, x, w, w_q, b_q, x_q.shape), x_q)


@pytest.mark.parametrize(
    "changed",
    [{"order": "kernel_fastest"}, {"step": 2}, {"step": "all"}, {"bias": "last"}, {"bits": 15}, {"bits": 24}],
    ids=str,
)
def test_another_order_step_place_or_width_gives_other_sums(changed: dict[str, Any]) -> None:
    assert (codes_with() != codes_with(**changed)).any()


PAIRS = 'bits = 16, overflow = "saturate", operands = "unsigned"'
WIDE = {"bits": 32, "step": None, "bias": ""}


@pytest.mark.parametrize(
    "changed",
    [
        {"order": "kernel_fastest"},
        {"pairs": PAIRS.replace("saturate", "wrap")},
        {"pairs": PAIRS.replace("unsigned", "stored")},
        {"pairs": PAIRS.replace("unsigned", "centred")},
        {"pairs": PAIRS.replace("16", "15")},
        {"pairs": ""},
    ],
    ids=str,
)
def test_another_pair_register_gives_other_sums(changed: dict[str, Any]) -> None:
    assert (codes_with(**(WIDE | {"pairs": PAIRS})) != codes_with(**(WIDE | {"pairs": PAIRS} | changed))).any()


def test_two_largest_products_of_x86_bytes_are_stored_as_32767() -> None:
    # oneDNN's example: 255 * 127 + 255 * 127 = 64770 in 16 bits.
    spec = reference.target(
        activation=reference.U8, weight=reference.S8, accumulator=accumulator(32, order="channel_fastest", pairs=PAIRS)
    )
    x, w = Grid(0.5, 0, 0, 255), Grid(0.25)
    model = lowered(nn.Linear(2, 1, bias=False), spec, x, w, np.array([[127, 127]]), None, (1, 2))
    assert found_sums(model, np.array([[255, 255], [255, 1], [128, 130]])).tolist() == [[32767], [32512], [32766]]


def test_what_is_summed_beside_the_pairs_may_wrap() -> None:
    spec = reference.target(
        activation=reference.U8, weight=reference.S8, accumulator=accumulator(17, order="channel_fastest", pairs=PAIRS)
    )
    x, w = Grid(0.5, 0, 0, 255), Grid(0.25)
    model = lowered(nn.Linear(6, 1, bias=False), spec, x, w, np.full((1, 6), 127), None, (1, 6))
    assert found_sums(model, np.full((1, 6), 255)).tolist() == [[3 * 32767 - 2**17]]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_patches_by_pieces_give_the_sums_of_patches_at_once(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from qhw.integer import reduction

    rng = np.random.default_rng(dims)
    model = CONVOLUTIONS[dims](3, 2, 2, padding=1)
    x, w = Grid(0.5, 7), Grid(0.25)
    shape = (2, 3, *[4] * dims)
    x_q, w_q, b_q = x.codes(rng, *shape), w.codes(rng, *model.weight.shape), rng.integers(-50, 50, 2)
    spec = reference.target(weight=reference.S8, accumulator=accumulator(12, 1, "kernel_fastest", "last"))
    lower = lowered(model, spec, x, w, w_q, b_q, shape)
    whole = found_sums(lower, x_q)
    monkeypatch.setattr(reduction, "_PIECE", 100)
    np.testing.assert_array_equal(found_sums(lower, x_q), whole)


# What cannot be executed.


def refused(model: nn.Module, example: Any, accumulator_text: str, match: str, **more: Any) -> None:
    spec = reference.target(accumulator=accumulator_text, **more)
    with pytest.raises(IntegerError, match=match):
        IntegerModel(reference.calibrated(model, spec, example))


def test_a_transposed_convolution_whose_order_decides_is_refused() -> None:
    refused(
        nn.ConvTranspose1d(2, 2, 2), torch.randn(2, 2, 5), accumulator(10, 1, "channel_fastest", "first"),
        "a ConvTranspose whose sums depend on their order cannot be executed exactly yet",
    )  # fmt: skip


def test_a_product_with_a_vector_whose_order_decides_is_refused() -> None:
    class Dot(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.matmul(a, b[0])

    spec = reference.target(accumulator=accumulator(10, 1, "channel_fastest"))
    with pytest.raises(IntegerError, match="a product with a vector whose sums depend on their order cannot"):
        IntegerModel(reference.calibrated(Dot(), spec, (torch.randn(2, 3, 4), torch.randn(2, 4))))


def test_an_odd_step_of_pairs_is_refused() -> None:
    pairs = 'bits = 12, overflow = "saturate", operands = "centred"'
    refused(
        nn.Linear(9, 2), torch.randn(4, 9), accumulator(12, 3, "channel_fastest", "first", pairs),
        r"accumulators\.acc\.products_per_step must be even with pairwise sums; got 3",
    )  # fmt: skip


def test_codes_that_are_not_centred_in_an_accumulator_that_saturates_are_refused() -> None:
    pairs = 'bits = 12, overflow = "saturate", operands = "stored"'
    refused(
        nn.Linear(9, 2), torch.rand(4, 9), accumulator(12, 2, "channel_fastest", "first", pairs),
        r'accumulators\.acc\.pairwise\.operands = "stored" with a zero point cannot be executed exactly where the acc',
    )  # fmt: skip
    pairs = pairs.replace("stored", "unsigned")
    refused(
        nn.Linear(2, 1, bias=False), torch.rand(4, 2), accumulator(17, 2, "channel_fastest", "first", pairs),
        r'operands = "unsigned": sums of such codes may need \d+ bits, accumulators\.acc\.bits = 17, and only',
        weight='codes = [-127, 127], zero_point = 0, per = "tensor"',
    )  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {"accumulator": accumulator(12, 1, "channel_fastest", "last")},
        {"accumulator": accumulator(32, order="channel_fastest", pairs=PAIRS.replace("16", "12"))},
        {"requantize": reference.fixed_point("floor"), "bias": 'bits = 32, scale = "input*weight", applied = "AFTER"'},
    ],
    ids=["saturating", "pairs", "bias"],
)
def test_golden_vectors_of_sums_that_are_no_plain_ones_are_refused(changed: dict[str, str], tmp_path: Any) -> None:
    torch.manual_seed(0)
    changed = {name: text.replace("AFTER", "after_multiplier") for name, text in changed.items()}
    x = torch.randn(4, 9)
    result = reference.calibrated(nn.Linear(9, 2), reference.target(**changed), x)
    assert IntegerModel(result).codes(x)
    with pytest.raises(IntegerError, match="gemm: its golden vectors cannot be written yet: its sums depend on their"):
        qhw.golden(result, tmp_path / "vectors", data=[x])
