# PYTHON=python3.12 make demo   chooses the interpreter; versions 3.11 to 3.13 work.
PYTHON ?= python3
PIP = -m pip --disable-pip-version-check --quiet install
# every file that is installed has a hash that is listed; torch comes after it, without one
LOCKED = $(PIP) --require-hashes --no-deps
TORCH = $(PIP) -r requirements/torch.txt
LOCKS = $(addprefix requirements/,lock.txt floor.txt test.txt qlora.txt gguf.txt docs.txt tools.txt)
AUDIT = .venv-tools/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off
PARALLEL = --numprocesses auto --dist worksteal
INSTALL_SELF = $(PIP) --no-build-isolation --no-deps --editable .

.PHONY: demo real picture request methods memory bench bench-gpu bench-more bench-eval test test-floor test-newest test-slow test-qlora faults fuzz lint docs check lock dist version-of-tag audit clean

demo: .venv/.run  ## the whole main job on the embedded benchmark
	.venv/bin/python src/study.py --config-name=study experiment=study/pocket/lora

# make real DATA=FOLDER  takes TOFU from FOLDER/TOFU/*.json where there is no hub; SEEDS=[0,1,2] runs three seeds;
# SIZE=full takes 200 retain rows, all of holdout01, and 50 rows of each set of utility.
SEEDS ?= [0]
real: .venv/.run  ## a real chat model forgets real TOFU authors, without a GPU: docs/real_model.md
	.venv/bin/python $(LOCKED) -r requirements/gguf.txt
	.venv/bin/python -m unlora fetch-model smollm2
	OMP_NUM_THREADS=1 .venv/bin/python -m unlora study experiment=study/tofu/smollm2$(if $(filter full,$(SIZE)),_full) model=saves/models/smollm2 \
		"seeds=$(SEEDS)" workers=2 $(if $(DATA),"paths.datasets_dir=$(DATA)")

picture: .venv/.run  ## docs/report.png: the top of a page about the real model, by Chromium (needs `make real` before)
	.venv/bin/python -m unlora report $(addprefix saves/study/smollm2/seed0/,NPO SimNPO GradDiff UNDIAL PDU PDU-dialled) \
		--target saves/study/smollm2/seed0/target --gold saves/study/smollm2/seed0/gold \
		--title "SmolLM2-135M, made to forget two authors of TOFU" --output saves/report/picture
	.venv/bin/python benchmarks/picture.py saves/report/picture docs/report.png

request: .venv/.run  ## a deletion request on the embedded benchmark, exact and approximate, from rows to evidence
	.venv/bin/python benchmarks/request.py

methods: .venv/.run  ## docs/methods.md: every method on the embedded benchmark; goes on where it was stopped
	.venv/bin/python benchmarks/methods.py

memory: .venv/.run  ## peak memory of every method on one model, against GradAscent
	.venv/bin/python benchmarks/memory.py

bench: .venv/.run  ## a real model (UNLORA_REAL_MODEL) beside an earlier build (UNLORA_EARLIER), the start, and size S
	.venv/bin/python benchmarks/bench.py

bench-gpu: .venv/.run  ## the same on a GPU
	.venv/bin/python benchmarks/bench.py --only 3B

bench-more: .venv/.run  ## the page's other figures: memory, evaluation, growth, and what each part of a step is worth
	.venv/bin/python benchmarks/bench.py --only memory,eval,growth,steps,S-r128

bench-eval: .venv/.run  ## a whole evaluation, beside one that asks anew for every metric
	.venv/bin/python benchmarks/evaluate.py

test: .venv/.test  ## the default tests: offline, on the CPU, two to four minutes on two idle cores
	.venv/bin/python -m pytest -q $(PARALLEL)

test-floor: .venv-floor/.test  ## the same with the oldest packages that are supported
	.venv-floor/bin/python -m pytest -q $(PARALLEL)

test-newest:  ## the same with the newest packages that pip finds today, but for torch
	$(call new_environment,.venv-newest)
	.venv-newest/bin/python $(TORCH)
	.venv-newest/bin/python $(PIP) --upgrade --upgrade-strategy eager --constraint requirements/torch.txt \
		--editable ".[test,lm-eval]"
	.venv-newest/bin/python -m pip list | grep -E "^(torch|transformers|peft|accelerate|datasets|huggingface_hub) "
	.venv-newest/bin/python -m pytest -q $(PARALLEL)

test-slow: .venv/.test  ## what takes longer, and the other cases of long tables; every night
	.venv/bin/python -m pytest -q -m "slow and not gpu"

test-qlora: .venv/.test  ## the tests of quantised weights, with bitsandbytes
	.venv/bin/python $(LOCKED) -r requirements/qlora.txt
	.venv/bin/python -m pytest -q -m "not gpu" tests/model/test_quantised.py

