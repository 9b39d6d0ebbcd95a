# make demo   trains a small vision-language model from scratch and chats with it (7 to 25 minutes on 2 cores)
# make test   runs the tests except those marked slow, in one process per core, up to 4
# make test-all   runs all tests
# make test-faults   injects kills, stalls and damaged files many times (16 minutes on 2 cores)
PYTHON ?= python3
.DEFAULT_GOAL := demo
.PHONY: demo test test-all test-faults

demo: .venv/installed
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash runs/demo.sh

PYTEST = .venv/bin/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal

test: .venv/installed-dev
	$(PYTEST) -m "not slow"

test-all: .venv/installed-dev
	$(PYTEST)

test-faults: .venv/installed-dev
	FAULTS=full .venv/bin/python -m pytest tests/faults

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements.txt requirements-dev.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch .venv/installed $@
