# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Make the stack for vLLM, build its kernels with vLLM's own build, and test it.

For each release: `overlay.py upstream`; then setup.py and CMakeLists.txt of the tree
compile the extension of the training layers, and nothing else, since the rest of vLLM
needs sources from elsewhere. Tests run in the tree, with the kernels that were built.
In the release that is installed they have its compiled parts, and the new modules of
every commit are imported; in another one they do without.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS))

from vllm_overlay import upstream  # noqa: E402
from vllm_overlay.base import load_base  # noqa: E402
from vllm_overlay.common import CHECKOUT, OverlayError, git  # noqa: E402

LAYERS = "tests/model_executor/layers/training"
KERNEL_TESTS = [
    f"{LAYERS}/test_{name}.py"
    for name in ("activation", "attention_cpu_kernels", "cpu_vector", "norm", "rotary")
]
# In another release than the installed one: what does without its compiled parts.
PYTHON_TESTS = [
    *KERNEL_TESTS,
    f"{LAYERS}/test_attention.py",
    f"{LAYERS}/test_linear_and_embedding.py",
    f"{LAYERS}/test_logprobs.py",
    "tests/models/builder/test_agreement.py",
    "tests/models/builder/test_binding.py",
    "tests/models/builder/test_registration.py",
    "tests/models/builder/test_spec.py",
    "tests/models/test_generic_transformer.py",
]
# setup.py of vLLM, for one device and without what is not ours.
SETUP = """
import runpy, setuptools, sys, torch
torch.version.cuda = {cuda!r}
real, name = setuptools.setup, "vllm._training_C"
def setup(**options):
    ours = [module for module in options["ext_modules"] if module.name == name]
    assert len(ours) == 1, f"setup.py for {device} does not build {{name}}"
    if {build}:
        real(**options | {{"ext_modules": ours, "rust_extensions": []}})
setuptools.setup = setup
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
IMPORT = "import importlib, sys; [importlib.import_module(m) for m in sys.argv[1:]]"


def run(command: list[str], tree: Path, environment: dict[str, str]) -> None:
    """Run a Python of this environment in a tree.

    Raises:
        OverlayError: It failed; has the end of what it wrote.
    """
    path = [Path(sys.executable).parent, os.environ["PATH"]]
    environment = os.environ | environment | {"PATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *command]
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise OverlayError(
            f"`{' '.join(command)[:200]}` failed in {tree}:\n"
            f"{done.stdout[-6000:]}{done.stderr[-6000:]}"
        )
    print(done.stdout.strip().rpartition("\n")[2], flush=True)


def build(tree: Path, version: str) -> None:
    """Compile the extension in the tree, as `pip install -e .` does it.

    CMake stops after the parts that all devices share, ours among them: what follows
    needs other sources, and for CUDA a compiler.
    """
    shared = {
        "CMAKE_ARGS": "-DVLLM_TARGET_DEVICE=empty",
        "VLLM_VERSION_OVERRIDE": version,
        "VLLM_RS_BUILD_VERSION": version,
    }
    for device, cuda in (("cuda", "13.0"), ("cpu", None)):
        script = SETUP.format(device=device, cuda=cuda, build=device == "cpu")
        run(["-c", script], tree, shared | {"VLLM_TARGET_DEVICE": device})
    library = tree / "vllm" / "_training_C.abi3.so"
    if not library.is_file():
        raise OverlayError(f"vLLM's build has not made {library}")


def test(tree: Path, tests: list[str]) -> None:
    """Run tests in the tree, each file without vLLM's own conftest.py."""
    settings = {
        "PYTHONPATH": str(tree),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    for folder in sorted({str(Path(test).parent) for test in tests}):
        files = [test for test in tests if str(Path(test).parent) == folder]
        cut = f"--confcutdir={'tests/models' if 'models' in folder else folder}"
        run(["-m", "pytest", *options, cut, *files], tree, settings)


def import_each_commit(tree: Path) -> None:
    """Check out each commit and import the modules that it adds."""
    span = f"{upstream.PRISTINE}..{upstream.BRANCH}"
    added = ("show", "--name-only", "--diff-filter=A", "--format=")
    for commit in git(tree, "rev-list", "--reverse", span).split():
        git(tree, "checkout", "--quiet", commit)
        paths = git(tree, *added, commit, "--", "vllm").split()
        modules = [
            path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for path in paths
            if path.endswith(".py") and not path.endswith("__main__.py")
        ]
        print(f"{commit[:12]}: {len(modules)} modules", flush=True)
        run(["-c", IMPORT, "vllm.config", *modules], tree, {"PYTHONPATH": str(tree)})
    git(tree, "checkout", "--quiet", upstream.BRANCH)


def main(out: Path, versions: list[str]) -> int:
    """Check the stack of each release.

    Args:
        out: The folder to make.
        versions: The releases; the first is the one that is installed.
    """
    shutil.rmtree(out, ignore_errors=True)
    site = Path(sysconfig.get_path("purelib"))
    for version in versions:
        print(upstream.export("sdist", out / version, CHECKOUT, version), flush=True)
        tree = out / version / "vllm"
        build(tree, version)
        # It names no device, unlike that of the installed vLLM; the platform needs it.
        shutil.rmtree(tree / "vllm.egg-info")
        if version != load_base("source").version:
            test(tree, PYTHON_TESTS)
            continue
        for library in site.glob("vllm/*.so"):
            if not (tree / "vllm" / library.name).exists():
                (tree / "vllm" / library.name).symlink_to(library)
        test(tree, KERNEL_TESTS)
        import_each_commit(tree)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(CHECKOUT / "build" / "stack", ["0.32.0", "0.33.0"]))
    except OverlayError as error:
        sys.exit(f"error: {error}")
