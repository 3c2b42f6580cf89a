# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a trainer imports from vLLM: process set-up and weights."""

from vllm.training.parallel import destroy_parallel, initialize_parallel

__all__ = ["destroy_parallel", "initialize_parallel"]
