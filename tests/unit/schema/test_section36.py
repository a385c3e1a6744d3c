# SPDX-License-Identifier: Apache-2.0
"""Each item a schema must express can be written down, and lint says which part of it nothing reads yet."""

from pathlib import Path
from typing import Any

import pytest

from qhw.schema import Table, lint, load_target_file

FOLDER = Path(__file__).parents[2] / "data" / "section36"

USED: dict[int, dict[str, Any]] = {
    1: {"kernels.mac8.weight": ("w8", "w4"), "formats.w4.bits": 4, "fallback": "refuse"},
    2: {
        "formats.narrow.codes": (-127, 127),
        "formats.reduced.codes": (-64, 64),
        "formats.seven.codes": (-64, 63),
        "formats.four_narrow.codes": (-7, 7),
        "formats.four_full.codes": (-8, 7),
        "formats.binary_zero.codes": (-1, 0),
        "formats.two.codes": (-2, 1),
        "formats.bipolar.code_set": (-1, 1),
    },
    3: {"formats.a8u.signed": False, "kernels.mac.input": ("a8u", "a8")},
    4: {
        "formats.qnn_u8.zero_point": 128,
        "formats.u85_u16.zero_point": (0, 32768),
        "formats.ne16_w8.zero_point": "free",
    },
    5: {"formats.lut.kind": "palette", "formats.lut.palette": None, "formats.lut_int8.palette": None},
    6: {
        "formats.e4m3.kind": "float",
        "formats.e4m3.finite_max": 240.0,
        "formats.e4m3.exponent_bits": 4,
        "formats.e4m3.mantissa_bits": 3,
    },
    7: {
        "formats.half.scale.kind": "float16",
        "formats.mx.scale.kind": "e8m0",
        "formats.nv.scale.kind": "e4m3",
        "formats.shifted.scale.kind": "power_of_two",
        "formats.shifted.scale.exponent_min": -15,
        "formats.q7.scale.values": (0.0078125,),
        "formats.gaudi2.scale.values": (16.0, 1.0, 0.0625, 0.00390625),
    },
    8: {
        "formats.arm_a8.scale.min": 2.0**-16,
        "formats.nxp_a8.scale.min": 2.0**-12,
        "formats.mtk_a8.scale.min": 1e-6,
        "formats.mtk_a8.scale.max": 1e6,
        "formats.qnn_a8.scale.min": 1e-4 / 255,
        "requantize.lrint.ratio.max": 255.99999,
        "operators.LeakyRelu.limits.slope": None,
    },
    9: {
        "kernels.mac.requantize": "scaled",
        "requantize.scaled.kind": "fixed_point",
        "requantize.scaled.rounding": "double",
        "requantize.scaled.multiplier_bits": 31,
        "requantize.scaled.shift.min": 0,
        "requantize.scaled.shift.max": 63,
        "requantize.scaled.out_of_range": "zero_scale",
        "requantize.scaled.per": "out_channel",
    },
    10: {
        "formats.blocks.group_size": (32, 64, 128, 256),
        "formats.lpbq.per": "group",
        "formats.dynamic_a8.scale.dynamic": True,
        "formats.dynamic_a8.per": "row",
    },
    11: {"formats.s8.scale.kind": "power_of_two", "kernels.mac.bias": "own", "biases.own.scale": "own"},
    12: {
        "formats.layer.per": "tensor",
        "operators.Conv.kernels": ("layerwise",),
        "operators.ConvTranspose.weight_scales": "out_channels/groups",
    },
    13: {
        "formats.w_channel.zero_point": 0,
        "formats.w_channel.per": "out_channel",
        "formats.w_tensor.zero_point": "free",
        "formats.w_tensor.per": "tensor",
    },
    14: {
        "biases.narrow.bits": 20,
        "biases.wide.bits": 40,
        "biases.real.bits": "float",
        "biases.narrow.scale": "input*weight",
        "biases.after.scale": "own",
        "biases.after.applied": "after_multiplier",
        "biases.small.applied": "before_requantize",
        "biases.wide.out_of_range": "refuse",
        "kernels.mac16.bias": "wide",
        "kernels.plain.bias": "none",
        "biases.small.max_channels": 512,
        "biases.small.required": True,
    },
    15: {
        "accumulators.qacc.bits": 20,
        "accumulators.wide.bits": 64,
        "accumulators.vpmaddubsw.overflow": "wrap",
        "accumulators.vpmaddubsw.pairwise.bits": 16,
        "accumulators.vpmaddubsw.pairwise.overflow": "saturate",
        "accumulators.qacc.overflow": "saturate",
        "accumulators.tensor_core.kind": "float",
        "kernels.mac16.accumulator": "wide",
    },
    16: {
        "kernels.mac8.weight_abs_sum_max": 127 * 65536,
        "kernels.mac16.weight_abs_sum_max": 127 * 2**24,
        "kernels.a2q.weight_abs_sum_max": "from_accumulator",
    },
    17: {
        "formats.a8.rounding": "half_to_plus_infinity",
        "requantize.dbl.rounding": "double",
        "requantize.k210.stages": None,
        "requantize.neon.rounding": "double_half_to_plus_infinity",
        "operators.Resize.rounding": "half_to_plus_infinity",
        "operators.Add.rounding_order": "zero_point_before",
        "operators.Add.preshift_bits": {"a8": 20},
    },
    18: {
        "operators.Sigmoid.fixed_output.a8.scale": 1 / 256,
        "operators.Sigmoid.fixed_output.a8.zero_point": -128,
        "operators.Sigmoid.fixed_output.a16.scale": 1 / 32768,
        "operators.Tanh.range.min": -1.0,
        "operators.Tanh.range.max": 1.0,
        "operators.Relu.range.min": 0.0,
    },
    19: {
        "operators.MaxPool.same_scale": "input_output",
        "operators.Add.same_scale": "inputs",
        "operators.Concat.same_scale": "all",
        "operators.Mul.same_scale": "none",
        "operators.AveragePool.same_scale": "aligned",
    },
    20: {
        "operators.Tanh.approximation.kind": "table",
        "operators.Tanh.approximation.entries": 257,
        "operators.Softmax.output": "float",
        "operators.LayerNormalization.parameters": "float",
        "operators.LeakyRelu.approximation.kind": "rounded_parameter",
    },
    21: {
        "operators.Conv.fused": ("Relu", "PRelu", "LeakyRelu", "HardSwish", ("Add", "Relu")),
        "kernels.mac_symmetric.fused": (),
    },
    22: {
        "kernels.a16_w8.output": ("u8",),
        "kernels.a16_w8_a16.output": ("u16",),
        "operators.Conv.may_change_precision": True,
        "operators.Resize.may_change_precision": False,
    },
    23: {
        "operators.Conv.limits.kernel": ((1, 1), (3, 3)),
        "operators.Conv.limits.stride": (1,),
        "operators.Conv.limits.dilation": (1,),
        "operators.Conv.limits.groups": ("1",),
        "operators.Conv.limits.in_channels.max": 1024.0,
        "operators.Conv.limits.out_channels.multiple_of": 4,
        "operators.Conv.limits.rank": (4,),
        "operators.Concat.limits.inputs.max": 4.0,
        "operators.DepthwiseConv.kernels": (),
        "fallback": "single_partition",
        "boundary.outputs": "quantized",
        "boundary.inputs": "quantized",
        "network.max_layers": 32,
        "network.max_rank": 4,
        "operators.Conv.limits.padding": ("same", "valid", 0, 1, 2),
        "operators.Conv.limits.height": None,
        "operators.ReduceMean.limits.reduced_elements": None,
        "operators.Resize.limits.mode": ("nearest", "linear"),
        "boundary.output_formats": ("a8", "out32"),
    },
    25: {
        "kernels.mac8.macs_per_cycle": 256.0,
        "kernels.mac16.macs_per_cycle": 128.0,
        "memories.sram.capacity_bytes": 2 * 2**20,
        "memories.sram.ports": 2,
        "memories.flash.past_capacity": "stream",
        "clocks.low.clock_hz": 2e8,
        "clocks.low.bandwidth_bytes_per_s": {"sram": 1.6e9, "flash": 1e8},
        "cost.channel_multiple": 16,
        "cost.weight_compression": "lossless",
    },
    26: {
        "operators.Conv.fused": "unknown",
        "biases.narrow.bits": 20,
        "requantize.shift.shift": "unknown",
        "kernels.mac8.macs_per_cycle": "unknown",
    },
}

