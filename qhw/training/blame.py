# SPDX-License-Identifier: Apache-2.0
"""Values that are no numbers: which tensor holds one, where a model first computes one."""

from typing import Any

import torch
from torch import Tensor, nn

from qhw.engine import QuantizedModel
from qhw.errors import TrainingError
from qhw.numerics import FakeQuantizer

__all__ = ["check_finite", "first_not_finite"]


def first_not_finite(result: QuantizedModel, inputs: tuple[Tensor, ...]) -> str:
    """The first quantizer, in execution order, whose input, output or scale is NaN or infinite.

    Args:
        result: A model that is being trained; runs once, in eval mode.
        inputs: A batch with which it goes wrong.

    Returns:
        The quantizer's name and what is wrong there; "the loss" where all quantizers are well.
    """
    found: list[str] = []

    def look(module: nn.Module, given: Any, output: Any) -> None:
        if found or not isinstance(module, FakeQuantizer):
            return
        for what, tensor in (("scale", module.scale), ("input", given[0]), ("output", output)):
            if not bool(torch.isfinite(tensor).all()):
                found.append(f"quantizer '{module.name}' (its {what})")
                return

    mode = result.training
    result.eval()
    hooks = [module.register_forward_hook(look) for module in result.modules() if isinstance(module, FakeQuantizer)]
    try:
        with torch.no_grad():
            result(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        result.train(mode)
    return found[0] if found else "the loss"


def check_finite(result: QuantizedModel) -> None:
    """Refuse a model in which training came to values that are no numbers.

    Raises:
        TrainingError: names the first quantizer or parameter.
    """
    norms = {name for name, _ in result.named_buffers() if name.endswith((".running_mean", ".running_var"))}
    tensors = [*result.named_parameters(), *((n, b) for n, b in result.named_buffers() if n in norms)]
    bad = [name for name, value in tensors if not bool(torch.isfinite(value).all())]
    if bad:
        of_quantizers = [name for name in bad if ".quantizers." in name or name.endswith(".scale_parameter")]
        first = (of_quantizers or bad)[0].removeprefix("module.")
        raise TrainingError(
            f"{first}: became NaN or infinite in training ({len(bad)} tensors in all). Go back to an earlier state, "
            "and lower the learning rate."
        )
