# Every command a user or developer needs. `make serve` and `make test` set up all they use, once.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
MODEL ?=
PORT ?=
ARGS ?=
SEED ?=
SEEDS ?= 0-500

# What is installed depends on these files' contents: an unchanged tree never runs pip.
INSTALL_KEY := $(shell cat pyproject.toml constraints.txt setup.py src/weft/kernels/cpu/*.cpp src/weft/kernels/cpu/*.h \
	src/weft/kernels/cpu/*.inl 2>/dev/null | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/.weft-$(INSTALL_KEY)
INSTALLED_DEV := $(VENV)/.weft-dev-$(INSTALL_KEY)

# pip talks too much or not at all; these are its lines that say what takes so long, and what went wrong.
PIP_LINES := 2>&1 | { grep --line-buffered -E '^ *Downloading .*\([0-9.]{4,} MB\)|^ *(Installing collected|Building editable|ERROR|error)' | cut -c1-100 || true; }
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt

.PHONY: help setup setup-dev serve test check unit sim numerics contract e2e replay frameworks docs bench bench-peers size format proto sanitize fuzz \
	check-format check-lint check-types check-public-types check-imports check-spelling check-generated clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo; echo '  make serve MODEL=… PORT=… ARGS="…"    MODEL: a directory, a .gguf file, a hub id, or pypi:…'

setup: $(INSTALLED) ## environment and dependencies in .venv

setup-dev: $(INSTALLED_DEV)

serve: $(INSTALLED) ## serve a model on port 3000: make serve MODEL=… PORT=… ARGS="…"
	@exec $(BIN)/weft serve $(MODEL) $(if $(PORT),--port $(PORT)) $(ARGS)

test: $(INSTALLED_DEV) ## all tests
	@$(BIN)/pytest -q -n auto --dist loadgroup $(ARGS) tests clients/python/tests

check: $(INSTALLED_DEV) ## format, lint, types, imports, spelling, generated files
	@$(MAKE) -j4 --keep-going --output-sync=target check-format check-lint check-types check-public-types check-imports \
		check-spelling check-generated
	@echo "check: all good"

unit: $(INSTALLED_DEV) ## tests of single modules
	@$(BIN)/pytest -q -n auto --dist loadgroup tests/unit $(ARGS)

sim: $(INSTALLED_DEV) ## scheduler simulation: make sim SEEDS=0-500, or SEED=17 to replay one
	@$(BIN)/python -m tests.sim $(if $(SEED),--seed $(SEED),--seeds $(SEEDS)) $(ARGS)

numerics: $(INSTALLED_DEV) ## operations and models against their references
	@$(BIN)/pytest -q -n auto tests/numerics $(ARGS)

contract: $(INSTALLED_DEV) ## HTTP as bytes, without a model
	@$(BIN)/pytest -q -n auto tests/contract $(ARGS)

e2e: $(INSTALLED_DEV) ## real processes, a real model, real clients
	@$(BIN)/pytest -q tests/e2e $(ARGS)

replay: $(INSTALLED_DEV) ## a thousand recorded requests, asked again under other conditions: make replay ARGS="--form int8"
	@$(BIN)/python -m tests.e2e.replay $(ARGS)

frameworks: $(INSTALLED_DEV) ## litellm, LangChain, LlamaIndex against a real server, each in an environment of its own
	@FRAMEWORK_CLIENTS=1 $(BIN)/pytest -q tests/e2e/test_framework_clients.py $(ARGS)

docs: $(INSTALLED_DEV) ## write the generated pages, then check all pages
	@$(BIN)/python docs/generate.py
	@$(BIN)/python docs/generate_http.py
	@$(BIN)/pytest -q tests/docs $(ARGS)

bench: $(INSTALLED_DEV) ## measure the server: make bench ARGS="--quick --servers int8"
	@$(BIN)/python benchmark/serving.py $(ARGS)

bench-peers: $(INSTALLED_DEV) ## the server and its peers in turns: make bench-peers ARGS="--quick --minutes 22"
	@$(BIN)/python benchmark/serving.py --peers $(ARGS)

size: ## a mirror: lines per folder, long files, long functions
	@python3 docs/size.py

format: $(INSTALLED_DEV) ## rewrite files in the project's style
	@$(BIN)/ruff format -q .
	@$(BIN)/ruff check -q --fix .

proto: $(INSTALLED_DEV) ## generate the wire's stubs
	@$(BIN)/python proto/generate.py

sanitize: $(INSTALLED_DEV) ## kernels under the address, undefined-behaviour and thread sanitizers (minutes)
	@set -e; for sanitizer in address undefined thread; do echo "== $$sanitizer"; \
		$(BIN)/python -m weft.kernels.cpu.build --sanitize $$sanitizer --output-dir build/$$sanitizer \
			--program tests/numerics/kernels/exercise.cpp; build/$$sanitizer/exercise; done

fuzz: $(INSTALLED_DEV) ## parsers and HTTP with many more random inputs than in `make test`
	@$(BIN)/pytest -q -n auto tests/unit tests/contract --hypothesis-profile=fuzz $(ARGS)

clean: ## remove the environment and every cache in the tree
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build src/*.egg-info

check-format:
	@$(BIN)/ruff format --check -q . || { echo 'format: run `make format`'; exit 1; }

check-lint:
	@$(BIN)/ruff check -q .

check-types:
	@$(BIN)/mypy --no-error-summary

check-public-types:
	@$(BIN)/pyright --pythonpath $(BIN)/python src/weft/__init__.py src/weft/core src/weft/config src/weft/errors.py \
		src/weft/offline.py clients/python/src \
		| { grep -vE '^0 errors' || true; }

check-imports:
	@$(BIN)/lint-imports --no-cache >$(VENV)/lint-imports.log 2>&1 || { cat $(VENV)/lint-imports.log; exit 1; }

check-spelling:
	@git ls-files -z --cached --others --exclude-standard | xargs -0 $(BIN)/codespell

check-generated:
	@$(BIN)/python docs/generate.py --check
	@$(BIN)/python proto/generate.py --check

$(INSTALLED): | $(VENV)/bin/python
	@echo "Installing Weft and its dependencies into $(VENV) (once, a few minutes; torch is large)"
	@$(PIP_INSTALL) -e . $(PIP_LINES)
	@rm -f $(VENV)/.weft-[0-9]* && touch $@

$(INSTALLED_DEV): | $(VENV)/bin/python
	@echo "Installing Weft and its development tools into $(VENV) (once, a few minutes; torch is large)"
	@$(PIP_INSTALL) -e '.[dev]' $(PIP_LINES)
	@# This client of TGI's asks for an old hub client; the tests need only its own modules.
	@$(PIP_INSTALL) --no-deps text-generation==0.7.0 $(PIP_LINES)
	@rm -f $(VENV)/.weft-* && touch $(INSTALLED) $@

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Weft needs Python 3.11 or newer and found none; install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Weft needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
