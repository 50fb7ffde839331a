#!/usr/bin/env bash
# Tells Spark which GPUs an executor has (spark.executor.resource.gpu.discoveryScript): prints
# {"name": "gpu", "addresses": ["0", "1"]}. The addresses are nvidia-smi's, which the engine host
# hands on as CUDA_VISIBLE_DEVICES. Prints nothing and fails where there is no GPU to be found.
set -euo pipefail

if ! indices=$(nvidia-smi --query-gpu=index --format=csv,noheader); then
  echo "gpu-discovery.sh: nvidia-smi does not run here: is the NVIDIA driver installed?" >&2
  exit 1
fi
# Whole lines only: a GPU that has failed is a line of words with digits in it.
addresses=$(tr -d ' \r' <<<"$indices" | grep -xE '[0-9]+' | sed 's/.*/"&"/' | paste -sd, - || true)
if [[ -z "$addresses" ]]; then
  echo "gpu-discovery.sh: nvidia-smi lists no GPU" >&2
  exit 1
fi
echo "{\"name\": \"gpu\", \"addresses\": [${addresses//,/, }]}"
