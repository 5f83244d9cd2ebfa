# The book and its package. Every target is a line or two; the work is done by tools/.
PYTHON ?= python3
PY := .venv/bin/python

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 24

install: .venv/installed  ## Create .venv with the exact versions of constraints.txt
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[book,test,neural,cluster]'
	@touch $@

book: .venv/installed  ## Build the site and say where it lies
	$(PY) -m tools.check
	.venv/bin/jupyter-book build . -n -W --keep-going -q
	@echo "The book: file://$(CURDIR)/_build/html/index.html"

test: book  ## Lint, types, architecture, tests, every notebook, the site in a browser
	$(PY) -m tools.test

serve: .venv/installed  ## Serve the site on localhost, rebuilt on save
	.venv/bin/jupyter-book config sphinx . && PYTHONPATH=book/_ext .venv/bin/sphinx-autobuild . _build/html --ignore '*/.*' --ignore '*/_build/*' --open-browser

lab: .venv/installed  ## Open the notebooks in JupyterLab
	.venv/bin/jupyter lab notebooks

execute: .venv/installed  ## Re-execute all notebooks, or NB=notebooks/part/slug.ipynb
	$(PY) -m tools.execute $(NB)

chapter: .venv/installed  ## Scaffold a chapter: PART=... SLUG=...
	$(PY) -m tools.chapter $(PART) $(SLUG)

bench: .venv/installed  ## Race against named peers: all, or PART=... SLUG=...
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(PY) -m tools.bench $(PART) $(SLUG)

test-gpu: .venv/installed  ## The tests that need a CUDA device
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[gpu]' && $(PY) -m pytest tests -m gpu -o addopts=-ra

dist: .venv/installed  ## Build sdist and wheel of algokit-book into dist/
	$(PY) -m build --outdir dist .

set-repository: .venv/installed  ## Point every link and set-up cell at URL=...
	$(PY) -m tools.set_repository $(URL)

.PHONY: help install book test serve lab execute chapter bench test-gpu dist set-repository
