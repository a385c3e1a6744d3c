# SPDX-License-Identifier: Apache-2.0
"""docs/numerics.md says what is true: its example runs, its codes and its rounding table are right."""

import re
from fractions import Fraction
from pathlib import Path

from qhw.numerics import ROUNDING_RULES
from qhw.testing import reference

PAGE = (Path(__file__).parents[3] / "docs" / "numerics.md").read_text(encoding="utf-8")


def test_the_example_gives_the_codes_beside_it():
    example = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL).group(1)
    names: dict[str, object] = {}
    exec(compile(example, "docs/numerics.md", "exec"), names)  # noqa: S102
    stated = re.search(r"int8 codes (\[\[.*?\]\])", PAGE).group(1)
    # By hand: 0.25 * 127 = 31.75, -1 * 127, 0.02 * 127 / 0.02, 0.015 * 127 / 0.02 = 95.25.
    assert str(names["w_q"].tolist()) == stated == "[[32, -127], [127, 95]]"


def test_the_example_of_small_floats_holds():
    (example,) = re.findall(r"```python\n((?:(?!```).)*FloatElements.*?)```", PAGE, re.DOTALL)
    assert example.count("assert ") == 2  # the page says itself what must hold
    exec(compile(example, "docs/numerics.md", "exec"), {})  # noqa: S102


def test_the_example_of_requantization_holds():
    (example,) = re.findall(r"```python\n((?:(?!```).)*rescale_fixed_point.*?)```", PAGE, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, "docs/numerics.md", "exec"), names)  # noqa: S102
    assert names["shift"].tolist() == [2, 5]


def test_the_rounding_table_is_the_reference():
    header, _, *rows = re.search(r"\| rule \|.*?\n\n", PAGE, re.DOTALL).group(0).strip().splitlines()
    values = [Fraction(cell.strip()) for cell in header.strip("|").split("|")[1:]]
    table = {}
    for row in rows:
        rule, *codes = (cell.strip().strip("`") for cell in row.strip("|").split("|"))
        table[rule] = [int(code) for code in codes]
    assert table == {rule: [reference.round_exact(value, rule) for value in values] for rule in ROUNDING_RULES}
