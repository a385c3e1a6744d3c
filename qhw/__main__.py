# SPDX-License-Identifier: Apache-2.0
"""`python -m qhw`: the command line, where the script `qhw` is not on the path."""

from qhw.cli import main

if __name__ == "__main__":
    main()
