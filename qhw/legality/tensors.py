# SPDX-License-Identifier: Apache-2.0
"""Encodings without a model: each tensor against all formats that any kernel takes."""

from collections.abc import Iterator

from qhw.legality.artefact import Artefact, Encoding
from qhw.legality.finding import Finding, unknown
from qhw.legality.formats import Operand, nearest_format
from qhw.schema import TargetSpec

__all__ = ["tensor_findings"]

_WIDEST_WEIGHT = 16


def tensor_findings(artefact: Artefact, target: TargetSpec) -> Iterator[tuple[str, Finding]]:
    """Tensor and finding of everything that no kernel could take.

    Which kernel a tensor meets is not known, so that it is legal where any would take it.
    """
    activations = _listed(target, ("input", "output"))
    weights = _listed(target, ("weight",))
    for name, encoding in artefact.activations.items():
        _, found = nearest_format(target, "kernels", activations or None, Operand(name, encoding))
        yield from ((name, one) for one in found)
    for name, encoding in artefact.parameters.items():
        if encoding.bits > _WIDEST_WEIGHT:
            yield from ((name, one) for one in _of_bias(target, name, encoding))
            continue
        _, found = nearest_format(
            target, "kernels", weights or activations or None, Operand(name, encoding, is_constant=True)
        )
        yield from ((name, one) for one in found)


def _listed(target: TargetSpec, fields: tuple[str, ...]) -> tuple[str, ...]:
    lists = (getattr(kernel, field) for kernel in target.kernels.values() for field in fields)
    return tuple(dict.fromkeys(name for listed in lists if isinstance(listed, tuple) for name in listed))


def _of_bias(target: TargetSpec, name: str, encoding: Encoding) -> Iterator[Finding]:
    widths = [rule.bits for rule in target.biases.values() if isinstance(rule.bits, int)]
    if not widths:
        yield unknown("biases", "the target does not say how wide a bias is")
    elif encoding.bits > max(widths):
        fix = "Quantize it again to fewer bits."
        yield Finding("biases", f"must be at most {max(widths)} bits", f"{encoding.bits} bits", fix, name)
