# make quickstart   R1-Zero on a 1M-parameter DeepSeek-V3, two CPU cores, some minutes; installs into .venv first
# make install      only .venv and what a run needs
# make test         style, types and every test that needs neither a GPU, nor slurm, nor minutes
# make test-slurm   jobs under a real Slurm on loopback (root; installs Debian's slurm packages if they are missing)
# make test-megatron the trainer's tests under every megatron-core that is supported; ten minutes a version
# make test-gpu-paths what only GPUs reach, without one: under every vLLM and megatron-core; makes CUDA environments in
#                   build/gpu-paths (10 GB each; docs/gpu.md)
# make lint         ruff, pyright, and vulture for code that nothing reaches
# make docs         docs/configuration.md, docs/metrics.md and the picture of the architecture, from the code
# make install-gpu  .venv-gpu for NVIDIA GPUs (Python 3.12, CUDA 13); needs no GPU (docs/gpu.md)
#
# Variables: ARGS (more words for the run, e.g. ARGS="--grpo.steps 20"), PYTHON (a Python 3.11 or 3.12),
# TORCH_INDEX (where torch comes from, e.g. https://download.pytorch.org/whl/cpu; pip's own index if empty).

PYTHON ?=
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
GPU_VENV ?= .venv-gpu
RUNTIME := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
BUSY := $(VENV)/.installing
PY := $(VENV)/bin/python
UV := uv==0.13.8

# Any Python 3.6 or newer, to look for the right one. A name alone proves nothing: shims of absent versions fail.
ANY_PYTHON = $(shell for python in "$(PYTHON)" python3 python3.11 python3.12 python; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 6))' >/dev/null 2>&1 && echo "$$python" && break; done)
NEED_PYTHON = test -n "$(ANY_PYTHON)" || { echo "check_machine: no python3 was found: install Python 3.11 with its venv module" >&2; exit 1; }

# uv installs the same files as pip in a fifth of the time. It does not read pip's configuration, so where an index is
# reachable only through that, pip does the work.
INSTALL = install() { $(PY) -m uv pip install -q --python $(PY) --no-deps "$$@" || { \
	echo "uv could not install; trying pip, which is slower" >&2; \
	$(PY) -m pip install -qq --no-compile --no-deps "$$@"; }; }; install

# Packages are installed without bytecode, so that the first import of a module writes it. Without the right to (images of
# containers often set this), every process would compile torch and vLLM anew: most of its start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart install install-gpu test test-gpu test-slurm test-slow test-megatron test-gpu-paths lint docs lock lock-gpu clean check
.DELETE_ON_ERROR:

quickstart: check $(RUNTIME)
	$(PY) -m megatron_r1 run quickstart $(ARGS)

