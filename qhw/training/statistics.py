# SPDX-License-Identifier: Apache-2.0
"""Batch-norm statistics measured anew: the averages of training lag behind weights that moved."""

import torch

from qhw.engine import Calibration, CalibrationData, QuantizedModel
from qhw.errors import TrainingError
from qhw.training.batch_norm import KeptNorm

__all__ = ["reestimate"]


def reestimate(result: QuantizedModel, data: CalibrationData) -> None:
    """Set the statistics of kept batch norms to their averages over data, quantizers on.

    Args:
        result: One that is being trained; changed in place.
        data: Batches as `qhw.quantize` takes them.

    Raises:
        TrainingError: there are no batches.
        CalibrationError: the data does not fit the model.
    """
    norms = [module.batch_norm for module in result.modules() if isinstance(module, KeptNorm)]
    if not norms:
        return
    momenta, mode = [norm.momentum for norm in norms], result.training
    result.eval()
    for norm in norms:
        norm.train()
        norm.momentum = None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.zero_()
    try:
        with torch.no_grad():
            count = 0
            for batch in Calibration(data, result.trained_form.origin):
                result(*batch)
                count += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        result.train(mode)
    if not count:
        raise TrainingError("freeze: calibration has no batches. Pass some, or leave it out.")
