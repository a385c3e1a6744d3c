# SPDX-License-Identifier: Apache-2.0
"""Example inputs: one tensor, a tuple, or a dict by name, brought to one form."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qhw.errors import CaptureError

__all__ = ["ExampleInputs", "as_call", "batch_of", "double_batch", "dynamic_shapes", "fresh"]

ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""What users pass as example inputs: a tensor, a tuple of positional inputs, or a dict by input name."""


def as_call(example: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for `model(*args, **kwargs)`.

    Raises:
        CaptureError: not tensors, none at all, or some inside a container.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, Mapping):
        kwargs = {str(name): value for name, value in example.items()}
    elif isinstance(example, tuple | list):
        args = tuple(example)
    else:
        kind = type(example).__name__
        raise CaptureError(f"example_inputs: must be a tensor, a tuple of tensors or a dict by input name; got {kind}.")
    values = [*args, *kwargs.values()]
    if not any(isinstance(leaf, Tensor) for leaf in torch.utils._pytree.tree_leaves(values)):
        raise CaptureError("example_inputs: no tensor among them. Pass one example batch, as the model takes it.")
    for where, value in (*((f"input {i}", v) for i, v in enumerate(args)), *((f"'{n}'", v) for n, v in kwargs.items())):
        _check_tensor(value, where)
    return args, kwargs


def _check_tensor(value: Any, where: str) -> None:
    """An input is a tensor: calibration data and artefacts have no place for anything else."""
    kind = type(value).__name__
    if isinstance(value, Mapping | tuple | list):
        raise CaptureError(
            f"example_inputs: {where} is a {kind}, and nested inputs are not supported. Let forward take each of its "
            "tensors as an input of its own."
        )
    if not isinstance(value, Tensor):
        raise CaptureError(
            f"example_inputs: {where} must be a tensor; got {kind}. Give it a default in forward and leave it out, or "
            "fix it in a module around the model."
        )


def batch_of(values: object) -> int:
    """Size of axis 0 of the first tensor that has one; 1 without.

    Raises:
        CaptureError: the batch is empty.
    """
    for leaf in torch.utils._pytree.tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            if leaf.shape[0] == 0:
                raise CaptureError("example_inputs: the batch (axis 0) is empty. Pass at least one sample.")
            return leaf.shape[0]
    return 1


def fresh(values: Any) -> Any:
    """The same values in tensors of their own, so that a model that writes into its inputs does not reach ours."""
    return torch.utils._pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, values)


def double_batch(values: Any) -> Any:
    """Repeat axis 0 of every tensor whose batch is 1: torch.export takes a size of 1 for a constant."""

    def repeat(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == 1:
            return leaf.repeat(2, *[1] * (leaf.dim() - 1))
        return leaf

    return torch.utils._pytree.tree_map(repeat, values)


def dynamic_shapes(values: Any, batch: int) -> Any:
    """Axis 0 of every tensor that has the batch size there is dynamic, all else is fixed."""

    def axes(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch:
            return {0: torch.export.Dim.DYNAMIC}
        return None

    return torch.utils._pytree.tree_map(axes, values)
