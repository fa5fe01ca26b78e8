# `make help` lists the targets. Each sets up what it needs; only a package index is asked over the network.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ARCHITECTURES ?= 80 90 100
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Threads that wait by sleeping: spinning ones crawl as soon as another program wants a core.
PYTHON_PASSIVE := OMP_WAIT_POLICY=PASSIVE $(BIN)/python
# One thread a test process: two processes on two cores beat one process with two threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadscope

.PHONY: help demo study drift compare ablate pretrain retrofit-study classify bench bench-model kernels emulate examples docs test test-transformers test-deepspeed lint types format clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 22

$(READY): pyproject.toml $(CONSTRAINTS)
	@echo "Setting up $(VENV): once, a minute or more"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $@

demo: $(READY)  ## Train FIRE and its rivals at a short length, test them at 16 times that length (ten to fifteen minutes on two cores)
	$(PYTHON_PASSIVE) recipes/extrapolate.py recipes/demo/demo.yaml

study: $(READY)  ## The study behind FIRE's defaults (half an hour on two cores; a killed run continues)
	$(PYTHON_PASSIVE) recipes/extrapolate.py recipes/defaults/study.yaml

drift: $(READY)  ## Why FIRE drifts with the public code's choices, and what of the training matters (a killed run continues)
	$(PYTHON_PASSIVE) recipes/extrapolate.py recipes/defaults/drift.yaml
	$(PYTHON_PASSIVE) recipes/extrapolate.py recipes/defaults/regime.yaml

compare: $(READY)  ## FIRE and all its rivals, three seeds each, from 1/4 to 16 times the training length (a killed run continues)
	$(PYTHON_PASSIVE) recipes/extrapolate.py recipes/compare/compare.yaml

ablate: $(READY)  ## The parts of FIRE, one at a time, likewise
	$(PYTHON_PASSIVE) recipes/extrapolate.py recipes/ablate/ablate.yaml

pretrain: $(READY)  ## A tiny FIRE model from scratch on a stream of text (three minutes on one core; a killed run continues)
	$(PYTHON_PASSIVE) -m accelerate.commands.launch --config_file configuration/accelerate/cpu.yaml \
		recipes/pretrain.py recipes/pretrain/tiny.yaml

retrofit-study: $(READY)  ## Ways to extend a model with rotation, side by side: SOURCE=checkpoint TEXT=file (a killed run continues)
	$(PYTHON_PASSIVE) recipes/retrofit_study.py recipes/retrofit/study.yaml base.model.source=$(SOURCE) base.data.text=$(TEXT)

classify: $(READY)  ## A classifier for a task of GLUE or SuperGLUE: TASK=boolq MODEL=folder TRAIN=file VALIDATION=file (a killed run continues)
	$(PYTHON_PASSIVE) -m accelerate.commands.launch --config_file configuration/accelerate/cpu.yaml \
		recipes/classify.py recipes/classify/tiny.yaml output_dir=outputs/classify/$(TASK) task=$(TASK) model=$(MODEL) \
		data.train=$(TRAIN) data.validation=$(VALIDATION)

bench: $(READY)  ## FIRE attention beside its peers: time, memory, a table and plots (ten minutes on two cores, or on a GPU)
	$(PYTHON_PASSIVE) benchmarks/attention.py --out outputs/bench

bench-model: $(READY)  ## A whole FIRE model beside LLaMA: training and generation (ten minutes on two cores, or on a GPU)
	$(PYTHON_PASSIVE) benchmarks/model.py --out outputs/bench

kernels: $(READY)  ## Compile every form of the GPU kernels for several GPUs, without one; fails if a hot loop spills (half an hour)
	$(BIN)/python benchmarks/offline_compile.py

emulate: $(READY)  ## Run what the GPU kernels compile to for sm_80, sm_90 and sm_100, without a GPU: values, addresses, races (half an hour)
	for architecture in $(ARCHITECTURES); do \
		EMULATED_SM=$$architecture $(PYTEST) --dist load $(wildcard tests/test_triton_*.py) $(SELECT) || exit; done

examples: $(READY)  ## Run the programs of examples/ in turn, and the notebook: under outputs/examples (three minutes on one core)
	set -e; for program in train_with_trainer load_and_generate lora_with_peft sft_with_trl serve_and_query \
		long_context_evaluation convert_and_heal own_attention_layer; do \
		echo "examples/$$program.py"; $(PYTHON_PASSIVE) examples/$$program.py; done
	OMP_WAIT_POLICY=PASSIVE $(BIN)/jupyter execute examples/story.ipynb --output ../outputs/examples/story

docs: $(READY)  ## The API pages, from the docstrings: outputs/docs/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/mkdocs.yml

test: $(READY)  ## Our tests
	$(PYTEST) --ignore=tests/transformers_common

test-transformers: $(READY)  ## transformers' own common model tests, fetched from the package index, on our models
	$(PYTEST) tests/transformers_common

test-deepspeed: $(READY)  ## ZeRO-3 on two CPU processes; installs DeepSpeed, which warns in every later run that there is no GPU
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[deepspeed]"
	$(BIN)/python -c "import deepspeed"  # without which the test would be skipped
	$(PYTEST) -n 0 tests/test_machines.py -k deepspeed

lint: $(READY)  ## Style, common mistakes and security
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/bandit --quiet --recursive modeling_fire recipes --severity-level medium --skip B615  # users name the models

types: $(READY)  ## Static types
	$(BIN)/mypy

format: $(READY)  ## Rewrite the code in the house style
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:  ## Remove the environment, caches and outputs
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache outputs
