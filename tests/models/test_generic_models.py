# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Generic model definitions from end to end.

Under pytest all of it runs. As a script, `python tests/models/test_generic_models.py`
runs the tests that need no engine.
"""

import inspect
import sys
from pathlib import Path

import torch

from vllm.model_executor.layers.training import VLLMFlashAttention
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
    GenericTransformerForCausalLMVLLM,
)

ARCH = "GenericTransformerForCausalLM"


def small_config() -> GenericTransformerConfig:
    return GenericTransformerConfig(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )


def saved_model(directory: Path) -> GenericTransformerForCausalLM:
    """A model with weights large enough that tokens depend on the prompt."""
    torch.manual_seed(0)
    config = small_config()
    config.initializer_range = 0.2
    model = GenericTransformerForCausalLM(config)
    model.save_pretrained(directory)
    return model


def build(config, parallel_context):
    return GenericTransformerForCausalLM(config, parallel_context)


class TestGenericModelSupport:
    def test_flash_attention_forward(self):
        torch.manual_seed(0)
        attn = VLLMFlashAttention(hidden_size=256, num_heads=4)
        hidden_states = torch.randn(2, 10, 256)
        output = attn(hidden_states)
        assert output.shape == hidden_states.shape

        qkv = attn.qkv_proj(hidden_states)
        q, k, v = (x.view(2, 10, 4, 64).transpose(1, 2) for x in qkv.chunk(3, -1))
        scores = (q @ k.mT / 64**0.5).masked_fill(
            torch.ones(10, 10, dtype=torch.bool).triu(1), float("-inf")
        )
        expected = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 10, 256)
        torch.testing.assert_close(output, attn.o_proj(expected))

    def test_flash_attention_backward(self):
        torch.manual_seed(0)
        attn = VLLMFlashAttention(hidden_size=256, num_heads=4, num_kv_heads=2)
        attn.train()
        hidden_states = torch.randn(2, 10, 256, requires_grad=True)
        attn(hidden_states).square().sum().backward()
        for name, tensor in [("input", hidden_states), *attn.named_parameters()]:
            assert tensor.grad is not None and tensor.grad.abs().sum() > 0, name

    def test_model_forward(self):
        model = GenericTransformerForCausalLM(small_config())
        ids = torch.randint(0, 512, (2, 16))
        logits = model(ids)
        assert logits.shape == (2, 16, 512)
        changed = ids.clone()
        changed[:, 8] = (ids[:, 8] + 1) % 512
        moved = (model(changed) - logits).abs().amax((0, 2))
        assert moved[:8].max() == 0 and moved[8:].min() > 0, "not causal"

    def test_model_training(self):
        torch.manual_seed(0)
        model = GenericTransformerForCausalLM(small_config())
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids = torch.randint(0, 512, (4, 33))
        losses = []
        for _ in range(30):
            logits = model(ids[:, :-1])
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            missing = [n for n, p in model.named_parameters() if p.grad is None]
            assert not missing
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0], losses

    def test_vllm_wrapper(self):
        torch.manual_seed(0)
        config = small_config()
        wrapper = GenericTransformerForCausalLMVLLM(config)
        model = GenericTransformerForCausalLM(config)
        from vllm.model_executor.checkpoint.save import checkpoint_tensors

        loaded = wrapper.load_weights(checkpoint_tensors(model))
        assert loaded == {name for name, _ in wrapper.named_parameters()}

        ids, positions = torch.randint(0, 512, (16,)), torch.arange(16)
        hidden_states = wrapper(input_ids=ids, positions=positions)
        assert hidden_states.shape == (16, config.hidden_size)
        logits = wrapper.compute_logits(hidden_states)
        assert torch.equal(logits, model(ids, positions))
        embeds = wrapper.embed_input_ids(ids)
        assert torch.equal(
            wrapper(None, positions, inputs_embeds=embeds), hidden_states
        )
        assert "prefix" in inspect.signature(type(wrapper)).parameters

    def test_model_registration(self, clean_registry):
        from vllm import ModelRegistry

        for target in (GenericTransformerForCausalLMVLLM, build):
            ModelRegistry.register_model(ARCH, target)
            assert ARCH in ModelRegistry.get_supported_archs()
            info = ModelRegistry._try_inspect_model_cls(ARCH)
            assert info.is_text_generation_model
        assert ModelRegistry._try_load_model_cls(ARCH).spec.target is build

    def test_llm_api_integration(self, make_llm, tmp_path):
        """The same model served both ways, and what the trainer would say."""
        from vllm import ModelRegistry, SamplingParams

        model = saved_model(tmp_path)
        prompts = [[1, 2, 3], list(range(40, 80)), [7]]
        tokens = {}
        for target in (GenericTransformerForCausalLMVLLM, build):
            ModelRegistry.register_model(ARCH, target)
            llm = make_llm(tmp_path)
            outputs = llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts],
                SamplingParams(max_tokens=12, temperature=0, detokenize=False),
                use_tqdm=False,
            )
            tokens[target] = [list(output.outputs[0].token_ids) for output in outputs]
        assert tokens[build] == tokens[GenericTransformerForCausalLMVLLM]
        for prompt, completion in zip(prompts, tokens[build]):
            ids = torch.tensor(prompt + completion)
            greedy = model(ids).argmax(-1)[len(prompt) - 1 : -1]
            assert greedy.tolist() == completion
        assert len({tuple(completion) for completion in tokens[build]}) == 3


def main() -> int:
    suite = TestGenericModelSupport()
    passed = failed = 0
    for name, test in inspect.getmembers(suite, inspect.ismethod):
        if not name.startswith("test_") or inspect.signature(test).parameters:
            continue
        try:
            test()
        except Exception as error:
            failed += 1
            print(f"{name}: FAILED: {type(error).__name__}: {error}")
        else:
            passed += 1
            print(f"{name}: passed")
    print(f"{passed} passed, {failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(main())
