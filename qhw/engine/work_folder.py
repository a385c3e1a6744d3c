# SPDX-License-Identifier: Apache-2.0
"""The work folder: finished layers, kept in files while a run goes on, so that the same run goes on after a kill.

A layer is read back only where everything that decides it is the same, and only behind layers that were read back
too; whatever else lies in the folder is passed over. Files that qhw did not write are never touched.
"""

import hashlib
import json
import logging
import os
import platform
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

from qhw import __version__
from qhw.decisions import QuantPlan
from qhw.engine.kept_layer import Facts, KeptLayer, from_bytes, to_bytes
from qhw.errors import ResultError
from qhw.extension import AlgorithmOptions
from qhw.extension.plugin import PluginRecord

__all__ = ["KeptStep", "WorkFolder", "facts_of"]

_OURS = re.compile(r"\d+-\d+-\d+\.layer\.safetensors|\.qhw-\w+\.partial")
_log = logging.getLogger("qhw")


class WorkFolder:
    """Finished layers in files. Use it in a `with` block around a run: one that ends well takes them away.

    The folder is made when the first layer is kept. What an error or Ctrl-C ends leaves the layers where they are.

    Args:
        path: Where; the folder may exist, and hold other files.

    Attributes:
        path: The folder.
        read: Layers read back so far.
        written: Layers written so far.

    Raises:
        ResultError: on entering: the path is a file, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.read = 0
        self.written = 0
        self._is_ours = False
        self._is_said = False
        self._is_full = False

    def __enter__(self) -> "WorkFolder":
        place = next(part for part in (self.path, *self.path.parents) if os.path.lexists(part))
        what = None
        if not place.is_dir():
            what = f"'{place}' is a file, not a folder"
        elif not os.access(place, os.W_OK | os.X_OK):
            what = f"'{place}' is not writable"
        if what is not None:
            raise ResultError(
                f"{self.path}: must be a folder that can be written, for layers that are done; {what}. "
                "Move it, or choose another place (--out, in Python work_folder=)."
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._remove_files()
        if self._is_ours:
            with suppress(OSError):  # it holds something
                self.path.rmdir()

    @property
    def kept(self) -> int:
        """Layers of this run that lie in the folder."""
        return self.read + self.written

    def load(self, name: str, facts: Facts) -> KeptLayer | None:
        """A layer that was kept under these very facts; None where there is none. Never raises for what a file holds.

        Args:
            name: Of the file.
            facts: Everything that decides the layer.
        """
        try:
            content = (self.path / name).read_bytes()
        except OSError:
            return None
        try:
            found, layer = from_bytes(content)
        except ResultError as error:
            self._pass_over(name, str(error))
            return None
        wrong = next((key for key in dict.fromkeys((*facts, *found)) if facts.get(key) != found.get(key)), None)
        if wrong is not None:
            self._pass_over(name, f"is of another run ({wrong} differs)")
            return None
        self.read += 1
        if self.read == 1:
            _log.info("%s: going on; finished layers are read back.", self.path)
        return layer

    def _pass_over(self, name: str, why: str) -> None:
        """Say that a file is not used; once, since the others will be the same."""
        if not self._is_said:
            _log.warning("%s: %s; it is not used, and the work is done anew.", self.path / name, why)
            self._is_said = True

    def save(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all. A disk that fails ends the keeping, not the run."""
        if self._is_full:
            return
        partial = None
        try:
            if not self.path.is_dir():
                self.path.mkdir(parents=True)
                self._is_ours = True
            handle, partial = tempfile.mkstemp(prefix=".qhw-", suffix=".partial", dir=self.path)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(partial).replace(self.path / name)
        except OSError as error:
            self._is_full = True
            _log.warning("%s: no more layers are kept: %s. The work goes on.", self.path, error.strerror or error)
        else:
            self.written += 1
        finally:
            if partial is not None:
                Path(partial).unlink(missing_ok=True)

    def _remove_files(self) -> None:
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if _OURS.fullmatch(path.name):
                with suppress(OSError):
                    path.unlink()
                    self._is_ours = True


class KeptStep:
    """The layers of one step of a plan: read back up to the first that is missing, written from there on.

    Args:
        folder: Where they lie.
        number: Of the step in the plan.
        facts: Everything that decides the step, but for what `begin` adds.
    """

    def __init__(self, folder: WorkFolder, number: int, facts: Facts) -> None:
        self._folder = folder
        self._number = number
        self._step_facts = facts
        self._facts: Facts = facts
        self._walks = 0
        self._is_reading = True

    def begin(self, facts: Facts) -> None:
        """Start a walk through layers, with more that decides it."""
        self._facts = {**self._step_facts, **facts}
        self._walks += 1

    def read(self, index: int, group: str) -> KeptLayer | None:
        """The layer as it was kept; None from the first one on that was not."""
        layer = self._folder.load(self._name(index), self._of(group)) if self._is_reading else None
        self._is_reading = layer is not None
        return layer

    def write(self, index: int, group: str, layer: KeptLayer) -> None:
        """Keep a layer; those behind it are not read back any more."""
        self._is_reading = False
        self._folder.save(self._name(index), to_bytes(layer, self._of(group)))

    def _name(self, index: int) -> str:
        return f"{self._number:02}-{self._walks:02}-{index:04}.layer.safetensors"

    def _of(self, group: str) -> Facts:
        return {**self._facts, "group": group}


def facts_of(plan: QuantPlan, number: int, options: AlgorithmOptions, record: PluginRecord, seed: int) -> Facts:
    """Everything that decides one step of a plan, but for the data and the model's state when it begins.

    Args:
        plan: As it is applied; steps behind this one do not count.
        number: Of the step.
        options: Of its algorithm, all of them.
        record: The plugin that brings it.
        seed: Of the run.
    """
    steps = [step.model_dump(mode="json", exclude={"verdict", "left_out"}) for step in plan.steps[: number + 1]]
    decided = {**plan.model_dump(mode="json", include={"operators", "points"}), "steps": steps}
    return {
        "format": 1,
        "qhw": __version__,
        "torch": str(torch.__version__),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),  # a product of matrices may be summed in another order
        "model": plan.model_fingerprint,
        "target": plan.target_fingerprint,
        "algorithm": plan.steps[number].algorithm,
        "plugin": record.label,
        "options": options.model_dump(mode="json"),
        "seed": seed,
        "plan": hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest(),
    }
