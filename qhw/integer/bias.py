# SPDX-License-Identifier: Apache-2.0
"""Biases as whole numbers: added to the accumulator, or behind the multiplier, as the target says."""

from collections.abc import Callable

import torch
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer.arithmetic import Requantization, clamped
from qhw.integer.site import Constant, Site, unknown
from qhw.integer.weights import unit_of
from qhw.numerics import ROUNDING_RULES, rescale_shift
from qhw.schema import Bias

__all__ = ["accumulated_bias", "behind_multiplier", "bias_reach", "is_behind_multiplier"]

_INT64 = 2**62


def is_behind_multiplier(site: Site) -> bool:
    """Whether the operator's bias is left out of its accumulator."""
    return site.bias is not None and _rule(site)[1].applied == "after_multiplier"


def accumulated_bias(site: Site) -> Tensor | None:
    """What is added to the accumulator: int64 [out_channels] in its units; None where nothing is.

    A bias on the scale input*weight is its code. One on a scale of its own that is 2^n times that, n >= 0, is the code
    shifted left by n, where the target says that biases are aligned by a shift.

    Raises:
        IntegerError: the operator's bias is not quantized, or the target leaves open how it meets the sum.
    """
    if site.bias is None:
        if site.operator.bias is not None:
            raise _left_out(site)
        return None
    path, rule = _rule(site)
    if rule.applied == "unknown" or (rule.applied is None and _has_multiplier(site)):
        raise unknown(f"{path}.applied", rule.applied, ("before_requantize", "after_multiplier"))
    if rule.applied == "after_multiplier":
        return None
    unit = unit_of(site, [-1])(torch.float32)
    return _aligned(site.bias, unit.double(), path, rule, "input*weight").expand(_out_channels(site))


def bias_reach(site: Site) -> tuple[Tensor | None, bool]:
    """What the bias adds to the accumulator at most, and whether that is exact; for proofs, which need no target.

    Where `accumulated_bias` has none because the target leaves something open, the real bias in units of the
    accumulator, rounded away from 0.

    Returns:
        tuple: int64 [out_channels] or None; and whether it is what is added.
    """
    try:
        return accumulated_bias(site), True
    except IntegerError:
        if site.bias is None:
            return None, True
    real = _centred(site.bias).double() * site.bias.qparams.scale.double() / unit_of(site, [-1])(torch.float64)
    return (real.abs().ceil() * real.sign()).long(), False


def behind_multiplier(
    site: Site, rescale: Requantization, largest: int, shape: list[int]
) -> Callable[[Tensor, tuple[int, int], torch.dtype], Tensor]:
    """A requantization that adds the bias to the product with the multiplier:

        code = round((acc * multiplier + B) / 2^(bits + shift)) + zero point

    B is the bias in steps of 2^-(bits + shift) of the output scale: code * multiplier for a bias on the scale
    input*weight, and the code shifted left for one of its own scale that is such a step times a power of two.

    Args:
        site: The operator; its bias is behind the multiplier.
        rescale: Its requantization without the bias.
        largest: Largest magnitude of its accumulator.
        shape: In which [out_channels] broadcasts over the output.

    Returns:
        Callable: Accumulators, lowest and highest code, dtype of the codes -> codes.

    Raises:
        IntegerError: there is no multiplier, or more than one rounding, or a sum may leave 63 bits.
    """
    assert site.bias is not None
    path, rule = _rule(site)
    if rescale.multiplier is None or rescale.shift is None or rescale.before or rescale.rounding not in ROUNDING_RULES:
        raise IntegerError(
            f'{path}.applied = "after_multiplier" needs {site.requantize[0]}.kind = "fixed_point" with one rounding, '
            "and the zero point behind it"
        )
    if rule.scale is None or rule.scale == "unknown":
        raise unknown(f"{path}.scale", rule.scale)
    assert rescale.bits is not None
    multiplier, total = rescale.multiplier, rescale.shift + rescale.bits
    if rule.scale == "own":
        step = site.result.scale.double() * torch.pow(2.0, -total.double().flatten())
        added = _aligned(site.bias, step, path, rule, "the output scale over 2^(multiplier bits + shift)")
    else:
        added = _centred(site.bias) * multiplier.flatten()
    if largest * int(multiplier.max()) + int(added.abs().max()) >= _INT64:
        raise IntegerError(f"{path}: its bias behind the multiplier needs more than 63 bits")
    added, rounding, zero = added.expand(_out_channels(site)).reshape(shape), rescale.rounding, rescale.zero_point

    def codes(acc: Tensor, limits: tuple[int, int], dtype: torch.dtype) -> Tensor:
        found = rescale_shift(acc.long() * multiplier + added, total, rounding=rounding)  # type: ignore[arg-type]
        return clamped(found + zero, limits, dtype)

    return codes


def _rule(site: Site) -> tuple[str, Bias]:
    name = str(site.kernel.bias if site.kernel is not None else None)
    return f"biases.{name}", site.target.biases[name]


def _has_multiplier(site: Site) -> bool:
    """Whether the target says of a requantization that multiplies: behind shifts alone there is no other place."""
    name = str(site.kernel.requantize if site.kernel is not None else None)
    rule = site.target.requantize.get(name)
    return rule is None or rule.kind != "shift"


def _out_channels(site: Site) -> int:
    return int(site.operator.attributes["out_channels"])


def _centred(bias: Constant) -> Tensor:
    return bias.codes.long() - bias.qparams.zero_point.long()


def _aligned(bias: Constant, unit: Tensor, path: str, rule: Bias, name: str) -> Tensor:
    """Codes in a unit: shifted left by a whole number of bits: int64 [out_channels]."""
    scale = bias.qparams.scale.double()
    (mantissa, exponent), (wanted, start) = torch.frexp(scale), torch.frexp(unit)
    shift = (exponent - start).long()
    is_shifted = (mantissa == wanted) & (shift >= 0)
    if bool((is_shifted & (shift == 0)).all()):
        return _centred(bias)
    if rule.align is None or rule.align == "unknown":
        raise unknown(f"{path}.align", rule.align)
    if not bool(is_shifted.all()):
        ratio = float((scale / unit).flatten()[~is_shifted.flatten()][0])
        raise IntegerError(
            f'{path}.align = "shift" needs a bias scale that is {name} times 1, 2, 4, ...; got a factor of {ratio:.6g}'
        )
    codes = _centred(bias)
    if int(shift.max()) + int(codes.abs().max()).bit_length() > 62:
        raise IntegerError(f"{path}: its bias shifted left by {int(shift.max())} bits needs more than 63")
    return codes << shift


def _left_out(site: Site) -> IntegerError:
    """Why an operator's bias is not quantized."""
    rule = site.kernel.bias if site.kernel is not None else None
    if rule is None or rule == "unknown":
        return unknown(f"kernels.{site.kernel_name}.bias", rule)
    if rule == "none":
        return IntegerError(f'kernels.{site.kernel_name}.bias = "none", and the operator has a bias')
    bits = site.target.biases[rule].bits
    if bits == "float":
        return IntegerError(f'biases.{rule}.bits = "float" cannot be executed exactly')
    return unknown(f"biases.{rule}.bits", bits)
