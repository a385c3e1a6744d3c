# SPDX-License-Identifier: Apache-2.0
"""Operator kinds that move codes or look at them otherwise, as LiteRT operators."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema

from tests.litert_place import Place, as_image, as_plain, sliced
from tests.litert_writer import Value


def _reshape(place: Place) -> Value:
    shape = (-1, *place.shape[1:])
    return as_plain(place, place.writer.reshape(place.plain(), shape, place.encoding))


def _split(place: Place) -> Value:
    """A part of a split: the runtime cuts all, and the others are left."""
    split = place.graph.node(place.graph.node(place.operator.name).all_input_nodes[0].meta["name"])
    call: Any = split.target
    parts = call(torch.empty(place.sizes, device="meta"), *split.args[1:])
    axis = next(i for i, (m, n) in enumerate(zip(place.sizes, parts[0].shape, strict=True)) if m != n)
    options = schema.SplitVOptionsT()
    options.numSplits = len(parts)
    cuts = place.writer.numbers(*(part.shape[axis] for part in parts))
    operands = [place.plain(), cuts, place.writer.constant(np.asarray(axis, np.int32))]
    found = place.writer.add_many("SPLIT_V", options, operands, [place.encoding] * len(parts))
    return as_plain(place, found[int(place.arguments()[0])])


def _identity(place: Place) -> Value:
    source = place.graph.node(place.operator.name).all_input_nodes[0]
    if isinstance(place.graph.node(place.operator.name).args[-1], int) and source.meta.get("name") in _splits(place):
        return _split(place)
    return place.writer.values[place.names[0]]


def _splits(place: Place) -> set[str]:
    return {operator.name for operator in place.graph.operators if operator.kind == "Split"}


def _transpose(place: Place) -> Value:
    lengths = (2, 3, 5, 7, 11, 13)[: len(place.sizes)]
    moved = place.integers.function()(torch.empty(lengths)).shape
    axes = [lengths.index(length) for length in moved]
    return as_plain(place, place.writer.transpose(place.plain(), axes, place.encoding))


def _slice(place: Place) -> Value:
    axis = int(place.arguments()[0]) % len(place.sizes)
    lengths = [n if i == axis else 1 for i, n in enumerate(place.sizes)]
    kept = place.integers.function()(torch.arange(place.sizes[axis]).reshape(lengths)).flatten().tolist()
    ranges = [(kept[0], kept[-1] + 1) if i == axis else (0, n) for i, n in enumerate(place.sizes)]
    step = kept[1] - kept[0] if len(kept) > 1 else 1
    steps = [step if i == axis else 1 for i in range(len(ranges))]
    return as_plain(place, sliced(place.writer, place.plain(), ranges, place.encoding, steps))


def _gather(place: Place) -> Value:
    axis, index = place.arguments()
    options = schema.GatherOptionsT()
    options.axis = axis
    operands = [place.plain(), place.writer.constant(np.asarray(index, np.int32))]
    return as_plain(place, place.writer.add("GATHER", options, operands, place.encoding))


def _pad(place: Place) -> Value:
    facts, rank = place.facts, len(place.sizes)
    flat = [*facts["padding"], *[0] * (2 * rank)][: 2 * rank]  # of the last axis, the one before, ...
    rows = [(flat[2 * i], flat[2 * i + 1]) for i in reversed(range(rank))]
    if facts["mode"] == "constant":
        return as_plain(place, place.writer.pad(place.plain(), rows, place.encoding))
    assert facts["mode"] == "reflect"
    options = schema.MirrorPadOptionsT()
    options.mode = schema.MirrorPadMode.REFLECT
    table = place.writer.constant(np.asarray(rows, np.int32))
    return as_plain(place, place.writer.add("MIRROR_PAD", options, [place.plain(), table], place.encoding))


def _expand(place: Place) -> Value:
    operands = [place.plain(), place.writer.numbers(*place.shape)]
    return as_plain(place, place.writer.add("BROADCAST_TO", schema.BroadcastToOptionsT(), operands, place.encoding))


def _tile(place: Place) -> Value:
    operands = [place.plain(), place.writer.numbers(*place.arguments()[0])]
    return as_plain(place, place.writer.add("TILE", schema.TileOptionsT(), operands, place.encoding))


def _blocks(name: str, options: Callable[[], Any]) -> Callable[[Place], Value]:
    """Pixels to channels or back; torch counts the channel first, LiteRT the place in the block."""

    def form(place: Place) -> Value:
        writer, block = place.writer, int(place.arguments()[0])
        chosen, is_to_space = options(), name == "DEPTH_TO_SPACE"
        chosen.blockSize = block
        channels = place.sizes[1] if is_to_space else place.shape[1]
        order = np.arange(channels).reshape(-1, block * block)
        rows = (order.T if is_to_space else np.arange(channels).reshape(block * block, -1).T).reshape(-1)
        swap = schema.GatherOptionsT()
        swap.axis = 3
        x = place.image()
        if is_to_space:
            x = writer.add("GATHER", swap, [x, writer.numbers(*rows)], place.encoding)
        y = writer.add(name, chosen, [x], place.encoding)
        if not is_to_space:
            y = writer.add("GATHER", swap, [y, writer.numbers(*rows)], place.encoding)
        return as_image(place, y)

    return form


MOVES: Mapping[str, Callable[[Place], Value]] = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Identity": _identity,
    "Transpose": _transpose,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad,
    "Expand": _expand,
    "Tile": _tile,
    "DepthToSpace": _blocks("DEPTH_TO_SPACE", schema.DepthToSpaceOptionsT),
    "SpaceToDepth": _blocks("SPACE_TO_DEPTH", schema.SpaceToDepthOptionsT),
}
