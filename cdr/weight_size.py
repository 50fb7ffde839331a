"""How large a model's weights are, from what its folder says of them; no weights are read.

Shape and dtype of every tensor stand in the headers of the safetensors files, and the bytes of all
in the index of a model whose files are still to be fetched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cdr.errors import ModelError

_INDEX = "model.safetensors.index.json"
_RUN_BYTES = {"float32": 4, "bfloat16": 2}
_STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class Tensor(NamedTuple):
    """A tensor of a safetensors file.

    Args:
        name: of the parameter.
        dtype: as safetensors calls it, `BF16` for example.
        shape: of the array.
        stored_bytes: in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored_bytes: int


def count_weight_bytes(folder: Path, dtype: str) -> int | None:
    """Give the bytes of a model's weights in memory; None when the folder does not tell.

    Floating-point weights are converted when they are loaded; others (quantised ones) stay as
    they are stored.

    Args:
        folder: the model's, with its weights or only its small files.
        dtype: `float32` or `bfloat16`, in which it runs.

    Raises:
        ModelError: a file is not in the format of safetensors.
    """
    run_bytes = _RUN_BYTES[dtype]
    files = _weight_files(folder)
    if files and all(file.is_file() for file in files):
        return sum(
            math.prod(tensor.shape) * run_bytes
            if tensor.dtype in _FLOAT_DTYPES
            else tensor.stored_bytes
            for file in files
            for tensor in _read_header(file)
        )
    stored = _read_index(folder).get("metadata", {}).get("total_size")
    if stored is None:
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored_as = config.get("dtype") or config.get("torch_dtype")
    if "quantization_config" in config or stored_as not in _STORED_BYTES:
        return int(stored)
    return int(stored * run_bytes / _STORED_BYTES[stored_as])


def read_tensors(folder: Path) -> Iterator[Tensor]:
    """Give the tensors of a model's files that are there.

    Raises:
        ModelError: a file is not in the format of safetensors.
    """
    return (
        tensor for file in _weight_files(folder) if file.is_file() for tensor in _read_header(file)
    )


def _weight_files(folder: Path) -> list[Path]:
    """Give the files that engines load: those the index names, whether or not they are there.

    Beside them there may be the same weights once more, as `consolidated*.safetensors`.
    """
    named = {folder / name for name in _read_index(folder).get("weight_map", {}).values()}
    there = set(folder.glob("*.safetensors"))
    copies = set(folder.glob("consolidated*.safetensors"))
    return sorted(named or there - copies or there)


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / _INDEX
    if not file.is_file():
        return {}
    index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return index


def _read_header(file: Path) -> Iterator[Tensor]:
    size_of_file = file.stat().st_size
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            header: dict[str, Any] = json.loads(stream.read(min(size, size_of_file)))
        except ValueError:
            raise ModelError(
                f"{file.name} is no safetensors file",
                where=str(file),
                fix="fetch it again; where it is a pointer of Git LFS, with git lfs pull",
            ) from None
    for name, tensor in header.items():
        if name != "__metadata__":
            start, end = tensor["data_offsets"]
            yield Tensor(name, tensor["dtype"], tuple(tensor["shape"]), end - start)
