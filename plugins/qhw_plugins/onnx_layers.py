# SPDX-License-Identifier: Apache-2.0
"""ATen to ONNX: convolution, linear, matrix product, mean over the image, normalization."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, fx

from qhw_plugins.onnx_context import Context, NotCovered, Translation, Value, argument, shape_of
from qhw_plugins.onnx_elementwise import reduce

__all__ = ["TABLE", "batch_norm"]


def _batched(node: fx.Node, rank: int) -> None:
    """torch takes images without a batch axis, ONNX does not."""
    if len(shape_of(node.args[0])) != rank:
        raise NotCovered("no batch axis")


def _list(value: Any, length: int) -> list[int]:
    items = [value] if isinstance(value, int) else list(value)
    return items * length if len(items) == 1 else items


def _conv(c: Context, node: fx.Node) -> Value:
    weight = shape_of(node.args[1])
    spatial = len(weight) - 2
    _batched(node, len(weight))
    dilations = _list(argument(node, 5, "dilation", 1), spatial)
    padding = argument(node, 4, "padding", 0)
    if padding == "same":  # torch puts the odd one at the end
        total = [d * (k - 1) for d, k in zip(dilations, weight[2:], strict=True)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = _list(0 if padding == "valid" else padding, spatial) * 2
    bias = argument(node, 2, "bias")
    return c.op(
        "Conv",
        c.tensor(node.args[0]),
        c.tensor(node.args[1]),
        c.tensor(bias) if bias is not None else "",
        kernel_shape=list(weight[2:]),
        strides=_list(argument(node, 3, "stride", 1), spatial),
        pads=pads,
        dilations=dilations,
        group=int(argument(node, 6, "groups", 1)),
    )


def _conv_transpose(c: Context, node: fx.Node) -> Value:
    weight = shape_of(node.args[1])
    spatial = len(weight) - 2
    _batched(node, len(weight))
    bias = argument(node, 2, "bias")
    return c.op(
        "ConvTranspose",
        c.tensor(node.args[0]),
        c.tensor(node.args[1]),
        c.tensor(bias) if bias is not None else "",
        kernel_shape=list(weight[2:]),
        strides=_list(argument(node, 3, "stride", 1), spatial),
        pads=_list(argument(node, 4, "padding", 0), spatial) * 2,
        output_padding=_list(argument(node, 5, "output_padding", 0), spatial),
        group=int(argument(node, 6, "groups", 1)),
        dilations=_list(argument(node, 7, "dilation", 1), spatial),
    )


def _linear(c: Context, node: fx.Node) -> Value | None:
    """Gemm on a matrix: an input of another rank is flattened first, and its shape restored behind the quantizer."""
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    operands = [c.tensor(weight), c.tensor(bias) if bias is not None else ""]
    source = shape_of(x)
    if len(source) == 2:
        return c.op("Gemm", c.tensor(x), *operands, transB=1)
    matrix = c.op("Reshape", c.tensor(x), c.builder.ints([-1, source[-1]]), part="matrix")
    product = c.op("Gemm", matrix, *operands, part="gemm", transB=1)
    shape = c.builder.ints(c.fixed_shape(node))
    name = c.name
    c.set_pending(node, product, lambda raw: c.builder.op("Reshape", [raw, shape], name))
    return None


def _addmm(c: Context, node: fx.Node) -> Value:
    bias, x, weight = (c.tensor(item) for item in node.args[:3])
    alpha, beta = float(argument(node, 4, "alpha", 1)), float(argument(node, 3, "beta", 1))
    return c.op("Gemm", x, weight, bias, alpha=alpha, beta=beta)


def _matmul(c: Context, node: fx.Node) -> Value:
    return c.op("MatMul", c.tensor(node.args[0]), c.tensor(node.args[1]))


def _mean(c: Context, node: fx.Node) -> Value | None:
    """GlobalAveragePool for the mean over all of H and W: runtimes have an integer kernel for that one only."""
    source = shape_of(node.args[0])
    axes = sorted(dim % len(source) for dim in argument(node, 1, "dim", None) or range(len(source)))
    keep = bool(argument(node, 2, "keepdim", False))
    x = c.tensor(node.args[0], node.meta["dtype"])
    if len(source) < 3 or axes != list(range(2, len(source))):
        return reduce(c, "ReduceMean", x, axes, keep)
    if keep:
        return c.op("GlobalAveragePool", x)
    name = c.name
    pooled = c.op("GlobalAveragePool", x, part="pool")
    c.set_pending(node, pooled, lambda raw: c.builder.op("Flatten", [raw], name, axis=1))
    return None


def _layer_norm(c: Context, node: fx.Node) -> Value:
    c.builder.require(17, "LayerNormalization")
    normalized: Any = node.args[1]
    axes = len(normalized)
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    scale = c.tensor(weight) if weight is not None else c.builder.constant(np.ones(normalized), np.float32)
    return c.op(
        "LayerNormalization",
        c.tensor(node.args[0]),
        scale,
        c.tensor(bias) if bias is not None else "",
        axis=-axes,
        epsilon=float(argument(node, 4, "eps", 1e-5)),
    )


def _group_norm(c: Context, node: fx.Node) -> Value:
    """As instance norm over groups, which every opset has; weight and bias belong to single channels."""
    source = shape_of(node.args[0])
    count: Any = node.args[1]
    groups = int(count)
    ones = c.builder.constant(np.ones(groups), np.float32)
    zeros = c.builder.constant(np.zeros(groups), np.float32)
    folded = c.op("Reshape", c.tensor(node.args[0]), c.builder.ints([0, groups, -1]), part="groups")
    eps = float(argument(node, 4, "eps", 1e-5))
    normed = c.op("InstanceNormalization", folded, ones, zeros, part="norm", epsilon=eps)
    result = c.op("Reshape", normed, c.builder.ints(c.fixed_shape(node)), part="unfolded")
    for kind, item in (("Mul", argument(node, 2, "weight")), ("Add", argument(node, 3, "bias"))):
        if item is not None:
            per_channel = c.builder.ints([-1] + [1] * (len(source) - 2))
            result = c.op(kind, result, c.op("Reshape", c.tensor(item), per_channel, part=f"{kind.lower()}_by"))
    return result


def _instance_norm(c: Context, node: fx.Node) -> Value:
    if not node.args[5]:
        raise NotCovered("running statistics")
    channels = shape_of(node.args[0])[1]
    weight, bias = node.args[1], node.args[2]
    scale = c.tensor(weight) if weight is not None else c.builder.constant(np.ones(channels), np.float32)
    shift = c.tensor(bias) if bias is not None else c.builder.constant(np.zeros(channels), np.float32)
    return c.op("InstanceNormalization", c.tensor(node.args[0]), scale, shift, epsilon=float(node.args[7]))  # type: ignore[arg-type]


def batch_norm(c: Context, node: fx.Node, module: Any) -> Value:
    """A batch norm that no step folded, in eval mode; without running statistics it uses those of each batch."""
    source = shape_of(node.args[0])

    def stored(tensor: Tensor | None, fill: float, part: str) -> str:
        array = np.full(source[1], fill, np.float32) if tensor is None else tensor.detach().cpu().numpy()
        return c.builder.initializer(np.array(array), f"{c.name}/{part}")

    if module.running_mean is None or module.running_var is None:
        factors = [stored(t, f, p) for t, f, p in ((module.weight, 1.0, "weight"), (module.bias, 0.0, "bias"))]
        return _batch_statistics(c, c.tensor(node.args[0]), len(source), float(module.eps), *factors)

    parameters = (
        stored(module.weight, 1.0, "weight"),
        stored(module.bias, 0.0, "bias"),
        stored(module.running_mean, 0.0, "mean"),
        stored(module.running_var, 1.0, "variance"),
    )
    return c.op("BatchNormalization", c.tensor(node.args[0]), *parameters, epsilon=float(module.eps))


def _batch_statistics(c: Context, x: str, rank: int, eps: float, weight: str, bias: str) -> str:
    """(x - mean) / sqrt(variance + eps) * weight + bias, with statistics over all axes but the channels'."""
    axes = [axis for axis in range(rank) if axis != 1]
    centred = c.op("Sub", x, reduce(c, "ReduceMean", x, axes, True, part="mean"), part="centred")
    square = c.op("Mul", centred, centred, part="square")
    variance = reduce(c, "ReduceMean", square, axes, True, part="variance")
    deviation = c.op("Sqrt", c.op("Add", variance, c.builder.constant(eps, np.float32), part="sum"), part="deviation")
    per_channel = c.builder.ints([-1] + [1] * (rank - 2))
    scale, shift = (c.op("Reshape", item, per_channel, part="per_channel") for item in (weight, bias))
    normed = c.op("Div", centred, deviation, part="normed")
    return c.op("Add", c.op("Mul", normed, scale, part="scaled"), shift)


TABLE: Mapping[str, Translation] = {
    **{f"aten.conv{n}d.{overload}": _conv for n in (1, 2, 3) for overload in ("default", "padding")},
    "aten.conv_transpose1d.default": _conv_transpose,
    "aten.conv_transpose2d.input": _conv_transpose,
    "aten.conv_transpose3d.input": _conv_transpose,
    "aten.linear.default": _linear,
    "aten.addmm.default": _addmm,
    "aten.matmul.default": _matmul,
    "aten.mm.default": _matmul,
    "aten.bmm.default": _matmul,
    "aten.mean.dim": _mean,
    "aten.layer_norm.default": _layer_norm,
    "aten.group_norm.default": _group_norm,
    "aten.instance_norm.default": _instance_norm,
}
