# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention over packed sequences.

`reference.py` is the specification in plain torch. `call.py` holds the values that
describe a call, `op.py` the op and the public function, `table.py` the implementations
and how one is chosen.
"""
