# SPDX-License-Identifier: Apache-2.0
"""`qhw compare` and `qhw cost`: what they print, their JSON, and the mistakes a user can make."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qhw.cli.figures import cycles_words, joules_words, seconds_words
from qhw.roofline import Figure

Run = Callable[..., Any]

COMPARE = ("compare", "net:model", "--calibration", "net:batches")
FIGURES = """
cost = { channel_multiple = 8, elementwise_per_cycle = 4 }
clocks.main.clock_hz = 1e6
[memories.ram]
holds = ["weights", "activations", "biases", "tables"]
bandwidth_bytes_per_s = 1e6
ports = 1
"""


@pytest.fixture
def targets(folder: Path) -> str:
    """Two targets that say the same, one with figures of cost, and one that is broken."""
    tiny = (folder / "tiny.toml").read_text()
    (folder / "twin.toml").write_text(tiny.replace("acme/tiny", "acme/twin"))
    fast = tiny.replace("acme/tiny", "acme/fast").replace(
        'accumulator = "acc" }', 'accumulator = "acc", macs_per_cycle = 4 }'
    )
    (folder / "fast.toml").write_text(fast + FIGURES)
    (folder / "broken.toml").write_text("schema_version = 1\n")
    return "tiny.toml,twin.toml,fast.toml,broken.toml"


def test_the_matrix_has_a_line_for_each_target_and_the_reasons_once(qhw_run: Run, targets: str) -> None:
    ran = qhw_run(*COMPARE, "--targets", targets, "--evaluate", "net:labelled")
    assert ran.status == 0 and ran.err == ""
    lines = ran.out.splitlines()
    assert lines[0] == "net:model · 4 targets · calibrated on 64 samples"
    assert lines[1].startswith("In float: ") and ", top-1 " in lines[1] and lines[1].endswith(" on 64 samples")
    head = next(line for line in lines if line.startswith("target "))
    for column in ("simulated", "agrees (95 %)", "size", "MACs on chip", "operators", "head-room", "cycles", "time"):
        assert column in head
    rows = {line.split()[0]: line for line in lines if line.startswith("acme/")}
    assert set(rows) == {"acme/tiny", "acme/twin", "acme/fast"}
    # The convolution and the linear layer run on the accelerator, with the ReLU; the average over the image does not.
    assert "3 of 4" in rows["acme/tiny"] and "unknown" in rows["acme/tiny"]
    assert rows["acme/tiny"].split("KB")[1] == rows["acme/twin"].split("KB")[1]
    assert "unknown" not in rows["acme/fast"]
    assert any(line.strip() == "on every target" for line in lines)
    assert any(line.strip() == "acme/tiny, acme/twin, acme/fast" for line in lines)
    assert ran.out.count("the target does not list it") == 1
    assert "  broken.toml" in ran.out and "cannot be loaded: broken.toml name: is missing. Write it." in ran.out


def test_the_json_form_holds_the_same(qhw_run: Run, targets: str) -> None:
    ran = qhw_run(*COMPARE, "--targets", "fast.toml,broken.toml", "--json")
    data = json.loads(ran.out)
    assert [row["target"] for row in data["targets"]] == ["acme/fast", "broken.toml"]
    assert data["targets"][0]["cost"]["cycles"]["missing"] == [] and data["targets"][1]["ended"] == "load"
    assert data["float"] is None and data["calibration_samples"] == 64


def test_where_no_target_can_run_the_model_the_command_fails(qhw_run: Run, targets: str) -> None:
    ran = qhw_run(*COMPARE, "--targets", "broken.toml")
    assert ran.status == 1 and "cannot be loaded" in ran.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--targets", "nobody/*"), "error: targets: no target fits 'nobody/*'. All: qhw target list"),
        (("--targets", "gone.toml"), "error: targets: gone.toml: no such file. Check the path."),
        (
            ("--targets", "tiny.toml", "--evaluate", "net:batches"),
            "error: net:batches: every batch must be (inputs, labels)",
        ),
        (("--targets", "tiny.toml", "--pipeline", "none"), None),
    ],
)
def test_mistakes_end_in_one_line(qhw_run: Run, targets: str, arguments: tuple[str, ...], message: str | None) -> None:
    ran = qhw_run(*COMPARE, *arguments)
    assert ran.status == 1 and "Traceback" not in ran.out + ran.err
    if message is None:  # a wish that no target can meet is what each row says
        assert "no plan: --pipeline: no pipeline 'none'." in ran.out
    else:
        assert ran.err.startswith(message) and len(ran.err.splitlines()) == 1


def test_an_interruption_says_that_nothing_was_written(
    qhw_run: Run, targets: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    before = sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")
    monkeypatch.setattr("qhw.comparison.matrix.quantize", stop)
    ran = qhw_run(*COMPARE, "--targets", "tiny.toml")
    assert ran.status == 130
    assert ran.err.splitlines()[-1] == "interrupted: nothing was written. Run the same command again."
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == before


def test_cost_lists_layers_and_totals(qhw_run: Run, targets: str) -> None:
    """The convolution: 36 pixels, 27 * 8 products each; 3 -> 8 channels: 36 * 9 * 64 / 4 = 5184 cycles.

    The linear layer: 8 -> 8 and 4 -> 8 channels: 64 / 4 = 16 cycles; 32 weights, 4 float biases, 8 in and 4 out make 60
    bytes.
    """
    ran = qhw_run("cost", "net:model", "--target", "fast.toml")
    assert ran.status == 0 and ran.err == ""
    lines = ran.out.splitlines()
    assert lines[0] == "acme/fast · one sample · clock main"
    assert lines[1].split() == ["operator", "kind", "kernel", "MACs", "arithmetic", "ram", "cycles", "bound", "by"]
    conv, linear = (line.split() for line in lines[2:4])
    assert conv[1:6] == ["Conv", "mac", "7.78", "k", "5.18"] and conv[-1] == "compute"
    assert linear[1:5] == ["Gemm", "mac", "32", "16"] and linear[-1] == "ram"
    assert "Cycles                5.24 k" in lines and "Time                  5.24 ms" in lines
    assert "Energy                unknown" in lines
    assert "Bound by              compute: 1 operator, ram: 1 operator" in lines
    assert any(line.startswith("Not counted") and "1 operator on the host" in line for line in lines)
    assert "Not known             cost.power_w" in lines


def test_cost_of_a_plan_and_of_a_result_is_that_of_the_target(qhw_run: Run, targets: str) -> None:
    wanted = json.loads(qhw_run("cost", "net:model", "--target", "fast.toml", "--json").out)
    plan = ("--target", "fast.toml", "--calibration", "net:batches")
    assert qhw_run("plan", "net:model", *plan, "--out", "plan.json").status == 0
    assert (
        json.loads(qhw_run("cost", "net:model", "--plan", "plan.json", "--target", "fast.toml", "--json").out) == wanted
    )
    assert qhw_run("quantize", "net:model", *plan, "--out", "out").status == 0
    assert json.loads(qhw_run("cost", "out", "--json").out)["cycles"] == wanted["cycles"]


def test_a_plan_shows_its_cost_where_the_target_has_figures(qhw_run: Run, targets: str) -> None:
    wanted = "Estimated             5.24 k cycles, 5.24 ms a sample   qhw cost"
    assert wanted in qhw_run("plan", "net:model", "--target", "fast.toml").out.splitlines()
    assert "Estimated" not in qhw_run("plan", "net:model", "--target", "tiny.toml").out


def test_cost_needs_a_target_and_a_clock_that_is_there(qhw_run: Run, targets: str) -> None:
    ran = qhw_run("cost", "net:model")
    assert (ran.status, ran.err[:43]) == (1, "error: --target: needed for a float model. ")
    ran = qhw_run("cost", "net:model", "--target", "fast.toml", "--clock", "min")
    assert ran.status == 1
    assert ran.err == "error: --clock: 'acme/fast' has no clock preset 'min'. Known: main. Closest: main.\n"


@pytest.mark.parametrize(
    ("figure", "cycles", "seconds", "joules"),
    [
        (Figure(12345.0), "12.3 k", "1.23e+04 s", "1.23e+04 J"),
        (Figure(2.5e-7), "2.5e-07", "250 ns", "250 nJ"),
        (Figure(0.0042, ("clocks",)), ">= 0.0042", ">= 4.2 ms", ">= 4.2 mJ"),
        (Figure(0.0, ("clocks",)), "unknown", "unknown", "unknown"),
        (Figure(0.0), "0", "0 s", "0 J"),
        (Figure(3.2e9), "3.2 G", "3.2e+09 s", "3.2e+09 J"),
    ],
)
def test_figures_say_what_they_lack(figure: Figure, cycles: str, seconds: str, joules: str) -> None:
    assert (cycles_words(figure), seconds_words(figure), joules_words(figure)) == (cycles, seconds, joules)
