"""The files of conf/cluster against the vendors' own models: every key is one they know.

Databricks: the dataclasses of databricks-bundles. EMR: botocore's service model and AWS' list of
instance types (in moto). Spark and YARN settings: the constants in Spark's and Hadoop's own jars.
Nothing here needs a network. The commands of docs/how-to/emr.md are run in tests/e2e.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import numpy as np
import pyspark
import pytest
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator
from databricks.bundles.jobs import DataSecurityMode, Job
from moto import mock_aws
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from safetensors.numpy import save_file

from cdr.config import load_annotate_config
from cdr.engines import vllm_setup
from cdr.errors import SetupError
from cdr.gpus import task_gpus
from cdr.placement import place as place_models
from cdr.plan import AnnotationPlan, plan_annotation
from cdr.tables import (
    BENCHMARK_PAIRS,
    BENCHMARK_RESULTS,
    COMPLETIONS,
    POLICY_RESULTS,
    STUDY_PAIRS,
    TABLES,
    VERDICTS,
)
from jobs.annotate import parse
from tests.tokenizers import CHATML_TEMPLATE, make_small_bpe

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "conf" / "cluster"
EMR = CLUSTER / "emr"
BUNDLE = yaml.safe_load((CLUSTER / "databricks" / "databricks.yml").read_text())
JOB = BUNDLE["resources"]["jobs"]["annotate"]
TASK = JOB["tasks"][0]
NEW_CLUSTER = JOB["job_clusters"][0]["new_cluster"]
EMR_SETS = {"emr": EMR, "emr/mixtral": EMR / "mixtral"}
"""Folders with the same three files: one GPU per node, and several with a router over them."""


def emr_json(name: str) -> dict[str, Any]:
    return {kind: json.loads((folder / name).read_text()) for kind, folder in EMR_SETS.items()}


FLEETS = emr_json("instance-fleets.json")
CONFIGURATIONS = emr_json("configurations.json")
STEPS = emr_json("steps.json")
EMR_PAGE = (ROOT / "docs/how-to/emr.md").read_text()
RELEASE = re.findall(r"--release-label (emr-\S+)", EMR_PAGE)[0]

FREE_MAPS = {"spark_conf", "spark_env_vars", "Properties"}
"""Keys whose values are settings of another program: checked against that program below."""

USER = "someone@example.org"
FILES = "/Workspace/Users/someone@example.org/.bundle/cdr/files"

Place = tuple[str | int, ...]


def keys_of(tree: Any, place: Place = ()) -> Iterator[Place]:
    """Give the place of every key of nested dicts and lists, those of free maps left out."""
    items: Iterator[tuple[str | int, Any]] = iter(())
    if isinstance(tree, dict):
        items = iter(tree.items())
    elif isinstance(tree, list):
        items = iter(enumerate(tree))
    for key, value in items:
        if isinstance(key, str):
            yield (*place, key)
        if key not in FREE_MAPS:
            yield from keys_of(value, (*place, key))


def with_typo(tree: Any, place: Place) -> Any:
    """Give a copy with the key at a place misspelt."""
    changed = copy.deepcopy(tree)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[f"{place[-1]}s"] = inner.pop(place[-1])
    return changed


def named(places: Iterator[Place]) -> list[Any]:
    return [pytest.param(place, id=".".join(map(str, place))) for place in places]


# --- Databricks --------------------------------------------------------------------------------


def merged(base: Any, override: Any) -> Any:
    """Merge a target's values into the job's, as the Databricks CLI does.

    Source: github.com/databricks/cli, libs/dyn/merge: maps key by key, sequences one after the
    other; tasks that have the same key are one.
    """
    if isinstance(base, dict):
        only = {key: value for key, value in override.items() if key not in base}
        return {k: merged(v, override[k]) if k in override else v for k, v in base.items()} | only
    if not isinstance(base, list):
        return override
    if not all(isinstance(item, dict) and "task_key" in item for item in [*base, *override]):
        return [*base, *override]
    tasks = {item["task_key"]: item for item in base}
    for item in override:
        tasks[item["task_key"]] = merged(tasks.get(item["task_key"], {}), item)
    return list(tasks.values())


def job_of(target: str) -> dict[str, Any]:
    """Give the job as it is deployed to a target, variables in their places."""
    spec = BUNDLE["targets"][target]
    job = merged(JOB, spec.get("resources", {}).get("jobs", {}).get("annotate", {}))
    return dict(yaml.safe_load(substituted(yaml.safe_dump(job, width=1000), target)))


def parameters_of(target: str) -> list[str]:
    return list(job_of(target)["tasks"][0]["python_wheel_task"]["parameters"])


@pytest.mark.parametrize("target", BUNDLE["targets"])
def test_databricks_knows_every_key_of_the_job(target: str) -> None:
    job = Job.from_dict(job_of(target))
    assert len(job.tasks) == 1
    assert job.tasks[0].python_wheel_task is not None
    cluster = job.job_clusters[0].new_cluster
    assert cluster.data_security_mode == DataSecurityMode.DATA_SECURITY_MODE_DEDICATED
    assert set(BUNDLE) == {"bundle", "variables", "targets", "resources"}
    assert set(BUNDLE["resources"]) == {"jobs"}
    spec = BUNDLE["targets"][target]
    assert set(spec) <= {"default", "variables", "resources"}
    assert set(spec.get("variables", {})) <= set(BUNDLE["variables"])


@pytest.mark.parametrize("place", named(keys_of(JOB)))
def test_databricks_refuses_a_typo(place: Place) -> None:
    with pytest.raises((ValueError, TypeError), match=r"Unexpected field|missing .* required"):
        Job.from_dict(with_typo(JOB, place))


def test_the_task_runs_on_its_cluster_with_the_wheel_it_needs() -> None:
    assert {task["job_cluster_key"] for task in JOB["tasks"]} == {
        cluster["job_cluster_key"] for cluster in JOB["job_clusters"]
    }
    assert TASK["libraries"] == [{"whl": "${var.wheel}"}, {"pypi": {"package": "${var.vllm}"}}]
    assert "spark_submit_task" not in TASK


def test_the_entry_point_is_a_command_of_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wheel = TASK["python_wheel_task"]
    assert wheel["package_name"] == project["name"].replace("-", "_")
    version = f"{wheel['package_name']}-{project['version']}-py3-none-any.whl"
    assert BUNDLE["variables"]["wheel"]["default"].endswith(f"/{version}")
    module, _, function = project["scripts"][wheel["entry_point"]].partition(":")
    assert callable(getattr(import_module(module), function))


def test_pages_and_files_name_the_wheel_that_is_built() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    places = [*(ROOT / "docs/how-to").glob("*.md"), *CLUSTER.rglob("*.yml")]
    named = {w for p in places for w in re.findall(r"cdr_annotate-[\w.\-]+\.whl", p.read_text())}
    assert named == {f"cdr_annotate-{project['version']}-py3-none-any.whl"}


def references(tree: Any) -> set[str]:
    return set(re.findall(r"\$\{([^}]*)\}", json.dumps(tree)))


def test_every_variable_is_declared_and_used() -> None:
    declared = {f"var.{name}" for name in BUNDLE["variables"]}
    assert references(BUNDLE) - declared == {
        "workspace.current_user.userName", "workspace.file_path"
    }  # fmt: skip
    assert declared - references(BUNDLE) == set()
    assert all({"description", "default"} == set(v) for v in BUNDLE["variables"].values())


def substituted(text: str, target: str = "production") -> str:
    values = {f"var.{name}": v["default"] for name, v in BUNDLE["variables"].items()}
    given = BUNDLE["targets"][target].get("variables", {})
    values |= {f"var.{name}": value for name, value in given.items()}
    values["workspace.current_user.userName"] = USER
    values["workspace.file_path"] = FILES
    while found := re.search(r"\$\{([^}]*)\}", text):
        text = text.replace(found[0], str(values[found[1]]))
    return text


def test_the_runtime_is_one_for_machine_learning_with_gpus_from_17_3_on() -> None:
    version = substituted(NEW_CLUSTER["spark_version"])
    found = re.fullmatch(r"(\d+)\.(\d+)\.x-gpu-ml-scala2\.13", version)
    assert found is not None
    assert (int(found[1]), int(found[2])) >= (17, 3)


def page_config(page: str, folder: Path) -> Path:
    """Write the YAML that a how-to page shows to a file."""
    text = (ROOT / "docs/how-to" / page).read_text()
    (folder / "annotate.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    return folder / "annotate.yaml"


def test_the_databricks_task_has_valid_arguments(tmp_path: Path) -> None:
    arguments = parse(parameters_of("production"))
    assert arguments.config == "/Volumes/main/cdr/files/annotate.yaml"
    config = load_annotate_config(page_config("databricks.md", tmp_path), arguments.set)
    assert config.warehouse == "/Volumes/main/cdr/files/warehouse"
    # What annotate writes, by the names that SQL knows.
    others = (
        COMPLETIONS, VERDICTS, BENCHMARK_PAIRS, BENCHMARK_RESULTS, STUDY_PAIRS, POLICY_RESULTS
    )  # fmt: skip
    written = {table.name for table in TABLES} - {table.name for table in others}
    assert config.tables == {name: f"main.cdr.{name}" for name in written}
    assert config.tracking.experiment == f"/Users/{USER}/cdr-annotate"


def test_the_trial_of_the_databricks_page_has_valid_arguments(tmp_path: Path) -> None:
    page = (ROOT / "docs/how-to/databricks.md").read_text()
    [common] = re.findall(r'^common="(.*?)"', page, re.DOTALL | re.MULTILINE)
    [router] = re.findall(r'^router="(.*?)"', page, re.MULTILINE)
    trials = re.findall(r"bundle run (?:--target (\w+) )?annotate -- \$common (.*)", page)
    assert trials == [("", "--dry-run"), ("", "--limit 20"), ("mixtral", "$router --limit 20")]
    for target, trial in trials:
        arguments = parse([*common.split(), *trial.replace("$router", router).split()])
        config = load_annotate_config(page_config("databricks.md", tmp_path), arguments.set)
        assert config.warehouse == "/Volumes/main/cdr/files/trial"
        assert config.tables == {}
        # Nothing else of the models is another than in the real run.
        real = parse(parameters_of(target or "production"))
        same = load_annotate_config(page_config("databricks.md", tmp_path), real.set)
        assert config.reward == same.reward


def test_the_init_script_lies_beside_the_bundle_and_removes_what_breaks_vllm(
    tmp_path: Path,
) -> None:
    [script] = job_of("production")["job_clusters"][0]["new_cluster"]["init_scripts"]
    path = CLUSTER / "databricks" / script["workspace"]["destination"].removeprefix(f"{FILES}/")
    text = path.read_text().replace("/databricks/python/bin/", "")
    (tmp_path / "script.sh").write_text(text)
    done = run_script(tmp_path / "script.sh", tmp_path, pip='echo "$@" > "$ROOT/pip"')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pip").read_text() == "uninstall --yes --quiet flash-attn\n"


# --- EMR ---------------------------------------------------------------------------------------


def problems(shape: str, value: Any) -> str:
    """Say what botocore finds wrong with a value of one of EMR's shapes; empty: nothing."""
    shapes = get_session().get_service_model("emr")
    return str(ParamValidator().validate(value, shapes.shape_for(shape)).generate_report())


