# SPDX-License-Identifier: Apache-2.0
"""Random small models of what google/litert-int8 runs in integers, and mutants of its arithmetic."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qhw.extension import default_registry
from qhw.integer import Site
from qhw.numerics import shift_right
from qhw.schema import TargetSpec, parse_target
from tests import random_models
from tests import random_steps as steps
from tests.random_grids import rescaled
from tests.random_models import Drawn, Repertoire
from tests.random_outcome import Mutant, Rule

TARGET = "google/litert-int8"

REPERTOIRE = Repertoire(
    ranks=(4, 4, 4, 3, 2),
    layers=(partial(steps.conv, max_rank=4), partial(steps.linear, max_rank=4)),
    clips={"relu": torch.relu, "relu6": F.relu6, "relu_n1_to_1": lambda x: F.hardtanh(x, -1.0, 1.0)},
    steps=(
        *[partial(steps.conv, max_rank=4)] * 4,
        steps.conv_transpose,
        *[partial(steps.linear, max_rank=4)] * 2,
        partial(steps.matmul, is_clipped=False),
        *[
            partial(
                steps.elementwise,
                functions={
                    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "max": torch.maximum, "min": torch.minimum
                },
                both_ways=("add", "sub", "mul"),
            )
        ]
        * 3,
        steps.concat,
        partial(steps.average_pool, max_rank=4, inside=True),
        partial(steps.max_pool, max_rank=4, is_spread=False),
        steps.whole,
        partial(steps.reduction, functions={"mean": torch.mean}),
        *[
            partial(
                steps.function,
                functions={
                    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "abs": torch.abs, "alone_relu": torch.relu,
                    "alone_relu6": F.relu6, "hard_swish": F.hardswish, "gelu": F.gelu, "exp": torch.exp,
                },
            )
        ]
        * 2,
        *[
            partial(
                steps.movement,
                kinds=(
                    "flatten", "reshape", "unsqueeze", "squeeze", "transpose", "slice", "strided_slice", "select",
                    "split", "chunk", "expand", "tile", "pixel_shuffle", "pixel_unshuffle", "pad", "reflect",
                ),
            )
        ]
        * 2,
        steps.shuffled_channels,
        partial(steps.last_axis, functions={"softmax": torch.softmax, "log_softmax": torch.log_softmax}),
        partial(steps.resize, modes=("nearest", "bilinear")),
    ),
)  # fmt: skip


def quantized(seed: int) -> Drawn:
    """The model of a seed."""
    return random_models.quantized(seed, REPERTOIRE, TARGET)


on_other_grids = partial(rescaled, ends_at_clips=False)


@cache
def _target(clause: str) -> TargetSpec:
    text = f'schema_version = 1\nname = "acme/mutant"\nextends = "{TARGET}"\n{clause}'
    return parse_target(text, find_base=default_registry().target_path)


def clause(text: str) -> Callable[[Site], Site]:
    """Every operator under the shipped target with one clause changed."""

    def change(site: Site) -> Site:
        target = _target(text)
        spec = target.operators[site.path.removeprefix("operators.")]
        return replace(site, target=target, spec=spec, kernel=target.kernels[site.kernel_name])

    return change


def _ratio(kind: str) -> Callable[[Site], Site]:
    """The ratio of scales formed in another precision."""
    return lambda site: replace(site, spec=site.spec.model_copy(update={"ratio": kind}))


def _zero_point_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """The zero point goes into the last rounding."""

    def rescaler(site: Site, ratio: Callable[..., Tensor], zero_point: int, *rest: Any, **named: Any) -> Any:
        rule = original(site, ratio, 0, *rest, **named)
        right = rule.shift.clamp(min=0)
        early = replace(rule, shift=rule.shift.clamp(max=0))
        return Rule(lambda acc: shift_right(early(acc) + (zero_point << right), right, "half_away_from_zero"))

    return rescaler


def _reversed_product(original: Callable[..., Any]) -> Callable[..., Any]:
    """x (w / y), not (x w) / y, each step in float32."""

    def rescaler(site: Site, ratio: Callable[..., Tensor], zero_point: int, *rest: Any, **named: Any) -> Any:
        a, b, y = site.inputs[0].scale, site.inputs[1].scale, site.result.scale
        return original(site, lambda *_: a * (b / y), zero_point, *rest, **named)

    return rescaler


_PRODUCTS = ("Conv", "DepthwiseConv", "ConvTranspose")
_BY_FIXED_POINT = (*_PRODUCTS, "MatMul", "Mul", "ReduceMean", "GlobalAveragePool")
_RESCALERS = ("products.rescaler", "elementwise.rescaler", "pooling.rescaler")


def _rounding(name: str, how: str) -> Callable[[Site], Site]:
    return clause(f'requantize.{name} = {{ rounding = "{how}", source = "memory" }}')


MUTANTS: Mapping[str, Mutant] = {
    "rounded once, half away from zero": Mutant(
        (*_BY_FIXED_POINT, "LeakyRelu"), change=_rounding("rescale", "half_away_from_zero")
    ),
    "rounded once, half even": Mutant(_BY_FIXED_POINT, change=_rounding("rescale", "half_even")),
    "last ties upwards": Mutant(_BY_FIXED_POINT, change=_rounding("rescale", "double_half_to_plus_infinity")),
    "sums rounded once, half away from zero": Mutant(("Add", "Sub"), change=_rounding("sum", "half_away_from_zero")),
    "sums rounded once, half even": Mutant(("Add", "Sub"), change=_rounding("sum", "half_even")),
    "last ties of sums upwards": Mutant(("Add", "Sub"), change=_rounding("sum", "double_half_to_plus_infinity")),
    "ties of layers to even": Mutant(("Gemm",), change=_rounding("real", "half_even")),
    "layers by fixed point": Mutant(("Gemm",), change=clause(
        'requantize.real = { kind = "fixed_point", rounding = "double", multiplier_bits = 31, '
        'shift = { min = -30, max = 31 }, source = "memory" }')),
    "a multiplier of 24 bits": Mutant(
        _PRODUCTS, change=clause(
            'requantize.rescale = { multiplier_bits = 24, source = "memory" }')),
    "a pre-shift of 8 bits": Mutant(("Add", "Sub"), change=clause(
        'operators.Add = { preshift_bits = { a8 = 8 }, source = "memory" }\n'
        'operators.Sub = { preshift_bits = { a8 = 8 }, source = "memory" }')),
    "the zero point before rounding": Mutant(
        (*_PRODUCTS, "MatMul", "Mul", "ReduceMean", "GlobalAveragePool"),
        patches=tuple((place, _zero_point_first) for place in _RESCALERS)),
    "ratio in float32": Mutant(_PRODUCTS, change=_ratio("float32")),
    "ratio in float64": Mutant(("MatMul", "Mul", "LeakyRelu"), change=_ratio("float64")),
    "the count of a mean in the ratio": Mutant(("ReduceMean", "GlobalAveragePool"), change=clause(
        'operators.ReduceMean = { mean_count = "ratio", source = "memory" }')),
    "averages half even": Mutant(("AveragePool",), change=clause(
        'operators.AveragePool = { rounding = "half_even", source = "memory" }')),
    "averages of centred codes": Mutant(("AveragePool",), change=clause(
        'operators.AveragePool = { rounding_order = "zero_point_after", source = "memory" }')),
    "entries of tables rounded down": Mutant(
        ("Sigmoid", "Tanh", "Exp", "Gelu"), change=lambda site: replace(
            site, output_format=_target('formats.a8 = { rounding = "floor", source = "memory" }').formats["a8"])),
    "exponents of 4 integer bits": Mutant(("Softmax", "LogSoftmax"), change=clause(
        'operators.Softmax = { approximation = { integer_bits = 4, source = "memory" } }\n'
        'operators.LogSoftmax = { approximation = { integer_bits = 4, source = "memory" } }')),
    "multipliers of 14 bits": Mutant(("HardSwish",), change=clause(
        'operators.HardSwish = { approximation = { multiplier_bits = 14, source = "memory" } }')),
    "weights of 8 bits between pixels": Mutant(("Resize",), change=clause(
        'operators.Resize = { approximation = { fraction_bits = 8, source = "memory" } }')),
}  # fmt: skip

# On every pair of codes; random operands are too few to lie where the last bit of a ratio decides.
PAIR_MUTANTS: Mapping[str, Mutant] = {
    **{
        name: replace(mutant, kinds=kinds)
        for name, mutant in MUTANTS.items()
        if (kinds := tuple(kind for kind in ("Add", "Sub", "Mul") if kind in mutant.kinds))
    },
    "products of scales in the other order": Mutant(("Mul",), patches=(("elementwise.rescaler", _reversed_product),)),
}
