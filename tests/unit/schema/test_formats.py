# SPDX-License-Identifier: Apache-2.0
"""Formats, scales and the other tables: what follows from their fields, and what contradicts itself."""

from typing import Any

import pytest
from pydantic import ValidationError

from qhw.schema import (
    Bias,
    Conflict,
    ExponentBound,
    Format,
    Operator,
    Palette,
    Requantize,
    Scale,
    Shift,
    TargetSpec,
)
from qhw.schema.formats import code_bits
from qhw.schema.operators import ATTRIBUTES, LimitRange, RealRange

E4M3 = {"kind": "float", "bits": 8, "exponent_bits": 4, "mantissa_bits": 3, "finite_max": 448.0, "per": "tensor"}


@pytest.mark.parametrize(
    ("fields", "codes", "bits", "signed"),
    [
        ({"bits": 8, "signed": True}, (-128, 127), 8, True),
        ({"bits": 8, "signed": False}, (0, 255), 8, False),
        ({"codes": (-127, 127)}, (-127, 127), 8, True),
        ({"codes": (-64, 64)}, (-64, 64), 8, True),
        ({"codes": (-64, 63)}, (-64, 63), 7, True),
        ({"codes": (-1, 0)}, (-1, 0), 1, True),
        ({"codes": (0, 127)}, (0, 127), 7, False),
        ({"codes": (0, 127), "signed": True}, (0, 127), 8, True),
        ({"bits": 1, "signed": True}, (-1, 0), 1, True),
        ({"bits": 64, "signed": True}, (-(2**63), 2**63 - 1), 64, True),
        ({"bits": 8}, (None, None), 8, None),
        ({"bits": "unknown", "signed": True}, (None, None), None, True),
        ({"bits": 8, "signed": True, "codes": "unknown"}, (None, None), 8, True),
        ({"code_set": (-1, 1)}, (-1, 1), 1, True),
        ({"code_set": (-1, 0, 1)}, (-1, 1), 2, True),
        ({"kind": "float", "exponent_bits": 2, "mantissa_bits": 1}, (None, None), 4, None),
        ({}, (None, None), None, None),
    ],
)
def test_codes_follow_from_what_is_stated(fields: dict[str, Any], codes: Any, bits: Any, signed: Any) -> None:
    form = Format(**fields)
    assert (form.quant_min, form.quant_max) == codes
    assert (form.element_bits, form.is_signed) == (bits, signed)


