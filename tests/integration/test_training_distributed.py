# SPDX-License-Identifier: Apache-2.0
"""Two processes under torchrun train as one does with the same global batch, and agree with each other to the bit.

The file is also the program that each process runs.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

import qhw
from qhw.training.batch_norm import SyncedBatchNorm, batch_statistics
from tests.training_support import images, labels, network, randomize, trainable

WORLD = 2
BATCH = 24
NUM_STEPS = 4
WAYS = {
    "static": {"per": "tensor"},
    "kept": {},
    "double": {"train": {"prefer": ["double_forward"]}},
    "frozen double": {"train": {"prefer": ["double_forward"], "options": {"double_forward": {"freeze_after": 2}}}},
    "re-estimated": {"train": {"prefer": ["kept_batch_norm", "reestimated_ranges"]}},
    "lsq+": {"train": {"prefer": ["lsq_plus"]}},
}


def shares(rank: int, world: int) -> slice:
    """The samples of a process; of unequal number, as the last batch of an epoch may have."""
    cut = BATCH * 2 // 3
    return slice(None) if world == 1 else (slice(0, cut), slice(cut, None))[rank]


def train(way: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """The state after some steps of SGD, and what batch norms of several processes compute, as plain tensors."""
    result = trainable(**WAYS[way])
    model = DistributedDataParallel(result) if world > 1 else result
    optimizer = torch.optim.SGD(qhw.parameter_groups(result, 0.05, optimizer="sgd"), momentum=0.9)
    model.train()
    for number in range(NUM_STEPS):
        x, y = images(BATCH, number), labels(BATCH, seed=number)
        mine = shares(rank, world)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[mine]), y[mine], reduction="sum") / BATCH
        (loss * world).backward()  # the mean over processes is taken of the gradients
        optimizer.step()
    return {name: tensor.clone().contiguous() for name, tensor in result.state_dict().items()}


def normalized(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Outputs, gradients and statistics of one batch norm over the batch of all processes."""
    norm = SyncedBatchNorm(0.1, 1e-5, "bn")
    norm.weight, norm.bias = torch.nn.Parameter(torch.rand(3) + 0.5), torch.nn.Parameter(torch.zeros(3))
    norm.running_mean, norm.running_var = torch.zeros(3), torch.ones(3)
    norm.num_batches_tracked = torch.zeros((), dtype=torch.int64)
    whole = images(BATCH)
    x = whole[shares(rank, world)].clone().requires_grad_()
    y = norm.train()(x)
    # A loss of which each process has its part.
    (y * whole[shares(rank, world)].roll(1, 1)).square().sum().backward()
    mean, var, count = batch_statistics(x.detach())
    return {
        "y": y.detach(), "x.grad": x.grad, "running_mean": norm.running_mean, "running_var": norm.running_var,
        "mean": mean, "var": var, "count": torch.tensor(count),
    }  # fmt: skip


def run_rank(folder: Path) -> None:
    """What each process does: train in every way, and write what came out."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    try:
        for way in WAYS:
            torch.manual_seed(0)
            save_file(train(way, rank, world), folder / f"{way} {rank}")
        torch.manual_seed(0)
        save_file({k: v.contiguous() for k, v in normalized(rank, world).items()}, folder / f"norm {rank}")
    finally:
        gc.collect()  # what DDP still holds of the group goes before it
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    place = tmp_path_factory.mktemp("ranks")
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(str(root / name) for name in (".", "plugins", "targets"))
    environment = {**os.environ, "PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD), __file__,
        str(place),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return place


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_ranks_agree_to_the_bit(folder: Path, way: str) -> None:
    one, other = (load_file(folder / f"{way} {rank}") for rank in range(WORLD))
    assert one.keys() == other.keys()
    assert any("scale" in name for name in one)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one(folder: Path, way: str) -> None:
    torch.manual_seed(0)
    alone, two = train(way, 0, 1), load_file(folder / f"{way} 0")
    assert alone.keys() == two.keys()
    for name, tensor in alone.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, two[name]), name
            continue
        # Sums over the batch are formed in another order: 1e-6 or so a step, which flips a tie here and there; that
        # moves a value by 1/255 in one of thousands of terms of a gradient, and the rate is 0.05, or 0.0005.
        torch.testing.assert_close(two[name], tensor, rtol=2e-3, atol=5e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
def test_a_batch_norm_over_all_processes_is_that_of_one(folder: Path) -> None:
    torch.manual_seed(0)
    alone = normalized(0, 1)
    ranks = [load_file(folder / f"norm {rank}") for rank in range(WORLD)]
    for name in ("y", "x.grad"):
        # float32 sums of 24 * 64 terms
        torch.testing.assert_close(torch.cat([rank[name] for rank in ranks]), alone[name], rtol=1e-4, atol=1e-5)
    for name in ("running_mean", "running_var", "mean", "var", "count"):
        torch.testing.assert_close(ranks[0][name], alone[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(ranks[0][name], ranks[1][name])
    assert int(alone["count"]) == BATCH * 64


def test_shares_are_unequal_and_whole() -> None:
    numbers = torch.arange(BATCH)
    parts = [numbers[shares(rank, WORLD)] for rank in range(WORLD)]
    assert len(parts[0]) != len(parts[1])
    assert torch.equal(torch.cat(parts), numbers)
    assert randomize(network()) is not None


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
