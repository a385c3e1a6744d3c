# SPDX-License-Identifier: Apache-2.0
"""Targets by name or by file, without importing an algorithm: only plugins that may bring targets are looked at."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qhw.extension import Registry
    from qhw.schema import LoadedTarget

__all__ = ["Shelf"]


class Shelf:
    """The targets at hand; plugins are looked for when a name needs them."""

    @cached_property
    def registry(self) -> "Registry":
        """The plugins that bring targets."""
        from qhw.extension import load_target_plugins

        return load_target_plugins()

    def path(self, name: str) -> Path:
        """The file of a target: the path itself, or where a plugin has the name.

        Raises:
            TargetError: no plugin has it; says which come closest.
        """
        return Path(name) if name.endswith((".toml", ".json")) else self.registry.target_path(name)

    def load(self, name: str) -> "LoadedTarget":
        """A target with the places of its fields.

        Raises:
            TargetError: there is none, or its file does not describe one.
        """
        from qhw.schema import read_target_file

        return read_target_file(self.path(name), find_base=lambda base: self.registry.target_path(base))
