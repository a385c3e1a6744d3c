# SPDX-License-Identifier: Apache-2.0
"""`qhw cost`: cycles, time and energy of a model on a target, layer by layer, as far as the target's figures go."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qhw.cli.options import AsJson, ModelArgument

if TYPE_CHECKING:
    from qhw.roofline import CostReport

TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target",
        "-t",
        metavar="TARGET",
        help="A target's name (qhw target list), or a path to a .toml file. A result folder has its own.",
    ),
]
PlanOption = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", help="With the formats of this plan (qhw plan --out).")
]
ClockOption = Annotated[
    str | None, typer.Option("--clock", metavar="PRESET", help="A preset of the target's clocks. Absent: the default.")
]


def cost(
    model: ModelArgument,
    target: TargetOption = None,
    plan: PlanOption = None,
    clock: ClockOption = None,
    as_json: AsJson = False,
) -> None:
    """Estimate what one sample costs: a roofline per layer, and which figures the target lacks. Nothing is run.

    Example: qhw cost examples.digits:model --target espressif/esp32-p4
    """
    import qhw
    from qhw.cli.console import print_json
    from qhw.cli.sources import load_model
    from qhw.decisions import QuantPlan
    from qhw.engine.folder import is_result_folder
    from qhw.errors import PlanError

    if target is None and plan is None and Path(model).is_dir() and is_result_folder(Path(model)):
        report = qhw.cost(qhw.load(model), clock=clock)
    elif plan is not None:
        try:
            made = QuantPlan.from_json(plan.read_text(encoding="utf-8"), where=str(plan))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{plan}: cannot be read: {error}. Write it with 'qhw plan --out'.") from error
        report = qhw.cost(load_model(model), made, target=target, clock=clock)
    elif target is not None:
        report = qhw.cost(load_model(model), qhw.load_target(target), clock=clock)
    else:
        raise PlanError("--target: needed for a float model. Give a name (qhw target list), or a path to a .toml file.")
    if as_json:
        print_json(report.to_data())
    else:
        _show(report)


def _show(report: "CostReport") -> None:
    from qhw.cli.console import heading, paragraph, print_table
    from qhw.cli.figures import cycles_words, joules_words, seconds_words
    from qhw.cli.words import count_words
    from qhw.wording import counted, listed

    memories = list(dict.fromkeys(name for operator in report.operators for name in operator.memory))
    heading(f"{report.target} · one sample · {f'clock {report.clock}' if report.clock else 'no clock stated'}")
    rows = [
        (
            operator.name,
            operator.kind,
            operator.kernel or "-",
            count_words(operator.macs) if operator.macs else "-",
            cycles_words(operator.compute),
            *(cycles_words(operator.memory[name]) if name in operator.memory else "-" for name in memories),
            cycles_words(operator.cycles),
            operator.bound_by or "unknown",
        )
        for operator in report.operators
    ]
    print_table(("operator", "kind", "kernel", "MACs", "arithmetic", *memories, "cycles", "bound by"), rows)
    print()
    paragraph("Cycles", cycles_words(report.cycles))
    paragraph("Time", seconds_words(report.seconds))
    paragraph("Energy", joules_words(report.joules))
    bounds = ", ".join(f"{name}: {counted(number, 'operator')}" for name, number in report.bounds.items())
    if bounds:
        paragraph("Bound by", bounds)
    if report.host:
        paragraph("Not counted", f"{counted(len(report.host), 'operator')} on the host: {listed(report.host)}")
    for text in report.refused:
        paragraph("Refused", text)
    missing = dict.fromkeys((*report.cycles.missing, *report.seconds.missing, *report.joules.missing))
    if missing:
        paragraph("Not known", ", ".join(missing))
