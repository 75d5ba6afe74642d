# Each target makes the environment it needs. `make` alone lists the targets.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# --no-compile: to compile all 25,000 modules takes a minute; Python compiles those that are imported, once.
PIP := $(PY) -m pip install --no-compile --quiet --disable-pip-version-check
# Tests run in this many processes at most; each one computes on one thread.
MAX_PROCESSES ?= 8
DEMO := work_dirs/demo

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env env-mm report demo transfer-demo test check format docs wheel image release bench clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "PYTHON=python3.11 chooses the interpreter (3.10 or newer) when .venv is made."

env: $(VENV)/.dev ## make .venv: the core, and the tools of development
	@echo "ready: $(VENV) (to enter it: . $(VENV)/bin/activate)"

env-mm: $(VENV)/.mm ## add what detection and segmentation need (mmdetection, mmsegmentation); no compiler
	@echo "ready: detection and segmentation in $(VENV)"

demo: $(VENV)/.core ## pre-train, judge and report on generated scenes; detect and segment too after env-mm; two CPU cores, no data
	$(PY) tools/demo.py --work-dir $(DEMO)

transfer-demo: $(VENV)/.mm ## pre-train, detect and segment on generated scenes, on two CPU cores; needs no data
	$(PY) tools/demo.py --work-dir $(DEMO) --only pretrain_etpp data_coco data_ade20k doctor detection segmentation

report: $(VENV)/.core ## make a report of the runs in work_dirs; ARGS goes to mae-et report
	$(PY) tools/report.py work_dirs --out work_dirs/report $(ARGS)

# One thread a process, or the processes fight for the cores.
test: $(VENV)/.dev $(VENV)/.mm $(VENV)/.browser ## run the tests, in parallel; ARGS="tests/unit -k plan" chooses
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses $(MAX_PROCESSES) --dist worksteal $(ARGS)

check: $(VENV)/.dev ## lint, formatting, wording and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) tools/check_wording.py
	$(VENV)/bin/mypy

format: $(VENV)/.dev ## repair formatting and what lint can repair
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

wheel: $(VENV)/.core ## build dist/*.whl: the package with its configs and the command mae-et
	rm -rf build dist
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
	@echo "built: $$(ls dist/*.whl)"

image: ## build the container image mae-et:cuda and run it; with Docker, or with podman, which root installs on Debian
	tools/image.sh

release: $(VENV)/.dev image ## build the container image, the wheel and the source distribution in dist/, and check them; uploads nothing
	$(PY) tools/release.py

docs: $(VENV)/.docs ## build the documentation as a site, in site/
	$(VENV)/bin/mkdocs build --strict
	@echo "written: site/index.html"

bench: $(VENV)/.core ## measure speed on this machine; ARGS goes to tools/bench.py
	$(PY) tools/bench.py $(ARGS)

clean: ## remove caches and build products; keeps .venv and work_dirs
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV)

# Stamps: written last, so that an install that was broken off runs again.
$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: no $(PYTHON) here; name a Python 3.10 or newer: make PYTHON=python3.11 env" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $$($(PYTHON) --version 2>&1) is too old; name 3.10 or newer: make PYTHON=python3.11 env" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no venv module (on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.core: requirements.txt pyproject.toml setup.py $(VENV)/.python
	@echo "installing requirements.txt (with CUDA, about 3 GB to fetch the first time)"
	$(PIP) --only-binary :all: -r requirements.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements-docs.txt $(VENV)/.core
	@echo "installing requirements-dev.txt"
	$(PIP) --only-binary :all: -r requirements-dev.txt
	@touch $@

$(VENV)/.docs: requirements-docs.txt $(VENV)/.core
	@echo "installing requirements-docs.txt"
	$(PIP) --only-binary :all: -r requirements-docs.txt
	@touch $@

# Without dependencies: what they ask for is in requirements.txt, or not needed. MMCV_WITH_OPS=0: nothing is compiled.
$(VENV)/.mm: requirements-mm.txt $(VENV)/.core
	@echo "installing requirements-mm.txt"
	MMCV_WITH_OPS=0 $(PIP) --no-deps -r requirements-mm.txt
	@touch $@

# Chromium for the tests of the report's page, from the system's packages where that is possible; without it they skip.
$(VENV)/.browser: $(VENV)/.python
	@if command -v chromium chromium-browser google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing chromium for the tests of the report's page"; \
	  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends chromium; } >$(VENV)/browser.log 2>&1 \
	    || echo "no chromium ($(VENV)/browser.log says why): the tests of the report's page will skip"; \
	else echo "no chromium here and no right to install it: the tests of the report's page will skip"; fi
	@touch $@
