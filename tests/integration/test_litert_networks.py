# SPDX-License-Identifier: Apache-2.0
"""Whole networks in integers against LiteRT's reference kernels: no code of any tensor differs."""

from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("ai_edge_litert")

import qhw
from bench.data import load_models
from qhw.engine import QuantizedModel, SilentProgress
from qhw.extension import default_registry
from qhw.integer import IntegerModel
from qhw.schema import parse_target
from tests.litert_network import build_network, run_network

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[3] / "shared" / "data"
BATCH = 100
# Clauses that decide ties in the millions; those of single operators are told apart in test_litert_operators.py.
MUTANTS = (
    'requantize.rescale = { rounding = "half_away_from_zero", source = "memory" }',
    'requantize.rescale = { rounding = "double_half_to_plus_infinity", source = "memory" }',
    'operators.Add = { preshift_bits = { a8 = 6 }, source = "memory" }',
)


@pytest.mark.skipif(not DATA.is_dir(), reason="the trained networks are not here")
@pytest.mark.parametrize("images", [BATCH, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2"])
def test_no_code_of_a_whole_network_differs(name: str, images: int) -> None:
    models = load_models()
    calibration, _ = models.cifar10("train", 200)
    test, _ = models.cifar10("test", images)
    float_model = models.resnet(20) if name == "resnet20" else models.mobilenet_v2()
    graph = qhw.capture(float_model, calibration[:2])
    plan = qhw.plan(graph, "google/litert-int8", calibration=calibration, pipeline="ranges-ptq")
    result = qhw.quantize(graph, plan, calibration=calibration, progress=SilentProgress())
    (given,) = result.input_names
    network, model = build_network(result, BATCH), IntegerModel(result)
    compared, differing = Counter[str](), Counter[str]()
    for batch in test.split(BATCH):
        mine = model.codes(batch)
        theirs = run_network(network, mine.pop(given).numpy())
        for key, codes in mine.items():
            compared[key] += codes.numel()
            differing[key] += int((codes != torch.from_numpy(theirs[key])).sum())
    print(f"{name}: {differing.total()} of {compared.total()} codes in {len(compared)} tensors differ")
    assert +differing == Counter()
    first = model.codes(test[:BATCH])
    for clause in MUTANTS:
        text = f'schema_version = 1\nname = "acme/mutant"\nextends = "google/litert-int8"\n{clause}'
        mutant = parse_target(text, find_base=default_registry().target_path)
        other = IntegerModel(QuantizedModel(result.float_graph, result.plan, mutant, result.encodings()))
        assert any(bool((codes != first[key]).any()) for key, codes in other.codes(test[:BATCH]).items()), clause
