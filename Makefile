# Each target creates .venv and installs the project if missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: demo starter test coverage lint bench gpu faults nightly docs clean

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -e ".[dev]"
# Compile on all cores; pip uses one. A package may contain templates, which are no Python.
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m compileall -q -j 0 $(VENV)/lib > $(VENV)/compile.log || true
	touch $@

demo: $(VENV)/.installed
	@DEMO="$(DEMO)" PATH="$(CURDIR)/$(BIN):$$PATH" sh utils/run_scripts/run_demo.sh $(DEMO_ARGS)

# Train the weights of examples/starter again: about an hour.
starter:
	$(MAKE) demo MINUTES=60 DEMO=build/starter
	$(BIN)/python -m omnivision_demo.starter build/starter examples/starter

# Test modules run in parallel (tests/parallel.py), as with `python -m unittest discover -s tests -t .`.
test: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m unittest discover -s tests -t .

# Which lines do the tests run? They take about twice as long.
coverage: $(VENV)/.installed
	rm -f .coverage .coverage.*
	PATH="$(CURDIR)/$(BIN):$$PATH" COVERAGE_FILE="$(CURDIR)/.coverage" \
		$(BIN)/python -m coverage run -m unittest discover -s tests -t .
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/pip install --quiet -e ".[dev,bench]"
	touch $@

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# Is training on this GPU right, and how fast? GPU_ARGS="--recipe 10" trains the five stages in ten minutes.
gpu: $(VENV)/.bench
	$(BIN)/python -m benchmarks.gpu $(GPU_ARGS)

# Inject every fault of the guarantees in docs/reliability.md; FAULTS_ARGS=kills_1 for one kind.
faults: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.faults $(FAULTS_ARGS)

# Tests too long for every change: coverage, the demo's claim, a rehearsal of the recipe on a GPU, exports in five versions of
# transformers, thousands of faults, an hour-long run.
nightly: coverage
	$(BIN)/python -m unittest -v tests.nightly_demo
	$(MAKE) gpu GPU_ARGS="--quick --recipe 1"
	$(BIN)/python -m unittest -v tests.nightly_transformers
	$(BIN)/python -m tests.faults --nightly
	FUZZ_CASES=2000 $(BIN)/python -m unittest tests.config.test_fuzz
	$(BIN)/python -m unittest -v tests.nightly_soak

# Another version of transformers in a separate folder, for an export test that is skipped without it.
build/transformers/%: $(VENV)/.installed
	$(BIN)/python -m tests.other_transformers $*

# The documentation site. `python docs/generate.py` updates its settings and commands from the code.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Wrote build/site/index.html"

clean:
	rm -rf $(DEMO) .coverage .coverage.* .mypy_cache .ruff_cache build
