# SPDX-License-Identifier: Apache-2.0
"""Whole networks in integers against LiteRT's reference kernels: every code of every tensor, over 100 images."""

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

DATA = Path(__file__).parents[3] / "shared" / "data"
IMAGES = 100
# Clauses that decide ties in the millions; those of single operators are told apart in test_litert_operators.py.
MUTANTS = (
    'requantize.rescale = { rounding = "half_away_from_zero", source = "memory" }',
    'requantize.rescale = { rounding = "double_half_to_plus_infinity", source = "memory" }',
    'operators.Add = { preshift_bits = { a8 = 6 }, source = "memory" }',
)


@pytest.mark.skipif(not DATA.is_dir(), reason="the trained networks are not here")
@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2"])
def test_no_code_of_a_whole_network_differs(name):
    models = load_models()
    images, _ = models.cifar10("train", 200)
    test, _ = models.cifar10("test", IMAGES)
    network = models.resnet(20) if name == "resnet20" else models.mobilenet_v2()
    graph = qhw.capture(network, images[:2])
    plan = qhw.plan(graph, "google/litert-int8", calibration=images, pipeline="ranges-ptq")
    result = qhw.quantize(graph, plan, calibration=images, progress=SilentProgress())
    codes = IntegerModel(result).codes(test)
    (given,) = result.input_names
    theirs = run_network(build_network(result, IMAGES), codes[given].numpy())
    compared = {key: (codes[key], torch.from_numpy(theirs[key])) for key in codes if key != given}
    differing = {key: int((mine != other).sum()) for key, (mine, other) in compared.items()}
    total = sum(mine.numel() for mine, _ in compared.values())
    print(f"{name}: {sum(differing.values())} of {total} codes in {len(compared)} tensors differ")
    assert {key: count for key, count in differing.items() if count} == {}
    for clause in MUTANTS:
        text = f'schema_version = 1\nname = "acme/mutant"\nextends = "google/litert-int8"\n{clause}'
        mutant = parse_target(text, find_base=default_registry().target_path)
        other = IntegerModel(QuantizedModel(result.float_graph, result.plan, mutant, result.encodings())).codes(test)
        assert any(bool((other[key] != y).any()) for key, (_, y) in compared.items()), clause
