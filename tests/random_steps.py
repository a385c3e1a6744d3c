# SPDX-License-Identifier: Apache-2.0
"""What random models are made of: each function adds one operator, drawn within what it is told.

Axis 0 is the batch and stays it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_models import Draft, Function

_POOLS: Mapping[str, tuple[Any, Any, Any]] = {
    "average": (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    "max": (F.max_pool1d, F.max_pool2d, F.max_pool3d),
    "whole": (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
}


def conv(draft: Draft, source: int, *, max_rank: int = 5) -> bool:
    """A convolution: plain, depthwise, grouped; strided, dilated, padded; with a bias or without."""
    x, rng = draft.values[source], draft.rng
    if not 3 <= x.dim() <= max_rank:
        return False
    channels, sides = x.shape[1], x.shape[2:]
    kind = rng.choice(("conv", "conv", "depthwise", "grouped"))
    out, groups = rng.randint(1, 9), 1
    if kind == "depthwise":
        groups, out = channels, channels * rng.choice((1, 1, 2))
    elif kind == "grouped":
        groups = rng.choice([g for g in range(1, channels + 1) if channels % g == 0])
        out = groups * rng.randint(1, 3)
    dilation = [rng.choice((1, 1, 2)) for _ in sides]
    kernel = [rng.randint(1, max(1, min(3, (n - 1) // d + 1))) for n, d in zip(sides, dilation, strict=True)]
    padding = [rng.randint(0, (k - 1) * d) for k, d in zip(kernel, dilation, strict=True)]
    stride = [rng.choice((1, 1, 2)) for _ in sides]
    layer: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(sides) - 1]
    has_bias = rng.random() < 0.7
    draft.add(kind, layer(channels, out, kernel, stride, padding, dilation, groups, bias=has_bias), source)
    draft.clip()
    return True


def conv_transpose(draft: Draft, source: int) -> bool:
    """A transposed convolution of an image."""
    x, rng = draft.values[source], draft.rng
    if x.dim() != 4:
        return False
    kernel, stride = [rng.randint(1, 3) for _ in "hw"], [rng.randint(1, 2) for _ in "hw"]
    padding = [rng.randint(0, min(k - 1, 1)) for k in kernel]
    sizes = [(n - 1) * s - 2 * p + k for n, s, p, k in zip(x.shape[2:], stride, padding, kernel, strict=True)]
    if min(sizes) < 1:
        return False
    layer: Any = nn.ConvTranspose2d
    module = layer(x.shape[1], rng.randint(1, 9), kernel, stride, padding, bias=rng.random() < 0.7)
    draft.add("conv_transpose", module, source)
    return True


def linear(draft: Draft, source: int, *, max_rank: int = 2) -> bool:
    """A linear layer on the last axis."""
    x, rng = draft.values[source], draft.rng
    if x.dim() > max_rank:
        return False
    draft.add("linear", nn.Linear(x.shape[-1], rng.randint(1, 12), bias=rng.random() < 0.8), source)
    draft.clip()
    return True


def matmul(draft: Draft, source: int, *, is_clipped: bool = True) -> bool:
    """A product of two activations: of a value and its own transpose."""
    if draft.values[source].dim() < 3:
        return False
    draft.add("transpose", lambda a: a.transpose(-1, -2), source)
    operands = [source, draft.last]
    draft.rng.shuffle(operands)
    draft.add("matmul", torch.matmul, *operands)
    if is_clipped:
        draft.clip()
    return True


def elementwise(
    draft: Draft, source: int, *, functions: Mapping[str, Callable[..., Tensor]], both_ways: Sequence[str] = ("mul",)
) -> bool:
    """A function of two values that broadcast; each along the other only where its name is among `both_ways`."""
    x, rng = draft.values[source], draft.rng
    kind = rng.choice(list(functions))

    def suits(y: Tensor) -> bool:
        if y.dim() != x.dim() or y.shape[0] != x.shape[0]:
            return False
        both = [(m, n) for m, n in zip(x.shape, y.shape, strict=True) if m != n]
        is_one_way = all(m == 1 for m, _ in both) or all(n == 1 for _, n in both)
        return is_one_way or (kind in both_ways and all(1 in pair for pair in both))

    partner = rng.choice(draft.partners(source, suits))
    if partner == source and rng.random() < 0.8:  # a branch of its own, as few squares lie next to ties
        width = x.shape[-1] if x.dim() == 2 else x.shape[1]
        layer: Any = nn.Linear if x.dim() == 2 else partial((nn.Conv1d, nn.Conv2d)[x.dim() - 3], kernel_size=1)
        draft.add("branch", layer(width, width), source)
        partner = draft.last
    operands = [source, partner]
    rng.shuffle(operands)
    draft.add(kind, functions[kind], *operands)
    if kind in ("add", "sub", "mul"):
        draft.clip()
    return True


def concat(draft: Draft, source: int) -> bool:
    """Two or three values side by side along one axis; the same value twice where no other suits."""
    x, rng = draft.values[source], draft.rng
    axis = rng.randrange(1, x.dim())

    def suits(y: Tensor) -> bool:
        return y.dim() == x.dim() and all(
            m == n for i, (m, n) in enumerate(zip(x.shape, y.shape, strict=True)) if i != axis
        )

    others = [i for i in draft.shown() if suits(draft.values[i])]
    sources = [source, *rng.choices(others, k=rng.choice((1, 1, 2)))]
    draft.add("concat", lambda *parts: torch.cat(parts, axis), *sources)
    return True


def average_pool(draft: Draft, source: int, *, max_rank: int = 5, inside: bool = False) -> bool:
    """An average over windows, whole images among them; zeros around them count.

    With `inside`, some pools count only what lies inside the image, all around codes of windows of three.
    """
    x, rng = draft.values[source], draft.rng
    if not 3 <= x.dim() <= max_rank:
        return False
    sides = x.shape[2:]
    pool = _POOLS["average"][len(sides) - 1]
    if inside and rng.random() < 0.25:
        draft.add("average_pool", lambda a: pool(a, 3, 1, 1, count_include_pad=False), source)
        return True
    kernel = list(sides) if rng.random() < 0.15 else [rng.randint(1, min(3, n)) for n in sides]
    stride = [rng.choice((1, 2)) for _ in sides]
    padding = [rng.randint(0, k // 2) for k in kernel] if rng.random() < 0.3 else [0] * len(sides)
    draft.add("average_pool", lambda a: pool(a, kernel, stride, padding), source)
    return True


def max_pool(draft: Draft, source: int, *, max_rank: int = 5, is_spread: bool = True) -> bool:
    """A maximum over windows, padded; with `is_spread`, dilated and past the last whole window, too."""
    x, rng = draft.values[source], draft.rng
    if not 3 <= x.dim() <= max_rank:
        return False
    sides = x.shape[2:]
    dilation = [rng.choice((1, 1, 2)) if is_spread else 1 for _ in sides]
    kernel = [rng.randint(1, max(1, min(3, (n - 1) // d + 1))) for n, d in zip(sides, dilation, strict=True)]
    stride = [rng.choice((1, 2)) for _ in sides]
    padding = [rng.randint(0, k // 2) for k in kernel]
    is_ceil = is_spread and rng.random() < 0.3
    pool = _POOLS["max"][len(sides) - 1]
    kind = "max_pool" + ("_dilated" if max(dilation) > 1 else "") + ("_ceil" if is_ceil else "")
    draft.add(kind, lambda a: pool(a, kernel, stride, padding, dilation, is_ceil), source)
    return True


def whole(draft: Draft, source: int) -> bool:
    """The average over the whole image."""
    x = draft.values[source]
    if not 3 <= x.dim() <= 5:
        return False
    pool = _POOLS["whole"][x.dim() - 3]
    draft.add("global_average_pool", lambda a: pool(a, 1), source)
    return True


def reduction(draft: Draft, source: int, *, functions: Mapping[str, Callable[..., Tensor]]) -> bool:
    """A mean or an extremum over some axes, never the batch."""
    x, rng = draft.values[source], draft.rng
    if x.dim() < 3:
        return False
    axes = sorted(rng.sample(range(1, x.dim()), rng.randint(1, x.dim() - 2)))
    keep, kind = rng.random() < 0.5, rng.choice(list(functions))
    call = functions[kind]
    draft.add(kind, lambda a: call(a, axes, keepdim=keep), source)
    return True


def function(draft: Draft, source: int, *, functions: Mapping[str, Function]) -> bool:
    """A function of one value; `leaky_relu` gets a slope."""
    slope = draft.rng.choice((0.01, 0.1, 0.125, 0.3))
    kind = draft.rng.choice([*functions, "leaky_relu"])
    draft.add(kind, functions.get(kind, lambda a: F.leaky_relu(a, slope)), source)
    return True


def movement(draft: Draft, source: int, *, kinds: Sequence[str]) -> bool:
    """The same values elsewhere, by one of the ways that suit."""
    x, rng = draft.values[source], draft.rng
    axis = rng.randrange(1, x.dim())
    size = x.shape[axis]
    first, times = rng.randrange(size), rng.randint(2, 3)
    others = list(range(1, x.dim()))
    rng.shuffle(others)
    repeats = [times if i == axis else 1 for i in range(x.dim())]
    pads = [1, *(rng.randint(0, 2) for _ in range(2 * min(x.dim() - 1, 2) - 1))]
    spread = [rng.randint(2, 3) if n == 1 and i else -1 for i, n in enumerate(x.shape)]
    ways: dict[str, tuple[bool, Function]] = {
        "flatten": (x.dim() > 2, lambda a: torch.flatten(a, 1)),
        "reshape": (x.dim() > 3, lambda a: a.reshape(a.shape[0], a.shape[1], -1)),
        "unsqueeze": (x.dim() < 4, lambda a: a.unsqueeze(axis)),
        "squeeze": (size == 1 and x.dim() > 2, lambda a: a.squeeze(axis)),
        "transpose": (x.dim() > 2, lambda a: a.permute(0, *others)),
        "slice": (True, lambda a: a.narrow(axis, first, size - first)),
        "strided_slice": (True, lambda a: a[:, first % a.shape[1] :: 2]),
        "select": (x.dim() > 2, lambda a: a.select(axis, first)),
        "split": (size > 1, lambda a: torch.cat(a.chunk(2, axis)[::-1], axis)),
        "chunk": (size > 1, lambda a: a.chunk(2, axis)[first % 2]),
        "expand": (max(spread) > 1, lambda a: a.expand(spread)),
        "tile": (x.numel() < 2000, lambda a: a.repeat(repeats)),
        "pixel_shuffle": (x.dim() == 4 and x.shape[1] % 4 == 0, lambda a: F.pixel_shuffle(a, 2)),
        "pixel_unshuffle": (
            x.dim() == 4 and not any(n % 2 for n in x.shape[2:]), lambda a: F.pixel_unshuffle(a, 2)
        ),
        "pad": (True, lambda a: F.pad(a, pads)),
        "reflect": (x.dim() == 4 and min(x.shape[2:]) > 2, lambda a: F.pad(a, pads, "reflect")),
    }  # fmt: skip
    able = [kind for kind in kinds if ways[kind][0]]
    if not able:
        return False
    kind = rng.choice(able)
    draft.add(kind, ways[kind][1], source)
    return True


def shuffled_channels(draft: Draft, source: int) -> bool:
    """A convolution to four or eight channels, and a pixel shuffle of them."""
    x = draft.values[source]
    if x.dim() != 4 or x.numel() > 1500:
        return False
    draft.add("conv", nn.Conv2d(x.shape[1], 4 * draft.rng.randint(1, 2), 1), source)
    draft.add("pixel_shuffle", lambda a: F.pixel_shuffle(a, 2), draft.last)
    return True


def last_axis(draft: Draft, source: int, *, functions: Mapping[str, Callable[..., Tensor]]) -> bool:
    """A function along the last axis: softmax and the like."""
    if draft.values[source].dim() > 4:
        return False
    kind = draft.rng.choice(list(functions))
    call = functions[kind]
    draft.add(kind, lambda a: call(a, -1), source)
    return True


def resize(draft: Draft, source: int, *, modes: Sequence[str]) -> bool:
    """An image made larger or smaller."""
    x, rng = draft.values[source], draft.rng
    if x.dim() != 4 or x.numel() > 1500:
        return False
    mode, sizes = rng.choice(modes), [rng.randint(1, 2 * n) for n in x.shape[2:]]
    align: dict[str, Any] = {} if mode == "nearest" else {"align_corners": False}
    draft.add(f"resize_{mode}", lambda a: F.interpolate(a, size=sizes, mode=mode, **align), source)
    return True
