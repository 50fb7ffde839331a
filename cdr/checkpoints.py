"""What lies in a training's output folder, and whether the training may go on from it.

No torch: a command line is checked, and told what is wrong, before a model loads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdr.errors import ConfigError, ModelError
from cdr.weights import TAKEN_FILES, hash_files


def check_same(now: Mapping[str, Any], before: Mapping[str, Any], where: Path) -> None:
    """Refuse to continue what another configuration has begun.

    Args:
        now: what decides the result of this start.
        before: what decided it when `where` was written.
        where: the file that was read.

    Raises:
        ConfigError: names every key that differs, with both values.
    """
    different = [
        f"{key}: expected {before.get(key)!r} as in what lies there, got {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if different:
        raise ConfigError(
            different,
            where=str(where),
            fix="give the same options to continue, or another --output to start anew",
        )


def hash_model(folder: Path) -> str:
    """Hash a model folder's weights, configuration, tokenizer and chat template.

    Raises:
        ModelError: there is no such folder, or it has no safetensors weights.
    """
    if not folder.is_dir():
        raise ModelError(
            "the start model must be a folder on this machine",
            where=str(folder),
            fix="make the demo model with: python -m jobs.make_demo_model",
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            "the start model's folder has no .safetensors weights",
            where=str(folder),
            fix="name a folder that transformers' save_pretrained wrote",
        )
    return hash_files(folder, TAKEN_FILES)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that `write_json` has written."""
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def write_json(path: Path, value: object) -> None:
    """Write a file at once: other processes may be reading it, and a kill may come at any time."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
    new.replace(path)
