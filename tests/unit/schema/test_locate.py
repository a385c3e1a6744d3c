# SPDX-License-Identifier: Apache-2.0
"""Lines of key paths: tables, dotted keys, inline tables, arrays, strings of every kind."""

import pytest

from qhw.schema.base import Path
from qhw.schema.locate import Lines

TEXT = '''\
# a comment with [brackets] = and "quotes"
name = "a # no comment"  # one
text = """first
[formats.no]
last"""
raw = \'\'\'
x = 1\'\'\'

[formats.w8]     # a header
bits = 8
"quoted key" = 'it\\'
scale.kind = "fixed"
codes = [
  -127,  # low
  127,
]

[operators]
Conv = { kernels = ["mac", "mac16"], limits = { groups = ["1"], "x.y" = 2 } }
[[conflicts]]
field = "a"
[[conflicts]]
field = "b"
[conflicts.deep]
why = "c"
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("name",), 2),
        (("text",), 3),
        (("raw",), 6),
        (("formats",), None),
        (("formats", "w8"), 9),
        (("formats", "w8", "bits"), 10),
        (("formats", "w8", "quoted key"), 11),
        (("formats", "w8", "scale"), 12),
        (("formats", "w8", "scale", "kind"), 12),
        (("formats", "w8", "codes"), 13),
        (("formats", "w8", "codes", 0), 14),
        (("formats", "w8", "codes", 1), 15),
        (("operators", "Conv", "kernels", 1), 19),
        (("operators", "Conv", "limits", "groups", 0), 19),
        (("operators", "Conv", "limits", "x.y"), 19),
        (("conflicts", 0, "field"), 21),
        (("conflicts", 1, "field"), 23),
        (("conflicts", 1, "deep", "why"), 25),
        (("x",), None),
        (("formats", "no"), None),
    ],
)
def test_a_path_has_the_line_it_is_written_on(path: Path, line: int | None) -> None:
    assert Lines(TEXT).of(path) == line


def test_windows_line_ends_count_once() -> None:
    assert Lines("a = 1\r\nb = 2\r\n").of(("b",)) == 2


def test_the_nearest_written_table_stands_in_for_a_missing_field() -> None:
    assert Lines(TEXT).nearest(("formats", "w8", "scale", "min")) == (3, 12)
    assert Lines(TEXT).nearest(("kernels", "mac")) == (0, None)


def test_what_stands_before_a_broken_place_is_found() -> None:
    assert Lines('a = 1\nb = "open').of(("a",)) == 1
    assert Lines("a = 1\n= = =\nc = 3").of(("c",)) is None
