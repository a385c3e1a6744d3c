# SPDX-License-Identifier: Apache-2.0
"""What follows an operator up to the next quantized tensor, and whether its kernel computes that along."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qhw.graph import VIEW_KINDS
from qhw.legality.artefact import ArtefactOperator, Encoding, Use
from qhw.legality.clips import clip_codes
from qhw.legality.finding import Finding, unknown
from qhw.legality.settled import Settled
from qhw.schema import Format, Kernel
from qhw.schema import Operator as OperatorSpec

__all__ = ["Chain", "chain_findings", "chain_of", "implied", "within"]


@dataclass(frozen=True, eq=False)
class Chain:
    """Operators behind one, with no quantizer between.

    Attributes:
        followers: In order; each reads nothing but the one before.
        output: What the last of them writes, or the operator itself.
    """

    followers: tuple[ArtefactOperator, ...]
    output: Use

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the followers."""
        return tuple(follower.kind for follower in self.followers)


def chain_of(settled: Settled, operator: ArtefactOperator) -> Chain:
    """Follow an operator's result to the first value that is quantized, read twice, or read with others."""
    followers: list[ArtefactOperator] = []
    output, seen = operator.output, {operator.name}
    while output.encoding is None and output.tensor not in settled.artefact.outputs:
        readers = settled.readers.get(output.tensor, ())
        if len(readers) != 1 or len(readers[0].inputs) != 1 or readers[0].more_outputs or readers[0].name in seen:
            break
        if readers[0].kind not in VIEW_KINDS:
            followers.append(readers[0])
        seen.add(readers[0].name)
        output = readers[0].output
    if output.encoding is None and output.tensor not in settled.artefact.outputs:
        # It ends in the open: nothing of it is computed along.
        return Chain((), operator.output)
    return Chain(tuple(followers), output)


def within(chain: Chain, operator: ArtefactOperator, fused: Iterable[object], *, gives_reals: bool) -> Chain:
    """Of a chain that need not end in a quantizer the longest start that is computed along; any other as it is.

    It leaves the graph in real numbers, or a kernel gives real numbers, which whoever reads them goes on with.

    Args:
        chain: From `chain_of`.
        operator: Where it starts.
        fused: What the target states, of the operator and of its kernels.
        gives_reals: Whether a kernel of the operator gives real numbers.
    """
    if chain.output.encoding is not None and not gives_reals:
        return chain
    listed = [entry for entries in fused if isinstance(entries, tuple) for entry in entries]
    chains = [(entry,) if isinstance(entry, str) else entry for entry in listed]
    for count in range(len(chain.followers), 0, -1):
        if chain.kinds[:count] in chains:
            output = chain.output if count == len(chain.followers) else chain.followers[count - 1].output
            return Chain(chain.followers[:count], output)
    return Chain((), operator.output) if chain.followers else chain


def implied(chain: Chain, formats: list[Format]) -> Chain:
    """The chain without clips at its end that saturation on one of these formats does anyway."""
    followers = list(chain.followers)
    while followers and followers[-1].kind in ("Relu", "Clip") and chain.output.encoding is not None:
        codes = clip_codes(followers[-1], chain.output.encoding)
        if codes is None or not any(_saturates(spec, codes, chain.output.encoding) for spec in formats):
            break
        followers.pop()
    return Chain(tuple(followers), chain.output)


def _saturates(spec: Format, codes: tuple[float, float], e: Encoding) -> bool:
    """Whether a format has no code beyond a clip's."""
    if e.is_float:
        most = spec.finite_max
        return spec.kind == "float" and isinstance(most, float) and codes[0] <= -most and most <= codes[1]
    if spec.quant_min is None or spec.quant_max is None or spec.is_signed != e.signed:
        return False
    return codes[0] <= spec.quant_min and spec.quant_max <= codes[1]


def chain_findings(path: str, spec: OperatorSpec, kernel: str, row: Kernel, chain: Chain) -> Iterator[Finding]:
    """Whether a kernel computes along what follows its operator."""
    if not chain.followers:
        return
    clause, fused = f"{path}.fused", spec.fused
    if row.fused is not None:
        clause, fused = f"kernels.{kernel}.fused", row.fused
    if not isinstance(fused, tuple):
        why = "unknown" if fused else "the target does not say what is computed along"
        yield unknown(clause, f"{why}: {', '.join(chain.kinds)}")
        return
    chains = [(entry,) if isinstance(entry, str) else entry for entry in fused]
    if chain.kinds in chains:
        return
    listed = ", ".join(" + ".join(entry) for entry in chains) or "nothing"
    first = chain.followers[0]
    fix = f"Quantize the tensor before '{first.name}', or fold it."
    got = f"{' + '.join(chain.kinds)} without a quantizer between"
    yield Finding(clause, f"must be one of: {listed}", got, fix, distance=30)
