# Everything here needs only Python 3.11 or newer and make. `make help` lists what there is.
#
#   VENV=path        the environment to use or create (default .venv)
#   PYTHON=path      the Python that creates it (default: the first of python3, python3.13, python3.12, python3.11 that is new enough)
#   PARALLEL=        run the tests in one process
#   EDITABLE=        install a copy instead of linking to this folder, and run the tests outside of it

VENV ?= .venv
EDITABLE ?= --editable
OUT ?= outputs/demo
PROMPT ?= a red circle left of a blue square
PYTEST_ARGS ?=
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist loadfile
STAGES ?= all
TRAIN_ARGS ?=

BIN := $(VENV)/bin
TESTED_FROM := $(if $(EDITABLE),.,build/outside)
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help demo app test test-processes test-slow lint format docs docs-serve train-shapes over-optimisation clean FORCE

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.diffalign ## an image before and after optimisation, on the embedded model
	$(BIN)/diffalign generate "$(PROMPT)" --method reno --out "$(OUT)"
	@echo "The images, the plot and the trace are in $(OUT)"

app: $(VENV)/.diffalign-app ## the same in the browser
	$(BIN)/diffalign demo

test: $(VENV)/.diffalign-dev $(TESTED_FROM) ## the tests that need minutes at most
	cd $(TESTED_FROM) && $(abspath $(BIN))/pytest $(PARALLEL) -m "not slow and not processes and not gpu" $(PYTEST_ARGS)

test-processes: $(VENV)/.diffalign-dev $(TESTED_FROM) ## the tests that launch several processes together, or kill one
	cd $(TESTED_FROM) && $(abspath $(BIN))/pytest -m "processes and not gpu" $(PYTEST_ARGS)

test-slow: $(VENV)/.diffalign-dev $(TESTED_FROM) ## all tests, also the slow ones
	cd $(TESTED_FROM) && $(abspath $(BIN))/pytest $(PYTEST_ARGS)

# Everything but the packages, so that the tests cannot help testing what is installed.
build/outside: FORCE
	rm -rf $@ && mkdir -p $@
	cp -R $(filter-out diffalign pipelines reward_models build outputs runs dist %.egg-info,$(wildcard *)) .gitignore $@

lint: $(VENV)/.diffalign-dev ## style, format, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/layout && mkdir -p build/layout
	cp -R diffalign pyproject.toml build/layout && cp -R pipelines reward_models build/layout/diffalign
	cd build/layout && PYTHONPATH=. $(abspath $(BIN))/lint-imports

format: $(VENV)/.diffalign-dev ## put the code into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.diffalign-docs ## the docs site in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.diffalign-docs ## the docs site on this machine, built again whenever a page changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

train-shapes: $(VENV)/.diffalign-measures ## train the embedded models anew: hours, resumable; STAGES="base turbo" for some, TRAIN_ARGS="--device cuda"
	$(BIN)/python -m diffalign.shapes.train $(STAGES) $(TRAIN_ARGS)

over-optimisation: $(VENV)/.diffalign ## the table of docs/reward_mixing.md: half an hour on one core, resumable
	$(BIN)/python scripts/over_optimisation.py --out outputs/over_optimisation

clean: ## remove what builds, tests and demos leave behind; environments and training runs stay
	rm -rf build dist outputs .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	find . -path ./.git -prune -o -path "./$(VENV)" -prune -o -name __pycache__ -type d -exec rm -rf {} +

# One stamp per set of extras, newer than pyproject.toml while the installation is up to date.

# What an earlier build left in build/lib would go into the next wheel, deleted modules included.
$(VENV)/.diffalign: pyproject.toml | $(BIN)/pip
	@rm -rf build/lib build/bdist.*
	@echo "Installing diffalign into $(VENV). PyTorch is several gigabytes, so the first time takes minutes."
	$(BIN)/python -m pip install $(EDITABLE) .
	@touch $@

$(VENV)/.diffalign-app: pyproject.toml | $(BIN)/pip
	@rm -rf build/lib build/bdist.*
	$(BIN)/python -m pip install $(EDITABLE) ".[app]"
	@touch $@ $(VENV)/.diffalign

$(VENV)/.diffalign-docs: pyproject.toml | $(BIN)/pip
	@rm -rf build/lib build/bdist.*
	$(BIN)/python -m pip install $(EDITABLE) ".[docs]"
	@touch $@ $(VENV)/.diffalign

$(VENV)/.diffalign-measures: pyproject.toml | $(BIN)/pip
	@rm -rf build/lib build/bdist.*
	$(BIN)/python -m pip install $(EDITABLE) ".[measures]"
	@touch $@ $(VENV)/.diffalign

$(VENV)/.diffalign-dev: pyproject.toml | $(BIN)/pip
	@rm -rf build/lib build/bdist.*
	@echo "Installing diffalign and its tests into $(VENV). PyTorch is several gigabytes, so the first time takes minutes."
	$(BIN)/python -m pip install $(EDITABLE) ".[dev,app]"
	@touch $@ $(VENV)/.diffalign $(VENV)/.diffalign-app $(VENV)/.diffalign-measures

$(BIN)/pip:
	@python="$(PYTHON)"; \
	for candidate in $${python:-python3 python3.13 python3.12 python3.11}; do \
		if "$$candidate" -c '$(IS_NEW_ENOUGH)' 2>/dev/null; then python="$$candidate"; break; else python=; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "diffalign needs Python 3.11 or newer. Found: $$($(or $(PYTHON),python3) --version 2>&1 || true)." >&2; \
		echo "Install one, or name one with: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; \
		exit 1; \
	fi; \
	echo "Creating $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv "$(VENV)"
