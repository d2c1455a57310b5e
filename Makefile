# Everything a fresh machine needs is Python 3.10+ and pip: each target makes the environment it runs in.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SPACE := .venv-space
DEMO := demo

.PHONY: help demo test test-slow test-isa quality style bench bench-gpu clean

help:
	@echo "make demo       train on the embedded digits and draw pictures into $(DEMO)/"
	@echo "make test       run the tests"
	@echo "make test-slow  run the tests that take minutes"
	@echo "make test-isa   run the tests with the kernels of other processors, and with emulated rounding"
	@echo "make quality    check format, lint, and the types, those in the snippets of README.md and docs/ too"
	@echo "make style      format"
	@echo "make bench      run the benchmarks; with PEER=FILE against that training script of Diffusers too"
	@echo "make bench-gpu  measure training and sampling against Diffusers on a CUDA GPU, for docs/performance.md"

# Many processes import what is installed: a module is compiled once, also where the environment says otherwise.
export PYTHONDONTWRITEBYTECODE :=

# One environment; the stamp is made anew when what it rests on changes. Modules compile when they are first imported: most
# of those installed never are.
$(VENV)/stamp: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
		-c constraints.txt -e '.[demo,eval,optimizers,test]'
	touch $@

demo $(DEMO)/model_index.json: $(VENV)/stamp
	$(BIN)/python train_unconditional.py --output_dir $(DEMO) --overwrite_output_dir --seed 0
	$(BIN)/ddpm-hf sample $(DEMO) --num-images 64 --steps 250 --progressive --out $(DEMO)/pictures
	@echo "Look at $(DEMO)/pictures/grid.png, progressive.png and chain.gif"

test: $(VENV)/stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Kernels round differently on other processors: the suite must pass with theirs, and where every layer's last bits depend
# on alignment and batch size (tests/support/other_rounding.py).
test-isa: $(VENV)/stamp
	ONEDNN=1 ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
	ONEDNN=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
	OTHER_ROUNDING=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
	ONEDNN=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# A Space's environment, as the Hub makes it: Gradio wants an older Pillow than the package is tested with.
$(SPACE)/stamp: ddpm_hf/publishing/space/requirements.txt constraints.txt
	$(PYTHON) -m venv $(SPACE)
	grep -v '^pillow==' constraints.txt > $(SPACE)/constraints.txt
	$(SPACE)/bin/python -m pip install --quiet --disable-pip-version-check -c $(SPACE)/constraints.txt \
		-r ddpm_hf/publishing/space/requirements.txt gradio
	touch $@

# The page of a Space is looked at in Chromium; without it, and no right to install it, those tests are skipped.
test-slow: $(VENV)/stamp $(SPACE)/stamp
	command -v chromedriver || { test "$$(id -u)" = 0 && apt-get update && \
		apt-get install --yes --no-install-recommends chromium chromium-driver; } || true
	ONEDNN=1 $(BIN)/python -m pytest -m slow

quality: $(VENV)/stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.support.snippets

style: $(VENV)/stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/stamp $(DEMO)/model_index.json
	$(BIN)/python benchmarks/table_precision.py
	$(BIN)/python benchmarks/digit_quality.py $(DEMO)
	$(BIN)/python benchmarks/gpu.py --device cpu --networks small medium --compile --block 2 --minutes 20
	test -z "$(PEER)" || $(BIN)/python benchmarks/peers.py --peer-script "$(PEER)" --networks small medium

bench-gpu: $(VENV)/stamp
	$(BIN)/python benchmarks/gpu.py --out gpu.json --table docs/performance.md

clean:
	rm -rf $(VENV) $(SPACE) $(DEMO)
