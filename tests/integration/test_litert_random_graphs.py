# SPDX-License-Identifier: Apache-2.0
"""The integer execution of random graphs against LiteRT's reference kernels: 0 codes differ, where mutants do.

Every result of every operator is compared. A run counts only if mutants of the arithmetic, computed operator by
operator on the same operands, each give other codes on it.
"""

from collections.abc import Iterable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("ai_edge_litert")

from qhw.engine import QuantizedModel
from qhw.errors import IntegerError
from qhw.integer import IntegerModel, differences
from qhw.integer.codes import Codes
from qhw.integer.model import Executed
from qhw.numerics import quantize
from tests.litert_network import build_network, run_network
from tests.litert_random import MUTANTS, PAIR_MUTANTS, TARGET, on_other_grids, quantized
from tests.random_grids import SCALES, grid_of, input_of
from tests.random_outcome import Mutant, Outcome
from tests.random_pairs import every_pair, pairs

pytestmark = pytest.mark.slow

QUICK = (0, 2, 3, 4, 6, 7, 9, 12, 14, 15, 17, 18, 20, 21, 22, 23, 26, 28, 48, 74)
# What a run of many draws at least once: it says nothing of what it does not hold.
STEPS = {
    "conv", "depthwise", "grouped", "conv_transpose", "linear", "matmul", "add", "sub", "mul", "max", "min", "concat",
    "average_pool", "max_pool", "global_average_pool", "mean", "sigmoid", "tanh", "abs", "alone_relu", "alone_relu6",
    "hard_swish", "gelu", "exp", "leaky_relu", "softmax", "log_softmax", "resize_nearest", "resize_bilinear", "flatten",
    "reshape", "unsqueeze", "squeeze", "transpose", "slice", "strided_slice", "select", "split", "chunk", "expand",
    "tile", "pixel_shuffle", "pixel_unshuffle", "pad", "reflect", "relu", "relu6", "relu_n1_to_1", "branch",
}  # fmt: skip


def add_case(
    outcome: Outcome,
    result: QuantizedModel,
    inputs: tuple[Tensor, ...],
    mutants: Mapping[str, Mutant] | None = None,
    steps: Iterable[str] = (),
) -> None:
    """Run one model in integers and in LiteRT, and the mutants on the operands of the integer run."""
    try:
        model = IntegerModel(result)
    except IntegerError as error:  # scales that the target's arithmetic does not reach
        outcome.islands[(str(error),)] += 1
        return
    run: list[Executed] = []
    model(*inputs, trace=run.append)
    mine = {one.site.members[-1].name: one.result.integers() for one in run if isinstance(one.result, Codes)}
    given = [quantize(x, grid_of(result, name)) for name, x in zip(result.input_names, inputs, strict=True)]
    found = run_network(build_network(result, len(inputs[0])), *(codes.to(torch.int8).numpy() for codes in given))
    assert mine.keys() <= found.keys()
    theirs = {name: torch.from_numpy(codes) for name, codes in found.items()}
    outcome.add(differences(mine, theirs), {one.site.members[-1].name: one.site.operator.kind for one in run}, steps)
    outcome.add_mutants(mutants or {}, run)


def run_graphs(seeds: Iterable[int]) -> Outcome:
    """Every seed's graph on scales of every kind."""
    outcome = Outcome()
    for seed in seeds:
        drawn = quantized(seed)
        if drawn.hosted:
            outcome.islands[drawn.hosted] += 1
            continue
        for kind in SCALES:
            result = on_other_grids(drawn.result, kind, seed)
            add_case(outcome, result, (input_of(result, drawn.example, seed),), MUTANTS, drawn.steps)
    return outcome


def test_random_graphs_give_the_codes_of_litert_and_mutants_do_not() -> None:
    outcome = run_graphs(QUICK)  # few sums: their mutants are told apart below
    outcome.check([(name, kinds) for name, mutant in MUTANTS.items() if (kinds := mutant.kinds) != ("Add", "Sub")])


@pytest.mark.parametrize("operator", ["add", "sub", "mul"])
def test_sums_and_products_of_every_pair_of_codes_are_those_of_litert(operator: str) -> None:
    outcome, quantized_pair = Outcome(), pairs(operator, TARGET)
    for seed in range(24):
        kind = ("decimal", "random", "decimal", "power_of_two")[seed % 4]
        result = on_other_grids(quantized_pair, kind, seed, spread=4.0)
        add_case(outcome, result, every_pair(result), PAIR_MUTANTS)
    kind = operator.capitalize()
    outcome.check([(name, (kind,)) for name, mutant in PAIR_MUTANTS.items() if kind in mutant.kinds])


@pytest.mark.slow
def test_a_thousand_random_graphs_give_the_codes_of_litert_and_mutants_do_not() -> None:
    outcome = run_graphs(range(1000))
    assert outcome.cases >= 2900, str(outcome)
    outcome.check([(name, (kind,)) for name, mutant in MUTANTS.items() for kind in mutant.kinds])
    assert outcome.steps.keys() >= STEPS, STEPS - outcome.steps.keys()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(2000, 2**31), kind=st.sampled_from(SCALES))
def test_any_random_graph_gives_the_codes_of_litert(seed: int, kind: str) -> None:
    outcome, drawn = Outcome(), quantized(seed)
    if not drawn.hosted:
        result = on_other_grids(drawn.result, kind, seed)
        add_case(outcome, result, (input_of(result, drawn.example, seed),))
    assert outcome.differing.total() == 0, str(outcome)
