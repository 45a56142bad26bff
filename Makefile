# make train: the default run, from nothing.  make test: the whole suite.  make check: lint, types.
# make docs: the generated tables of docs/rules.md.
# make gpu: what needs a CUDA card, and its table.  make gpu TORCH=2.11.0: the same with that torch.
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

gpu: $(if $(TORCH),.venv/torch-$(TORCH)/dev,.venv/dev)
	$(dir $<)bin/python benchmarks/gpu.py $(GPU)

# An environment of its own for another torch, which wants another setuptools
.venv/torch-$(TORCH)/dev: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(@D)
	sed 's/^torch==.*/torch==$(TORCH)/' requirements.txt > $(@D)/all.txt
	grep -v -e ^-r -e ^setuptools requirements-dev.txt >> $(@D)/all.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $(@D)/all.txt
	touch $@

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

# What is generated there: the tables of rules
docs: .venv/run
	.venv/bin/python -m scripts.rules_tables

.DELETE_ON_ERROR:
.PHONY: train test check gpu docs
