# SPDX-License-Identifier: Apache-2.0
"""Copying a captured module: `copy.deepcopy` in a fifth of its time, and with shared tensors where they may be."""

import copy

import torch
from torch import Tensor, fx, nn

__all__ = ["copied"]


def copied(module: fx.GraphModule, *, share_tensors: bool = False) -> fx.GraphModule:
    """A copy with a graph, modules and (unless shared) tensors of its own.

    A captured module consists of containers, batch norms, dropouts and quantizers: apart from tensors, submodules and
    dicts their attributes are plain immutable values. What is shared inside the module is shared inside the copy.

    Args:
        module: Captured, with or without inserted modules.
        share_tensors: Keep the module's own parameters and buffers.
    """
    tensors: dict[int, Tensor] = {}

    def tensor(value: Tensor | None) -> Tensor | None:
        if value is None or share_tensors:
            return value
        if id(value) not in tensors:
            tensors[id(value)] = _copied_tensor(value)
        return tensors[id(value)]

    modules: dict[int, nn.Module] = {}

    def submodule(old: nn.Module | None) -> nn.Module | None:
        if old is None:
            return None
        if id(old) not in modules:
            modules[id(old)] = new = old.__class__.__new__(old.__class__)
            fill(new, old)
        return modules[id(old)]

    def fill(new: nn.Module, old: nn.Module) -> None:
        for key, value in old.__dict__.items():
            if key == "_parameters" or key == "_buffers":
                new.__dict__[key] = {name: tensor(held) for name, held in value.items()}
            elif key == "_modules":
                new.__dict__[key] = {name: submodule(held) for name, held in value.items()}
            else:
                new.__dict__[key] = value.copy() if isinstance(value, dict | set | list) else value

    result = fx.GraphModule(nn.Module(), fx.Graph(), class_name=module.__class__.__name__)
    root = nn.Module()
    fill(root, module)
    for key in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"):
        result.__dict__[key] = root.__dict__[key]
    result.graph = copy.deepcopy(module.graph)
    return result


def _copied_tensor(value: Tensor) -> Tensor:
    with torch.no_grad():
        clone = value.detach().clone(memory_format=torch.preserve_format)
    return nn.Parameter(clone, value.requires_grad) if isinstance(value, nn.Parameter) else clone
