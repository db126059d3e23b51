# make demo   see a job survive every kind of death, in under a minute
# make test   lint, types, import contracts and all tests
#
# make install   for the whole machine, as root; see README. PREFIX, DESTDIR, SYSCONFDIR, UNITDIR
#                and the like are honoured (install/places.py)
#
# The first two set themselves up in a private .venv. Needed: python3 (>= 3.11), python3-venv, make.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest

export PREFIX DESTDIR SYSCONFDIR MANDIR UNITDIR USERUNITDIR SYSUSERSDIR TMPFILESDIR CATALOGDIR
export BASHCOMPDIR ZSHCOMPDIR FISHCOMPDIR
INSTALLER := env -u PYTHONPATH -u PYTHONHOME PYTHONUTF8=1 $(PYTHON) -s -B -m install
NEEDS_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || { echo "ckptd needs python >= 3.11; choose one: make PYTHON=python3.12" >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help install uninstall demo test test-systemd test-vm check lint types imports unit crash crashdisk mutants sim states torture soak calm bench bench-systemd fuzz figures format clean

help:  ## show what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

install:  ## install or upgrade: daemon, units, man pages, completions (PREFIX=/usr/local)
	@$(NEEDS_PYTHON)
	@$(INSTALLER) install

uninstall:  ## remove all that; configuration, data and running tasks stay
	@$(NEEDS_PYTHON)
	@$(INSTALLER) uninstall

demo: $(VENV)/.runtime  ## kill the task, the daemon and everything; watch the work carry on
	@$(BIN)/python examples/demo.py

test: lint types imports  ## everything that must hold before a change lands (minutes)
	$(PYTEST) -n 2 --dist loadgroup -m "not slow" --ignore tests/booted

test-systemd: $(VENV)/.dev  ## the same code under booted systemd 252 and 257 (root; the first time builds trees)
	$(PYTEST) -n 2 --dist loadgroup -m "nspawn and not vm" -p no:randomly -rs --timeout 1800 tests/booted

test-vm: $(VENV)/.dev  ## on a virtual machine: memory limits, power cuts, shutdown (root; CKPTD_ROUNDS scales)
	$(PYTEST) -m vm -p no:randomly -rs --timeout 1800 $(VM_ARGS) tests/booted

check: lint types imports unit  ## the short form, while writing (under a minute)

crash: $(VENV)/.dev  ## the long form of the crash tests: 1,000 rounds and all slow tests
	CKPTD_ROUNDS=$${CKPTD_ROUNDS:-1000} $(PYTEST) -n 2 --dist loadgroup --timeout 1800 --ignore tests/booted tests

crashdisk: $(VENV)/.dev  ## power cuts and faults below real ext4, xfs and btrfs (root; CRASHDISK_ARGS)
	$(BIN)/python -m tests.crashdisk $(CRASHDISK_ARGS)

fuzz: $(VENV)/.fuzz  ## foreign bytes at every entrance, led by coverage (SECONDS_EACH, FUZZ_ARGS)
	$(BIN)/python -m tests.fuzz --seconds $${SECONDS_EACH:-10} $(FUZZ_ARGS)

mutants: $(VENV)/.dev  ## seeded mistakes: each must be noticed by a test (ONLY=wal-*)
	$(BIN)/python -m tests.mutants -j 2 $(ONLY)

sim: $(VENV)/.dev  ## the whole daemon in simulated time, through every fault (SEED=n tells one life; SECONDS=, FOREVER=1)
	$(BIN)/python -m tests.sim $(if $(SEED),--seed $(SEED)) $(if $(SECONDS),--seconds $(SECONDS) --first 0) $(if $(FOREVER),--forever --first 0)

states: $(VENV)/.dev  ## a million ways a power cut may leave the log, each recovered and judged (SEED)
	$(BIN)/python -m tests.sim.states $${SEED:+--seed $$SEED}

torture: $(VENV)/.dev  ## kill real processes for a given time, audit every side effect (FOR_S, SEED)
	$(BIN)/python -m tests.torture --seconds $${FOR_S:-120} $${SEED:+--seed $$SEED}

soak: $(VENV)/.dev  ## an hour of mixed traffic with a kill every few seconds: nothing grows (FOR_S, SEED)
	$(BIN)/python -m tests.torture --soak --seconds $${FOR_S:-3600} $${SEED:+--seed $$SEED}

calm: $(VENV)/.dev  ## half an hour of the same in which the daemon alone is left alive: its memory stands (FOR_S, SEED)
	$(BIN)/python -m tests.torture --calm --seconds $${FOR_S:-1800} $${SEED:+--seed $$SEED}

figures: $(VENV)/.dev  ## take the last figures of the rigs over into docs/reliability.md
	$(BIN)/python -m tests.reliability

bench: $(VENV)/.runtime  ## speed and size as ratios; writes bench.json
	$(BIN)/python -m bench

bench-systemd: $(VENV)/.dev  ## starts as units beside bare systemd-run, in booted machines (root)
	$(BIN)/python -m tests.booted.bench_units

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

unit: $(VENV)/.dev
	$(PYTEST) -n 2 -m "not slow" --ignore tests/crash --ignore tests/booted --ignore tests/test_docs.py

format: $(VENV)/.dev  ## let ruff lay out the code
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:  ## remove what was built (the .venv too)
	rm -rf $(VENV) build *.egg-info bench.json
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up, once: a stamp per set of packages, renewed when pyproject.toml changes ------------

$(BIN)/python:
	@$(NEEDS_PYTHON)
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml | $(BIN)/python
	$(PIP) install --use-pep517 --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(PIP) install --use-pep517 --editable '.[dev]'
	@touch $@ $(VENV)/.runtime

$(VENV)/.fuzz: $(VENV)/.dev
	$(PIP) install --use-pep517 --editable '.[fuzz]' || echo "fuzz: no atheris for this Python; by chance alone"
	@touch $@
