# SPDX-License-Identifier: Apache-2.0
"""`qhw accumulators`: what each sum of products can reach, against the width that the target has for it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qhw.cli.console import paragraph, print_json, print_table
from qhw.cli.options import AsJson
from qhw.cli.verify import ResultArgument

if TYPE_CHECKING:
    from qhw.integer import Proof

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
    from qhw.integer import prove_accumulators

    loaded = qhw.load(result)
    proofs = list(prove_accumulators(loaded))
    if witness is not None:
        _write(witness, proofs)
    if as_json:
        print_json([_facts(proof) for proof in proofs])
    else:
        _show(loaded.target.name, proofs)
    if any(proof.overflowing_channels for proof in proofs):
        raise typer.Exit(1)


def _facts(proof: "Proof") -> dict[str, Any]:
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
        "witness": None if found is None else {"channel": found.channel, "value": found.value, "peak": found.peak},
    }


def _show(target: str, proofs: "list[Proof]") -> None:
    rows = []
    for proof in proofs:
        lowest, highest = int(proof.bounds.lowest.min()), int(proof.bounds.highest.max())
        bits = "not known" if proof.bits is None else str(proof.bits)
        rows.append((proof.operator, f"{lowest:,}", f"{highest:,}", str(proof.bits_needed), bits, _verdict(proof)))
    print_table(("operator", "lowest", "highest", "bits needed", "bits", "verdict"), rows)
    print()
    paragraph("Target", target)
    known = [proof for proof in proofs if proof.bits is not None]
    over = [proof for proof in known if proof.overflowing_channels]
    if len(known) < len(proofs):
        paragraph("Not known", f"the accumulator's width of {len(proofs) - len(known)} of {len(proofs)} operators")
    if over:
        paragraph("Can overflow", ", ".join(proof.operator for proof in over))
        print("Next: narrower weights (qhw plan --format), fewer input codes, or a kernel with a wider accumulator.")
    elif known:
        room = min(proof.headroom or 0 for proof in known)
        paragraph("Proven", f"{len(known)} operators cannot overflow; {room} bits are left in the tightest")


def _verdict(proof: "Proof") -> str:
    if proof.bits is None:
        return "width not known"
    if not proof.overflowing_channels:
        return f"cannot overflow, {proof.headroom} bits left"
    text = f"can overflow in {proof.overflowing_channels} channels"
    return text if proof.witness is None else f"{text}: {proof.witness.peak:,} in channel {proof.witness.channel}"


def _write(path: Path, proofs: "list[Proof]") -> None:
    import numpy as np

    from qhw.errors import ResultError

    arrays: dict[str, Any] = {
        proof.operator: proof.witness.operand.numpy() for proof in proofs if proof.witness is not None
    }
    try:
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)
    except OSError as error:
        raise ResultError(f"{path}: cannot be written: {error.strerror or error}. Choose another --witness.") from error