@pytest.mark.parametrize(
    ("low", "high", "signed", "bits"), [(-8, 7, True, 4), (-8, 8, True, 5), (0, 1, False, 1), (-1, 0, True, 1)]
)
def test_the_fewest_bits_that_hold_a_range(low: int, high: int, signed: bool, bits: int) -> None:
    assert code_bits(low, high, signed=signed) == bits


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"bits": 8, "signed": True, "per": "tensor"}, None),
        ({"bits": 8, "signed": True, "per": "group", "group_size": 32}, None),
        ({"bits": 8, "signed": True, "per": "group"}, 'group_size: per = "group" needs a size'),
        ({"bits": 8, "per": "tensor"}, "codes: neither codes nor bits with signed are known"),
        ({"bits": 8, "signed": True}, 'per: absent; a grid needs "tensor", "out_channel" or "group"'),
        ({"bits": 8, "signed": True, "per": "row"}, 'per: "row"; a grid needs "tensor", "out_channel" or "group"'),
        ({"bits": 8, "signed": True, "per": "tensor", "zero_point": "unknown"}, "zero_point: unknown"),
        ({"bits": 8, "signed": True, "per": "tensor", "scale": "unknown"}, "scale: unknown"),
        (
            {"bits": 8, "signed": True, "per": "tensor", "scale": Scale(kind="fixed_point")},
            'scale.kind: "fixed_point" is recorded, not used yet',
        ),
        (
            {"bits": 8, "signed": True, "per": "tensor", "scale": Scale(kind="e8m0")},
            'zero_point: absent; scale.kind = "e8m0" needs 0',
        ),
        (
            {"bits": 8, "signed": True, "per": "group", "group_size": 32, "zero_point": 0, "scale": Scale(kind="e8m0")},
            None,
        ),
        ({"bits": 8, "signed": True, "per": "tensor", "scale": Scale(kind="float16")}, None),
        (
            {"bits": 8, "signed": True, "per": "tensor", "scale": Scale(kind="fixed")},
            'scale.values: kind = "fixed" needs its values',
        ),
        ({"bits": 8, "signed": True, "per": "tensor", "scale": Scale(dynamic=True)}, None),
        ({"bits": 8, "signed": True, "per": "row", "scale": Scale(dynamic=True)}, None),
        (
            {"bits": 8, "signed": True, "per": "out_channel", "scale": Scale(dynamic=True)},
            'per: "out_channel"; a grid with scale.dynamic needs "tensor", "group" or "row"',
        ),
        (
            {"bits": 8, "signed": True, "per": "tensor", "scale": Scale(inner_bits=4)},
            "scale: two-level scales are recorded, not used yet",
        ),
        ({"kind": "unknown", "per": "tensor"}, "kind: unknown"),
        ({"kind": "float", "bits": 8, "per": "tensor"}, 'exponent_bits: absent; kind = "float" needs it'),
        ({**E4M3, "finite_max": None}, 'finite_max: absent; kind = "float" needs it'),
        ({**E4M3, "finite_max": "unknown"}, 'finite_max: unknown; kind = "float" needs it'),
        ({**E4M3, "exponent_bias": "unknown"}, "exponent_bias: unknown"),
        ({**E4M3, "bits": None, "signed": False}, "signed: false; floats without a sign are recorded, not used yet"),
        (
            {**E4M3, "zero_point": "free"},
            "zero_point: free; codes that are no range of integers have zero point 0",
        ),
        (E4M3, None),
        ({**E4M3, "per": "group", "group_size": 32, "scale": Scale(kind="e8m0")}, None),
        ({"code_set": (-1, 1), "per": "tensor"}, None),
        ({"code_set": "unknown", "per": "tensor"}, "code_set: unknown"),
        ({"code_set": (1, 2), "per": "tensor"}, "code_set: [1, 2]; needs two codes or more, 0 among or between them"),
        ({"code_set": (0,), "per": "tensor"}, "code_set: [0]; needs two codes or more, 0 among or between them"),
        ({"kind": "palette"}, 'palette: absent; kind = "palette" needs it'),
        ({"kind": "palette", "palette": Palette(index_bits=4)}, 'palette.entry: absent; kind = "palette" needs it'),
        (
            {"kind": "palette", "palette": Palette(index_bits=4, entry="uint8")},
            'palette.entry: "uint8" is recorded, not used yet',
        ),
        (
            {"kind": "palette", "palette": Palette(index_bits=4, entry="float16", vector=2)},
            "palette.vector: 2; tables of vectors are recorded, not used yet",
        ),
        (
            {"kind": "palette", "palette": Palette(index_bits=4, entry="float16", channel_scale="unknown")},
            "palette.channel_scale: unknown",
        ),
        ({"kind": "palette", "palette": Palette(index_bits=(2, 4), entry="float16")}, None),
        ({"kind": "posit", "per": "tensor", "parameters": {"es": 1}}, None),
        ({"kind": "posit"}, 'per: absent; a grid needs "tensor", "out_channel" or "group"'),
    ],
)
def test_why_a_format_cannot_be_planned(fields: dict[str, Any], reason: str | None) -> None:
    form = Format(**fields)
    assert form.unplannable_reason == reason
    assert form.is_plannable is (reason is None)


def test_symmetric_means_a_fixed_zero_point() -> None:
    assert Format(zero_point=0).is_symmetric and Format(bits=8, signed=False, zero_point=128).is_symmetric
    assert Format(**E4M3).is_symmetric and Format(code_set=(-1, 1)).is_symmetric
    assert not any(Format(zero_point=value).is_symmetric for value in ("free", "unknown", (0, 1), None))


