# SPDX-License-Identifier: Apache-2.0
"""What a plugin's classes look like: algorithm, exporter, executor, reader, number format. Each says its recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from qhw.decisions import Rank, Resources, Stage, Step, StepReport, Survey, counted

if TYPE_CHECKING:
    from qhw.graph import Graph, Placement
    from qhw.legality import Artefact
    from qhw.numerics import ElementSet
    from qhw.schema import Format, TargetSpec


class AlgorithmOptions(BaseModel):
    """The base of every `Options`: frozen, strict, closed to unknown names.

    Every field needs a default, since pipelines call algorithms by name alone, and a description, since the command
    line shows it. Read it back from a plan with `model_validate_json`, so that JSON lists become tuples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Algorithm(ABC):
    """One step that chooses or improves qparams, weights or the graph.

    Recipe: one file, one class.

    1. `name` (as on the command line: `[a-z][a-z0-9_]*`), `stage` (one of `qhw.decisions.STAGES`) and `summary` (one
       line).
    2. `Options`, when there is something to set; annotate `options: Options` in the class to have it typed.
    3. `ranks`, to stand inside a pipeline that somebody else ships; a pipeline that names you needs none.
    4. `survey` decides, from its arguments alone, where the algorithm would act and why; it changes nothing.
    5. `apply` does what the step says, on the runner's working copy alone, and returns what it did.
    6. Hand the class to qhw from `qhw_register_algorithms`.

    Nothing is kept on `self` but `options`: one object may serve several models.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    summary: ClassVar[str]
    Options: ClassVar[type[AlgorithmOptions]] = AlgorithmOptions
    ranks: ClassVar[tuple[Rank, ...]] = ()

    options: AlgorithmOptions

    def __init__(self, options: AlgorithmOptions | None = None) -> None:
        """Store the options; absent, all defaults."""
        self.options = self.Options() if options is None else options

    @abstractmethod
    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """Where this algorithm would act, and the facts that decide it. Pure.

        Args:
            graph: The captured model, in the state of the stages before this one.
            points: Its quantization points and operator placements.
            target: The resolved target.
            resources: What the caller gave: calibration data, labels.

        Returns:
            Survey: a verdict on the algorithm as a whole, and a site with its verdict for each place. Each reason
            is (field path or graph fact, value, rule), so that a changed fact changes the verdict.
        """

    @abstractmethod
    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Do the step on the working copy.

        Args:
            work: The runner's working copy, the only thing that may be changed: its graph, and qparams by point.
            step: The sites to act on, as the plan says.
            context: What to work with: target, calibration stream, seed, progress.

        Returns:
            StepReport: what was done, site by site, as plain figures. Equal inputs give equal reports.
        """


class TrainingAlgorithm(Algorithm):
    """An algorithm of the stage `train`: it says what learns, and how.

    Nothing is trained when a plan is applied; the result waits as it is. `qhw.trainable` calls `attach`, the user's own
    loop trains, `qhw.freeze` turns what was learned into codes.

    Recipe: as `Algorithm`, with `attach` in place of `apply`.
    """

    stage = "train"

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Nothing yet: the sites wait for training."""
        sites = counted(len(step.sites), "site waits", "sites wait")
        return StepReport(stage=step.stage, algorithm=self.name, summary=f"{sites} for training (qhw.trainable)")

    @abstractmethod
    def attach(self, form: Any, step: Step) -> None:
        """Give the sites of a step what trains them.

        Args:
            form: The result on its way to training (`qhw.training.TrainingForm`): `set_quantizer`, `keep_norm`,
                `fold_each_step`, and all that a working copy has. The only thing that may be changed.
            step: The sites to act on, as the plan says.
        """


class Exporter(ABC):
    """Writes a result in a form that a toolchain takes.

    Recipe: one file, one class; `name` is what a target's file names as its exporter, `summary` one line, `Options`
    what may be set. `check` says what the form cannot hold before anything is written; `export` writes. Hand the
    class to qhw from `qhw_register_exporters`. `portable = True` when the artefact may stand in for a target that
    names no exporter.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type[AlgorithmOptions]] = AlgorithmOptions
    portable: ClassVar[bool] = False
    executor: ClassVar[str | None] = None

    options: AlgorithmOptions

    def __init__(self, options: AlgorithmOptions | None = None) -> None:
        """Store the options; absent, all defaults."""
        self.options = self.Options() if options is None else options

    @abstractmethod
    def check(self, result: Any) -> tuple[str, ...]:
        """What this form cannot say about the result, one line each with what to do; empty when all is well."""

    @abstractmethod
    def export(self, result: Any, folder: Path) -> tuple[Path, ...]:
        """Write the artefact.

        Args:
            result: A quantized model with its graph, plan and qparams. Not changed.
            folder: An existing, empty folder, moved into place by the caller once all is written.

        Returns:
            tuple[Path, ...]: the files written, the artefact itself first.

        Raises:
            ExportError: the form cannot hold the result.
        """