RECORDED: dict[int, dict[str, Any]] = {
    1: {"valid_for": {"artefact": ("TOSA 1.0 PRO-INT",)}},
    2: {"formats.mx.encoding": "sign_magnitude"},
    3: {"formats.a8.preference_cost": 1.0, "formats.a8u.preference_cost": 0.0},
    4: {
        "formats.ne16_w8.zero_point_per": "tensor",
        "formats.ne16_w8.zero_point_bits": 8,
        "formats.ne16_w8.zero_point_cost": 0.0,
    },
    7: {
        "formats.nv.scale.outer": "float32",
        "formats.imx_act.scale.quantity": "threshold",
        "formats.imx_weight.scale.quantity": "threshold",
    },
    8: {
        "formats.qnn_a8.min_real_range": 1e-4,
        "operators.LeakyRelu.limits.rescale": None,
    },
    9: {
        "requantize.scaled.shift_per": "out_channel",
    },
    10: {
        "formats.lpbq.scale.inner_bits": 4,
        "formats.lpbq.scale.outer_per": "out_channel",
        "formats.micro.scale.inner_group_size": 2,
        "formats.square.per": "block",
        "formats.square.block_shape": (128, 128),
    },
    12: {
        "operators.DepthwiseConv.weight_axis": 3,
        "operators.DepthwiseConv.weight_layout": "1HWC",
        "operators.ConvTranspose.weight_axis": 1,
    },
    13: {"valid_for": {"artefact": ("ONNX QDQ",)}},
    14: {
        "biases.wide.storage_bits": (32, 64),
    },
    15: {
        "accumulators.finn.bits": "per_layer",
        "accumulators.tensor_core.mantissa_bits": 14,
        "accumulators.tensor_core.promotion_interval": 128,
    },
    17: {
        "requantize.vxrm.selectable": ("half_to_plus_infinity", "half_even", "floor", "to_odd"),
        "requantize.vxrm.rounding": "selectable",
        "requantize.finn.kind": "thresholds",
        "requantize.finn.rounding": "none",
        "valid_for": {"isa": ("Arm NEON",), "build": ("TFLITE_SINGLE_ROUNDING=0",)},
    },
    20: {
        "operators.AveragePool.approximation.kind": "fraction",
        "operators.Elu.approximation.segments": 16,
        "operators.Tanh.approximation.sample_step": 256,
    },
    21: {"valid_for": {"silicon": ("V73",)}},
    23: {
        "network.static_shapes": True,
        "boundary.artefact_io": "integer",
    },
    24: {
        "valid_for": {
            "silicon": ("V73", "V75"),
            "sdk": (">=2.49",),
            "os": ("Android 15",),
            "converter": ("qairt-converter 2.49",),
        }
    },
    25: {"kernels.mac8.simd_lanes": 32},
}


