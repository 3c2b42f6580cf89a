# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Registrations: what the registry accepts, and how they travel to other processes."""

import copy
import json
import pickle
import threading
from types import SimpleNamespace

import cloudpickle
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.forks import run_python
from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.builder import config, registration
from vllm.model_executor.models.builder.registration import (
    SerializedRegistration,
    serialize,
    synchronize,
)

pytestmark = pytest.mark.usefixtures("clean_registry")


def fake_config(arch: str, registered: dict | None = None):
    return SimpleNamespace(
        architectures=[arch],
        registered_models=registered or {},
        hf_config=None,
        dtype="float32",
    )


def build(config, parallel_context):
    return nn.Linear(2, 2)


def needs_a_tokenizer(config, *, tokenizer):
    return nn.Linear(2, 2)


A_NUMBER = 3


class Model(nn.Module):
    pass


class Outer:
    class Inner(nn.Module):
        pass

    @staticmethod
    def build(config, parallel_context):
        return nn.Linear(2, 2)


def test_a_builder_resolves_to_a_model_class():
    ModelRegistry.register_model("A", build)
    cls = ModelRegistry._try_load_model_cls("A")
    info = ModelRegistry._try_inspect_model_cls("A")
    assert issubclass(cls, nn.Module) and cls.__name__ == "build"
    assert info.is_text_generation_model and not info.is_pooling_model


@pytest.mark.parametrize("qualname", ["build", "Outer.build", "Outer.Inner", "Model"])
def test_lazy_targets(qualname):
    ModelRegistry.register_model("A", f"{__name__}:{qualname}")
    cls = ModelRegistry._try_load_model_cls("A")
    assert issubclass(cls, nn.Module)
    if qualname in ("Model", "Outer.Inner"):
        assert cls.__name__ == qualname.rpartition(".")[2]


def test_a_staticmethod_object_is_a_builder():
    ModelRegistry.register_model("A", Outer.__dict__["build"])
    assert ModelRegistry._try_load_model_cls("A").spec.target is Outer.build


def test_refused_targets():
    with pytest.raises(TypeError, match="'tokenizer'"):
        ModelRegistry.register_model("A", lambda config, *, tokenizer: None)
    with pytest.raises(TypeError, match="instance of Linear.*register the class"):
        ModelRegistry.register_model("A", nn.Linear(2, 2))
    with pytest.raises(TypeError, match="should be a string or PyTorch model class"):
        ModelRegistry.register_model("A", Outer)
    with pytest.raises(TypeError, match="should be a string or PyTorch model class"):
        ModelRegistry.register_model("A", 3)
    assert "A" not in ModelRegistry.models


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module_xyz:build", "ModuleNotFoundError: No module named"),
        (f"{__name__}:no_such_name", "AttributeError: .*no_such_name"),
        (f"{__name__}:needs_a_tokenizer", "TypeError: .*'tokenizer'"),
        (f"{__name__}:A_NUMBER", "TypeError: .*A_NUMBER' is a int"),
    ],
)
def test_a_lazy_string_that_does_not_load(target, reason):
    ModelRegistry.register_model("A", target)
    with pytest.raises(ValueError, match=rf"'A' is registered as '{target}'.*{reason}"):
        ModelRegistry._raise_for_unsupported(["A"])


@pytest.mark.parametrize("target", [build, Model, f"{__name__}:build", Outer.build])
def test_a_registration_travels_inside_the_config(target):
    ModelRegistry.register_model("A", target)
    config = fake_config("A")
    synchronize(config)
    travelled = pickle.loads(pickle.dumps(config.registered_models))

    registration._targets.clear()
    del ModelRegistry.models["A"]
    synchronize(fake_config("A", travelled))
    assert ModelRegistry._try_load_model_cls("A") is not None


