# SPDX-License-Identifier: Apache-2.0
"""Whether a quantized model keeps to what a target states: the model as its file has it, judged clause by clause."""

from qhw.legality.artefact import Artefact, ArtefactOperator, Constant, Encoding, Use, encoding_of
from qhw.legality.judge import judge
from qhw.legality.report import CheckReport, OperatorReport, Unjudged, Unread, Violation

__all__ = [
    "Artefact",
    "ArtefactOperator",
    "CheckReport",
    "Constant",
    "Encoding",
    "OperatorReport",
    "Unjudged",
    "Unread",
    "Use",
    "Violation",
    "encoding_of",
    "judge",
]
