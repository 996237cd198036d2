# The two commands a newcomer needs are `make run` and `make test`; each sets up all it uses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PYTHONPATH := $(CURDIR)
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: run test lint format ui bench lock clean debian

run: $(READY)
	$(BIN)/python -m src.run $(ARGS)

test: lint debian
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Prints the tables of docs/performance.md: half an hour on an idle machine. ARGS="--only train" for a part.
bench: $(READY)
	$(BIN)/python -m bench.speed $(ARGS)

ui: $(READY)
	$(BIN)/python -m src.ui $(ARGS)

# torch goes in by itself, with its dependencies: where pip finds the CUDA build, it brings the CUDA
# packages. Everything else stands complete in the lock, so pip need not resolve anything.
$(READY): requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements.lock
	touch $@

# Debian packages that tests read from (dictionaries). Without root they are left out and those
# tests say so.
debian: $(READY)
	@tests/debian.sh

lock:
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --all-extras --no-header --no-annotate \
	  --upgrade pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
