# SPDX-License-Identifier: Apache-2.0
"""The grids that values have although no quantizer stands on them: behind and in front of what only moves values."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qhw.graph import MOVEMENT_KINDS, VIEW_KINDS
from qhw.legality.artefact import Artefact, ArtefactOperator, Encoding, Use
from qhw.legality.clips import CLIPS, narrowed

__all__ = ["Settled", "settle"]

_CARRYING = (VIEW_KINDS | MOVEMENT_KINDS) - {"Pad"}
"""What gives back values of its input alone; a Pad may add others."""


@dataclass(frozen=True, eq=False)
class Settled:
    """An artefact whose values have all grids that follow.

    Attributes:
        artefact: The model.
        operators: In execution order.
        readers: Value name -> operators that read it.
    """

    artefact: Artefact
    operators: tuple[ArtefactOperator, ...]
    readers: Mapping[str, tuple[ArtefactOperator, ...]]


def settle(artefact: Artefact) -> Settled:
    """Carry grids over views and data movement: forward where a result has none, then backward.

    A convolution, a reshape and a quantizer are, to hardware that has no reshape, a convolution whose result is
    quantized.
    """
    operators = list(artefact.operators)
    known: dict[str, Encoding] = {}
    for index, operator in enumerate(operators):
        inputs = tuple(_filled(use, known) for use in operator.inputs)
        output = operator.output
        if operator.kind in _CARRYING and output.encoding is None and len(inputs) == 1 and inputs[0].encoding:
            output = replace(output, encoding=inputs[0].encoding)
            known[output.tensor] = inputs[0].encoding
            for more in operator.more_outputs:
                known[more.tensor] = inputs[0].encoding
        operators[index] = replace(operator, inputs=inputs, output=output)
    counts: dict[str, int] = {}
    for operator in operators:
        for use in operator.inputs:
            counts[use.tensor] = counts.get(use.tensor, 0) + 1
    wanted: dict[str, Encoding] = {}
    for index in reversed(range(len(operators))):
        operator = operators[index]
        output = _filled(operator.output, wanted)
        inputs = operator.inputs
        alone = len(inputs) == 1 and counts[inputs[0].tensor] == 1 and inputs[0].tensor not in artefact.outputs
        if operator.kind in _CARRYING and output.encoding is not None and alone and inputs[0].encoding is None:
            wanted[inputs[0].tensor] = output.encoding
            inputs = (replace(inputs[0], encoding=output.encoding),)
        operators[index] = replace(operator, inputs=inputs, output=output)
    operators = _with_clips(operators)
    readers: dict[str, list[ArtefactOperator]] = {}
    for operator in operators:
        for use in operator.inputs:
            readers.setdefault(use.tensor, []).append(operator)
    return Settled(artefact, tuple(operators), {name: tuple(found) for name, found in readers.items()})


def _filled(use: Use, known: Mapping[str, Encoding]) -> Use:
    return replace(use, encoding=known[use.tensor]) if use.encoding is None and use.tensor in known else use


def _with_clips(operators: list[ArtefactOperator]) -> list[ArtefactOperator]:
    """The operators with the codes that clips in front of quantizers leave, where a value is written and read."""
    narrow: dict[str, Encoding] = {}
    for operator in operators:
        e = operator.output.encoding
        if operator.kind in CLIPS and e is not None and e.signed is not None:
            narrow[operator.output.tensor] = narrowed(operator, e)
        elif operator.kind in (*_CARRYING, "MaxPool") and e is not None and operator.inputs:
            # Quantized once more behind what only passes values on, a value has the codes that it had.
            before = narrow.get(operator.inputs[0].tensor)
            if before is not None and before.same_grid(e):
                narrow[operator.output.tensor] = before

    def of(use: Use) -> Use:
        found = narrow.get(use.tensor)
        is_same = found is not None and use.encoding is not None and use.encoding.same_grid(found)
        return replace(use, encoding=found) if is_same else use

    return [
        replace(operator, inputs=tuple(map(of, operator.inputs)), output=of(operator.output)) for operator in operators
    ]
