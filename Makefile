# `make serve` and `make test` need only Python and make: they install what they lack into .venv.
PYTHON ?= python3
VENV ?= .venv
# What is installed where there is no NVIDIA driver.
TORCH ?= torch==2.13.0
# Processes that share out the tests. Where there is a GPU, one, because tests measure its memory.
JOBS ?= $(if $(shell command -v nvidia-smi),0,2)
# Extra flags for the server or for pytest: make serve ARGS="--port 9000"
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet
BUILD_FILES := pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: serve test lint format csrc dev clean

serve: $(VENV)/.serve
	$(BIN)/python -m moe_engine.serve $(ARGS)

test: $(VENV)/.test
	$(BIN)/pytest -q -n $(JOBS) --dist loadfile $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i csrc/*

# Compiles the CUDA extension for every architecture, showing what nvcc says.
csrc: $(VENV)/.torch
	MOE_ENGINE_REQUIRE_CUDA=1 $(BIN)/pip install --verbose --no-deps --editable .

dev: $(VENV)/.dev

# Without a GPU, TORCH is installed first, and the plain requirement is then satisfied.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Python %d.%d is too old: moe_engine needs 3.11, set PYTHON" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null || $(PIP) '$(TORCH)'
	touch $@

$(VENV)/.serve: $(VENV)/.torch $(BUILD_FILES)
	$(PIP) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.torch $(BUILD_FILES)
	$(PIP) --editable '.[test]'
	touch $(VENV)/.serve $@

$(VENV)/.dev: $(VENV)/.torch $(BUILD_FILES)
	$(PIP) --editable '.[dev]'
	touch $(VENV)/.serve $(VENV)/.test $@

clean:
	rm -rf $(VENV) build dist *.egg-info moe_engine/_C.*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis .coverage
