# make demo   from text to a trained, exported model, on two CPU cores in a few minutes
# make test   lint, types, layers, tests; make quick, those of a minute; make test-slow, the tests that take minutes each
#
# An active virtual environment is used as it is. Without one, .venv is made; where PYTHON3 already has a torch (a CUDA,
# ROCm or MPS build, say) .venv sees it. A torch that is found is kept; otherwise it comes from constraints.txt.

PYTHON3 ?= python3
ENV := $(or $(VIRTUAL_ENV),.venv)
PYTHON := $(ENV)/bin/python
HAS_TORCH := -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
PRECISION := $(if $(shell grep -sE -m1 -o 'avx512_bf16|amx_bf16' /proc/cpuinfo),bf16,no)

.PHONY: demo test quick test-slow
.NOTPARALLEL:

demo: $(ENV)/.plainloop-installed
	$(PYTHON) prepare_data.py
	$(PYTHON) -m accelerate.commands.launch --quiet --config_file accelerate_configs/cpu.yaml --mixed_precision $(PRECISION) \
		train.py --config configs/demo.yaml --checkpoint.resume auto
	rm -rf exports/demo
	$(PYTHON) export.py --checkpoint runs/demo --output exports/demo
	$(PYTHON) evaluate.py --model exports/demo --dataset data/demo --sequence_length 256 --compare_with_xz true --prompt "" \
		--report runs/demo/evaluation.json
	$(PYTHON) examples/demo_summary.py

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
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON3=python3.12 ..."; exit 1; }
	test -x $(PYTHON) || $(PYTHON3) -m venv $$($(PYTHON3) $(HAS_TORCH) && echo --system-site-packages) $(ENV)
	$(PYTHON) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m ensurepip
	$(PYTHON) $(HAS_TORCH) || $(PYTHON) -m pip install --quiet --constraint constraints.txt torch
	grep -v '^torch==' constraints.txt > $(ENV)/plainloop-constraints.txt
	$(PYTHON) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> $(ENV)/plainloop-constraints.txt
	$(PYTHON) -m pip install --quiet --constraint $(ENV)/plainloop-constraints.txt --editable '.$(EXTRAS)'
	touch $@
