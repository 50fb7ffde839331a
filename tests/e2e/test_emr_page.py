"""The commands of docs/how-to/emr.md, run as they stand by the AWS command line.

A server plays AWS. What is asserted is what EMR would have got.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
from moto.moto_api import recorder

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/how-to/emr.md").read_text()
COMMANDS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
CONFIG = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0]


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An account with a bucket and a subnet, and a checkout to type the commands in."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    # What a test before this one has made lives in this process, and not in its server.
    requests.post(f"http://{host}:{port}/moto-api/reset", timeout=60).raise_for_status()
    boto3.client("s3").create_bucket(Bucket="my-bucket")
    monkeypatch.chdir(tmp_path)  # the recording lies in the working directory
    recorder.start_recording()
    checkout = tmp_path / "checkout"
    (checkout / "dist").mkdir(parents=True)
    (checkout / "conf").symlink_to(ROOT / "conf")
    (checkout / "dist/cdr_annotate-0.1.0-py3-none-any.whl").touch()
    (checkout / "annotate.yaml").write_text(CONFIG)
    yield checkout
    recorder.stop_recording()
    server.stop()


def asked() -> Iterator[tuple[str, Any]]:
    """Give every call that the server got: its name and its parameters."""
    for line in recorder.download_recording().splitlines():
        call = json.loads(line)
        if target := call["headers"].get("X-Amz-Target"):
            yield target, json.loads(base64.b64decode(call["body"]))


def type_in(checkout: Path, *commands: str) -> subprocess.CompletedProcess[str]:
    """Run commands in one shell; the wheel is there already."""
    subnet = boto3.client("ec2").describe_subnets()["Subnets"][0]["SubnetId"]
    text = "\n".join(["make() { :; }", *commands]).replace("subnet-0123456789abcdef0", subnet)
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=checkout,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )


@pytest.mark.parametrize(
    ("files", "overhead", "nodes", "router"),
    [
        ("conf/cluster/emr", "64g", {"g6e.4xlarge", "g6e.8xlarge"}, "strong"),
        ("conf/cluster/emr/mixtral", "200g", {"g6e.12xlarge"}, "router"),
    ],
)
def test_the_commands_of_the_page_create_the_cluster_and_its_steps(
    aws: Path, files: str, overhead: str, nodes: set[str], router: str
) -> None:
    *commands, terminate = COMMANDS
    assert "terminate-clusters" in terminate
    assert f"FILES={files}" in PAGE
    commands = [re.sub(r"FILES=\S+", f"FILES={files}", text) for text in commands]
    done = type_in(aws, *commands)
    assert done.returncode == 0, done.stderr

    listing = boto3.client("s3").list_objects_v2(Bucket="my-bucket")["Contents"]
    keys = {item["Key"] for item in listing}
    assert {"cdr/bootstrap.sh", "cdr/annotate.yaml"} < keys
    assert "cdr/dist/cdr_annotate-0.1.0-py3-none-any.whl" in keys

    emr = boto3.client("emr")
    [listed] = emr.list_clusters()["Clusters"]
    assert listed["Id"] in done.stdout
    cluster = emr.describe_cluster(ClusterId=listed["Id"])["Cluster"]
    assert {application["Name"] for application in cluster["Applications"]} == {"Hadoop", "Spark"}
    given = {c["Classification"]: c["Properties"] for c in cluster["Configurations"]}
    assert given["spark-defaults"]["spark.executor.memoryOverhead"] == overhead
    # The server keeps no fleets: what it was asked for.
    [request] = [call for target, call in asked() if target == "ElasticMapReduce.RunJobFlow"]
    sizes = {
        fleet["InstanceFleetType"]: (
            fleet.get("TargetOnDemandCapacity", 0), fleet.get("TargetSpotCapacity", 0)
        )
        for fleet in request["Instances"]["InstanceFleets"]
    }  # fmt: skip
    assert sizes == {"MASTER": (1, 0), "CORE": (1, 0), "TASK": (0, 3 if router == "strong" else 1)}
    types = {
        choice["InstanceType"]
        for fleet in request["Instances"]["InstanceFleets"]
        for choice in fleet["InstanceTypeConfigs"]
        if fleet["InstanceFleetType"] != "MASTER"
    }
    assert types == nodes
    assert request["AutoTerminationPolicy"] == {"IdleTimeout": 3600}
    assert request["ServiceRole"] == "EMR_DefaultRole"
    [action] = emr.list_bootstrap_actions(ClusterId=listed["Id"])["BootstrapActions"]
    assert action["ScriptPath"] == "s3://my-bucket/cdr/bootstrap.sh"
    assert action["Args"] == ["s3://my-bucket/cdr/dist", "vllm==0.19.1"]

    steps: dict[str, Any] = {
        step["Name"]: step["Config"] for step in emr.list_steps(ClusterId=listed["Id"])["Steps"]
    }
    assert set(steps) == {"dry run", "trial", "annotate"}
    assert {step["Jar"] for step in steps.values()} == {"command-runner.jar"}
    assert steps["annotate"]["Args"][0] == "spark-submit"
    assert "s3://my-bucket/cdr/annotate.yaml" in steps["annotate"]["Args"]
    assert {"engine=vllm", f"reward.routing.model={router}"} < set(steps["annotate"]["Args"])
    assert steps["dry run"]["Args"] == [*steps["annotate"]["Args"], "--dry-run"]
    assert steps["trial"]["Args"] == [*steps["annotate"]["Args"], "--limit", "20"]

    assert type_in(aws, f"CLUSTER={listed['Id']}", terminate).returncode == 0
    state = emr.describe_cluster(ClusterId=listed["Id"])["Cluster"]["Status"]["State"]
    assert state.startswith("TERMINAT")


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("instance-fleets.json", "WeightedCapacity", "WeightedCapacty"),
        ("configurations.json", "Configurations", "Configuratoins"),
        ("steps.json", "ActionOnFailure", "ActionOnFailures"),
    ],
)
def test_a_typo_in_a_file_ends_the_command(aws: Path, file: str, right: str, wrong: str) -> None:
    (aws / "conf").unlink()
    (aws / "conf/cluster").mkdir(parents=True)
    for name in ("instance-fleets.json", "configurations.json", "steps.json", "bootstrap.sh"):
        text = (ROOT / "conf/cluster/emr" / name).read_text()
        (aws / "conf/cluster/emr").mkdir(exist_ok=True)
        (aws / "conf/cluster/emr" / name).write_text(
            text.replace(right, wrong) if name == file else text
        )
    done = type_in(aws, *(text for text in COMMANDS[:-1] if "aws s3 cp" not in text))
    assert done.returncode != 0
    assert wrong in done.stderr