def test_a_closure_travels_by_value_to_another_process(tmp_path):
    captured = {"layers": 3}

    def make():
        def closure(config):
            return captured["layers"]

        return closure

    travelling = SerializedRegistration("A", make())
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(travelling))
    (tmp_path / "code.py").write_text(
        "import pickle, sys\n"
        "registration = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert registration._target is None, 'loaded before it is needed'\n"
        "print(registration.target(None), registration.uuid())\n"
    )
    run = run_python([tmp_path / "code.py", tmp_path / "config.pkl"], timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["3", travelling.uuid()]


def served_dtype(directory, monkeypatch, fields, stored, asked="auto"):
    """The engine's dtype for a checkpoint, and what is warned of."""
    warned = set()
    say = warned.add
    monkeypatch.setattr(
        config.logger, "warning_once", lambda text, *values: say(text % values)
    )
    (directory / "config.json").write_text(
        json.dumps({"architectures": ["A"]} | fields)
    )
    save_file({"x": torch.zeros(2, dtype=stored)}, directory / "model.safetensors")
    args = EngineArgs(model=str(directory), dtype=asked, skip_tokenizer_init=True)
    return args.create_model_config().dtype, [*warned]


SIZES = dict.fromkeys(config.REQUIRED, 2)


@pytest.mark.parametrize(
    ("fields", "stored", "served"),
    [
        ({}, torch.float32, torch.float32),
        ({}, torch.float64, torch.float32),
        ({}, torch.bfloat16, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32, torch.float32),
        ({"dtype": "bfloat16"}, torch.float32, torch.bfloat16),
    ],
)
def test_a_model_is_served_in_its_checkpoints_dtype(
    tmp_path, monkeypatch, fields, stored, served
):
    ModelRegistry.register_model("A", build)
    outcome = served_dtype(tmp_path, monkeypatch, SIZES | fields, stored)
    assert outcome == (served, [])


def test_weights_of_a_known_model_type_are_rounded_with_a_warning(
    tmp_path, monkeypatch
):
    fields = SIZES | {"model_type": "llama"}
    ModelRegistry.register_model("A", build)
    dtype, (warning,) = served_dtype(tmp_path, monkeypatch, fields, torch.float32)
    assert (
        f"in torch.float32, and dtype='auto' rounds its weights to {dtype}" in warning
    )
    assert dtype != torch.float32 and "Pass dtype='float32'" in warning
    for asked in ("float32", "bfloat16"):
        outcome = served_dtype(tmp_path, monkeypatch, fields, torch.float32, asked)
        assert outcome == (getattr(torch, asked), [])


def test_what_a_process_registered_itself_stays():
    def other(config):
        return nn.Linear(3, 3)

    carried = {"A": SerializedRegistration("A", other)}
    ModelRegistry.register_model("A", build)
    synchronize(fake_config("A", carried))
    assert ModelRegistry.models["A"].load_model_cls().spec.target is build


def test_what_arrived_from_another_process_replaces_a_plugins():
    carried = pickle.loads(pickle.dumps({"A": SerializedRegistration("A", build)}))
    ModelRegistry.register_model("A", Model)  # as a plugin does in every process
    config = fake_config("A", carried)
    synchronize(config)
    entry = ModelRegistry.models["A"]
    assert entry.load_model_cls().spec.name.endswith(".build")
    synchronize(config)
    assert ModelRegistry.models["A"] is entry


def test_a_refused_registration_leaves_the_one_before():
    ModelRegistry.register_model("A", build)
    with pytest.raises(ValueError):
        ModelRegistry.register_model("A", "nocolon")
    assert registration._targets["A"] is build


def test_a_class_that_cannot_be_pickled_stays_in_its_process():
    class Captures(nn.Module):
        lock = threading.Lock()

    ModelRegistry.register_model("A", Captures)
    config = fake_config("A")
    synchronize(config)
    assert config.registered_models == {}


def test_nothing_is_pickled_while_the_engine_stays_in_the_process():
    lock = threading.Lock()

    def closure(config):
        return lock

    ModelRegistry.register_model("A", closure)
    config = fake_config("A")
    synchronize(config)
    assert copy.deepcopy(config.registered_models)["A"].target is closure
    assert config.registered_models["A"].uuid()


def test_what_cannot_be_pickled_is_named():
    lock = threading.Lock()

    def closure(config):
        return lock

    with pytest.raises(TypeError, match=r"'A'.*closure.*captures 'lock' \(lock\)"):
        serialize("A", closure)
    with pytest.raises(TypeError, match="captures 'lock'"):
        cloudpickle.dumps({"A": SerializedRegistration("A", closure)})


def test_the_hash_follows_what_is_captured():
    def make(size):
        def closure(config):
            return size

        return closure

    first, same, other = (SerializedRegistration("A", make(n)) for n in (1, 1, 2))
    assert first.uuid() == same.uuid() != other.uuid()
