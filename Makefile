# Each target installs what it needs into .venv and is safe to repeat. `make help` lists them.
VENV   ?= .venv
PYTHON ?= python3
WIDTH  ?= 1024
JOBS   ?= auto
BIN    := $(VENV)/bin
# worksteal gives each process a run of neighbouring tests, so that few kernels are compiled twice at the same time.
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test nightly lint types docs bench install clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*## ' '{ printf "make %-8s %s\n", $$1, $$2 }'

install: $(VENV)/.installed  ## the package and its development tools, into .venv

# torch comes first and pinned, because an unpinned one brings CUDA with it where a CPU build is enough.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "making a virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing fastmatch and its development tools into $(VENV) (a few minutes the first time)"
	@$(PIP) install -q -U pip
	@$(PIP) install -q -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed  ## train, align, merge and renormalize on digits; pictures and numbers into out/ (WIDTH=1024)
	@$(BIN)/python -m fastmatch demo --width $(WIDTH)

test: $(VENV)/.installed  ## the tests, one process per core (JOBS=auto)
	$(PYTEST) -m "not slow"

nightly: $(VENV)/.installed  ## the tests, those marked slow included
	$(PYTEST)

lint: $(VENV)/.installed  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed  ## basedpyright
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs: $(VENV)/.installed  ## the documentation site, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -q

bench: $(VENV)/.installed  ## every benchmark suite, into bench/results/; about an hour on two cores
	@$(PIP) install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python -m fastmatch bench --out bench/results/bench.json --pictures docs/pictures --force

clean:  ## remove what was built
	rm -rf build dist out *.egg-info
