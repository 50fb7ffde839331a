"""From YAML files and `--set` to a checked model: where values come from, how problems are told.

1. A field marked `MayBeFile` (a run's `reward`) may name another YAML file; its content takes the
   place of the name, and may name files in its turn.
2. A value that starts with `./` or `../` inside a file is a path relative to that file.
   Anything else (absolute paths, `s3://...`, hub ids, paths given by `--set`) is taken as it is.
   Files may lie behind a URI or in the package itself: `cdr.text_files`.
3. `--set a.b=c` wins over files. `${oc.env:NAME,default}` reads the environment (OmegaConf).

Every problem of a file is reported at once, with its key, what was expected and what was given.
Knows no particular config: `cdr.config` and others have those, made of `Spec`s.
"""

from __future__ import annotations

import copy
import difflib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError

from cdr.errors import ConfigError
from cdr.text_files import read_text, resolve_beside

_OVERRIDE = re.compile(r"^[^.=]+(\.[^.=]+)*=")
_MISSING_VARIABLE = re.compile(r"Environment variable '(.+?)' not found")
_LOOK_UP_REVISION = (
    "where a revision lacks, a model's commit hash is printed by: python -c "
    "\"from huggingface_hub import model_info; print(model_info('OWNER/NAME').sha)\"; "
    "see docs/reference/config.md"
)


class Spec(BaseModel):
    """A part of a config: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


_Model = TypeVar("_Model", bound=Spec)


@dataclass(frozen=True)
class MayBeFile:
    """Marks a field that may name a YAML file: `reward: Annotated[RewardSpec, MayBeFile()]`.

    The file's content takes the place of the name. Values of a mapping can be marked too.
    """


def load_config(model: type[_Model], path: str | Path, overrides: Sequence[str] = ()) -> _Model:
    """Read a YAML file with everything it names.

    Args:
        model: what the file has to hold.
        path: the YAML file: a path, a URI, or `conf/...` for one of the package's own.
        overrides: `a.b=c` items, strongest last; `field=FILE` swaps the whole content of a field
            marked `MayBeFile`, before the items that change a part of it.

    Raises:
        ConfigError: with every problem found.
    """
    return validate_config(model, path, _read_tree(path, overrides, model))


def named_file(path: str | Path, overrides: Sequence[str], field: str) -> str | None:
    """Give the file that a field marked `MayBeFile` names; None where its content is in the YAML.

    Args:
        path: as for `load_config`.
        overrides: as for `load_config`.
        field: the field.

    Raises:
        ConfigError: the file cannot be read.
    """
    given = [item.partition("=")[2] for item in overrides if item.partition("=")[0] == field]
    named = given[-1] if given else _read_yaml(str(path)).get(field)
    return named if isinstance(named, str) else None


def read_values(path: str | Path, overrides: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """Read some top-level keys of a YAML file before the whole can be checked.

    Args:
        path: as for `load_config`.
        overrides: as for `load_config`; those for other keys are left aside.
        keys: what to read.

    Raises:
        ConfigError: the file cannot be read, or a variable of these keys is not set.
    """
    ours = [item for item in overrides if re.split("[.=]", item, maxsplit=1)[0] in keys]
    return _read_tree(path, ours, None, keys)


def validate_config(model: type[_Model], path: str | Path, tree: Mapping[str, Any]) -> _Model:
    """Check what was read from a file.

    Args:
        model: what it has to hold.
        path: the file, for the message.
        tree: its content.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[str] = []
    mended = copy.deepcopy(dict(tree))
    while True:
        try:
            valid = model.model_validate(mended)
        except ValidationError as error:
            problems += list_problems(error, model)
            unknown = [i["loc"] for i in error.errors() if i["type"] == "extra_forbidden"]
            # An unknown key keeps pydantic from the checks across keys: mend it and look again.
            for location in unknown:
                _mend(mended, location, model)
            if unknown:
                continue
        if not problems:
            return valid
        problems = list(dict.fromkeys(problems))
        raise ConfigError(problems, where=str(path), fix=_fix_for(problems))


def _read_tree(
    path: str | Path,
    overrides: Sequence[str],
    model: type[Spec] | None,
    only: Sequence[str] | None = None,
) -> dict[str, Any]:
    tree = _read_yaml(str(path))
    if only is not None:
        tree = {key: value for key, value in tree.items() if key in only}
    malformed = [item for item in overrides if not _OVERRIDE.match(item)]
    if malformed:
        raise ConfigError(
            [f"--set {item}: expected KEY=VALUE" for item in malformed],
            fix="for example --set pairs.min_margin=0.5",
        )
    files = _NamedFiles(overrides)
    tree = files.read_below(tree, model, "") if model is not None else tree
    changes = [item for item in overrides if item.partition("=")[0] not in files.keys]
    merged = OmegaConf.create(tree)
    problems = []
    for item in changes:
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([item]))
        except (OmegaConfBaseException, ValueError, TypeError, yaml.YAMLError) as error:
            problems.append(f"--set {item}: {str(error).splitlines()[0]}")
    problems += _unresolvable(merged)
    if problems:
        raise ConfigError(problems, where=str(path), fix=_fix_for(problems))
    return {str(k): v for k, v in OmegaConf.to_container(merged, resolve=True).items()}


