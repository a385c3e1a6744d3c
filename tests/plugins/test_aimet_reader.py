# SPDX-License-Identifier: Apache-2.0
"""AIMET's encodings in their three versions, alone and with the model, and files that are wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qhw.errors import ArtefactError
from qhw.legality import CheckReport, Encoding, judge
from qhw_plugins.aimet_reader import AimetReader
from tests.quantized_files import OnnxFile
from tests.unit.legality.conftest import changed

FREE = {"formats.a8": {"bits": 8, "signed": False, "zero_point": "free", "per": "tensor"}}


def entry_0(scale: float, offset: int, bits: int = 8, symmetric: bool = False) -> dict[str, Any]:
    return {
        "bitwidth": bits,
        "dtype": "int",
        "is_symmetric": str(symmetric),
        "max": scale * (offset + 2**bits - 1),
        "min": scale * offset,
        "offset": offset,
        "scale": scale,
    }


VERSION_0 = {
    "version": "0.6.1",
    "activation_encodings": {"x": [entry_0(0.5, -3)], "gemm": [entry_0(1.0, 0)]},
    "param_encodings": {"w": [entry_0(s, -128, symmetric=True) for s in (0.25, 0.5)]},
}
VERSION_1 = {
    "version": "1.0.0",
    "activation_encodings": [
        {"name": "x", "bw": 8, "dtype": "INT", "enc_type": "PER_TENSOR", "is_sym": False, "scale": [0.5],
         "offset": [-3]},
        {"name": "gemm", "bw": 8, "dtype": "INT", "enc_type": "PER_TENSOR", "is_sym": False, "scale": [1.0],
         "offset": [0]},
    ],
    "param_encodings": [
        {"name": "w", "bw": 8, "dtype": "INT", "enc_type": "PER_CHANNEL", "is_sym": True, "scale": [0.25, 0.5],
         "offset": [-128, -128]},
    ],
}  # fmt: skip
VERSION_2 = {
    "version": "2.0.0",
    "encodings": [
        {"name": "x", "output_dtype": "uint8", "y_scale": 0.5, "y_zero_point": 3},
        {"name": "gemm", "output_dtype": "uint8", "y_scale": 1.0},
        {"name": "w", "output_dtype": "int8", "y_scale": [0.25, 0.5], "axis": 0},
    ],
}


def write(folder: Path, data: Any) -> Path:
    path = folder / "net.encodings"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def model(folder: Path) -> Path:
    """A product of [1, 2] with two rows; 0.8 / 0.25 = 3.2 and 1.26 / 0.5 = 2.52 round to 3 and 3."""
    f = OnnxFile()
    weight = f.stored("w", [[0.8, -0.25], [1.26, 0.5]])
    f.gives(f.op("Gemm", [f.given("x", [1, 2]), weight], "gemm", transB=1))
    return f.write(folder)


def check(path: Path, changes: dict[str, Any], model: Path | None = None) -> CheckReport:
    return judge(AimetReader().read(path, model), changed(changes), "net.encodings")


def refusal(path: Path, model: Path | None = None) -> str:
    with pytest.raises(ArtefactError) as caught:
        AimetReader().read(path, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def facts(e: Encoding) -> tuple[Any, ...]:
    signed = e.as_signed(True)
    return e.scale.tolist(), signed.zero_point.tolist(), signed.quant_min, signed.quant_max, e.bits


@pytest.mark.parametrize("data", [VERSION_0, VERSION_1], ids=["0.6.1", "1.0.0"])
def test_encodings_of_one_content(data: Any, tmp_path: Path) -> None:
    artefact = AimetReader().read(write(tmp_path, data), None)
    # An offset of -3 is a zero point of 3 for codes from 0, and of -125 for int8.
    assert facts(artefact.activations["x"]) == (0.5, -125, -128, 127, 8)
    assert facts(artefact.parameters["w"]) == ([0.25, 0.5], [0, 0], -128, 127, 8)


def test_version_2_states_the_type(tmp_path: Path) -> None:
    artefact = AimetReader().read(write(tmp_path, VERSION_2), None)
    x, w = artefact.activations["x"], artefact.parameters["w"]
    assert (x.signed, int(x.zero_point), w.signed, w.axis) == (False, 3, True, 0)


def test_a_strictly_symmetric_grid_has_no_code_without_a_counterpart(tmp_path: Path) -> None:
    strict = entry_0(0.5, -127, symmetric=True) | {"max": 63.5, "min": -63.5}
    data = {"version": "0.6.1", "activation_encodings": {}, "param_encodings": {"w": [strict]}}
    found = AimetReader().read(write(tmp_path, data), None).parameters["w"].as_signed(True)
    assert (found.quant_min, found.quant_max, int(found.zero_point)) == (-127, 127, 0)


@pytest.mark.parametrize("data", [VERSION_0, VERSION_1, VERSION_2], ids=["0.6.1", "1.0.0", "2.0.0"])
def test_with_the_model_operators_are_judged(data: Any, tmp_path: Path) -> None:
    free = {**FREE, "formats.w8.scale": None, "requantize.r": {"kind": "float32", "rounding": "half_even"}}
    report = check(write(tmp_path, data), free, model=model(tmp_path))
    assert [(one.name, one.status) for one in report.operators] == [("gemm", "legal")]
    artefact = AimetReader().read(write(tmp_path, data), model(tmp_path))
    (gemm,) = artefact.operators
    assert gemm.weight is not None and gemm.weight.codes is not None and gemm.weight.encoding is not None
    codes = gemm.weight.codes - gemm.weight.encoding.zero_point.reshape(-1, 1)
    assert np.array_equal(codes, [[3, -1], [3, 1]])


def test_with_the_model_one_broken_thing_is_named(tmp_path: Path) -> None:
    data = json.loads(json.dumps(VERSION_0))
    data["param_encodings"]["w"][1]["offset"] = -100
    free = {**FREE, "formats.w8.scale": None, "requantize.r": {"kind": "float32", "rounding": "half_even"}}
    report = check(write(tmp_path, data), free, model=model(tmp_path))
    assert {(one.node, one.clause) for one in report.violations} == {("gemm", "formats.w8.zero_point")}


def test_with_the_model_what_is_not_its_own_or_passed_over_is_said(tmp_path: Path) -> None:
    data = json.loads(json.dumps(VERSION_0))
    data["activation_encodings"] |= {"renamed": [entry_0(0.5, 0)], "again": [entry_0(0.5, 0)]}
    data["activation_encodings"]["real"] = [{"bitwidth": 16, "dtype": "float"}]
    assert AimetReader().read(write(tmp_path, data), model(tmp_path)).remarks == (
        "1 encodings of floats or without a scale were passed over",
        "encodings of tensors that the model does not have: again and 1 more",
    )
    assert AimetReader().read(write(tmp_path, VERSION_0), model(tmp_path)).remarks == ()


def test_without_the_model_tensors_are_judged_against_what_any_kernel_takes(tmp_path: Path) -> None:
    report = check(write(tmp_path, VERSION_0), {**FREE, "formats.w8.scale": None})
    assert (report.is_legal, report.tensors, report.operators) == (True, 3, ())
    # Whether a weight has the code -128, which the format lacks, cannot be told without the model.
    assert [(one.clause, one.nodes) for one in report.unjudged] == [("formats.w8.codes", ("w",))]
    report = check(write(tmp_path, VERSION_0), {"formats.w8.scale": None})
    assert {(one.node, one.clause) for one in report.violations} == {
        ("x", "formats.a8.zero_point"),
        ("gemm", "formats.a8.zero_point"),
    }


def test_encodings_that_do_not_fit_the_model(tmp_path: Path) -> None:
    data = json.loads(json.dumps(VERSION_0))
    data["param_encodings"]["w"].append(entry_0(1.0, -128))
    assert "has 3 encodings where axis 0 of [2, 2] needs as many" in refusal(write(tmp_path, data), model(tmp_path))


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "is no JSON"),
    "deep nesting": ('{"activation_encodings": ' + "[" * 100_000, "is no JSON"),
    "a list": ("[]", "must hold activation_encodings"),
    "another object": ("{}", "must hold activation_encodings"),
    "a version of tomorrow": ({"version": "9.0.0", "encodings": []}, "version must be one of"),
    "a text": ({"activation_encodings": "x"}, "must be an object or a list"),
    "a NaN": (
        '{"activation_encodings": {"x": [{"bitwidth": 8, "scale": NaN, "offset": 0}]}}',
        "scale must be a number",
    ),
    "no bits": ({"activation_encodings": {"x": [{"scale": 1.0, "offset": 0}]}}, "bitwidth must be a number"),
    "a thousand bits": ({"activation_encodings": {"x": [{"bitwidth": 1000, "scale": 1, "offset": 0}]}}, "bits must be"),
    "half an offset": (
        {"activation_encodings": {"x": [entry_0(1.0, 0) | {"offset": -1.5}]}},
        "x: offset must be an integer; got -1.5.",
    ),
    "half an offset of version 1": (
        {"version": "1.0.0", "activation_encodings": [{"name": "x", "bw": 8, "scale": [1.0], "offset": [0.5]}]},
        "x: offset must be an integer; got 0.5.",
    ),
    "half a zero point": (
        {"version": "2.0.0", "encodings": [{"name": "x", "output_dtype": "int8", "y_scale": 1.0, "y_zero_point": 0.5}]},
        "x: y_zero_point must be an integer; got 0.5.",
    ),
    "a nameless one": ({"version": "1.0.0", "activation_encodings": [{"bw": 8}]}, "with a name"),
    "an entry that is no object": ({"version": "2.0.0", "encodings": {"x": 3}}, "x: must be an object; got int"),
    "another of version 1": ({"version": "1.0.0", "activation_encodings": {"x": 3}}, "x: must be an object; got int"),
    "a list of none": ({"activation_encodings": {"x": []}}, "x: must be a list of encodings"),
    "no bits of version 1": (
        {"version": "1.0.0", "activation_encodings": [{"name": "x", "bw": 0, "scale": [1.0]}]},
        "bw must be from 1 to 64; got 0",
    ),
    "two widths": (
        {"activation_encodings": {"x": [entry_0(1.0, 0), entry_0(1.0, 0, bits=4)]}},
        "bitwidth must be one for all channels; got [4, 8]",
    ),
    "a text for a scale": (
        {"version": "1.0.0", "activation_encodings": [{"name": "x", "bw": 8, "scale": ["a"]}]},
        "scale must be numbers; got 'a'",
    ),
    "no scales": (
        {"version": "1.0.0", "activation_encodings": [{"name": "x", "bw": 8, "scale": [], "offset": []}]},
        "scale must be numbers; got none",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_one_line(case: str, tmp_path: Path) -> None:
    data, words = WRONG[case]
    assert words in refusal(write(tmp_path, data))


def test_a_file_beyond_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, VERSION_0)
    monkeypatch.setattr("qhw_plugins.aimet_reader._MAX_BYTES", 10)
    assert f"must be at most 10 bytes; got {path.stat().st_size}. Is this an encodings file?" in refusal(path)


def test_floats_are_passed_over_and_that_is_said(tmp_path: Path) -> None:
    data = {
        "version": "1.0.0",
        "activation_encodings": [{"name": "x", "bw": 16, "dtype": "FLOAT"}],
        "param_encodings": [],
    }
    artefact = AimetReader().read(write(tmp_path, data), None)
    assert artefact.activations == {}
    assert artefact.remarks[-1] == "1 encodings of floats or without a scale were passed over"
