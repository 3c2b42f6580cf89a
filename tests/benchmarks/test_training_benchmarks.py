# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The benchmarks compare like with like, and report what they measured."""

import attention
import fused_ops
import logprobs
import measure
import run
import tables
import torch
import training_step

CPU = torch.device("cpu")


def as_tuple(output):
    return output if isinstance(output, tuple) else (output,)


def test_fused_ops_and_peers_compute_the_same():
    cases = list(fused_ops._cases(CPU, torch.float32, 32, 256))
    assert len(cases) == 6
    for case in cases:
        ours, eager = as_tuple(case.ours(*case.inputs)), case.eager(*case.inputs)
        for a, b in zip(ours, as_tuple(eager), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_attention_and_its_peer_compute_the_same():
    layer = attention.TrainableAttention(4, 32, num_kv_heads=2)
    inputs = attention._inputs(CPU, torch.float32, (2, 17), 4, 2, 32)
    peer = attention._sdpa(*[attention._turned(tensor) for tensor in inputs])
    torch.testing.assert_close(layer(*inputs), peer.transpose(1, 2))


def test_the_models_have_the_same_size():
    config = training_step.GenericTransformerConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    ours = training_step.GenericTransformerForCausalLM(config)
    peer = training_step.TorchModel(config)
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, peer)]
    assert counts[0] == counts[1]


def test_logprobs_are_measured():
    (result,) = logprobs._case(CPU, torch.float32, 8, 32, 16)
    assert result.ours > 0 and result.peers["logits and cross_entropy"] > 0


def test_medians_take_turns():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measure.medians(variants, CPU, seconds=0.0, least=3)
    assert calls == ["a", "b"] * 5
    assert times.keys() == variants.keys()


def test_the_report_says_what_was_missed():
    result = measure.Result("g", "c", "ms", 2.0, {"x": 3.0, "y": 1.0}, {"y": 0.9})
    assert result.ratios == {"x": 1.5, "y": 0.5}
    assert "0.50× y (target 0.90, missed)" in run._line(result)
    text = tables.table([result.as_dict()])
    assert (
        "| c | 2 ms | x: 3 ms | 1.5 |  |\n|  |  | y: 1 ms | 0.5 | 0.90 missed |" in text
    )
