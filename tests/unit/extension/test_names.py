# SPDX-License-Identifier: Apache-2.0
"""What is said about a name that nobody knows."""

import itertools

import pytest

from qhw.extension.names import NAME, TARGET_NAME, nearest, unknown_name

TARGETS = ("espressif/esp32-p4", "google/litert-int8", "onnxruntime/cpu-x86-vnni", "whitepaper/generic-int8")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("esspressif/esp32", "espressif/esp32-p4"),
        ("VNNI", "onnxruntime/cpu-x86-vnni"),
        ("litert", "google/litert-int8"),
    ],
)
def test_the_closest_name_survives_a_typo_and_a_missing_vendor(asked: str, found: str) -> None:
    assert nearest(asked, TARGETS) == found


def test_names_with_nothing_in_common_are_not_offered() -> None:
    assert nearest("zzz", TARGETS) is None
    assert nearest("", TARGETS) is None


def test_ties_do_not_depend_on_the_order_given() -> None:
    # Each differs from 'abcx' in its last letter of four: all equally like it.
    assert len({nearest("abcx", order) for order in itertools.permutations(("abcd", "abce", "abcf"))}) == 1


def test_a_target_points_to_the_command_that_lists_all() -> None:
    assert unknown_name("target", "esspressif/esp32", TARGETS[:1], listing="qhw target list") == (
        "no target 'esspressif/esp32'. Closest: espressif/esp32-p4. All: qhw target list"
    )


def test_other_kinds_list_what_is_known() -> None:
    assert unknown_name("algorithm", "mimax", ["mse", "minmax"]) == (
        "no algorithm 'mimax'. Closest: minmax. Known: minmax, mse."
    )
    assert unknown_name("algorithm", "zzz", ["mse"]) == "no algorithm 'zzz'. Known: mse."


def test_nothing_registered_points_to_the_block_list() -> None:
    assert unknown_name("exporter", "onnx_qdq", []) == (
        "no exporter 'onnx_qdq': no loaded plugin brings any. See 'qhw plugin list' for what QHW_BLOCK leaves out."
    )


@pytest.mark.parametrize("name", ["", "Minmax", "9lives", "a-b", "a b", "a\n", "ä"])
def test_illegal_names_of_classes(name: str) -> None:
    assert NAME.fullmatch(name) is None


@pytest.mark.parametrize("name", ["acme", "acme/", "/npu", "Acme/npu", "acme/npu/v2", "../npu", "acme/n pu"])
def test_illegal_names_of_targets(name: str) -> None:
    assert TARGET_NAME.fullmatch(name) is None
