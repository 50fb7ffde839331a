"""A reward as a folder of its own: all that decides its numbers but the weights, and its identity.

    reward.yaml         the resolved config, every model pinned to a commit or a checksum
    prompt_pack.yaml    the pack, where the reward has one
    template.jinja      the chat template, where the config names a file
    identity.json       the reward key, and what it was computed from, part by part

The registry keeps such a folder with each version (`cdr.registry`). Whoever reads it plans the
reward anew and compares: a pack that was edited, weights that changed in their folder or another
value are an error that says which part differs, not other numbers under the same name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from cdr.config import content_hash
from cdr.errors import ConfigError
from cdr.judge import JUDGE_KEY
from cdr.models import ResolvedModel
from cdr.plan import RewardPlan, plan_reward
from cdr.reward_config import ModelSpec, RewardSpec, load_reward_config
from cdr.text_files import read_text

CONFIG, PACK, TEMPLATE, IDENTITY = (
    "reward.yaml", "prompt_pack.yaml", "template.jinja", "identity.json"
)  # fmt: skip
"""Names of the files."""

PACKAGE = "cdr-annotate"
"""This package, as it is installed."""

_NAMED_TEMPLATES = ("strong", "own", "plain")


@dataclass(frozen=True)
class Identity:
    """What a reward was when its folder was written.

    Args:
        reward_key: hash of all that decides its numbers.
        parts: what the key was computed from, by the config's names; see `list_parts`.
        package_version: of this package.
    """

    reward_key: str
    parts: Mapping[str, str]
    package_version: str


def write_reward(plan: RewardPlan, folder: Path) -> None:
    """Write a reward's folder.

    Args:
        plan: the checked reward.
        folder: an empty folder.
    """
    reward = _pin(plan)
    tree = reward.model_dump(mode="json", exclude_none=True)
    if plan.pack is None:
        tree.pop("prompt_pack", None)
    else:
        assert reward.prompt_pack is not None
        (folder / PACK).write_text(read_text(reward.prompt_pack), encoding="utf-8")
        tree["prompt_pack"] = f"./{PACK}"
    if reward.encoding.template not in _NAMED_TEMPLATES:
        (folder / TEMPLATE).write_text(read_text(reward.encoding.template), encoding="utf-8")
        tree["encoding"]["template"] = f"./{TEMPLATE}"
    engines = {model.pop("engine") for model in tree["models"].values()}
    if len(engines) == 1:
        # Said once, so that another `engine` given with the reward is seen, and refused.
        (tree["engine"],) = engines
    else:
        for role, model in reward.models.items():
            tree["models"][role]["engine"] = model.engine
    text = yaml.safe_dump(_escape(tree), sort_keys=False, allow_unicode=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    identity = {
        "reward_key": plan.key,
        "package_version": package_version(),
        "parts": list_parts(plan),
    }
    (folder / IDENTITY).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")


def read_identity(folder: Path) -> Identity:
    """Read what the reward of a folder was when it was written.

    Raises:
        ConfigError: the folder is not a reward's.
    """
    try:
        found = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
        return Identity(found["reward_key"], found["parts"], found["package_version"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            [f"{IDENTITY}: is missing or damaged ({type(error).__name__})"],
            where=str(folder),
            fix="register the reward again: jobs/register_reward.py --config ...",
        ) from None


def read_reward(folder: Path, *, where: str, overrides: Sequence[str] = ()) -> RewardPlan:
    """Plan the reward of a folder, and see that it is the one that was written.

    Args:
        folder: from `write_reward`.
        where: what people call it, for messages: `models:/NAME/3`.
        overrides: `a.b=c` items; those that move files or set how models are run may change, what
            decides numbers may not.

    Raises:
        ConfigError: a model is gone or was changed, or the reward is not the same any more.
    """
    identity = read_identity(folder)
    plan = plan_reward(load_reward_config(folder / CONFIG, overrides))
    check_identity(plan, identity, where)
    return plan


def check_identity(plan: RewardPlan, identity: Identity, where: str) -> None:
    """Compare a reward with what it was when its folder was written.

    Raises:
        ConfigError: with every part that differs.
    """
    if plan.key == identity.reward_key:
        return
    now, then = list_parts(plan), identity.parts
    problems = [
        f"{_explain(name)}: was {then.get(name, 'absent')} when it was registered, "
        f"is {now.get(name, 'absent')}"
        for name in dict.fromkeys([*then, *now])
        if then.get(name) != now.get(name)
    ]
    fix = (
        "undo the change, or register what you have as a new version: "
        "jobs/register_reward.py --config ..."
    )
    if not problems:
        problems = [
            f"reward_key: is computed in another way since {identity.package_version} of this "
            f"package, this is {package_version()}"
        ]
        fix = "register the reward again with this version: jobs/register_reward.py --config ..."
    raise ConfigError(problems, where=where, fix=fix)


def list_parts(plan: RewardPlan) -> dict[str, str]:
    """Name what a reward key is computed from, so that two of them can be compared.

    Returns:
        Short texts by the config's names; texts of the pack and templates as hashes.
    """
    reward = plan.spec
    parts = {
        "terms": ", ".join(
            f"{term.weight:+g} {term.model}/{term.condition}" for term in reward.resolved_terms()
        ),
        "reduction": reward.reduction,
        "seed": str(reward.seed),
        "routing": _as_text(reward.routing.model_dump(mode="json", exclude={"model"})),
        "encoding": _as_text(reward.encoding.model_dump(mode="json", exclude={"template"})),
        "prompt_pack": plan.pack.key[:16] if plan.pack else "none",
    }
    if reward.is_judge:
        parts["judge"] = JUDGE_KEY[:16]
    if plan.route is not None:
        pack, domains = plan.route.pack, plan.route.domains
        texts = [
            pack.router.model_dump(mode="json", exclude={"domains"}),
            [[d, pack.domains[d].router_label, pack.domains[d].description] for d in domains],
        ]
        parts["prompt_pack.router"] = content_hash(texts)[:16]
    templates = {spec.model_key: spec.template for spec in plan.encoding.tokenizers}
    for role, model in plan.models.items():
        parts |= {f"models.{role}.{name}": text for name, text in _model_parts(model).items()}
        if model.model_key in templates:
            parts[f"models.{role}.template"] = content_hash(templates[model.model_key])[:16]
    return parts


def describe_weights(model: ResolvedModel) -> dict[str, str]:
    """Say which weights a model has: `OWNER/NAME@COMMIT`, or `sha256:...` of a folder.

    Returns:
        `weights`, and `adapter` where there is one.
    """
    spec, engine = model.spec, model.engine_spec
    found = {"weights": _pinned(spec.path, spec.revision, engine.checksum)}
    if spec.adapter is not None:
        found["adapter"] = _pinned(spec.adapter, spec.adapter_revision, engine.adapter_checksum)
    return found


def package_version() -> str:
    """Give the version of this package; `unknown` where it runs without being installed."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return "unknown"


