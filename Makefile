# make demo       from text to a trained and exported model: a few minutes on two CPU cores, or on a GPU if there is one
# make recipe RECIPE=configs/small/code_fim.yaml    what its first lines say: prepare the data, train; then evaluate
# make test       lint, types, layers and tests
# make quick      lint, and the tests in fast files: about a minute
# make test-slow  the tests that take minutes each
#
# make uses the active virtual environment, or else creates .venv. If PYTHON3 already has a torch (for example a CUDA,
# ROCm or MPS build), .venv sees it. An installed torch is kept. Otherwise make installs the version in constraints.txt:
# on Linux without a GPU from TORCH_INDEX, if it answers; else from the package index.

PYTHON3 ?= python3
ENV := $(or $(VIRTUAL_ENV),.venv)
ifneq ($(words $(ENV)),1)
$(error make cannot use an environment with a space in its path ($(ENV)); deactivate it, or use another)
endif
PYTHON := $(ENV)/bin/python

# pip writes the version last, so the remains of an interrupted installation do not count.
HAS_TORCH := -c 'import sys; from importlib.metadata import distributions as d; sys.exit(not any(d(name="torch")))'
# NVIDIA's driver answers, or AMD's exists.
HAS_GPU := timeout 20 nvidia-smi --list-gpus || test -e /dev/kfd
# PyTorch's own index has builds without CUDA, a tenth of the size. make skips it unless it lists our version in time.
TORCH_INDEX := https://download.pytorch.org/whl/cpu
TORCH_INDEX_SECONDS := 5
TORCH := torch-$(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_INDEX_HAS_IT = timeout $(TORCH_INDEX_SECONDS) $(PYTHON) -c 'from urllib.request import urlopen; \
	assert b"$(TORCH)" in urlopen("$(TORCH_INDEX)/torch/").read()'

# Evaluated when the demo starts, because torch is installed by then.
GPU = $(shell $(PYTHON) -c 'import torch; print("GPU" if torch.cuda.is_available() else "")')
PRECISION := $(if $(shell grep -sE -m1 -o 'avx512_bf16|amx_bf16' /proc/cpuinfo),bf16,no)
LAUNCH = $(if $(GPU),single_gpu.yaml,cpu.yaml --mixed_precision $(PRECISION))

.PHONY: demo recipe test quick test-slow
.NOTPARALLEL:

demo: $(ENV)/.plainloop-installed
	@echo "== 1 of 4: prepare the text (seconds)"
	$(PYTHON) prepare_data.py
	@echo "== 2 of 4: train (one to three minutes on two cores; the first line appears once torch is imported)"
	$(PYTHON) -m accelerate.commands.launch --quiet --config_file accelerate_configs/$(LAUNCH) \
		train.py --config configs/demo.yaml --checkpoint.resume auto
	@echo "== 3 of 4: export the best checkpoint and compare (seconds)"
	rm -rf exports/demo
	$(PYTHON) export.py --checkpoint runs/demo --output exports/demo
	@echo "== 4 of 4: score the export on held-out text and generate a sample (seconds)"
	$(PYTHON) evaluate.py --model exports/demo --dataset data/demo --compare_with_xz true --report runs/demo/evaluation.json \
		--prompt "$$(printf 'laptop\n n.\n\n    A')" --temperature 0.6 --seed 1 --max_new_tokens 240
	@$(PYTHON) examples/demo_summary.py

recipe: $(ENV)/.plainloop-installed
	@$(PYTHON) -m training.recipe $(RECIPE) $(OPTIONS)

test: $(ENV)/.plainloop-installed-test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -c 'from importlinter.cli import lint_imports_command as run; run()'
	$(PYTHON) -m pytest -m 'not slow'

quick: $(ENV)/.plainloop-installed-test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pytest -m 'not slow and not long'

test-slow: $(ENV)/.plainloop-installed-test
	$(PYTHON) -m pytest -m slow --dist worksteal

$(ENV)/.plainloop-installed: EXTRAS :=
$(ENV)/.plainloop-installed-test: EXTRAS := [test]
$(ENV)/.plainloop-installed $(ENV)/.plainloop-installed-test: pyproject.toml constraints.txt
	@test -x $(PYTHON) || $(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is required; for example: make PYTHON3=python3.12 ..."; exit 1; }
	test -x $(PYTHON) || $(PYTHON3) -m venv $$($(PYTHON3) $(HAS_TORCH) && echo --system-site-packages) $(ENV)
	$(PYTHON) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m ensurepip
	@if $(PYTHON) $(HAS_TORCH); then \
		echo "== install: the installed torch stays"; \
	elif [ "$$(uname -s)" = Linux ] && { ! { $(HAS_GPU); } && $(TORCH_INDEX_HAS_IT); } > /dev/null 2>&1 && \
			$(PYTHON) -m pip install --no-deps --constraint constraints.txt --index-url $(TORCH_INDEX) torch; then \
		echo "== install: torch without CUDA, because there is no GPU, from $(TORCH_INDEX)"; \
	else \
		echo "== install: torch from the package index"; \
		$(PYTHON) -m pip install --constraint constraints.txt torch; \
	fi
	grep -v '^torch==' constraints.txt > $(ENV)/plainloop-constraints.txt
	$(PYTHON) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> $(ENV)/plainloop-constraints.txt
	$(PYTHON) -m pip install --constraint $(ENV)/plainloop-constraints.txt --editable '.$(EXTRAS)'
	touch $@
