# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Needed: Python 3.11 or later. With Node.js 20 or later the web page is built too.
PYTHON ?= python3
VENV ?= .venv
SMOKE ?= .venv-smoke
PORT ?= 8000
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
VIEWER := static/dist/index.html
VIEWER_SOURCES := $(wildcard static/src/*) static/package.json static/package-lock.json

.PHONY: demo test check unit smoke viewer clean

demo: $(VENV)/.installed $(VIEWER)  ## classify a sample scene and show it in the browser
	$(BIN)/geocentroids demo --port $(PORT)

test: check unit smoke  ## everything that CI runs

check: $(VENV)/.tested  ## formatting, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	if command -v npm >/dev/null; then cd static && npm run check && npm test; fi

unit: $(VENV)/.tested $(VIEWER)  ## the tests
	$(BIN)/pytest -n auto --dist loadfile

# The main job on another Python than the one above, where one is installed, with the light set-up only.
smoke: $(VIEWER)
	@other=$$(for p in python3.13 python3.12 $(wildcard $(HOME)/.pyenv/versions/3.13*/bin/python $(HOME)/.pyenv/versions/3.12*/bin/python); do \
		"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$p" && break; done); \
	if [ -z "$$other" ]; then echo "smoke: no Python 3.12 or 3.13 is installed, skipped"; exit 0; fi; \
	set -e; "$$other" --version; \
	[ -x $(SMOKE)/bin/python ] || "$$other" -m venv $(SMOKE); \
	$(SMOKE)/bin/python -m pip --disable-pip-version-check -q install -c constraints.txt '.[cpu]' pytest; \
	$(SMOKE)/bin/pytest -q -c /dev/null --rootdir tests --noconftest -p no:cacheprovider --import-mode=importlib tests/test_smoke.py

viewer: $(VIEWER)  ## the web page

$(VIEWER): $(VIEWER_SOURCES)
	@if command -v npm >/dev/null; then cd static && npm ci --no-audit --no-fund && npm run build; \
	else echo "npm was not found: the server runs without its web page (install Node.js 20, then: make viewer)"; fi

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or later is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -U 'pip>=25.1'

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt hatch_build.py
	$(PIP) install -c constraints.txt -e '.[cpu]'
	touch $@

$(VENV)/.tested: $(VENV)/.installed fit/pyproject.toml
	$(PIP) install -c constraints.txt -e '.[cpu,torch]' -e fit --group dev
	touch $@

clean:
	rm -rf $(VENV) $(SMOKE) static/dist static/node_modules
