# SPDX-License-Identifier: Apache-2.0
"""Where a model first computes a value that is no number."""

from typing import Any

import torch
from torch import Tensor, nn

from qhw.engine import QuantizedModel
from qhw.numerics import FakeQuantizer

__all__ = ["first_not_finite"]


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
