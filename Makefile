# Two commands are enough: `make demo` and `make test`. Both set up .venv first; a second call reuses it.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt

.PHONY: install demo test bench audit lint clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt constraints-cpu.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 15) or sys.exit("Python 3.11 to 3.14 is needed, not " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# A CPU build of torch leaves the choice of triton to us; a CUDA build brings the one it needs.
	$(PIP) -c constraints-cpu.txt --editable '.[dev]' || { echo "torch brings its own triton: taking that"; $(PIP) --editable '.[dev]'; }
	touch $@

demo: install
	mkdir -p out
	$(BIN)/python -m streaming run --image examples/portrait.jpg --audio examples/voice.wav --out out/demo.mp4 --report out/demo.json
	@echo "The video is out/demo.mp4, its timings are in out/demo.json."

bench: install
	$(BIN)/python -m profiling bench --out out/bench.json

audit: install
	$(BIN)/python -m profiling audit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

test: lint audit
	$(BIN)/python -m pytest

clean:
	rm -rf .venv out
