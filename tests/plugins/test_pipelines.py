# SPDX-License-Identifier: Apache-2.0
"""The shipped pipeline names shipped algorithms of the right stage, and all of them."""

from qhw.extension import Registry


def test_the_default_pipeline_names_what_is_registered(registry: Registry) -> None:
    pipeline = registry.default_pipeline()
    assert pipeline.name == "ranges-ptq"
    for preference in pipeline.stages:
        for name in preference.algorithms:
            assert registry.algorithm(name).stage == preference.stage


def test_every_algorithm_of_these_plugins_stands_in_it(registry: Registry) -> None:
    named = {name for preference in registry.default_pipeline().stages for name in preference.algorithms}
    assert set(registry.algorithms) == named
