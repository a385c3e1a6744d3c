# SPDX-License-Identifier: Apache-2.0
"""Which targets a text asks for: names, paths, patterns, all."""

from pathlib import Path

import pytest

from qhw.comparison import target_names
from qhw.errors import TargetError
from qhw.extension import Registry, load_plugins


class Targets:
    """A plugin with three targets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def qhw_plugin_info(self) -> object:
        from qhw.extension import PluginInfo

        return PluginInfo(api=1, summary="Three targets.")

    def qhw_register_targets(self) -> list[Path]:
        return [self.folder]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    for name in ("acme/one", "acme/two", "other/one"):
        path = tmp_path / f"{name}.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'schema_version = 1\nname = "{name}"\n')
    from qhw.extension import hookimpl

    plugin = Targets(tmp_path)
    for hook in ("qhw_plugin_info", "qhw_register_targets"):
        setattr(Targets, hook, hookimpl(getattr(Targets, hook)))
    return load_plugins(block=(), entry_points=(), extra=[("three", plugin)])


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("all", ("acme/one", "acme/two", "other/one")),
        ("acme/*", ("acme/one", "acme/two")),
        ("*/one", ("acme/one", "other/one")),
        ("acme/[t]*", ("acme/two",)),
        ("other/one,acme/*", ("other/one", "acme/one", "acme/two")),
        (" other/one , ,other/one", ("other/one",)),
        (["acme/two", "all"], ("acme/two", "acme/one", "other/one")),
    ],
)
def test_names_come_once_in_the_order_asked_for(registry: Registry, wanted: object, found: tuple[str, ...]) -> None:
    assert target_names(wanted, registry) == found  # type: ignore[arg-type]


def test_a_path_is_taken_as_it_is(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "acme" / "one.toml"
    assert target_names(f"acme/two,{path}", registry) == ("acme/two", str(path))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("acme/on", "no target 'acme/on'. Closest: acme/one. All: qhw target list"),
        ("nobody/*", "targets: no target fits 'nobody/*'. All: qhw target list"),
        ("gone.toml", "targets: gone.toml: no such file. Check the path."),
        (" , ", 'targets: none is named. Give names with commas between, "vendor/*", or "all".'),
    ],
)
def test_what_fits_nothing_is_refused_before_any_work(registry: Registry, wanted: str, message: str) -> None:
    with pytest.raises(TargetError) as caught:
        target_names(wanted, registry)
    assert str(caught.value) == message
