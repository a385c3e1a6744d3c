# SPDX-License-Identifier: Apache-2.0
"""Parameters in groups for an optimizer: quantizers learn at another rate than weights."""

from typing import Any, Literal

from torch import nn

from qhw.engine import QuantizedModel
from qhw.errors import TrainingError
from qhw.numerics import FakeQuantizer

__all__ = ["parameter_groups"]


def parameter_groups(
    result: QuantizedModel,
    lr: float,
    *,
    optimizer: Literal["adam", "sgd"] = "adam",
    weight_decay: float = 0.0,
    quantizer_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer: weights, then biases and batch norms, then quantizers.

    Args:
        result: One that `qhw.trainable` made trainable.
        lr: Learning rate of weights and biases.
        optimizer: Which kind. Adam and its like scale each step by the gradient, so quantizers take the same rate; the
            steps of SGD follow the gradients, which are far larger for scales, so theirs is a hundredth.
        weight_decay: Of weights alone: decay would pull scales to zero.
        quantizer_lr: Learning rate of scales and zero points; absent: as `optimizer` says.

    Returns:
        list of {"params", "lr", "weight_decay", "name"}.

    Raises:
        TrainingError: the result is not being trained, or the kind of optimizer is not known.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 4.4, step 4. The factor of SGD is ours: the paper names none.
    """
    if not isinstance(result, QuantizedModel) or result.trained_form is None:
        raise TrainingError("parameter_groups: takes a result that is being trained. Call qhw.trainable(result) first.")
    if optimizer not in ("adam", "sgd"):
        raise TrainingError(
            f"parameter_groups: optimizer must be 'adam' (or any that scales its steps by the gradient) or 'sgd'; got "
            f"{optimizer!r}. Choose one, or pass quantizer_lr=."
        )
    of_quantizers = _quantizer_parameters(result)
    own = {id(parameter) for parameter in of_quantizers}
    rest = [p for p in result.parameters() if p.requires_grad and id(p) not in own]
    rate = quantizer_lr if quantizer_lr is not None else lr * (0.01 if optimizer == "sgd" else 1.0)
    groups = (
        ("weights", [p for p in rest if p.dim() > 1], lr, weight_decay),
        ("biases", [p for p in rest if p.dim() <= 1], lr, 0.0),
        ("quantizers", of_quantizers, rate, 0.0),
    )
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay, "name": name}
        for name, parameters, rate, decay in groups
        if parameters
    ]


def _quantizer_parameters(result: QuantizedModel) -> list[nn.Parameter]:
    found: dict[int, nn.Parameter] = {}
    for module in result.modules():
        if isinstance(module, FakeQuantizer):
            found |= {id(p): p for p in module.parameters() if p.requires_grad}
    return list(found.values())
