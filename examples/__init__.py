# SPDX-License-Identifier: Apache-2.0
"""Models and data to try qhw on, run from the repository root; none of it is installed with the package."""
