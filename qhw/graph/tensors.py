# SPDX-License-Identifier: Apache-2.0
"""Parameters and buffers of a module tree under dotted paths."""

from typing import Any

from torch import Tensor, nn

__all__ = ["assign", "fetch", "holds", "remove", "unused_path"]


def assign(root: nn.Module, path: str, value: Tensor | nn.Module) -> None:
    """Set a parameter, buffer or submodule under a dotted path, making modules on the way."""
    *parents, leaf = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    if isinstance(value, nn.Parameter):
        root.register_parameter(leaf, value)
    elif isinstance(value, Tensor):
        root.register_buffer(leaf, value)
    else:
        root.add_module(leaf, value)


def fetch(root: nn.Module, path: str) -> Tensor:
    """The parameter or buffer under a dotted path."""
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value  # type: ignore[no-any-return]


def holds(root: nn.Module, path: str) -> bool:
    """Whether anything lies under a dotted path."""
    try:
        fetch(root, path)
    except AttributeError:
        return False
    return True


def remove(root: nn.Module, path: str) -> None:
    """Take away what lies under a dotted path."""
    parent, _, leaf = path.rpartition(".")
    delattr(root.get_submodule(parent), leaf)


def unused_path(root: nn.Module, wanted: str) -> str:
    """A path under which nothing lies: the wanted one, with a number behind it where that is taken."""
    number, path = 0, wanted
    while holds(root, path):
        number += 1
        path = f"{wanted}_{number}"
    return path
