# Works with Python 3.11 or newer and pip alone: everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Arguments for the command at hand: make serve ARGS="--port 9000", make test ARGS="-k scheduler".
ARGS ?=

.PHONY: serve native test sanitize clients reliability lint format types imports bench constraints wheel clean

# A few cores shared with other work are used best when each test stays on one of them.
test sanitize clients: export OMP_NUM_THREADS ?= 1

serve: $(READY) native
	$(BIN)/gyrfalcon serve $(ARGS)

# The CPU kernels: compiles what has changed in csrc/, which takes a moment when nothing has.
native:
	$(PYTHON) tools/build_native.py

test: $(READY) native
	$(BIN)/python -m pytest -q $(ARGS)

# The tests of the CPU kernels, which then watch every access to memory and every undefined operation.
sanitize: $(READY) native
	$(BIN)/python tools/build_native.py --sanitize $(BIN)/python -m pytest -q tests/kernels $(ARGS)

# Real clients, each in a small environment of its own under .venv-clients, against a running server.
clients: $(READY) native
	$(BIN)/python tools/client_environments.py
	GYRFALCON_REQUIRE_CLIENTS=1 $(BIN)/python -m pytest -q tests/clients $(ARGS)

# The long trials of docs/reliability.md, about two hours; SECONDS=20 COUNT=300 makes a short form of them.
# The fuzzer follows the code where atheris is installed: `pip install -e .[fuzz]`.
SECONDS ?= 1800
COUNT ?= 10000
reliability: $(READY) native
	$(BIN)/python -m pytest -q tests/reliability
	$(BIN)/python -m tests.reliability.campaign soak --seconds $(SECONDS)
	$(BIN)/python -m tests.reliability.campaign overload --seconds $(shell expr $(SECONDS) / 30 + 5)
	$(BIN)/python -m tests.reliability.campaign disconnects --count $(COUNT)
	$(BIN)/python -m tests.reliability.campaign crowd --count 200
	$(BIN)/python -m tests.reliability.campaign fuzz --seconds $(SECONDS)
	$(BIN)/python -m tests.fuzz all --seconds $(shell expr $(SECONDS) / 3 + 1)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports

bench: $(READY) native
	$(BIN)/gyrfalcon bench $(ARGS)

wheel:
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

# Pins what the environment holds now. The build of torch (+cpu, +cu130) is left to the machine.
constraints: $(READY)
	echo '# What CI runs with. Written by `make constraints`.' > constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' >> constraints.txt

# The stamp is younger than what it was installed from: nothing is installed twice.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .venv-clients build dist src/gyrfalcon/kernels/cpu/libgyrfalcon_cpu.so .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
