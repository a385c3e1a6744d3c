# SPDX-License-Identifier: Apache-2.0
"""What an algorithm left behind, held against what it promised: faults show here, not at the next plugin's expense."""

from qhw.decisions import Step, StepReport
from qhw.engine.work import Work
from qhw.extension.plugin import PluginRecord
from qhw.graph.verify import not_finite
from qhw.wording import listed

__all__ = ["check_outcome"]

_SETS_SCALES = ("weight_range", "activation_range")


def check_outcome(work: Work, step: Step, report: StepReport, record: PluginRecord) -> None:
    """Refuse a report of something else, sites without a scale, and weights that are no numbers any more.

    Args:
        work: The working copy behind the step.
        step: What was planned.
        report: What the algorithm says that it did.
        record: Its plugin.

    Raises:
        PluginError: one of these; names the plugin.
    """
    doing = f"algorithm '{step.algorithm}': apply"
    if (report.stage, report.algorithm) != (step.stage, step.algorithm):
        raise record.author_error(
            f"{doing} returned a report of '{report.algorithm}' at stage '{report.stage}'. Give its own stage and name."
        )
    missing = [group for group in step.sites if group not in work.qparams] if step.stage in _SETS_SCALES else []
    if missing:
        raise record.author_error(
            f"{doing} set no scale of {listed(missing, 1)}, which are its sites. Call work.set_qparams for each, or "
            "leave them out of the survey."
        )
    name = not_finite(work.graph)
    if name is not None:
        raise record.author_error(f"{doing} left NaN or infinite values in {name}. Give finite ones.")
