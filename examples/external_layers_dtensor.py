# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Plain `nn.Linear` modules, sharded by PyTorch's `parallelize_module`.

The parameters become DTensors over the context's own group. They say themselves how
they are sharded, so vLLM needs to be told nothing to load and save them.

    python examples/external_layers_dtensor.py
"""

import argparse
from functools import partial
from pathlib import Path

from generic_model_parallelism import MyModel
from torch import nn
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from trainer_and_engine import TrainerRanks, train_and_serve

COLUMNS, ROWS = ("q", "k", "v", "up"), ("out", "down")


def build(config, parallel_context):
    """`MyModel` with `nn.Linear`, which the plan shards."""
    linear = partial(nn.Linear, bias=False)
    model = MyModel(config, parallel_context, column=linear, row=linear)
    plan = {f"blocks.*.{name}": ColwiseParallel() for name in COLUMNS}
    plan |= {f"blocks.*.{name}": RowwiseParallel() for name in ROWS}
    return parallelize_module(model, parallel_context.device_mesh()["tp"], plan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/dtensor"))
    args = parser.parse_args()
    with TrainerRanks() as ranks:
        print("nn.Linear under parallelize_module", flush=True)
        train_and_serve(ranks, build, args.out)
    print("all checks passed")


if __name__ == "__main__":
    main()
