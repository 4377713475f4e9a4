# Two commands do everything on a machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := runs/prcl/demo
# With all of its values given, the launcher prints no warning; --quiet leaves the error report to the script.
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: setup demo test stress gpu-check lint

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	@echo "installing into $(VENV): several GB with PyTorch, a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,plots,tensorboard]'
	touch $@

demo: setup
	$(LAUNCH) prcl/train.py --config prcl/configs/demo.json
	$(BIN)/python prcl/eval.py $(DEMO) -s
	@echo "Pictures: $(DEMO)/pictures (panels and curve of the training), $(DEMO)/eval/pictures (every validation image)"

test: setup
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Every training script where `make test` runs a few, with tables of all kill points and mutated files.
stress: setup
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal --every-script tests/stress tests/test_launch.py tests/test_failures.py \
		tests/test_gradients.py tests/test_processes.py tests/test_training.py tests/test_gpu_rehearsal.py

# Tests that need a GPU, then speed and memory of every published setting: hours.
gpu-check: setup
	$(BIN)/python benchmarks/gpu.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
