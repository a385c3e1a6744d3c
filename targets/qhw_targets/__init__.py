# SPDX-License-Identifier: Apache-2.0
"""The accelerators that come with qhw: one data file each, `<vendor>/<chip>.toml`."""

from pathlib import Path

from qhw.extension import PluginInfo, hookimpl


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="The shipped targets.")


@hookimpl
def qhw_register_targets() -> list[Path]:
    return [Path(__file__).parent]
