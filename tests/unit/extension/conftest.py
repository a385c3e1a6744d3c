# SPDX-License-Identifier: Apache-2.0
"""A folder that plugins are installed into, as pip leaves them: modules and their dist-info."""

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

INFO = """
from qhw.extension import PluginInfo, hookimpl

@hookimpl
def qhw_plugin_info():
    return PluginInfo(api=1, summary="{name} for tests")
"""


class Site:
    """Installs plugins into a folder on the import path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str, body: str = "", *, version: str = "1.2", dist: str = "", info: bool = True) -> None:
        """A distribution `<name>-dist` with the one module `<name>_plugin`, found as plugin `<name>`."""
        dist = dist or f"{name}-dist"
        module = f"{dist.replace('-', '_')}_plugin"
        text = (INFO.format(name=name) if info else "") + body
        (self.folder / f"{module}.py").write_text(text)
        dist_info = self.folder / f"{dist.replace('-', '_')}-{version}.dist-info"
        dist_info.mkdir()
        (dist_info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        (dist_info / "entry_points.txt").write_text(f"[qhw]\n{name} = {module}\n")

    def entry_points(self) -> list[metadata.EntryPoint]:
        """The entry points of what is installed here, and of nothing else."""
        return [point for dist in metadata.distributions(path=[str(self.folder)]) for point in dist.entry_points]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("QHW_BLOCK", raising=False)
    yield Site(folder)
    for name in [name for name in sys.modules if name.endswith("_dist_plugin")]:
        del sys.modules[name]