def _unresolvable(node: Any, prefix: str = "") -> Iterator[str]:
    """Name every `${...}` of an OmegaConf node that has no value, with its key."""
    for key in node if OmegaConf.is_dict(node) else range(len(node)):
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            missing = _MISSING_VARIABLE.search(str(error))
            problem = (
                f"environment variable '{missing[1]}' is not set"
                if missing
                else str(error).splitlines()[0]
            )
            yield f"{prefix}{key}: {problem}"
        else:
            if OmegaConf.is_config(value):
                yield from _unresolvable(value, f"{prefix}{key}.")


class _NamedFiles:
    """Puts the content of the files that a tree names in the place of their names.

    Args:
        overrides: `field=FILE` items among them name other files; of several the last one.

    Attributes:
        keys: fields that may name a file, as found; what overrides say of them is a name.
    """

    def __init__(self, overrides: Sequence[str]) -> None:
        self._given = {key: value for key, _, value in (item.partition("=") for item in overrides)}
        self.keys: set[str] = set()

    def read_below(self, tree: Mapping[str, Any], model: type[Spec], prefix: str) -> dict[str, Any]:
        """Give a tree with the files' contents; `prefix` is the key it stands at, with a dot."""
        found = dict(tree)
        for name, field in model.model_fields.items():
            marks = field.metadata
            if name in found or (MayBeFile() in marks and f"{prefix}{name}" in self._given):
                found[name] = self._read(
                    found.get(name), field.annotation, marks, f"{prefix}{name}"
                )
        return found

    def _read(self, value: Any, annotation: Any, marks: Sequence[Any], key: str) -> Any:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            marks = [*marks, *more]
        if MayBeFile() in marks:
            self.keys.add(key)
            value = self._given.get(key, value)
            if isinstance(value, str):
                value = _read_yaml(value)
        if not isinstance(value, Mapping):
            return value
        if get_origin(annotation) is dict:
            of = get_args(annotation)[1]
            return {name: self._read(one, of, (), f"{key}.{name}") for name, one in value.items()}
        spec = _spec_in(annotation)
        return value if spec is None else self.read_below(value, spec, f"{key}.")


def _spec_in(annotation: Any) -> type[Spec] | None:
    """Give the model that a field's type is, or holds (`dict[str, Spec]`, `Spec | None`)."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return annotation
    return next(filter(None, map(_spec_in, get_args(annotation))), None)


def _read_yaml(place: str) -> dict[str, Any]:
    try:
        # OmegaConf's loader, unlike PyYAML's, refuses a key that stands twice.
        loaded = OmegaConf.load(io.StringIO(read_text(place)))
        tree = OmegaConf.to_container(loaded, resolve=False)
    except FileNotFoundError:
        raise ConfigError([f"{place}: no such file"], fix="see the files in conf/") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError([f"cannot be read as YAML: {error}"], where=place) from None
    if not isinstance(tree, dict):
        raise ConfigError([f"expected a mapping of keys, got {type(tree).__name__}"], where=place)
    anchored: dict[str, Any] = _anchor_paths(tree, place)
    return anchored


def _anchor_paths(value: Any, place: str) -> Any:
    if isinstance(value, dict):
        return {key: _anchor_paths(item, place) for key, item in value.items()}
    if isinstance(value, list):
        return [_anchor_paths(item, place) for item in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        return resolve_beside(value, place)
    return value


def _mend(tree: Any, location: Sequence[str | int], root: type[Spec]) -> None:
    """Rename an unknown key to the one it was probably meant to be, or drop it."""
    *parents, key = location
    for parent in parents:
        tree = tree[parent]
    value = tree.pop(key)
    near = _nearest_key(str(key), _known_keys(root, [str(part) for part in parents]))
    if near is not None:
        tree.setdefault(near, value)


def _nearest_key(key: str, known: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(key, known, n=1)), None)


def _fix_for(problems: Sequence[str]) -> str | None:
    return _LOOK_UP_REVISION if any("revision" in problem for problem in problems) else None


def list_problems(error: ValidationError, root: type[Spec]) -> list[str]:
    """Say what pydantic found, one line per problem with its key: `key: expected ..., got ...`.

    Args:
        error: from checking a tree.
        root: what the tree had to be.
    """
    lines: list[str] = []
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        key = ".".join(location)
        given = repr(item["input"]) if not isinstance(item["input"], dict) else "a mapping"
        if item["type"] == "extra_forbidden":
            known = _known_keys(root, location[:-1])
            near = _nearest_key(location[-1], known)
            hint = f"did you mean '{near}'?" if near else f"known: {', '.join(known)}"
            lines.append(f"{key}: unknown key; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{key}: is required")
        elif item["type"] == "value_error":
            stated = str(item["ctx"]["error"]).split("\n")
            lines.extend(f"{key}.{line}" if key else line for line in stated)
        else:
            message = item["msg"][0].lower() + item["msg"][1:]
            # Such as a commit hash of digits only, which YAML reads as a number.
            unquoted = item["type"] == "string_type" and isinstance(item["input"], int | float)
            hint = "; put it in quotes" if unquoted else ""
            lines.append(f"{key}: {message}, got {given}{hint}")
    return lines


def _known_keys(root: type[Spec], location: Sequence[str]) -> list[str]:
    """List the keys of the model at a location; a dict of models is stepped through."""
    model: Any = root
    for part in location:
        if isinstance(model, type) and issubclass(model, Spec) and part in model.model_fields:
            model = model.model_fields[part].annotation
        model = _spec_in(model) or model
    return list(model.model_fields) if hasattr(model, "model_fields") else []
