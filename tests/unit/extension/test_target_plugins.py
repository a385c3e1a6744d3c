# SPDX-License-Identifier: Apache-2.0
"""Which plugins are imported for their targets alone: all that may bring some, and no others."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from qhw.errors import PluginError
from qhw.extension import load_target_plugins
from qhw.extension.target_plugins import may_register

HOOK = "qhw_register_targets"
CASES = {
    "defines the hook": (f"def {HOOK}(): ...", True),
    "imports the hook": (f"from other import {HOOK}", True),
    "takes all names of another module": ("from other import *", True),
    "takes all names, oddly spaced": ("from other import  (*)", True),
    "writes into its globals": ("globals()['qhw_' + 'register_targets'] = print", True),
    "runs a text": ("exec(text)", True),
    "finds itself among the modules": ("import sys\nsys.modules[__name__]", True),
    "says what names it has": ("def __dir__(): ...", True),
    "brings something else": ("def qhw_register_algorithms(): ...", False),
    "has the letters of a binder": ("executor = local = 1\nmodel.vars(1)\nx = y * z", False),
}


def point(name: str, attribute: str = "") -> metadata.EntryPoint:
    return metadata.EntryPoint("one", name + (f":{attribute}" if attribute else ""), "qhw")


@pytest.mark.parametrize("case", CASES)
def test_a_plugin_is_left_alone_only_where_it_cannot_have_the_hook(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = CASES[case]
    (tmp_path / "a_quiet_plugin.py").write_text(f"raise RuntimeError\n{source}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert may_register(point("a_quiet_plugin"), HOOK) is expected
    assert "a_quiet_plugin" not in sys.modules


def test_what_cannot_be_read_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_parent").mkdir()
    (tmp_path / "broken_parent/__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    for name in ("broken_parent.child", "no_such_module_anywhere", "latin"):
        assert may_register(point(name), HOOK)
    assert may_register(point("json", "loads"), HOOK), "an object may have any attribute"


def test_the_targets_are_those_of_the_whole_registry() -> None:
    from qhw.extension import default_registry

    light, whole = load_target_plugins(), default_registry()
    assert dict(light.targets) == dict(whole.targets) and light.target_names()
    assert set(light.plugins) <= set(whole.plugins) and not light.algorithms


def test_blocked_plugins_bring_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not load_target_plugins(block="targets").targets
    monkeypatch.setenv("QHW_BLOCK", "targets")
    assert not load_target_plugins().targets


def test_a_broken_plugin_without_targets_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_round.py").write_text("raise RuntimeError('no torch')\n")
    (tmp_path / "broken_targets.py").write_text(f"raise RuntimeError('no disk')\ndef {HOOK}(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not load_target_plugins(entry_points=[point("broken_round")]).targets
    with pytest.raises(PluginError, match=r"plugin 'one' .*: import of 'broken_targets' failed: RuntimeError: no disk"):
        load_target_plugins(entry_points=[point("broken_targets")])


def test_no_heavy_module_is_loaded() -> None:
    code = (
        "import sys\nfrom qhw.extension import load_target_plugins\nassert load_target_plugins().targets\n"
        "print([name for name in ('torch', 'numpy', 'onnx') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60, env=environment)
    assert done.stdout.strip() == "[]", done.stderr
