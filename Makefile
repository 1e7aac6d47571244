# Everything a person types: make setup, make demo, make test, make bench, make bench-gpu, make multihost, make chaos,
# make fuzz.
PYTHON ?= python3
BIN := .venv/bin
SOURCE ?=
CAPTIONS ?=
WORKERS ?= 2

.PHONY: setup demo test test-perturbed bench bench-gpu chaos fuzz multihost images images-check k8s lint clean

setup: .venv/installed

# The stamp holds what it was made of, so a changed pyproject.toml or constraints.txt installs again.
.venv/installed: pyproject.toml constraints.txt
	@echo "setup      installing into .venv (some minutes, once)"
	@$(PYTHON) -m venv .venv || { echo "error: $(PYTHON) cannot make an environment; install its venv module, or name another Python: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(BIN)/python -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))" || { echo "error: $(PYTHON) is no Python 3.11 or 3.12; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; rm -rf .venv; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' 2>&1 | { grep -v "^WARNING: Location" || true; }
	@$(BIN)/python -c "import torch, diffusers, ray, prefect, icechunk, pytest" || { echo "error: the installation is not whole; the lines above say why"; exit 1; }
	@touch $@

demo: setup
	@$(BIN)/vlfm demo $(if $(SOURCE),--source '$(SOURCE)') $(if $(CAPTIONS),--captions '$(CAPTIONS)')

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy model storage pipeline flows
	@$(BIN)/lint-imports

test: lint
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

# Once more as on another processor: every embedding and latent is off by one unit in the last place (tests/perturb).
test-perturbed: setup
	@VLFM_TEST_PERTURB=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

bench: setup
	@$(BIN)/python -m tests.bench; first=$$?; $(BIN)/python -m tests.bench.ingest && exit $$first

# Stable Diffusion v1.5's networks at 512 pixels, and training DiT-XL/2: it needs a GPU, no weights, and about 15 minutes.
bench-gpu: setup
	@$(BIN)/python -m tests.bench.gpu --markdown
	@$(BIN)/python -m tests.bench.gpu_training --markdown

# A training and an ingest on two hosts, which are network namespaces here; one is killed and comes back. Needs root.
multihost: setup
	@$(BIN)/python -m tests.bench.multihost
	@$(BIN)/python -m tests.bench.multihost_ray

# The four images of docker/Dockerfile, with docker, podman or buildah (docker/README.md has the settings).
images:
	@docker/build.sh

# What the images hold, and the commands of docker/compose.yaml's and docker/k8s's containers run from them.
images-check: setup
	@$(BIN)/python -m tests.bench.images

# The manifests of docker/k8s built by kustomize and validated strictly.
k8s: setup
	@$(BIN)/python -m pytest tests/test_kubernetes.py

# Two hundred crashes at random steps of what changes a lake, and the tally of what the next runs made of them.
chaos: setup
	@$(BIN)/python -m tests.bench.chaos --trials 200

# A thousand hostile films through one ingest under strace, and what crashed, hung or was reached outside.
fuzz: setup
	@$(BIN)/python -m tests.bench.fuzz --films 1000

clean:
	rm -rf .venv demo build *.egg-info
