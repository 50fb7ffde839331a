# Everything a laptop needs, from an empty folder: Python 3.11+, Java 17 and the package registries.
SHELL := /bin/bash
PYTHON ?= python3
WAREHOUSE ?= warehouse/demo
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
REQUIREMENTS := conf/requirements.txt
# Workers must run the interpreter that has the packages.
export PYSPARK_PYTHON := $(abspath $(BIN)/python)
export PYSPARK_DRIVER_PYTHON := $(abspath $(BIN)/python)
export PATH := $(abspath $(BIN)):$(PATH)
