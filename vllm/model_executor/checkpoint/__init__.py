# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How a model's parameters map to the tensors of a checkpoint and to shards."""
