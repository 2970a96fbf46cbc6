# Every target sets up what it needs. PYTHON picks the interpreter (3.11 or later).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=

.PHONY: help setup compare test test-full test-oldest-hf lint bench gpu-check contract-table wheel clean
help:            ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 18

# torch is pinned by constraints.txt: a looser request can pull several gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clearhead needs Python 3.11 or later; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $(STAMP)

setup: $(STAMP)  ## make the virtual environment

compare: setup   ## the main job: four attentions on real text, five seeds, one report (about 10 minutes)
	$(BIN)/clearhead compare $(ARGS)

test: setup      ## the test suite (minutes)
	$(BIN)/python -m pytest -n 2 -m "not full" $(ARGS)

test-full: setup ## every spec x backend x dtype, and the long tests
	$(BIN)/python -m pytest -n 2 $(ARGS)

# tests/hf once more, under the oldest transformers that a patch takes, in an environment of its own.
OLDEST_HF ?= 5.17.0
OLD       := .venv-hf
test-oldest-hf:  ## the Hugging Face tests under the oldest supported transformers
	test -x $(OLD)/bin/python || $(PYTHON) -m venv $(OLD)
	(grep -v '^transformers==' constraints.txt; echo 'transformers==$(OLDEST_HF)') > $(OLD)/constraints.txt
	$(OLD)/bin/python -m pip install -q --disable-pip-version-check torch -c $(OLD)/constraints.txt
	$(OLD)/bin/python -m pip install -q --disable-pip-version-check -e '.[dev]' -c $(OLD)/constraints.txt
	$(OLD)/bin/python -m pytest -n 2 -m "not full" tests/hf tests/anatomy $(ARGS)

lint: setup      ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup     ## attention speed as a ratio to PyTorch's own (one thread, interleaved)
	$(BIN)/python -m benchmarks.run $(ARGS)

gpu-check:       ## the kernel and contract checks on a GPU; needs only torch, triton, numpy, pytest
	PYTHONPATH=src python3 -m pytest -q -m "not full" --device cuda tests/contract.py $(ARGS)

contract-table: setup ## write docs/contract-table.md by running the contract suite
	$(BIN)/python -m tests.contract_table $(ARGS)

wheel: setup     ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean:           ## remove the environment and build products
	rm -rf $(VENV) $(OLD) build dist src/*.egg-info
