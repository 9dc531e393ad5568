# Everything a newcomer needs: `make demo` and `make test` do all their own set-up, with Python 3.11 and make.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# A bare "torch" may be a CUDA build of several gigabytes; this is the release that the tests were run with.
TORCH  ?= torch==2.13.0

.PHONY: demo test test-slow test-everywhere lint docs docs-check bench clean

demo: $(VENV)/ready
	$(BIN)/python -m tools.demo demo

test: $(VENV)/ready lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(VENV)/clients
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# The tests once more under the conditions of other machines: each takes about as long as `make test`.
test-everywhere: $(VENV)/ready
	PYTHON=$(CURDIR)/$(BIN)/python tools/test_everywhere

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# mypy does not know that converters/ installs as qformat.converters: show it the installed layout.
	mkdir -p build/types/qformat
	ln -sfn $(CURDIR)/qformat/* $(CURDIR)/converters build/types/qformat/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml

# The documentation as a site, in build/site.
docs: $(VENV)/ready
	$(BIN)/python -m tools.docs.build

# The commands that README.md and docs/*.md show, run; minutes. Some pages: `make docs-check PAGES=docs/hub.md`.
docs-check: $(VENV)/clients
	$(BIN)/python -m tools.docs.check $(PAGES)

bench: $(VENV)/ready
	$(BIN)/python -m tools.bench.codec
	$(BIN)/python -m tools.bench.convert

clean:
	rm -rf $(VENV) demo build dist *.egg-info

$(VENV)/ready: pyproject.toml .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c .ci/constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c .ci/constraints.txt -e '.[dev]'
	touch $@

# Programs of others that only the slow tests and docs/programs.md run.
$(VENV)/clients: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c .ci/constraints.txt -e '.[clients]'
	touch $@
