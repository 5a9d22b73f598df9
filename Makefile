# Two commands on a fresh machine: `make demo` and `make test`. Each sets up what it needs; the second time it is quick.
PYTHON ?= python3
VENV   ?= .venv
PEERS  ?= .venv-peers
OLDEST ?= .venv-oldest
OLDER  ?= .venv-older
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
comma   := ,
ON      = @echo "==> $(1)"

.PHONY: help setup demo test test-slow test-oldest test-faults test-fuzz other-readers check fix docs gpu-check bench gpu-bench clean

help:
	@echo "make demo       train a real model on real rows on this CPU, and see what changed (about ten minutes)"
	@echo "make test       all tests but the slow ones and the faults"
	@echo "make check      format, lint, types, layers, fast tests"
	@echo "make fix        format and mend what the linter can"
	@echo "make test-slow  the tests that take minutes each"
	@echo "make test-faults  kills, full disks, signals and hostile input by the hundred (about 20 minutes)"
	@echo "make other-readers  what is written, read by transformers 4.57 in a venv of its own (three minutes)"
	@echo "make test-fuzz  3,000 odd recipes, rows, names, folders and options through every command (15 to 40 minutes)"
	@echo "make test-oldest  the tests of make test with the oldest packages that pyproject.toml allows"
	@echo "make docs       regenerate docs/recipe.md and docs/cli.md"
	@echo "make gpu-check  the tests that need a GPU"
	@echo "make gpu-bench  training speed on a GPU, with random weights of the shape of an 8B model: no download"
	@echo "make bench      training speed beside TRL and Trainer, which get a venv of their own (twenty to thirty minutes)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(call ON,setting up $(VENV) (once; pinned packages from constraints.txt))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "loratune needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module: apt-get install python3-venv"; exit 1; }
	@# torch first, by its exact version: a range would fetch the newest build with its CUDA packages
	@$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY)
	@$(BIN)/python demo/demo.py

test: $(READY)
	$(call ON,tests (without the slow ones))
	@$(BIN)/python -m pytest -n auto -m "not slow and not gpu and not faults"

test-slow: $(READY)
	$(call ON,slow tests)
	@$(BIN)/python -m pytest -m "slow and not gpu and not faults"

test-faults: $(READY)
	$(call ON,faults: kills$(comma) full disks$(comma) signals)
	@$(BIN)/python -m pytest -m faults -s

other-readers: $(READY) $(OLDER)/.ready
	$(call ON,runs$(comma) merges$(comma) full models and a .gguf$(comma) read by transformers 4)
	@rm -rf $(OLDER)/models && mkdir $(OLDER)/models
	@$(BIN)/python -m tests.other_readers.newer $(OLDER)/models $(OLDER)/bin/python

$(OLDER)/.ready:
	$(call ON,setting up $(OLDER) with transformers 4 (once))
	@$(PYTHON) -m venv $(OLDER)
	@$(OLDER)/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@$(OLDER)/bin/pip install --quiet --disable-pip-version-check 'transformers==4.57.*' peft
	@touch $@

test-fuzz: $(READY)
	$(call ON,fuzz: no traceback$(comma) no run over 60 s or 2 GB)
	@$(BIN)/python -m tests.faults.fuzz --seed 0 --cases 2000
	@$(BIN)/python -m tests.faults.fuzz --seed 0 --cases 1000 --kind samples

# what an older package warns of is no fault of ours: warnings are not errors here
test-oldest: $(OLDEST)/.ready
	$(call ON,tests with the oldest packages)
	@$(OLDEST)/bin/python -m pytest -n auto -W default -m "not slow and not gpu and not faults" \
		--deselect tests/test_docs.py::test_generated_pages_are_up_to_date  # another rich lays out another page

$(OLDEST)/.ready: pyproject.toml
	$(call ON,setting up $(OLDEST) with the lower bounds of pyproject.toml (once))
	@$(PYTHON) -m venv $(OLDEST)
	@$(PYTHON) -c 'import tomllib; [print(one.replace(">=", "==")) for one in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]]' > $(OLDEST)/oldest.txt
	@$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -r $(OLDEST)/oldest.txt
	@$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -c $(OLDEST)/oldest.txt -e ".[dev]"
	@touch $@

# what CUDA libraries warn of differs by card and version, and is no fault of ours: warnings are shown, not errors
gpu-check: $(READY)
	$(call ON,GPU tests)
	@$(BIN)/python -m pytest -W default -m gpu

bench: $(READY) $(PEERS)/.ready
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	@$(BIN)/python -c 'import sys; sys.path.insert(0, "demo"); import demo; demo.fetch_base()'
	$(call ON,training speed: results in benchmarks/results)
	@$(BIN)/python benchmarks/train.py --peer-python $(PEERS)/bin/python

gpu-bench: $(READY) $(PEERS)/.ready
	@$(PEERS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt bitsandbytes liger-kernel
	@# its kernels alone are used: they need none of the many packages that it pins
	@$(PEERS)/bin/pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python axolotl==0.21.0
	$(call ON,training speed on the GPU: results in benchmarks/results)
	@$(BIN)/python benchmarks/gpu.py --peer-python $(PEERS)/bin/python

$(PEERS)/.ready:
	$(call ON,setting up $(PEERS) with the peers (once))
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@$(PEERS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt trl==1.16.0 peft
	@touch $@

check: $(READY)
	$(call ON,format)
	@$(BIN)/ruff format --check --quiet
	$(call ON,lint)
	@$(BIN)/ruff check --quiet
	$(call ON,types)
	@$(BIN)/mypy
	$(call ON,fast tests)
	@$(BIN)/python -m pytest -n auto -m "not slow and not gpu and not faults" --ignore tests/oracle --ignore tests/test_recipes.py

fix: $(READY)
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix

docs: $(READY)
	@$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) $(PEERS) $(OLDER) $(OLDEST) demo/data demo/runs
