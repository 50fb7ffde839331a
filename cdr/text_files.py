"""Configs, prompt packs and templates, wherever they lie: a path, a URI, or this package's own.

1. `conf/...` that is not in the working directory is the file of that name in the package, so that
   the documented names work from an installed wheel too.
2. `dbfs:/...` is read where Databricks mounts it: `/Volumes/...` as it is, the rest under `/dbfs`.
3. `SCHEME://...` is read by Arrow (s3, gs, abfs, hdfs, file), with the credentials that its
   libraries find by themselves: no Spark runs yet when configs are read.

Places are strings: `pathlib` would make one slash of a URI's two.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from cdr.errors import ConfigError

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]*(?=://)")
# Hadoop's names for S3; Arrow knows one.
_ARROW_SCHEMES = {"s3a": "s3", "s3n": "s3"}


def package_conf() -> Path:
    """Give the folder with this package's own configs, in a checkout or an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    installed = root / "cdr_conf"
    return installed if installed.is_dir() else root / "conf"


def is_uri(place: str) -> bool:
    """Tell a URI with a scheme (`s3://bucket/key`) from a path."""
    return bool(_SCHEME.match(place))


def read_text(place: str) -> str:
    """Read a small UTF-8 text file.

    Args:
        place: a path, a URI, or `conf/...` for a file of this package.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read: a folder, no permission, no credentials, no network.
        UnicodeDecodeError: it is not text.
        ConfigError: nothing here reads this kind of URI.
    """
    if is_uri(place):
        return _read_uri(place).decode("utf-8")
    return _local_path(place).read_text(encoding="utf-8")


def resolve_beside(value: str, place: str) -> str:
    """Resolve `./...` or `../...` in a file against the folder of that file.

    Args:
        value: the relative path.
        place: the file it stands in, as given to `read_text`.

    Returns:
        A path or URI. What a file of the installed package names outside of the package's configs
        (the demo's warehouse) is put under the working directory, which a user may write to.
    """
    if is_uri(place):
        parts = urlsplit(place)
        folder = posixpath.dirname(parts.path)
        return urlunsplit(parts._replace(path=posixpath.normpath(f"{folder}/{value}")))
    home, conf = _local_path(place).resolve(), package_conf().resolve()
    found = (home.parent / value).resolve()
    leaves_conf = home.is_relative_to(conf) and not found.is_relative_to(conf)
    if leaves_conf and conf.name == "cdr_conf" and found.is_relative_to(conf.parent):
        return str(Path.cwd() / found.relative_to(conf.parent))
    return str(found)


def _local_path(place: str) -> Path:
    if place.startswith("dbfs:/"):
        mounted = "/" + place.removeprefix("dbfs:").lstrip("/")
        return Path(mounted if mounted.startswith("/Volumes/") else f"/dbfs{mounted}")
    path = Path(place)
    if path.parts[:1] == ("conf",) and not path.exists():
        return package_conf().joinpath(*path.parts[1:])
    return path


def _read_uri(place: str) -> bytes:
    import pyarrow as pa
    from pyarrow import fs

    scheme, rest = place.split("://", 1)
    try:
        files, path = fs.FileSystem.from_uri(f"{_ARROW_SCHEMES.get(scheme, scheme)}://{rest}")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ConfigError(
            [f"{place}: nothing here reads '{scheme}://' ({str(error).splitlines()[0]})"],
            fix="copy the file to a path that this machine sees (on Databricks a volume, "
            "/Volumes/...), or to s3://",
        ) from None
    with files.open_input_stream(path) as stream:
        return bytes(stream.read())
