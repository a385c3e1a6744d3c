# SPDX-License-Identifier: Apache-2.0
"""Convolutions of bytes by the instructions that x86 has for them: int32 sums, several times as fast as float32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qhw.integer.exact import FLOAT32_EXACT, exact_settings
from qhw.integer.site import Site
from qhw.integer.weights import centred_weight, product_of
from qhw.integer.windows import is_ordinary
from qhw.numerics import QParams

__all__ = ["byte_convolution"]

Product = Callable[[Tensor], Tensor]

_FLAGS = ("avx512_vnni", "avx_vnni")  # without them products of bytes are added in pairs that saturate at 16 bits


def byte_convolution(site: Site, bias: Tensor | None) -> Product | None:
    """Sums of a 2-D convolution, bias included; None where bytes do not hold its operands, or this machine has no unit.

    The unit sums in int32, exact, and returns float32, exact below 2^24: no sum of codes as stored, nor what it takes
    off for the zero point, reaches that here. One run on inputs that fill the sums confirms it against float32.

    Args:
        site: A Conv or DepthwiseConv.
        bias: int64 [out_channels], in units of the accumulator.

    Returns:
        Callable: codes as carried, [N, C, H, W] -> sums, float32 [N, C', H', W'], channels last in memory.
    """
    x, weight = site.inputs[0], centred_weight(site)
    if site.operator.kind not in ("Conv", "DepthwiseConv") or not is_ordinary(site) or not _has_unit():
        return None
    lowest = _first_byte(x)
    if lowest is None or int(weight.min()) < -128 or int(weight.max()) > 127:
        return None
    largest = 2 * 255 * weight.abs().flatten(1).sum(1) + (0 if bias is None else bias.abs())
    if int(largest.max()) >= FLOAT32_EXACT:
        return None
    product = _prepared(site, weight.to(torch.int8), bias, lowest)
    return product if _is_exact_here(site, weight, bias, product) else None


def _has_unit() -> bool:
    return any(torch.cpu.get_capabilities().get(flag) for flag in _FLAGS) and hasattr(
        torch.ops.onednn, "qconv2d_pointwise"
    )


def _first_byte(x: QParams) -> int | None:
    """The code that becomes byte 0."""
    if x.quant_min >= 0 and x.quant_max <= 255:
        return 0
    return -128 if x.quant_min >= -128 and x.quant_max <= 127 else None


def _prepared(site: Site, weight: Tensor, bias: Tensor | None, lowest: int) -> Product:
    facts = site.operator.attributes
    window = [list(facts["stride"]), list(facts["padding"]), [1, 1]]
    groups, zero_point = int(facts["groups"]), int(site.inputs[0].zero_point) - lowest
    scales, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int64)
    added = None if bias is None else bias.float()
    unit: Any = torch.ops.onednn
    packed = unit.qconv_prepack(weight, scales, 1.0, zero_point, *window, groups, [1, *site.input_shape[1:]])
    result: Any = (1.0, 0, torch.float32, "none", [], "")  # scale, zero point, dtype; nothing is computed along

    def product(codes: Tensor) -> Tensor:
        # By way of int16: torch converts float32 to uint8 element by element, the other two by vectors.
        data = codes.contiguous(memory_format=torch.channels_last).to(torch.int16).to(torch.uint8)
        if lowest:
            data.bitwise_xor_(128)  # two's complement plus 128
        sums: Tensor = unit.qconv2d_pointwise(
            data, 1.0, zero_point, packed, scales, zeros, added, *window, groups, *result
        )
        return sums

    return product


def _is_exact_here(site: Site, weight: Tensor, bias: Tensor | None, product: Product) -> bool:
    """Whether the unit computes what float32 computes exactly: on lowest codes, highest codes and random ones."""
    x, shape = site.inputs[0], site.input_shape[1:]
    low, high = x.quant_min, x.quant_max
    noise = torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(0))
    codes = torch.stack([torch.full(shape, low), torch.full(shape, high), noise]).float()
    with exact_settings():
        expected = product_of(site)(codes - x.zero_point.float(), weight.float())
        if bias is not None:
            expected += bias.float()[:, None, None]
        return torch.equal(product(codes), expected)
