# make run | test | lab | bench: each makes the environment in .venv first if it is missing or
# requirements.txt has changed. PYTHON, CONFIG, DATA_ROOT and ARGS can be set on the command line. Without ARGS, make run ends
# with a comparison with the committed tables.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	  $$p -c 'import sys; sys.exit(not (3, 11, 4) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
CONFIG ?= digits
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
RUN_OPTIONS := --config $(CONFIG) $(if $(DATA_ROOT),--data-root "$(DATA_ROOT)")

.PHONY: run test lab bench environment clean

run: $(STAMP)
	$(BIN)/python run_all.py $(RUN_OPTIONS) $(or $(ARGS),--verify)

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

lab: $(STAMP)
	$(BIN)/jupyter lab --notebook-dir=. notebooks/00_start_here.ipynb $(ARGS)

bench: $(STAMP)
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script $(RUN_OPTIONS) $(ARGS) || exit 1; done

environment: $(STAMP)

$(STAMP): requirements.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(not (3, 11, 4) <= sys.version_info < (3, 14))' 2>/dev/null || \
	  { echo "Found $$({ $(or $(PYTHON),python3) --version; } 2>/dev/null || echo no Python), expected Python 3.11.4 to 3.13: install one and run make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing the environment in $(VENV): a few minutes and, with CUDA on Linux, about 6 GB."
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@! git rev-parse --git-dir >/dev/null 2>&1 || { $(BIN)/nbstripout --install --attributes .gitattributes && git config filter.nbstripout.required false && git config filter.nbstripout.extrakeys metadata.language_info; }
	@touch $@

clean:
	rm -rf runs
