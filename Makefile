# The two commands a newcomer needs are `make run` and `make test`; each sets up all it uses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := smollm2 gemma search joblib submitit bench postgres dev
RAY := .venv-ray
export PYTHONPATH := $(CURDIR)
# What is imported is compiled at its first import, not all of 3 GB as it is installed: a minute less.
INSTALL := install -q --no-compile --disable-pip-version-check
export PYTHONDONTWRITEBYTECODE :=

.PHONY: run test audit lint format ui bench lock clean debian ray

run: $(READY)
	$(BIN)/python -m src.run $(ARGS)

# Two processes of one thread each: many tests wait for other programs. In the files' own order: xdist would keep those
# with few tests for the end, which are the longest, and one process would wait for the other.
test: lint audit debian ray
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Known vulnerabilities of the locked packages, where PyPI can be asked.
audit: $(READY)
	$(BIN)/python -m tests.audit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# How fast against what a user would write, as tables: half an hour on an idle machine. ARGS="--only train" for a part.
bench: $(READY)
	$(BIN)/python -m bench.speed $(ARGS)

ui: $(READY)
	$(BIN)/python -m src.ui $(ARGS)

# torch goes in by itself, with its dependencies: where pip finds the CUDA build, it brings the CUDA
# packages. Everything else stands complete in the lock, so pip need not resolve anything.
$(READY): requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip $(INSTALL) $$(grep '^torch==' requirements.lock)
	$(BIN)/python -m pip $(INSTALL) --no-deps -r requirements.lock
	touch $@

# An environment on top of the other, for `hydra/launcher=ray` alone: 320 MB, and an older cloudpickle.
ray: $(RAY)/.ready

$(RAY)/.ready: $(READY) requirements-ray.lock
	$(BIN)/python -m venv --without-pip $(RAY)
	$(BIN)/python -m pip --python $(RAY)/bin/python $(INSTALL) --no-deps -r requirements-ray.lock
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  >$$($(RAY)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/tli.pth
	touch $@

# Debian packages that tests read from (dictionaries). Without root they are left out and those
# tests say so.
debian: $(READY)
	@tests/debian.sh

# The second lock holds what the extra `ray` needs in other versions than the rest, and what nothing else needs.
COMPILE := $(BIN)/uv pip compile -q --universal --python-version 3.11 --no-header --no-annotate
lock:
	$(COMPILE) $(addprefix --extra ,$(EXTRAS)) --upgrade pyproject.toml -o requirements.lock
	cp requirements.lock .ray.lock
	$(COMPILE) --extra ray pyproject.toml -o .ray.lock
	grep -vxFf requirements.lock .ray.lock >requirements-ray.lock
	rm .ray.lock

clean:
	rm -rf $(VENV) $(RAY) .pytest_cache .ruff_cache
