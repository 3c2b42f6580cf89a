# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Trainers of TP x DP on several ranks, and their checkpoints under other shardings.

Run by `test_distributed.py`:
`torchrun --nproc-per-node 4 -m pytest distributed_checks.py`. On two ranks the
data-parallel groups beside two tensor-parallel ranks have one rank each.
"""

import math
import os
import weakref
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tests.training.distributed_model import (
    Trainable,
    assert_padding_is_zero,
    gradients,
    moments,
    optimizer_of,
    parallelized,
    train,
    weights,
)
from vllm import training
from vllm.model_executor.checkpoint import files as files_module
from vllm.model_executor.checkpoint.gather import Gatherer
from vllm.model_executor.checkpoint.reshard import stored_tensors
from vllm.model_executor.checkpoint.save import checkpoint_tensors
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerForCausalLM,
)
from vllm.model_executor.parallel_context import ParallelContext

FOLDER = Path(os.environ["CHECKS_FOLDER"])
TIMEOUT = timedelta(seconds=90)
WORLD = int(os.environ["WORLD_SIZE"])
needs_four = pytest.mark.skipif(WORLD < 4, reason="needs four ranks")
# Of results that are views, whose changes in place FSDP2 would not notice.
pytestmark = pytest.mark.filterwarnings("error:FSDP2-wrapped module")


@pytest.fixture(scope="session")
def groups(request):
    """Makes groups of a tensor-parallel size, unless they are there already.

    After a failure they are left as they are: the other ranks do not get here, and
    torchrun ends them when this one has ended.
    """

    def make(tp_size):
        initialized = dist.is_initialized()
        if initialized and ParallelContext.current().tp_size != tp_size:
            training.destroy_parallel()
        return training.initialize_parallel(tp_size, timeout=TIMEOUT)

    yield make
    if not request.session.testsfailed:
        training.destroy_parallel()


def reference(steps, dtype, tied=False):
    """Gradients of the last step and the weights, of one process."""
    context = ParallelContext.single()
    model = Trainable(context, tied, dtype)
    optimizer = optimizer_of(model)
    train(model, optimizer, steps, context)
    shardings = training.sharding(model).values()
    parameters = dict(model.named_parameters())
    tensors = dict(checkpoint_tensors(model))
    grads = {
        shard.tensor: shard.local(parameters[parameter.name].grad)
        for parameter in shardings
        for shard in parameter.shards
    }
    return grads, tensors


def assert_as_accurate(actual, plain, exact):
    """The errors are at most twice those of one process in the same dtype.

    Both are judged by their root mean square; the rounding of the result itself is
    allowed on top. See the layers' tests.
    """
    assert actual.keys() == plain.keys() == exact.keys()

    def rms(tensor):
        return tensor.double().square().mean().sqrt()

    for name, value in actual.items():
        eps = torch.finfo(value.dtype).eps
        bound = 2 * rms(plain[name] - exact[name]) + eps * rms(exact[name])
        assert rms(value.double() - exact[name]) <= bound, name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_training_is_that_of_one_process(groups, kind, tied):
    steps = range(3)
    plain = reference(steps, torch.float32, tied)
    exact = reference(steps, torch.float64, tied)
    context = groups(2)
    assert (context.tp_size, context.dp_size) == (2, WORLD // 2)
    model, optimizer = parallelized(context, kind, tied)
    train(model, optimizer, steps, context)
    assert_as_accurate(gradients(model), plain[0], exact[0])
    assert_as_accurate(weights(model), plain[1], exact[1])


@pytest.mark.parametrize("tp_size, kind", [(WORLD, "plain"), (2, "ddp"), (2, "fsdp")])
def test_clipping_by_the_norm_of_all(groups, tp_size, kind):
    """Heads and rows that several ranks hold count once."""
    context = groups(tp_size)
    model, optimizer = parallelized(context, kind)
    train(model, optimizer, range(1), context)
    before = gradients(model)
    expected = torch.stack([g.double().norm() for g in before.values()]).norm()
    norm = training.clip_grad_norm_(model, math.inf, context)
    assert abs(norm - expected) <= 1e-6 * expected
    assert_same(gradients(model), before)
    training.clip_grad_norm_(model, 0.5 * float(norm), context)
    for name, gradient in gradients(model).items():
        half = before[name] / 2
        # The factor has torch's 1e-6 below the line, and is rounded.
        torch.testing.assert_close(gradient, half, rtol=1e-5, atol=0, msg=name)
    with pytest.raises(ValueError, match="max_norm=0 must be"):
        training.clip_grad_norm_(model, 0, context)
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="No parameter has a gradient"):
        training.clip_grad_norm_(model, 1.0, context)


def norm_of_gradients(model):
    return torch.stack([p.grad.double().norm() for p in model.parameters()]).norm()


@needs_four
def test_dtensors_under_fsdp(groups):
    """A dim that both cut, and a parameter with fewer rows than ranks."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 1)).to(context.device)

    context = groups(2)
    mesh, single, model = context.device_mesh(), make(), make()
    columns = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh["tp"], {"0": columns})
    fully_shard(model, mesh=mesh["dp"])
    held = training.sharding(model)
    assert held["0.weight"].dims == {"dp": 0, "tp": 0}
    assert held["1.weight"].dims == {"dp": 0}
    x = torch.randn(6, 8, device=context.device)
    for each in (single, model):
        each(x).square().mean().backward()
    norm = training.clip_grad_norm_(model, math.inf, context)
    assert abs(norm - norm_of_gradients(single)) <= 1e-6 * norm
    tensors = dict(checkpoint_tensors(model))
    assert_same(tensors, dict(single.named_parameters()))


