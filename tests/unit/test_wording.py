# SPDX-License-Identifier: Apache-2.0
"""Numbers, lists and paths as people write them."""

from pathlib import Path

import pytest

from qhw.wording import argument, counted, listed


@pytest.mark.parametrize(("number", "words"), [(0, "0 layers"), (1, "1 layer"), (2, "2 layers")])
def test_a_noun_is_in_the_plural_unless_there_is_one(number: int, words: str) -> None:
    assert counted(number, "layer") == words
    assert counted(number, "bias", "biases") == words.replace("layer", "bias" if number == 1 else "biase")


def test_a_list_says_how_many_more_there_are() -> None:
    assert listed(()) == ""
    assert listed(("a", "b", "c"), 3) == "a, b, c"
    assert listed(("a", "b", "c", "d"), 3) == "a, b, c and 1 more"


def test_a_path_with_a_space_is_one_argument() -> None:
    assert argument(Path("out")) == "out"
    assert argument(Path("my out")) == '"my out"'
