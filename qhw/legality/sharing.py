# SPDX-License-Identifier: Apache-2.0
"""Clauses that tie tensors to one scale, and those that prescribe one."""

from collections.abc import Iterator

import numpy as np

from qhw.graph.cell import Cell
from qhw.graph.slots import Slot, edge, tensor
from qhw.graph.ties import alike_slots, fixed_encoding, tied_slots
from qhw.legality.artefact import Encoding
from qhw.legality.finding import Finding, unknown
from qhw.legality.site import Site, graph_operator
from qhw.schema import Kernel

__all__ = ["fixed_findings", "precision_findings", "tie_findings", "weight_scale_findings"]


def tie_findings(site: Site, kernels: dict[str, Kernel]) -> Iterator[Finding]:
    """Tensors that the operator wants on one scale, and that are not.

    Args:
        site: The operator.
        kernels: Its rows; none for an operator that only moves data.
    """
    clause = f"{site.path}.same_scale"
    if kernels and site.spec.same_scale == "unknown":
        yield unknown(clause)
        return
    cell = _cell(site, kernels)
    places = [edge(site.operator.name, index) for index in range(len(site.inputs))]
    held: dict[Slot, tuple[str, Encoding | None]] = {
        place: (use.tensor, use.encoding) for place, use in zip(places, site.inputs, strict=True)
    }
    held[tensor(site.output.tensor)] = site.output.tensor, site.output.encoding
    rule = cell.same_scale
    for tied in tied_slots(cell, places):
        known = [(name, e) for name, e in (held[slot] for slot in tied) if e is not None]
        others = [(name, e) for name, e in known[1:] if not e.same_grid(known[0][1])]
        if others:
            name, encoding = others[0]
            must = f"must be one scale and zero point ({rule})"
            got = f"{known[0][0]}: {known[0][1].words()}; {name}: {encoding.words()}"
            more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
            fix = "Give all of them the scale and zero point that covers the widest."
            yield Finding(clause, must, got + more, fix, name)
    for alike in alike_slots(cell, places) if rule == "aligned" else ():
        types = [(name, e) for name, e in (held[slot] for slot in alike) if e is not None]
        for name, encoding in types[1:]:
            if (encoding.bits, encoding.signed) != (types[0][1].bits, types[0][1].signed):
                got = f"{types[0][0]}: {types[0][1].type}; {name}: {encoding.type}"
                yield Finding(clause, "must be one stored type (aligned)", got, "Quantize all to one type.", name)


def precision_findings(site: Site) -> Iterator[Finding]:
    """An operator that may not change the width of what passes through it."""
    if site.spec.may_change_precision is not False:
        return
    parts = [(use.tensor, use.encoding) for use in (*site.inputs, site.output)]
    if site.weight is not None:
        parts.append((site.weight.name, site.weight.encoding))
    known = [(name, e) for name, e in parts if e is not None]
    for name, e in known[1:]:
        if e.bits != known[0][1].bits:
            got = f"{known[0][0]}: {known[0][1].type}; {name}: {e.type}"
            fix = "Give all its tensors one width."
            yield Finding(f"{site.path}.may_change_precision", "must be one width", got, fix, name)
            return


def fixed_findings(site: Site, format_name: str | None) -> Iterator[Finding]:
    """Parameters that the result must have in its format."""
    e = site.output.encoding
    if format_name is None or e is None or e.is_dynamic:
        return
    clause = f"{site.path}.fixed_output"
    if site.spec.fixed_output == "unknown":
        yield unknown(clause)
        return
    fixed = fixed_encoding(_cell(site, {}), format_name)
    if fixed is None:
        return
    signed = site.target.formats[format_name].is_signed
    e = e if signed is None else e.as_signed(signed)
    same_scale = bool((np.float32(e.scale) == np.float32(fixed.scale)).all())
    if not same_scale or not bool((e.zero_point == fixed.zero_point).all()):
        must = f"must be scale {fixed.scale:.9g}, zero point {fixed.zero_point}"
        fix = f"Give the result of {site.kind} these parameters."
        yield Finding(f"{clause}.{format_name}", must, e.words(), fix, site.output.tensor)


def weight_scale_findings(site: Site) -> Iterator[Finding]:
    """How many scales a grouped operator's weights have, where they have one per output channel."""
    stated, weight, facts = site.spec.weight_scales, site.weight, site.operator.attributes
    groups, channels = facts.get("groups", 1), facts.get("out_channels")
    if stated is None or weight is None or weight.encoding is None or groups in (None, 1) or channels is None:
        return
    if weight.encoding.axis is None or weight.encoding.block_size is not None:
        return
    clause = f"{site.path}.weight_scales"
    if stated == "unknown":
        yield unknown(clause)
        return
    wanted, got = channels if stated == "out_channels" else channels // groups, weight.encoding.scale.size
    if got != wanted:
        fix = "Quantize it again with as many, or with one for the tensor."
        yield Finding(clause, f'must be "{stated}": {wanted} scales', f"{got} scales", fix, weight.name)


def _cell(site: Site, kernels: dict[str, Kernel]) -> Cell:
    operator = graph_operator(site.operator)
    names = tuple(use.tensor for use in site.inputs)
    return Cell(
        operator=operator,
        spec=site.spec,
        path=site.path,
        members=(operator.name,),
        inputs=names,
        output=site.output.tensor,
        kernels=kernels,
        activations=frozenset(),
        held={},
        gives_float=site.output.encoding is None,
    )
