# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Adopted models on two ranks against one; run on each by `test_tensor_parallel.py`.

Arguments: a directory, and the families.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from tests.models.adopt.families import VOCABULARY, make
from vllm import training
from vllm.model_executor.checkpoint.layout import CheckpointLayout
from vllm.model_executor.checkpoint.shards import local_tensor
from vllm.model_executor.parallel_context import ParallelContext


def adopted_and_shards(family, context, dtype=torch.float32):
    """A model, the same adopted whole, and this rank's part of it."""
    model = make(family, dtype)
    reduced = ParallelContext(tp_reduction_shards=context.tp_size)
    whole = training.adopt(copy.deepcopy(model), parallel_context=reduced)
    return model, whole, training.adopt(copy.deepcopy(model), parallel_context=context)


def ids_of(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, shape, generator=generator)


def check_bits(family, context):
    """Two ranks have the bits of one with two reduction shards."""
    for dtype in (torch.float32, torch.bfloat16):
        _, whole, part = adopted_and_shards(family, context, dtype)
        with training.batch_invariant(), torch.no_grad():
            ids = ids_of(2, 11)
            logits = whole(ids, use_cache=False).logits
            size = logits.shape[-1] // context.tp_size
            own = part(ids, use_cache=False).logits
            if own.shape != logits.shape:  # of a ParallelLMHead
                logits = logits.narrow(-1, context.tp_rank * size, size)
            assert torch.equal(own, logits), (family, dtype)


def check_gradients(family, context):
    """Each rank's are those of its part of the weights."""
    model, _, part = adopted_and_shards(family, context)
    ids = ids_of(2, 11)
    for each in (model, part):
        logits = each(ids, use_cache=False).logits
        if logits.shape[-1] != VOCABULARY:
            logits = training_logits(logits, context)
        logits.float().log_softmax(-1)[..., 5].sum().backward()
    layout = CheckpointLayout.of(part)
    whole = dict(model.named_parameters())
    for name, parameter in part.named_parameters():
        expected = whole[name].grad
        for shard in layout.parameters[name].shards:
            box = layout.parameters[name].source(shard, 0)
            own = shard.local(local_tensor(parameter.grad))
            scale = expected.abs().max() + 1e-6
            error = (own - expected[box]).abs().max()
            assert error <= 1e-4 * scale, (family, name, error, scale)


def training_logits(logits, context):
    from vllm.model_executor.layers.training.collectives import gather_from_group

    return gather_from_group(logits, context)


def check_checkpoint(family, context, directory):
    """What two ranks save is the model's, for transformers and for two ranks."""
    model, _, part = adopted_and_shards(family, context)
    training.save_checkpoint(part, directory)
    if context.rank == 0:
        model.config.save_pretrained(directory)
    dist.barrier()
    read = AutoModelForCausalLM.from_pretrained(directory)
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), (family, name)
    own = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    for parameter in part.parameters():
        parameter.data.zero_()
    training.load_checkpoint(part, directory)
    for name, tensor in part.state_dict().items():
        assert torch.equal(own[name], tensor), (family, name)
    try:
        part.save_pretrained(directory)
    except ValueError as error:
        assert "training.save_checkpoint" in str(error)
    else:
        raise AssertionError("a rank's part was saved as a whole model")


if __name__ == "__main__":
    context = training.initialize_parallel(2)
    for family in sys.argv[2:]:
        check_bits(family, context)
        check_gradients(family, context)
        check_checkpoint(family, context, Path(sys.argv[1]) / family)
    training.destroy_parallel()
    print("all checks passed")
