# SPDX-License-Identifier: Apache-2.0
"""An operator with weights as integers: its weight, its own function, what one unit of its sums stands for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qhw.engine import MatrixForm
from qhw.integer.site import Site
from qhw.numerics import PerTensor, expand

__all__ = ["centred_weight", "matrix_form", "output_shape", "product_of", "unit_of", "weight_rows"]


def centred_weight(site: Site) -> Tensor:
    """Weight codes minus zero point: int64, like the weight."""
    codes, qparams = site.constant.codes.long(), site.constant.qparams
    return codes - expand(qparams.zero_point.long(), qparams.granularity, tuple(codes.shape))


def matrix_form(site: Site) -> MatrixForm:
    """The operator as a product of matrices."""
    return MatrixForm(site.operator, tuple(site.constant.codes.shape))


def weight_rows(site: Site) -> Tensor:
    """Weight codes minus zero point: int64 [out_channels, inputs of an output]."""
    return matrix_form(site).weight_rows(centred_weight(site)).flatten(0, 1)


def output_shape(site: Site) -> list[int]:
    """A shape in which [out_channels] broadcasts over the output."""
    operator = site.operator
    if operator.kind == "Gemm":
        return [-1]
    return [-1, *[1] * len(operator.attributes["kernel"])]


def unit_of(site: Site, shape: list[int]) -> Callable[[torch.dtype], Tensor]:
    """What one unit of the accumulator stands for: input scale times weight scale, rounded in a dtype.

    Args:
        site: The operator.
        shape: For scales of output channels.
    """
    x, w = site.inputs[0], site.constant.qparams
    scale = w.scale
    if not isinstance(w.granularity, PerTensor):
        # A grouped transposed convolution has weights [in, out / groups, ...]: its groups share the scales.
        scale = scale.repeat(int(site.operator.attributes["out_channels"]) // len(scale)).reshape(shape)
    return lambda kind: x.scale.to(kind) * scale.to(kind)


def product_of(site: Site) -> Callable[[Tensor, Tensor], Tensor]:
    """The operator's own function, of input and weight, without a bias."""
    node, operator = site.node, site.operator
    target: Any = node.target
    if operator.kind == "Gemm":
        if operator.weight_axis == 0:
            return lambda x, w: torch.nn.functional.linear(x, w)
        return torch.matmul
    rest = list(node.args[3:])
    kwargs = dict(node.kwargs)
    return lambda x, w: target(x, w, None, *rest, **kwargs)
