# `make demo` and `make test` are all that a newcomer needs. Every target installs what is missing.
SHELL := /bin/bash
UV ?= $(shell command -v uv || echo .uv/bin/uv)
RUN := $(UV) run --frozen
# pytest-xdist distributes whole test files over this many worker processes, in the order of the files:
# its own order (most tests first) would start the long files that have few tests last.
# Each worker imports Megatron-Core (20 s) and forks up to eight ranks.
WORKERS ?= 2
PYTEST := $(RUN) pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Further arguments of pytest, e.g. `make test PYTEST_ARGS="-k exaone4 --durations=10"`.
PYTEST_ARGS ?=
export PYTHONDONTWRITEBYTECODE =
export MEGATRON_SUPPRESS_FUSION_WARNINGS = 1

.PHONY: demo test test-slow test-all test-engines check docs setup requirements clean

demo: setup
	$(RUN) exaone-bridge demo
	@echo 'The command is .venv/bin/exaone-bridge (or: source .venv/bin/activate).'

test: setup
	$(PYTEST) -m "not slow and not gpu and not engine" $(PYTEST_ARGS)

test-slow: setup
	$(PYTEST) -m "slow and not gpu and not engine" $(PYTEST_ARGS)

test-all: setup
	$(PYTEST) -m "not gpu and not engine" $(PYTEST_ARGS)

# llama.cpp and vLLM read our exports. Compiles llama.cpp and downloads both: half an hour at first.
test-engines: setup
	$(RUN) pytest -m engine -s tests/engines $(PYTEST_ARGS)

check: setup
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(RUN) lint-imports

# The site is docs/_build/html/index.html. A broken link or an unknown reference is an error.
docs: setup
	rm -rf docs/_build docs/api
	$(RUN) --group docs sphinx-build --fail-on-warning --keep-going --quiet docs docs/_build/html

# The packages of the lock file without those for development, for `pip install --no-deps -r`.
REQUIREMENTS ?= src/exaone_bridge/requirements-cpu.txt
requirements:
	@{ echo "# Every package that exaone-bridge needs on Linux without a GPU, from uv.lock."; \
	echo "# pip install --no-deps -r requirements-cpu.txt; docs/compatibility.md says why."; \
	$(UV) export --quiet --frozen --no-dev --all-extras --no-hashes --no-emit-project \
	--no-annotate --no-header | sed "s/ or sys_platform == 'never'$$//; \
	/== '\(never\|win32\|emscripten\)'$$/d"; } > $(REQUIREMENTS)

setup: .venv/.ready

# Bytecode is compiled once here, because importing Megatron-Bridge reads some 2,000 modules.
.venv/.ready: pyproject.toml uv.lock
	@$(UV) --version >/dev/null 2>&1 || { python3 -m venv .uv && .uv/bin/pip install --quiet uv; }
	$(UV) sync --frozen --compile-bytecode
	@touch $@

clean:
	rm -rf .venv .uv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache \
		docs/_build docs/api
