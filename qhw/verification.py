# SPDX-License-Identifier: Apache-2.0
"""`qhw.verify`: the integer result beside the simulation, and beside the artefact in the vendor's runtime."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qhw.api import exporter_for
from qhw.engine import (
    MICRO_BATCH,
    Calibration,
    CalibrationData,
    Progress,
    QuantizedModel,
    RichProgress,
    blaming,
    default_progress,
)
from qhw.errors import CalibrationError, IntegerError
from qhw.extension import Registry, default_registry
from qhw.integer import Difference, IntegerModel, Proof, differences, prove_accumulators, simulated_codes
from qhw.integer.float_result import in_float

__all__ = ["Remainder", "Verification", "check_rest", "verify"]

_Codes = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Verification:
    """What was compared, and how it came out.

    Attributes:
        samples: How many samples were run.
        simulated: Integer codes against the simulation's, tensor by tensor in execution order. The simulation rounds
            in float32: single codes may differ near ties, and what differs is passed on.
        artefact: Integer codes against those of the artefact in its runtime; empty where it was not run.
        runtime: Its name and versions; empty where it was not run.
        not_run: Why the artefact was not run, in words; None where it was.
        host: Operators that run in float32: on the host, or with a float result.
        overflowing: Operators whose sums some input makes overflow.
    """

    samples: int
    simulated: tuple[Difference, ...]
    artefact: tuple[Difference, ...]
    runtime: dict[str, str]
    not_run: str | None
    host: tuple[str, ...]
    overflowing: tuple[str, ...] = ()

    @property
    def first_difference(self) -> Difference | None:
        """The first tensor whose codes differ between the integer result and the artefact."""
        return next((one for one in self.artefact if one.differing), None)

    @property
    def is_proven(self) -> bool:
        """Whether the artefact was run and every code that was compared is the same."""
        return bool(self.artefact) and self.first_difference is None


@dataclass(frozen=True)
class Remainder:
    """What can be checked of a result that cannot be computed in integers.

    Attributes:
        proven: Operators whose sums no input makes overflow.
        overflowing: Operators whose sums some input makes overflow.
        unbounded: Operators whose accumulator's width the target leaves open.
        samples: How many samples were run; 0 where the artefact was not.
        simulated: The simulation's codes against those of the artefact in its runtime, tensor by tensor. Both may
            round in their own way: single codes differ near ties, and that alone is no mistake.
        runtime: Its name and versions; empty where it was not run.
        not_run: Why the artefact was not run, in words; None where it was.
    """

    proven: tuple[str, ...]
    overflowing: tuple[str, ...]
    unbounded: tuple[str, ...]
    samples: int
    simulated: tuple[Difference, ...]
    runtime: dict[str, str]
    not_run: str | None


def verify(
    result: QuantizedModel,
    data: CalibrationData | None = None,
    *,
    artefact: Path | None = None,
    progress: Progress | None = None,
    registry: Registry | None = None,
) -> Verification:
    """Run a result in exact integer arithmetic, as its target defines it, and compare code by code.

    Args:
        result: The quantized model.
        data: Samples, as `qhw.quantize` takes them; absent: those that the result keeps.
        artefact: The exported file; it is run where the target or the exporter names an executor that is installed,
            and where this machine computes as the target says.
        progress: Where progress is shown; absent: a bar on a terminal.
        registry: Plugins to use; absent: all that are installed.

    Raises:
        IntegerError: the target leaves open what decides the integer result; names the fields.
        CalibrationError: there is no sample, or one that does not fit.
    """
    registry, progress = registry or default_registry(), progress or default_progress()
    (model,) = progress.track(_lowered(result), "verify: lower", 1)
    call, runtime, not_run = _runtime(result, artefact, registry)
    simulated: dict[str, Difference] = {}
    artefacts: dict[str, Difference] = {}
    samples = 0
    with _bars(progress):
        for batch in _tracked(batches_of(result, data, "verify"), "verify", progress):
            samples += len(batch[0])
            mine = model.codes(*batch)
            _add(simulated, differences(mine, simulated_codes(result, *batch)))
            if call is not None:
                _add(artefacts, differences(mine, _runtime_codes(result, call, batch)))
    if call is not None and simulated and not artefacts:
        raise IntegerError(f"{artefact}: shows codes of no tensor of this result. Export the result again.")
    host = in_float(result)
    overflowing = tuple(proof.operator for proof in _proofs(result, progress) if proof.overflowing_channels)
    compared = tuple(simulated.values()), tuple(artefacts.values())
    return Verification(samples, *compared, runtime, not_run, host, overflowing)


def check_rest(
    result: QuantizedModel,
    data: CalibrationData | None = None,
    *,
    artefact: Path | None = None,
    progress: Progress | None = None,
    registry: Registry | None = None,
) -> Remainder:
    """What can be checked where `verify` refuses: sums, and the simulation beside the artefact in its runtime.

    Args:
        result: The quantized model.
        data: As `verify` takes it.
        artefact: As `verify` takes it.
        progress: As `verify` takes it.
        registry: As `verify` takes it.

    Raises:
        CalibrationError: a sample does not fit.
    """
    progress = progress or default_progress()
    proofs = list(_proofs(result, progress))
    proven = tuple(p.operator for p in proofs if p.bits is not None and not p.overflowing_channels)
    overflowing = tuple(p.operator for p in proofs if p.overflowing_channels)
    unbounded = tuple(p.operator for p in proofs if p.bits is None)
    call, runtime, not_run = _runtime(result, artefact, registry or default_registry())
    if call is not None and data is None and not result.samples:
        call, runtime, not_run = None, {}, "there are no samples"
    if call is None:
        return Remainder(proven, overflowing, unbounded, 0, (), runtime, not_run)
    simulated: dict[str, Difference] = {}
    samples = 0
    with _bars(progress):
        for batch in _tracked(batches_of(result, data, "verify"), "verify", progress):
            samples += len(batch[0])
            _add(simulated, differences(simulated_codes(result, *batch), _runtime_codes(result, call, batch)))
    return Remainder(proven, overflowing, unbounded, samples, tuple(simulated.values()), runtime, None)


def _lowered(result: QuantizedModel) -> Iterator[IntegerModel]:
    """One item, made while its bar is shown: large tables take seconds."""
    yield IntegerModel(result)


@contextmanager
def _bars(progress: Progress) -> Iterator[None]:
    """Take bars away where the work between two steps ends with an error: they would draw over its message."""
    try:
        yield
    finally:
        if isinstance(progress, RichProgress):
            progress.stop()


def _tracked(data: Calibration, label: str, progress: Progress) -> Iterator[tuple[Tensor, ...]]:
    """Batches one by one, none kept."""
    total = None if data.num_samples is None else -(-data.num_samples // MICRO_BATCH)
    return progress.track(data, label, total)


def _proofs(result: QuantizedModel, progress: Progress) -> Iterator[Proof]:
    weighted = {name for p in result.plan.points if p.role == "weight" for name in (p.operator, *p.consumers)}
    return progress.track(prove_accumulators(result, witnesses=False), "accumulators", len(weighted))


def _runtime_codes(result: QuantizedModel, call: _Codes, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    theirs = call({name: x.numpy() for name, x in zip(result.input_names, batch, strict=True)})
    return {name: torch.from_numpy(codes) for name, codes in theirs.items()}


def _add(total: dict[str, Difference], found: Iterable[Difference]) -> None:
    for one in found:
        total[one.tensor] = total[one.tensor] + one if one.tensor in total else one


def batches_of(result: QuantizedModel, data: CalibrationData | None, doing: str) -> Calibration:
    """Batches of given data, or of the samples that a result keeps.

    Raises:
        CalibrationError: there are none.
    """
    if data is None and not result.samples:
        raise CalibrationError(f"{doing}: the result keeps no samples. Pass data= (--data DATA).")
    source: Any = {name: result.samples[name] for name in result.input_names} if data is None else data
    if isinstance(source, Calibration):
        return source
    return Calibration(source, result.float_graph, name="data")


def _runtime(
    result: QuantizedModel, artefact: Path | None, registry: Registry
) -> tuple[_Codes | None, dict[str, str], str | None]:
    """The artefact's codes as a function, and the runtime's versions; or why there are none."""
    if artefact is None:
        return None, {}, "there is no artefact"
    own = result.target.artefact.executor if result.target.artefact is not None else None
    if own is None:
        portable = exporter_for(result.target, registry=registry).executor
        other = f"; its portable artefact runs in {portable}, which computes otherwise" if portable else ""
        return None, {}, f"'{result.target.name}' names no executor{other}"
    if own not in registry.executors:
        return None, {}, f"no installed plugin brings the executor '{own}'"
    entry = registry.executors[own]
    with blaming(entry.record, f"executor '{own}'"):
        executor = entry.value()
        reason = executor.available()
        if reason is not None:
            return None, {}, reason
        versions = executor.versions()
        missing = _missing_flags(result, versions)
        if missing is not None:
            return None, {}, missing
        codes = executor.load_codes(artefact)
    if codes is None:
        return None, {}, f"the executor '{own}' shows no codes"
    return codes, versions, None


def _missing_flags(result: QuantizedModel, versions: Mapping[str, str]) -> str | None:
    """Why this machine cannot stand for the target: none of the CPU features that its arithmetic needs."""
    wanted = result.target.artefact.host_cpu_flags if result.target.artefact is not None else None
    if not isinstance(wanted, tuple):
        return None
    if not set(wanted) & set(versions.get("cpu", "").split()):
        return f"cannot verify here: this machine has none of the CPU features {', '.join(wanted)}"
    return None
