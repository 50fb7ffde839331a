"""The folder of one run's intermediate tables: written once, read by later stages, then deleted.

Parquet under `<warehouse>/_staging/<run_id>`, through Hadoop's file systems, so that a warehouse
may lie anywhere Spark can write. A run that was killed leaves its folder; the next run on the same
machine deletes it.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Self

from py4j.protocol import Py4JJavaError
from pyspark.sql import DataFrame, SparkSession

from cdr.engines.owner import Owner
from cdr.errors import TableError

_NOTE = "_owner.json"


@dataclass(frozen=True)
class _Note:
    """Who works in a folder: written into it, read by later runs.

    Args:
        host: the machine's name.
        owner: the driver's process there.
    """

    host: str
    owner: Owner

    @classmethod
    def of_this_process(cls) -> _Note:
        return cls(socket.gethostname(), Owner.of(os.getpid()))

    @classmethod
    def parse(cls, text: str) -> _Note | None:
        """Read a note; None when it is not a whole one."""
        try:
            fields = json.loads(text)
            owner = Owner(pid=int(fields["pid"]), start=int(fields["started"]))
            return cls(str(fields["host"]), owner)
        except (ValueError, TypeError, KeyError):
            return None

    def render(self) -> str:
        return json.dumps({"host": self.host, "pid": self.owner.pid, "started": self.owner.start})

    def is_of_the_dead(self) -> bool:
        """Tell whether the process is known to have ended; not known for another machine's."""
        return self.host == socket.gethostname() and not self.owner.is_alive()


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
        self._write_note()
        return self

    def __exit__(self, *_: object) -> None:
        """Delete the folder."""
        path = self._path(self._folder)
        self._files(path).delete(path, True)

    def write(self, name: str, rows: DataFrame) -> DataFrame:
        """Write rows once and give a read of them."""
        rows.write.mode("overwrite").parquet(self.place(name))
        return self.read(name)

    def read(self, name: str) -> DataFrame:
        """Read what was written under a name."""
        return self._spark.read.parquet(self.place(name))

    def place(self, name: str) -> str:
        """Give the Parquet folder of what is written under a name."""
        return f"{self._folder}/{name}"

    def _remove_left(self) -> None:
        """Delete folders whose run on this machine is dead.

        Folders of other machines' runs are left alone: nobody here can tell whether they live.
        """
        staging = self._path(self._all)
        files = self._files(staging)
        if not files.exists(staging):
            return
        for status in files.listStatus(staging):
            note = self._read_note(f"{status.getPath().toString()}/{_NOTE}")
            # Without a readable note the folder may be that of a run that starts right now.
            if note is not None and note.is_of_the_dead():
                files.delete(status.getPath(), True)

    def _write_note(self) -> None:
        """Write the note so that others see a whole one or none."""
        note, unfinished = (self._path(f"{self._folder}/{n}") for n in (_NOTE, f"{_NOTE}.new"))
        files = self._files(note)
        with closing(files.create(unfinished, True)) as stream:
            stream.write(bytearray(_Note.of_this_process().render().encode()))
        if not files.rename(unfinished, note):
            raise TableError("the run's staging folder cannot be written", where=self._folder)

    def _read_note(self, place: str) -> _Note | None:
        path = self._path(place)
        assert self._spark._jvm is not None
        try:
            with closing(self._files(path).open(path)) as stream:
                text = self._spark._jvm.org.apache.commons.io.IOUtils.toString(stream, "UTF-8")
        except Py4JJavaError:  # there is none, its run has just ended, or it is damaged
            return None
        return _Note.parse(text)

    def _path(self, place: str) -> Any:
        assert self._spark._jvm is not None
        return self._spark._jvm.org.apache.hadoop.fs.Path(hadoop_place(place))

    def _files(self, path: Any) -> Any:
        return path.getFileSystem(self._spark._jsc.hadoopConfiguration())
