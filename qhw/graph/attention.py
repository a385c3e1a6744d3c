# SPDX-License-Identifier: Apache-2.0
"""Scaled dot-product attention as the products and the softmax that accelerators have kernels for."""

import math
from typing import Any

import torch
from torch import fx

from qhw.graph.attributes import argument, target_name
from qhw.graph.tensors import assign, unused_path

__all__ = ["MASKED", "split_attention"]

_aten = torch.ops.aten
MASKED = -(2.0**15)
"""Beside scores as -inf is: exp(-32768) is 0 in float32. A grid holds it, and 0, without error."""


def split_attention(module: fx.GraphModule) -> None:
    """Rewrite attention, so that it is quantized where it is written out by hand, too.

        softmax((q scale) k^T + mask) v      scale = 1 / sqrt(last axis of q) where none is given

    A causal mask becomes a buffer of 0 and `MASKED`. Attention with a mask of bools, with groups of heads on one key,
    with dropout or without an axis of samples stays as it is.

    Args:
        module: As torch.export gives it, with `meta["val"]` of each tensor; changed in place.
    """
    for node in list(module.graph.nodes):
        if target_name(node) == "aten.scaled_dot_product_attention.default" and _is_plain(node):
            _split(module, node)


def _is_plain(node: fx.Node) -> bool:
    mask = argument(node, 3, "attn_mask", None)
    is_bool = isinstance(mask, fx.Node) and mask.meta["val"].dtype == torch.bool
    has_samples = node.args[0].meta["val"].dim() > 2  # type: ignore[union-attr]
    return has_samples and not (
        is_bool or argument(node, 4, "dropout_p", 0.0) or argument(node, 7, "enable_gqa", False)
    )


def _split(module: fx.GraphModule, node: fx.Node) -> None:
    query, key, value = (source for source in node.args[:3] if isinstance(source, fx.Node))
    mask, factor = argument(node, 3, "attn_mask", None), argument(node, 6, "scale", None)
    if factor is None:
        factor = 1 / math.sqrt(query.meta["val"].shape[-1])

    def call(target: Any, *args: Any) -> fx.Node:
        made = module.graph.call_function(target, args)
        # Of the value only the dtype is read from here on, which all of them share.
        made.meta = {key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta}
        return made

    with module.graph.inserting_before(node):
        if argument(node, 5, "is_causal", False):
            path = unused_path(module, f"{node.name}_mask")
            rows, columns = query.meta["val"].shape[-2], key.meta["val"].shape[-2]
            assign(module, path, torch.full((rows, columns), MASKED).triu(1))
            mask = module.graph.get_attr(path)
        scaled = call(_aten.mul.Tensor, query, float(factor))
        scores = call(_aten.matmul.default, scaled, call(_aten.transpose.int, key, -2, -1))
        if mask is not None:
            scores = call(_aten.add.Tensor, scores, mask)
        product = call(_aten.matmul.default, call(_aten.softmax.int, scores, -1), value)
    node.replace_all_uses_with(product)
    module.graph.erase_node(node)
