"""The folder of one run's intermediate tables: written once, read by later stages, then deleted.

Parquet under `<warehouse>/_staging/<run_id>`, through Hadoop's file systems, so that a warehouse
may lie anywhere Spark can write. A run that was killed leaves its folder; the next run on the same
machine deletes it.
"""

from __future__ import annotations

import json
import socket
from typing import Any, Self

import psutil
from pyspark.sql import DataFrame, SparkSession


def hadoop_place(place: str) -> str:
    """Give the name by which Hadoop's file systems know a folder.

    Databricks' readers and writers know a volume as `/Volumes/...`, but its Hadoop file system
    refuses that path ("No operations allowed on this path"); it does know the mounted folder.
    """
    mounted = place.removeprefix("dbfs:")
    return f"file:{mounted}" if mounted.startswith("/Volumes/") else place


class Staging:
    """One run's folder.

    Args:
        spark: the session.
        root: the warehouse.
        run_id: the run; the folder's name.
    """

    def __init__(self, spark: SparkSession, root: str, run_id: str) -> None:
        self._spark = spark
        self._all = f"{root.rstrip('/')}/_staging"
        self._folder = f"{self._all}/{run_id}"

    def __enter__(self) -> Self:
        """Create the folder with a note of who works in it, and delete folders left behind."""
        self._remove_left()
        me = psutil.Process()
        owner = {"host": socket.gethostname(), "pid": me.pid, "start": me.create_time()}
        path = self._path(f"{self._folder}/_owner.json")
        stream = self._files(path).create(path, True)
        stream.write(bytearray(json.dumps(owner).encode()))
        stream.close()
        return self

    def __exit__(self, *_: object) -> None:
        """Delete the folder."""
        path = self._path(self._folder)
        self._files(path).delete(path, True)

    def write(self, name: str, rows: DataFrame) -> DataFrame:
        """Write rows once and give a read of them."""
        rows.write.mode("overwrite").parquet(f"{self._folder}/{name}")
        return self.read(name)

    def read(self, name: str) -> DataFrame:
        """Read what was written under a name."""
        return self._spark.read.parquet(f"{self._folder}/{name}")

    def _remove_left(self) -> None:
        """Delete folders whose run on this machine is dead.

        Folders of other machines' runs are left alone: nobody here can tell whether they live.
        """
        staging = self._path(self._all)
        files = self._files(staging)
        if not files.exists(staging):
            return
        for status in files.listStatus(staging):
            if self._is_left(f"{status.getPath().toString()}/_owner.json"):
                files.delete(status.getPath(), True)

    def _is_left(self, owner_file: str) -> bool:
        path = self._path(owner_file)
        if not self._files(path).exists(path):
            return False
        assert self._spark._jvm is not None
        stream = self._files(path).open(path)
        owner = json.loads(self._spark._jvm.org.apache.commons.io.IOUtils.toString(stream, "UTF-8"))
        stream.close()
        if owner["host"] != socket.gethostname():
            return False
        try:
            return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["start"]) > 1)
        except psutil.NoSuchProcess:
            return True

    def _path(self, place: str) -> Any:
        assert self._spark._jvm is not None
        return self._spark._jvm.org.apache.hadoop.fs.Path(hadoop_place(place))

    def _files(self, path: Any) -> Any:
        return path.getFileSystem(self._spark._jsc.hadoopConfiguration())
