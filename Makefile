# make serve   set up, then run the service on the demo bundle (http://127.0.0.1:3000)
# make test    set up, then lint, type-check and test
PYTHON ?= python3
VENV ?= .venv
# cpu or gpu: which builds of faiss and onnxruntime to install (never both: they share their folders).
VARIANT ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(VARIANT)
# Where `make demo-bundle` finds an ISIC-layout folder (images and metadata.csv).
DATA ?= ../shared/data/dermoscopy

.PHONY: setup serve test test-full ranges lint demo-bundle demo-classifier demo-latents gpu-pack clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt clients/python/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt setuptools wheel
	$(BIN)/pip install -q --no-build-isolation -c constraints.txt -e ".[$(VARIANT),dev]" -e clients/python
	touch $@

serve: setup
	$(BIN)/python -m services.serve

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict clients/python/src/dermis_client

test: lint
	$(BIN)/pytest -m "not full"

test-full: lint
	$(BIN)/pytest

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

# How the bundle in bundles/demo was made: small images first, then twice their size. Stop it at any time with Ctrl-C; the
# same command goes on.
DEMO := --data $(DATA) --projected --batch 16 --channel-base 4096 --channel-max 256 --z-dim 256 --w-dim 256 --no-compile \
	--name demo --resume $(CREDIT)
demo-bundle: setup
	$(BIN)/dermis train gan $(DEMO) --resolution 64 --out runs/demo-64 --kimg 58.4 --snapshot-kimg 5
	$(BIN)/dermis train gan $(DEMO) --resolution 128 --out runs/demo --kimg 36.8 --snapshot-kimg 4 --from runs/demo-64/bundle
	$(BIN)/dermis evaluate --bundle runs/demo/bundle --data $(DATA) --extractor lite0
	rm -rf bundles/demo && mkdir -p bundles && cp -r runs/demo/bundle bundles/demo

# And its classifier: patients divided, near-duplicates across the parts removed.
demo-classifier: setup
	test -d runs/split || $(BIN)/dermis data split $(DATA) --parts train=0.65,validation=0.15,test=0.2 --out runs/split
	test -d runs/leaks || $(BIN)/dermis data leaks $(DATA) --split runs/split --remove --out runs/leaks
	$(BIN)/dermis train classifier --data $(DATA) --split runs/leaks/split --out runs/demo-classifier --name demo-classifier \
		--architecture tf_efficientnet_lite0 --size 192 --freeze-stages 2 --weights-dtype int8 --resume $(CREDIT)
	$(BIN)/dermis bundle attach-classifier bundles/demo runs/demo-classifier/classifier

# And what belongs to its latent space: the index of its training images, an encoder, directions.
demo-latents: setup
	$(BIN)/dermis index build --data $(DATA) --bundle bundles/demo
	$(BIN)/dermis train encoder --bundle bundles/demo --images $(DATA) --metadata runs/leaks/split/train.csv \
		--held-out runs/leaks/split/test.csv --steps 3000 --warm-up 500 --distance lite0 --out runs/demo-encoder --resume --attach
	$(BIN)/dermis directions fit bundles/demo

# What travels to a GPU machine without a network (docs/gpu.md), into the ignored folder gpu-pack.
gpu-pack: setup
	$(BIN)/python -m benchmarks.gpu.pack --data $(DATA) --train runs/leaks/split/train.csv \
		--held-out runs/leaks/split/held-out.csv \
		$(if $(wildcard ../shared/parity),--parity ../shared/parity)

clean:
	rm -rf $(VENV) .dermis build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
