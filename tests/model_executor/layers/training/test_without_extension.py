# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where the extension is not built, importing says so and plain torch computes."""

import subprocess
import sys

SCRIPT = """
import pathlib

exists = pathlib.Path.exists
pathlib.Path.exists = lambda path, **kwargs: (
    "_training_C" not in path.name and exists(path, **kwargs)
)
import torch

from vllm.model_executor.layers.training import token_logprobs
from vllm.model_executor.op_library import HAS_CPU_KERNELS
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)
from vllm.training import batch_invariant

pathlib.Path.exists = exists
assert not HAS_CPU_KERNELS
torch.manual_seed(0)
sizes = dict(vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
model = GenericTransformerForCausalLM(GenericTransformerConfig(**sizes))
ids = torch.randint(50, (3, 20))


def logprobs():
    states = model.model(ids[:, :-1])
    return token_logprobs(states, model.lm_head, ids[:, 1:])


plain = logprobs()
plain.sum().backward()
assert all(p.grad.ne(0).any() for p in model.parameters())
try:
    with batch_invariant():
        logprobs()
except RuntimeError as error:
    assert str(error).startswith("Batch-invariant mode on CPU"), error
else:
    raise AssertionError("the mode computed something")
model.double()
torch.testing.assert_close(plain.double(), logprobs(), rtol=0, atol=1e-5)
"""


def test_plain_torch_computes_and_it_is_said():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert report.count("_training_C.abi3.so is not built") == 1, report
    assert "pip install --no-build-isolation ." in report
