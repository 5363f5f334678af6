# The two commands of a newcomer: make demo, make test. `make help` lists the rest.
.DEFAULT_GOAL := help
PY := .venv/bin/python
SHELL := /bin/sh

.PHONY: help setup demo test slow extras lint format typecheck up down params lock gpu bench bench-gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.locked: requirements.lock scripts/setup.sh
	@sh scripts/setup.sh $(MAKECMDGOALS)

setup: .venv/.locked ## .venv with the exact versions of requirements.lock

demo: setup ## the whole pipeline on the demo preset, in a worktree of its own; then its results applied to this checkout
	@$(PY) -m flows.demo

test: setup ## every test that is neither slow nor needs a GPU
	@$(PY) -m pytest -m "not slow and not gpu" -p no:cacheprovider -n 2 --dist loadfile

slow: setup ## the slow tests, two files at once: the flow and its page, kill -9 of every training stage, the whole pipeline in a clone
	@$(PY) -m pytest -m "slow and not gpu" -p no:cacheprovider -n 2 --dist loadfile

extras: setup ## what needs packages beside the lock: LoRAs made with PEFT, spaCy's phrases, moments of a byte; in an environment of their own
	@sh scripts/extras.sh

lint: setup ## ruff, mypy, import-linter
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports

format: setup ## ruff's fixes and formatting
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

up: setup ## start Prefect, MLflow, Ray and the served deployment on loopback; prints their addresses
	@$(PY) -m flows.services up

down: setup ## end all that `make up` started, and every run
	@$(PY) -m flows.services down

params: setup ## compose params/ into params.yaml (ARGS="experiment=scenes moe.top_k=4")
	@$(PY) -m tasks.params $(ARGS)

lock: ## resolve the ranges of pyproject.toml anew into requirements.lock
	@sh scripts/lock.sh

gpu: setup ## MegaBlocks and its companions, without dependencies, on a CUDA machine
	@sh scripts/gpu.sh

bench: setup ## speed of the MoE layer, of whole models and of a KD step on a CPU, beside peers; ten minutes, with nothing beside it
	@$(PY) -m benchmarks.speed

bench-gpu: ## the same at FLUX.1's full size, and five steps of each stage, on one GPU of 141 GB; needs torch, diffusers, transformers and safetensors alone
	@if [ -x $(PY) ]; then python=$(PY); else python=python3; fi; $$python -m benchmarks.speed --device cuda && $$python -m benchmarks.gpu_full_size

clean: ## remove the caches of the tools; results, databases, settings and the environment stay
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	@find . -path ./.venv -prune -o -path ./.dvc -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
