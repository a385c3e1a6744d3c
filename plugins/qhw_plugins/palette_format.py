# SPDX-License-Identifier: Apache-2.0
"""Palettes as a number format, and the algorithm that chooses their look-up tables: k-means over the weights."""

from typing import Any, cast

import torch
from torch import Tensor

from qhw.decisions import Json, Rank, Reason, Resources, Site, Step, StepReport, Survey, Verdict, counted
from qhw.errors import RangeError
from qhw.extension import Algorithm, NumberFormat, PluginInfo, hookimpl
from qhw.graph import Graph, Placement
from qhw.numerics import (
    ElementSet,
    Grid,
    PaletteElements,
    PaletteEntry,
    PerAxis,
    QParams,
    fake_quantize,
    legal_scale,
    range_of,
)
from qhw.schema import Format, Palette, TargetSpec
from qhw_plugins.sites import TAKEN
from qhw_plugins.weight_loss import sqnr_db

KIND = "palette"


class PaletteFormat(NumberFormat):
    """Indexes into look-up tables of 2^index_bits entries, for weights.

    Tables are one for the tensor or one for every `group_channels` output channels; entries are floats, or 8-bit
    integers times a scale; with `channel_scale` every output channel has a scale of its own.
    """

    name = KIND
    summary = "Weights as indexes into look-up tables, per tensor or per group of output channels."

    def problem(self, spec: Format) -> str | None:
        """Indexes wider than a byte."""
        try:
            self.elements(spec)
        except RangeError as error:
            return f"palette.index_bits: {error}"
        return None

    def elements(self, spec: Format) -> ElementSet:
        """The palette without its table, which belongs to one weight."""
        if not isinstance(spec.palette, Palette) or spec.element_bits is None:
            raise RangeError("palette: must be a table with index_bits and entry. State them.")
        channels = spec.palette.group_channels if isinstance(spec.palette.group_channels, int) else None
        entry = cast(PaletteEntry, spec.palette.entry)
        has_scale = spec.shared_per == "out_channel" or entry == "int8"
        return PaletteElements(spec.element_bits, entry, channels, has_scale)


class PaletteWeights(Algorithm):
    """Look-up tables by k-means over the weights that share one.

        argmin over T of sum (w - s T[k(w)])^2,  k(w) the nearest entry

    Lloyd's iterations from three starts without random numbers, then entries are rounded to their type and weights go
    to the nearest. A scale per channel is the largest magnitude of the channel (over 127 for 8-bit entries).

    Reference:
        Han et al., 2016, arXiv:1510.00149, section 3. Differs: starts, of which the best is kept; no retraining here.
    """

    name = "palette_weights"
    stage = "weight_range"
    summary = "Look-up tables of palettes by k-means over the weights."
    ranks = (
        Rank(pipeline="whitepaper-ptq", before="mse_weights"),
        Rank(pipeline="ranges-ptq", before="mse_weights"),
        Rank(pipeline="whitepaper-qat", before="mse_weights"),
    )

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """Weights whose format is a palette."""
        formats = {point.group: point.format for point in points.points if point.role == "weight"}
        groups = {group: name for group, name in formats.items() if target.formats[name].kind == KIND}
        if not groups:
            nothing = Reason(subject="formats.*.kind", value=0, rule="no weight is in a palette")
            return Survey(verdict=Verdict(taken=False, reasons=(nothing,)))
        reasons = tuple(
            Reason(subject=f"formats.{name}.kind", value=KIND, rule="the entries of a {value} are chosen by k-means")
            for name in dict.fromkeys(groups.values())
        )
        sites = tuple(Site(name=group, verdict=TAKEN) for group in groups)
        return Survey(verdict=Verdict(taken=True, reasons=reasons), sites=sites)

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Tables of all planned weights, and how well they serve."""
        figures: dict[str, dict[str, Json]] = {}
        total = 0
        for group in context.progress.track(step.sites, "palettes", len(step.sites)):
            weight, grid = work.weight(group), work.grid(group)
            axis = work.group(group)[0].axis
            qparams = palette_qparams(weight, grid, work.granularity(group), axis)
            work.set_qparams(group, qparams)
            tables = cast(PaletteElements, qparams.elements).tensors()["table"]
            count = tables.numel() // tables.shape[-1]
            total += count
            figures[group] = {"tables": count, "sqnr_db": sqnr_db(weight, fake_quantize(weight, qparams))}
        summary = f"{counted(len(figures), 'weight')}, {counted(total, 'look-up table')}"
        return StepReport(stage=step.stage, algorithm=self.name, summary=summary, sites=figures)


def palette_qparams(weight: Tensor, grid: Grid, granularity: Any, axis: int | None) -> QParams:
    """Scale and look-up tables of a weight.

    Args:
        weight: float [*shape].
        grid: Of the format; its elements are a palette.
        granularity: Of the scale: per tensor, or per output channel.
        axis: Of the output channels.
    """
    palette = cast(PaletteElements, grid.elements)
    low, high = range_of(weight, granularity)
    size = torch.maximum(high, -low).double()
    wanted = size / (127 if palette.entry == "int8" else 1)
    scale = legal_scale(torch.where(size > 0, wanted, 1.0), grid)
    shape = [1] * weight.dim()
    if isinstance(granularity, PerAxis):
        shape[granularity.axis] = -1
    filled = palette.filled(weight / (scale.reshape(shape) if scale.dim() else scale), axis)
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    return QParams(scale, zero_point, grid.quant_min, grid.quant_max, granularity, filled)


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Palettes: weights as indexes into look-up tables.")


@hookimpl
def qhw_register_number_formats() -> list[type[NumberFormat]]:
    return [PaletteFormat]


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [PaletteWeights]
