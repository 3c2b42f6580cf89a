# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention over packed sequences.

`reference.py` is the specification in plain torch. `dispatch.py` holds the public
function and the table that chooses an implementation; the implementations are one
file each.
"""
