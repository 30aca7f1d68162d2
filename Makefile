# `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-gpu test-gpus check format reference communication

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/user: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/developer: $(VENV)/user
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/user  ## fetch a model, fine-tune it, export it, ask it (under 5 minutes on 2 cores)
	$(BIN)/python tools/demo.py

test: $(VENV)/developer  ## the test suite (about 30 minutes on 2 cores)
	$(BIN)/shardway fetch smollm2_135m
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/developer  ## every cell of every grid, not the pairs alone (an hour)
	$(BIN)/shardway fetch smollm2_135m
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m ""

test-gpu: $(VENV)/developer  ## the tests on one GPU
	$(BIN)/python -m pytest tests/gpu -n 0 -m "gpu and not multi_gpu"

test-gpus: $(VENV)/developer  ## the tests on two GPUs
	$(BIN)/python -m pytest tests/gpu -n 0 -m multi_gpu

check: $(VENV)/developer  ## lint, formatting, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m launcher.config.reference --check docs/configuration.md

format: $(VENV)/developer  ## fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: $(VENV)/user  ## write docs/configuration.md from the schema
	$(BIN)/python -m launcher.config.reference --write docs/configuration.md

communication: $(VENV)/developer  ## write docs/communication.md from steps on a fake CUDA device (minutes)
	$(BIN)/python -m tests.helpers.fake_cuda.page --write docs/communication.md
