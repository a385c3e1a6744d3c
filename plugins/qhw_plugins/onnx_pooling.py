# SPDX-License-Identifier: Apache-2.0
"""ATen to ONNX: maximum and average pooling.

Ceil mode is written as padding at the end, never as ONNX's `ceil_mode`: onnxruntime 1.32 fuses an AveragePool into a
QLinearAveragePool that then divides by the whole window, also where it hangs over the edge.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from qhw.errors import ExportError
from qhw_plugins.onnx_context import Context, NotCovered, Translation, Value, argument, shape_of

__all__ = ["TABLE"]


@dataclass(frozen=True)
class _Windows:
    """Where windows lie: per pooled axis, as torch gives it.

    Attributes:
        hang: By how much the last window of ceil mode reaches past the padding.
    """

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    hang: list[int]

    @property
    def pads(self) -> list[int]:
        """Starts, then ends, as ONNX lists them, with the overhang at the ends."""
        return self.padding + [pad + hang for pad, hang in zip(self.padding, self.hang, strict=True)]


def _windows(c: Context, node: fx.Node, dilation: Any, ceil_mode: bool) -> _Windows:
    spatial = _pool_axes(node)
    kernel = _list(argument(node, 1, "kernel_size"), spatial)
    stride = _list(argument(node, 2, "stride", None) or kernel, spatial)
    padding = _list(argument(node, 3, "padding", 0), spatial)
    dilations = _list(dilation, spatial)
    hang = [0] * spatial
    if ceil_mode:
        if any(c.varying.get(node, ())[2:]):
            raise ExportError(
                f"exporter 'onnx_qdq': {c.name}: ceil_mode needs a size that is known; an axis of {shape_of(node)} "
                "varies with the batch. Use ceil_mode=False, or pad before the pool."
            )
        axes = zip(shape_of(node.args[0])[2:], shape_of(node)[2:], kernel, stride, padding, dilations, strict=True)
        hang = [max(0, (out - 1) * s + d * (k - 1) + 1 - size - 2 * p) for size, out, k, s, p, d in axes]
    return _Windows(kernel, stride, padding, dilations, hang)


def _pool_axes(node: fx.Node) -> int:
    """Number of pooled axes: the digit in the operator's name. torch takes images without a batch axis, ONNX not."""
    spatial = next(int(letter) for letter in str(node.target) if letter.isdigit())
    if len(shape_of(node.args[0])) != spatial + 2:
        raise NotCovered("no batch axis")
    return spatial


def _list(value: Any, length: int) -> list[int]:
    items = [value] if isinstance(value, int) else list(value)
    return items * length if len(items) == 1 else items


def _padded(c: Context, x: str, pads: list[int], fill: float) -> str:
    """The image with its border as a node of its own; pads are starts, then ends, of the spatial axes."""
    spatial = len(pads) // 2
    edges = c.builder.ints([0, 0, *pads[:spatial], 0, 0, *pads[spatial:]])
    return c.op("Pad", x, edges, c.builder.constant(fill, np.float32), part="padded", mode="constant")


def _max_pool(c: Context, node: fx.Node) -> Value:
    w = _windows(c, node, argument(node, 4, "dilation", 1), bool(argument(node, 5, "ceil_mode", False)))
    x, pads = c.tensor(node.args[0]), w.pads
    if any(pad >= k for pad, k in zip(pads, w.kernel * 2, strict=True)):  # runtimes refuse it; wide dilation needs it
        x, pads = _padded(c, x, pads, -math.inf), [0] * len(pads)
    return c.op("MaxPool", x, kernel_shape=w.kernel, strides=w.stride, pads=pads, dilations=w.dilation)


def _average_pool(c: Context, node: fx.Node) -> Value:
    """The mean of each window; torch divides by what of it lies within the padded image, or by a given number.

    ONNX divides by the whole window (count_include_pad = 1) or by what lies within the image (0). An overhang that
    only ceil mode adds is therefore right with 0 where nothing else is padded, or once that is padded beforehand.
    """
    w = _windows(c, node, 1, bool(argument(node, 4, "ceil_mode", False)))
    count_padding, divisor = bool(argument(node, 5, "count_include_pad", True)), argument(node, 6, "divisor_override")
    x, pads = c.tensor(node.args[0]), w.pads
    if divisor is not None:
        mean = _mean_of_windows(c, x, w, pads, True, "mean")
        return c.op("Mul", mean, c.builder.constant(math.prod(w.kernel) / divisor, np.float32))
    if count_padding and any(w.hang):
        if any(w.padding):
            x, pads = _padded(c, x, w.padding * 2, 0.0), [0] * len(w.hang) + w.hang
        count_padding = False
    return _mean_of_windows(c, x, w, pads, count_padding)


def _mean_of_windows(c: Context, x: str, w: _Windows, pads: list[int], count_padding: bool, part: str = "") -> str:
    counted = int(count_padding)
    return c.op(
        "AveragePool", x, part=part, kernel_shape=w.kernel, strides=w.stride, pads=pads, count_include_pad=counted
    )


def _adaptive_average_pool(c: Context, node: fx.Node) -> Value:
    _pool_axes(node)
    source, result = shape_of(node.args[0])[2:], shape_of(node)[2:]
    if all(size == 1 for size in result):
        return c.op("GlobalAveragePool", c.tensor(node.args[0]))
    if any(size % parts for size, parts in zip(source, result, strict=True)):
        raise NotCovered("uneven windows")
    kernel = [size // parts for size, parts in zip(source, result, strict=True)]
    return c.op("AveragePool", c.tensor(node.args[0]), kernel_shape=kernel, strides=kernel)


TABLE: Mapping[str, Translation] = {
    **{f"aten.max_pool{n}d.default": _max_pool for n in (1, 2, 3)},
    **{f"aten.avg_pool{n}d.default": _average_pool for n in (1, 2, 3)},
    **{f"aten.adaptive_avg_pool{n}d.default": _adaptive_average_pool for n in (1, 2, 3)},
}
