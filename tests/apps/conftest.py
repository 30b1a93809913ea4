# SPDX-License-Identifier: Apache-2.0
"""Beside embedding_fields.py, so that tests in the folders below find it."""
