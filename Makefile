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

# Two halves at a time: most of the time goes to programs that the tests start and wait for. Those on SLURM clusters
# (test_slurm_*, which [!l] leaves out of the second half) come afterwards, unmeasured: they kill and wait.
DISCOVER = unittest discover -s tests -t . -p
MEASURED = COVERAGE_FILE="$(CURDIR)/.coverage" $(BIN)/python -m coverage run -m $(DISCOVER)
UNMEASURED = $(BIN)/python -m $(DISCOVER)
# $(call halves,PROGRAM,PATTERN,PATTERN): the first one's output comes after that of the second.
halves = @export PATH="$(CURDIR)/$(BIN):$$PATH"; $(1) '$(2)' > .first_half.log 2>&1 & first=$$!; \
	$(1) '$(3)'; second=$$?; wait $$first; first=$$?; \
	cat .first_half.log; rm .first_half.log; test $$first = 0 && test $$second = 0

# One thread each: halves that share two cores wait for each other's threads longer than those would save.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.installed
	rm -f .coverage .coverage.*
	$(call halves,$(MEASURED),test_[a-fi-l]*.py,test_[ghm-z][!l]*.py)
	$(call halves,$(UNMEASURED),test_slurm_[a-r]*.py,test_slurm_[s-z]*.py)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/pip install --quiet -e ".[dev,bench]"
	touch $@

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# Every fault that docs/reliability.md promises something about, injected; FAULTS_ARGS=kills_1 for one kind.
faults: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.faults $(FAULTS_ARGS)

# What takes too long for every change: the demo's claim, trained; faults by the thousand; a run for an hour.
nightly: $(VENV)/.installed
	$(BIN)/python -m unittest -v tests.nightly_demo
	$(BIN)/python -m tests.faults --nightly
	FUZZ_CASES=2000 $(BIN)/python -m unittest tests.test_fuzz
	$(BIN)/python -m unittest -v tests.nightly_soak

# The site of docs/, with the settings and the commands read off the code.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Wrote build/site/index.html"

clean:
	rm -rf $(DEMO) .coverage .coverage.* .mypy_cache .ruff_cache build
