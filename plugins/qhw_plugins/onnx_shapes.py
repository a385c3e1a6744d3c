# SPDX-License-Identifier: Apache-2.0
"""ATen to ONNX: views, data movement, indexing, and arithmetic on sizes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import helper
from torch import fx

from qhw_plugins.onnx_context import DTYPES, Context, NotCovered, Translation, Value, argument, shape_of

__all__ = ["SIZES", "TABLE"]

_LAST = np.iinfo(np.int64).max


def _same(c: Context, node: fx.Node) -> Value | None:
    """The input itself."""
    source = node.args[0]
    waiting = c.pending(source) if isinstance(source, fx.Node) else None
    if waiting is None:
        return c.tensor(source)
    c.set_pending(node, *waiting)
    return None


def _view(c: Context, node: fx.Node) -> Value:
    return c.op("Reshape", c.tensor(node.args[0]), c.shape(node.args[1]))  # type: ignore[arg-type]


def _reshape_to_result(c: Context, node: fx.Node) -> Value:
    """Views whose result has a shape that is known but for the batch."""
    return c.op("Reshape", c.tensor(node.args[0]), c.builder.ints(c.fixed_shape(node)))


def _flatten(c: Context, node: fx.Node) -> Value:
    rank = len(shape_of(node.args[0]))
    start, end = int(argument(node, 1, "start_dim", 0)), int(argument(node, 2, "end_dim", -1))
    if rank > 1 and start % rank == 1 and end % rank == rank - 1:
        return c.op("Flatten", c.tensor(node.args[0]), axis=1)
    return _reshape_to_result(c, node)


def _squeeze(c: Context, node: fx.Node) -> Value:
    source = shape_of(node.args[0])
    dims = argument(node, 1, "dim", None)
    dims = range(len(source)) if dims is None else [dims] if isinstance(dims, int) else dims
    axes = sorted(dim % len(source) for dim in dims if source[dim] == 1)
    return c.op("Squeeze", c.tensor(node.args[0]), c.builder.ints(axes)) if axes else c.tensor(node.args[0])


def _unsqueeze(c: Context, node: fx.Node) -> Value:
    return c.op("Unsqueeze", c.tensor(node.args[0]), c.builder.ints([node.args[1]]))  # type: ignore[list-item]


def _permute(c: Context, node: fx.Node) -> Value:
    rank = len(shape_of(node.args[0]))
    return c.op("Transpose", c.tensor(node.args[0]), perm=[int(dim) % rank for dim in node.args[1]])  # type: ignore[union-attr,arg-type]


def _transpose(c: Context, node: fx.Node) -> Value:
    rank = len(shape_of(node.args[0]))
    perm = list(range(rank))
    first, second = (int(argument(node, i, name, i - 1)) % max(rank, 1) for i, name in ((1, "dim0"), (2, "dim1")))
    if rank > 1:
        perm[first], perm[second] = perm[second], perm[first]
    return c.op("Transpose", c.tensor(node.args[0]), perm=perm)


def _move_axis(c: Context, node: fx.Node) -> Value:
    rank = len(shape_of(node.args[0]))
    source, destination = (int(item) % rank for item in node.args[1:3])  # type: ignore[arg-type]
    perm = [axis for axis in range(rank) if axis != source]
    perm.insert(destination, source)
    return c.op("Transpose", c.tensor(node.args[0]), perm=perm)


def _reversed(c: Context, node: fx.Node) -> Value:
    return c.op("Transpose", c.tensor(node.args[0]), perm=list(reversed(range(len(shape_of(node.args[0]))))))


def _cat(c: Context, node: fx.Node) -> Value:
    items = [item for item in node.args[0] if shape_of(item) != (0,)]  # type: ignore[union-attr]
    parts = [c.tensor(item, node.meta["dtype"]) for item in items]
    return c.op("Concat", *parts, axis=int(argument(node, 1, "dim", 0)))


def _stack(c: Context, node: fx.Node) -> Value:
    axis = int(argument(node, 1, "dim", 0)) % len(shape_of(node))
    where = c.builder.ints([axis])
    parts = [c.op("Unsqueeze", c.tensor(item), where, part="item") for item in node.args[0]]  # type: ignore[union-attr]
    return c.op("Concat", *parts, axis=axis)


def _select(c: Context, node: fx.Node) -> Value:
    index = c.tensor(node.args[2], "int64")
    return c.op("Gather", c.tensor(node.args[0]), index, axis=int(node.args[1]))  # type: ignore[arg-type]


def _index_select(c: Context, node: fx.Node) -> Value:
    return c.op("Gather", c.tensor(node.args[0]), c.tensor(node.args[2]), axis=int(node.args[1]))  # type: ignore[arg-type]


def _gather(c: Context, node: fx.Node) -> Value:
    return c.op("GatherElements", c.tensor(node.args[0]), c.tensor(node.args[2]), axis=int(node.args[1]))  # type: ignore[arg-type]


def _embedding(c: Context, node: fx.Node) -> Value:
    return c.op("Gather", c.tensor(node.args[0]), c.tensor(node.args[1]), axis=0)


def _slice(c: Context, node: fx.Node) -> Value:
    axis = int(argument(node, 1, "dim", 0))
    start, end = argument(node, 2, "start", None), argument(node, 3, "end", None)
    bounds = [c.sizes([0 if start is None else start]), c.sizes([_LAST if end is None else end])]
    names = [bound if isinstance(bound, str) else c.builder.ints(bound) for bound in bounds]
    step = c.builder.ints([argument(node, 4, "step", 1)])
    return c.op("Slice", c.tensor(node.args[0]), *names, c.builder.ints([axis]), step)


def _narrow(c: Context, node: fx.Node) -> Value:
    axis, start, length = node.args[1:4]
    if not isinstance(start, int) or not isinstance(length, int):
        raise NotCovered("computed bounds")
    bounds = (c.builder.ints([start]), c.builder.ints([start + length]), c.builder.ints([int(axis)]))  # type: ignore[arg-type]
    return c.op("Slice", c.tensor(node.args[0]), *bounds)


def _pad(c: Context, node: fx.Node) -> Value:
    """torch lists pairs from the last axis backwards; ONNX lists all starts, then all ends, from the first axis."""
    rank = len(shape_of(node.args[0]))
    pairs: Any = node.args[1]
    mode = str(argument(node, 2, "mode", "constant")) if "constant_pad" not in str(node.target) else "constant"
    fill = argument(node, 2 if "constant_pad" in str(node.target) else 3, "value", None)
    if mode not in ("constant", "reflect") and mode != "replicate":
        raise NotCovered(mode)
    starts, ends = [0] * rank, [0] * rank
    for index in range(len(pairs) // 2):
        starts[rank - 1 - index], ends[rank - 1 - index] = pairs[2 * index], pairs[2 * index + 1]
    sizes = c.sizes([*starts, *ends])
    pads = sizes if isinstance(sizes, str) else c.builder.ints(sizes)
    value = c.tensor(float(fill) if fill else 0.0, node.meta["dtype"]) if mode == "constant" else ""
    return c.op("Pad", c.tensor(node.args[0]), pads, value, mode="edge" if mode == "replicate" else mode)


def _split(c: Context, node: fx.Node) -> Value:
    source = shape_of(node.args[0])
    axis = int(argument(node, 2, "dim", 0)) % len(source)
    source_node: Any = node.args[0]
    if any(c.varying.get(source_node, ())[axis : axis + 1]):
        raise NotCovered("splits the batch")
    size, parts = source[axis], node.args[1]
    if "chunk" in str(node.target):
        step = -(-size // int(parts))  # type: ignore[arg-type]
    elif isinstance(parts, int):
        step = parts
    else:
        step = 0
    sizes = [min(step, size - i) for i in range(0, size, step)] if step else [int(part) for part in parts]  # type: ignore[arg-type,union-attr]
    names = [f"{c.name}/{index}" for index in range(len(sizes))]
    return c.builder.op_many("Split", [c.tensor(node.args[0]), c.builder.ints(sizes)], names, axis=axis)


def _unbind(c: Context, node: fx.Node) -> Value:
    source = shape_of(node.args[0])
    axis = int(argument(node, 1, "dim", 0)) % len(source)
    x = c.tensor(node.args[0])
    return [
        c.builder.op("Gather", [x, c.builder.constant(index, np.int64)], f"{c.name}/{index}", axis=axis)
        for index in range(source[axis])
    ]


def _expand(c: Context, node: fx.Node) -> Value:
    sizes = c.sizes([1 if size == -1 else size for size in node.args[1]])  # type: ignore[union-attr]
    return c.op("Expand", c.tensor(node.args[0]), sizes if isinstance(sizes, str) else c.builder.ints(sizes))


def _expand_as(c: Context, node: fx.Node) -> Value:
    return c.op("Expand", c.tensor(node.args[0]), c.op("Shape", c.tensor(node.args[1]), part="shape"))


def _repeat(c: Context, node: fx.Node) -> Value:
    repeats: Any = node.args[1]
    x = c.tensor(node.args[0])
    missing = len(repeats) - len(shape_of(node.args[0]))
    repeats = [1] * -missing + list(repeats)  # aten.tile may name fewer axes than there are
    if missing > 0:
        x = c.op("Unsqueeze", x, c.builder.ints(range(missing)), part="unsqueezed")
    sizes = c.sizes(repeats)
    return c.op("Tile", x, sizes if isinstance(sizes, str) else c.builder.ints(sizes))


def _pixel_shuffle(c: Context, node: fx.Node) -> Value:
    return c.op("DepthToSpace", c.tensor(node.args[0]), blocksize=int(node.args[1]), mode="CRD")  # type: ignore[arg-type]


def _channel_shuffle(c: Context, node: fx.Node) -> Value:
    source, groups = shape_of(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
    rank = len(source)
    split = c.builder.ints([0, groups, source[1] // groups, *source[2:]])
    grouped = c.op("Reshape", c.tensor(node.args[0]), split, part="groups")
    turned = c.op("Transpose", grouped, part="turned", perm=[0, 2, 1, *range(3, rank + 1)])
    return c.op("Reshape", turned, c.builder.ints([0, *source[1:]]))


def _pixel_unshuffle(c: Context, node: fx.Node) -> Value:
    """Not SpaceToDepth, which puts a block's pixels before the channels."""
    *batch, channels, height, width = shape_of(node.args[0])
    if len(batch) != 1:
        raise NotCovered("no batch axis")
    block = int(node.args[1])  # type: ignore[arg-type]
    split = c.builder.ints([0, channels, height // block, block, width // block, block])
    blocks = c.op("Reshape", c.tensor(node.args[0]), split, part="blocks")
    turned = c.op("Transpose", blocks, part="turned", perm=[0, 1, 3, 5, 2, 4])
    return c.op("Reshape", turned, c.builder.ints([0, *shape_of(node)[1:]]))


def _resize(mode: str) -> Translation:
    """Spatial axes by given factors, else to given sizes; coordinates as torch computes them."""

    def translate(c: Context, node: fx.Node) -> Value:
        corners = mode == "linear" and bool(argument(node, 2, "align_corners", False))
        factors = argument(node, 3 if mode == "linear" else 2, "scale_factors", None)
        x = c.tensor(node.args[0])
        how = "asymmetric" if mode == "nearest" else "align_corners" if corners else "half_pixel"
        scales, sizes = "", ""
        if factors:
            scales = c.builder.constant([1.0, 1.0, *map(float, factors)], np.float32)
        else:
            spatial = shape_of(node)[2:]
            if any(c.varying.get(node, ())[2:]):
                raise NotCovered("computed sizes")
            head = c.op("Slice", c.op("Shape", x, part="shape"), c.builder.ints([0]), c.builder.ints([2]), part="head")
            sizes = c.op("Concat", head, c.builder.ints(spatial), part="sizes", axis=0)
        rounding = "floor" if mode == "nearest" else None
        return c.op(
            "Resize", x, "", scales, sizes, mode=mode, coordinate_transformation_mode=how, nearest_mode=rounding
        )

    return translate


def _filled(fill: float | None) -> Translation:
    """A tensor of one number, in a computed shape or in that of another tensor; None takes the number given."""

    def translate(c: Context, node: fx.Node) -> Value:
        like = str(node.target).split(".")[1].endswith("_like")
        shape: Any = c.op("Shape", c.tensor(node.args[0]), part="shape") if like else c.sizes(node.args[0])  # type: ignore[arg-type]
        value: Any = node.args[1] if fill is None else fill
        if isinstance(value, fx.Node):
            raise NotCovered("a computed number")
        number = helper.make_tensor("value", DTYPES[node.meta["dtype"]], [1], [value])
        return c.op("ConstantOfShape", shape if isinstance(shape, str) else c.builder.ints(shape), value=number)

    return translate


def _item(c: Context, node: fx.Node) -> Value:
    source: Any = node.args[0]
    values = c.values(source)
    return values[int(node.args[1])] if isinstance(values, list) else values  # type: ignore[arg-type]


def _size(c: Context, node: fx.Node) -> Value:
    shape = c.op("Shape", c.tensor(node.args[0]), part="shape")
    return c.op("Gather", shape, c.tensor(node.args[1], "int64"), axis=0)


def _size_arithmetic(kind: str) -> Translation:
    def translate(c: Context, node: fx.Node) -> Value:
        if any(isinstance(item, float) or "shape" in getattr(item, "meta", {}) for item in node.args):
            raise NotCovered("not sizes")
        return c.op(kind, c.tensor(node.args[0], "int64"), c.tensor(node.args[1], "int64"))

    return translate


SIZES: Mapping[str, Translation] = {
    "aten.sym_size.int": _size,
    "operator.add": _size_arithmetic("Add"),
    "operator.sub": _size_arithmetic("Sub"),
    "operator.mul": _size_arithmetic("Mul"),
    "operator.floordiv": _size_arithmetic("Div"),  # sizes are not negative
}

TABLE: Mapping[str, Translation] = {
    **SIZES,
    "operator.getitem": _item,
    **{f"aten.{n}.default": _same for n in ("contiguous", "clone", "alias", "detach", "lift_fresh_copy")},
    "aten.view.default": _view,
    "aten.reshape.default": _view,
    "aten.view_as.default": _reshape_to_result,
    "aten.unflatten.int": _reshape_to_result,
    "aten.flatten.using_ints": _flatten,
    "aten.squeeze.default": _squeeze,
    "aten.squeeze.dim": _squeeze,
    "aten.squeeze.dims": _squeeze,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.permute.default": _permute,
    "aten.transpose.int": _transpose,
    "aten.swapaxes.default": _transpose,
    "aten.movedim.int": _move_axis,
    "aten.t.default": _transpose,
    "aten.numpy_T.default": _reversed,
    "aten.cat.default": _cat,
    "aten.stack.default": _stack,
    "aten.select.int": _select,
    "aten.index_select.default": _index_select,
    "aten.gather.default": _gather,
    "aten.embedding.default": _embedding,
    "aten.slice.Tensor": _slice,
    "aten.narrow.default": _narrow,
    "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": _pad,
    "aten.chunk.default": _split,
    "aten.split.Tensor": _split,
    "aten.split.sizes": _split,
    "aten.split_with_sizes.default": _split,
    "aten.unbind.int": _unbind,
    "aten.expand.default": _expand,
    "aten.expand_as.default": _expand_as,
    "aten.tile.default": _repeat,
    **{
        f"aten.{n}{s}.default": _filled(f)
        for n, f in (("zeros", 0), ("ones", 1), ("full", None))
        for s in ("", "_like")
    },
    "aten.repeat.default": _repeat,
    "aten.pixel_shuffle.default": _pixel_shuffle,
    "aten.pixel_unshuffle.default": _pixel_unshuffle,
    "aten.channel_shuffle.default": _channel_shuffle,
    "aten.upsample_nearest2d.vec": _resize("nearest"),
    "aten.upsample_bilinear2d.vec": _resize("linear"),
}
