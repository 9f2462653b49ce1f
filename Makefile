# Each target makes .venv and installs the project when that is missing: on a fresh machine one command is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: demo test lint bench faults nightly docs clean

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	@DEMO="$(DEMO)" PATH="$(CURDIR)/$(BIN):$$PATH" sh utils/run_scripts/run_demo.sh $(DEMO_ARGS)

# Test modules run side by side (tests/parallel.py); so they do by `python -m unittest discover -s tests -t .`.
test: $(VENV)/.installed
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

# Every fault that docs/reliability.md promises something about, injected; FAULTS_ARGS=kills_1 for one kind.
faults: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.faults $(FAULTS_ARGS)

# What takes too long for every change: the demo's claim, trained; exports in five versions of transformers; faults
# by the thousand; a run for an hour.
nightly: $(VENV)/.installed
	$(BIN)/python -m unittest -v tests.nightly_demo
	$(BIN)/python -m unittest -v tests.nightly_transformers
	$(BIN)/python -m tests.faults --nightly
	FUZZ_CASES=2000 $(BIN)/python -m unittest tests.test_fuzz
	$(BIN)/python -m unittest -v tests.nightly_soak

# Another version of transformers in a folder of its own, for a test of exports that is skipped without it.
build/transformers/%: $(VENV)/.installed
	$(BIN)/python -m tests.other_transformers $*

# The site of docs/, with the settings and the commands read off the code.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Wrote build/site/index.html"

clean:
	rm -rf $(DEMO) .coverage .coverage.* .mypy_cache .ruff_cache build
