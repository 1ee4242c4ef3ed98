# `make help` lists the targets. `make demo` on a fresh clone needs only Python and a package index.

PYTHON ?= python3
# Test files that run side by side; the tests of one file share what it starts.
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
# Old and new clients that the contract tests run, each in an environment of its own: one a file of pins.
CLIENTS := $(patsubst tests/contracts/%.txt,.contracts/%/.installed,$(wildcard tests/contracts/openai-*.txt))

# deepspeed comes as source; nothing of it is compiled ahead of time. It imports torch only for that.
export DS_BUILD_OPS := 0

.DEFAULT_GOAL := help
.PHONY: help install demo up test test-long faults lint bench screenshots openapi clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do \
		printf '  make %-10s %s\n' "$$target" "$$text"; done

install: $(STAMP) $(CLIENTS) ## create .venv and install the pinned tree into it; the tests' clients too

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --progress-bar off -c constraints.txt -e '.[train,dashboard,dev]'
	touch $@

.contracts/openai-%/.installed: tests/contracts/openai-%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --progress-bar off -c $< openai==$*
	touch $@

demo: $(STAMP) ## train, merge and chat with a small model, start to end
	$(BIN)/python examples/demo.py

up: $(STAMP) ## start the whole service on this machine
	$(BIN)/residency up

test: install ## run the tests
	$(BIN)/pytest -n $(JOBS) --dist loadfile

test-long: install ## run the slow tests, with a selection of faults
	$(BIN)/pytest -m 'long and not gpu' -n $(JOBS) --dist loadfile

faults: install ## break parts and see each guarantee kept, once each; G=2 for one of them at full count
	FAULTS_FULL=$(G) $(BIN)/pytest -m '$(if $(G),faults(g=$(G)),faults)' -n $(JOBS) --dist loadfile \
		--no-loadscope-reorder

lint: $(STAMP) ## check style, formatting, types and import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(STAMP) ## run every script in benchmarks/ that needs no GPU
	@set -e; for script in $(filter-out benchmarks/gpu_%,$(sort $(wildcard benchmarks/*.py))); do \
		echo "$(BIN)/python $$script"; $(BIN)/python "$$script"; done

screenshots: install ## look at every page: pictures of them all in screenshots/, those of the README in docs/pictures
	$(BIN)/python -m tests.browser.screenshots screenshots --docs docs/pictures

openapi: $(STAMP) ## write docs/openapi.json, the description of the API
	$(BIN)/python -m api.openapi > docs/openapi.json

clean: ## remove caches and build output; keep .venv
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find api db workers trainers tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
