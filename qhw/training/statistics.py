# SPDX-License-Identifier: Apache-2.0
"""Batch-norm statistics measured anew: the averages of training lag behind weights that moved."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qhw.engine import Calibration, CalibrationData, QuantizedModel
from qhw.training.batch_norm import DoubleForward, NormLayer

__all__ = ["reestimated"]


@contextmanager
def reestimated(result: QuantizedModel, data: CalibrationData) -> Iterator[None]:
    """Let the statistics of the batch norms of operators be their means over data, for a while; quantizers on.

    Means and unbiased variances of the micro-batches are averaged, each by its number of samples. Batch norms normalize
    by the batch meanwhile, so that no layer sees the old statistics of those before it.

    Args:
        result: One that is being trained; as before when the context ends.
        data: Batches as `qhw.quantize` takes them.

    Raises:
        CalibrationError: the data is empty, or does not fit the model.
    """
    layers = [module for module in result.modules() if isinstance(module, NormLayer)]
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in layers]
    try:
        if layers:
            _average(result, layers, data)
        yield
    finally:
        for layer, buffers in zip(layers, before, strict=True):
            _put_back(layer, buffers)


@torch.no_grad()
def _average(result: QuantizedModel, layers: list[NormLayer], data: CalibrationData) -> None:
    kept = [(layer.batch_norm.momentum, getattr(layer, "freeze_after", None)) for layer in layers]
    mode, total = result.training, 0
    result.eval()
    for layer in layers:
        layer.training = layer.batch_norm.training = True  # not their quantizers
        if isinstance(layer, DoubleForward):
            layer.freeze_after = None
    try:
        for batch in Calibration(data, result.trained_form.origin):
            count = len(batch[0])
            if count == 1 and total:
                continue  # a last sample of its own, which has no variance where there is one value per channel
            total += count
            for layer in layers:
                layer.batch_norm.momentum = count / total
            result(*batch)
    finally:
        for layer, (momentum, freeze_after) in zip(layers, kept, strict=True):
            layer.batch_norm.momentum = momentum
            if isinstance(layer, DoubleForward):
                layer.freeze_after = freeze_after
        result.train(mode)


@torch.no_grad()
def _put_back(layer: NormLayer, buffers: dict[str, Tensor]) -> None:
    for name, buffer in layer.named_buffers():
        buffer.copy_(buffers[name])
