# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Train a transformers model with TRL's GRPO, at a KL divergence of exactly 0.

A small Qwen3 with random weights learns to count: the reward is the share of digits
that follow the digit before them. vLLM samples the completions in the trainer's
process. Trainer and engine run in batch-invariant mode, so at each step their logprobs
of the sampled tokens are equal, bit for bit.

Three lines differ from a script for TRL's own `GRPOTrainer`; they are numbered below.
Besides vLLM it needs `trl` 1.16.

    python examples/trl_grpo.py     # writes build/trl_grpo/report.json and report.png
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

os.environ["VLLM_BATCH_INVARIANT"] = "1"  # line 1
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that wait for a core of another process would spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from trl import GRPOConfig

from vllm.model_executor.checkpoint.files import whole_file
from vllm.training.trl import GRPOTrainer  # line 2, instead of TRL's

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DIGITS = "0123456789"
MAX_TOKENS = 8
ON_GPU = torch.cuda.is_available()


def counting(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """The reward: the share of tokens that are the digit after the one before."""
    rewards = []
    for prompt, completion in zip(prompts, completions):
        digits = [int(digit) for digit in prompt[-1] + completion]
        steps = [(after - before) % 10 for before, after in zip(digits, digits[1:])]
        rewards.append(steps.count(1) / MAX_TOKENS)
    return rewards


def counts() -> Dataset:
    """Prompts of one to three digits that count, such as 789."""
    starts = [DIGITS[start:] + DIGITS[:start] for start in range(10)]
    prompts = [digits[:length] for digits in starts for length in (1, 2, 3)]
    return Dataset.from_dict({"prompt": prompts})


def write_model(directory: Path) -> None:
    """A model with random weights and its tokenizer, one token for each digit."""
    words = ["<pad>", "<end>", *DIGITS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"
    ).save_pretrained(directory)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def train(out: Path, steps: int) -> list[dict[str, float]]:
    """TRL's log of each step."""
    model_dir = out / "model"
    write_model(model_dir)
    args = GRPOConfig(
        output_dir=str(out / "trainer"),
        bf16=False,  # line 3: autocast is TRL's default
        use_cpu=not ON_GPU,
        model_init_kwargs={"dtype": "bfloat16" if ON_GPU else "float32"},
        use_vllm=True,
        vllm_max_model_length=64,
        max_completion_length=MAX_TOKENS,
        num_generations=8,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = GRPOTrainer(str(model_dir), counting, args, train_dataset=counts())
    trainer.train()
    return [entry for entry in trainer.state.log_history if "reward" in entry]


def write_report(out: Path, log: list[dict[str, float]]) -> dict[str, object]:
    """`report.json` and `report.png`, each whole or not at all."""
    rewards = [entry["reward"] for entry in log]
    kl = [entry["sampling/kl"] for entry in log]
    differences = [entry["sampling/sampling_logp_difference/max"] for entry in log]
    report: dict[str, object] = {
        "steps": len(log),
        "seconds_per_step": statistics.median(entry["step_time"] for entry in log),
        "reward_first": rewards[0],
        "reward_last": rewards[-1],
        "kl_max": max(kl),
        "max_abs_logprob_difference": max(differences),
        "rewards": rewards,
        "kl": kl,
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    left.plot(rewards)
    left.set(title="reward", xlabel="step", ylim=(0, 1))
    right.plot(kl)
    right.set(title="KL(trainer || engine)", xlabel="step", ylabel="nats per token")
    with whole_file(out / "report.png") as part:
        figure.savefig(part, dpi=120)
    with whole_file(out / "report.json") as part:
        part.write_text(json.dumps(report, indent=2) + "\n")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("build/trl_grpo"))
    args = parser.parse_args()
    log = train(args.out, args.steps)
    report = write_report(args.out, log)
    for name in ("steps", "seconds_per_step", "reward_first", "reward_last", "kl_max"):
        print(f"{name:16} {report[name]:.3g}")
    print(f"report in {args.out}/report.json and {args.out}/report.png")
    if report["kl_max"] != 0 or report["max_abs_logprob_difference"] != 0:
        sys.exit("trainer and engine differ")


if __name__ == "__main__":
    main()
