"""The Spark session of a job: the same call under spark-submit, plain `python` and Databricks.

`spark-submit` and Databricks bring their settings; a plain `python jobs/annotate.py` gets those of
`conf/cluster/local.conf`. What is missing (Java, PySpark, Delta's classes, a classic session) ends
in a `SetupError` that says what to type. Keeps to what PySpark 3.5 has.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cdr.errors import INSTALL_SPARK, SetupError
from cdr.text_files import package_conf

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

DELTA_PACKAGES = {
    "3.5": "io.delta:delta-spark_2.12:3.3.2",
    "4.0": "io.delta:delta-spark_4.0_2.13:4.4.0",
    "4.1": "io.delta:delta-spark_4.1_2.13:4.4.0",
    "4.2": "io.delta:delta-spark_4.2_2.13:4.4.0",
}
"""Maven coordinates of Delta by Spark's major and minor version."""

_DELTA_SETTINGS = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
}
_MIN_JAVA = 17
_JAVA_REMEDY = (
    "install one of Java 17 or 21, then check with `java -version`:\n"
    "    Debian, Ubuntu: sudo apt-get install openjdk-17-jre-headless\n"
    "    macOS: brew install openjdk@17 && "
    'export JAVA_HOME="$(brew --prefix openjdk@17)/libexec/openjdk.jdk/Contents/Home"\n'
    "    installed elsewhere: export JAVA_HOME=/path/to/jdk"
)


def get_session(app_name: str, *, warehouse: str | None = None) -> SparkSession:
    """Give the running Spark session, or start one that can read and write Delta tables.

    Args:
        app_name: name in Spark's web pages and logs, where the session is started here.
        warehouse: folder of this run. Where it is a local folder, tables given by a bare catalog
            name go under its `catalog/` instead of `./spark-warehouse`. None, a URI, or a session
            that runs already: the platform's own place.

    Raises:
        SetupError: PySpark, Java or Delta is missing, the JVM does not start, or the session is a
            Spark Connect one (Databricks serverless or standard access mode), which has neither
            accumulators nor resource profiles.
    """
    try:
        from pyspark.errors import PySparkRuntimeError
        from pyspark.sql import SparkSession
    except ImportError:
        raise SetupError(
            f"PySpark is not installed for {sys.executable}",
            fix=f"{INSTALL_SPARK} (a cluster brings its own: use its Python)",
        ) from None
    if _must_start_jvm(os.environ):
        find_java()
        _submit_with_local_settings(os.environ)

    builder = SparkSession.builder.appName(app_name)
    on_databricks = "DATABRICKS_RUNTIME_VERSION" in os.environ
    if warehouse is not None and ":/" not in warehouse and not on_databricks:
        catalog = Path(warehouse).absolute() / "catalog"
        builder = builder.config("spark.sql.warehouse.dir", str(catalog))
    try:
        spark = builder.getOrCreate()
    except PySparkRuntimeError as error:
        if "JAVA_GATEWAY_EXITED" not in str(error):
            raise
        raise SetupError(
            "Spark's JVM ended before it was ready; its own message stands above",
            fix="'unresolved dependency' above: Maven Central must be reachable once, to fetch "
            f"Delta's JARs into ~/.ivy2*; settings come from {local_settings()}",
        ) from None

    if type(spark).__module__.startswith("pyspark.sql.connect"):
        raise SetupError(
            "the session is a Spark Connect one, which cannot host engines",
            fix="use classic compute in dedicated access mode, and do not set SPARK_REMOTE",
        )
    context = spark.sparkContext
    if context.getConf().get("spark.log.level") is None:
        context.setLogLevel("WARN")
    if (context.master or "").startswith("local") and "PYSPARK_PYTHON" not in os.environ:
        # Workers would run the `python3` of PATH, which need not have this one's packages.
        context.pythonExec = sys.executable
    _require_delta(spark)
    return spark