@pytest.mark.parametrize("kind", EMR_SETS)
def test_emr_knows_every_key(kind: str) -> None:
    assert problems("InstanceFleetConfigList", FLEETS[kind]) == ""
    assert problems("ConfigurationList", CONFIGURATIONS[kind]) == ""


def named_in_sets(files: dict[str, Any]) -> list[Any]:
    return named((kind, *place) for kind, file in files.items() for place in keys_of(file))


@pytest.mark.parametrize("place", named_in_sets(FLEETS))
def test_emr_refuses_a_typo_in_the_fleets(place: Place) -> None:
    wrong = with_typo(FLEETS[str(place[0])], place[1:])
    assert f'"{place[-1]}s"' in problems("InstanceFleetConfigList", wrong)


@pytest.mark.parametrize("place", named_in_sets(CONFIGURATIONS))
def test_emr_refuses_a_typo_in_the_configurations(place: Place) -> None:
    wrong = with_typo(CONFIGURATIONS[str(place[0])], place[1:])
    assert f'"{place[-1]}s"' in problems("ConfigurationList", wrong)


@pytest.fixture
def emr(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with mock_aws():
        yield boto3.client("emr", region_name="us-east-1")


@pytest.mark.parametrize("kind", EMR_SETS)
def test_the_release_has_the_instances_and_they_hold_an_executor(emr: Any, kind: str) -> None:
    listed = emr.list_supported_instance_types(ReleaseLabel=RELEASE)["SupportedInstanceTypes"]
    known = {instance["Type"]: instance for instance in listed}
    spark = settings("spark-defaults", kind)
    executor_gb = sum(
        int(spark[f"spark.executor.{key}"].removesuffix("g"))
        for key in ("memory", "memoryOverhead")
    )
    for fleet in FLEETS[kind]:
        for choice in fleet["InstanceTypeConfigs"]:
            instance = known[choice["InstanceType"]]
            if fleet["InstanceFleetType"] != "MASTER":
                # YARN gets about nine tenths of a node.
                assert executor_gb < 0.9 * instance["MemoryGB"]
                assert int(spark["spark.executor.cores"]) <= instance["VCPU"]
                if not gives_out_gpus(spark):  # its tasks claim the node's: no second one there
                    assert 2 * executor_gb > instance["MemoryGB"]


def settings(classification: str, kind: str = "emr") -> dict[str, str]:
    [found] = [c for c in CONFIGURATIONS[kind] if c["Classification"] == classification]
    return dict(found["Properties"])


def gives_out_gpus(spark: dict[str, str]) -> bool:
    return any(".resource.gpu." in key for key in spark)


def test_emr_gives_out_gpus_as_its_documentation_asks_for() -> None:
    # docs.aws.amazon.com/emr/latest/ReleaseGuide/emr-spark-rapids.html, sample file for 7.x.
    cgroup = settings("yarn-site")["yarn.nodemanager.linux-container-executor.cgroups.mount-path"]
    [executor] = [c for c in CONFIGURATIONS["emr"] if c["Classification"] == "container-executor"]
    nested = {c["Classification"]: c["Properties"] for c in executor["Configurations"]}
    assert nested == {
        "gpu": {"module.enabled": "true"},
        "cgroups": {"root": cgroup, "yarn-hierarchy": "yarn"},
    }
    assert (
        f"mount -t cgroup -o devices cgroupv1-devices {cgroup}/devices"
        in (EMR / "bootstrap.sh").read_text()
    )
    assert settings("capacity-scheduler") == {
        "yarn.scheduler.capacity.resource-calculator": "org.apache.hadoop.yarn.util.resource."
        "DominantResourceCalculator"
    }
    assert settings("spark") == {"enableSparkRapids": "true"}
    assert settings("delta-defaults") == {"delta.enabled": "true"}
    assert {c["Classification"] for c in CONFIGURATIONS["emr"]} == {
        *("spark", "delta-defaults", "yarn-site", "container-executor", "capacity-scheduler"),
        "spark-defaults",
    }


def test_executors_without_gpus_of_their_own_differ_in_nothing_else() -> None:
    one, several = (settings("spark-defaults", kind) for kind in EMR_SETS)
    assert gives_out_gpus(one)
    assert not gives_out_gpus(several)
    changed = {key for key in one | several if one.get(key) != several.get(key)}
    assert {key for key in changed if ".resource.gpu." not in key} == {
        "spark.executor.memoryOverhead"
    }
    # YARN would hide GPUs that a container has not asked for.
    assert settings("yarn-site", "emr/mixtral") == {"yarn.nodemanager.vmem-check-enabled": "false"}
    kinds = {c["Classification"] for c in CONFIGURATIONS["emr/mixtral"]}
    assert kinds == {"spark", "delta-defaults", "yarn-site", "spark-defaults"}


def step_arguments(kind: str) -> tuple[list[str], str, list[str]]:
    """Give a step's spark-submit options, its script, and the script's arguments."""
    program, *rest = STEPS[kind][0]["Args"]
    assert program == "spark-submit"
    script = next(i for i, word in enumerate(rest) if word.endswith(".py"))
    return rest[:script], rest[script], rest[script + 1 :]


@pytest.mark.parametrize("kind", EMR_SETS)
def test_the_step_runs_the_installed_script_with_valid_arguments(kind: str, tmp_path: Path) -> None:
    _, script, given = step_arguments(kind)
    venv = settings("spark-defaults", kind)["spark.pyspark.python"].removesuffix("/bin/python")
    assert script == f"{venv}/lib/python3.11/site-packages/jobs/annotate.py"
    assert f"python3.11 -m venv {venv}" in (EMR / "bootstrap.sh").read_text()
    arguments = parse(given)
    config = load_annotate_config(page_config("emr.md", tmp_path), arguments.set)
    assert arguments.config == "s3://BUCKET/cdr/annotate.yaml"
    assert config.warehouse == "s3://BUCKET/cdr/warehouse"
    assert {config.reward.models[role].dtype for role in ("strong", "weak")} == {"bfloat16"}
    assert config.reward.routing.model == ("router" if kind == "emr/mixtral" else "strong")


# --- vLLM, and the GPUs that a reward's models need ---------------------------------------------

GPUS = {"g6e.4xlarge": 1, "g6e.8xlarge": 1, "g6e.12xlarge": 4}
"""L40S with 48 GB per instance: aws.amazon.com/ec2/instance-types/g6e."""

SETUPS = [
    *(
        pytest.param("databricks", target, id=f"databricks-{target}")
        for target in BUNDLE["targets"]
    ),
    *(pytest.param("emr", kind, id=kind) for kind in EMR_SETS),
]


def shipped(cloud: str, kind: str) -> tuple[list[str], list[int], dict[str, str], str]:
    """Give a setup's arguments, GPUs per node, Spark settings, and Spark's version."""
    if cloud == "emr":
        nodes = [
            GPUS[choice["InstanceType"]]
            for fleet in FLEETS[kind]
            for choice in fleet["InstanceTypeConfigs"]
            if fleet["InstanceFleetType"] != "MASTER"
        ]
        return step_arguments(kind)[2], nodes, settings("spark-defaults", kind), "3.5.6"
    cluster = job_of(kind)["job_clusters"][0]["new_cluster"]
    gpus = GPUS[cluster["node_type_id"]]
    # Databricks sets this by itself, one executor per worker.
    spark = {**cluster["spark_conf"], "spark.executor.resource.gpu.amount": str(gpus)}
    return parameters_of(kind), [gpus], spark, "4.0.0"


def plan_offline(arguments: list[str], page: str, folder: Path) -> AnnotationPlan:
    """Plan a run as shipped, small files in the place of the hub's models."""
    special = ("<|im_start|>", "<|im_end|>")
    small = folder / "model"
    make_small_bpe(CHATML_TEMPLATE, special=special).save_pretrained(small)
    (small / "config.json").write_text('{"model_type": "mistral", "vocab_size": 512}')
    given = parse(arguments).set
    for number, role in enumerate(("strong", "weak", "router")):
        own = folder / role
        shutil.copytree(small, own)
        save_file({"weight": np.full(1, number, np.float32)}, own / "model.safetensors")
        here = {"path": own, "revision": "null"}
        given = [*given, *(f"reward.models.{role}.{key}={value}" for key, value in here.items())]
    return plan_annotation(load_annotate_config(page_config(page, folder), given))


@pytest.mark.parametrize(("cloud", "kind"), SETUPS)
def test_every_model_runs_in_vllm_on_gpus_that_a_task_can_get(
    cloud: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, nodes, spark, version = shipped(cloud, kind)
    monkeypatch.setattr(vllm_setup, "find_vllm_version", lambda: (0, 19))
    plan = plan_offline(arguments, f"{cloud}.md", tmp_path)
    plan = place_models(plan, None)  # type: ignore[arg-type]  # no look-up is needed
    route = plan.reward.route
    assert route is not None
    engines = [*plan.reward.engines, route.engine]
    assert {engine.engine for engine in engines} == {"vllm"}
    assert {engine.dtype for engine in engines} == {"bfloat16"}
    assert [engine.memory_fraction for engine in plan.reward.engines] == [0.45, 0.45]
    assert [engine.tensor_parallel for engine in plan.reward.engines] == [1, 1]
    is_split = kind.endswith("mixtral")
    assert route.engine.tensor_parallel == (4 if is_split else 1)
    assert plan.config.reward.routing.model == ("router" if is_split else "strong")
    # A model that routes and scores is loaded once.
    assert (route.engine in plan.reward.engines) != is_split
    assert min(nodes) >= max(engine.tensor_parallel for engine in engines)

    context = SimpleNamespace(
        master="yarn", getConf=lambda: SimpleNamespace(get=spark.get), applicationId=kind
    )
    session: Any = SimpleNamespace(sparkContext=context, version=version)
    assert task_gpus(session, plan.reward.engines) == {}  # one each
    routing = task_gpus(session, [route.engine])
    if is_split and gives_out_gpus(spark):
        assert routing["profile"].taskResources["gpu"].amount == 4
    else:
        assert routing == {}  # what Spark gives fits, or tasks claim the node's


def test_a_router_split_over_more_gpus_than_a_node_has_would_be_noticed(tmp_path: Path) -> None:
    arguments, _, spark, version = shipped("databricks", "mixtral")
    more = [*arguments, "--set", "reward.models.router.tensor_parallel=8"]
    plan = plan_offline(more, "databricks.md", tmp_path)
    assert plan.reward.route is not None
    context = SimpleNamespace(master="yarn", getConf=lambda: SimpleNamespace(get=spark.get))
    session: Any = SimpleNamespace(sparkContext=context, version=version)
    with pytest.raises(SetupError, match="needs 8 GPUs in one executor, which has 4"):
        task_gpus(session, [plan.reward.route.engine])


def test_both_clusters_install_a_vllm_that_the_wheel_asks_for_and_cuda_12_drivers_run() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [extra] = map(Requirement, project["optional-dependencies"]["vllm"])
    assert '"${wheels[0]}[vllm]"' in (EMR / "bootstrap.sh").read_text()
    [by_emr] = re.findall(r"Args=\[s3://\$BUCKET/cdr/dist,(\S+?)\]", EMR_PAGE)
    installed = [Requirement(substituted("${var.vllm}")), Requirement(by_emr)]
    for requirement in installed:
        assert requirement.name == extra.name == "vllm"
        [pin] = requirement.specifier
        assert pin.operator == "=="
        assert pin.version in extra.specifier
        assert pin.version in SpecifierSet("<0.20")  # then on, torch 2.11 and CUDA 13


# --- Spark and YARN ----------------------------------------------------------------------------

COMPOSED = re.compile(
    # Names that Spark puts together, or reads by their prefix.
    r"spark\.(driver|executor|task)\.resource\.gpu\.amount"
    r"|spark\.(driver|executor)\.resource\.gpu\.discoveryScript"
    r"|spark\.executorEnv\.[A-Z_]+"
    r"|spark\.sql\.catalog\.spark_catalog"
)


@cache
def spark_constants() -> bytes:
    """The class files that declare Spark's settings."""
    folders = ("org/apache/spark/internal/config/", "org/apache/spark/sql/internal/")
    found = []
    for name in ("spark-core_*.jar", "spark-sql-api_*.jar", "spark-catalyst_*.jar"):
        for jar in (Path(pyspark.__file__).parent / "jars").glob(name):
            with zipfile.ZipFile(jar) as classes:
                found += [classes.read(n) for n in classes.namelist() if n.startswith(folders)]
    return b"".join(found)


def is_spark_setting(key: str) -> bool:
    # A string constant of a class file: a tag, its length, its bytes.
    constant = b"\x01" + len(key).to_bytes(2, "big") + key.encode()
    return bool(COMPOSED.fullmatch(key)) or constant in spark_constants()


@pytest.mark.parametrize(
    "key",
    sorted(
        {
            *NEW_CLUSTER["spark_conf"],
            *(key for kind in EMR_SETS for key in settings("spark-defaults", kind)),
        }
    ),
)
def test_spark_knows_the_setting(key: str) -> None:
    assert is_spark_setting(key)


@pytest.mark.parametrize(
    "key",
    [
        *("spark.executor.memoryOverheads", "spark.executor.memoryoverhead", "spark.executor.core"),
        *("spark.task.resource.gpu.amounts", "spark.executor.resource.gpu.discovery"),
        *("spark.dynamicAllocation.enable", "spark.sql.extension"),
    ],
)
def test_spark_does_not_know_a_typo(key: str) -> None:
    assert not is_spark_setting(key)


@cache
def yarn_settings() -> frozenset[str]:
    """YARN's own list of its settings."""
    [jar] = (Path(pyspark.__file__).parent / "jars").glob("hadoop-client-api-*.jar")
    with zipfile.ZipFile(jar) as classes:
        return frozenset(
            re.findall(r"<name>(.*?)</name>", classes.read("yarn-default.xml").decode())
        )


@pytest.mark.parametrize("key", settings("yarn-site"))
def test_yarn_knows_the_setting(key: str) -> None:
    assert key in yarn_settings()
    assert f"{key}s" not in yarn_settings()


@pytest.mark.parametrize(
    ("cores", "gpus", "per_task"),
    [
        (
            int(settings("spark-defaults")["spark.executor.cores"]),
            int(settings("spark-defaults")["spark.executor.resource.gpu.amount"]),
            float(settings("spark-defaults")["spark.task.resource.gpu.amount"]),
        ),
        # Eight tasks per GPU of a node with sixteen cores.
        (8, 1, float(NEW_CLUSTER["spark_conf"]["spark.task.resource.gpu.amount"])),
    ],
    ids=["emr", "databricks"],
)
def test_tasks_share_a_gpu_as_far_as_there_are_cores(
    cores: int, gpus: int, per_task: float
) -> None:
    assert cores * per_task == gpus


# --- scripts -----------------------------------------------------------------------------------


def run_script(script: Path, folder: Path, *arguments: str, **stubs: str) -> Any:
    """Run a script with stubs in front of the PATH."""
    for name, text in stubs.items():
        stub = folder / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f"#!/bin/bash\n{text}\n")
        stub.chmod(0o755)
    return subprocess.run(
        ["bash", str(script), *arguments],
        capture_output=True,
        text=True,
        env={"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "ROOT": str(folder)},
    )


DISCOVERY = CLUSTER / "gpu-discovery.sh"


@pytest.mark.parametrize(
    ("listed", "addresses"),
    [
        ("0", ["0"]),
        ("0\\n1\\n10", ["0", "1", "10"]),
        (" 0 \\r\\n 1 \\r\\n", ["0", "1"]),
        ("0\\nUnable to determine the device handle for GPU0000:00:1E.0: Unknown Error", ["0"]),
    ],
)
def test_discovery_prints_what_spark_reads(
    listed: str, addresses: list[str], tmp_path: Path
) -> None:
    smi = f'[[ "$*" == "--query-gpu=index --format=csv,noheader" ]] && printf "{listed}"'
    done = run_script(DISCOVERY, tmp_path, **{"nvidia-smi": smi})
    assert done.returncode == 0, done.stderr
    # The fields of Spark's ResourceInformationJson.
    assert json.loads(done.stdout) == {"name": "gpu", "addresses": addresses}


@pytest.mark.parametrize(
    ("smi", "problem"),
    [
        ("echo No devices were found", "lists no GPU"),
        ("exit 9", "does not run"),
        ("true", "no GPU"),
    ],
)
def test_discovery_fails_where_there_is_no_gpu(smi: str, problem: str, tmp_path: Path) -> None:
    done = run_script(DISCOVERY, tmp_path, **{"nvidia-smi": smi})
    assert done.returncode == 1
    assert done.stdout == ""
    assert problem in done.stderr


def test_discovery_is_where_the_executors_look_for_it() -> None:
    path = settings("spark-defaults")["spark.executor.resource.gpu.discoveryScript"]
    assert f'gpu-discovery.sh" {path}' in (EMR / "bootstrap.sh").read_text()
    assert os.access(DISCOVERY, os.X_OK)


@pytest.fixture
def bootstrap(tmp_path: Path) -> Path:
    """The bootstrap action with its folders moved below a temporary one."""
    text = (EMR / "bootstrap.sh").read_text()
    for folder in ("/opt/cdr", "/mnt/cdr", "/spark-rapids-cgroup"):
        text = text.replace(folder, f"{tmp_path}{folder}")
    (tmp_path / "bootstrap.sh").write_text(text)
    return tmp_path / "bootstrap.sh"


STUBS = {
    # `mount` needs more than a test has; the rest runs.
    "sudo": 'if [[ "$1" == mount ]]; then echo "$@" >> "$ROOT/mounts"; else "$@"; fi',
    "dnf": 'echo "$@" > "$ROOT/dnf"',
    # A Python whose pip writes down what it is asked for.
    "python3.11": 'mkdir -p "$3/bin"; cp "$ROOT/bin/fake-python" "$3/bin/python"',
    "fake-python": 'if [[ "$2" == pip ]]; then echo "$@" >> "$ROOT/pip"; else '
    f"""PYTHONPATH={ROOT} {sys.executable} "$@"; fi""",
}


def test_bootstrap_installs_the_wheel_and_the_discovery_script(
    bootstrap: Path, tmp_path: Path
) -> None:
    aws = 'echo "$@" > "$ROOT/aws"; mkdir -p "${@: -1}"; touch "${@: -1}/cdr_annotate-9-py3.whl"'
    done = run_script(
        bootstrap, tmp_path, "s3://bucket/cdr/dist/", "vllm==0.19.1", **STUBS, aws=aws
    )
    assert done.returncode == 0, done.stderr
    assert "s3://bucket/cdr/dist/ " in (tmp_path / "aws").read_text()
    assert (
        f"cgroup -o devices cgroupv1-devices {tmp_path}/spark-rapids-cgroup/devices"
        in (tmp_path / "mounts").read_text()
    )
    assert (
        f"{tmp_path}/opt/cdr/dist/cdr_annotate-9-py3.whl[vllm] vllm==0.19.1"
        in (tmp_path / "pip").read_text()
    )
    assert "gcc python3.11-devel" in (tmp_path / "dnf").read_text()
    for kind in EMR_SETS:
        for key, value in settings("spark-defaults", kind).items():
            if key.startswith("spark.executorEnv."):
                assert (tmp_path / value.removeprefix("/")).stat().st_mode & 0o1777 == 0o1777
    installed = tmp_path / "opt/cdr/gpu-discovery.sh"
    assert installed.read_text() == DISCOVERY.read_text()
    assert os.access(installed, os.X_OK)


@pytest.mark.parametrize("wheels", [[], ["a.whl", "b.whl"]])
def test_bootstrap_wants_one_wheel(bootstrap: Path, tmp_path: Path, wheels: list[str]) -> None:
    touch = "".join(f' touch "${{@: -1}}/{wheel}";' for wheel in wheels)
    aws = f'mkdir -p "${{@: -1}}";{touch}'
    done = run_script(bootstrap, tmp_path, "s3://bucket/cdr/dist", **STUBS, aws=aws)
    assert done.returncode == 1
    assert "expected one wheel in s3://bucket/cdr/dist/" in done.stderr
    assert not (tmp_path / "pip").exists()


def test_bootstrap_says_how_it_is_used(bootstrap: Path, tmp_path: Path) -> None:
    done = run_script(bootstrap, tmp_path, "/a/folder")
    assert done.returncode == 2
    assert "usage: bootstrap.sh s3://BUCKET/PREFIX" in done.stderr
