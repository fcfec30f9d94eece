# The two commands a newcomer needs: `make demo` and `make test`. `make help` lists the rest.
.DEFAULT_GOAL := help
.PHONY: help same-python demo test test-engines lint protos observe dashboards docs bench soak test-board test-packages build clean

# The newest Python on the PATH that boardbench runs on; `make PYTHON=…` chooses another.
PYTHON ?= $(shell deploy/find_python.sh)
VENV ?= .venv
BIN := $(VENV)/bin
# Prometheus and other programs that tests run for real are unpacked here when the system has none.
SYSTEM := .cache/system
# Most tests wait for programs that they start; two at a time halve that, and no test minds company.
PYTEST_WORKERS ?= -n 2 --dist worksteal
export PIP_DISABLE_PIP_VERSION_CHECK = 1

help:  ## Say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "boardbench needs Python 3.10 or newer; found none on the PATH (make PYTHON=/path/to/python3)"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "'$(PYTHON)' is no Python 3.10 or newer"; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "'$(PYTHON) -m venv' failed: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install -q --upgrade 'pip>=25.1'

# A Python that is asked for by name is not passed over because another one was here first.
VERSION := -c 'import sys; print("%d.%d" % sys.version_info[:2])'
same-python: | $(BIN)/python
ifeq ($(origin PYTHON),command line)
	@asked=$$("$(PYTHON)" $(VERSION)) && here=$$($(BIN)/python $(VERSION)) && test "$$asked" = "$$here" || \
		{ echo "$(VENV) is of Python $$here: make clean first, or keep both with VENV=.venv-$$asked"; exit 1; }
endif

$(VENV)/.demo: pyproject.toml | $(BIN)/python same-python
	$(BIN)/python -m pip install -q -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.demo
	$(BIN)/python -m pip install -q --group dev
	@touch $@

demo: $(VENV)/.demo  ## Run the main job here: collector, agent, two models, results, metrics
	$(BIN)/boardbench demo $(DEMO_ARGS)

