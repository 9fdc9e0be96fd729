# Two commands do everything on a fresh machine:
#   make demo   its own .venv, the install, and the main job
#   make test   the same, then the tests
# Both are idempotent, and quick the second time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test fuzz test-all test-gpu lint install clean

install: $(STAMP)

# torch comes first and alone: on a machine without it, anything that depends on it may pull in gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/align-audit demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

# Records, options, probe files and command lines that nobody wrote: so many of each test, 20,000 and more in all, drawn anew
# each time. `make test` tries a few, always the same ones.
FUZZ ?= 1300
fuzz: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 ALIGN_AUDIT_FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/fuzz --timeout 7200

# Also what takes minutes: the grid of ruined and healthy runs on the real model, where ../shared/data (or
# $$ALIGN_AUDIT_DATA) is present.
test-all: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m "not gpu" --timeout 3600

# The engine's exactness on a CUDA device, and DPO runs there; in the environment at hand, whose torch has to know the device.
test-gpu:
	HF_HUB_OFFLINE=1 ALIGN_AUDIT_TEST_DEVICE=cuda $(PYTHON) -m pytest -m "device and not slow"

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
