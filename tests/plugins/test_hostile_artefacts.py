# SPDX-License-Identifier: Apache-2.0
"""Whatever bytes a reader is given: a model, or an error of one line; and what it reads can be judged."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qhw.errors import ArtefactError
from qhw.extension import ArtefactReader
from qhw.legality import judge
from qhw.schema import load_target_file
from qhw_plugins.aimet_reader import AimetReader
from qhw_plugins.onnx_reader import OnnxReader
from qhw_plugins.tflite_reader import TfliteReader
from tests.plugins.test_onnx_reader import integer_conv
from tests.quantized_files import conv_file

ROOT = Path(__file__).parents[2] / "targets/qhw_targets"
TARGETS = [load_target_file(ROOT / name) for name in ("espressif/esp32-p4.toml", "google/litert-int8.toml")]
ENCODINGS = json.dumps(
    {
        "version": "1.0.0",
        "activation_encodings": [
            {"name": "x", "bw": 8, "dtype": "INT", "is_sym": False, "scale": [0.5], "offset": [-3]}
        ],
        "param_encodings": [{"name": "w", "bw": 4, "enc_type": "PER_CHANNEL", "scale": [0.5, 1.0], "offset": [-8, -8]}],
    }
).encode()


def tflite_bytes() -> bytes:
    from tests.plugins.test_tflite_reader import conv

    return conv(activation=1)


def seeds() -> dict[str, tuple[type[ArtefactReader], bytes]]:
    found: dict[str, tuple[type[ArtefactReader], bytes]] = {
        "qdq": (OnnxReader, conv_file(behind=["Relu"]).model().SerializeToString()),
        "qoperator": (OnnxReader, integer_conv().model().SerializeToString()),
        "encodings": (AimetReader, ENCODINGS),
    }
    with suppress(pytest.skip.Exception):  # ai-edge-litert has no wheel for this machine
        found["tflite"] = TfliteReader, tflite_bytes()
    return found


SEEDS = seeds()
CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8)


def survives(reader: type[ArtefactReader], path: Path) -> None:
    """Either a model that can be judged, or one line. Anything else is raised, and fails the test."""
    try:
        artefact = reader().read(path, None)
    except ArtefactError as error:
        assert "\n" not in str(error)
        return
    for target in TARGETS:
        judge(artefact, target, "file").to_json()


@pytest.mark.parametrize("name", SEEDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES, cut=st.floats(0.3, 1.0), data=st.data())
def test_a_file_with_some_bytes_changed(name: str, changes: Any, cut: float, data: Any, tmp_path: Path) -> None:
    reader, whole = SEEDS[name]
    raw = bytearray(whole)
    for place, value in changes:
        raw[int(place * len(raw))] = value
    keep = len(raw) if data.draw(st.booleans()) else int(cut * len(raw))
    path = tmp_path / "file"
    path.write_bytes(raw[:keep])
    survives(reader, path)


@pytest.mark.parametrize("reader", [OnnxReader, TfliteReader, AimetReader])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=400))
def test_any_bytes(reader: type[ArtefactReader], content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\0\0\0\0TFL3" + content if reader is TfliteReader else content)
    survives(reader, path)


@pytest.mark.parametrize("reader", [OnnxReader, TfliteReader, AimetReader])
@pytest.mark.parametrize("filling", [b"\0", b"\xff", b"TFL3", b"{["], ids=["zeros", "ones", "marks", "brackets"])
def test_ten_megabytes_of_one_thing(reader: type[ArtefactReader], filling: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\x14\0\0\0TFL3" + filling * (10 * 2**20 // len(filling)))
    with pytest.raises(ArtefactError) as caught:
        reader().read(path, None)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000  # and nothing of the ten megabytes is in it


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.dictionaries(
    st.sampled_from(["name", "bw", "bitwidth", "scale", "offset", "enc_type", "dtype", "max", "min", "block_size",
                     "output_dtype", "y_scale", "y_zero_point", "axis", "compressed_bw"]),
    st.sampled_from([8, 4, 0, -1, 10**30, 0.5, "int8", "INT", "x", [0.5], [0.5, 1.0], [-128], [], None, "PER_BLOCK"])
    | JSON_VALUES,
    max_size=8,
)  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    version=st.sampled_from(["0.6.1", "1.0.0", "2.0.0", None]) | JSON_VALUES,
    sections=st.dictionaries(
        st.sampled_from(["activation_encodings", "param_encodings", "encodings"]),
        st.lists(ENTRY, max_size=3)
        | st.dictionaries(st.text(max_size=3), st.lists(ENTRY, max_size=2) | ENTRY)
        | JSON_VALUES,
        min_size=1,
    ),
)  # fmt: skip
def test_encodings_of_any_content(version: Any, sections: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.encodings"
    path.write_text(json.dumps({"version": version, **sections}))
    survives(AimetReader, path)
