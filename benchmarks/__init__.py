# SPDX-License-Identifier: Apache-2.0
"""Speed, memory and label efficiency, each measured by one command."""
