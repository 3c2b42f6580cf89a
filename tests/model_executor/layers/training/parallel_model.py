# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A small model of one of each layer, for checks on several ranks."""

from contextlib import contextmanager

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.checkpoint.specification import local_from_full
from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    GatherSequence,
    LayerNorm,
    MergedColumnParallelLinear,
    ParallelLMHead,
    RMSNorm,
    RotaryEmbedding,
    RowParallelLinear,
    SiluAndMul,
    SplitSequence,
    TrainingLayer,
    VLLMFlashAttention,
    VocabParallelEmbedding,
    token_logprobs,
)

# Padded to 128: of four ranks the last has padding alone.
VOCAB, HIDDEN, TOKENS = 90, 32, 24


class Model(nn.Module):
    """The hidden states before the head."""

    def __init__(
        self,
        context,
        num_kv_heads=2,
        dtype=torch.float32,
        *,
        head_dim=None,
        tied=False,
        sequence_parallel=False,
    ):
        super().__init__()
        kwargs = {"params_dtype": dtype, "parallel_context": context}
        cut = kwargs | {"sequence_parallel": sequence_parallel}
        rotary = RotaryEmbedding(head_dim or HIDDEN // 4, max_position_embeddings=64)
        self.embedding = VocabParallelEmbedding(VOCAB, HIDDEN, **cut)
        self.norm = RMSNorm(HIDDEN, **cut)
        self.attention = VLLMFlashAttention(
            HIDDEN,
            4,
            num_kv_heads,
            head_dim=head_dim,
            bias=True,
            rotary=rotary,
            **cut,
        )
        self.up = MergedColumnParallelLinear(HIDDEN, [48, 48], **cut)
        self.act = SiluAndMul(context)
        self.down = RowParallelLinear(48, HIDDEN, **cut)
        self.leave, self.enter = nn.Identity(), nn.Identity()
        if sequence_parallel:
            self.leave, self.enter = GatherSequence(context), SplitSequence(context)
        self.gathered = ColumnParallelLinear(HIDDEN, 16, gather_output=True, **kwargs)
        self.split = RowParallelLinear(16, HIDDEN, input_is_parallel=False, **kwargs)
        self.last = LayerNorm(HIDDEN, **cut)
        self.head = ParallelLMHead(VOCAB, HIDDEN, True, **cut)
        if tied:
            self.head.tie_weights(self.embedding)

    def forward(self, ids, positions, cu_seqlens):
        x = self.embedding(ids)
        x = x + self.attention(self.norm(x), positions, cu_seqlens)
        x = x + self.down(self.act(self.up(x)))
        x = self.leave(x)
        x = self.enter(x + self.split(self.gathered(x)))
        return self.last(x)


def make_model(context, *args, **options):
    torch.manual_seed(3)
    return Model(context, *args, **options)


def make_batch():
    """Ids, positions, cu_seqlens, targets, and the gradient of each logprob."""
    generator = torch.Generator().manual_seed(5)
    lengths = [5, 0, 18, 1]
    with torch.device("cpu"):
        batch = (
            torch.randint(VOCAB, (TOKENS,), generator=generator),
            torch.cat([torch.arange(length) for length in lengths]),
            torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
            torch.randint(VOCAB, (TOKENS,), generator=generator),
            torch.randn(TOKENS, generator=generator),
        )
    device = torch.get_default_device()
    return tuple(tensor.to(device) for tensor in batch)


def results(model, *, through_logits=False):
    """Log-probabilities and the gradient of each parameter."""
    *inputs, targets, grad = make_batch()
    hidden = model(*inputs)
    if through_logits:
        logps = model.head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    else:
        logps = token_logprobs(hidden, model.head, targets)
    logps.backward(grad.to(logps.dtype))
    return {"logprobs": logps.detach()} | {
        name: parameter.grad for name, parameter in model.named_parameters()
    }


def shardings_of(model):
    """By parameter name, those of tied parameters once."""
    return {
        name: sharding
        for path, layer in model.named_modules()
        if isinstance(layer, TrainingLayer)
        for part, sharding in layer.parameter_sharding().items()
        if (name := f"{path}.{part}") in dict(model.named_parameters())
    }


def local(tensor, sharding, context):
    """A rank's shard of a full tensor; the tensor itself where it is not sharded."""
    if sharding is None:
        return tensor
    return local_from_full(tensor, sharding, context.tp_rank, context.tp_size)


@contextmanager
def engine_step():
    """As the engine runs a model."""
    with set_forward_context(None, VllmConfig()), torch.inference_mode():
        yield
