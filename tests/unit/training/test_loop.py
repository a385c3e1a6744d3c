# SPDX-License-Identifier: Apache-2.0
"""`qhw.train`: resumed to the bit, the best epoch kept, a loss that is no number, what it refuses."""

import copy
import json
import logging
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import qhw
from qhw.engine import SilentProgress
from qhw.errors import CalibrationError, ResultError, TrainingError
from qhw.training.checkpoint import digest_of
from tests.training_support import images, labels, network, quantized, trainable

FILE = "training.safetensors"


class Stop(Exception):
    """Stands for a kill."""


class StoppedBehind(SilentProgress):
    """Progress that ends the run at a batch of an epoch."""

    def __init__(self, epoch, batch=0, error=Stop):
        self.epoch, self.batch, self.error = epoch, batch, error

    def track(self, items, label, total=None):
        for number, item in enumerate(items):
            if label.startswith(f"training, epoch {self.epoch} ") and number == self.batch:
                raise self.error
            yield item


def arrays(count=40):
    return {"input": images(count), "labels": labels(count)}


@cache
def prepared(dropout):
    return trainable(network(dropout=dropout), images(32))


def ready(dropout=0.3):
    return copy.deepcopy(prepared(dropout))


def files(folder):
    return [path.name for path in folder.iterdir()]


def state(result):
    return {name: tensor.clone() for name, tensor in result.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def run(result, **changes):
    arguments = {"epochs": 4, "lr": 2e-3, "batch_size": 16, "evaluation": arrays(), **changes}
    return qhw.train(result, arguments.pop("data", arrays()), **arguments)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_training_that_was_killed_ends_as_one_that_was_not(tmp_path, epoch, batch):
    whole = ready()
    expected = run(whole)
    with pytest.raises(Stop):
        run(ready(), work_folder=tmp_path / "work", progress=StoppedBehind(epoch, batch))
    assert (tmp_path / "work" / FILE).exists() == (epoch > 1)
    resumed = ready()
    found = run(resumed, work_folder=tmp_path / "work")
    assert found == expected
    assert same(state(resumed), state(whole))
    assert not (tmp_path / "work").exists()


def test_the_order_and_dropout_come_from_the_seed_alone():
    torch.manual_seed(1)
    one, other, third = ready(), ready(), ready()
    first = run(one, epochs=1)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert run(other, epochs=1) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert same(state(one), state(other))
    assert run(third, epochs=1, seed=1) != first


def test_the_state_of_the_best_epoch_is_kept():
    result = ready(0.0)
    scores = iter([3.0, 5.0, 1.0, 5.0])
    seen = []

    def metric(outputs, wanted):
        seen.append(state(result))
        return next(scores)

    found = run(result, metric=metric)
    assert [epoch.score for epoch in found.epochs] == [3.0, 5.0, 1.0, 5.0]
    assert found.best == 2  # the first of equals
    assert same(state(result), seen[1]) and not same(seen[1], seen[3])
    assert not result.training


def test_without_evaluation_the_training_loss_says_which_epoch_is_best():
    found = run(ready(0.0), evaluation=None)
    assert [epoch.score for epoch in found.epochs] == [-epoch.loss for epoch in found.epochs]
    assert found.best == min(found.epochs, key=lambda epoch: epoch.loss).number


@pytest.mark.parametrize(("patience", "done"), [(1, 3), (2, 4), (3, 5), (None, 6)])
def test_it_stops_after_epochs_without_a_better_score(patience, done):
    scores = iter([1.0, 2.0, 2.0, 1.0, 0.0, 9.0])
    found = run(ready(0.0), epochs=6, patience=patience, metric=lambda *_: next(scores))
    assert len(found.epochs) == done
    assert found.best == (6 if patience is None else 2)


def test_a_resumed_training_has_the_patience_of_the_first(tmp_path):
    scores = iter([1.0, 2.0, 2.0, 1.0, 0.0, 9.0])

    def metric(*_):
        return next(scores)

    with pytest.raises(Stop):
        run(ready(), epochs=6, patience=2, metric=metric, work_folder=tmp_path, progress=StoppedBehind(4))
    found = run(ready(), epochs=6, patience=2, metric=metric, work_folder=tmp_path)
    assert (len(found.epochs), found.best) == (4, 2)


def test_the_rate_falls_along_a_cosine(monkeypatch):
    rates = []
    original = torch.optim.Adam.step

    def step(self, *arguments, **named):
        rates.append([group["lr"] for group in self.param_groups])
        return original(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    run(ready(), epochs=2, lr=0.01, quantizer_lr=0.002, batch_size=10)
    wanted = [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert [rate[0] for rate in rates] == pytest.approx([0.01 * factor for factor in wanted])
    assert [rate[-1] for rate in rates] == pytest.approx([0.002 * factor for factor in wanted])


@pytest.mark.parametrize("where", ["scale", "weight"])
def test_a_loss_that_is_no_number_names_the_quantizer_and_restores(where):
    result = ready()
    good = []

    def loss(outputs, wanted):
        value = nn.functional.cross_entropy(outputs, wanted)
        if len(good) == 4:
            with torch.no_grad():
                if where == "scale":
                    result.quantizer("3").scale_parameter.fill_(float("nan"))
                else:
                    result.module.get_parameter("6.weight").data[0] = float("nan")  # unseen by autograd
        good.append(state(result))
        return value

    # A weight that is no number makes its scale one, in the same step.
    culprit = rf"quantizer '{'3' if where == 'scale' else '6.weight'}' \(its scale\)"
    message = rf"^train: the loss became nan at epoch 2, batch 2, first seen at {culprit}\. The model is in the state"
    with pytest.raises(TrainingError, match=message):
        run(result, loss=loss)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state(result).values())
    assert not same(state(result), good[0])  # behind the first epoch, not at the start
    assert not result.training
    qhw.freeze(result)


def test_a_loss_of_its_own_that_is_no_number_is_named():
    with pytest.raises(TrainingError, match=r"the loss became inf at epoch 1, batch 0, first seen at the loss\."):
        run(ready(), loss=lambda outputs, _: outputs.sum() * 0 + float("inf"))


def test_a_last_step_that_leaves_no_number_is_found_before_it_is_kept():
    result = ready()
    start = state(result)
    calls = []

    def loss(outputs, wanted):
        calls.append(None)
        value = nn.functional.cross_entropy(outputs, wanted)
        return value if len(calls) < 3 else value + (outputs * 0).sqrt().sum() * 0  # a gradient of 0 / 0

    with pytest.raises(TrainingError, match=r"became NaN or infinite in training"):
        run(result, loss=loss)
    assert same(state(result), start)


def stopped(folder, **changes):
    with pytest.raises(Stop):
        run(ready(), work_folder=folder, progress=StoppedBehind(3), **changes)


@pytest.mark.parametrize("damage", ["cut", "text", "no metadata", "other json"])
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, damage, caplog):
    whole = ready()
    expected = run(whole)
    stopped(tmp_path)
    path = tmp_path / FILE
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("hello")
    else:
        metadata = {"training": json.dumps({"facts": 3})} if damage == "other json" else None
        save_file({"x": torch.ones(2)}, path, metadata)
    with caplog.at_level(logging.WARNING, logger="qhw"):
        resumed = ready()
        assert run(resumed, work_folder=tmp_path) == expected
    assert f"{path}: is damaged" in caplog.text
    assert same(state(resumed), state(whole))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 1e-3}, "lr"),
        ({"seed": 3}, "seed"),
        ({"data": arrays(41)}, "data"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"loss": nn.CrossEntropyLoss()}, "loss"),
    ],
)
def test_the_checkpoint_of_another_training_is_passed_over_and_said(tmp_path, changes, said, caplog):
    stopped(tmp_path)
    fresh, whole = ready(), ready()
    with caplog.at_level(logging.WARNING, logger="qhw"):
        found = run(fresh, work_folder=tmp_path, **changes)
    assert f"is of another training ({said} differs); training begins anew." in caplog.text
    assert found == run(whole, **changes)