def leaf(table: Any, path: str) -> Any:
    """The value at a dotted path; limits and fixed outputs are dictionaries on the way."""
    for part in path.split("."):
        table = table[part] if isinstance(table, dict) else getattr(table, part)
    return table


@pytest.mark.parametrize("item", range(1, 27))
def test_an_item_loads_with_its_facts(item: int) -> None:
    spec = load_target_file(FOLDER / f"{item:02}.toml")
    facts = {**USED.get(item, {}), **RECORDED.get(item, {})}
    assert facts
    for path, value in facts.items():
        found = leaf(spec, path)
        if value is None:
            assert isinstance(found, Table | tuple) and found, path
        else:
            assert found == value, path


@pytest.mark.parametrize("item", range(1, 27))
def test_lint_names_the_facts_that_nothing_reads(item: int) -> None:
    findings = lint(load_target_file(FOLDER / f"{item:02}.toml"))
    said = {finding.path for finding in findings if finding.message.startswith("recorded")}
    assert set(RECORDED.get(item, {})) <= said
    assert said.isdisjoint(USED.get(item, {}))


def test_every_item_has_a_fragment() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == [f"{item:02}.toml" for item in range(1, 27)]
    assert set(USED) | set(RECORDED) == set(range(1, 27))


def test_palette_and_exponent_facts_keep_their_inner_values() -> None:
    palette = leaf(load_target_file(FOLDER / "05.toml"), "formats.lut.palette")
    assert (palette.index_bits, palette.entry, palette.vector) == ((1, 2, 3, 4, 6, 8), "float16", 2)
    assert (palette.group_channels, palette.channel_scale) == (16, True)
    read, write = leaf(load_target_file(FOLDER / "11.toml"), "kernels.add.exponents")
    assert (read.terms, read.min, read.max) == ({"inputs_max": 1, "inputs_min": -1}, 0, 7)
    assert (write.name, write.terms) == ("shift_write", {"output": 1, "inputs_max": -1})
    stages = leaf(load_target_file(FOLDER / "17.toml"), "requantize.k210.stages")
    assert [(stage.operation, stage.rounding) for stage in stages] == [
        ("multiply", "floor"),
        ("activation", "half_even"),
    ]


def test_provenance_is_kept_per_field() -> None:
    spec = load_target_file(FOLDER / "26.toml")
    assert spec.source_of("formats.s8.scale.kind") == ("OPS", "PPQ")
    assert spec.source_of("formats.s8.bits") == ("OPS",)
    assert spec.source_of("biases.narrow.bits") == ("PPQ",)
    assert spec.source_of("biases.narrow.scale") == ("memory",)
    assert spec.source_of("accumulators.qacc.overflow") == ("memory",)
    assert spec.source_of("requantize.shift.shift") == ("searched: manual and driver, not published",)
    assert spec.source_of("kernels.mac8.accumulator") == ("derived: 8-bit lanes use QACC",)
    assert spec.source_of("fallback") == ("memory",)
    assert spec.conflicts[0].readings[1].value == 32 and spec.conflicts[0].chosen == 20


def test_conflicts_are_shown() -> None:
    findings = lint(load_target_file(FOLDER / "24.toml"))
    assert (
        "sources disagree on kernels.lpbq: from V69 (ET_QNN_RULES); from V73 (ET_QNN_WIKI); "
        "chosen: from V73, because: the stricter reading runs on both."
    ) in [finding.message for finding in findings]
