# The two commands: `make demo` and `make test`. Both create .venv and install what they need.
SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
SEED ?= 0
OUT ?= runs/demo

.PHONY: demo test test-scale test-backends lint docs audit

.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 with venv found; install one or run: make PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,docs]"
	@touch $@

demo: .venv/.installed
	$(BIN)/dare train recipes/tiny/llada_sft.yaml seed=$(SEED) --out $(OUT)/sft
	$(BIN)/dare train recipes/tiny/llada_rl.yaml seed=$(SEED) model.path=$(OUT)/sft --out $(OUT)/rl
	$(BIN)/dare report $(OUT)/rl --baseline $(OUT)/sft --out $(OUT)/report

test: lint
	$(BIN)/python -m pytest -n auto

# verl needs an older transformers than constraints.txt has, hence an environment of its own.
.venv-verl/.installed: pyproject.toml constraints-verl.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 with venv found; install one or run: make PYTHON=/path/to/python"; exit 1; }
	test -x .venv-verl/bin/python || $(PYTHON) -m venv .venv-verl
	.venv-verl/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-verl.txt -e ".[verl]" pytest
	@touch $@

test-scale: .venv-verl/.installed
	OMP_NUM_THREADS=1 timeout 1200 .venv-verl/bin/python -m pytest tests/scale

# OpenCompass needs numpy 1, hence an environment of its own; lm-eval and the server share it.
.venv-backends/.installed: pyproject.toml constraints-backends.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 with venv found; install one or run: make PYTHON=/path/to/python"; exit 1; }
	test -x .venv-backends/bin/python || $(PYTHON) -m venv .venv-backends
	.venv-backends/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-backends.txt -e ".[opencompass,lm-eval,serve]" pytest
	@touch $@

test-backends: .venv-backends/.installed
	OMP_NUM_THREADS=1 timeout 1200 .venv-backends/bin/python -m pytest tests/backends

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# pip-audit is in an environment of its own, so that it does not count among what we require.
audit: .venv/.installed
	$(BIN)/python tools/licences.py --extra dev --extra tensorboard
	test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/python -m pip install --quiet pip-audit; }
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

# The documentation as a site: build/site. The tests build it too.
docs: .venv/.installed
	$(BIN)/mkdocs build --strict
