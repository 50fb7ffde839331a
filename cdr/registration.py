"""Put a reward into MLflow's model registry: a run, a model from code, a version, an alias.

A new version is made exactly when the reward's key differs from the latest version's: a text of the
pack, a commit, a dtype or a weight changes it; a name, a description or a moved folder does not.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import cdr
from cdr.config import TrackingSpec
from cdr.errors import ConfigError, SetupError
from cdr.model_requirements import list_requirements
from cdr.plan import RewardPlan
from cdr.redaction import redact
from cdr.registry import KEY_TAG, Registry, RewardVersion, check_name
from cdr.report.reward_text import RewardText
from cdr.reward_config import RewardSpec
from cdr.reward_files import describe_weights, package_version, write_reward
from cdr.tracking import RunTracker
from cdr.tracking_store import resolve_tracking_uri

EXPERIMENT = "cdr-rewards"

_MAX_TAG_CHARS = 1000  # Unity Catalog's limit
_MODEL_CODE = Path(cdr.__file__).parent / "reward_pyfunc.py"


@dataclass(frozen=True)
class Registration:
    """What registering came to.

    Args:
        version: the version that holds the reward now.
        is_new: whether it was made; False where the latest one is the same reward.
        alias: what stands for it since; None where none was asked for.
        replaced: the version that the alias stood for before; None for none, or the same one.
        uri: tracking URI of the store.
    """

    version: RewardVersion
    is_new: bool
    alias: str | None
    replaced: str | None
    uri: str


def find_store(uri: str | None, warehouse: str | None) -> str:
    """Decide which MLflow store a registration goes to.

    In this order: the URI given, MLFLOW_TRACKING_URI, the workspace on Databricks, SQLite in the
    warehouse given: where the runs of an annotate job with that warehouse are.

    Raises:
        SetupError: nothing of that is there.
    """
    known = os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get("DATABRICKS_RUNTIME_VERSION")
    if not (uri or known or warehouse):
        raise SetupError(
            "it is not said which MLflow store the reward is to be registered in",
            fix="--warehouse FOLDER, for the store in an annotate run's warehouse; or "
            "--tracking-uri https://your-mlflow-server, or MLFLOW_TRACKING_URI",
        )
    return resolve_tracking_uri(TrackingSpec(uri=uri), warehouse or ".")


def register_reward(
    plan: RewardPlan,
    *,
    uri: str,
    name: str | None = None,
    alias: str | None = None,
    experiment: str = EXPERIMENT,
    force: bool = False,
) -> Registration:
    """Register a reward, unless the latest version is the same one.

    Args:
        plan: the checked reward.
        uri: tracking URI, see `find_store`.
        name: name in the registry; None takes the reward's own.
        alias: is let stand for the version, new or not.
        experiment: of the run that logs a new version.
        force: make a new version in any case.

    Raises:
        ConfigError: the name or alias cannot be one, or an endpoint's address holds a password.
        SetupError: the store or registry cannot be used.
    """
    _refuse_passwords(plan)
    name = name or plan.spec.name
    check_name("--name", name)
    if alias is not None:
        check_name("--alias", alias)
    registry = Registry(uri)
    latest = registry.find_latest(name)
    is_new = force or latest is None or latest.reward_key != plan.key
    if is_new:
        version = _log(plan, registry, name, experiment)
    else:
        assert latest is not None
        version = latest
    replaced = None
    if alias is not None:
        before = registry.aliases(name).get(alias)
        replaced = before if before != version.version else None
        registry.set_alias(version, alias)
    return Registration(version, is_new, alias, replaced, uri)


def describe(plan: RewardPlan) -> str:
    """Describe a reward for the registry's page of a version: Markdown, one fact a line."""
    reward = plan.spec
    lines = [reward.description.strip() or f"Reward {reward.name}.", ""]
    for role, model in plan.models.items():
        weights = " + ".join(describe_weights(model).values())
        engine, api = model.engine_spec, model.spec.api
        runs = engine.dtype if api is None else f"{api.base_url}, key in {api.api_key_variable}"
        lines.append(f"- {role}: `{weights}` ({engine.engine}, {runs})")
    pack = "none" if plan.pack is None else f"{plan.pack.name} {plan.pack.version}"
    lines += [
        f"- {_describe_weighing(reward)}",
        f"- prompt pack: {pack}; routing: {reward.routing.mode}",
        f"- reward key: `{plan.key}`",
    ]
    return "\n".join(lines)


