# SPDX-License-Identifier: Apache-2.0
"""A result that no form holds yet is kept all the same, where its target names no exporter."""

from pathlib import Path

import pytest

import qhw
from qhw.errors import ExportError

FLOATS = """
schema_version = 1
name = "acme/floats"
formats.f6 = { kind = "float", bits = 6, exponent_bits = 2, mantissa_bits = 3, finite_max = 7.5, zero_point = 0, per = "tensor" }
kernels.mac = { input = ["f6"], weight = ["f6"], output = ["f6"] }
operators.Conv = { kernels = ["mac"], fused = ["Relu"] }
operators.Gemm = { kernels = ["mac"], fused = ["Relu"] }
fallback = "host"
"""  # noqa: E501
QUANTIZE = "quantize net:model --target floats.toml --calibration net:batches --evaluate net:labelled --out out"


def test_it_is_saved_scored_and_said(qhw_run, folder: Path, caplog: pytest.LogCaptureFixture):
    (folder / "floats.toml").write_text(FLOATS)
    ran = qhw_run(*QUANTIZE.split())
    assert ran.status == 0, ran.err
    (said,) = [record.getMessage() for record in caplog.records if "no artefact" in record.getMessage()]
    assert "'acme/floats' names no exporter" in said and "formats.f6" in said
    assert "simulated" in ran.out and "artefact is in" not in ran.out
    assert not (folder / "out" / "artefacts").exists()
    assert qhw.load(folder / "out").plan.target == "acme/floats"
    assert (folder / "out" / "evaluation.json").is_file()


def test_an_exporter_that_is_named_must_hold_it(qhw_run, folder: Path):
    (folder / "floats.toml").write_text(FLOATS + 'artefact = { exporter = "onnx_qdq" }\n')
    ran = qhw_run(*QUANTIZE.split())
    assert ran.status == 1 and "this form has no type for them" in ran.err
    assert not (folder / "out").exists()


def test_asked_for_by_call_it_is_an_error(qhw_run, folder: Path):
    (folder / "floats.toml").write_text(FLOATS)
    assert qhw_run(*QUANTIZE.split()).status == 0
    with pytest.raises(ExportError, match="this form has no type for them"):
        qhw.export(qhw.load(folder / "out"), folder / "artefact")