def test_unknown_fields_are_named_with_their_path() -> None:
    form = Format(bits="unknown", per="tensor", scale=Scale(kind="power_of_two", exponent_min="unknown"))
    assert form.unknown_fields() == ("bits", "scale.exponent_min")


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (Format, {"codes": (5, 5)}, r"codes: the lower code must be below the upper; got \[5, 5\]"),
        (Format, {"signed": False, "codes": (-1, 5)}, "codes: lower code -1 is negative, and signed is false"),
        (Format, {"bits": 4, "codes": (-9, 7)}, r"lower code -9 does not fit 4 bits \(signed: at least -8\)"),
        (Format, {"bits": 4, "codes": (0, 16)}, r"upper code 16 does not fit 4 bits \(unsigned: at most 15\)"),
        (Format, {"bits": 1, "signed": True, "codes": (0, 1)}, r"upper code 1 does not fit 1 bits"),
        (Format, {"code_set": (1, -1)}, "code_set: must be ascending, each code once"),
        (Format, {"code_set": (1, 1)}, "code_set: must be ascending, each code once"),
        (Format, {"code_set": (-1, 1), "codes": (-1, 1)}, "code_set: stands beside codes"),
        (Format, {"codes": (0, 7), "zero_point": (0, 8)}, r"zero_point: 8 is not a code of this format \(0 to 7\)"),
        (Format, {"zero_point": ()}, "zero_point: must list at least one integer"),
        (Format, {"per": "tensor", "group_size": 32}, 'group_size: needs per = "group"; per is "tensor"'),
        (Format, {"per": "group", "group_size": ()}, "group_size: must list at least one size"),
        (Format, {"per": "tensor", "block_shape": (2, 2)}, 'block_shape: needs per = "block"'),
        (
            Format,
            {"kind": "float", "bits": 8, "exponent_bits": 4, "mantissa_bits": 2},
            "bits: must be 7: a sign, 4 and 2",
        ),
        (
            Format,
            {**E4M3, "finite_max": 449.0},
            r"finite_max: 449 is no value of 4 exponent bits \(bias 7\) and 3 mantissa",
        ),
        (Format, {**E4M3, "finite_max": 512.0}, "finite_max: 512 is no value of 4 exponent bits"),
        (Format, {**E4M3, "exponent_bias": 8, "finite_max": 448.0}, r"448 is no value of 4 exponent bits \(bias 8\)"),
        (Format, {"kind": "Float"}, "kind"),
        (Format, {"kind": "float", "parameters": {"es": 1}}, 'parameters: kind = "float" takes none'),
        (Format, {"finite_max": 448.0}, 'finite_max: needs kind = "float"; kind is "integer"'),
        (Format, {"kind": "float", "codes": (0, 1)}, "codes: a float format has no integer codes"),
        (Scale, {"exponent_min": 0}, 'exponent_min: needs kind = "power_of_two" or "e8m0"; kind is "float32"'),
        (Scale, {"kind": "power_of_two", "exponent_min": 2, "exponent_max": 1}, "exponent_min must not exceed"),
        (Scale, {"values": (1.0,)}, 'values: needs kind = "fixed" or "enumerated"'),
        (Scale, {"kind": "fixed", "values": (1.0, 2.0)}, 'kind = "fixed" needs exactly one value'),
        (Scale, {"kind": "enumerated", "values": ()}, 'kind = "enumerated" needs one value or more, each once'),
        (Scale, {"kind": "fixed", "values": (1.0,), "min": 2.0}, r"values: 1\.0 lies outside \[min, max\]"),
        (Shift, {"min": 2, "max": 1}, "min: min must not exceed max; got 2 and 1"),
        (Bias, {"scale": "own", "shift": {"max": 0}}, 'shift: needs scale = "own" and align = "shift"'),
        (Bias, {"scale": "own", "align": "shift", "shift": {"max": 1}}, "shift.max: must be at most 0, as a bias is"),
        (Requantize, {"kind": "shift", "multiplier_bits": 8}, 'multiplier_bits: kind = "shift" has no multiplier'),
        (Requantize, {"selectable": ("floor",)}, 'selectable: needs rounding = "selectable"'),
        (ExponentBound, {"terms": {"input": 0}, "min": 0}, "terms: needs tensors with a factor that is not 0"),
        (ExponentBound, {"terms": {"input": 1}}, "min: needs min, max, or both"),
        (LimitRange, {"min": 3.0, "max": 2.0}, "min: min must not exceed max; got 3 and 2"),
        (RealRange, {"min": 1.0, "max": 1.0}, "min: min must be below max; got 1 and 1"),
        (Operator, {"limits": {"kernel": ()}}, "limits.kernel: must allow at least one value"),
        (Operator, {"limits": {"kernel": ("channels",)}}, 'limits.kernel: must list integers; got "channels"'),
    ],
)
def test_a_contradiction_is_refused(model: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        model(**fields)


def test_a_choice_must_be_one_of_the_readings() -> None:
    readings = ({"value": 1}, {"value": 2})
    with pytest.raises(ValidationError, match='chosen: must be one of the readings or "unknown"; got 3'):
        Conflict.model_validate({"field": "fallback", "readings": readings, "chosen": 3})


def test_tables_are_frozen_and_closed() -> None:
    bias = Bias(bits=32)
    with pytest.raises(ValidationError, match="frozen"):
        bias.bits = 16  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Bias.model_validate({"bit": 32})


def test_a_fixed_output_is_a_code_of_its_format() -> None:
    with pytest.raises(
        ValidationError, match=r"fixed_output\.a8\.zero_point: 128 is not a code of format 'a8' \(-128 to 127\)"
    ):
        TargetSpec.model_validate_json(
            '{"schema_version": 1, "name": "a/b", "formats": {"a8": {"bits": 8, "signed": true}},'
            ' "operators": {"Sigmoid": {"fixed_output": {"a8": {"scale": 0.00390625, "zero_point": 128}}}}}'
        )


def test_the_published_attributes_are_closed() -> None:
    assert {"kernel", "stride", "dilation", "groups", "in_channels", "out_channels", "rank", "inputs"} <= set(
        ATTRIBUTES
    )
