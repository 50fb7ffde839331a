#!/usr/bin/env bash
# EMR bootstrap action for every node: mounts what YARN needs to give out GPUs, and installs the
# wheel and vLLM into a Python of its own, /opt/cdr/venv.
#
#     bootstrap.sh s3://BUCKET/PREFIX [REQUIREMENT...]
#
# PREFIX holds one wheel that `make package` built. REQUIREMENTs are given to pip as well:
# vllm==0.19.1 is the newest on CUDA 12; without it the newest of all comes, which wants an NVIDIA
# driver of 580 or later.
set -euo pipefail

if [[ $# -lt 1 || "$1" != s3://* ]]; then
  echo "usage: bootstrap.sh s3://BUCKET/PREFIX [REQUIREMENT...]" >&2
  exit 2
fi
prefix=${1%/}
shift

# YARN isolates GPUs by the devices controller of control groups v1; EMR 7 boots with v2 only.
sudo mkdir -p /spark-rapids-cgroup/devices
sudo mount -t cgroup -o devices cgroupv1-devices /spark-rapids-cgroup/devices
sudo chmod a+rwx -R /spark-rapids-cgroup

# Weights and Python are read by the users that YARN runs containers as; what vLLM compiles is kept
# for the node's next engine host.
sudo mkdir -p /opt/cdr /mnt/cdr/huggingface /mnt/cdr/cache /mnt/cdr/compiled
sudo chown -R "$(id -un)" /opt/cdr
sudo chmod 1777 /mnt/cdr /mnt/cdr/huggingface /mnt/cdr/cache /mnt/cdr/compiled

# Triton, below vLLM, compiles its launchers on the node.
sudo dnf install --quiet --assumeyes gcc python3.11-devel

aws s3 cp --recursive --exclude '*' --include '*.whl' "$prefix/" /opt/cdr/dist/
wheels=(/opt/cdr/dist/*.whl)
if [[ ${#wheels[@]} -ne 1 || ! -f "${wheels[0]}" ]]; then
  echo "bootstrap.sh: expected one wheel in $prefix/, found: ${wheels[*]}" >&2
  exit 1
fi

# EMR 7's own python3 is 3.9.
python3.11 -m venv /opt/cdr/venv
/opt/cdr/venv/bin/python -m pip install --quiet --upgrade pip
/opt/cdr/venv/bin/python -m pip install --quiet "${wheels[0]}[vllm]" "$@"
# Delta's Python side, for the JARs that EMR has (spark.jars); its own PySpark comes with EMR.
/opt/cdr/venv/bin/python -m pip install --quiet --no-deps 'delta-spark==3.3.2'
/opt/cdr/venv/bin/python -m pip install --quiet importlib-metadata

conf=$(/opt/cdr/venv/bin/python -c 'from cdr.text_files import package_conf; print(package_conf())')
install -m 0755 "$conf/cluster/gpu-discovery.sh" /opt/cdr/gpu-discovery.sh
