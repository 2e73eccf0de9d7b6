# make serve   set up, then run the service on the demo bundle (http://127.0.0.1:3000)
# make test    set up, then lint, type-check and test
# make docs    set up, then build the documentation site into site/; broken links are errors
PYTHON ?= python3
VENV ?= .venv
# cpu or gpu: which builds of faiss and onnxruntime to install (never both: they share their folders).
VARIANT ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(VARIANT)
# Where `make demo-bundle` finds an ISIC-layout folder (images and metadata.csv).
DATA ?= ../shared/data/dermoscopy

.PHONY: setup serve test test-full test-cluster docs ranges wheels sbom lint demo-split demo-bundle demo-classifier demo-latents demo-privacy gpu-pack clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt clients/python/pyproject.toml clients/studio/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt setuptools wheel
	$(BIN)/pip install -q --no-build-isolation -c constraints.txt -e ".[$(VARIANT),dev]" -e clients/python -e clients/studio
	touch $@

serve: setup
	$(BIN)/dermis serve

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict clients/python/src/dermis_client clients/python/tests/typed_calls.py
	$(BIN)/mypy --strict clients/studio/src/dermis_studio
	$(BIN)/lint-imports --no-logo --no-cache

# With it, each program that tests start would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

# One torch thread a process: several processes are faster than several threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist worksteal

test: lint
	$(PYTEST) -m "not full"

# The packages of the site are installed when it is first built or tested.
DOCS_STAMP := $(VENV)/.installed-docs

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install -q --no-build-isolation -c constraints.txt -e ".[$(VARIANT),docs]"
	touch $@

# What the full tests use beyond the extra dev: S3 servers, kubectl, locust, and checkov in an environment of its own.
TEST_STAMP := $(VENV)/.installed-cluster-$(VARIANT)
CHECKOV ?= build/checkov/bin/checkov

$(TEST_STAMP): $(STAMP)
	$(BIN)/pip install -q --no-build-isolation -c constraints.txt -e ".[$(VARIANT),cluster,soak]"
	touch $@

build/checkov/bin/checkov:
	$(PYTHON) -m venv build/checkov
	build/checkov/bin/pip install -q checkov==3.3.30

# They first list the programs that tests use, such as PostgreSQL, and stop if one is missing; with ALLOW_MISSING=1 the tests that need
# it are skipped.
test-full: lint $(TEST_STAMP) $(DOCS_STAMP) $(CHECKOV)
	CHECKOV=$(abspath $(CHECKOV)) $(BIN)/python tests/support/programs.py
	CHECKOV=$(abspath $(CHECKOV)) $(PYTEST) -rs

# The tests with real servers and programs: PostgreSQL, S3, kubectl, promtool.
test-cluster: setup $(TEST_STAMP) $(CHECKOV)
	CHECKOV=$(abspath $(CHECKOV)) OMP_NUM_THREADS=1 $(BIN)/python tests/support/cluster_tests.py

