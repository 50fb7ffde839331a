"""Files and folders of a job's results, on any file system that Spark writes.

Through Hadoop's file systems on the driver: tables, exports and receipts lie where the cluster can
reach them, which need not be a disk of this machine. For whole files only; rows go through Spark.
"""

from __future__ import annotations

import re
from contextlib import closing
from typing import Any

from py4j.java_gateway import is_instance_of
from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession

from cdr.errors import TableError

# https://github.com/delta-io/delta/blob/master/PROTOCOL.md#delta-log-entries
_COMMIT = re.compile(r"\d{20}\.json")


def hadoop_place(place: str) -> str:
    """Give the name by which Hadoop's file systems know a folder.

    Databricks' readers and writers know a volume as `/Volumes/...`, but its Hadoop file system
    refuses that path ("No operations allowed on this path"); it does know the mounted folder.
    """
    mounted = place.removeprefix("dbfs:")
    return f"file:{mounted}" if mounted.startswith("/Volumes/") else place


class Files:
    """What a folder holds, and small changes to it.

    Args:
        spark: the session, for its file systems and their credentials.
    """

    def __init__(self, spark: SparkSession) -> None:
        self._spark = spark

    def exists(self, place: str) -> bool:
        """Tell whether there is a file or folder."""
        path, files = self._open(place)
        return bool(files.exists(path))

    def names(self, folder: str) -> list[str]:
        """Give the names of what lies in a folder, sorted; none where it does not exist."""
        path, files = self._open(folder)
        if not files.exists(path):
            return []
        return sorted(status.getPath().getName() for status in files.listStatus(path))

    def delta_version(self, folder: str) -> int | None:
        """Give the latest version of the Delta table in a folder; None where there is none.

        By the names in its log, where Delta's own history would cost a Spark job.
        """
        commits = [name for name in self.names(f"{folder}/_delta_log") if _COMMIT.fullmatch(name)]
        return int(commits[-1].removesuffix(".json")) if commits else None

    def num_bytes(self, place: str) -> int:
        """Give the size of a file, or of all that lies below a folder; 0 where there is nothing."""
        path, files = self._open(place)
        return int(files.getContentSummary(path).getLength()) if files.exists(path) else 0

    def sha256(self, file: str) -> str:
        """Hash a file's content, in hex; its bytes stay in the JVM."""
        path, files = self._open(file)
        jvm: Any = self._spark._jvm
        with closing(files.open(path)) as stream:
            return str(jvm.org.apache.commons.codec.digest.DigestUtils.sha256Hex(stream))

    def make_folder(self, folder: str) -> None:
        """Make a folder, and those above it."""
        path, files = self._open(folder)
        files.mkdirs(path)

    def move(self, source: str, target: str) -> None:
        """Give a file or folder another name; nothing may be there.

        Atomic where the file system's renaming is: on disks and HDFS, not on object stores.

        Raises:
            TableError: something is there, or the file system refuses.
        """
        (path, files), (other, _) = self._open(source), self._open(target)
        # Hadoop would move a folder into the one that is there.
        if files.exists(other) or not files.rename(path, other):
            raise TableError(
                f"cannot be moved to {target}",
                where=source,
                fix="let Spark's user write there, and run again when no other run does",
            )

    def delete(self, place: str) -> None:
        """Delete a file, or a folder with all in it; nothing may be there.

        Raises:
            TableError: the file system refuses.
        """
        path, files = self._open(place)
        if not files.delete(path, True) and files.exists(path):
            raise TableError(
                "cannot be deleted", where=place, fix="let Spark's user write in its folder"
            )

    def full_name(self, place: str) -> str:
        """Give a place in full: a path where a local disk holds it, else a URI."""
        path, files = self._open(place)
        whole = str(files.makeQualified(path).toString())
        return f"/{whole[5:].lstrip('/')}" if whole.startswith("file:") else whole

    def read_text(self, file: str) -> str:
        """Read a small file in UTF-8.

        Raises:
            TableError: there is none, or it cannot be read.
        """
        jvm: Any = self._spark._jvm
        path, files = self._open(file)
        try:
            with closing(files.open(path)) as stream:
                return str(jvm.org.apache.commons.io.IOUtils.toString(stream, "UTF-8"))
        except Py4JJavaError as error:
            raise TableError(
                "the file cannot be read", where=file, fix="let Spark's user read it"
            ) from error

    def write_text(self, file: str, text: str) -> None:
        """Write a small file in UTF-8, in the place of an earlier one; others see a whole one."""
        fresh = f"{file}.new"
        path, files = self._open(fresh)
        with closing(files.create(path, True)) as stream:
            stream.write(bytearray(text.encode()))
        self.delete(file)
        self.move(fresh, file)

    def _open(self, place: str) -> tuple[Any, Any]:
        jvm: Any = self._spark._jvm
        path = jvm.org.apache.hadoop.fs.Path(hadoop_place(place))
        files = path.getFileSystem(self._spark._jsc.hadoopConfiguration())
        kind = "org.apache.hadoop.fs.ChecksumFileSystem"
        if is_instance_of(self._spark.sparkContext._gateway, files, kind):
            # A local disk: without the checksums that would lie beside every file, hidden.
            files = files.getRawFileSystem()
        return path, files
