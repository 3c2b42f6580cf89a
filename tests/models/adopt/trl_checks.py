# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""TRL's GRPO on two data-parallel ranks, with an engine of tensor-parallel size 2.

Run by `test_trl.py`: `torchrun --nproc-per-node 2 trl_checks.py FOLDER`, where FOLDER
has a model and its tokenizer.
"""

import sys

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from vllm import training
from vllm.model_executor.parallel_context import ParallelContext
from vllm.training.trl import GRPOTrainer, _add_token_logprobs

STEPS = 3
ON_GPU = torch.cuda.is_available()
DTYPE = "bfloat16" if ON_GPU else "float32"


def different_tokens(completion_ids, **_):
    return [float(len(set(ids))) for ids in completion_ids]


def make_trainer(folder):
    args = GRPOConfig(
        output_dir=f"{folder}/trainer",
        use_cpu=not ON_GPU,
        bf16=False,
        model_init_kwargs={"dtype": DTYPE},
        use_vllm=True,
        vllm_tensor_parallel_size=2,
        vllm_max_model_length=64,
        max_completion_length=6,
        num_generations=4,
        num_iterations=2,
        per_device_train_batch_size=8,
        temperature=0.7,
        beta=0.1,
        learning_rate=1e-3,
        max_steps=2 * STEPS,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    prompts = ["1", "23", "345", "6789"] * 2
    return GRPOTrainer(
        folder,
        different_tokens,
        args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        engine_args={"enforce_eager": True},
    )


def check_trainer(trainer):
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == 2 * STEPS
    # Each generation is trained on twice.
    generated = [entry for entry in log if "sampling/kl" in entry]
    assert len(generated) == STEPS
    for entry in generated:
        assert entry["sampling/kl"] == 0
        assert entry["sampling/sampling_logp_difference/max"] == 0
        assert entry["sampling/importance_sampling_ratio/min"] == 1
        assert entry["sampling/importance_sampling_ratio/max"] == 1
    # The reference model has the same weights at first, and so the same bits.
    assert log[0]["kl"] == 0 < log[-1]["kl"]
    assert log[0]["grad_norm"] > 0


def check_ranks_agree(trainer):
    for name, parameter in trainer.model.named_parameters():
        both = [torch.empty_like(parameter) for _ in range(2)]
        dist.all_gather(both, parameter.detach())
        assert torch.equal(*both), name


def check_that_the_divergence_is_seen(trainer):
    """Without the push of the last step the engine is another model."""
    trainer._last_loaded_step = trainer.state.global_step
    trainer._generate_and_score_completions([{"prompt": "12"}] * 8)
    assert trainer._metrics["train"]["sampling/kl"][-1] > 0
    trainer.vllm_generation.sync_weights()
    trainer._generate_and_score_completions([{"prompt": "12"}] * 8)
    assert trainer._metrics["train"]["sampling/kl"][-1] == 0


def scored(model):
    """Logprobs and gradients of rows of different lengths."""
    ids = torch.arange(2, 10, device=model.device).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # a shorter prompt
    mask[1, 6:] = 0  # a shorter completion
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    output = model(ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    assert output.log_probs[:, :3].count_nonzero() == 0
    assert output.log_probs[0, 3:].count_nonzero() == 4
    assert output.log_probs[1, 3:].count_nonzero() == 2
    output.log_probs.sum().backward()
    return output.log_probs


def adopted(folder, device):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).to(device)
    training.adopt(model, parallel_context=ParallelContext.single())
    _add_token_logprobs(model, temperature=0.7)
    return model


def check_fsdp2(folder, device):
    """The head's weight is in shards outside the forward that computes logprobs."""
    plain, sharded = (adopted(folder, device) for _ in range(2))
    for layer in sharded.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(sharded, reshard_after_forward=True)
    assert torch.equal(scored(plain), scored(sharded))
    for (name, expected), parameter in zip(
        plain.named_parameters(), sharded.parameters()
    ):
        # Of both ranks, which have the same rows: the mean is what each has.
        assert torch.equal(parameter.grad.full_tensor(), expected.grad), name


def main(folder):
    trainer = make_trainer(folder)
    check_trainer(trainer)
    check_ranks_agree(trainer)
    check_that_the_divergence_is_seen(trainer)
    check_fsdp2(folder, trainer.accelerator.device)
    print(f"passed on rank {dist.get_rank()}")


if __name__ == "__main__":
    main(sys.argv[1])