test: lint $(SYSTEM)/.prometheus $(SYSTEM)/.postgres $(SYSTEM)/.cloud-init .cache/engines/.made  ## Install what the tests need and run them
	PATH="$(CURDIR)/$(BIN):$$PATH:$(CURDIR)/$(SYSTEM)/usr/bin" $(BIN)/python -m pytest -m 'not soak' $(PYTEST_WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/.dev  ## Style, types, import rules, the wire
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/buf breaking --against protos/baseline.binpb

$(SYSTEM)/.prometheus:
	@mkdir -p $(SYSTEM)
	@tests/unpack_debian.sh $(SYSTEM) prometheus prometheus-node-exporter prometheus-alertmanager victoria-metrics \
		prometheus-pushgateway
	@touch $@

# cloud-init's own word on what `boardbench flash` writes for it; none of it is installed or started.
$(SYSTEM)/.cloud-init:
	@mkdir -p $(SYSTEM)
	@tests/unpack_debian.sh $(SYSTEM) cloud-init python3-yaml python3-jsonschema python3-attr python3-pyrsistent \
		python3-configobj python3-six python3-jinja2 python3-markupsafe python3-requests python3-urllib3 \
		python3-chardet python3-idna python3-certifi python3-oauthlib python3-jsonpatch python3-json-pointer \
		python3-netifaces
	@touch $@

$(SYSTEM)/.postgres:
	@mkdir -p $(SYSTEM)
	@tests/unpack_postgres.sh $(SYSTEM)
	@touch $@

.cache/engines/.made: tests/engine_venvs.sh | $(BIN)/python
	@tests/engine_venvs.sh .cache/engines $(BIN)/python
	@touch $@

.cache/engines/.heavy: tests/engine_venvs.sh | $(BIN)/python
	@tests/engine_venvs.sh .cache/engines $(BIN)/python heavy
	@touch $@

# PyTorch comes with ExecuTorch, and has an environment of its own only where that has no wheel.
# Asked of the shell: make keeps in mind what was in a folder before it made it.
TORCH = $(shell ls $(CURDIR)/.cache/engines/executorch/bin/python $(CURDIR)/.cache/engines/torch/bin/python 2>/dev/null | head -n 1)
EXECUTORCH = $(shell ls $(CURDIR)/.cache/engines/executorch/bin/python 2>/dev/null)
test-engines: $(VENV)/.dev .cache/engines/.made .cache/engines/.heavy  ## Every engine, also those of gigabytes (PyTorch, ExecuTorch)
	@test -n "$(TORCH)" || { echo "neither ExecuTorch nor PyTorch could be installed: see .cache/engines/*.log"; exit 1; }
	BOARDBENCH_TORCH_PYTHON="$(TORCH)" BOARDBENCH_EXECUTORCH_PYTHON="$(EXECUTORCH)" $(BIN)/python -m pytest \
		tests/agent/bench/test_runtime_contract.py tests/agent/bench/test_foreign_engines.py \
		tests/agent/bench/test_onnx_plugin.py $(PYTEST_ARGS)
	BOARDBENCH_TORCH_PYTHON="$(TORCH)" $(BIN)/python -m pytest -m soak tests/agent/bench/test_real_models.py $(PYTEST_ARGS)
	PYTHONPATH="$(CURDIR)/agent" "$(TORCH)" -m pytest -p no:cacheprovider -k torch tests/agent/bench/test_runtime_contract.py \
		tests/agent/bench/test_torch.py tests/agent/bench/test_executorch.py $(PYTEST_ARGS)

.cache/protos/.installed: pyproject.toml
	@test -x .cache/protos/bin/python || "$(PYTHON)" -m venv .cache/protos
	@.cache/protos/bin/python -m pip install -q --upgrade 'pip>=25.1'
	@.cache/protos/bin/python -m pip install -q --group protos
	@touch $@

protos: .cache/protos/.installed  ## Write protos/gen anew
	.cache/protos/bin/python protos/generate.py protos/gen

observe: $(VENV)/.demo $(SYSTEM)/.prometheus  ## Boards, collector and Prometheus here, to look around in
	PATH="$(CURDIR)/$(BIN):$$PATH:$(CURDIR)/$(SYSTEM)/usr/bin" $(BIN)/python deploy/observe.py $(OBSERVE_ARGS)

dashboards: $(VENV)/.dev  ## Write deploy/grafana/dashboards anew
	$(BIN)/python deploy/grafana/generate.py

docs: $(VENV)/.demo  ## Build the documentation into site/
	$(BIN)/python -m pip install -q --group docs
	$(BIN)/python docs/generate.py
	$(BIN)/sphinx-build -W -q -b html docs site

bench: $(VENV)/.dev $(SYSTEM)/.prometheus $(SYSTEM)/.postgres  ## Measure boardbench against other tools (an hour; wants a calm machine)
	@$(BIN)/python -m pip install -q --group bench
	PATH="$(CURDIR)/$(BIN):$$PATH:$(CURDIR)/$(SYSTEM)/usr/bin" $(BIN)/python benchmarks/all.py $(BENCH_ARGS)

soak: $(VENV)/.dev $(SYSTEM)/.prometheus $(SYSTEM)/.postgres .cache/engines/.made  ## The long tests
	PATH="$(CURDIR)/$(BIN):$$PATH:$(CURDIR)/$(SYSTEM)/usr/bin" $(BIN)/python -m pytest -m soak --timeout=7200 $(PYTEST_ARGS)

test-board: $(VENV)/.dev  ## Flash an emulated board, boot it, run a model on it (root; QEMU; ten minutes)
	$(BIN)/python -m pytest tests/board tests/deploy/test_life_of_a_package.py -m soak -n 2 --dist loadgroup --timeout=7200 \
		-rs $(PYTEST_ARGS)

test-packages: $(VENV)/.dev  ## Build every package twice and install it in its Debian (root; mmdebstrap; half an hour and more)
	$(BIN)/python -m pytest tests/deploy -m soak --timeout=7200 -rs $(PYTEST_ARGS)

build: $(BIN)/python  ## Build the wheel and the source distribution into dist/
	$(BIN)/python -m pip install -q build
	$(BIN)/python -m build

clean:  ## Remove everything that make made
	rm -rf $(VENV) .cache site dist build
