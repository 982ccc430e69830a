# Everything runs in .venv, made on first use; `make help` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
CFG    ?= ring_digits_few presets/idkd_plus
RUN    ?= runs/$(patsubst ring_digits_few,ring_digits,$(firstword $(CFG)))/latest
SWEEP  ?= ood_scores
FILE    = $(firstword $(wildcard $(filter %.yaml,$(SWEEP))) configs/sweeps/$(SWEEP).yaml)
ARGS   ?=
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup train test bench report sweep agent lint docs clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 16
	@echo '  variables: CFG="ring_digits_few presets/idkd_plus" (files in configs/)  ARGS="--seed 1" (passed on to idkd fit)'

setup: $(VENV)/.ready  ## make .venv and install the project with its development tools

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: $(VENV)/.ready  ## run an experiment: make train CFG=torus_cifar100 ARGS="--seed 1"
	$(BIN)/idkd fit $(CFG:%=--config configs/%.yaml) $(if $(filter ring_digits_few,$(CFG)),--run.name ring_digits) $(ARGS)

test: $(VENV)/.ready  ## run the tests
	$(BIN)/python -m pytest -q -n auto --dist worksteal $(ARGS)

bench: $(VENV)/.ready  ## time steps of small and large networks in every form (2 minutes: ARGS="--quick true")
	$(BIN)/idkd bench --out runs/bench.json $(ARGS)

report: $(VENV)/.ready  ## write report.md and report.html of a run: make report RUN=runs/ring_digits/latest
	$(BIN)/idkd report $(RUN)

sweep: $(VENV)/.ready  ## create a W&B sweep: make sweep SWEEP=ood_scores, or SWEEP=mine.yaml (without a server: idkd sweep FILE)
	$(BIN)/wandb sweep $(if $(WANDB_PROJECT)$(shell grep -ls '^project:' $(FILE)),,--project lightning-idkd) $(FILE) || \
	  { echo "without a server: $(BIN)/idkd sweep $(FILE)"; exit 1; }

# a signal to the agent reaches its run, which stops with a checkpoint
agent: $(VENV)/.ready  ## run an agent of a W&B sweep: make agent ID=entity/project/id ARGS="--count 1"
	@test -n "$(ID)" || { echo "make agent ID=entity/project/id, as make sweep prints it"; exit 2; }
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/wandb agent --forward-signals $(ARGS) $(ID)

lint: $(VENV)/.ready  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ty check --python $(VENV)

docs: $(VENV)/.ready  ## build the documentation in build/docs; a warning is an error
	$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet configs/docs build/docs
	@echo 'built: build/docs/index.html'

clean:  ## remove caches and builds; runs/ and .venv stay
	rm -rf build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
