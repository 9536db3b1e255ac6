# One virtual environment, made from the lock file; every target sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMPILED := build/compiled/.made
ARGS ?=

.PHONY: help demo test test-long lint format bench compiled test-compiled proto completions lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "make: Python 3.11 or newer is needed as $(PYTHON): apt-get install python3 python3-venv, or name one with PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "make: Python's venv module is missing: apt-get install python3-venv" >&2; exit 2; }
	@echo "make: setting up $(VENV) (once)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

demo: $(STAMP) ## a whole mesh on this host, with real traffic and checks (ARGS=--keep leaves it running)
	@$(BIN)/python -m examples.demo $(ARGS)

test: $(STAMP) ## the test suite
	@$(BIN)/python -m pytest -q $(ARGS)

test-long: $(STAMP) ## the same tests at their full sizes
	@HBONE_TEST_SIZES=full $(BIN)/python -m pytest -q --timeout 3600 $(ARGS)

lint: $(STAMP) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## let ruff format and mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP) ## measure against no proxy and Envoy (ARGS=--quick for a minute)
	@$(BIN)/python -m bench $(ARGS)

compiled: $(COMPILED) ## the packages with their data path compiled, in build/compiled (needs gcc and Python's headers)

$(COMPILED): $(STAMP) tools/compiled.py tools/native.py $(shell find src -name '*.py' -o -name '*.c')
	@echo "make: compiling the data path (two minutes)" >&2
	@rm -rf build/compiled
	@HATCH_BUILD_HOOKS_ENABLE=1 $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target build/compiled .
	@touch $@

test-compiled: $(COMPILED) ## the data path's tests against the compiled packages
	@PYTHONPATH=build/compiled HBONE_EXPECT_COMPILED=1 $(BIN)/python -m pytest -q tests/test_compiled.py tests/hbone/engine tests/hbone/test_tls.py \
	  tests/hbone/test_connect.py tests/hbone/test_endpoint.py tests/hbone/test_pool.py tests/hbone/daemon/test_logs.py \
	  tests/ztunnel/test_logs.py tests/ztunnel/dataplane tests/system/test_traffic.py $(ARGS)

proto: $(STAMP) ## make the protobuf messages again from src/ztunnel/wire/*.proto
	@$(BIN)/python -m grpc_tools.protoc -I src --python_out=src --pyi_out=src src/ztunnel/wire/*.proto

completions: $(STAMP) ## make the completions for bash and zsh again from the command lines
	@$(BIN)/python -m tools.completions

lock: ## choose the versions of requirements.lock again
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q uv
	@$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --upgrade -q -o requirements.lock

clean: ## remove the virtual environment and caches
	@rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
