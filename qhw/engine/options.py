# SPDX-License-Identifier: Apache-2.0
"""An algorithm's options from plain values, as a plan or the user gives them."""

import json
from collections.abc import Mapping

from pydantic import ValidationError

from qhw.decisions import Json
from qhw.errors import PlanError
from qhw.extension import Algorithm, AlgorithmOptions

__all__ = ["options_for"]


def options_for(algorithm: type[Algorithm], values: Mapping[str, Json], where: str) -> AlgorithmOptions:
    """Validated options of an algorithm.

    Args:
        algorithm: Its class.
        values: Option to value; what is left out has its default.
        where: What messages begin with; the option's name is added to it.

    Raises:
        PlanError: an option that it does not have, or with a value it does not take.
    """
    try:
        return algorithm.Options.model_validate_json(json.dumps(dict(values)))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([where, *map(str, first["loc"])])
        known = ", ".join(algorithm.Options.model_fields) or "none"
        raise PlanError(
            f"{field}: {first['msg']}; options of '{algorithm.name}': {known}. Give one of these, or leave it out."
        ) from error
