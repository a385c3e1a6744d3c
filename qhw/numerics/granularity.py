# SPDX-License-Identifier: Apache-2.0
"""How many elements of a tensor share one scale: all, those of one index, or those of one block."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qhw.errors import RangeError


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor.

    Example: x [32, 16, 8, 8] has scale [].
    """


@dataclass(frozen=True)
class PerAxis:
    """One scale per index of the axis that is kept.

    Args:
        axis: The axis kept, counted from 0. All other axes share the scale.

    Example: a convolution weight [64, 3, 7, 7] with PerAxis(0) has scale [64].
    """

    axis: int

    def __post_init__(self) -> None:
        _check_axis(self)


@dataclass(frozen=True)
class PerGroup:
    """One scale per block of `group_size` neighbours along one axis; every other axis keeps all of its indices.

    This is the blocked form of ONNX QuantizeLinear (opset 21, `axis` and `block_size`): the scale has the rank and
    the shape of x, except that the blocked axis has ceil(n / group_size) entries. The last block may be shorter.

    Args:
        axis: The axis that is cut into blocks, counted from 0. Note that `PerAxis.axis` is kept, this one is cut.
        group_size: Elements per block, at least 1.

    Example: a weight [out=64, in=100] with PerGroup(axis=1, group_size=32) has scale [64, 4]; the fourth block of each
    row has 4 elements. A convolution weight [64, 100, 3, 3] has scale [64, 4, 3, 3].
    """

    axis: int
    group_size: int

    def __post_init__(self) -> None:
        _check_axis(self)
        if self.group_size < 1:
            raise RangeError(f"{self}: group_size must be 1 or more; got {self.group_size}. Use PerTensor instead.")


Granularity = PerTensor | PerAxis | PerGroup


def _check_axis(granularity: PerAxis | PerGroup) -> None:
    if granularity.axis < 0:
        raise RangeError(f"{granularity}: axis must be 0 or more; got {granularity.axis}. Count axes from the front.")


def parameter_shape(granularity: Granularity, shape: tuple[int, ...], name: str = "tensor") -> tuple[int, ...]:
    """Shape of the scale of a tensor: (), (channels,), or the tensor's own with the blocked axis shortened.

    Args:
        granularity: How elements share scales.
        shape: Shape of the tensor.
        name: The tensor's name, for the message.

    Raises:
        RangeError: the tensor has no such axis.
    """
    if isinstance(granularity, PerTensor):
        return ()
    axis = granularity.axis
    if axis >= len(shape):
        raise RangeError(f"{name}: {granularity} needs {axis + 1} axes; got shape {tuple(shape)}. Lower the axis.")
    if isinstance(granularity, PerAxis):
        return (shape[axis],)
    groups = -(-shape[axis] // granularity.group_size)
    return (*shape[:axis], groups, *shape[axis + 1 :])


def expand(parameter: Tensor, granularity: Granularity, shape: tuple[int, ...]) -> Tensor:
    """A parameter in a shape that broadcasts against its tensor.

    Args:
        parameter: [*P], P as `parameter_shape` says.
        granularity: How elements share parameters.
        shape: Shape of the tensor.

    Returns:
        Tensor: [] per tensor; a view [1, ..., channels, ..., 1] per axis; a copy of the tensor's shape per group.
    """
    if isinstance(granularity, PerTensor):
        return parameter
    axis = granularity.axis
    if isinstance(granularity, PerAxis):
        return parameter.reshape(-1, *([1] * (len(shape) - axis - 1)))
    return parameter.repeat_interleave(granularity.group_size, dim=axis).narrow(axis, 0, shape[axis])


def to_rows(x: Tensor, granularity: Granularity, fill: float = 0.0) -> Tensor:
    """The elements that share a parameter, as the rows of a matrix.

    Args:
        x: [*shape].
        granularity: How elements share parameters.
        fill: What a ragged last group is padded with. 0.0 adds no quantization error, since 0.0 is exact on a grid.

    Returns:
        Tensor: [parameters, elements], parameters in the order of `parameter_shape(...)` flattened.
    """
    if isinstance(granularity, PerTensor):
        return x.reshape(1, -1)
    count = torch.Size(parameter_shape(granularity, tuple(x.shape))).numel()
    if x.numel() == 0:
        return x.new_empty((count, 0))
    if isinstance(granularity, PerAxis):
        return x.movedim(granularity.axis, 0).reshape(count, -1)
    axis, size = granularity.axis, granularity.group_size
    missing = -x.shape[axis] % size
    if missing:
        padding = x.new_full((*x.shape[:axis], missing, *x.shape[axis + 1 :]), fill)
        x = torch.cat([x, padding], dim=axis)
    blocked = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return blocked.movedim(axis + 1, -1).reshape(count, size)


def in_memory_order(x: Tensor) -> Tensor:
    """The same elements with their axes in the order of the memory, where that takes no copy.

    For reductions that do not depend on the order: over a channels-last tensor they take a tenth of the time this way.
    """
    if x.is_contiguous():
        return x
    permuted = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
    return permuted if permuted.is_contiguous() else x


def range_of(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Lowest and highest element of each parameter's share of a tensor; NaN where it holds a NaN.

    Args:
        x: float [*shape].
        granularity: How elements share parameters.

    Returns:
        tuple: lowest and highest, of x's dtype, [*P]. Without elements both are 0, the value every range contains.
    """
    shape = parameter_shape(granularity, tuple(x.shape))
    if x.numel() == 0:
        return x.new_zeros(shape), x.new_zeros(shape)
    if isinstance(granularity, PerTensor):
        low, high = in_memory_order(x).aminmax()
        return low, high
    if isinstance(granularity, PerAxis):
        others = [axis for axis in range(x.ndim) if axis != granularity.axis]
        return (x.amin(others), x.amax(others)) if others else (x.clone(), x.clone())
    low = to_rows(x, granularity, fill=float("inf")).amin(1)
    high = to_rows(x, granularity, fill=float("-inf")).amax(1)
    return low.reshape(shape), high.reshape(shape)
