# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready

.PHONY: setup demo test check docs verify clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "PocketGLM needs Python 3.11 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@echo "setting up .venv (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/pocketglm demo --force

# Two test processes with one compute thread each: two cores, and no fight over them.
test: $(STAMP)
	@rm -f .coverage .coverage.*
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist loadfile \
	  --cov --cov-report= $(ARGS)
	@$(BIN)/python -m coverage report --fail-under=100 --show-missing --skip-covered \
	  --include='*/pocketglm/errors.py,*/pocketglm/contracts.py,*/pocketglm/registry.py,*/pocketglm/artifacts/*,*/pocketglm/text/*'
	@$(BIN)/python -m coverage report --fail-under=90 --format=total > /dev/null || \
	  { $(BIN)/python -m coverage report --show-missing --skip-covered; exit 1; }

check: $(STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python docs/generate.py --check
	@$(BIN)/python docs/cost_model.py --check

docs: $(STAMP)
	@$(BIN)/python docs/generate.py
	@$(BIN)/python docs/cost_model.py

# The slow checks that CI cannot hold (Transformers.js, llama.cpp, emulated aarch64 cores, Chromium);
# installs what they need (npm, apt-get, a compiler), keeps it in runs/verify, writes docs/verified.md.
verify: $(STAMP)
	@$(BIN)/python tests/verify/run.py

clean:
	rm -rf .venv out runs .coverage* .mypy_cache .ruff_cache .pytest_cache