def find_java() -> Path:
    """Find the Java that Spark would run: JAVA_HOME's, else the one in PATH.

    Raises:
        SetupError: there is none, it does not run, or it is older than 17.
    """
    home = os.environ.get("JAVA_HOME")
    found = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    origin = f"JAVA_HOME={home}" if home else f"PATH, {found}"
    if found is None:
        raise SetupError("Spark needs Java, and there is none in PATH", fix=_JAVA_REMEDY)
    try:
        # macOS has a /usr/bin/java that only says that there is no Java.
        answer = subprocess.run([found, "-version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"Java does not run: {error}", where=origin, fix=_JAVA_REMEDY) from None
    version = re.search(r'version "(?:1\.)?(\d+)', answer.stderr + answer.stdout)
    if answer.returncode != 0 or version is None:
        raise SetupError("`java -version` gives no version", where=origin, fix=_JAVA_REMEDY)
    if int(version[1]) < _MIN_JAVA:
        raise SetupError(
            f"Java must be {_MIN_JAVA} or newer, got {version[1]}", where=origin, fix=_JAVA_REMEDY
        )
    return Path(found)


def local_settings() -> Path:
    """Give the properties file for Spark on one machine, in a checkout or an installed wheel."""
    return package_conf() / "cluster" / "local.conf"


def delta_remedy(spark_version: str) -> str:
    """Say how to submit a job with Delta to a Spark of this version, for example `4.2.0`."""
    minor = ".".join(spark_version.split(".")[:2])
    package = DELTA_PACKAGES.get(minor, f"io.delta:delta-spark_{minor}_2.13:<version>")
    script = sys.argv[0] or "jobs/annotate.py"
    settings = " ".join(f"--conf {key}={value}" for key, value in _DELTA_SETTINGS.items())
    return (
        "on one machine:\n"
        f"    spark-submit --properties-file {local_settings()} {script} ...\n"
        f"  on a cluster with Spark {minor}:\n"
        f"    spark-submit --packages {package} {settings} {script} ..."
    )


def _must_start_jvm(environ: Mapping[str, str]) -> bool:
    """Tell whether getOrCreate would launch a JVM from this process."""
    from pyspark import SparkContext

    return not (
        "PYSPARK_GATEWAY_PORT" in environ  # spark-submit started this Python, its JVM is up
        or "DATABRICKS_RUNTIME_VERSION" in environ
        or "SPARK_REMOTE" in environ
        or SparkContext._gateway is not None
    )


def _submit_with_local_settings(environ: dict[str, str] | os._Environ[str]) -> None:
    """Make the JVM that PySpark is about to launch read `local.conf`.

    A Spark that somebody has set up (SPARK_HOME, SPARK_CONF_DIR, PYSPARK_SUBMIT_ARGS) keeps its
    own settings: a properties file would replace its spark-defaults.conf.
    """
    if not {"SPARK_HOME", "SPARK_CONF_DIR", "PYSPARK_SUBMIT_ARGS"} & environ.keys():
        settings = str(local_settings()).replace('"', '\\"')
        environ["PYSPARK_SUBMIT_ARGS"] = f'--properties-file "{settings}" pyspark-shell'


def _require_delta(spark: SparkSession) -> None:
    if "DATABRICKS_RUNTIME_VERSION" in os.environ:
        return  # Delta is built in there, under other class names
    problems = [
        f"{key} lacks {value}"
        for key, value in _DELTA_SETTINGS.items()
        if value not in (spark.conf.get(key, "") or "")
    ]
    # Spark only warns about an extension class that it cannot load, so look for the class itself.
    jvm = spark.sparkContext._jvm
    assert jvm is not None
    try:
        loader = jvm.java.lang.Thread.currentThread().getContextClassLoader()
        loader.loadClass(_DELTA_SETTINGS["spark.sql.extensions"])
    except Exception as error:
        if "ClassNotFoundException" not in str(error):
            raise
        problems.insert(0, "Delta's JARs are not on the class path")
    if problems:
        raise SetupError(
            f"this Spark {spark.version} cannot use Delta: {'; '.join(problems)}",
            fix=delta_remedy(spark.version),
        )