def test_the_checkpoint_of_another_start_is_passed_over(tmp_path, caplog):
    stopped(tmp_path)
    other = trainable(network(dropout=0.3), images(32, seed=77))  # the same plan, other ranges
    with caplog.at_level(logging.WARNING, logger="qhw"):
        run(other, work_folder=tmp_path)
    assert "is of another training (start differs)" in caplog.text


def test_an_interrupt_leaves_a_checkpoint_and_nothing_else(tmp_path):
    result = ready()
    with pytest.raises(KeyboardInterrupt):
        run(result, work_folder=tmp_path, progress=StoppedBehind(2, 1, KeyboardInterrupt))
    assert files(tmp_path) == [FILE]
    assert not result.training
    with safe_open(tmp_path / FILE, framework="pt") as file:
        assert len(json.loads(file.metadata()["training"])["epochs"]) == 1


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device")

    stopped(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ResultError, match=r"cannot be written: No space left on device\. Choose another work_folder="):
        run(ready(), work_folder=tmp_path)
    assert files(tmp_path) == [FILE]
    assert (tmp_path / FILE).read_bytes() == before


def test_what_a_killed_write_left_goes_away_and_what_is_not_ours_stays(tmp_path):
    (tmp_path / ".qhw-abc.partial").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    run(ready(), epochs=1, work_folder=tmp_path)
    assert files(tmp_path) == ["notes.txt"]


def test_a_work_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResultError, match=r"file: cannot be written"):
        run(ready(), epochs=1, work_folder=tmp_path / "file")


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(zip(images(self.count), labels(self.count), strict=True))


