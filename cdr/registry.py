"""Rewards in MLflow's model registry: found by `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

A version holds the folder of `cdr.reward_files`, so that a reward is one thing wherever it is used;
`cdr.registration` puts it there. Spoken to from the driver only, and from whatever process asks for
a reward by name.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cdr.config import TrackingSpec, load_annotate_config
from cdr.config_files import named_file, read_values, validate_config
from cdr.errors import CdrError, ConfigError, SetupError
from cdr.evaluation_config import EvaluateConfig, load_evaluate_config
from cdr.node_cache import make_cache_dir
from cdr.plan import AnnotationPlan, RewardPlan, plan_annotation, plan_reward
from cdr.redaction import first_line, redact
from cdr.reward_files import CONFIG, check_identity, read_identity
from cdr.tracking_store import open_store, quiet, resolve_tracking_uri
from cdr.weights import hash_files

KEY_TAG = "cdr_reward_key"
"""Tag of a version with its reward key; Unity Catalog takes no dots in the names of tags."""

_SCHEME = "models:/"
_REFERENCE = re.compile(r"^models:/([^/@]+)(?:@([^/@]+)|/(\d+))$")
_NAME = re.compile(r"^[\w.\- ]+$")
_SHOWN = 20


@dataclass(frozen=True)
class Reference:
    """A name of a registered reward.

    Args:
        name: the registered model.
        alias: a name that stands for one of its versions; None where the version is given.
        version: the version; None where an alias is given.
    """

    name: str
    alias: str | None
    version: str | None


@dataclass(frozen=True)
class RewardVersion:
    """A version of a registered reward.

    Args:
        name: the registered model.
        version: number, as text.
        reward_key: the key it was registered with; None where the version is not a reward.
        run_id: MLflow run that registered it.
    """

    name: str
    version: str
    reward_key: str | None
    run_id: str | None

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"

    @property
    def uri(self) -> str:
        """What names it for good."""
        return f"{_SCHEME}{self}"


def is_reference(text: str) -> bool:
    """Tell whether a text is meant to name a registered reward."""
    return text.startswith("models:")


def parse_reference(text: str) -> Reference:
    """Read `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        ConfigError: it is neither.
    """
    found = _REFERENCE.match(text)
    if found is None:
        raise ConfigError(
            [f"reward: must be models:/NAME@ALIAS or models:/NAME/VERSION, got '{text}'"],
            fix="VERSION is a number; MLflow's stages and 'latest' would change under a run's "
            "feet: give the version an alias",
        )
    check_name("reward", found[1])
    return Reference(*found.groups())


def check_name(key: str, name: str) -> None:
    """Refuse what is no name of a registered model or alias.

    Raises:
        ConfigError: says which characters a name may have.
    """
    if not _NAME.match(name):
        raise ConfigError(
            [f"{key}: may have letters, digits, spaces and . _ -, got '{name}'"],
            fix="choose another name",
        )


class Registry:
    """The registry beside a tracking store, or the one that MLFLOW_REGISTRY_URI names.

    Args:
        uri: tracking URI, see `cdr.tracking_store.resolve_tracking_uri`.

    Raises:
        SetupError: it cannot be used; so do all methods.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        with self._reaching():
            self._client = open_store(uri)

    def find(self, reference: Reference) -> RewardVersion:
        """Find the version that a reference names.

        Raises:
            ConfigError: there is no such name, alias or version; lists those there are.
        """
        model = self._find_model(reference.name)
        if model is None:
            raise self._no_such_name(reference.name)
        version = reference.version
        if version is None:
            version = model.aliases.get(reference.alias)
        if version is None:
            raise self._no_such_version(reference, f"alias '{reference.alias}'", model.aliases)
        found = self._find_version(reference.name, str(version))
        if found is None:
            raise self._no_such_version(reference, f"version {version}", model.aliases)
        return found

    def find_latest(self, name: str) -> RewardVersion | None:
        """Find the version with the highest number; None where there is none."""
        if self._find_model(name) is None:
            return None
        numbers = self._list_versions(name)
        return self._find_version(name, str(numbers[-1])) if numbers else None

    def aliases(self, name: str) -> dict[str, str]:
        """Give the aliases of a name and the versions they stand for."""
        model = self._find_model(name)
        return {} if model is None else {k: str(v) for k, v in model.aliases.items()}

    def register(
        self,
        name: str,
        log_model: Callable[[], str],
        *,
        run_id: str,
        tags: Mapping[str, str],
        description: str,
    ) -> RewardVersion:
        """Make a version, and the name where it is new.

        Args:
            name: of the registered model.
            log_model: logs the model; gives its `models:/` URI.
            run_id: MLflow run it belongs to.
            tags: of the version; `KEY_TAG` among them.
            description: of the version, Markdown.
        """
        with self._reaching(), global_store(self.uri):
            source = log_model()
            if self._find_model(name) is None:
                self._client.create_registered_model(name)
            made = self._client.create_model_version(
                name,
                source,
                run_id=run_id,
                tags=dict(tags),
                description=description,
                model_id=source.removeprefix(_SCHEME),
            )
        return RewardVersion(name, str(made.version), tags[KEY_TAG], run_id)

    def set_alias(self, version: RewardVersion, alias: str) -> None:
        """Let an alias stand for a version, whatever it stood for before."""
        with self._reaching():
            self._client.set_registered_model_alias(version.name, alias, version.version)

    def fetch(self, version: RewardVersion) -> Path:
        """Bring a version's folder (`cdr.reward_files`) to this machine.

        Returns:
            A folder in the cache, named after its content.

        Raises:
            ConfigError: the version is not a reward.
        """
        cache = make_cache_dir("rewards")
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            with self._reaching(), global_store(self.uri):
                import mlflow

                downloaded = Path(
                    mlflow.artifacts.download_artifacts(version.uri, dst_path=unfinished)
                )
            found = next(downloaded.rglob(CONFIG), None)
            if found is None:
                raise ConfigError(
                    [f"reward: the registered model '{version}' is not a reward of this package"],
                    where=redact(self.uri),
                    fix="name one that jobs/register_reward.py has registered",
                )
            target = cache / hash_files(found.parent, ("*",))[:32]
            with contextlib.suppress(OSError):  # it is there, perhaps since this moment
                found.parent.rename(target)
        return target

    def _find_model(self, name: str) -> Any:
        with self._reaching() as is_missing:
            try:
                return self._client.get_registered_model(name)
            except Exception as error:
                if is_missing(error):
                    return None
                raise

    def _find_version(self, name: str, version: str) -> RewardVersion | None:
        with self._reaching() as is_missing:
            try:
                found = self._client.get_model_version(name, version)
            except Exception as error:
                if is_missing(error):
                    return None
                raise
        return RewardVersion(name, version, found.tags.get(KEY_TAG), found.run_id)

    def _list_versions(self, name: str) -> list[int]:
        with self._reaching():
            found = self._client.search_model_versions(f"name='{name}'")
        return sorted(int(version.version) for version in found)

    def _no_such_name(self, name: str) -> ConfigError:
        with self._reaching():
            known = [model.name for model in self._client.search_registered_models()]
        listed = _listed(known) if known else "none; jobs/register_reward.py registers one"
        return ConfigError(
            [f"reward: no registered model has the name '{name}'; there are: {listed}"],
            where=f"MLflow registry {redact(self.uri)}",
            fix="check the name and the store: tracking.uri, MLFLOW_TRACKING_URI, or the "
            "warehouse that has mlflow.db",
        )

    def _no_such_version(
        self, reference: Reference, what: str, aliases: dict[str, Any]
    ) -> ConfigError:
        named = [f"@{alias} (version {version})" for alias, version in sorted(aliases.items())]
        numbers = [str(number) for number in self._list_versions(reference.name)]
        return ConfigError(
            [
                f"reward: '{reference.name}' has no {what}; "
                f"aliases: {_listed(named)}; versions: {_listed(numbers)}"
            ],
            where=f"MLflow registry {redact(self.uri)}",
            fix="name one of these, or set the alias: "
            "jobs/register_reward.py --config ... --alias NAME",
        )

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[Any]:
        """Tell a registry that cannot be reached from one that has not what was asked for."""
        try:
            with quiet():
                yield _is_missing
        except CdrError:
            raise
        except Exception as error:  # MLflow, SQLAlchemy and the network each have their own
            raise SetupError(
                f"the MLflow registry cannot be used: {first_line(error)}",
                where=redact(self.uri),
                fix="start the server, or correct its address: tracking.uri, --tracking-uri, "
                "MLFLOW_TRACKING_URI or MLFLOW_REGISTRY_URI; a run may also name the reward's YAML",
            ) from None


def load_annotation_plan(
    path: str | Path, overrides: Sequence[str] = (), *, limit: int | None = None
) -> AnnotationPlan:
    """Read an annotate YAML and plan it; its reward may be a version of the registry.

    Args:
        path: the YAML file.
        overrides: `a.b=c` items, strongest last; `reward=models:/NAME@ALIAS` takes a registered
            reward. Other items of `reward` may then move its files (`reward.models.strong.path`)
            or set how its models are run, and nothing that decides its numbers.
        limit: see `cdr.plan.plan_annotation`.

    Raises:
        ConfigError: with every problem found; the registry lacks what is named; or the reward is
            not the one that was registered.
        SetupError: the registry cannot be used.
    """
    registered = _fetch_reward(path, overrides)
    if registered is None:
        return plan_annotation(load_annotate_config(path, overrides), limit=limit)
    config = load_annotate_config(path, [*overrides, registered.override])
    reward = plan_reward(config.reward)
    registered.check(reward)
    plan = plan_annotation(config, limit=limit, reward=reward)
    return replace(plan, reward_version=str(registered.version))


def load_evaluation(
    path: str | Path, overrides: Sequence[str] = ()
) -> tuple[EvaluateConfig, str | None]:
    """Read an evaluate YAML; its reward may be a version of the registry.

    Args:
        path: the YAML file.
        overrides: as for `load_annotation_plan`. Rows may change the reward as those of a file.

    Returns:
        The config, and the version (`NAME/3`) where the reward is a registered one.

    Raises:
        ConfigError: as for `load_annotation_plan`.
        SetupError: the registry cannot be used.
    """
    registered = _fetch_reward(path, overrides)
    if registered is None:
        return load_evaluate_config(path, overrides), None
    config = load_evaluate_config(path, [*overrides, registered.override])
    registered.check(plan_reward(config.reward))
    return config, str(registered.version)


@dataclass(frozen=True)
class _Registered:
    """A registered reward whose files have been fetched."""

    version: RewardVersion
    folder: Path

    @property
    def override(self) -> str:
        """The item that puts it in the place of its name."""
        return f"reward={self.folder / CONFIG}"

    def check(self, reward: RewardPlan) -> None:
        """Refuse a reward that is not the one that was registered."""
        identity = read_identity(self.folder)
        if identity.reward_key != self.version.reward_key:
            raise ConfigError(
                [
                    f"reward: the files of '{self.version}' have the key "
                    f"{identity.reward_key[:16]}, it was registered with "
                    f"{str(self.version.reward_key)[:16]}: they were replaced"
                ],
                where=self.version.uri,
                fix="register the reward again: jobs/register_reward.py --config ...",
            )
        check_identity(reward, identity, self.version.uri)


def _fetch_reward(path: str | Path, overrides: Sequence[str]) -> _Registered | None:
    """Fetch the registered reward that a config names; None where it names none."""
    named = named_file(path, overrides, "reward")
    if named is None or not is_reference(named):
        return None
    reference = parse_reference(named)
    registry = Registry(_tracking_uri(path, overrides))
    version = registry.find(reference)
    return _Registered(version, registry.fetch(version))


@contextlib.contextmanager
def global_store(uri: str) -> Iterator[None]:
    """Set MLflow's global store for a while; what resolves `models:/` knows no other."""
    import mlflow

    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def _tracking_uri(path: str | Path, overrides: Sequence[str]) -> str:
    values = read_values(path, overrides, ("warehouse", "tracking"))
    tracking = validate_config(TrackingSpec, path, values.get("tracking") or {})
    return resolve_tracking_uri(tracking, str(values.get("warehouse") or "."))


def _is_missing(error: Exception) -> bool:
    return getattr(error, "error_code", None) in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
