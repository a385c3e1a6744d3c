# SPDX-License-Identifier: Apache-2.0
"""What only moves codes keeps them; what puts tensors on one grid rescales those that are on another."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qhw.errors import IntegerError
from qhw.integer import IntegerModel
from tests import integer_support as reference
from tests.integer_support import RULES, Grid, Rule, quantized, result_of

SHOWN = [RULES[i] for i in (0, 2, 6, 9, 12, 15)]


class Function(nn.Module):
    """A function of what the accelerator made: pools of one code, the identity."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: Tensor) -> Any:
        pool = F.max_pool2d if input.dim() == 4 else F.max_pool1d
        return self.function(pool(input, 1))


MOVES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Any], Any]]] = {
    "permute": (lambda x: x.permute(0, 2, 3, 1), lambda q: q.transpose(0, 2, 3, 1)),
    "transpose": (lambda x: x.transpose(1, 2), lambda q: q.swapaxes(1, 2)),
    "slice": (lambda x: x[:, 1:3], lambda q: q[:, 1:3]),
    "stepped-slice": (lambda x: x[:, :, ::2, -3:], lambda q: q[:, :, ::2, -3:]),
    "narrow": (lambda x: x.narrow(2, 1, 3), lambda q: q[:, :, 1:4]),
    "select": (lambda x: x[:, 2], lambda q: q[:, 2]),
    "repeat": (lambda x: x.repeat(1, 1, 2, 1), lambda q: np.tile(q, (1, 1, 2, 1))),
    "expand": (lambda x: x[:, :1].expand(-1, 5, -1, -1), lambda q: np.repeat(q[:, :1], 5, 1)),
    "expand-to-the-batch": (lambda x: x[:, :1].expand(x.shape[0], 5, 6, 6), lambda q: np.repeat(q[:, :1], 5, 1)),
    "heads-that-share-a-key": (
        lambda x: x[:, :2, None].expand(x.shape[0], 2, 3, 6, 6).reshape(-1, 6, 6, 6),
        lambda q: np.repeat(q[:, :2], 3, 1),
    ),
    "pixel-shuffle": (
        lambda x: F.pixel_shuffle(x, 2),
        lambda q: q.reshape(-1, 1, 2, 2, 6, 6).transpose(0, 1, 4, 2, 5, 3).reshape(-1, 1, 12, 12),
    ),
    "channel-shuffle": (
        lambda x: torch.channel_shuffle(x, 2),
        lambda q: q.reshape(-1, 2, 2, 6, 6).swapaxes(1, 2).reshape(-1, 4, 6, 6),
    ),
    "flatten-then-transpose": (lambda x: x.flatten(2).transpose(1, 2), lambda q: q.reshape(-1, 4, 36).swapaxes(1, 2)),
    "half-of-a-chunk": (lambda x: x.chunk(2, 1)[1].transpose(2, 3), lambda q: q[:, 2:].swapaxes(2, 3)),
    "part-of-a-split": (lambda x: x.split([1, 3], 1)[1].transpose(2, 3), lambda q: q[:, 1:].swapaxes(2, 3)),
    "unbind": (lambda x: x.unbind(1)[3].transpose(1, 2), lambda q: q[:, 3].swapaxes(1, 2)),
    "squeezes": (
        lambda x: x[:, :1].squeeze(1).unsqueeze(-1).transpose(1, 3),
        lambda q: q[:, :1].swapaxes(2, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("outputs", ["quantized", "float"])
@pytest.mark.parametrize("name", MOVES)
def test_what_moves_values_moves_codes(name: str, outputs: str) -> None:
    function, moved = MOVES[name]
    x = Grid(np.float32(0.3), 17)
    x_q = x.codes(np.random.default_rng(1), 5, 4, 6, 6)
    spec = reference.target(outputs=outputs)
    model = Function(function)
    graph_example = x.reals(x_q)[:3]
    names = [p.group for p in reference.points(model, spec, graph_example)]
    result = quantized(model, spec, graph_example, dict.fromkeys(names, x))
    assert not [o.name for o in result.plan.operators if o.where == "host"]
    found = IntegerModel(result)(x.reals(x_q))
    np.testing.assert_array_equal(found.numpy(), x.reals(moved(x_q)).numpy())


def test_a_move_by_computed_sizes_is_named() -> None:
    x = Grid(np.float32(0.3), 17)
    model = Function(lambda v: v[:1].expand(v.shape[0], 4, 6, 6))  # from one sample to as many as there are
    spec, example = reference.target(), torch.zeros(3, 4, 6, 6)
    names = [p.group for p in reference.points(model, spec, example)]
    with pytest.raises(IntegerError, match="Expand with computed arguments cannot be executed exactly yet"):
        IntegerModel(quantized(model, spec, example, dict.fromkeys(names, x)))


@pytest.mark.parametrize(
    ("value", "code"),
    [(0.0, 17), (1.0, 20), (-2.0, 10), (1e30, 127), (-1e30, -128), (0.45, 18)],
    ids=["zero", "one", "minus-two", "far-above", "far-below", "tie"],
)
def test_padding_is_the_code_of_its_value(value: float, code: int) -> None:
    # 1.0 / 0.3 = 3.33, -2.0 / 0.3 = -6.67, 0.45 / 0.3 = 1.4999999 in float32
    x = Grid(np.float32(0.3), 17)
    x_q = x.codes(np.random.default_rng(1), 3, 2, 4)
    function = Function(lambda v: F.pad(v, (2, 1), value=value))
    result = quantized(function, reference.target(), x.reals(x_q)[:2], {"input": x})
    expected = np.pad(x_q, [(0, 0), (0, 0), (2, 1)], constant_values=code)
    np.testing.assert_array_equal(IntegerModel(result)(x.reals(x_q)).numpy(), x.reals(expected).numpy())


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_by_neighbours_moves_codes(mode: str) -> None:
    x = Grid(np.float32(0.3), 17)
    x_q = x.codes(np.random.default_rng(1), 3, 2, 5)
    function = Function(lambda v: F.pad(v, (2, 1), mode))
    result = quantized(function, reference.target(), x.reals(x_q)[:2], {"input": x})
    names = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    expected = np.pad(x_q, [(0, 0), (0, 0), (2, 1)], mode=names[mode])  # type: ignore[call-overload]
    np.testing.assert_array_equal(IntegerModel(result)(x.reals(x_q)).numpy(), x.reals(expected).numpy())


class Joined(nn.Module):
    """Two inputs side by side."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.join = join

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.join(a, b)


JOINS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Any, Any], Any]]] = {
    "channels": (lambda a, b: torch.cat([a, b], 1), lambda a, b: np.concatenate([a, b], 1)),
    "last": (lambda a, b: torch.cat([b, a, b], -1), lambda a, b: np.concatenate([b, a, b], -1)),
    "stack": (lambda a, b: torch.stack([a, b], 1), lambda a, b: np.stack([a, b], 1)),
    "stack-last": (lambda a, b: torch.stack([a, b], -1), lambda a, b: np.stack([a, b], -1)),
}


@pytest.mark.parametrize("rule", SHOWN, ids=lambda r: f"{r.kind}-{r.rounding}-{r.bits}")
@pytest.mark.parametrize("name", JOINS)
def test_an_untied_concatenation_rescales_each_operand(name: str, rule: Rule) -> None:
    function, joined = JOINS[name]
    a, b, out = Grid(0.25, 3), Grid(0.125, -60), Grid(0.5, 9)
    if rule.kind != "shift":
        a, b = Grid(np.float32(0.3), 3), Grid(np.float32(0.0125), -60)
    a_q, b_q = (g.codes(np.random.default_rng(5), 3, 4, 5) for g in (a, b))
    moved = [out.clamped(rule.codes(g.centred(q), [g.scale], out)).astype(np.int64) for g, q in ((a, a_q), (b, b_q))]
    example = a.reals(a_q), b.reals(b_q)
    result = quantized(Joined(function), reference.target(rule.text), example, {"a": a, "b": b, "result": out})
    np.testing.assert_array_equal(result_of(IntegerModel(result).codes(*example)), joined(*moved))


@pytest.mark.parametrize("name", JOINS)
def test_a_tied_concatenation_keeps_codes(name: str) -> None:
    function, joined = JOINS[name]
    g = Grid(np.float32(0.3), 3)
    a_q, b_q = (g.codes(np.random.default_rng(seed), 3, 4, 5) for seed in (5, 6))
    example = g.reals(a_q), g.reals(b_q)
    spec = reference.target(concat="all")
    names = {p.group for p in reference.points(Joined(function), spec, example)}
    assert len(names) == 1
    result = quantized(Joined(function), spec, example, dict.fromkeys(names, g))
    np.testing.assert_array_equal(result_of(IntegerModel(result).codes(*example)), joined(a_q, b_q))


def test_a_relu_that_is_fused_behind_a_concatenation_clamps() -> None:
    g, out = Grid(0.5, 3), Grid(0.5, 9)
    a_q, b_q = (g.codes(np.random.default_rng(seed), 3, 4) for seed in (5, 6))
    expected = np.clip(np.concatenate([a_q, b_q], 1) + 6, 9, 127)
    example = g.reals(a_q), g.reals(b_q)
    model = Joined(lambda a, b: torch.relu(torch.cat([a, b], 1)))
    result = quantized(model, reference.target(), example, {"a": g, "b": g, "result": out})
    assert [o.fused_into for o in result.plan.operators if o.kind == "Relu"] == ["concat"]
    np.testing.assert_array_equal(result_of(IntegerModel(result).codes(*example)), expected)


def test_a_class_token_is_quantized_once_and_spread_over_the_batch() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.tensor([[[0.5, -1.0, 40.0]]]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)

    grid = Grid(0.25, 3)
    codes = grid.codes(np.random.default_rng(0), 5, 2, 3)
    spec = reference.target(concat="all")
    result = quantized(Token(), spec, grid.reals(codes)[:2], {"concat": grid, "x": grid, "expand": grid})
    found = IntegerModel(result).codes(grid.reals(codes))["concat"].numpy()
    token = np.tile([5, -1, 127], (5, 1, 1))  # round(x / 0.25) + 3, at most 127
    np.testing.assert_array_equal(found, np.concatenate([token, codes], 1))
