# make train: the default run, from nothing.  make test: the whole suite.  make check: lint, types.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check

train: .venv/run config.schema.json
	.venv/bin/python train.py config.json

test: .venv/dev
	.venv/bin/python -m pytest -n 2 --dist worksteal

check: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run: requirements.txt | .venv/bin/python
	@echo "installing requirements.txt into .venv: minutes, once"
	$(PIP) -r requirements.txt
	touch $@

# For editors, which read it where a config names it as its "$$schema"
config.schema.json: adaptiverl/config/schema.py adaptiverl/training/keys.py $(wildcard rewards/*.py) | .venv/run
	.venv/bin/python -m adaptiverl schema > $@

.venv/dev: requirements-dev.txt .venv/run
	$(PIP) -r requirements-dev.txt
	touch $@

.DELETE_ON_ERROR:
.PHONY: train test check
