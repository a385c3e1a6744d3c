# SPDX-License-Identifier: Apache-2.0
"""What the sums of an operator with weights can reach: exact for its stored codes, over all inputs and positions."""

import torch
from torch import Tensor

from qhw.integer.accumulate import Bounds
from qhw.integer.bias import bias_reach
from qhw.integer.codes import reach
from qhw.integer.exact import FLOAT32_EXACT, exact_dtype, exact_settings
from qhw.integer.site import Site
from qhw.integer.weights import centred_weight, product_of, weight_rows

__all__ = ["matmul_bounds", "met_weights", "product_bounds", "sample_shape", "saturating_bounds"]


def product_bounds(site: Site) -> Bounds:
    """What the accumulators of an operator with weights can reach, per output channel, in any order of summation.

    With inputs from a to b (zero point taken off), P and N the sums of the positive and negative weights that one
    output meets:

        highest = max(b P + a N) + max(bias, 0),   lowest = min(a P + b N) + min(bias, 0)

    An output of a convolution meets all weights of its channel, unless zeros at the border take the place of inputs
    wherever it lies; one of a transposed convolution meets some of them, by its distance from the next input and from
    the border. The maximum is that of its positions. Weights with a scale per group of inputs count as one sum.
    """
    positive, negative = _meets_all(site) or met_weights(site, centred_weight(site))
    x = site.inputs[0]
    low, high = x.quant_min - int(x.zero_point), x.quant_max - int(x.zero_point)
    highest = (high * positive + low * negative).flatten(1).amax(1)
    lowest = (low * positive + high * negative).flatten(1).amin(1)
    bias, _ = bias_reach(site)
    if bias is not None:
        highest, lowest = highest + bias.clamp(min=0), lowest + bias.clamp(max=0)
    return Bounds(lowest, highest)


def matmul_bounds(site: Site) -> Bounds:
    """What the sums of a product of two activations can reach, whatever their codes, in any order of summation."""
    a, b = site.inputs
    largest = reach(a) * reach(b) * int(site.operator.attributes["reduced_elements"])
    return Bounds(torch.tensor([-largest]), torch.tensor([largest]))


def saturating_bounds(site: Site, bounds: Bounds) -> Bounds:
    """What an accumulator reaches before it saturates for the first time, if the target says where the bias comes.

    Products of either sign take a sum as far as it gets in any order, since each input can make its product count 0 or
    more: the order decides what a sum becomes once it saturates, not whether. A bias that is there from the start
    moves both ends.

    Args:
        site: The operator.
        bounds: Of its sums, in any order.
    """
    bias, _ = bias_reach(site)
    name = site.kernel.accumulator if site.kernel is not None else None
    spec = site.target.accumulators.get(str(name))
    if bias is None or spec is None or spec.overflow != "saturate" or spec.bias_added != "first":
        return bounds
    return Bounds(bounds.lowest + bias.clamp(min=0), bounds.highest + bias.clamp(max=0))


def met_weights(site: Site, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the positive and of the negative weights that each output meets: int64 [out_channels, *positions].

    They are the outputs of the operator for inputs of 1.

    Args:
        site: The operator.
        weight: int64, like its weight.
    """
    product = product_of(site)
    dtype = exact_dtype(max(FLOAT32_EXACT, int(weight.abs().sum())))
    ones = torch.ones(sample_shape(site), dtype=dtype)
    axis = -1 if site.operator.kind == "Gemm" else 1
    with exact_settings():
        found = [product(ones, part.to(dtype)).movedim(axis, 0) for part in (weight.clamp(min=0), weight.clamp(max=0))]
    return found[0].long(), found[1].long()


def sample_shape(site: Site) -> tuple[int, ...]:
    """Shape of the input of one sample, the batch axis included."""
    shape = site.input_shape
    if site.operator.kind == "Gemm":
        return (1, *shape[1:]) if len(shape) > 1 else shape
    return (1, *shape[-1 - len(site.operator.attributes["kernel"]) :])


def _meets_all(site: Site) -> tuple[Tensor, Tensor] | None:
    """The same where one output of each channel meets all of its weights: int64 [out_channels, 1]; else None."""
    kind = site.operator.kind
    if kind == "ConvTranspose" or (kind != "Gemm" and not _has_full_window(site)):
        return None
    rows = weight_rows(site)
    return rows.clamp(min=0).sum(1, keepdim=True), rows.clamp(max=0).sum(1, keepdim=True)


def _has_full_window(site: Site) -> bool:
    """Whether some window of a convolution lies within the input."""
    facts = site.operator.attributes
    rank = len(facts["kernel"])
    sizes, outputs = site.input_shape[-rank:], tuple(site.node.meta["shape"])[-rank:]
    padding = facts["padding"]
    for i, (kernel, dilation) in enumerate(zip(facts["kernel"], facts["dilation"], strict=True)):
        reach = dilation * (kernel - 1)
        before = {"valid": 0, "same": reach // 2}[padding] if isinstance(padding, str) else padding[i]
        first = -(-before // facts["stride"][i])  # the first window that starts within
        if first >= outputs[i] or first * facts["stride"][i] - before + reach >= sizes[i]:
            return False
    return True
