# SPDX-License-Identifier: Apache-2.0
"""Wheels built from copies, and fresh virtual environments to try them in. No network is used."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What a checkout may hold beside its sources. An old egg-info would decide what the source archive holds.
_LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "__pycache__")
_SCRIPTS = "Scripts" if os.name == "nt" else "bin"


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own; commands run in `work`, a folder outside the checkout."""

    folder: Path
    work: Path

    @property
    def site_packages(self) -> Path:
        """Where pip puts what it installs."""
        text = self.python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout
        return Path(text.strip())

    def run(
        self, program: str, *arguments: str, fails: bool = False, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment; a failure fails the test, with what the program printed."""
        command = [str(self.folder / _SCRIPTS / program), *arguments]
        return run(command, self.work, fails=fails, variables=variables)

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python."""
        return self.run("python", *arguments)

    def install(self, *wheels: Path) -> None:
        """Install wheels and nothing else."""
        self.python("-m", "pip", "install", "-q", "--no-index", "--no-deps", *map(str, wheels))

    def uninstall(self, distribution: str) -> None:
        """Remove a distribution."""
        self.python("-m", "pip", "uninstall", "-q", "-y", distribution)


def run(
    command: list[str], folder: Path, fails: bool = False, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, free of this process's Python and plugin settings."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "QHW_BLOCK")}
    clean |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "COLUMNS": "200", **(variables or {})}
    done = subprocess.run(command, cwd=folder, env=clean, text=True, capture_output=True, encoding="utf-8", timeout=300)
    assert (done.returncode != 0) == fails, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def build(source: Path, folder: Path) -> tuple[Path, Path]:
    """The source archive of a project, and the wheel built from that archive; the project's folder stays as it is."""
    copy = folder / "source"
    shutil.copytree(source, copy, ignore=_LEFT_OUT)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(copy)], folder)
    (archive,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return archive, wheel


def make_environment(folder: Path, *wheels: Path) -> Environment:
    """A fresh environment with these wheels in it.

    It sees the packages of the environment that runs the tests, behind its own, so that torch need not be installed
    again. Path files of that environment, editable installs among them, do not count there.
    """
    run([sys.executable, "-m", "venv", str(folder / "venv")], folder)
    work = folder / "work"
    work.mkdir()
    environment = Environment(folder / "venv", work)
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (environment.site_packages / "behind.pth").write_text("".join(f"{path}\n" for path in seen), encoding="utf-8")
    environment.install(*wheels)
    return environment
