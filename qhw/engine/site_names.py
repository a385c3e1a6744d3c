# SPDX-License-Identifier: Apache-2.0
"""What the sites of a step are called: by their stage, groups of points of some roles, or also operators."""

from collections.abc import Iterable, Mapping

from qhw.graph import QuantPoint
from qhw.schema import closest

__all__ = ["stray_site"]

_ROLES: Mapping[str, tuple[str, ...]] = {
    "weight_range": ("weight",),
    "round": ("weight",),
    "activation_range": ("activation", "input", "edge"),
}
"""Stages that act on groups of points alone; the others act on operators, too."""


def stray_site(stage: str, sites: Iterable[str], points: Iterable[QuantPoint], operators: set[str]) -> str | None:
    """The first site that nothing of its stage is called, as the end of a sentence; None where all are known.

    Args:
        stage: Of the step.
        sites: Names, as a survey or a plan has them.
        points: All points of the model.
        operators: Names of all its operators.
    """
    roles = _ROLES.get(stage)
    known = dict.fromkeys(point.group for point in points if roles is None or point.role in roles)
    if roles is None:
        known |= dict.fromkeys(operators)
    stray = next((site for site in sites if site not in known), None)
    if stray is None:
        return None
    kind = "group of points or operator" if roles is None else f"group of {roles[0]} points"
    hint = closest(stray, known) or next((name for name in known if name.startswith(f"{stray}.")), None)
    return f"no {kind} is called '{stray}'.{f' Closest: {hint}.' if hint else ''}"
