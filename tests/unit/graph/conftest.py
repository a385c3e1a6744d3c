# SPDX-License-Identifier: Apache-2.0
"""Graphs of the tiny models, each captured once; tests that change a graph take a copy."""

from collections.abc import Callable
from functools import cache

import pytest

from qhw.graph import Graph, capture
from qhw.testing.models import example


@cache
def _captured(name: str) -> Graph:
    return capture(*example(name))


@pytest.fixture(scope="session")
def captured() -> Callable[[str], Graph]:
    return _captured