# Runs without make may not be allowed to write bytecode: where that is so, all of it is made here.
install: check $(RUNTIME)
	@test -z "$(PYTHONDONTWRITEBYTECODE)" || { echo "PYTHONDONTWRITEBYTECODE is set: compiling the packages once"; \
		$(PY) -m compileall -q -j 0 $(VENV)/lib megatron_r1 >/dev/null 2>&1 || true; \
		ls $(VENV)/lib/*/site-packages/torch/__pycache__/__init__.*.pyc >/dev/null || echo "it could not be written" >&2; }

# Style and dead code first: they take seconds, and a fault there is not found after minutes. Types are among the tests
# (tests/test_types.py), since pyright takes a core for a minute.
test: check $(DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m vulture
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not slurm and not slow and not gpu_paths" $(ARGS)

test-slow: check $(DEV)
	$(PY) -m pytest -m "slow and not gpu and not slurm" $(ARGS)

test-megatron: check $(DEV)
	$(PY) tools/test_matrix.py $(ARGS)

# The trainer's paths under every megatron-core, the servers' once for each vLLM. VLLMS names others.
VLLMS ?= 0.32 0.33
test-gpu-paths:
	@set -e; for vllm in $(VLLMS); do \
		venv=build/gpu-paths/vllm-$$vllm; \
		$(or $(PYTHON),python3.12) tools/install_gpu.py --venv $$venv --vllm $$vllm; \
		echo "vLLM $$vllm"; \
		$$venv/bin/python -m pytest -q -m gpu_paths tests/gpu_paths/test_vllm.py; \
		$$venv/bin/python tools/test_matrix.py --markers gpu_paths --folder build/gpu-paths/megatron \
			--tests $(filter-out %/test_vllm.py,$(wildcard tests/gpu_paths/test_*.py)) $(ARGS); \
	done

# The daemons are started by the tests themselves, so the packages' own services are of no use here.
test-slurm: check $(DEV)
	@command -v slurmctld slurmd sbatch munged >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends \
		slurmctld slurmd slurm-client munge >/dev/null; } || echo "no Slurm here and none can be installed" >&2
	$(PY) -m pytest -m slurm $(ARGS)

# VLLM=0.33 takes that version instead of 0.32; FLASH_ATTN=1 compiles flash-attn too; JOBS bounds the compilers.
install-gpu:
	@command -v "$(or $(PYTHON),python3.12)" >/dev/null || { echo "install_gpu: $(or $(PYTHON),python3.12) was not found: \
		apt-get install python3.12-dev python3.12-venv, or PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(or $(PYTHON),python3.12) tools/install_gpu.py --venv $(GPU_VENV) $(if $(VLLM),--vllm $(VLLM)) \
		$(if $(JOBS),--jobs $(JOBS)) $(if $(FLASH_ATTN),--flash-attn)

# Half an hour on one GPU; writes docs/gpu_results.md. The environment is its own (make install-gpu, or a container): PYTHON names another.
test-gpu:
	$(or $(PYTHON),$(wildcard $(GPU_VENV)/bin/python),python3) -m pytest -m gpu tests/gpu $(ARGS)

lint: $(DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) -m vulture

docs: $(DEV)
	$(PY) tools/make_docs.py
	$(PY) tools/draw_architecture.py

lock: $(DEV)
	$(PY) tools/lock_requirements.py $(ARGS)

lock-gpu: $(DEV)
	$(PY) tools/lock_requirements.py --gpu $(ARGS)

# Runs and made models (runs/) stay.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

check:
	@$(NEED_PYTHON)
	@"$(ANY_PYTHON)" tools/check_machine.py run

# BUSY lies in a .venv that is being filled. Found there at the start, the last installation was interrupted and what
# is installed cannot be trusted. A checkout that was moved (the stamp holds its old place) starts anew too.
$(RUNTIME): requirements/torch.txt requirements/cpu.txt pyproject.toml setup.py
	@$(NEED_PYTHON)
	@set -e; \
	python=$$("$(ANY_PYTHON)" tools/check_machine.py install --python "$(PYTHON)"); \
	if [ -e $(BUSY) ] || { [ -e $(RUNTIME) ] && [ "$$(cat $(RUNTIME))" != "$(CURDIR)" ]; } \
		|| { [ -e $(VENV) ] && ! $(PY) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))'; }; then \
		echo "$(VENV) is incomplete: making it again"; rm -rf $(VENV); \
	fi; \
	rm -f $(RUNTIME) $(DEV); \
	[ -e $(VENV) ] || { echo "making $(VENV) with $$python"; mkdir $(VENV); touch $(BUSY); "$$python" -m venv $(VENV); }; \
	touch $(BUSY); \
	$(PY) -m pip install -qq --no-compile "$(UV)"; \
	echo "installing $$(grep -c == requirements/cpu.txt) packages (about 350 MB to download)"; \
	$(INSTALL) -r requirements/cpu.txt; \
	echo "installing torch (about 200 MB for the CPU build)"; \
	$(PY) -m pip install -qq --no-compile --no-warn-conflicts $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") -r requirements/torch.txt; \
	$(INSTALL) --no-build-isolation -e .; \
	rm $(BUSY); \
	echo "$(CURDIR)" > $(RUNTIME)

$(DEV): $(RUNTIME) requirements/dev.txt
	@echo "installing $$(grep -c == requirements/dev.txt) packages for tests and checks"
	@set -e; touch $(BUSY); $(INSTALL) -r requirements/dev.txt; rm $(BUSY); touch $(DEV)
