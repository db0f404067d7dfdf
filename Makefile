# Every target is self-sufficient on a fresh machine: it makes the environment in .venv first, if need be.
#   make demo PYTHON=python3.12      another interpreter for the environment
#   make evidence JOBS=2             runs at a time, one core each

PYTHON ?= python3
JOBS ?= 1
BIN := .venv/bin
# Touched after a complete installation only, so that an interrupted one, or a .venv made by hand, is completed.
STAMP := .venv/.installed
EVIDENCE := OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evidence.py --jobs $(JOBS)
# One thread in each of two processes; a file's tests share what they build, so they stay together.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help env demo smoke teacher evidence evidence-quick ablations ablations-quick halves test attack coverage lint format

help:
	@echo "make demo      environment, then distil the digits teacher into two experts"
	@echo "make smoke     the same code path with tiny numbers, in seconds"
	@echo "make teacher   train the digits teacher: about an hour of one core"
	@echo "make evidence  DCM against its baselines, with tuned rates and three seeds: hours; goes on where it was"
	@echo "make ablations DCM with one thing changed, at the rate that make evidence has found"
	@echo "               (evidence-quick and ablations-quick: a fifth of the steps, 400 samples)"
	@echo "make halves    which half limits a model: above the boundary one, below it another, of make evidence"
	@echo "make test      environment, then the tests"
	@echo "make attack    mutated recipes, damaged and hostile files, kills, full disks: 30 to 50 minutes; goes on where it was"
	@echo "make coverage  the tests, with line coverage of the core"
	@echo "make lint      ruff and mypy"
	@echo "make format    let ruff rewrite what it can"

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[digits,test,lint]'
	touch $@

demo: $(STAMP)
	$(BIN)/moedistill run recipes/dcm_digits.yaml

smoke: $(STAMP)
	$(BIN)/moedistill run recipes/dcm_digits.yaml --smoke

teacher: $(STAMP)
	$(BIN)/moedistill run recipes/digits_teacher.yaml

evidence: $(STAMP)
	$(EVIDENCE)

evidence-quick: $(STAMP)
	$(EVIDENCE) --quick

ablations: $(STAMP)
	$(EVIDENCE) --ablations

ablations-quick: $(STAMP)
	$(EVIDENCE) --ablations --quick

halves: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/halves.py

test: $(STAMP)
	$(TESTS)

attack: $(STAMP)
	$(BIN)/python benchmarks/attack.py

coverage: $(STAMP)
	$(TESTS) --cov --cov-report=term-missing:skip-covered

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
