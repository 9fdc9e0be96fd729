# Two commands do everything on a fresh machine:
#   make demo   its own .venv, the install, and the main job
#   make test   the same, then the tests of one process
# Both are idempotent, and quick the second time.
PYTHON ?= python3
# Which build of torch: empty for the package index's own (on Linux a CUDA build), else a folder of
# download.pytorch.org/whl, such as cpu or cu126.
TORCH_INDEX ?=

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Modules are kept as bytecode wherever that is switched off: tests start a hundred processes, each of which imports them.
TESTED := PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
PYTEST := $(TESTED) $(BIN)/python -m pytest

# What moves with a dependency: the trainer's events and batches, references, probes, exact replay, files and commands.
BOUND_TESTS := tests/monitoring/test_callback.py tests/monitoring/test_reference_modes.py \
	tests/monitoring/test_trainer.py tests/monitoring/test_trainer_margins.py tests/probes \
	tests/auditing/test_exactness.py tests/models/test_loading.py tests/models/weights/test_streaming.py \
	tests/models/weights/test_not_streamed.py tests/models/weights/test_from_host.py \
	tests/writers/test_tensorboard.py tests/cli/test_options.py tests/cli/test_run.py

.PHONY: demo test test-distributed docs fuzz trackers test-trackers deepspeed test-deepspeed quantized test-quantized test-all test-gpu test-lowest test-newest lint lock wheel-check install python clean

install: $(STAMP)

# torch comes first and alone, so that the build asked for is there before anything depends on it. Bytecode is made of what is
# imported, when it is: of all that is installed it takes half a minute, and most of that nobody imports.
$(STAMP): pyproject.toml constraints.txt | python
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || echo "$(TORCH_SIZE)"
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --no-compile $(TORCH_FROM) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

TORCH_ADDRESS = https://download.pytorch.org/whl/$(TORCH_INDEX)
TORCH_FROM = $(if $(TORCH_INDEX),--index-url $(TORCH_ADDRESS),--constraint constraints.txt)
TORCH_SIZE = Installing torch and what it needs into $(VENV): $(if $(TORCH_INDEX),the $(TORCH_INDEX) build (cpu: about 0.2 GB \
	to download and 1.9 GB on disk).,on Linux the usual build brings CUDA, about 3 GB to download and 5.7 GB on disk. \
	Without a GPU stop here and say: make install TORCH_INDEX=cpu (0.2 GB and 1.9 GB).)

python:
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
		"align_audit needs Python 3.11 or newer; %s is Python %d.%d. Name a newer one: make PYTHON=python3.12 ..." \
		% ((sys.executable,) + tuple(sys.version_info[:2])))'

demo: $(STAMP)
	$(BIN)/align-audit demo

# Three processes on two cores: tests wait for browsers, disks and processes of their own a sixth of their time.
test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not distributed"

# Training on two processes of this machine, which take a core each: so one test file after the other.
test-distributed: $(STAMP)
	$(PYTEST) tests/distributed -m "distributed and not slow and not gpu"

# The documents as a site, in build/site: links, anchors and docstrings are checked, and a warning is an error.
docs: $(STAMP)
	$(BIN)/uv venv --quiet --allow-existing --python $(PYTHON) .venv-docs
	$(BIN)/uv pip install --quiet --python .venv-docs/bin/python --group docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet

# The tests of W&B, MLflow and Trackio with the real clients, offline. Some of these want older packages than all else is tested
# with (constraints-trackers.txt), so that they have an environment of their own, behind which the usual one stands.
TRACKERS := .venv-trackers
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
trackers: $(TRACKERS)/.installed

$(TRACKERS)/.installed: pyproject.toml constraints-trackers.txt $(STAMP)
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(TRACKERS)
	$(BIN)/uv pip install --python $(TRACKERS)/bin/python --constraint constraints-trackers.txt \
		$$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["trackers"])')
	$(BIN)/python -c '$(SITE)' > "$$($(TRACKERS)/bin/python -c '$(SITE)')/usual.pth"
	touch $@

test-trackers: trackers
	$(TESTED) $(TRACKERS)/bin/python -m pytest -n 2 --dist loadfile tests/writers/trackers -m "not slow and not gpu"

