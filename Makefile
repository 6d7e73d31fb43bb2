SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
# engines compares with vLLM, in its own environment
BENCHMARKS := $(filter-out __init__ material engines,$(basename $(notdir $(wildcard benchmarks/*.py))))

.PHONY: venv test test-slow lint docs bench demo clean

venv: .venv/installed

# Made again only when what is to be installed changes.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
# torch first and alone, so that the wheel this machine's pip prefers (CPU or CUDA) is settled before anything needs it
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
# DeepSpeed's CUDA kernels would need a compiler now; those a run uses are built when it starts
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,deepspeed,peft,demo]'
	touch $@

test: venv
	$(BIN)/pytest -m 'not slow'

test-slow: venv
	$(BIN)/pytest -m slow

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# The pages made from the program itself; tests/test_docs.py fails while they differ from it
docs: venv
	$(BIN)/python docs/generate.py

bench: venv
	set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name; done

demo: venv
	$(BIN)/python examples/demo.py

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
