# SPDX-License-Identifier: Apache-2.0
"""Measurements on real models. Never part of the tests; every table says the command that makes it."""
