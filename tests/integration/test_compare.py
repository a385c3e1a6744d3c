# SPDX-License-Identifier: Apache-2.0
"""One model on many targets: each row says what the same calls say of its target alone; failures are rows."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.comparison import Comparison
from qhw.engine import SilentProgress, quantized_bytes
from qhw.errors import CalibrationError, TargetError
from qhw.integer import prove_accumulators
from qhw.schema import TargetSpec, parse_target

GOOD = """\
schema_version = 1
name = "acme/good"
fallback = "host"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
accumulators.acc = { bits = 32, overflow = "wrap" }
kernels.mac = { input = ["a8"], weight = ["w8"], output = ["a8"], accumulator = "acc" }
operators.Conv = { kernels = ["mac"], fused = ["Relu"] }
operators.Gemm = { kernels = ["mac"], fused = ["Relu"] }
operators.Flatten.same_scale = "input_output"
"""


def target(name: str, old: str = "", new: str = "") -> TargetSpec:
    assert old in GOOD
    return parse_target(GOOD.replace("acme/good", f"acme/{name}").replace(old, new))


GENTLE = target("good")
COARSE = target("coarse", "formats.w8 = { codes = [-127, 127]", "formats.w8 = { codes = [-1, 1]")
NARROW = target("narrow", "bits = 32", "bits = 12")
UNKNOWN = target("unknown", "accumulators.acc = { bits = 32", 'accumulators.acc = { bits = "unknown"')
REFUSES = target("refuses", 'fallback = "host"', 'fallback = "refuse"')
HOSTED = target("hosted", 'operators.Gemm = { kernels = ["mac"], fused = ["Relu"] }\n', "")
EMPTY = parse_target('schema_version = 1\nname = "acme/empty"\n')


class Net(nn.Module):
    """A convolution and a linear layer; counts how often it runs outside of capture."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(1, 6, 3), nn.Linear(6 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().flatten(1))


IMAGES = torch.randn(96, 1, 4, 4, generator=torch.Generator().manual_seed(2))
LABELS = torch.arange(96) % 5
LABELLED = [(IMAGES[i : i + 40], LABELS[i : i + 40]) for i in (0, 40, 80)]


def compared(*targets: Any, **more: Any) -> Comparison:
    more = {"calibration": IMAGES, "progress": SilentProgress(), **more}
    return qhw.compare(Net().eval(), targets, IMAGES[:2], **more)


@pytest.fixture(scope="module")
def found() -> Comparison:
    return compared(GENTLE, COARSE, NARROW, UNKNOWN, REFUSES, HOSTED, EMPTY, evaluate=LABELLED)


def test_rows_come_in_the_order_asked_for(found: Comparison) -> None:
    names = ["good", "coarse", "narrow", "unknown", "refuses", "hosted", "empty"]
    assert [row.target for row in found.rows] == [f"acme/{name}" for name in names]
    assert found.samples == 96 and all(row.seconds >= 0 for row in found.rows)


@pytest.mark.parametrize(
    "spec",
    [GENTLE, *(pytest.param(spec, marks=pytest.mark.slow) for spec in (COARSE, HOSTED))],
    ids=lambda spec: spec.name,
)
def test_a_row_says_what_the_calls_for_one_target_say(found: Comparison, spec: TargetSpec) -> None:
    row = found.row(spec.name)
    graph = qhw.capture(Net().eval(), IMAGES[:2])
    plan = qhw.plan(graph, spec, calibration=IMAGES)
    result = qhw.quantize(graph, plan, calibration=IMAGES)
    scores = {score.subject: score for score in qhw.evaluate(graph, result, LABELLED)}
    assert row.plan == plan and row.bytes == quantized_bytes(result)
    assert row.simulated == scores["simulated"] and found.float_score == scores["float"]
    assert row.cost is not None and row.cost.to_data() == qhw.cost(graph, plan).to_data()
    rooms = [proof.headroom for proof in prove_accumulators(result, witnesses=False)]
    assert row.headroom is not None and row.headroom.bits == min(room for room in rooms if room is not None)
    assert row.ended is None and row.reason is None


def test_coarse_weights_agree_less(found: Comparison) -> None:
    shares = [found.row(f"acme/{name}").simulated for name in ("good", "coarse")]
    good, coarse = (score.agreement.share for score in shares if score is not None and score.agreement is not None)
    assert good > 0.9 > coarse


def test_head_room_is_told_apart_from_what_nobody_knows(found: Comparison) -> None:
    narrow, unknown = found.row("acme/narrow").headroom, found.row("acme/unknown").headroom
    good = found.row("acme/good").headroom
    assert narrow is not None and unknown is not None and good is not None and good.bits is not None
    assert 0 <= narrow.bits < good.bits and narrow.overflowing == ()  # a step has made the sums fit
    assert (unknown.bits, unknown.overflowing, unknown.unknown) == (None, (), ("conv", "fc"))
    (row,) = compared(NARROW, without=("accumulator_projection",)).rows
    assert row.headroom is not None and row.headroom.bits == good.bits - 20 < 0
    assert row.headroom.overflowing and set(row.headroom.overflowing) <= {"conv", "fc"}


def test_what_runs_on_the_host_has_its_reason(found: Comparison) -> None:
    row = found.row("acme/hosted")
    assert [(op.name, op.kind) for op in row.host] == [("fc", "Gemm")]
    assert row.host[0].reason == "the target does not list it (operators.Gemm)"
    assert row.operators == 3  # conv, relu, fc: flattening only shows a tensor otherwise
    assert row.plan is not None and row.plan.accelerator_macs == 6 * 9 * 4 and row.plan.total_macs == 6 * 9 * 4 + 120


