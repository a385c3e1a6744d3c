# SPDX-License-Identifier: Apache-2.0
"""docs/models.md: its program prints what stands there, and each rewriting is the file that it names."""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/models.md").read_text()


def test_the_program_of_the_page_prints_what_stands_there() -> None:
    program, printed = re.findall(r"^```(?:python)?\n(.*?)^```$", TEXT, flags=re.M | re.S)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(program, {})  # noqa: S102  (our own documentation)
    assert out.getvalue() == printed


def test_every_rewriting_names_its_file() -> None:
    files = re.findall(r"\| `(\w+\.py)` \|$", TEXT, flags=re.M)
    assert len(files) == 8
    assert [file for file in files if not (ROOT / "qhw/graph" / file).is_file()] == []
