# Two commands are enough: `make demo` and `make test`. Both set up .venv first; a second call reuses it.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := -c constraints.txt
# Without an NVIDIA driver, the versions of torch and triton that the CPU tests run with.
ifeq ($(shell command -v nvidia-smi),)
CONSTRAINTS += -c constraints-cpu.txt
endif

.PHONY: install demo test lint clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt constraints-cpu.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 15) or sys.exit("Python 3.11 to 3.14 is needed, not " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[dev]'
	touch $@

demo: install
	mkdir -p out
	$(BIN)/python -m streaming run --image examples/portrait.jpg --audio examples/voice.wav --out out/demo.mp4 --report out/demo.json
	@echo "The video is out/demo.mp4, its timings are in out/demo.json."

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest

clean:
	rm -rf .venv out
