# SPDX-License-Identifier: Apache-2.0
"""The integer execution of random graphs against LiteRT's reference kernels: 0 codes differ, where mutants do.

Every result of every operator is compared. A run counts only if mutants of the arithmetic, computed operator by
operator on the same operands, each give other codes on it.
"""

from collections.abc import Iterable

import pytest
import torch

pytest.importorskip("ai_edge_litert")

from qhw.engine import QuantizedModel
from qhw.integer import IntegerModel, differences
from qhw.integer.codes import Codes
from qhw.integer.model import Executed
from qhw.numerics import quantize
from tests.litert_network import build_network, run_network
from tests.litert_random import MUTANTS, on_other_grids, quantized
from tests.random_grids import SCALES, grid_of, input_of
from tests.random_models import Drawn
from tests.random_outcome import Outcome

QUICK = range(20)


def add_case(outcome: Outcome, drawn: Drawn, result: QuantizedModel, seed: int) -> None:
    """Run one model in integers and in LiteRT, and the mutants on the operands of the integer run."""
    if drawn.hosted:
        outcome.islands[drawn.hosted] += 1
        return
    x = input_of(result, drawn.example, seed)
    run: list[Executed] = []
    IntegerModel(result)(x, trace=run.append)
    given = quantize(x, grid_of(result, result.input_names[0])).to(torch.int8)
    theirs = run_network(build_network(result, len(x)), given.numpy())
    mine = {one.site.members[-1].name: one.result.integers() for one in run if isinstance(one.result, Codes)}
    assert mine.keys() <= theirs.keys()
    kinds = {one.site.members[-1].name: one.site.operator.kind for one in run}
    outcome.add(differences(mine, {name: torch.from_numpy(y) for name, y in theirs.items()}), kinds, drawn.steps)
    outcome.add_mutants(MUTANTS, run)


def run_graphs(seeds: Iterable[int]) -> Outcome:
    """Every seed's graph on scales of every kind."""
    outcome = Outcome()
    for seed in seeds:
        drawn = quantized(seed)
        for kind in SCALES:
            add_case(outcome, drawn, on_other_grids(drawn.result, kind, seed), seed)
    return outcome


def test_random_graphs_give_the_codes_of_litert_and_mutants_do_not() -> None:
    outcome = run_graphs(QUICK)
    outcome.check([(name, mutant.kinds) for name, mutant in MUTANTS.items()])
