# SPDX-License-Identifier: Apache-2.0
"""`qhw accumulators`: what each sum of products can reach, against the width that the target has for it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qhw.cli.console import paragraph, print_json, print_table
from qhw.cli.options import AsJson, ResultArgument
from qhw.wording import counted

if TYPE_CHECKING:
    from qhw.engine import QuantizedModel
    from qhw.integer import PairProof, Proof, Witness

WitnessOption = Annotated[
    Path | None,
    typer.Option("--witness", metavar="FILE", help="Write the inputs that reach each bound to this .npz file."),
]


def accumulators(result: ResultArgument, witness: WitnessOption = None, as_json: AsJson = False) -> None:
    """Prove for each layer that its accumulator cannot overflow, or show an input with which it does.

    The bound is the exact worst case of the stored weight codes, zero points and biases over all input codes. Exit
    status 1 where some layer can overflow.

    Example: qhw accumulators out/p4
    """
    import qhw
    from qhw.engine import default_progress
    from qhw.integer import prove_accumulators

    loaded = qhw.load(result)
    weighted = {name for p in loaded.plan.points if p.role == "weight" for name in (p.operator, *p.consumers)}
    proofs = list(default_progress().track(prove_accumulators(loaded), "accumulators", len(weighted)))
    if witness is not None:
        _write(witness, proofs)
    biases = open_biases(loaded)
    if as_json:
        print_json(_facts(loaded.target.name, proofs, biases))
    else:
        _show(loaded.target.name, proofs, biases)
    if any(proof.overflowing_channels for proof in proofs):
        raise typer.Exit(1)


def open_biases(result: "QuantizedModel") -> dict[str, str]:
    """Operator -> the field that would say how its bias is added: such a bias is in no sum that is bounded here."""
    target, known = result.target, {op.name: op for op in result.float_graph.operators}
    quantized = {name for p in result.plan.points if p.role == "bias" for name in (p.operator, *p.consumers)}
    found = {}
    for placement in result.plan.operators:
        operator = known.get(placement.name)
        if operator is None or operator.bias is None or placement.kernel is None or placement.name in quantized:
            continue
        rule = target.kernels[placement.kernel].bias
        if rule in (None, "unknown"):
            found[placement.name] = f"kernels.{placement.kernel}.bias"
        elif rule != "none" and target.biases[rule].bits in (None, "unknown"):
            found[placement.name] = f"biases.{rule}.bits"
    return found


def _facts(target: str, proofs: "list[Proof]", biases: dict[str, str]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "target": target,
        "units": {
            "lowest, highest, value, peak": "accumulator codes; one is input scale * weight scale of its channel",
            "bits, bits_needed": "bits, the sign included",
        },
        "layers": [_layer(proof, biases.get(proof.operator)) for proof in proofs],
    }


def _layer(proof: "Proof", open_bias: str | None) -> dict[str, Any]:
    found = proof.witness
    return {
        "operator": proof.operator,
        "accumulator": proof.path,
        "lowest": int(proof.bounds.lowest.min()),
        "highest": int(proof.bounds.highest.max()),
        "bits_needed": proof.bits_needed,
        "bits": proof.bits,
        "overflow": proof.overflow,
        "overflowing_channels": proof.overflowing_channels,
        "bias_left_out": open_bias,
        "witness": None if found is None else _reached(found),
        "pairs": None if proof.pairs is None else _pairs(proof.pairs),
    }


def _pairs(proof: "PairProof") -> dict[str, Any]:
    """Sums of two products in a register of their own."""
    return {
        "lowest": int(proof.bounds.lowest.min()),
        "highest": int(proof.bounds.highest.max()),
        "bits_needed": int(proof.bounds.bits.max()),
        "bits": proof.bits,
        "overflow": proof.overflow,
        "overflowing_channels": int(proof.overflowing.sum()),
        "witness": None if proof.witness is None else _reached(proof.witness),
    }


def _reached(witness: "Witness") -> dict[str, int]:
    return {"channel": witness.channel, "value": witness.value, "peak": witness.peak}


def _show(target: str, proofs: "list[Proof]", biases: dict[str, str]) -> None:
    rows = []
    for proof in proofs:
        lowest, highest = int(proof.bounds.lowest.min()), int(proof.bounds.highest.max())
        bits = "not known" if proof.bits is None else str(proof.bits)
        verdict = _verdict(proof) + (", its bias left out" if proof.operator in biases else "")
        rows.append((proof.operator, f"{lowest:,}", f"{highest:,}", str(proof.bits_needed), bits, verdict))
    if rows:
        print_table(("operator", "lowest", "highest", "bits needed", "bits", "verdict"), rows)
        print()
    paragraph("Target", target)
    if not rows:
        paragraph("Sums", "none to prove: no operator here sums products of integer activations and weights")
    known = [proof for proof in proofs if proof.bits is not None]
    over = [proof for proof in known if proof.overflowing_channels]
    if len(known) < len(proofs):
        paragraph("Not known", f"the accumulator's width of {counted(len(proofs) - len(known), 'operator')}")
    if biases:
        fields = ", ".join(dict.fromkeys(biases.values()))
        paragraph("Left out", f"the bias of {counted(len(biases), 'operator')}: the target does not state {fields}")
    if over:
        paragraph("Can overflow", ", ".join(proof.operator for proof in over))
        print("Next: narrower weights (qhw plan --format), fewer input codes, or a kernel with a wider accumulator.")
    elif known:
        paragraph("Proven", _proven(known, bool(biases)))


def _proven(known: "list[Proof]", without_bias: bool) -> str:
    """What is proven of accumulators that are wide enough."""
    room = min(proof.headroom or 0 for proof in known)
    sums = "; the sums of products alone, without the biases that are left out" if without_bias else ""
    left = f"{counted(room, 'bit')} {'is' if room == 1 else 'are'} left in the tightest"
    return f"{counted(len(known), 'operator')} cannot overflow; {left}{sums}"


def _verdict(proof: "Proof") -> str:
    if proof.pairs is not None and bool(proof.pairs.overflowing.any()):
        pair = proof.pairs
        text = f"two products can overflow {pair.bits} bits in {counted(int(pair.overflowing.sum()), 'channel')}"
        return text if pair.witness is None else f"{text}: {pair.witness.peak:,} in channel {pair.witness.channel}"
    if proof.bits is None:
        return "width not known"
    if not proof.overflowing_channels:
        return f"cannot overflow, {counted(proof.headroom or 0, 'bit')} left"
    text = f"can overflow in {counted(proof.overflowing_channels, 'channel')}"
    return text if proof.witness is None else f"{text}: {proof.witness.peak:,} in channel {proof.witness.channel}"


def _write(path: Path, proofs: "list[Proof]") -> None:
    import numpy as np

    from qhw.errors import ResultError

    arrays: dict[str, Any] = {}
    for proof in proofs:
        pair = proof.pairs.witness if proof.pairs is not None and bool(proof.pairs.overflowing.any()) else None
        if (found := pair or proof.witness) is not None:
            arrays[proof.operator] = found.operand.numpy()
    try:
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)
    except OSError as error:
        raise ResultError(f"{path}: cannot be written: {error.strerror or error}. Choose another --witness.") from error
