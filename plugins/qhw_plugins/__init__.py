# SPDX-License-Identifier: Apache-2.0
"""The plugins that come with qhw: one file each, through the same entry points as anybody's."""