def _describe_weighing(reward: RewardSpec) -> str:
    if reward.is_judge:
        return f"compares all candidates of a prompt: {RewardText.of(reward).formula}"
    terms = ", ".join(f"{t.weight:+g} {t.model}/{t.condition}" for t in reward.resolved_terms())
    return f"terms: {terms}; {reward.reduction}"


def version_tags(plan: RewardPlan) -> dict[str, str]:
    """Give the tags of a version: its key, its pinned models, its pack."""
    tags = {
        KEY_TAG: plan.key,
        "cdr_reward_name": plan.spec.name,
        "cdr_package_version": package_version(),
    }
    if plan.pack is not None:
        tags["cdr_prompt_pack"] = f"{plan.pack.name} {plan.pack.version} {plan.pack.key[:16]}"
    for role, model in plan.models.items():
        tags |= {f"cdr_{role}_{part}": text for part, text in describe_weights(model).items()}
    return {tag: str(redact(text))[:_MAX_TAG_CHARS] for tag, text in tags.items()}


def _refuse_passwords(plan: RewardPlan) -> None:
    """Refuse an endpoint with a password in its address: a version has it as it is."""
    problems = [
        f"models.{role}.api.base_url: must have no user name or password, which all readers of "
        "the registry would see"
        for role, model in plan.spec.models.items()
        if model.api is not None and redact(model.api.base_url) != model.api.base_url
    ]
    if problems:
        raise ConfigError(
            problems,
            where=f"reward '{plan.spec.name}'",
            fix="keep it in the environment, in the variable that api.api_key_variable names",
        )


def _log(plan: RewardPlan, registry: Registry, name: str, experiment: str) -> RewardVersion:
    """Log the model in a run of its own and make a version of it."""
    tracking = TrackingSpec(uri=registry.uri, experiment=experiment)
    tags = {
        "cdr.job": "register_reward",
        "cdr.reward_name": plan.spec.name,
        "cdr.reward_key": plan.key,
        "cdr.registered_model": name,
    }
    config = plan.spec.model_dump(mode="json")
    run_name = f"register {name}"
    with RunTracker(tracking, ".", run_name=run_name, config=config, tags=tags) as tracker:
        version = registry.register(
            name,
            lambda: _log_model(plan, str(tracker.run_id)),
            run_id=str(tracker.run_id),
            tags=version_tags(plan),
            description=str(redact(describe(plan))),
        )
        tracker.set_tags({"cdr.reward_version": str(version)})
    return version


def _log_model(plan: RewardPlan, run_id: str) -> str:
    """Log a reward as a model of a run; give its URI."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    from cdr.reward_model import REQUEST_TOKENS

    text, number = DataType.string, DataType.double
    # A judge's reward depends on the other candidates: how many there are has to be said.
    counted = [ColSpec(DataType.long, "num_candidates")] if plan.spec.is_judge else []
    signature = ModelSignature(
        inputs=Schema(
            [
                ColSpec(AnyType(), "prompt"),  # text, or turns with role and content
                ColSpec(text, "completion"),
                *counted,
                ColSpec(text, "finish_reason", required=False),
                ColSpec(text, "domain", required=False),
            ]
        ),
        outputs=Schema(
            [
                ColSpec(number, "reward"),
                ColSpec(text, "domain"),
                ColSpec(number, "strong_logprob"),
                ColSpec(number, "weak_logprob"),
                ColSpec(DataType.long, "num_tokens"),
                ColSpec(text, "status"),
                ColSpec(text, "error"),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("placement", text, "colocated"),
                ParamSpec("request_tokens", DataType.long, REQUEST_TOKENS),
            ]
        ),
    )
    with tempfile.TemporaryDirectory() as folder, mlflow.start_run(run_id=run_id):
        reward = Path(folder) / "reward"
        reward.mkdir()
        write_reward(plan, reward)
        with warnings.catch_warnings():
            # MLflow asks for an example of the input, with which it would load the models here.
            warnings.simplefilter("ignore", UserWarning)
            info = mlflow.pyfunc.log_model(
                name="reward",
                python_model=str(_MODEL_CODE),
                artifacts={"reward": str(reward)},
                signature=signature,
                # The package is in no index: the code that made the numbers goes with the version.
                code_paths=[str(_MODEL_CODE.parent)],
                pip_requirements=list_requirements(plan),
            )
    return str(info.model_uri)