def test_gradients_that_are_summands(groups):
    """Of a norm over slices of the sequence, in DTensor's way."""
    context = groups(WORLD)
    single = nn.LayerNorm(8, device=context.device)
    model = nn.Sequential(nn.LayerNorm(8, device=context.device))
    plan = {"0": SequenceParallel(sequence_dim=0, use_local_output=True)}
    parallelize_module(model, context.device_mesh()["tp"], plan)
    torch.manual_seed(0)
    x, weights = torch.randn(2, 12, 8, device=context.device)
    (single(x) * weights).sum().backward()
    rank = context.tp_rank
    (model(x.chunk(WORLD)[rank]) * weights.chunk(WORLD)[rank]).sum().backward()
    norm = training.clip_grad_norm_(model, math.inf, context)
    assert abs(norm - norm_of_gradients(single)) <= 1e-6 * norm


STEPS, NEXT = range(3), range(3, 5)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def test_state_resumes_under_any_sharding(groups):
    """The bits of weights and moments, and training that goes on."""
    plain = reference([*STEPS, *NEXT], torch.float32)
    exact = reference([*STEPS, *NEXT], torch.float64)
    context = groups(2)
    model, optimizer = parallelized(context, "fsdp")
    train(model, optimizer, STEPS, context)
    saved = weights(model) | moments(model, optimizer)
    directory = FOLDER / "state"
    training.save_state(model, optimizer, directory)
    assert {path.name for path in FOLDER.iterdir()} >= {"state"}
    assert not (FOLDER / ".state.unfinished").exists()
    if dist.get_rank() == 0:
        torch.save(saved, FOLDER / "saved.pt")

    for tp_size, kind in ((WORLD, "plain"), (2, "ddp"), (1, "fsdp"), (2, "fsdp")):
        context = groups(tp_size)
        model, optimizer = parallelized(context, kind)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        optimizer.param_groups[0]["lr"] = 1.0
        training.load_state(model, optimizer, directory)
        assert optimizer.param_groups[0]["lr"] == 0.01
        padding = assert_padding_is_zero(model)
        # Three rows in the embedding and in the head, on the last tensor-parallel rank.
        if kind != "fsdp":
            assert padding == (6 if context.tp_rank == tp_size - 1 else 0)
        assert_same(weights(model) | moments(model, optimizer), saved)
        train(model, optimizer, NEXT, context)
        assert_as_accurate(weights(model), plain[1], exact[1])
        assert_as_accurate(gradients(model), plain[0], exact[0])


