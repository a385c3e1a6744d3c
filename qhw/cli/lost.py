# SPDX-License-Identifier: Apache-2.0
"""What quantizing may cost, and what `qhw quantize` does about more: it trains, or says how to."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qhw.wording import argument

if TYPE_CHECKING:
    from qhw.engine import QuantizedModel
    from qhw.graph import Graph

__all__ = ["EpochsOption", "Lost", "TrainOption", "WithinOption"]

TrainOption = Annotated[
    str | None,
    typer.Option(
        "--train",
        metavar="DATA",
        help="Labelled samples, as --evaluate takes them, to train the result on where it loses more than --within.",
    ),
]
WithinOption = Annotated[
    float | None,
    typer.Option(
        "--within",
        metavar="POINTS",
        help="How far the score may lie below the float model's; without --train, more is only said. Absent: any loss.",
    ),
]
EpochsOption = Annotated[
    int, typer.Option("--epochs", metavar="NUMBER", help="How often the data of --train is gone through.")
]


@dataclass(frozen=True)
class Lost:
    """What may be lost against the float model, and what is done about more.

    Attributes:
        within: Points; None: nothing.
        name: What the command line calls the data to train on; None: nothing is done.
        data: The data.
        epochs: Of training.
        seed: Of training.
    """

    within: float | None
    name: str | None
    data: Any
    epochs: int
    seed: int

    def check(self, graph: "Graph", labelled: Any) -> None:
        """Refuse what would end badly after long work."""
        from qhw.engine.evaluate import check_labelled
        from qhw.errors import PlanError

        if labelled is None:
            raise PlanError(
                "--train and --within: need the score of the float model and the result. Add --evaluate DATA."
            )
        if self.name is not None:
            check_labelled(graph, self.data, self.name)

    def trained(
        self, graph: "Graph", result: "QuantizedModel", labelled: Any, metric: Any, out: Path
    ) -> "QuantizedModel":
        """The result, trained where it loses too much and there is data."""
        import qhw
        from qhw.cli.console import warn
        from qhw.decisions import Reason
        from qhw.engine import evaluate as score_all

        runners = {"float": lambda inputs: graph.module(*inputs), "simulated": lambda inputs: result(*inputs)}
        whole, now = score_all(graph, runners, labelled, metric)
        lost, most = whole.value - now.value, self.within or 0.0
        if lost <= most:
            return result
        words = f"loses {lost:.2f} of {whole.value:.2f}, more than {most:g} (--within)"
        if self.name is None:
            warn(f"the result {words}. --train DATA trains it, or 'qhw train {argument(out)} --data DATA' later.")
            return result
        rule = f"{{value}} below the float model's score, more than {most:g}: trained"
        form = qhw.trainable(result, because=Reason(subject="evaluation.lost", value=round(lost, 2), rule=rule))
        qhw.train(form, self.data, epochs=self.epochs, seed=self.seed, work_folder=f"{out}.training")
        return qhw.freeze(form)
