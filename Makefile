# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Needed: Python 3.11 or later. With Node.js 20 or later the web page is built too.
PYTHON ?= python3
VENV ?= .venv
SMOKE ?= .venv-smoke
SUPPLY ?= .venv-supply
PORT ?= 8000
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
VIEWER := static/dist/index.html
VIEWER_SOURCES := $(wildcard static/src/*) static/package.json static/package-lock.json

# What the Docker image installs: its Python, and the extras beside cpu or gpu.
IMAGE_PYTHON := 3.13
IMAGE_EXTRAS := store objects
LOCK = UV_CUSTOM_COMPILE_COMMAND='make locks' $(SUPPLY)/bin/uv pip compile -q --no-config --generate-hashes --universal \
	--only-binary :all: --python-version $(IMAGE_PYTHON) --no-python-downloads --no-emit-index-url --no-annotate $(LOCK_FLAGS)

.PHONY: demo test check unit smoke viewer locks audit clean

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
	if command -v npm >/dev/null; then cd deploy && { [ -d node_modules ] || npm ci; } && npm run check; fi

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

# Versions that are in the locks already stay; LOCK_FLAGS=--upgrade takes the newest that constraints.txt allows.
locks: $(SUPPLY)/.installed  ## the versions and hashes that the Docker image installs
	$(LOCK) pyproject.toml -c constraints.txt --extra cpu $(IMAGE_EXTRAS:%=--extra %) -o locks/cpu.txt
	$(LOCK) pyproject.toml -c constraints.txt --extra gpu $(IMAGE_EXTRAS:%=--extra %) -o locks/gpu.txt
	$(SUPPLY)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' | \
		$(LOCK) - -o locks/build.txt

# Needs a network. --strict: what could not be looked up is a failure, for otherwise nothing looked up is a success.
audit: $(SUPPLY)/.installed  ## known vulnerabilities of what the image and the web page are made of
	@failed=; \
	for lock in locks/*.txt; do \
		echo "$$lock"; $(SUPPLY)/bin/pip-audit --strict --disable-pip --require-hashes -r "$$lock" || failed=1; \
	done; \
	for folder in static deploy; do (cd $$folder && npm audit) || failed=1; done; \
	[ -z "$$failed" ]

$(SUPPLY)/.installed: Makefile
	$(PYTHON) -m venv $(SUPPLY)
	$(SUPPLY)/bin/python -m pip --disable-pip-version-check -q install uv==0.13.9 pip-audit==2.10.1
	touch $@

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
	rm -rf $(VENV) $(SMOKE) $(SUPPLY) static/dist static/node_modules deploy/node_modules
