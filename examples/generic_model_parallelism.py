# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One model definition over tensor-parallel ranks, in the trainer and in the engine.

Three examples, all by default:

    manual   parallel layers by hand: two ranks compute what one does, backward too
    builder  a builder callback: trained by two ranks, served by two workers, the
             logprobs of both equal bit for bit
    library  the same model with other libraries' layers: attention's projections are
             nn.Linear sharded by PyTorch's `parallelize_module`, the MLP's are
             Megatron-Core's parallel linears (pip install megatron-core==0.16.1)

    python examples/generic_model_parallelism.py
    python examples/generic_model_parallelism.py builder
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from trainer_and_engine import TrainerRanks, positions_of, train_and_serve

from vllm.model_executor.checkpoint.specification import (
    ParameterSharding,
    local_from_full,
)
from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    Gelu,
    ParallelLMHead,
    RMSNorm,
    RowParallelLinear,
    TrainableAttention,
    VocabParallelEmbedding,
    token_logprobs,
)
from vllm.model_executor.parallel_context import ParallelContext


@dataclass
class Linears:
    """How to make a layer from its numbers of input and output features.

    Attributes:
        column: one whose output features are cut over the ranks.
        row: one whose input features are.
    """

    column: Callable[[int, int], nn.Module]
    row: Callable[[int, int], nn.Module]


class Block(nn.Module):
    """A transformer block, plain PyTorch around whatever linears it is given."""

    def __init__(self, config, tp_size, attention: Linears, mlp: Linears):
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        kv_heads, head_size = config.num_key_value_heads, hidden // heads
        if kv_heads % tp_size:
            raise ValueError(
                f"num_key_value_heads={kv_heads} cannot be cut over tp_size={tp_size} "
                "ranks; choose a tensor_parallel_size that divides it."
            )
        self.norm1, self.norm2 = RMSNorm(hidden), RMSNorm(hidden)
        self.q = attention.column(hidden, hidden)
        self.k = attention.column(hidden, kv_heads * head_size)
        self.v = attention.column(hidden, kv_heads * head_size)
        self.attn = TrainableAttention(
            heads // tp_size, head_size, num_kv_heads=kv_heads // tp_size
        )
        self.out = attention.row(hidden, hidden)
        self.up, self.gelu = mlp.column(hidden, 4 * hidden), Gelu()
        self.down = mlp.row(4 * hidden, hidden)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.out(self.attn(self.q(y), self.k(y), self.v(y)))
        return x + self.down(self.gelu(self.up(self.norm2(x))))


class MyModel(nn.Module):
    """`forward(input_ids, positions)` gives logits; that is all vLLM needs."""

    def __init__(self, config, parallel_context, attention: Linears, mlp: Linears):
        super().__init__()
        hidden, shard = config.hidden_size, {"parallel_context": parallel_context}
        self.tokens = VocabParallelEmbedding(config.vocab_size, hidden, **shard)
        self.places = nn.Embedding(config.max_position_embeddings, hidden)
        self.blocks = nn.ModuleList(
            Block(config, parallel_context.tp_size, attention, mlp)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(hidden)
        self.lm_head = ParallelLMHead(config.vocab_size, hidden, **shard)

    def hidden_states(self, input_ids, positions):
        x = self.tokens(input_ids) + self.places(positions)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, input_ids, positions):
        return self.lm_head(self.hidden_states(input_ids, positions))

    def token_logprobs(self, ids):
        """Logprob of each token after the first, shape = [batch, seq - 1]."""
        hidden_states = self.hidden_states(ids[:, :-1], positions_of(ids[:, :-1]))
        return token_logprobs(hidden_states, self.lm_head, ids[:, 1:])


class MyModelBuilder:
    """The callback: vLLM calls `build` in each worker, the trainer in each rank."""

    @staticmethod
    def build(config, parallel_context):
        options = {"bias": False, "parallel_context": parallel_context}
        ours = Linears(
            partial(ColumnParallelLinear, **options),
            partial(RowParallelLinear, **options),
        )
        return MyModel(config, parallel_context, attention=ours, mlp=ours)


# --- other libraries' layers


class MegatronLinear(nn.Module):
    """One of Megatron-Core's parallel linears, which return `(output, bias)`."""

    def __init__(self, layer, parallel_context):
        super().__init__()
        self.layer = layer
        self.parallel_context = parallel_context

    def forward(self, x):
        return self.layer(x)[0]

    def parameter_sharding(self):
        """What vLLM asks of layers that are not its own, to load and save them."""
        return megatron_sharding(self, self.parallel_context.tp_size)


def megatron_sharding(module: nn.Module, tp_size: int) -> dict[str, ParameterSharding]:
    """The sharding of Megatron's parameters, which it notes as their attributes."""
    return {
        name: ParameterSharding.from_local(
            parameter.shape,
            parameter.partition_dim,
            tp_size,
            parameter.partition_stride,
        )
        for name, parameter in module.named_parameters()
        if getattr(parameter, "tensor_model_parallel", False)
    }


