# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`vllm serve` with a lazily registered builder on two data-parallel ranks."""

import json
import os
import socket
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.forks import Python
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)

BUILDER = (
    "vllm.model_executor.models.generic_transformer:GenericTransformerForCausalLM.build"
)
WORDS = ["[END]", "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


@pytest.fixture
def model(tmp_path):
    """A model directory with a tokenizer of ten words."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[END]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[END]")
    fast.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = GenericTransformerConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = GenericTransformerForCausalLM(config)
    model.save_pretrained(tmp_path)
    return model


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ask(url: str, body: dict | None = None, rank: int = 0) -> dict | None:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "X-data-parallel-rank": str(rank)}
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        text = response.read()
        return json.loads(text) if text else None


@pytest.fixture
def server(model, tmp_path):
    """The address of a running server."""
    port = free_port()
    arguments = [
        Path(sys.executable).with_name("vllm"),
        *("serve", tmp_path, "--host", "127.0.0.1", "--port", port),
        *("--served-model-name", "generic", "--dtype", "float32"),
        *("--max-model-len", "64", "--enforce-eager", "--data-parallel-size", "2"),
        *("--model-class-overrides", json.dumps({model.__class__.__name__: BUILDER})),
    ]
    log = tmp_path / "server.log"
    environment = os.environ | {"NO_COLOR": "1", "TORCH_COMPILE_DISABLE": "1"}
    process = Python(arguments, log, log, environment)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                ask(f"{address}/health")
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise AssertionError(f"no answer in 120 s:\n{log.read_text()[-4000:]}")
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_completions(server, model):
    ids = [WORDS.index(word) for word in ["the", "quick", "brown"]]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor(ids))[-1].argmax()))
    expected = [WORDS[index] for index in ids[3:] if index != 0]
    body = {
        "model": "generic",
        "prompt": "the quick brown",
        "max_tokens": 6,
        "temperature": 0,
        "ignore_eos": True,
    }
    for rank in range(2):
        answer = ask(f"{server}/v1/completions", body, rank)
        assert answer["choices"][0]["text"].split() == expected
        assert answer["usage"]["completion_tokens"] == 6
