# Every target sets itself up: a virtual environment in .venv with the tested versions, made again when they change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test short check bench docs browser smokes exactness precision metrics crash fuzz flower-test package release-check clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed   ## three hospitals, four methods, offline
	$(BIN)/fedex-lora demo --out demo

test: $(VENV)/.installed-dev   ## all tests, and the examples in docstrings
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(HOW)

short: $(VENV)/.installed-dev   ## the short forms of the campaigns: kills and failing writes, mutated messages, METEOR by its official program
	$(BIN)/python -m pytest -m campaign --numprocesses 2 tests

check: $(VENV)/.installed-dev   ## style, types, the order of imports, the budget of lines and names
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py tests/test_budget.py

bench: $(VENV)/.installed   ## speed and memory, as ratios measured side by side
	$(BIN)/python benchmarks/bench_aggregation.py --out benchmarks/results/aggregation.json
	$(BIN)/python benchmarks/bench_catch_up.py
	$(BIN)/python benchmarks/bench_truncation.py --out benchmarks/results/truncation.json
	$(BIN)/python benchmarks/bench_startup.py --out benchmarks/results/startup.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/scale_out.py --out benchmarks/results/scale_out.json
	$(BIN)/python -m scripts.tables
	$(BIN)/python benchmarks/bench_streaming.py --out benchmarks/results/streaming.json
	$(BIN)/python benchmarks/bench_training.py --rows 480 --batch 8 --tokens 64 --threads 1 --out benchmarks/results/training.json
	$(BIN)/python benchmarks/bench_clients_memory.py --layers 4 --clients 3 50 100 --out benchmarks/results/clients_memory.json

smokes: $(VENV)/.installed-dev   ## every table and figure of the paper at scale smoke, half an hour: that the recipes run
	targets=$$($(BIN)/fedex-lora reproduce list --json | $(BIN)/python -c 'import json, sys; print(*json.load(sys.stdin))') && \
	for target in $$targets; do $(BIN)/fedex-lora reproduce $$target --scale smoke --out reproduce || exit 1; done

exactness: $(VENV)/.installed   ## every method against the fp64 ideal
	$(BIN)/python benchmarks/exactness_of_methods.py --out benchmarks/results/exactness.json

precision: $(VENV)/.installed-dev   ## ten rounds on bases of 16, 8 and 4 bits: make precision DATA=FOLDER MINILM=FOLDER STORIES=FOLDER
	$(BIN)/python benchmarks/precision.py --data $(DATA) --minilm $(MINILM) --stories $(STORIES) --out benchmarks/results/precision.json

docs: $(VENV)/.installed-docs   ## the documentation as a site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

browser: $(VENV)/.installed-browser   ## the report in headless Chromium: drawn, silent, sortable, accessible (installs chromium, as root)
	command -v chromium || { apt-get update && apt-get install --yes --no-install-recommends chromium; }
	$(BIN)/python -m pytest tests/report/test_report.py

metrics: $(VENV)/.installed-dev   ## E2E metrics of four real systems beside the official ones: make metrics DATA=FOLDER
	$(BIN)/python -m tests.official_scores $(DATA)

crash: $(VENV)/.installed-dev   ## kill runs and fail their writes, resume them, compare the bits
	$(BIN)/python -m tests.crash --kills 40 --faults 20
	$(BIN)/python -m tests.crash --every

fuzz: $(VENV)/.installed-dev   ## 100,000 mutated messages: refused, or what was sent byte for byte
	$(BIN)/python -m tests.fuzz_wire 100000

flower-test: $(VENV)/.installed-flower   ## two real deployments on this machine (TLS, node keys), side by side, and what happens when parts die
	$(BIN)/python -m pytest tests/engines/flower --numprocesses 2 --dist worksteal --durations 20 $(HOW)

package: $(VENV)/.installed-dev   ## sdist and wheel, each tried in an environment of its own
	$(BIN)/python scripts/check_package.py

release-check: check   ## what must hold before a release: version, changelog, tag, and `make package` with dependencies installed anew
	$(BIN)/python scripts/check_package.py --release

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("fedex-lora needs Python 3.11 or later: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[tasks,report]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps dp-accounting dm-tree
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(VENV)/.installed
	$(PIP) --editable '.[docs]'
	touch $@

$(VENV)/.installed-browser: pyproject.toml constraints.txt | $(VENV)/.installed-dev
	$(PIP) --editable '.[browser]'
	touch $@

$(VENV)/.installed-flower: $(VENV)/.installed-dev
	$(PIP) --editable '.[dev,simulation]'
	command -v nginx /usr/sbin/nginx >/dev/null || { apt-get update && apt-get install -y --no-install-recommends nginx-light; } || true
	touch $@

clean:
	rm -rf $(VENV) site