# Wheels of dermis, dermis-client, dermis-studio and the demo bundle, into dist/. They are built from a copy: a build leaves files behind.
wheels: setup
	rm -rf dist build/wheels && mkdir -p build/wheels
	git ls-files -z -- '*.py' '*.pyi' '*.typed' '*.toml' '*.html' docs/package.md LICENSE clients/python clients/studio bundles training dermis \
		| xargs -0 cp --parents -t build/wheels
	for project in . clients/python clients/studio bundles; do \
		$(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist "build/wheels/$$project" || exit 1; done
	rm -rf build/wheels
	ls dist

# The packages of the environment with versions and licences (CycloneDX), into dist/. The tool has an environment of its own; the
# Dockerfile uses the same version. It reads the version of dermis from pyproject.toml alone, which does not state it.
sbom: setup
	test -x build/sbom/bin/cyclonedx-py || { $(PYTHON) -m venv build/sbom && build/sbom/bin/pip install -q cyclonedx-bom==7.5.0; }
	mkdir -p dist
	sed "s/^dynamic = .*/version = \"$$($(BIN)/dermis --version)\"/" pyproject.toml > build/sbom/pyproject.toml
	build/sbom/bin/cyclonedx-py environment --output-reproducible --pyproject build/sbom/pyproject.toml -o dist/sbom.cdx.json $(BIN)/python

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The newest versions that the ranges of pyproject.toml allow, installed and imported in a new environment (several GB); with
# RESOLUTION=lowest-direct the lowest ones. For the client `make test-full` does both.
RESOLUTION ?= highest
ranges: setup
	$(BIN)/uv venv -q --clear .ranges
	$(BIN)/uv pip install -q --python .ranges/bin/python --resolution $(RESOLUTION) ".[cpu]"
	.ranges/bin/python -c "import commands.main, services.service"
	.ranges/bin/dermis --version
	rm -rf .ranges

CREDIT := --licence CC-BY-NC-4.0 \
	--attribution "HAM10000 (Tschandl et al. 2018, doi:10.1038/sdata.2018.161), ISIC 2018 test set (Codella et al. 2018), ISIC Archive"

# How bundles/demo is made (its card lists every option and each change). Images are divided once, by patient, before
# anything is trained: all parts of the bundle learn from `train` alone, choices are made on `validation`, and `test` is held
# out and only measures. Every step can be stopped with Ctrl-C; the same command continues it.
SPLIT := runs/leaks/split
LEARN := --data $(DATA) --metadata $(SPLIT)/train.csv
demo-split: setup
	test -d runs/split || $(BIN)/dermis data split $(DATA) --parts train-validation-test --out runs/split
	test -d runs/leaks || $(BIN)/dermis data leaks $(DATA) --split runs/split --remove --out runs/leaks

# In three parts with falling learning rates.
DEMO := $(LEARN) --resolution 128 --projected --projected-mbstd --class-balance 0.5 --batch 16 --channel-base 4096 --channel-max 256 \
	--z-dim 256 --w-dim 256 --no-compile --name demo --out runs/demo --snapshot-kimg 4 --resume --allow-changes $(CREDIT)
define demo-part
	test -f runs/demo/part-$(1) || { $(BIN)/dermis train gan $(DEMO) --kimg $(1) $(2) && touch runs/demo/part-$(1); }
endef
demo-bundle: demo-split
	$(call demo-part,41,--moments-weight 3)
	$(call demo-part,82,--moments-weight 6 --learning-rate 0.001)
	$(call demo-part,101.3,--moments-weight 6 --learning-rate 0.0004 --class-moments-weight 0.5)
	$(BIN)/dermis evaluate --bundle runs/demo/bundle $(LEARN) --holdout-metadata $(SPLIT)/test.csv --noise-mode random --noise-mode const
	rm -rf bundles/demo && mkdir -p bundles && cp -r runs/demo/bundle bundles/demo

demo-classifier: demo-split
	$(BIN)/dermis train classifier --data $(DATA) --split $(SPLIT) --out runs/demo-classifier --name demo-classifier \
		--architecture tf_efficientnet_lite0 --size 128 --freeze-stages 1 --weights-dtype int8 --resume $(CREDIT)
	$(BIN)/dermis bundle attach-classifier bundles/demo runs/demo-classifier/classifier

demo-latents: demo-split
	$(BIN)/dermis index build $(LEARN) --held-out $(DATA) --held-out-metadata $(SPLIT)/test.csv --bundle bundles/demo
	$(BIN)/dermis train encoder --bundle bundles/demo --images $(DATA) --metadata $(SPLIT)/train.csv \
		--held-out $(SPLIT)/validation.csv --steps 3000 --warm-up 500 --distance lite0 --out runs/demo-encoder --resume --attach
	$(BIN)/dermis directions fit bundles/demo

demo-privacy: demo-split
	for steps in 5000 9000; do \
		$(BIN)/dermis train copy-detector $(LEARN) --calibration $(SPLIT)/validation.csv --held-out $(SPLIT)/test.csv \
			--bundle bundles/demo --steps $$steps --learning-rate 7e-4 --out runs/demo-copies --resume --attach || exit 1; done
	$(BIN)/dermis bundle reference --bundle bundles/demo $(LEARN) --held-out $(DATA) --held-out-metadata $(SPLIT)/test.csv
	$(BIN)/dermis privacy audit --bundle bundles/demo --members $(DATA) --members-metadata $(SPLIT)/train.csv \
		--non-members $(DATA) --non-members-metadata $(SPLIT)/test.csv --out runs/demo-audit --attach

# Files for a GPU machine without a network (docs/gpu.md), in the ignored folder gpu-pack.
gpu-pack: demo-split
	$(BIN)/python -m benchmarks.gpu.pack --data $(DATA) --train $(SPLIT)/train.csv --held-out $(SPLIT)/test.csv \
		$(if $(wildcard ../shared/parity),--parity ../shared/parity)

clean:
	rm -rf $(VENV) .dermis build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