def test_a_target_that_refuses_is_a_row_with_its_reason(found: Comparison) -> None:
    fitting = found.row("acme/refuses")
    assert fitting.ended is None  # it runs all of this model
    stays = compared(
        target("picky", GOOD[GOOD.index("operators.Gemm") :], "").model_copy(update={"fallback": "refuse"})
    )
    (row,) = stays.rows
    assert (row.ended, row.plan, row.cost, row.bytes, row.simulated) == ("plan", None, None, None, None)
    assert row.reason is not None and row.reason.startswith("'acme/picky' runs whole models only")
    assert "\n" not in row.reason


def test_what_cannot_be_planned_stops_no_other(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("schema_version = 1\nname = 'acme/broken'\nformats.x.bits = 0\n")
    found = compared(str(path), GENTLE, calibration=None)
    broken, good = found.rows
    assert broken.ended == "load" and broken.reason is not None
    assert broken.reason.startswith(f"{path}:3 formats.x.bits: must be an integer from 1 to 64")
    assert good.ended == "plan" and good.reason is not None and "Pass calibration=" in good.reason
    assert found.float_score is None and found.samples is None
    assert broken.to_data() == {
        "target": str(path),
        "seconds": broken.seconds,
        "ended": "load",
        "reason": broken.reason,
    }


class Counting:
    """Labelled batches, and how often they were gone through."""

    def __init__(self, batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> None:
        self.passes = 0
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        yield from self.batches()


def test_the_float_model_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = qhw.capture(Net().eval(), IMAGES[:2])
    ran: list[int] = []
    forward = graph.module.forward
    graph.module.forward = lambda *inputs: ran.append(len(inputs[0])) or forward(*inputs)  # type: ignore[func-returns-value]
    data = Counting(lambda: LABELLED)
    found = qhw.compare(graph, (GENTLE, HOSTED), calibration=IMAGES, evaluate=data, progress=SilentProgress())
    assert all(row.simulated is not None for row in found.rows)
    assert ran == [40, 40, 16] and data.passes == 3


def test_an_iterator_that_is_read_once_is_enough_for_all() -> None:
    found = compared(GENTLE, HOSTED, calibration=iter(IMAGES.split(32)), evaluate=iter(LABELLED))
    assert [row.simulated.samples for row in found.rows if row.simulated is not None] == [96, 96]


def test_samples_that_change_from_pass_to_pass_are_refused() -> None:
    order = [LABELLED, LABELLED[::-1]]
    data = Counting(lambda: order[data.passes - 1])
    with pytest.raises(CalibrationError, match=r"^evaluation: must give the same samples in the same order each time"):
        compared(GENTLE, evaluate=data)
    fewer = [LABELLED, LABELLED[:2]]
    data = Counting(lambda: fewer[data.passes - 1])
    with pytest.raises(CalibrationError, match=r"Turn shuffling off, or pass a list\.$"):
        compared(GENTLE, evaluate=data)


def test_a_sample_that_does_not_fit_stops_before_any_target() -> None:
    wrong = IMAGES.clone()
    wrong[50] = float("nan")
    with pytest.raises(CalibrationError, match=r"sample 50 "):
        compared(GENTLE, calibration=wrong)
    with pytest.raises(TargetError, match=r"^targets: none is named"):
        compared()


def test_a_bug_in_one_target_s_way_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import qhw.comparison.matrix as module

    real = module.quantize

    def broken(*arguments: Any, target: TargetSpec, **more: Any) -> Any:
        if target.name == "acme/hosted":
            raise ZeroDivisionError("division by zero")
        return real(*arguments, target=target, **more)

    monkeypatch.setattr(module, "quantize", broken)
    with caplog.at_level("DEBUG", "qhw"):
        hosted, good = compared(HOSTED, GENTLE).rows
    assert 'raise ZeroDivisionError("division by zero")' in caplog.text  # the traceback is not lost
    assert hosted.ended == "quantize" and hosted.plan is not None
    assert hosted.reason == "unexpected ZeroDivisionError: division by zero. Please report it."
    assert good.ended is None


def test_an_interruption_goes_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qhw.comparison.matrix.quantize", stop)
    with pytest.raises(KeyboardInterrupt):
        compared(GENTLE)
    assert list(tmp_path.iterdir()) == []


def test_the_matrix_as_data(found: Comparison) -> None:
    data = json.loads(json.dumps(found.to_data()))
    assert data["schema_version"] == 1 and data["float"]["subject"] == "float"
    rows = {row["target"]: row for row in data["targets"]}
    good = rows["acme/good"]
    assert good["decided"]["weights"] == {"w8": 2} and set(good["decided"]["activations"]) == {"a8"}
    assert good["decided"]["algorithms"][-1]["stage"] in ("activation_range", "fit")
    assert good["total_macs"] == 336 and good["simulated"]["agreement"]["samples"] == 96
    assert good["cost"]["cycles"]["value"] is None and good["cost"]["cycles"]["at_least"] is None
    assert "kernels.mac.macs_per_cycle" in good["cost"]["cycles"]["missing"]
    assert rows["acme/hosted"]["host"] == [
        {"name": "fc", "kind": "Gemm", "reason": "the target does not list it (operators.Gemm)"}
    ]
