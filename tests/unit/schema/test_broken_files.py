# SPDX-License-Identifier: Apache-2.0
"""Every rule of a target file broken once, one at a time: the message names file, line, field, rule and remedy.

A case is lines put behind a small valid target; `#!` marks the line that the message must name. The last test of this
file sees to it that no rule of the schema goes without a case.
"""

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qhw.schema
from qhw.errors import TargetError
from qhw.schema import parse_target
from qhw.schema.base import Problem
from tests.target_texts import TINY, refused

KEY = 'the key must be an id such as "w8" (a lower-case letter, then'
ORDER = "min must not exceed max; got 3 and 2. Swap them."

# What it breaks, the lines, the field path, what the message says of rule, value and remedy.
CASES = [
    # Formats.
    ("codes in disorder", "formats.x = { codes = [4, 4] } #!", "formats.x.codes", "below the upper; got [4, 4]. Swap"),
    (
        "unsigned and below 0",
        "formats.x = { codes = [-1, 9], signed = false } #!",
        "formats.x.codes",
        "lower code -1 is negative, and signed is false. Use signed = true, or start at 0.",
    ),
    (
        "code above its bits",
        "formats.x = { codes = [0, 300], bits = 8 } #!",
        "formats.x.codes",
        "upper code 300 does not fit 8 bits (unsigned: at most 255). Use [0, 255], or bits = 16.",
    ),
    (
        "code below its bits",
        "formats.x = { codes = [-9, 3], bits = 4 } #!",
        "formats.x.codes",
        "lower code -9 does not fit 4 bits (signed: at least -8). Use [-8, 3], or bits = 8.",
    ),
    (
        "three codes",
        "formats.x.codes = [1, 2, 3] #!",
        "formats.x.codes",
        "a list of two integers [lowest code, highest",
    ),
    (
        "codes and a set",
        "formats.x = { codes = [-1, 1], code_set = [-1, 1] } #!",
        "formats.x.code_set",
        "stands beside codes; a format has one of the two. Remove one.",
    ),
    (
        "set in disorder",
        "formats.x.code_set = [1, -1] #!",
        "formats.x.code_set",
        "must be ascending, each code once; got",
    ),
    (
        "no zero point at all",
        "formats.x = { codes = [0, 3], zero_point = [] } #!",
        "formats.x.zero_point",
        'must list at least one integer; got []. Use "free" for no restriction.',
    ),
    (
        "zero point outside",
        "formats.x = { codes = [0, 3], zero_point = 4 } #!",
        "formats.x.zero_point",
        "4 is not a code of this format (0 to 3). Use one, or widen codes.",
    ),
    (
        "group without groups",
        'formats.x = { per = "tensor", group_size = 32 } #!',
        "formats.x.group_size",
        'needs per = "group"; per is "tensor". Remove it, or change per.',
    ),
    (
        "block without blocks",
        'formats.x = { per = "tensor", block_shape = [4, 4] } #!',
        "formats.x.block_shape",
        'needs per = "block"; per is "tensor". Remove it, or change per.',
    ),
    ("no group size", 'formats.x = { per = "group", group_size = [] } #!', "formats.x.group_size", "at least one size"),
    (
        "exponent of an integer",
        "formats.x.exponent_bits = 4 #!",
        "formats.x.exponent_bits",
        'needs kind = "float"; kind is "integer". Remove it, or change kind.',
    ),
    (
        "parameters of an integer",
        "formats.x.parameters.a = 1 #!",
        "formats.x.parameters",
        'kind = "integer" takes none. Remove them, or name a plugin\'s kind.',
    ),
    (
        "palette shared twice",
        'formats.x = { kind = "palette", per = "out_channel", palette = { channel_scale = false } } #!',
        "formats.x.per",
        'is "out_channel", and palette.channel_scale is false. Leave one of them out.',
    ),
    (
        "8 bits of which 9 are named",
        'formats.x = { kind = "float", bits = 8, exponent_bits = 5, mantissa_bits = 3 } #!',
        "formats.x.bits",
        "must be 9: a sign, 5 and 3 bits; got 8. Correct one of them.",
    ),
    (
        "largest value that is none",
        'formats.x = { kind = "float", exponent_bits = 4, mantissa_bits = 3, finite_max = 500 } #!',
        "formats.x.finite_max",
        "500 is no value of 4 exponent bits (bias 7) and 3 mantissa bits. State the largest finite value there is.",
    ),
    (
        "empty set of codes",
        "formats.x = { code_set = [], zero_point = 0 } #!",
        "formats.x.code_set",
        "ascending, each code",
    ),
    (
        "palette of an integer",
        "formats.x.palette.vector = 2 #!",
        "formats.x.palette",
        'needs kind = "palette"; kind is "integer". Remove it, or change kind.',
    ),
    (
        "codes of a float",
        'formats.x = { kind = "float", codes = [0, 1] } #!',
        "formats.x.codes",
        'a float format has no integer codes. Remove it, or use kind = "integer".',
    ),
    ("0 bits", "formats.x.bits = 0 #!", "formats.x.bits", 'must be an integer from 1 to 64 or "unknown"; got 0.'),
    ("bits in quotes", 'formats.x.bits = "8" #!', "formats.x.bits", 'got "8". Remove the quotes.'),
    ("half a bit", "formats.x.bits = 8.5 #!", "formats.x.bits", "must be an integer from 1 to 64"),
    ("whole real", "formats.x.bits = 8.0 #!", "formats.x.bits", "got 8.0. Write 8."),
    ("sign in quotes", 'formats.x.signed = "true" #!', "formats.x.signed", 'got "true". Remove the quotes.'),
    ("misspelt sharing", 'formats.x.per = "tensr" #!', "formats.x.per", 'got "tensr". Closest: tensor.'),
    ("53 bits of mantissa", "formats.x.mantissa_bits = 53 #!", "formats.x.mantissa_bits", "an integer from 0 to 52"),
    ("negative cost", "formats.x.preference_cost = -1 #!", "formats.x.preference_cost", "a number of at least 0 or"),
    ("table for a number", "formats.x.bits.wide = 1 #!", "formats.x.bits", "got a table."),
    ("list for a table", "formats.x = [1] #!", "formats.x", "must be a table; got [1]. Fields of it: kind, bits,"),
    ("kind for a table", 'formats.x.scale = "power_of_two" #!', "formats.x.scale", 'Write { kind = "power_of_two" }.'),
    ("number for a range", "requantize.x.shift = 31 #!", "requantize.x.shift", "got 31. Fields of it: min, max."),
    ("no name of a format", "formats.bits = 8 #!", "formats.bits", "A name comes before it: formats.<name>.bits."),
    (
        "fixed output of no format",
        "operators.Softmax.fixed_output.zero_point = 0 #!",
        "operators.Softmax.fixed_output.zero_point",
        "got 0. A name comes before it: operators.Softmax.fixed_output.<name>.zero_point.",
    ),
    (
        "number for a table by format",
        "operators.Add.preshift_bits = 16 #!",
        "operators.Add.preshift_bits",
        'got 16. Write { <name> = 16 }, a name being an id such as "w8"',
    ),
    ("one for a list", 'kernels.x.input = "a8" #!', "kernels.x.input", 'got "a8". Write ["a8"].'),
    ("number for a list", 'operators.Add.limits.stride = "1" #!', "operators.Add.limits.stride", 'got "1". Write [1].'),
    ("list for one", 'kernels.x.bias = ["b"] #!', "kernels.x.bias", 'got ["b"]. Write "b".'),
    (
        "rounding that leaves ties open",
        'requantize.x.rounding = "half_up" #!',
        "requantize.x.rounding",
        'got "half_up". Say where ties go: half_even, half_away_from_zero or half_to_plus_infinity.',
    ),
    (
        "rounding by another name",
        'requantize.x.rounding = "truncate" #!',
        "requantize.x.rounding",
        'got "truncate". Closest: toward_zero.',
    ),
    # Scales.
    ("scale bounds", "formats.x.scale = { min = 3, max = 2 } #!", "formats.x.scale.min", "got 3.0 and 2.0. Swap them."),
    (
        "exponents in disorder",
        'formats.x.scale = { kind = "power_of_two", exponent_min = 3, exponent_max = 2 } #!',
        "formats.x.scale.exponent_min",
        "exponent_min must not exceed exponent_max; got 3 and 2. Swap them.",
    ),
    (
        "exponent of a float scale",
        "formats.x.scale.exponent_min = 3 #!",
        "formats.x.scale.exponent_min",
        'needs kind = "power_of_two" or "e8m0"; kind is "float32". Remove it.',
    ),
    (
        "exponent past float32",
        'formats.x.scale = { kind = "power_of_two", exponent_min = -150 } #!',
        "formats.x.scale.exponent_min",
        "must be an integer from -149 to 127 (float32 holds 2^-149 to 2^127)",
    ),
    (
        "values of any scale",
        "formats.x.scale.values = [1.0] #!",
        "formats.x.scale.values",
        'needs kind = "fixed" or "enumerated"; kind is "float32". Remove it.',
    ),
    (
        "two fixed scales",
        'formats.x.scale = { kind = "fixed", values = [1.0, 2.0] } #!',
        "formats.x.scale.values",
        'kind = "fixed" needs exactly one value; got [1.0, 2.0].',
    ),
    (
        "scale outside its bounds",
        'formats.x.scale = { kind = "enumerated", values = [1.0, 4.0], max = 2 } #!',
        "formats.x.scale.values",
        "4.0 lies outside [min, max]. Drop it, or widen min and max.",
    ),
    ("scale of 0", "formats.x.scale.min = 0.0 #!", "formats.x.scale.min", "must be a number above 0"),
    ("misspelt kind", 'formats.x.scale.kind = "power_of_2" #!', "formats.x.scale.kind", "Closest: power_of_two."),
    # Arithmetic.
    ("129 bits", "accumulators.x.bits = 129 #!", "accumulators.x.bits", "must be an integer from 1 to 128"),
    ("no products", "accumulators.x.products_per_step = 0 #!", "accumulators.x.products_per_step", "of at least 1"),
    ("shifts in disorder", "requantize.x.shift = { min = 3, max = 2 } #!", "requantize.x.shift.min", ORDER),
    ("shift past 128", "requantize.x.shift.max = 129 #!", "requantize.x.shift.max", "an integer from -128 to 128"),
    (
        "ratios in disorder",
        "requantize.x.ratio = { min = 3, max = 2 } #!",
        "requantize.x.ratio.min",
        "3.0 and 2.0. Swap",
    ),
    (
        "multiplier of a shift",
        'requantize.x = { kind = "shift", multiplier_bits = 31 } #!',
        "requantize.x.multiplier_bits",
        'kind = "shift" has no multiplier. Remove it, or change kind.',
    ),
    (
        "alignment by a factor",
        'requantize.x = { kind = "float32", align.to = "finer" } #!',
        "requantize.x.align",
        'only kind = "shift" aligns by shifts; got "float32". Remove it.',
    ),
    (
        "choice of one rounding",
        'requantize.x = { rounding = "floor", selectable = ["floor"] } #!',
        "requantize.x.selectable",
        'needs rounding = "selectable". Change rounding, or remove it.',
    ),
    (
        "shift of a bias that has none",
        "biases.x.shift = { min = -1, max = 0 } #!",
        "biases.x.shift",
        'needs scale = "own" and align = "shift". Remove it, or state both.',
    ),
    (
        "bias shifted right",
        'biases.x = { scale = "own", align = "shift", shift = { max = 1 } } #!',
        "biases.x.shift.max",
        "must be at most 0, as a bias is shifted left; got 1.",
    ),
    (
        "bias without a width",
        'biases.x.bits = "wide" #!',
        "biases.x.bits",
        'must be an integer from 1 to 128, "float" or',
    ),
    # Kernels.
    ("kernel without input", "kernels.x.input = [] #!", "kernels.x.input", "must list at least one format; got []."),
    (
        "undefined format",
        'kernels.x.input = ["a16"] #!',
        "kernels.x.input",
        "'a16' is not defined. Formats here: a8, w8.",
    ),
    (
        "closest format",
        'kernels.x.weight = ["ww8"] #!',
        "kernels.x.weight",
        "'ww8' is not defined. Formats here: a8, w8. C",
    ),
    ("undefined bias", 'kernels.x.bias = "b" #!', "kernels.x.bias", "'b' is not defined. No biases are defined here."),
    (
        "undefined sum",
        'kernels.x.accumulator = "ac" #!',
        "kernels.x.accumulator",
        "Accumulators here: acc. Closest: acc.",
    ),
    (
        "undefined rescaling",
        'kernels.x.requantize = "r" #!',
        "kernels.x.requantize",
        "'r' is not defined. No requantiza",
    ),
    (
        "bound of nothing",
        "kernels.x.exponents = [{ terms = {}, min = 0 }] #!",
        "kernels.x.exponents.0.terms",
        "got {}.",
    ),
    (
        "factor of 0",
        "kernels.x.exponents = [{ terms = { input = 0 }, min = 0 }] #!",
        "kernels.x.exponents.0.terms",
        "needs tensors with a factor that is not 0; got {'input': 0}.",
    ),
    (
        "bound without a side",
        "kernels.x.exponents = [{ terms = { input = 1 } }] #!",
        "kernels.x.exponents.0.min",
        "needs min, max, or both.",
    ),
    (
        "bound in disorder",
        "kernels.x.exponents = [{ terms = { input = 1 }, min = 3, max = 2 }] #!",
        "kernels.x.exponents.0.min",
        ORDER,
    ),
    (
        "tensor that no kernel has",
        "kernels.x.exponents = [{ terms = { weights = 1 }, min = 0 }] #!",
        "kernels.x.exponents.0.terms.weights",
        "Closest: weight.",
    ),
    ("no speed", "kernels.x.macs_per_cycle = 0 #!", "kernels.x.macs_per_cycle", "must be a number above 0"),
    # Operators.
    (
        "undefined kernel",
        'operators.Add.kernels = ["mc"] #!',
        "operators.Add.kernels",
        "Kernels here: mac. Closest: mac.",
    ),
    (
        "limit of nothing",
        "operators.Add.limits.rank = [] #!",
        "operators.Add.limits.rank",
        'got []. Use "any" for no limit.',
    ),
    (
        "limit in disorder",
        "operators.Add.limits.rank = { min = 3, max = 2 } #!",
        "operators.Add.limits.rank.min",
        ORDER,
    ),
    (
        "word of no limit",
        'operators.Add.limits.groups = ["depthwise"] #!',
        "operators.Add.limits.groups",
        'must list integers or "1" or "channels"; got "depthwise".',
    ),
    ("misspelt limit", "operators.Add.limits.kernal = [1] #!", "operators.Add.limits.kernal", "Closest: kernel."),
    (
        "range in disorder",
        "operators.Add.range = { min = 1, max = 1 } #!",
        "operators.Add.range.min",
        "got 1 and 1. Swap",
    ),
    (
        "undefined output",
        "operators.Add.fixed_output.x.scale = 1 #!",
        "operators.Add.fixed_output",
        "'x' is not defined.",
    ),
    (
        "output no code can be",
        "operators.Add.fixed_output.a8.zero_point = 128 #!",
        "operators.Add.fixed_output.a8.zero_point",
        "128 is not a code of format 'a8' (-128 to 127). Use one.",
    ),
    (
        "undefined preshift",
        "operators.Add.preshift_bits.x = 1 #!",
        "operators.Add.preshift_bits",
        "'x' is not defined.",
    ),
    ("axis 8", "operators.Add.weight_axis = 8 #!", "operators.Add.weight_axis", "must be an integer from -8 to 7"),
    (
        "small kind",
        "operators.conv2d.kernels = [] #!",
        "operators.conv2d",
        'operator kind such as "Conv" (a capital, then',
    ),
    # Names, tags, the whole.
    ("capital id", "formats.A8.bits = 8 #!", "formats.A8", KEY),
    ("dunder id", "formats.__class__.bits = 8 #!", "formats.__class__", KEY),
    ("id of 65 letters", f"formats.{'a' * 65}.bits = 8 #!", f"formats.{'a' * 61}...", KEY),
    (
        "id that is a word",
        "formats.unknown.bits = 8 #!",
        "formats.unknown",
        "is a word of its own and cannot be an id. Ch",
    ),
    (
        "misspelt field",
        "formats.x.bitz = 8 #!",
        "formats.x.bitz",
        "there is no such field. Closest: bits. Fields here: ",
    ),
    ("misspelt section", "format.x.bits = 8 #!", "format", "there is no such field. Closest: formats. Fields here: "),
    ("dunder field", "__class__.x = 8 #!", "__class__", "there is no such field."),
    ("field of the validator", "model_config.extra = 'allow' #!", "model_config", "there is no such field."),
    (
        "tag that is a word",
        'sources.memory = "x" #!',
        "sources.memory",
        "is a word of its own and cannot be a tag. Choose",
    ),
    ("tag with a space", "sources.'a b' = 'x' #!", "sources.a b", "a tag is letters, digits, _ . + - and starts"),
    ("empty source", 'sources.DOC = "" #!', "sources.DOC", 'must be text of 1 to 400 characters; got "".'),
    ("long summary", f'summary = "{"x" * 401}" #!', "summary", "must be text of 1 to 400 characters; got"),
    (
        "undefined tag",
        "formats.x = { bits = 8, source = 'DC' } #!",
        "formats.x.source",
        "'DC' is not a tag of sources. Tag",
    ),
    (
        "source of nothing",
        "formats.x = { bits = 8, source = { bit = 'memory' } } #!",
        "formats.x.source.bit",
        "'bit' is not a field this table sets, so it has nothing to source. Closest: bits.",
    ),
    (
        "unknown fallback",
        'fallback = "cpu" #!',
        "fallback",
        'must be "host", "refuse", "single_partition" or "unknown"',
    ),
    (
        "valid for a thing unheard of",
        'valid_for.chip = ["A"] #!',
        "valid_for.chip",
        'the key must be "silicon", "sdk",',
    ),
    (
        "undefined input",
        'boundary.input_formats = ["x"] #!',
        "boundary.input_formats",
        "'x' is not defined. Formats here",
    ),
    (
        "undefined result",
        'boundary.output_formats = ["x"] #!',
        "boundary.output_formats",
        "'x' is not defined. Formats",
    ),
    (
        "undefined memory",
        "clocks.fast.bandwidth_bytes_per_s = { ram = 1.0 } #!",
        "clocks.fast.bandwidth_bytes_per_s",
        "'ram' is not defined. No memories are defined here.",
    ),
    ("memory of 0 bytes", "memories.ram.capacity_bytes = 0 #!", "memories.ram.capacity_bytes", "of at least 1"),
    ("clock at a standstill", "clocks.fast.clock_hz = 0 #!", "clocks.fast.clock_hz", "must be a number above 0"),
    (
        "conflict of one",
        "[[conflicts]]\nfield = 'fallback'\nreadings = [{ value = 1 }] #!",
        "conflicts.0.readings",
        "a conflict has two readings or more; got 1.",
    ),
    (
        "conflict about nobody knows what",
        "[[conflicts]] #!\nreadings = [{ value = 1 }, { value = 2 }]",
        "conflicts.0.field",
        "must name the field in question.",
    ),
    (
        "conflict about no field",
        "[[conflicts]]\nfield = 'kernels.mc.bias' #!\nreadings = [{ value = 1 }, { value = 2 }]",
        "conflicts.0.field",
        "'kernels.mc.bias' is no field here: no 'mc'. Closest: mac.",
    ),
    (
        "third side chosen",
        "[[conflicts]]\nfield = 'fallback'\nreadings = [{ value = 1 }, { value = 2 }]\nchosen = 3 #!",
        "conflicts.0.chosen",
        'must be one of the readings or "unknown"; got 3.',
    ),
    # Values that no field holds.
    (
        "infinity",
        "formats.x.bits = -inf #!",
        "formats.x.bits",
        "must be a finite number; got -inf. Leave the field out.",
    ),
    (
        "no number",
        "formats.x.bits = nan #!",
        "formats.x.bits",
        "must be a finite number; got nan. Leave the field out.",
    ),
    ("1e999", "formats.x.bits = 1e999 #!", "formats.x.bits", "must be a finite number; got inf. Leave the field out."),
    (
        "date",
        "formats.x.bits = 1979-05-27 #!",
        "formats.x.bits",
        "must not be a date; no field holds one. Write it as a",
    ),
    ("time", "formats.x.bits = 07:32:00 #!", "formats.x.bits", "must not be a time; no field holds one."),
    (
        "65 bits",
        f"formats.x.bits = {2**64} #!",
        "formats.x.bits",
        "must fit 64 bits; got an integer of 65 bits. Use a sm",
    ),
    ("33 tables", f"x.{'a.' * 32}b = 1 #!", "", "nests deeper than 32 tables or lists. Flatten it."),
    ("33 lists", f"x = {'[' * 33}{']' * 33} #!", "x.0.0.0", "nests deeper than 32 tables or lists. Flatten it."),
]