faults: .venv/.test  ## real processes that are killed, run at once, or share a run; last line: N passed, N failed
	.venv/bin/python -m pytest -q -rs -m faults $(PARALLEL) tests/faults

fuzz: .venv/.test  ## 2,000 odd command lines: each is a config or ends in a message; in about ten minutes
	UNLORA_EXAMPLES=2000 .venv/bin/python -m pytest -q -n0 -m slow --timeout 3600 tests/bad_input/test_fuzz.py

lint: .venv/.test  ## ruff (format and rules) and mypy
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	mkdir -p .mypy_cache/path && ln -sfn ../../src .mypy_cache/path/unlora
	MYPYPATH=.mypy_cache/path .venv/bin/mypy

docs:  ## the pages as a site in site/, warnings are errors
	$(call new_environment,.venv-docs)
	.venv-docs/bin/python $(LOCKED) -r requirements/docs.txt
	mkdir -p .mypy_cache/path && ln -sfn ../../src .mypy_cache/path/unlora
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --quiet

check: lint test  ## what a change must pass

lock:  ## the hashes anew, of all files of the versions that requirements/*.txt name
	$(call new_environment,.venv-tools)
	.venv-tools/bin/python $(PIP) $$(grep -o '^uv==[^ ]*' requirements/tools.txt)
	@set -e; for file in $(LOCKS); do \
		sed -nE '/^#/d; s/^([^ \]+==[^ \]+).*/\1/p' $$file > $$file.versions; \
		.venv-tools/bin/uv pip compile --quiet --no-deps --universal --python-version 3.11 \
			--generate-hashes --no-header --no-annotate $$file.versions -o $$file.hashes; \
		{ sed -n '/^#/p' $$file; cat $$file.hashes; } > $$file.new; \
		mv $$file.new $$file; rm $$file.versions $$file.hashes; \
	done

dist: version-of-tag .venv-tools/.all  ## wheel and sdist, in dist/
	rm -rf dist
	.venv-tools/bin/uv build --quiet

version-of-tag:  # v0.2.0 on a commit is the version that its pyproject.toml has
	@version=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml); \
	for tag in $$(git tag --points-at HEAD 'v*'); do \
		[ "$$tag" = "v$$version" ] || { echo "The tag is $$tag, and pyproject.toml has version" \
			"$$version. Set the version, commit, and move the tag."; exit 2; }; \
	done

audit: .venv-tools/.all  ## known holes in what is installed, and what our own code must not do
	.venv-tools/bin/ruff check src
	@for file in lock test qlora gguf tools torch; do \
		echo "requirements/$$file.txt"; \
		$(AUDIT) -r requirements/$$file.txt > .venv-tools/audit.txt 2>&1; code=$$?; \
		if grep -qE '^ERROR|^Traceback' .venv-tools/audit.txt; then \
			echo "The vulnerability service cannot be reached (it is asked about each package" \
				"over the network), so nothing is known of the packages. Run make audit online."; \
			exit 2; fi; \
		cat .venv-tools/audit.txt; [ $$code = 0 ] || exit $$code; \
	done

clean:  ## environments and caches; runs in saves/ stay
	rm -rf .venv .venv-floor .venv-newest .venv-tools build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# a stamp is written when an environment is whole, so that an interrupted installation is repeated
.venv/.run: requirements/lock.txt requirements/torch.txt pyproject.toml
	$(call new_environment,.venv)
	@echo "Installing the packages of requirements/lock.txt into .venv"
	.venv/bin/python $(LOCKED) -r requirements/lock.txt
	.venv/bin/python $(TORCH)
	.venv/bin/python $(INSTALL_SELF)
	@touch $@

.venv/.test: .venv/.run requirements/test.txt
	.venv/bin/python $(LOCKED) -r requirements/test.txt
	@touch $@

.venv-floor/.test: requirements/floor.txt requirements/test.txt requirements/torch.txt pyproject.toml
	$(call new_environment,.venv-floor)
	@echo "Installing the packages of requirements/floor.txt into .venv-floor"
	.venv-floor/bin/python $(LOCKED) -r requirements/floor.txt -r requirements/test.txt
	.venv-floor/bin/python $(TORCH)
	.venv-floor/bin/python $(INSTALL_SELF)
	@touch $@

.venv-tools/.all: requirements/tools.txt
	$(call new_environment,.venv-tools)
	.venv-tools/bin/python $(LOCKED) -r requirements/tools.txt
	@touch $@

define new_environment
@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	{ echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13. Give one: make PYTHON=python3.12 ..."; exit 2; }
$(PYTHON) -m venv $(1)
endef
