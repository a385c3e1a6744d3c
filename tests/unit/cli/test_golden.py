# SPDX-License-Identifier: Apache-2.0
"""`qhw golden`: what it writes and prints, and its mistakes in one line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.cli.conftest import TINY, Ran

EXACT = TINY.replace(
    'accumulator = "acc" }',
    'accumulator = "acc", bias = "b", requantize = "r" }\n'
    'biases.b = { bits = 32, scale = "input*weight", applied = "before_requantize" }\n'
    'kernels.mean = { input = ["a8"], output = ["a8"], requantize = "r" }\n'
    'requantize.r = { kind = "float32", rounding = "half_even" }\n'
    'operators.GlobalAveragePool = { kernels = ["mean"], fused = ["Relu"] }\n'
    'operators.Flatten = { same_scale = "input_output" }',
).replace('fused = ["Relu"] }', 'fused = ["Relu"], rounding_order = "zero_point_after" }')


@pytest.fixture
def result(folder: Path, qhw_run: Callable[..., Ran]) -> str:
    """A result folder that keeps 8 samples."""
    (folder / "exact.toml").write_text(EXACT)
    ran = qhw_run("quantize", "net:model", "-t", "exact.toml", "-c", "net:batches", "-o", "out")
    assert ran.status == 0, ran.err
    return "out"


def test_vectors_are_written_and_the_next_step_is_said(folder: Path, result: str, qhw_run: Callable[..., Ran]) -> None:
    ran = qhw_run("golden", result, "--out", "vectors", "--samples", "2")
    assert (ran.status, ran.err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in ran.out.splitlines())
    assert (lines["Samples"], lines["Layers"]) == ("2", "3")
    assert ran.out.splitlines()[-1].startswith(f"Next: python {Path('vectors') / 'check.py'};")
    assert sorted(path.name for path in (folder / "vectors").iterdir()) == [
        "check.py", "manifest.json", "vectors.h", "vectors.npz"
    ]  # fmt: skip
    checked = subprocess.run([sys.executable, "-I", "vectors/check.py"], capture_output=True, text=True, cwd=folder)
    assert (checked.returncode, checked.stdout) == (0, "3 layers recomputed, 2 sample(s): nothing differs\n")


def test_json_says_the_same_and_what_the_header_leaves_out(result: str, qhw_run: Callable[..., Ran]) -> None:
    ran = qhw_run(
        "golden", result, "-o", "vectors", "--data", "net:batches", "-n", "9", "--header-limit", "0", "--json"
    )
    found = json.loads(ran.out)
    assert (found["folder"], found["samples"], found["header_left_out"]) == ("vectors", 9, found["operators"])
    plain = qhw_run("golden", result, "-o", "vectors", "--header-limit", "0")
    assert f"the arrays of {', '.join(found['operators'])}: past --header-limit" in plain.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--samples", "0"), "golden: samples must be 1 or more; got 0."),
        (("--samples", "9"), "golden: there are 8 samples; got 9. Ask for fewer, or pass --data DATA."),
        (("--header-limit", "-1"), "golden: header_limit must be 0 or more bytes; got -1."),
        (("--out", "net.py"), "net.py: is a file or a link, not a folder. Choose another --out."),
        (("--out", "net.py/v"), "net.py/v: cannot be written: 'net.py' is a file, not a folder."),
        (("--out", "out"), "out: holds 'artefacts', which is no part of golden vectors"),
    ],
    ids=["no samples", "more than there are", "a limit below 0", "a file", "in a file", "a result folder"],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    folder: Path, result: str, qhw_run: Callable[..., Ran], arguments: tuple[str, ...], words: str
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    ran = qhw_run("golden", result, *(() if "--out" in arguments else ("--out", "vectors")), *arguments)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith(f"error: {words}") and len(ran.err.splitlines()) == 1
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_target_that_leaves_its_arithmetic_open_is_named(folder: Path, qhw_run: Callable[..., Ran]) -> None:
    qhw_run("quantize", "net:model", "-t", "tiny.toml", "-c", "net:batches", "-o", "out")
    ran = qhw_run("golden", "out", "--out", "vectors")
    assert ran.status == 1 and "kernels.mac.bias is not stated" in ran.err
    assert len(ran.err.splitlines()) == 1 and not (folder / "vectors").exists()
