# make demo   trains a small vision-language model from nothing and talks to it (14 minutes on 2 cores)
# make test   runs the tests (10 minutes)
PYTHON ?= python3
.DEFAULT_GOAL := demo
.PHONY: demo test

demo: .venv/installed
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash runs/demo.sh

test: .venv/installed-dev
	.venv/bin/python -m pytest

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements.txt requirements-dev.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch .venv/installed $@
