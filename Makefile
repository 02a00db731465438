# Two commands: `make demo` and `make test`. Both make .venv first; PYTHON chooses the interpreter (3.11 to 3.13).
PYTHON ?= python3
BIN := .venv/bin
EDGECOMP := $(BIN)/edgecomp
OUT := build
SCENES := examples/scenes

.PHONY: demo test check clean

demo: .venv/ready
	@mkdir -p $(OUT)
	$(EDGECOMP) doctor
	$(EDGECOMP) compile examples/scenes-llava -o $(OUT)/scenes --method divprune --method cls --keep 64 --keep 128 --keep 192
	$(EDGECOMP) inspect $(OUT)/scenes
	$(EDGECOMP) run $(OUT)/scenes --plan cls-64 --stats --image $(SCENES)/images/scene-03.jpg \
		--prompt "what number is written?" --prompt "what color is the star?"
	$(EDGECOMP) eval $(OUT)/scenes --plan full --data $(SCENES)/questions.jsonl
	$(EDGECOMP) profile $(OUT)/scenes --data $(SCENES)/questions.jsonl --images 16 \
		--device jetson-orin-nano-8gb --device jetson-agx-orin-64gb --device rtx-4090 -o $(OUT)/report.html
	@echo "Open the report: $(OUT)/report.html"

test: .venv/ready-dev check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/python tests/tensorrt_stubs.py
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.10 -p edgecomp_runtime
	$(BIN)/lint-imports --no-cache
	@echo "resolving what a device needs, for Python 3.10"
	@$(BIN)/pip install --quiet --disable-pip-version-check --dry-run --ignore-installed --python-version 3.10 --only-binary=:all: \
		--target build/none $$($(BIN)/python -c "import tomllib; \
		print(*[d.split(';')[0].strip() for d in tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']])")

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/ready: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[export,cpu]"
	@touch $@

.venv/ready-dev: pyproject.toml constraints.txt .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[export,cpu,dev]"
	@touch $@

clean:
	rm -rf $(OUT) .venv
