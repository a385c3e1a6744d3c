# SPDX-License-Identifier: Apache-2.0
"""ATen to ONNX: LSTM, GRU and RNN, one ONNX operator per layer, in float."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qhw_plugins.onnx_context import Context, NotCovered, Translation, Value

__all__ = ["TABLE"]


@dataclass(frozen=True)
class _Cell:
    """How ONNX writes a cell: its operator, torch's gates in ONNX's order, its number of states, its attributes."""

    kind: str
    gates: tuple[int, ...]
    states: int = 1
    activation: str | None = None
    linear_before_reset: int | None = None


# torch: input, forget, cell, output; ONNX: input, output, forget, cell.
_LSTM = _Cell("LSTM", (0, 3, 1, 2), states=2)
# torch: reset, update, new; ONNX: update, reset, hidden. torch resets after the product with the hidden weights.
_GRU = _Cell("GRU", (1, 0, 2), linear_before_reset=1)


def _recurrent(cell: _Cell) -> Translation:
    """Input [seq, batch, in] (axes swapped if batch_first) and states [layers * directions, batch, hidden]."""

    def translate(c: Context, node: fx.Node) -> Value:
        x, start, parameters, has_biases, layers, dropout, train, both_ways, batch_first = node.args
        states: list[Any] = list(start) if isinstance(start, list | tuple) else [start]
        directions, per_direction = 2 if both_ways else 1, 4 if has_biases else 2
        tensors = _known(c, parameters)  # type: ignore[arg-type]
        if dropout and train:
            raise NotCovered("dropout between layers, in training")
        if len(tensors) != int(layers) * directions * per_direction:  # type: ignore[arg-type]
            raise NotCovered("a projection")
        value = c.tensor(x)
        value = c.op("Transpose", value, part="by_step", perm=[1, 0, 2]) if batch_first else value
        ends: list[list[str]] = [[] for _ in states]
        for layer in range(int(layers)):  # type: ignore[arg-type]
            first = layer * directions
            own = tensors[first * per_direction : (first + directions) * per_direction]
            begins = [_rows(c, c.tensor(state), first, directions, int(layers)) for state in states]  # type: ignore[arg-type]
            value, *last = _layer(c, cell, value, begins, own, per_direction, directions)
            for gathered, state in zip(ends, last, strict=True):
                gathered.append(state)
        value = c.op("Transpose", value, part="by_sample", perm=[1, 0, 2]) if batch_first else value
        return [value, *(c.op("Concat", *e, part="states", axis=0) if len(e) > 1 else e[0] for e in ends)]

    return translate


def _known(c: Context, parameters: Sequence[fx.Node]) -> list[Tensor]:
    if any(parameter not in c.known for parameter in parameters):
        raise NotCovered("computed weights")
    return [c.known[parameter].detach().cpu() for parameter in parameters]


def _rows(c: Context, state: str, first: int, count: int, layers: int) -> str:
    """A layer's part of the states."""
    if layers == 1:
        return state
    return c.op("Slice", state, *(c.builder.ints([i]) for i in (first, first + count, 0)), part="state")


def _layer(
    c: Context, cell: _Cell, x: str, begins: list[str], tensors: list[Tensor], per_direction: int, directions: int
) -> list[str]:
    """One layer: its output [seq, batch, directions * hidden], then its last states."""

    def stacked(index: int, part: str) -> str:
        each = [_reordered(tensors[index + d * per_direction], cell.gates) for d in range(directions)]
        return c.builder.initializer(torch.stack(each).numpy(), f"{c.name}/{part}")

    def biases() -> str:
        each = [
            torch.cat([_reordered(t, cell.gates) for t in tensors[d * per_direction + 2 : d * per_direction + 4]])
            for d in range(directions)
        ]
        return c.builder.initializer(torch.stack(each).numpy(), f"{c.name}/bias")

    inputs = [x, stacked(0, "weight"), stacked(1, "recurrence"), biases() if per_direction == 4 else "", "", *begins]
    output, *ends = c.builder.op_many(
        cell.kind,
        inputs,
        [f"{c.name}/{part}" for part in ("steps", "hidden", "cell")[: 1 + cell.states]],
        hidden_size=tensors[1].shape[1],
        direction="bidirectional" if directions == 2 else "forward",
        activations=[cell.activation] * directions if cell.activation else None,
        linear_before_reset=cell.linear_before_reset,
    )
    # ONNX gives [seq, directions, batch, hidden].
    if directions == 1:
        return [c.op("Squeeze", output, c.builder.ints([1]), part="output"), *ends]
    by_direction = c.op("Transpose", output, part="by_direction", perm=[0, 2, 1, 3])
    return [c.op("Reshape", by_direction, c.builder.ints([0, 0, -1]), part="output"), *ends]


def _reordered(tensor: Tensor, gates: tuple[int, ...]) -> Tensor:
    """Rows of a weight or bias, gate by gate."""
    parts = tensor.chunk(len(gates))
    return torch.cat([parts[gate] for gate in gates])


TABLE: Mapping[str, Translation] = {
    "aten.lstm.input": _recurrent(_LSTM),
    "aten.gru.input": _recurrent(_GRU),
    "aten.rnn_tanh.input": _recurrent(_Cell("RNN", (0,), activation="Tanh")),
    "aten.rnn_relu.input": _recurrent(_Cell("RNN", (0,), activation="Relu")),
}