def check_message(text: str, path: str, words: str) -> None:
    message = refused(text)
    line = next(number for number, content in enumerate(text.splitlines(), 1) if content.endswith("#!"))
    assert message.startswith(f"my.toml:{line}  {path}: " if path else f"my.toml:{line}: ")
    assert words in message
    assert message.endswith((".", '"')) and message.isprintable()


@pytest.mark.parametrize(("lines", "path", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_broken_rule_is_named(lines: str, path: str, words: str) -> None:
    check_message(TINY + lines, path, words)


def test_the_table_breaks_something_else_in_every_case() -> None:
    assert len({case[0] for case in CASES}) == len({case[1] for case in CASES}) == len(CASES) >= 60
    parse_target(TINY)


WHOLE = [
    ("no name", "schema_version = 1", "my.toml  name: is missing. Write it."),
    (
        "name without a vendor",
        'schema_version = 1\nname = "tiny"',
        'my.toml:2  name: must be a name like "vendor/chip"',
    ),
    ("no version", 'name = "a/b"', "my.toml  schema_version: is missing. Write schema_version = 1 as the first line."),
    (
        "newer version",
        "schema_version = 9",
        "my.toml:1  schema_version: is 9, newer than this qhw reads (up to 1). Install",
    ),
    (
        "version 0",
        "schema_version = 0",
        "my.toml:1  schema_version: must be from 1 to 1; got 0. Write schema_version = 1.",
    ),
    (
        "version in quotes",
        'schema_version = "1"',
        "my.toml:1  schema_version: must be an integer; got str. Write schema",
    ),
    (
        "key twice",
        "a = 1\na = 2\n",
        "my.toml:2: not valid TOML: Cannot overwrite a value, at column 6. Correct this line.",
    ),
    (
        "table twice",
        "[a]\n[a]",
        "my.toml:2: not valid TOML: Cannot declare ('a',) twice, at column 3. Correct this line.",
    ),
    ("no end", 'a = "', "my.toml: not valid TOML: "),
    ("5,000 digits", f"a = {'9' * 5000}", "my.toml: must fit 64 bits; got an integer of more than 4300 digits. Use a"),
    (
        "many values",
        f"a = [{'1,' * 20_000}]",
        "my.toml: must hold at most 20000 values and tables; it holds more. Leave",
    ),
    ("carriage returns alone", "a = 1\rb = 2", "my.toml:1: not valid TOML: "),
]


@pytest.mark.parametrize(("text", "start"), [case[1:] for case in WHOLE], ids=[case[0] for case in WHOLE])
def test_a_file_that_is_wrong_as_a_whole_is_refused(text: str, start: str) -> None:
    message = refused(text)
    assert message.startswith(start) and message.endswith(".") and message.isprintable()


def test_windows_line_ends_are_read_and_counted() -> None:
    assert parse_target(TINY.replace("\n", "\r\n")) == parse_target(TINY)
    assert refused(TINY.replace("\n", "\r\n") + "formats.x.bits = 0\r\n").startswith("my.toml:8  formats.x.bits: ")


class Raised:
    """Where the schema made its problems: (file, line of the call)."""

    def __init__(self) -> None:
        self.places: set[tuple[str, int]] = set()

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = Problem.__init__

        def record(problem: Problem, path: tuple[str | int, ...], text: str) -> None:
            frame = sys._getframe(1)
            self.places.add((Path(frame.f_code.co_filename).name, frame.f_lineno))
            made(problem, path, text)

        monkeypatch.setattr(Problem, "__init__", record)


def problem_calls() -> Iterator[tuple[str, int]]:
    """Every place of the loading half of the schema that makes a problem."""
    folder = Path(inspect.getfile(qhw.schema)).parent
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Problem":
                yield path.name, node.lineno


def test_no_rule_goes_without_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    raised = Raised()
    raised.watch(monkeypatch)
    for text in (*(TINY + case[1] for case in CASES), *(case[1] for case in WHOLE)):
        with pytest.raises(TargetError):
            parse_target(text, name_of_file="my.toml")
    assert sorted(set(problem_calls()) - raised.places) == []
