# Everything needed is set up in .venv by `install`, which the other targets run first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: install check test test-slow demo bench docs

install: $(STAMP)

# torch comes first and by its exact pin: a range would bring the newest build for GPUs, several GB.
$(STAMP): pyproject.toml constraints.txt constraints-vllm.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,deepspeed]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt
	touch $(STAMP)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -q -m slow --timeout 3600

demo: install
	$(BIN)/python -m align demo

bench: install
	$(BIN)/python -m bench.offline

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
