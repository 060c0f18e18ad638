# Everything a newcomer types. Needs Python 3.11 or newer and make; .ci/setup fetches the rest into .tools and .venv.
#   make run ARGS="--port 9000"      make test ARGS="tests/config -k port"

.DEFAULT_GOAL := help
SHELL := /bin/sh
PY := .venv/bin/python
ARGS ?=
# All tests run in two processes, a module in one of them; a part of them (ARGS) in one.
JOBS ?= 2

.PHONY: help run cluster test check format bench mutants soak docs screenshots clean setup setup-run setup-cluster

help:  ## Show this list
	@echo 'Tidings: make <target> [ARGS="..."]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile

run: setup-run  ## Set up what the server needs and start it on ./data
	@TIDINGS_DEMO="$${TIDINGS_DEMO:-on}" exec .venv/bin/tidings serve $(ARGS)

cluster: setup-cluster  ## Start PostgreSQL, NATS and three nodes here, to try what survives
	@exec .venv/bin/tidings cluster $(ARGS)

test: setup  ## Set up everything and run the tests, style and type checks included
	@exec $(PY) -m pytest $(if $(ARGS),,-n $(JOBS) --dist loadfile) $(ARGS)

check: setup  ## ruff, mypy --strict and the import contracts, without the tests
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict
	.venv/bin/lint-imports

format: setup  ## Rewrite the sources as ruff wants them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup  ## Measure; bench/README.md says what each line means
	@exec $(PY) -m bench $(ARGS)

mutants: setup  ## Break the product on purpose; every check must notice
	@exec $(PY) -m tests.mutants $(ARGS)

soak: setup  ## The tests that take long: real conversations, faults and kills
	@exec $(PY) -m pytest -m soak --timeout=0 $(ARGS)

docs: setup  ## Regenerate the reference pages that come from the code
	@mkdir -p docs/reference
	$(PY) -m tidings.server.config > docs/reference/configuration.md
	$(PY) -m docs.generate

screenshots: setup  ## Take the pictures of the demonstration in docs/images
	@exec $(PY) -m docs.screenshots

clean:  ## Remove what make built; ./data stays
	rm -rf .venv .tools .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

setup:
	@sh .ci/setup dev

setup-run:
	@sh .ci/setup run

setup-cluster:
	@sh .ci/setup cluster
