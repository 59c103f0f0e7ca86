# make demo, make train, make generate, make test: each makes .venv when it is missing, installs what it needs, and runs.
# make fuzz: COUNT attention programs put together at random, from SEED on, and a few of them in Triton's interpreter.
# make check: what CI runs.
#
# torch is installed first and alone, so that nothing else chooses a build of it. On a machine without a GPU whose index
# serves CUDA builds by default, TORCH_INDEX=https://download.pytorch.org/whl/cpu spares several GB.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
TORCH_INDEX ?=
# Processes that share the tests.
JOBS ?= 2
COUNT ?= 20000
SEED ?= 0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

.PHONY: demo train generate test fuzz check clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

train: $(VENV)/.demo
	$(BIN)/python examples/train_gpt.py

generate: $(VENV)/.demo
	$(BIN)/python examples/generate.py

test: $(VENV)/.test
	$(BIN)/pytest -n $(JOBS) --dist worksteal

fuzz: $(VENV)/.test
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m fuzz --count $(COUNT) --seed $(SEED)
	OMP_NUM_THREADS=1 PYTHONPATH=tests TRITON_INTERPRET=1 $(BIN)/python -m fuzz --count $$(($(COUNT) / 40)) --seed $(SEED)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(VENV)/mypy && mkdir -p $(VENV)/mypy/flashfuse
	ln -sfn $(CURDIR)/patterns $(CURDIR)/kernels $(CURDIR)/fusion/*.py $(CURDIR)/fusion/py.typed $(VENV)/mypy/flashfuse/
	MYPYPATH=$(VENV)/mypy $(BIN)/mypy --package flashfuse
	$(BIN)/pytest tests/test_imports.py

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flashfuse needs Python 3.11 or newer, set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH)
	touch $@

# The extras of pyproject.toml.
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(PIP) install -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
