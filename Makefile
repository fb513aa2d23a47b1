# Each target sets up what it needs; Python 3.11 or newer and make must be there.
#
#   make demo    the main job: federated multimodal reconstruction beside its rivals, into out/
#   make test    every test
#   make bench   every benchmark beside the peers; SIZE=small for a quick look
#   make lint    style, format and types

VENV ?= .venv
SIZE ?= full
# `make bench RESULTS=benchmarks/results` renews the figures that the README quotes.
RESULTS ?= out/benchmarks
WORKERS ?= 2
# The threads of OpenBLAS, which does the small factorizations, spin against those of XLA: a round
# of the demo's methods took 52 ms with two of them and 29 ms with one (250 x 250, rank 40).
export OPENBLAS_NUM_THREADS ?= 1

recent = import sys; sys.exit(sys.version_info < (3, 11))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c '$(recent)' 2>/dev/null && echo $$p && break; done)
endif
ready = @$(or $(PYTHON),false) -c '$(recent)' || \
	{ echo "fedlr needs Python 3.11 or newer; name it: make $@ PYTHON=..."; exit 1; }; \
	$(PYTHON) .ci/environment.py $(VENV)

.PHONY: demo test bench lint clean

demo:
	$(ready) plots
	$(VENV)/bin/python -m demo

test:
	$(ready) test
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

bench:
	$(ready) benchmarks
	@set -e; names=$$($(VENV)/bin/python -m benchmarks --list); for name in $$names; do \
		$(VENV)/bin/python -m benchmarks $$name --size $(SIZE) --json $(RESULTS)/$$name.jsonl; \
		echo; \
	done

lint:
	$(ready) dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

clean:
	rm -rf $(VENV) $(VENV).lock .pytest_cache out build dist