# DeepSpeed ZeRO-2 and ZeRO-3 on CPU processes. DeepSpeed comes as source, of which nothing has to be compiled, and would bring a
# torch with it: so it is installed alone, in an environment of its own, behind which the usual one stands.
DEEPSPEED := .venv-deepspeed
deepspeed: $(DEEPSPEED)/.installed

$(DEEPSPEED)/.installed: pyproject.toml $(STAMP)
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(DEEPSPEED)
	$(BIN)/python -c '$(SITE)' > "$$($(DEEPSPEED)/bin/python -c '$(SITE)')/usual.pth"
	$(BIN)/uv pip install --quiet --python $(DEEPSPEED)/bin/python setuptools wheel
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/uv pip install --python $(DEEPSPEED)/bin/python --no-deps --no-build-isolation \
		--group deepspeed
	touch $@

test-deepspeed: deepspeed
	$(TESTED) $(DEEPSPEED)/bin/python -m pytest tests/distributed/test_zero2.py tests/distributed/test_zero3.py

# Policies with quantized weights. bitsandbytes brings its kernels (43 MB to download), so it has an environment of its own too.
QUANTIZED := .venv-quantized
quantized: $(QUANTIZED)/.installed

$(QUANTIZED)/.installed: pyproject.toml $(STAMP)
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(QUANTIZED)
	$(BIN)/python -c '$(SITE)' > "$$($(QUANTIZED)/bin/python -c '$(SITE)')/usual.pth"
	$(BIN)/uv pip install --python $(QUANTIZED)/bin/python --no-deps --group quantized
	touch $@

test-quantized: quantized
	$(TESTED) $(QUANTIZED)/bin/python -m pytest -W default tests/monitoring/test_quantized.py

# Records, options, probe files and command lines that nobody wrote: so many of each test, 20,000 and more in all, drawn anew
# each time. `make test` tries a few, always the same ones.
FUZZ ?= 1300
fuzz: $(STAMP)
	ALIGN_AUDIT_FUZZ=$(FUZZ) $(PYTEST) tests/fuzz --timeout 7200

# Also what takes minutes: the grid of ruined and healthy runs on the real model, where ../shared/data (or
# $$ALIGN_AUDIT_DATA) is present.
test-all: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m "not gpu" --timeout 3600

# The engine's exactness on a CUDA device, and DPO runs there; in the environment at hand, whose torch has to know the device.
test-gpu:
	HF_HUB_OFFLINE=1 ALIGN_AUDIT_TEST_DEVICE=cuda $(PYTHON) -m pytest -m "device and not slow"

# The oldest direct dependencies that pyproject.toml allows, and the newest of all; each in an environment of its own.
test-lowest: RESOLUTION := lowest-direct
# What newer packages say of old ones is nothing to mend here.
test-lowest: WARNINGS := -W default
test-newest: RESOLUTION := highest
test-lowest test-newest: test-%: $(STAMP)
	$(BIN)/uv venv --quiet --allow-existing --python $(PYTHON) .venv-$*
	$(BIN)/uv pip install --python .venv-$*/bin/python --resolution $(RESOLUTION) --upgrade \
		$(if $(TORCH_INDEX),--torch-backend $(TORCH_INDEX)) --editable '.[test]'
	$(TESTED) .venv-$*/bin/python -m pytest $(WARNINGS) $(BOUND_TESTS) -m "not slow and not gpu and not real_data"

# Versions that are pinned stay, where pyproject.toml still allows them; `make lock UPGRADE=--upgrade` takes the newest.
lock: $(STAMP)
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
		--no-annotate --quiet $(UPGRADE) --output-file constraints.txt
	# The same versions where the trackers' clients allow them: what a file holds already is what uv prefers.
	cp constraints.txt constraints-trackers.txt
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile pyproject.toml --extra trackers --universal \
		--python-version 3.11 --no-annotate --quiet --output-file constraints-trackers.txt

# Minutes: the demo of the installed wheel is part of it.
wheel-check: $(STAMP)
	$(BIN)/python -m tests.wheel $(if $(TORCH_INDEX),--torch-index $(TORCH_ADDRESS))

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
