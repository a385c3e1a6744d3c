# SPDX-License-Identifier: Apache-2.0
"""Small floating-point numbers as a number format: exponent, mantissa, and the largest finite value of the device."""

from qhw.errors import RangeError
from qhw.extension import NumberFormat, PluginInfo, hookimpl
from qhw.numerics import ElementSet, FloatElements
from qhw.schema import Format


class FloatFormat(NumberFormat):
    """Sign, exponent and mantissa, with subnormals, rounded half to even and saturating at `finite_max`.

    `finite_max` is not assumed: E4M3 ends at 448 on most devices, at 240 on one. Float16 and bfloat16 are such formats,
    too, with the fixed scale 1.
    """

    name = "float"
    summary = "Small floats: E4M3, E5M2, E3M2, E2M3, E2M1 and any other widths, with a finite maximum per device."

    def problem(self, spec: Format) -> str | None:
        """What float32 cannot hold."""
        try:
            self.elements(spec)
        except RangeError as error:
            return f"exponent_bits: {str(error).rstrip('.')}"
        return None

    def elements(self, spec: Format) -> ElementSet:
        """The values of the format."""
        exponent, mantissa, most = spec.exponent_bits, spec.mantissa_bits, spec.finite_max
        if not (isinstance(exponent, int) and isinstance(mantissa, int) and isinstance(most, float)):
            raise RangeError("exponent_bits, mantissa_bits and finite_max must be known. State them.")
        bias = spec.exponent_bias if isinstance(spec.exponent_bias, int) else None
        return FloatElements(exponent, mantissa, most, bias)


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Small floating-point numbers.")


@hookimpl
def qhw_register_number_formats() -> list[type[NumberFormat]]:
    return [FloatFormat]
