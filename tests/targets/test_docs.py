# SPDX-License-Identifier: Apache-2.0
"""docs/targets.md: its example loads and does what it says, and its table names every shipped target."""

import re
from pathlib import Path

import pytest

from qhw.extension import Registry
from qhw.graph.kinds import KNOWN_KINDS
from qhw.schema import LimitRange, lint, parse_target


@pytest.fixture(scope="module")
def page() -> str:
    return (Path(__file__).parents[2] / "docs" / "targets.md").read_text()


def test_the_table_has_a_column_for_every_target(page: str, targets_root: Path) -> None:
    names = {path.relative_to(targets_root).with_suffix("").as_posix() for path in targets_root.glob("*/*.toml")}
    header = next(line for line in page.splitlines() if line.startswith("| | `"))
    assert set(re.findall(r"`([^`]+)`", header)) == names


def test_the_example_of_extending_loads_without_warnings(page: str, registry: Registry) -> None:
    example = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)[-1]
    spec = parse_target(example, find_base=registry.target_path)
    assert [str(finding) for finding in lint(spec, known_kinds=KNOWN_KINDS) if finding.severity != "info"] == []
    assert spec.requantize["rescale"].rounding == "half_to_plus_infinity"
    assert spec.requantize["rescale"].multiplier_bits == 31
    assert spec.operators["Softmax"].kernels == ()
    assert spec.operators["Conv"].fused == ("Relu", "Clip")
    assert spec.operators["Conv"].limits == {"kernel": LimitRange(max=7.0)}