@pytest.mark.parametrize("kind", ["list", "loader", "stream"])
def test_loaders_are_taken_as_they_come(kind, tmp_path):
    pairs = [(images(16, seed=n), labels(16, seed=n)) for n in range(2)]
    data = {
        "list": pairs,
        "loader": DataLoader(TensorDataset(images(32), labels(32)), batch_size=16),
        "stream": DataLoader(Stream(32), batch_size=16),
    }[kind]
    whole, resumed = ready(), ready()
    expected = run(whole, data=data)
    with pytest.raises(Stop):
        run(ready(), data=data, work_folder=tmp_path, progress=StoppedBehind(2))
    assert run(resumed, data=data, work_folder=tmp_path) == expected
    assert same(state(whole), state(resumed))


@pytest.mark.parametrize("count", [33, 17, 1])
def test_a_last_sample_of_its_own_joins_the_batch_before_it(count):
    result = ready()
    sizes = []
    handle = result.module.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    run(result, data=arrays(count), epochs=1, evaluation=None)
    handle.remove()
    assert sizes == {33: [16, 17], 17: [17], 1: [1]}[count]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([]), r"^training: must be read once per epoch; got an iterator that ends\. Pass the loader, or arrays"),
        ([], r"^training: holds no sample\. Pass at least one batch"),
        ({"input": images(4)}, r"^training: holds no 'labels'\. Add the array"),
        ({"input": images(4), "labels": labels(3)}, r"^training: "),
        ({"inputs": images(4), "labels": labels(4)}, r"^training: batch 0: no input 'inputs' in the model"),
        ({"input": images(4) / 0, "labels": labels(4)}, r"^training: batch 0: input 'input' holds NaN or infinite"),
        ([images(4)], r"^training: every batch must be \(inputs, labels\)"),
        (images(4), r"^training: must be a dict of arrays with 'labels', or batches; got Tensor"),
        (3, r"^training: must be a dict of arrays with 'labels', or batches; got int"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(data, message):
    with pytest.raises(CalibrationError, match=message):
        run(ready(), data=data, evaluation=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, r"^train: epochs must be a whole number, 1 or more; got 0\. Raise it\.$"),
        ({"batch_size": 0}, r"^train: batch_size must be a whole number, 1 or more; got 0"),
        ({"batch_size": 2.5}, r"^train: batch_size must be a whole number, 1 or more; got 2\.5"),
        ({"patience": 0}, r"^train: patience must be a whole number, 1 or more; got 0"),
        ({"lr": 0.0}, r"^train: lr must be above 0 and finite; got 0\.0"),
        ({"lr": float("nan")}, r"^train: lr must be above 0 and finite; got nan"),
        ({"quantizer_lr": -1.0}, r"^train: quantizer_lr must be above 0 and finite; got -1\.0"),
        ({"weight_decay": -1.0}, r"^train: weight_decay must be 0 or more and finite; got -1\.0"),
    ],
)
def test_arguments_out_of_range_are_refused(changes, message):
    with pytest.raises(TrainingError, match=message):
        run(ready(), **changes)


def test_a_result_that_is_not_being_trained_is_refused():
    for given in (quantized(), None):
        with pytest.raises(TrainingError, match=r"^parameter_groups: takes a result that is being trained"):
            run(given)


def test_groups_have_the_papers_rates():
    result = ready()
    adam = {group["name"]: group for group in qhw.parameter_groups(result, 1e-3, weight_decay=0.1)}
    assert {name: group["lr"] for name, group in adam.items()} == {"weights": 1e-3, "biases": 1e-3, "quantizers": 1e-3}
    assert {name: group["weight_decay"] for name, group in adam.items()} == {
        "weights": 0.1,
        "biases": 0.0,
        "quantizers": 0.0,
    }
    sgd = {group["name"]: group["lr"] for group in qhw.parameter_groups(result, 1e-3, optimizer="sgd")}
    assert sgd == {"weights": 1e-3, "biases": 1e-3, "quantizers": pytest.approx(1e-5)}
    own = qhw.parameter_groups(result, 1e-3, optimizer="sgd", quantizer_lr=0.5)
    assert own[-1]["lr"] == 0.5
    parameters = [parameter for group in adam.values() for parameter in group["params"]]
    assert {id(p) for p in parameters} == {id(p) for p in result.parameters() if p.requires_grad}
    assert len(parameters) == len({id(p) for p in parameters})
    assert all(parameter.dim() > 1 for parameter in adam["weights"]["params"])
    with pytest.raises(TrainingError, match=r"^parameter_groups: optimizer must be 'adam'.*got 'adagrad'"):
        qhw.parameter_groups(result, 1e-3, optimizer="adagrad")


def test_a_digest_tells_names_shapes_dtypes_and_values_apart():
    x = torch.arange(6.0)
    first = digest_of({"x": x})
    assert digest_of({"x": x.clone()}) == first
    others = [{"y": x}, {"x": x.reshape(2, 3)}, {"x": x.double()}, {"x": x + 1}, {"x": x.flip(0)}, {}]
    assert len({digest_of(other) for other in others} | {first}) == 7
    assert digest_of({"x": torch.tensor(3), "e": torch.empty(0)})