class NumberFormat(ABC):
    """What the codes of a format stand for, where they are no range of integers.

    Recipe: one file, one class; `name` is the word that target files write as `formats.*.kind`, `summary` one line.
    `problem` says what a format in a file lacks; `elements` makes the set. Further figures of the kind stand in the
    file as `formats.*.parameters`. Hand the class to qhw from `qhw_register_number_formats`.

    Ranges, rounding to nearest, simulation, training and result folders work on what `elements` returns. Algorithms
    that need neighbours one scale apart, integer execution and exporters for integers refuse such points in one line.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def problem(self, spec: Format) -> str | None:
        """What the format does not say or says wrongly, as "field: what must hold"; None when it is complete. Pure.

        Args:
            spec: The format, of this kind; the rules of the schema hold.
        """

    @abstractmethod
    def elements(self, spec: Format) -> ElementSet:
        """What codes stand for at scale 1: `qhw.numerics.ListedElements`, `FloatElements`, or a set of your own.

        Args:
            spec: A format without a problem.

        Returns:
            ElementSet: equal for equal formats.
        """


class Executor(ABC):
    """Runs an artefact in a runtime.

    Recipe: one file, one class; import the runtime inside the methods, never at the top, so that the plugin loads
    where the runtime is missing. Hand the class to qhw from `qhw_register_executors`. The constructor takes nothing.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def available(self) -> str | None:
        """None when the runtime can be used here, else the reason in one line with what to install."""

    @abstractmethod
    def load(self, artefact: Path) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
        """A function from inputs by name to the list of outputs, in the model's order.

        Raises:
            ExportError: the runtime refuses the artefact.
        """

    def load_codes(self, artefact: Path) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] | None:
        """A function from inputs by name to the integer codes of quantized tensors, by their names in the plan.

        None where the runtime does not show them. What it computes must be what `load` computes.

        Raises:
            ExportError: the runtime refuses the artefact.
        """
        return None

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Name and version of everything that decides the figures: the runtime, its libraries, CPU features used."""


class ArtefactReader(ABC):
    """Reads quantized models of one file format, for `qhw check`; made with qhw or not.

    Recipe: one file, one class. `recognizes` looks at the name and the first bytes and says whether the format is its
    own; `read` gives the model as data. A file is somebody else's: nothing in it may be run, every length and offset is
    checked, paths in it stay within its folder, and whatever is wrong is an `ArtefactError` of one line. Hand the class
    to qhw from `qhw_register_readers`. The constructor takes nothing.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def recognizes(self, path: Path, head: bytes) -> bool:
        """Whether a file is of this format.

        Args:
            path: The file; its suffix may help.
            head: Its first bytes, at most 4096.
        """

    @abstractmethod
    def read(self, path: Path, model: Path | None) -> Artefact:
        """The model.

        Args:
            path: The file.
            model: The model that the file belongs to, where the format holds encodings alone; else None.

        Raises:
            ArtefactError: the file cannot be read, or does not hold together.
        """
