"""Where MLflow keeps runs, models and versions: finding the store, opening it, showing it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cdr.errors import SetupError
from cdr.redaction import redact

if TYPE_CHECKING:
    from typing import Any

    from cdr.config import TrackingSpec

WITHOUT_TRACKING = "run without it: --set tracking.enabled=false"


def resolve_tracking_uri(tracking: TrackingSpec, warehouse: str) -> str:
    """Decide where MLflow keeps runs and models.

    In this order: the config's uri, MLFLOW_TRACKING_URI, the workspace on Databricks, SQLite in a
    local warehouse.

    Raises:
        SetupError: the warehouse is not a local folder and nothing else is said.
    """
    if tracking.uri:
        return tracking.uri
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return os.environ["MLFLOW_TRACKING_URI"]
    if "DATABRICKS_RUNTIME_VERSION" in os.environ:
        return "databricks"
    folder = local_folder(warehouse)
    if folder is None:
        raise SetupError(
            "tracking.uri: needed where the warehouse is not a local folder",
            where=redact(warehouse),
            fix=f"--set tracking.uri=https://your-mlflow-server, or {WITHOUT_TRACKING}",
        )
    return f"sqlite:///{folder / 'mlflow.db'}"


def open_store(uri: str) -> Any:
    """Give MLflow's client of a store, and of the registry beside it."""
    # Read when mlflow is imported or first used; anything the user has set wins. The defaults wait
    # for minutes before they give up on a server, here a quarter of one.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with quiet():
        from mlflow import MlflowClient

        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        return MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what a store's own libraries say on first use.

    A new database logs one line per migration step, and MLflow's mappers deprecation warnings.
    """
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logging.disable(before)


def ui_command(uri: str) -> str | None:
    """Give the command that shows a store's runs; None where the store is a server itself."""
    if uri.startswith(("http://", "https://", "databricks")):
        return None
    return f"mlflow ui --backend-store-uri {uri}"


def artifact_folder(uri: str) -> str | None:
    """Give the folder of a database's artifacts as a URI; None for a server, which knows."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlruns").as_uri()


def local_folder(place: str) -> Path | None:
    """Give a path or `file:` URI as a folder; None for other URIs."""
    if place.startswith("file:"):
        return Path(re.sub("^file:(//)?", "", place)).absolute()
    return None if re.match(r"^[A-Za-z][\w+.\-]*:/", place) else Path(place).absolute()
