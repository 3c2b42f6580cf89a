# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How a model's parameters map to the tensors of a checkpoint and to shards.

A parameter is described from three sides:

- By its layer: a `ParameterSharding` has the full shape, the sharded dimension and the
  `Part`s (`specification.py`). A *part* is one of the tensors that a parameter is
  fused from, such as q, k and v.
- In a checkpoint: a `CheckpointTensor` is a whole tensor under its name. It holds one
  part or all parts of a parameter. A `CheckpointLayout` lists those of a module
  (`layout.py`).
- On this rank: a `LocalParameter` has the `TensorShard`s that are in this rank's
  memory (`shards.py`). A *shard* is what one rank holds of one checkpoint tensor: a
  box, with an offset and a size in each dimension.

`load.py` and `save.py` read and write model directories; `files.py` replaces their
files as one step. `gather.py` makes whole tensors of shards. `reshard.py` writes and
reads shards through torch's distributed checkpoints, where a `Piece` is a shard with
its memory.
"""
