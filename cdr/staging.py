"""The folder of one run's intermediate tables: written once, read by later stages, then deleted.

Parquet under `<warehouse>/_staging/<run_id>`. A run that was killed leaves its folder; the next run
on the same machine deletes it.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from typing import Self

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import StructType

from cdr.engines.owner import Owner
from cdr.errors import TableError
from cdr.files import Files

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


class Staging:
    """One run's folder.

    Args:
        spark: the session.
        root: the warehouse.
        run_id: the run; the folder's name.
    """

    def __init__(self, spark: SparkSession, root: str, run_id: str) -> None:
        self._spark, self._files = spark, Files(spark)
        self._all = f"{root.rstrip('/')}/_staging"
        self._folder = f"{self._all}/{run_id}"
        self._schemas: dict[str, StructType] = {}

    def __enter__(self) -> Self:
        """Create the folder with a note of who works in it, and delete folders left behind."""
        self._remove_left()
        # Others see a whole note or none.
        self._files.write_text(f"{self._folder}/{_NOTE}", _Note.of_this_process().render())
        return self

    def __exit__(self, *_: object) -> None:
        """Delete the folder."""
        self._files.delete(self._folder)

    def write(self, name: str, rows: DataFrame) -> DataFrame:
        """Write rows once and give a read of them."""
        rows.write.mode("overwrite").parquet(self.place(name))
        self._schemas[name] = self._schemas[name.partition("/")[0]] = rows.schema
        return self.read(name)

    def read(self, name: str) -> DataFrame:
        """Read what this object wrote under a name; of `waves` all that is in `waves/wave=N`."""
        # With the schema at hand Spark need not start a job to look for it in the files.
        return self._spark.read.schema(self._schemas[name]).parquet(self.place(name))

    def place(self, name: str) -> str:
        """Give the Parquet folder of what is written under a name."""
        return f"{self._folder}/{name}"

    def _remove_left(self) -> None:
        """Delete folders whose run on this machine is dead.

        Folders of other machines' runs are left alone: nobody here can tell whether they live.
        """
        for name in self._files.names(self._all):
            folder = f"{self._all}/{name}"
            try:
                note = _Note.parse(self._files.read_text(f"{folder}/{_NOTE}"))
            except TableError:  # it may be the folder of a run that starts or ends right now
                continue
            if note is not None and note.is_of_the_dead():
                self._files.delete(folder)
