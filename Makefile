# Each target makes .venv by itself when it is missing, or when pyproject.toml or constraints.txt has changed.
# PYTHON=... chooses the interpreter (3.11 or newer; constraints.txt is tested on 3.11, so it is tried first).

VENV      ?= .venv
BIN       := $(VENV)/bin
INSTALLED := $(VENV)/installed

FINDER  = for python in python3.11 python3.12 python3.13 python3.14 python3 python; do \
            "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
              && { echo "$$python"; break; }; done
PYTHON ?= $(shell $(FINDER))

.PHONY: demo test quick thorough gpu check bench clean
.DEFAULT_GOAL := demo

demo: $(INSTALLED)
	$(BIN)/fp4trt demo -o build/demo --force

PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)
	$(PYTEST)

# Every test but those marked slow: three minutes where make test has been run before.
quick: $(INSTALLED)
	$(PYTEST) -m "not slow"

# The tests that make test leaves out, as each is much like another one.
thorough: $(INSTALLED)
	$(PYTEST) -m thorough

# What needs an NVIDIA GPU (docs/sessions.md): ten minutes at most.
gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(INSTALLED)
	@for script in $(wildcard benchmarks/*.py); do \
	    echo "== $$script" && $(BIN)/python "$$script" || exit 1; done

clean:
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "fp4trt needs Python 3.11 or newer; name one with: make PYTHON=..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about 2 GB, a minute or two"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[quantize,rtx,report,dev]"
	@test -d $(VENV)/readers/torchao || \
	    $(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --target $(VENV)/readers torchao
	@touch $@