def test_state_written_with_tensor_parallelism_alone(groups):
    """Each piece is in the checkpoint once, whoever holds it."""
    context = groups(WORLD)
    model, optimizer = parallelized(context, "plain")
    train(model, optimizer, STEPS, context)
    saved = weights(model) | moments(model, optimizer)
    training.save_state(model, optimizer, FOLDER / "tp")
    chunks = [c for t in stored_tensors(FOLDER / "tp").values() for c in t.chunks]
    written = sum(math.prod(chunk.sizes) for chunk in chunks)
    assert written == sum(t.numel() for name, t in saved.items() if name != "step")
    context = groups(2)
    model, optimizer = parallelized(context, "fsdp")
    training.load_state(model, optimizer, FOLDER / "tp")
    assert_same(weights(model) | moments(model, optimizer), saved)


def test_state_that_does_not_fit(groups):
    context = groups(2)
    directory = FOLDER / "state"
    model, optimizer = parallelized(context, "fsdp")
    before = weights(model)
    with raises_everywhere("state exists. Give each save a directory of its own"):
        training.save_state(model, optimizer, directory)
    stranger = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    given = stranger if dist.get_rank() == WORLD - 1 else optimizer
    with raises_everywhere("1 of the optimizer's 1 parameters are not the model's"):
        training.save_state(model, given, FOLDER / "strange")
    with raises_everywhere("1 of the optimizer's 1 parameters are not the model's"):
        training.load_state(model, given, directory)
    assert not (FOLDER / "strange").exists()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with raises_everywhere("has the state of AdamW, and the optimizer is SGD"):
        training.load_state(model, sgd, directory)
    with raises_everywhere("does not exist. A save that was"):
        training.load_state(model, optimizer, FOLDER / "nowhere")
    tied = parallelized(context, "ddp", tied=True)
    with raises_everywhere(
        "Tied in the model and saved apart.*: model.lm.lm_head.weight and model.lm.mo"
    ):
        training.load_state(*tied, directory)
    half = Trainable(context).bfloat16()
    with raises_everywhere(r"Wrong dtype .*norm.weight is torch.float32, the model n"):
        training.load_state(half, optimizer_of(half), directory)
    assert_same(weights(model), before)


@contextmanager
def raises_everywhere(message):
    """The error is raised by every rank, also where nothing is wrong."""
    with pytest.raises((ValueError, OSError, RuntimeError), match=message):
        yield
    dist.barrier()