def megatron_linears(parallel_context: ParallelContext) -> Linears:
    """Megatron-Core's linears over the context's group, without its global state."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import layers

    options = {
        "config": ModelParallelConfig(
            tensor_model_parallel_size=parallel_context.tp_size,
            params_dtype=torch.get_default_dtype(),
            use_cpu_initialization=True,  # on torch's default device
        ),
        "init_method": partial(nn.init.normal_, std=0.1),
        "bias": False,
        "tp_group": parallel_context.tp_group,
    }

    def column(inputs, outputs):
        layer = layers.ColumnParallelLinear(inputs, outputs, **options)
        return MegatronLinear(layer, parallel_context)

    def row(inputs, outputs):
        layer = layers.RowParallelLinear(
            inputs, outputs, input_is_parallel=True, skip_bias_add=False, **options
        )
        return MegatronLinear(layer, parallel_context)

    return Linears(column, row)


def build_with_libraries(config, parallel_context):
    """A builder with PyTorch's layers in attention and Megatron's in the MLP."""
    plain = partial(nn.Linear, bias=False)
    model = MyModel(
        config,
        parallel_context,
        attention=Linears(plain, plain),
        mlp=megatron_linears(parallel_context),
    )
    # The plan turns the weights into DTensors, which say themselves how they are cut.
    plan = {f"blocks.*.{name}": ColwiseParallel() for name in ("q", "k", "v")}
    plan["blocks.*.out"] = RowwiseParallel()
    return parallelize_module(model, parallel_context.device_mesh()["tp"], plan)


# --- the examples


class ParallelMLP(nn.Module):
    """Column-parallel, then row-parallel: one sum over the ranks at the end."""

    def __init__(self, hidden, parallel_context):
        super().__init__()
        shard = {"params_dtype": torch.float64, "parallel_context": parallel_context}
        self.up = ColumnParallelLinear(hidden, 4 * hidden, **shard)
        self.gelu = Gelu()
        self.down = RowParallelLinear(4 * hidden, hidden, **shard)

    def forward(self, x):
        return self.down(self.gelu(self.up(x)))


def compare_with_one_rank(context: ParallelContext) -> tuple[tuple[int, ...], float]:
    """Run by each rank: forward and backward of the shards against the whole.

    Returns:
        Shape of this rank's `up.weight`, and the largest difference of outputs and
        gradients, relative to the largest value of each.
    """
    layers = []
    for each in (context, ParallelContext.single(context.device)):
        torch.manual_seed(0)  # the shards are those of the whole layers
        with context.device:
            layers.append(ParallelMLP(64, each))
    sharded, whole = layers
    x = torch.randn(10, 64, dtype=torch.float64, device=context.device)
    outputs = [layer(x) for layer in layers]
    for output in outputs:
        output.square().sum().backward()
    pairs = [outputs]
    for path in ("up", "down"):
        layer, reference = sharded.get_submodule(path), whole.get_submodule(path)
        for name, sharding in layer.parameter_sharding().items():
            full = reference.get_parameter(name).grad
            expected = local_from_full(full, sharding, context.tp_rank, context.tp_size)
            pairs.append([layer.get_parameter(name).grad, expected])
    differences = [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]
    return tuple(sharded.up.weight.shape), max(differences)


def manual(ranks: TrainerRanks, directory: Path) -> None:
    """Parallel layers by hand."""
    bound = 256 * torch.finfo(torch.float64).eps  # sums of up to 256 terms
    for rank, (shape, difference) in enumerate(ranks.run(compare_with_one_rank)):
        print(f"  rank {rank} holds {list(shape)} of the [256, 64] up projection;")
        print(f"  output and gradients: {difference:.1e} from one rank's")
        if difference > bound:
            raise RuntimeError(f"The difference is above {bound:.1e}.")


def builder(ranks: TrainerRanks, directory: Path) -> None:
    """A builder callback, trained and served."""
    train_and_serve(ranks, MyModelBuilder.build, directory, bitwise=True)


def library(ranks: TrainerRanks, directory: Path) -> None:
    """Other libraries' layers, trained and served."""
    if importlib.util.find_spec("megatron") is None:
        sys.exit(
            "This example needs Megatron-Core: pip install megatron-core==0.16.1. The "
            "others run without it: give their name, manual or builder."
        )
    train_and_serve(ranks, build_with_libraries, directory)


EXAMPLES = {"manual": manual, "builder": builder, "library": library}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("example", nargs="?", choices=EXAMPLES)
    parser.add_argument("--out", type=Path, default=Path("build/parallelism"))
    args = parser.parse_args(arguments)
    with TrainerRanks() as ranks:
        for name in [args.example] if args.example else EXAMPLES:
            print(f"{name}: {EXAMPLES[name].__doc__}", flush=True)
            EXAMPLES[name](ranks, args.out / name)
    print("all checks passed")


if __name__ == "__main__":
    main()
