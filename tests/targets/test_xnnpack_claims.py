# SPDX-License-Identifier: Apache-2.0
"""google/xnnpack against XNNPACK under LiteRT, on the models that google/litert-int8 is held against.

No code of IntegerModel differs; under google/litert-int8, LiteRT's own arithmetic, some do.
"""

import platform
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("ai_edge_litert")

from ai_edge_litert.interpreter import Interpreter, OpResolverType

from qhw.extension import default_registry
from qhw.schema import TargetSpec, parse_target
from tests import litert_support
from tests.integration.test_litert_operators import OPERATORS, Draws, results_of
from tests.litert_writer import Encoding, Writer

# Operator -> whether LiteRT's own arithmetic differs on these models. Gemm's is in float64, and differs on ties alone.
DELEGATED = {"Conv": True, "DepthwiseConv": True, "ConvTranspose": True, "Gemm": False, "Mul": True, "Sigmoid": False,
             "Tanh": False, "MaxPool": False, "Concat": False, "Pad": False}  # fmt: skip


class ShapedWriter(Writer):
    """Results have their shapes in the file: XNNPACK takes no image whose rank it does not see."""

    shape: Sequence[int] | None = None

    def add_many(self, name: str, options: Any, operands: Sequence[int], encodings: Sequence[Encoding]) -> list[int]:
        places = super().add_many(name, options, operands, encodings)
        if ShapedWriter.shape is not None:
            self._graph.tensors[places[0]].shape = list(ShapedWriter.shape)
        return places


def operators_of(file: bytes) -> list[str]:
    run = Interpreter(model_content=file, experimental_op_resolver_type=OpResolverType.BUILTIN, num_threads=1)
    run.allocate_tensors()
    return [operator["op_name"] for operator in run._get_ops_details()]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """`litert_support` runs models on XNNPACK; what their operators became, one list for each model."""
    build, found = litert_support.build_operator, []

    def built(*arguments: Any, **named: Any) -> bytes:
        monkeypatch.setattr(ShapedWriter, "shape", None)
        run = Interpreter(model_content=build(*arguments, **named), num_threads=1)
        run.allocate_tensors()
        monkeypatch.setattr(ShapedWriter, "shape", run.get_output_details()[0]["shape"].tolist())
        file = build(*arguments, **named)
        found.append(operators_of(file))
        return file

    class Resolver:
        BUILTIN_REF = OpResolverType.BUILTIN

    monkeypatch.setattr(litert_support, "Writer", ShapedWriter)
    monkeypatch.setattr(litert_support, "build_operator", built)
    monkeypatch.setattr(litert_support, "OpResolverType", Resolver)
    return found


def target(base: str) -> TargetSpec:
    text = f'schema_version = 1\nname = "acme/same"\nextends = "{base}"\n'
    return parse_target(text, find_base=default_registry().target_path)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="observed on x86-64")
@pytest.mark.parametrize("kind", DELEGATED)
def test_no_code_differs_from_xnnpack(kind: str, seen: list[list[str]]) -> None:
    specs = [target("google/xnnpack"), target("google/litert-int8")]
    differing = [0, 0]
    for seed in range(2):
        case = OPERATORS[kind].draw(Draws("decimal", seed))
        for index, spec in enumerate(specs):
            differing[index] += int((results_of(case, [spec])[0] != case.expected).sum())
    assert seen and all("DELEGATE" in operators for operators in seen)
    assert differing[0] == 0
    assert bool(differing[1]) is DELEGATED[kind]
