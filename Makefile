# Two commands are enough: `make demo` and `make test`. Both set up .venv first; a second call reuses it.
PYTHON ?= python3
BIN := .venv/bin
CPU_INDEX := https://download.pytorch.org/whl/cpu
# One case of each kernel that a GPU other than Hopper runs by default; there the library computes the VAE's convolutions.
FORMS := 'text_image_attention/14b-w1-prompt/*' 'frame_attention/14b-w1/*' 'chunk_attention/14b-w1/*' \
  'audio_layer/14b-w1/*' 'linear/14b-w1-out/*' 'linear/14b-w1-down/fp8' 'layer_norm_modulate/14b-w1/*' \
  'quantize_rows/14b-w1-wide/*' 'rms_norm_rope*/14b-w1/*' 'rms_norm_silu/14b-w1-level2/*' 'lab_transfer/14b-w1/*'
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt

.PHONY: install demo test bench audit soak lint clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt constraints-cpu.txt constraints-gpu.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 15) or sys.exit("Python 3.11 to 3.14 is needed, not " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@if nvidia-smi -L >/dev/null 2>&1; then \
	  echo "There is an NVIDIA GPU: installing the torch and triton of constraints-gpu.txt."; \
	  set -- -c constraints-gpu.txt; \
	elif $(BIN)/python -c 'import urllib.request; urllib.request.urlopen("$(CPU_INDEX)/torch/", timeout=5)' 2>/dev/null; then \
	  echo "There is no NVIDIA GPU: installing a CPU build of torch from $(CPU_INDEX)."; \
	  set -- -c constraints-cpu.txt --extra-index-url $(CPU_INDEX); \
	else \
	  echo "There is no NVIDIA GPU, and $(CPU_INDEX) cannot be reached: installing torch from pip's own index."; \
	  set -- -c constraints-cpu.txt; \
	fi; \
	$(PIP) "$$@" --editable '.[dev]' 2>.venv/pip.log || { \
	  echo "That index has no CPU build of torch: installing the torch and triton of constraints-gpu.txt."; \
	  $(PIP) -c constraints-gpu.txt --editable '.[dev]'; }
	touch $@

demo: install
	mkdir -p out
	$(BIN)/python -m streaming run --image examples/portraits/amara.jpg --audio examples/voice.wav --out out/demo.mp4 --report out/demo.json
	@echo "The video is out/demo.mp4, its timings are in out/demo.json."

bench: install
	$(BIN)/python -m profiling bench --out out/bench.json

# What runs on an H100 as it is tuned, at every number of GPUs; what runs by default on one GPU of any other kind.
audit: install
	$(BIN)/python -m profiling audit
	$(BIN)/python -m profiling audit $(FORMS) $(foreach target,80 86 89 100 120,--target sm_$(target))

soak: install
	$(BIN)/python -m profiling soak --minutes 30 --out out/soak.json
	$(BIN)/python -m profiling visit --minutes 30 --out out/visit.json

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

test: export PYTHONDONTWRITEBYTECODE :=  # hundreds of processes would compile our modules again
test: lint audit
	$(BIN)/python -m pytest -m "not gpu" --numprocesses=2 --dist worksteal
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf .venv out
