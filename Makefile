# make demo   see a model's KV cache leave one process and come back in another
# make test   everything that guards main: types, style, layers, stubs, tests
# Both create .venv on first use and need neither root nor anything installed for all users.
# make deb    a Debian package of the daemon in dist/ (systemd/debian/build says what is in it)
# make lock  versions and hashes of what the service needs, in systemd/requirements.txt
# make day    a day in the life of one host, told as it happens
# make cluster   three hosts, a router in front and an object store behind: one is killed, one is cut off
# make test-skew   an earlier version's clients with this daemon, and the other way round
# make man    the manual pages in systemd/man anew, from the commands and settings
# make engines test-engines   tests with real engines, in .venv-vllm (3.4 GB), .venv-sglang (1.4 GB), .venv-mooncake (0.2 GB)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Several things side by side, and what each says when it is over.
BESIDE := $(MAKE) --no-print-directory --output-sync=target

# Tests start some 700 processes; without bytecode each compiles its sources again, a quarter of a daemon's start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo cluster test test-unit test-rest test-slow test-long test-skew compiled engines test-engines test-engines-long check bench stubs reference man deb clean

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (first run downloads PyTorch: some minutes without a word)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/python -m bench.demo

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check . 
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python proto/generate.py --check

# What a first start compiles, so that no test waits for it.
compiled: $(STAMP)
	@$(BIN)/python -m compileall -q proto kernels kvstore daemon clients bench tests
	@$(BIN)/python -c 'from kvstored.warmup import warm_up; warm_up()'

# Long parts first. One more than there are processors: who waits for a process or a drive leaves it to another.
PARTS := rest unit integration-s-z integration-a-d integration-e-l integration-m-r
SHORT := $(BIN)/python -m pytest -m 'not slow and not long and not engines and not skew'
SLOW := $(BIN)/python -m pytest -m 'slow and not long and not engines and not skew'

test: $(STAMP)
	@$(BESIDE) --jobs=3 check $(PARTS:%=test-%)

test-unit: compiled
	@$(SHORT) tests/unit

test-integration-%: compiled
	@$(SHORT) tests/integration/test_[$*]*.py

test-rest: compiled
	@$(SHORT) tests --ignore=tests/unit --ignore=tests/integration

# What takes seconds a test and would make `test` longer than a break: CI runs it after `test`.
SLOW_PARTS := rest integration-a-d integration-e-z

test-slow: $(STAMP)
	@$(BESIDE) --jobs=3 $(SLOW_PARTS:%=test-slow-%)

test-slow-integration-%: compiled
	@$(SLOW) tests/integration/test_[$*]*.py

test-slow-rest: compiled
	@$(SLOW) tests --ignore=tests/integration

test-long: test test-slow
	@$(BIN)/python -m pytest -m 'long and not engines and not skew' --figures bench/results/test_long.json

# A day in the life of one host, told as it happens: install, serve, upgrade, a full drive, one that is pulled, no power.
day: $(STAMP) compiled
	@$(BIN)/python -m tests.e2e.day

# Three daemons, a router in front, an object store (and Mooncake, after `make engines`) behind, and trouble.
cluster: $(STAMP) compiled
	@$(BIN)/python -m bench.cluster

# Clients and daemons of earlier versions, built from history, with those of today.
test-skew: $(STAMP)
	@$(BIN)/python -m tests.skew.previous
	@$(BIN)/python -m pytest -m skew tests/skew

engines: $(STAMP)
	@$(BIN)/python -m bench.engines.setup

test-engines: $(STAMP)
	@$(BIN)/python -m pytest -m 'engines and not long'

test-engines-long: $(STAMP)
	@$(BIN)/python -m pytest -m 'engines and long'

bench: $(STAMP)
	@$(BIN)/python -m bench hot --json bench/results/hot.json
	@$(BIN)/python -m bench dram --json bench/results/dram.json
	@$(BIN)/python -m bench disk --json bench/results/disk.json
	@$(BIN)/python -m bench restart --json bench/results/restart.json
	@$(BIN)/python -m bench peers --json bench/results/peers.json

stubs: $(STAMP)
	@$(BIN)/python proto/generate.py

# The client's reference, from its docstrings.
reference: $(STAMP)
	@$(BIN)/python clients/reference.py > clients/API.md

# Manual pages, from what the commands and the table of settings say.
man: $(STAMP)
	@$(BIN)/python systemd/man/generate.py

# Versions and hashes of what the service needs. Pins stay as they are where they can: make lock UPGRADE=--upgrade
lock: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip compile --quiet $(UPGRADE) --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-header --no-annotate --extra daemon --extra ctl --extra encryption --output-file systemd/requirements.txt \
	    pyproject.toml >/dev/null

deb:
	@systemd/debian/build

clean:
	rm -rf $(VENV) $(VENV)-vllm $(VENV)-sglang $(VENV)-mooncake build dist *.egg-info