def _pin(plan: RewardPlan) -> RewardSpec:
    """Give the config with everything said that was looked up: dtypes and checksums.

    Models that nothing uses are left out: nobody has checked them.
    """

    def pin(model: ResolvedModel) -> ModelSpec:
        spec, engine = model.spec, model.engine_spec
        if spec.engine in ("stub", "api"):
            return spec
        return spec.model_copy(
            update={
                "dtype": engine.dtype,
                "head_dtype": engine.head_dtype,
                "checksum": engine.checksum,
                "adapter_checksum": engine.adapter_checksum,
            }
        )

    models = {role: pin(model) for role, model in plan.models.items()}
    return plan.spec.model_copy(update={"models": models})


def _escape(value: Any) -> Any:
    """Keep OmegaConf from reading `${` in a path or text as the name of a variable."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    return [_escape(item) for item in value] if isinstance(value, list) else value


def _model_parts(model: ResolvedModel) -> dict[str, str]:
    spec, engine = model.spec, model.engine_spec
    parts = {**describe_weights(model), "engine": engine.engine}
    if spec.api is not None:
        parts |= {
            "api.base_url": spec.api.base_url,
            "api.max_tokens": str(spec.api.max_tokens),
        }
    else:
        parts |= {
            "dtype": engine.dtype,
            "head_dtype": engine.head_dtype,
            "max_length": str(spec.max_length),
            "tokenizer": model.tokenizer_hash()[:16],
        }
    if spec.quantization is not None:
        parts["quantization"] = spec.quantization
    if spec.output is not None:
        parts["output"] = spec.output
    if spec.custom_code:
        parts["custom_code"] = "allowed"
    if spec.extra:
        parts["extra"] = _as_text(spec.extra)
    return parts


def _pinned(path: str, revision: str | None, checksum: str | None) -> str:
    if revision is not None:
        return f"{path}@{revision}"
    return path if checksum is None else f"sha256:{checksum}"


def _explain(name: str) -> str:
    if name == "prompt_pack":
        return "prompt_pack (its layout, instructions or exemplars were altered)"
    if name == "prompt_pack.router":
        return "prompt_pack (the router's texts were altered)"
    if name == "judge":
        return "judge (this package asks a judge in other words)"
    return name


def _as_text(value: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {item}" for name, item in sorted(value.items()))
