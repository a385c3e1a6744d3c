# SPDX-License-Identifier: Apache-2.0
"""Everything around the kernels: the boundary, the artefact, the network as a whole, memories, clocks, conflicts."""

from collections.abc import Iterator
from typing import Annotated, Literal

from qhw.schema.base import Amount, Count, Id, Positive, Problem, Says, Table, Tags, Unknown, Word, recorded, used

__all__ = ["Artefact", "Boundary", "Clock", "Conflict", "Cost", "Memory", "Network", "Reading"]

Scalar = bool | int | float | str
ClaimValue = Annotated[Scalar | tuple[Scalar, ...], Says("a number, a text, true, false, or a list of these")]


class Boundary(Table):
    """What crosses the edge of the network."""

    inputs: Literal["quantized", "float"] | Unknown | None = used(
        "Whether graph inputs are quantized. `float`: what reads one is left to the host."
    )
    outputs: Literal["quantized", "float"] | Unknown | None = used("Whether graph outputs, logits too, are quantized.")
    artefact_io: Literal["integer", "float"] | Unknown | None = recorded(
        "Whether the artefact takes and gives codes or reals.", judged=False
    )
    input_formats: tuple[Id, ...] | Unknown | None = used(
        "Formats graph inputs may have, where other than the kernels'; what a kernel cannot read is requantized."
    )
    output_formats: tuple[Id, ...] | Unknown | None = used(
        "Formats graph outputs may have: in place of its kernel's where no operator here reads one, else of those."
    )


class Artefact(Table):
    """What the toolchain takes, and the plugins that write and run it."""

    exporter: Word | None = used("Name of the exporter plugin that writes the artefact.")
    executor: Word | None = used("Name of the executor plugin that runs it.")
    file_format: Word | None = recorded(
        "What the toolchain calls its input: `TFLite`, `ONNX QDQ`, `DLC`.", judged=False
    )
    opset_min: Count | Unknown | None = used("Lowest ONNX opset the toolchain takes; none below is written.")
    host_cpu_flags: tuple[Word, ...] | Unknown | None = recorded(
        "CPU flags of which the host needs one for the executor to compute as this target does."
    )


class Network(Table):
    """Limits of a network as a whole."""

    max_layers: Count | Unknown | None = used(
        "Most layers: operators that a kernel computes, with what is fused to them. What comes later goes to the host."
    )
    static_shapes: bool | Unknown | None = recorded(
        "True: all sizes are fixed when the network is compiled. Not planned by: a captured model fixes all but the "
        "batch, which an artefact leaves open.",
        judged=True,
    )
    max_rank: Count | Unknown | None = used(
        "Most dimensions of any tensor, the batch included. What reads or gives one with more goes to the host."
    )
    max_weight_bytes: Count | Unknown | None = used(
        "Most bytes of weights, all packed in the width of their format. Those that do not fit beside the ones before "
        "them go to the host with their operator."
    )


class Memory(Table):
    """One memory, for the roofline."""

    capacity_bytes: Count | Unknown | None = used("Size.")
    bandwidth_bytes_per_s: Positive | Unknown | None = used("Bandwidth of one port at the default clock.")
    ports: Count | Unknown | None = used("Ports that can be used at once.")
    holds: tuple[Literal["weights", "activations", "biases", "tables"], ...] | Unknown | None = used(
        "What it stores. Memories stand in the order of their distance from the arithmetic, the nearest first."
    )
    past_capacity: Literal["stream", "spill", "refuse"] | Unknown | None = used(
        "What happens to what does not fit: it comes from the next memory that holds its kind, each time it is used "
        "(`stream`), or goes there and back (`spill`), or the network is refused."
    )


class Clock(Table):
    """One clock preset, for the roofline."""

    clock_hz: Positive | Unknown | None = used("Clock of the multiply-accumulate units.")
    bandwidth_bytes_per_s: dict[Id, Positive] | Unknown | None = used(
        "Bandwidth of a memory, all its ports together, under this preset; others keep their own under the default one."
    )
    is_default: bool | None = used("True for the preset to assume where none is asked for.")


class Cost(Table):
    """What else decides how long a network takes."""

    channel_multiple: Count | Unknown | None = used("Channels are rounded up to a multiple of this.")
    weight_compression: Literal["none", "lossless"] | Unknown | None = used("How weights are stored.")
    elementwise_per_cycle: Positive | Unknown | None = used("Elementwise results per clock cycle.")
    peak_ops_per_s: Positive | Unknown | None = used("Published peak; one multiply-accumulate is two operations.")
    power_w: Amount | Unknown | None = used("Power at the peak.")


class Reading(Table):
    """One of several readings of a fact."""

    value: ClaimValue | None = used("What the source says.")
    source: Tags | None = used("The source that says so.")


class Conflict(Table):
    """Sources that disagree, and the reading chosen."""

    field: Word | None = used("Path of the field in question: `biases.wide.bits`.")
    readings: tuple[Reading, ...] = used("What each source says; two or more.")
    chosen: ClaimValue | None = used('The value taken, one of the readings, or "unknown".')
    why: Word | None = used("Why this one.")

    def rules(self) -> Iterator[Problem]:
        """There is a disagreement, and the choice is one of its sides."""
        values = [reading.value for reading in self.readings or ()]
        if not self.field:
            yield Problem(("field",), "must name the field in question.")
        if len(values) < 2:
            yield Problem(("readings",), f"a conflict has two readings or more; got {len(values)}.")
        elif self.chosen is not None and self.chosen != "unknown" and self.chosen not in values:
            yield Problem(("chosen",), f'must be one of the readings or "unknown"; got {self.chosen!r}.')
