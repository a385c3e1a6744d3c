# SPDX-License-Identifier: Apache-2.0
"""What a target says of an operator's approximation, read or refused by the name of the field."""

from qhw.errors import IntegerError
from qhw.integer.site import Site, unknown
from qhw.schema import Approximation

__all__ = ["approximation_of", "stated_bits"]


def approximation_of(site: Site, *kinds: str) -> Approximation:
    """The operator's approximation, of one of these kinds.

    Args:
        site: The operator.
        kinds: That it can be executed by.

    Raises:
        IntegerError: the target does not say, or names another kind.
    """
    rule, where = site.spec.approximation, f"{site.path}.approximation"
    if rule is None or rule == "unknown":
        raise unknown(where, rule)
    if rule.kind is None or rule.kind == "unknown":
        raise unknown(f"{where}.kind", rule.kind, kinds)
    if rule.kind not in kinds:
        raise IntegerError(
            f'{where}.kind = "{rule.kind}" cannot be executed exactly; kinds that can: {", ".join(kinds)}'
        )
    return rule


def stated_bits(site: Site, rule: Approximation, field: str, most: int) -> int:
    """A number of bits.

    Raises:
        IntegerError: the target does not say, or says more than qhw computes with.
    """
    bits = getattr(rule, field)
    if not isinstance(bits, int):
        raise unknown(f"{site.path}.approximation.{field}", bits)
    if bits > most:
        raise IntegerError(
            f"{site.path}.approximation.{field} must be at most {most} to be executed exactly; got {bits}"
        )
    return bits
