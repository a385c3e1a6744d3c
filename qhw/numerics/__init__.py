# SPDX-License-Identifier: Apache-2.0
"""What a number is: grids, qparams, quantize and its gradient, statistics and range searches, as pure functions."""

from qhw.numerics.accumulator import accumulator_bits_needed, accumulator_bounds
from qhw.numerics.affine import affine_qparams, qparams_from_range, symmetric_qparams
from qhw.numerics.clusters import cluster_rows
from qhw.numerics.dynamic_quantizer import DynamicQuantizer
from qhw.numerics.elements import ElementSet, ListedElements
from qhw.numerics.fake_quantizer import FakeQuantizer
from qhw.numerics.float_elements import BFLOAT16, FLOAT16, FloatElements
from qhw.numerics.fma import fma_float32
from qhw.numerics.folded_norm import FoldedBatchNorm
from qhw.numerics.granularity import Granularity, PerAxis, PerGroup, PerTensor, expand, parameter_shape, range_of
from qhw.numerics.grid import Grid, legal_scale, scale_candidates
from qhw.numerics.learned import learned_fake_quantize
from qhw.numerics.learned_quantizer import LearnedQuantizer, ScaleDomain
from qhw.numerics.legal_ratios import LARGEST_FLOAT, SMALLEST_NORMAL, LegalRatios, legal_ratios
from qhw.numerics.mse import mse_qparams_from_histogram, mse_qparams_from_tensor
from qhw.numerics.normal import ChannelNormal
from qhw.numerics.pairwise import Operands, multiplied_offset, multiplied_range, pair_sums
from qhw.numerics.palette import PaletteElements, PaletteEntry
from qhw.numerics.qparams import QParams
from qhw.numerics.quantize import code_dtype, dequantize, fake_quantize, fake_quantize_broadcast, quantize
from qhw.numerics.range_loss import cross_entropy_qparams
from qhw.numerics.requantize import fixed_point_multiplier, rescale_fixed_point, rescale_float32, rescale_shift
from qhw.numerics.rounding import ROUNDING_RULES, Rounding, round_real, shift_right
from qhw.numerics.statistics import Histogram, MinMax, MinMaxSeries, percentile_range_of, running_average

__all__ = [
    "BFLOAT16",
    "FLOAT16",
    "LARGEST_FLOAT",
    "ROUNDING_RULES",
    "SMALLEST_NORMAL",
    "ChannelNormal",
    "DynamicQuantizer",
    "ElementSet",
    "FakeQuantizer",
    "FloatElements",
    "FoldedBatchNorm",
    "Granularity",
    "Grid",
    "Histogram",
    "LearnedQuantizer",
    "LegalRatios",
    "ListedElements",
    "MinMax",
    "MinMaxSeries",
    "Operands",
    "PaletteElements",
    "PaletteEntry",
    "PerAxis",
    "PerGroup",
    "PerTensor",
    "QParams",
    "Rounding",
    "ScaleDomain",
    "accumulator_bits_needed",
    "accumulator_bounds",
    "affine_qparams",
    "cluster_rows",
    "code_dtype",
    "cross_entropy_qparams",
    "dequantize",
    "expand",
    "fake_quantize",
    "fake_quantize_broadcast",
    "fixed_point_multiplier",
    "fma_float32",
    "learned_fake_quantize",
    "legal_ratios",
    "legal_scale",
    "mse_qparams_from_histogram",
    "mse_qparams_from_tensor",
    "multiplied_offset",
    "multiplied_range",
    "pair_sums",
    "parameter_shape",
    "percentile_range_of",
    "qparams_from_range",
    "quantize",
    "range_of",
    "rescale_fixed_point",
    "rescale_float32",
    "rescale_shift",
    "round_real",
    "running_average",
    "scale_candidates",
    "shift_right",
    "symmetric_qparams",
]