@pytest.fixture
def gathered_bytes(monkeypatch):
    """The most bytes of gathered tensors that this rank has held at a time."""
    live, most, gather = {}, [0], Gatherer.gather

    def counted(self, name):
        tensor = gather(self, name)
        if tensor._is_view():  # of the model's own memory
            return tensor
        live[name] = tensor.nbytes
        weakref.finalize(tensor, live.pop, name)
        most[0] = max(most[0], sum(live.values()))
        return tensor

    monkeypatch.setattr(Gatherer, "gather", counted)
    return most


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp_size", "kind"), [(2, "fsdp"), (WORLD, "plain")])
def test_save_pretrained_is_that_of_one_process(
    groups, tp_size, kind, tied, gathered_bytes
):
    """The bits, whatever the sharding; one file or several, in bounded memory."""
    context = groups(tp_size)
    model, optimizer = parallelized(context, kind, tied)
    train(model, optimizer, range(1), context)
    whole = weights(model)
    one, several = (FOLDER / f"{files}-{kind}-{tied}" for files in ("one", "several"))
    model.lm.save_pretrained(one)
    everything, gathered_bytes[0] = gathered_bytes[0], 0
    training.save_checkpoint(model.lm, several, max_shard_size=20_000)
    largest = max(tensor.nbytes for tensor in whole.values())
    # From a GPU rank 0 copies each tensor to the host; a file's size is below.
    if context.rank == 0 and context.device.type == "cpu":
        assert 20_000 < gathered_bytes[0] + largest <= 20_000 + 2 * largest < everything
    else:
        assert everything <= largest and gathered_bytes[0] <= largest

    # What one process would save of the same weights.
    single = ParallelContext.single()
    alone = GenericTransformerForCausalLM.from_pretrained(one, single)
    expected = dict(checkpoint_tensors(alone))
    assert_same({f"lm.{name}": t for name, t in expected.items()}, whole)
    files = files_module.checkpoint_files(several)
    assert len(files) > 3
    found = {}
    for file in files:
        tensors = load_file(file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 20_000 or len(tensors) == 1
        found |= tensors
    assert_same(found, expected)
    assert_same(load_file(one / "model.safetensors"), expected)

    # Every rank takes its shard again.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    training.load_checkpoint(model.lm, several)
    assert_padding_is_zero(model)
    assert_same(weights(model), whole)


def test_a_failed_save_is_reported_everywhere(groups):
    context = groups(2)
    model, _ = parallelized(context, "ddp")
    file = FOLDER / "file"
    file.touch()
    with raises_everywhere("FileExistsError|File exists"):
        training.save_checkpoint(model, file)
    if context.rank == 0:
        files_module.save_file = broken_save
    with raises_everywhere("No space left"):
        training.save_checkpoint(model, FOLDER / "full")
    files_module.save_file = save_file
    assert not list((FOLDER / "full").iterdir())


def broken_save(tensors, path, metadata):
    path.write_bytes(b"half a file")
    raise OSError("No space left on device")


@needs_four
def test_what_each_rank_holds(groups):
    context = groups(4)
    model, _ = parallelized(context, "fsdp")
    sharding = training.sharding(model)
    rank = context.tp_rank
    qkv = sharding["lm.model.layers.1.self_attn.qkv_proj.weight"]
    assert (qkv.shape, qkv.local_shape) == ((64, 32), (24, 32))
    q, k, v = qkv.shards
    prefix = "lm.model.layers.1.self_attn."
    assert [s.tensor for s in qkv.shards] == [f"{prefix}{n}_proj.weight" for n in "qkv"]
    assert [s.part for s in qkv.shards] == ["q", "k", "v"]
    assert [s.part_start for s in qkv.shards] == [0, 32, 48]
    assert q.offsets == q.parameter_offsets == (8 * rank, 0)
    # Two ranks hold each KV head.
    assert k.offsets == v.offsets == (rank // 2 * 8, 0)
    assert v.parameter_offsets == (48 + rank // 2 * 8, 0)
    assert [s.local_offsets for s in qkv.shards] == [(0, 0), (8, 0), (16, 0)]
    assert [s.replicas for s in qkv.shards] == [1, 2, 2]
    (rows,) = sharding["lm.lm_head.weight"].shards
    assert (rows.shape, rows.padding) == ((61, 32), 3 if rank == 3 else 0)
    assert (rows.offsets, rows.sizes) == ((16 * rank, 0), (13 if rank == 3 else 16, 32))
    assert sharding["lm.model.layers.0.mlp.down_proj.weight"].dims["tp"] == 1
    assert "tp" not in sharding["lm.model.norm.weight"].dims


@needs_four
def test_what_each_rank_holds_under_fsdp2(groups):
    context = groups(2)
    model, _ = parallelized(context, "fsdp")
    tp, dp = context.tp_rank, context.dp_rank
    down = training.sharding(model)["lm.model.layers.0.mlp.down_proj.weight"]
    assert down.dims == {"tp": 1, "dp": 0}
    (shard,) = down.shards
    assert (down.shape, down.local_shape) == ((32, 128), (16, 64))
    assert (shard.offsets, shard.sizes) == ((16 * dp, 64 * tp), (16, 64))
    # Of the parts of a fused parameter a rank holds those in its rows.
    up = training.sharding(model)["lm.model.layers.0.mlp.gate_up_proj.weight"]
    assert up.dims == {"tp": 0, "dp": 0}
    (shard,) = up.shards
    assert shard.tensor.endswith(("gate_proj.weight", "up_proj.weight")[dp])
    assert (shard.offsets, shard.local_offsets) == ((64 * tp, 0), (0, 0))
    assert shard.parameter_offsets == (128 * dp + 64 * tp, 0)
    qkv = training.sharding(model)["lm.model.layers.0.self_attn.qkv_proj.weight"]
    parts = [(s.part, s.offsets[0], s.sizes[0], s.local_offsets[0]) for s in qkv.shards]
    first, second = [("q", 16 * tp, 16, 0)], [("k", 8 * tp, 8, 0), ("v", 8 * tp, 8, 8)]
    assert parts == (second if dp else first)
