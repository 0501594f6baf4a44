# Each target sets up what it needs and is safe to repeat.
#   make demo [WIDTH=1024]  train, align, merge, renormalize on digits; pictures and numbers under out/
#   make test               the tests
#   make lint, make types   ruff; the type checker over an installed copy of the package
#   make nightly            the tests marked slow as well
#   make docs               the documentation site, into build/site
#   make bench              every benchmark suite, into bench/results/; about an hour on two cores, most of it the peers at VGG16 4 x wide
VENV   ?= .venv
PYTHON ?= python3
WIDTH  ?= 1024
JOBS   ?= auto
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test nightly lint types docs bench install clean

install: $(VENV)/.installed

# torch first and pinned: elsewhere a CPU build is enough, and an unpinned one brings CUDA with it.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "making a virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing fastmatch and its development tools into $(VENV) (a few minutes the first time)"
	@$(PIP) install -q -U pip
	@$(PIP) install -q -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/python -m fastmatch demo --width $(WIDTH)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n $(JOBS) -m "not slow"

nightly: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n $(JOBS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -q

bench: $(VENV)/.installed
	@$(PIP) install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python -m fastmatch bench --out bench/results/bench.json --pictures docs --force

clean:
	rm -rf build dist out *.egg-info
