# Everything a newcomer needs: `make demo`, `make test`. Both set up what is missing.
SHELL := /bin/bash
UV ?= $(shell command -v uv || echo .uv/bin/uv)
RUN := $(UV) run --frozen
# Processes that share the test files, in their order: the long files with few tests in them would come last otherwise.
# Each imports Megatron and forks up to eight ranks of its own.
WORKERS ?= 2
export PYTHONDONTWRITEBYTECODE =
export MEGATRON_SUPPRESS_FUSION_WARNINGS = 1

.PHONY: demo test check setup clean

demo: setup
	$(RUN) exaone-bridge demo

test: setup
	$(RUN) pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: setup
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(RUN) lint-imports

setup: .venv/.ready

# Bytecode is compiled once here, because importing Megatron-Bridge reads some 2,000 modules.
.venv/.ready: pyproject.toml uv.lock
	@$(UV) --version >/dev/null 2>&1 || { python3 -m venv .uv && .uv/bin/pip install --quiet uv; }
	$(UV) sync --frozen --compile-bytecode
	@touch $@

clean:
	rm -rf .venv .uv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
