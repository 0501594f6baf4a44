# Each target installs what it needs into .venv and is safe to repeat. `make help` lists them.
VENV   ?= .venv
PYTHON ?= python3
WIDTH  ?= 1024
JOBS   ?= auto
BIN    := $(VENV)/bin
# worksteal gives each process a run of neighbouring tests, so that few kernels are compiled twice at the same time.
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal
# A test that takes so many seconds is taken to hang: its process ends, with the stacks of all threads, and it fails.
HANGS  := -o faulthandler_exit_on_timeout=true -o faulthandler_timeout
# A machine with a GPU may have its own Python and no network: nothing is installed there.
GPU    := PYTHONPATH=$(CURDIR):$(CURDIR)/kernels PYTHONUNBUFFERED=1 $(PYTHON)
GPUOUT ?= out/gpu
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test nightly gpu gpucounters gpusolves lint types docs bench dist install clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*## ' '{ printf "make %-8s %s\n", $$1, $$2 }'

install: $(VENV)/.dev  ## the package and its development tools, into .venv

# fastmatch[demo], fastmatch[dev]: the target has the name of the extra. torch comes first and pinned, because an
# unpinned one brings CUDA with it where a CPU build is enough.
$(VENV)/.demo $(VENV)/.dev: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "making a virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing fastmatch[$(subst .,,$(@F))] into $(VENV) (a few minutes the first time)"
	@$(PIP) install -q -U pip
	@$(PIP) install -q -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@$(PIP) install -q -c constraints.txt -e '.[$(subst .,,$(@F))]'
	@touch $@

# On a busy machine threads that spin while they wait take most of the time: a demo of one minute took a quarter of an hour.
demo: $(VENV)/.demo  ## train, align, merge and renormalize on digits; pictures and numbers into out/ (WIDTH=1024)
	@OMP_WAIT_POLICY=passive $(BIN)/python -m fastmatch demo --width $(WIDTH)

test: $(VENV)/.dev  ## the tests, one process per core (JOBS=auto)
	$(PYTEST) -m "not slow" $(HANGS)=600

nightly: $(VENV)/.dev  ## the tests, those marked slow included
	$(PYTEST) $(HANGS)=7200

gpu:  ## on a GPU: its tests, public calls and kernels; findings into GPUOUT (no install; PYTHON=python3, JOBS=12)
	mkdir -p $(GPUOUT)
	-timeout 170 env $(GPU) -m pytest -q -m gpu -n $(JOBS) -W default -o cache_dir=$(GPUOUT)/.pytest tests/gpu tests/kernels > $(GPUOUT)/tests.log 2>&1
	-tail -40 $(GPUOUT)/tests.log
	env $(GPU) -m bench.reports.kernels_gpu --out $(GPUOUT) --parts env:10 ceilings:15 calls:75 kernels:140

gpucounters:  ## on a GPU: Nsight Compute's counters of a few launches
	mkdir -p $(GPUOUT)
	timeout 110 env $(GPU) -m bench.lib.gpu_probe
	timeout 110 env $(GPU:$(PYTHON)=) ncu --csv --kernel-name regex:_kernel --metrics gpu__time_duration.sum,l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum,sm__inst_executed_pipe_tensor.sum,sm__inst_executed_pipe_fma.sum,dram__bytes.sum,lts__t_bytes.sum $(PYTHON) -m bench.lib.gpu_probe > $(GPUOUT)/counters.csv

gpusolves:  ## on a GPU: solves end to end, and where the time of public calls goes
	env $(GPU) -m bench.reports.kernels_gpu --out $(GPUOUT) --parts ceilings:15 solve:40 peers:70 profile:40

lint: $(VENV)/.dev  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## basedpyright
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs: $(VENV)/.dev  ## the documentation site, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -q

bench: $(VENV)/.dev  ## every benchmark suite, into bench/results/; about an hour on two cores
	@$(PIP) install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python -m fastmatch bench --out bench/results/bench.json --pictures docs/pictures --force

dist: $(VENV)/.dev  ## what a release has: sdist and wheel, built and checked, into dist/
	@$(PIP) install -q build twine
	rm -rf dist
	$(BIN)/python -m build -o dist
	$(BIN)/python -m twine check --strict dist/*

clean:  ## remove what was built
	rm -rf build dist out *.egg-info
