#!/usr/bin/env bash
# Databricks init script of every node: removes the flash-attn of GPU runtimes, which is compiled for
# their own PyTorch. vLLM brings another PyTorch and its own attention kernels, but imports
# flash-attn where it is there, and ends with "undefined symbol".
set -euo pipefail

/databricks/python/bin/pip uninstall --yes --quiet flash-attn
