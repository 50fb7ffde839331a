"""How a page speaks of a reward: its formula, its unit, its terms' names, its models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cdr.redaction import redact
from cdr.reward_config import ModelSpec, RewardSpec


def term_weights(reward: RewardSpec) -> dict[str, float]:
    """Give the weight of each term by its name `model/condition`, in the reward's order.

    None of a judge: its terms are questions, as many as there are other candidates.
    """
    if reward.is_judge:
        return {}
    return {f"{term.model}/{term.condition}": term.weight for term in reward.resolved_terms()}


def reward_unit(reward: RewardSpec) -> str:
    """Name the unit of rewards and margins."""
    if reward.is_asked_by_api:
        return "of −1 to 1"
    return "nats per token" if reward.reduction == "mean" else "nats"


@dataclass(frozen=True)
class RewardText:
    """What a page says of a reward where it shows pairs.

    Args:
        unit: of rewards and margins.
        names: each term's, by `model/condition`: its model alone where that tells them apart.
        formula: in these names.
    """

    unit: str
    names: dict[str, str]
    formula: str

    @classmethod
    def of(cls, reward: RewardSpec) -> RewardText:
        """Describe a reward."""
        models = [name.partition("/")[0] for name in term_weights(reward)]
        unique = len(set(models)) == len(models)
        names = {
            name: model if unique else name
            for name, model in zip(term_weights(reward), models, strict=True)
        }
        return cls(reward_unit(reward), names, _formula(reward, names))


def reward_facts(reward: RewardSpec) -> Iterator[tuple[str, str]]:
    """Say what a reward is made of: models with revisions, formula, prompts, router, template.

    Yields:
        (label, text), the labels unique.
    """
    used = [(term.model, term.model) for term in reward.resolved_terms()]
    if reward.routing.mode == "adaptive":
        used.append((reward.routing.model, "router's model"))
    for role, label in dict(used).items():
        yield label, str(redact(_model(reward.models[role])))
    over = {"mean": ", mean per token", "sum": ", sum"}[reward.reduction]
    formula = _formula(reward, {name: name for name in term_weights(reward)})
    yield "reward", f"{formula}{over if reward.is_per_token else ''}"
    yield "domain prompts", str(redact(reward.prompt_pack or "none"))
    routing = reward.routing
    details = {
        "adaptive": f", threshold {routing.threshold:g}, else {routing.fallback}",
        "fixed": f", {routing.domain}",
    }
    yield "router", f"{routing.mode}{details.get(routing.mode, '')}"
    yield "chat template", str(redact(reward.encoding.template))


def _formula(reward: RewardSpec, names: dict[str, str]) -> str:
    if reward.is_asked_by_api:
        return "share of verdicts won less share lost, against the others, both orders"
    if reward.is_judge:
        return "log-odds that judge names it the better answer, mean over the others, both orders"

    def quantity(name: str) -> str:
        is_classifier = reward.models[name.partition("/")[0]].engine == "classifier"
        return f"{'score of' if is_classifier else 'log p'} {names[name]}"

    parts = [
        f"{'−' if weight < 0 else '+'} {'' if abs(weight) == 1 else f'{abs(weight):g} '}"
        f"{quantity(name)}"
        for name, weight in term_weights(reward).items()
    ]
    return " ".join(parts).removeprefix("+ ")


def _model(model: ModelSpec) -> str:
    text = model.path if model.revision is None else f"{model.path} at {model.revision}"
    if model.adapter is not None:
        revision = f" at {model.adapter_revision}" if model.adapter_revision else ""
        text += f", adapter {model.adapter}{revision}"
    return f"{text} ({model.engine}, {model.dtype})"
