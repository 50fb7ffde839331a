"""From a config to everything the stages need: models found, texts read, keys computed.

Runs on the driver before Spark does any work, so that what is wrong with models, templates,
vocabularies or the prompt pack is known within seconds. Loads no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from cdr.api_judge import read_key
from cdr.chat import PLAIN_TEMPLATE, ChatEncoder, check_vocabulary, load_tokenizer, own_template
from cdr.config import AnnotateConfig, content_hash, trial_name
from cdr.encoding import EncodingPlan, TokenizerSpec
from cdr.engines.adapters import share_weights
from cdr.engines.base import EngineSpec
from cdr.errors import ConfigError, SetupError
from cdr.models import ResolvedModel, resolve_models
from cdr.prompt_pack import PromptPack, load_prompt_pack
from cdr.reward import reward_key, term_name
from cdr.reward_config import Condition, RewardSpec
from cdr.router import router_key
from cdr.text_files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_Load = Callable[[str, str | None], "PreTrainedTokenizerFast"]


@dataclass(frozen=True)
class RoutePlan:
    """What the workers need to route prompts.

    Args:
        pack: the classification task's texts.
        domains: what may be chosen, in the order listed to the model.
        engine: the router model.
        tokenizer: its tokenizer.
        threshold: least confidence to follow the router.
        fallback: the domain otherwise.
        calibrate: subtract the labels' priors.
        key: hash of all that decides a route besides the prompt.
    """

    pack: PromptPack
    domains: tuple[str, ...]
    engine: EngineSpec
    tokenizer: TokenizerSpec
    threshold: float
    fallback: str
    calibrate: bool
    key: str


@dataclass(frozen=True)
class RewardPlan:
    """A checked reward: what decides its numbers, found and keyed.

    Args:
        spec: the resolved config.
        models: models by role.
        pack: the prompt pack; None where prompts are left as they are.
        encoding: what decides the token ids.
        engines: the scoring models, each once, in the order of the terms.
        route: the router; None unless the mode is `adaptive`.
        key: hash of all that decides the reward's numbers; `reward_key` in tables.
    """

    spec: RewardSpec
    models: Mapping[str, ResolvedModel]
    pack: PromptPack | None
    encoding: EncodingPlan
    engines: tuple[EngineSpec, ...]
    route: RoutePlan | None
    key: str

    @property
    def given_domains(self) -> tuple[str, ...] | None:
        """Domains that may be given with a prompt; None where they are not used."""
        if self.pack is None or self.spec.routing.mode != "column":
            return None
        return tuple(self.pack.domains)

    def term_views(self) -> dict[str, tuple[str, Condition]]:
        """Give each term's (model key, condition) by its name `model/condition`."""
        return {
            term_name(term): (self.models[term.model].model_key, term.condition)
            for term in self.spec.resolved_terms()
        }


@dataclass(frozen=True)
class AnnotationPlan:
    """A checked annotate run.

    Args:
        config: the resolved config.
        dataset: name in all tables; a limited run has a name of its own.
        limit: prompts at most; None for all.
        reward: the plan of the config's reward.
        reward_version: `NAME/3` where the reward is a version of MLflow's registry; else None.
    """

    config: AnnotateConfig
    dataset: str
    limit: int | None
    reward: RewardPlan
    reward_version: str | None = None

    @property
    def selection_key(self) -> str:
        """Hash of the rule that chooses pairs."""
        return self.config.pairs.key()

    def engines(self) -> list[EngineSpec]:
        """Give all engines of a run, the router's first."""
        route = self.reward.route
        return [*([route.engine] if route else []), *self.reward.engines]


def plan_annotation(
    config: AnnotateConfig, *, limit: int | None = None, reward: RewardPlan | None = None
) -> AnnotationPlan:
    """Resolve and check all that a config names.

    Args:
        config: the config.
        limit: prompts at most; the results then go to the dataset `NAME.limit-N`, so that a
            trial never replaces the rows of the whole.
        reward: the plan of the config's reward, where it has been made; None to make it.

    Raises:
        ConfigError: a model, template, pack or domain is missing or does not fit.
    """
    return AnnotationPlan(
        config=config,
        dataset=trial_name(config.dataset, limit),
        limit=limit,
        reward=reward or plan_reward(config.reward),
    )


def plan_reward(reward: RewardSpec) -> RewardPlan:
    """Resolve and check all that a reward names.

    Args:
        reward: the config.

    Raises:
        ConfigError: as for `plan_annotation`.
    """
    models = resolve_models(reward)
    pack = load_prompt_pack(reward.prompt_pack) if reward.prompt_pack else None
    if reward.routing.mode == "none":
        pack = None
    _check_domains(reward, pack)
    load = cache(load_tokenizer)  # models of a reward often share a tokenizer
    templates = {
        # What is asked in text has no template of ours.
        term.model: ""
        if models[term.model].spec.engine == "api"
        else _template(reward, models, models[term.model], load)
        for term in reward.resolved_terms()
    }
    scoring = {models[term.model].model_key: models[term.model] for term in reward.resolved_terms()}
    readers = [model for model in scoring.values() if model.spec.engine != "api"]
    tokenizers = tuple(_tokenizer(model, templates[model.role]) for model in readers)
    for spec, model in zip(tokenizers, readers, strict=True):
        _check_vocabulary(spec, model, load)
    views = dict.fromkeys(
        (models[term.model].model_key, term.condition) for term in reward.resolved_terms()
    )
    encoding = EncodingPlan(
        tokenizers=tokenizers,
        views=tuple(views),
        pack=pack,
        seed=reward.seed,
        special_tokens_in_text=reward.encoding.special_tokens_in_text,
        score_end_of_turn=reward.encoding.score_end_of_turn,
        drop_exemplar_when_too_long=reward.encoding.drop_exemplar_when_too_long,
    )
    engines = share_weights([model.engine_spec for model in scoring.values()])
    route = _route_plan(reward, models, pack, engines, load)
    template_hashes = {
        role: content_hash([template, models[role].tokenizer_hash()])
        for role, template in templates.items()
    }
    return RewardPlan(
        spec=reward,
        models=models,
        pack=pack,
        encoding=encoding,
        engines=engines,
        route=route,
        key=reward_key(
            reward,
            {role: model.model_key for role, model in models.items()},
            pack.key if pack else None,
            route.key if route else None,
            template_hashes,
        ),
    )


def check_keys(rewards: Mapping[str, RewardSpec]) -> None:
    """See that the keys of judges behind an API are in the environment, before any hour is spent.

    Args:
        rewards: by what a message calls them.

    Raises:
        SetupError: names every reward whose key is not set.
    """
    missing: dict[str, list[str]] = {}
    for name, reward in rewards.items():
        if (api := reward.judge_api) is not None:
            try:
                read_key(api)
            except SetupError:
                missing.setdefault(api.api_key_variable, []).append(name)
    if missing:
        listed = "; ".join(f"{key} for {', '.join(names)}" for key, names in missing.items())
        raise SetupError(
            f"keys of judges behind an API are not in the environment: {listed}",
            where="models.judge.api.api_key_variable",
            fix="export them (any text where an endpoint takes no key), for executors set "
            "spark.executorEnv.NAME; or leave these rows out with --rows",
        )


def _check_domains(reward: RewardSpec, pack: PromptPack | None) -> None:
    if pack is None:
        return
    named = [
        ("routing.domain", reward.routing.domain),
        ("routing.fallback", reward.routing.fallback),
    ]
    named += [("routing.domains", domain) for domain in reward.routing.domains or ()]
    problems = [
        f"{key}: must be a domain of the prompt pack ({', '.join(pack.domains)}), got {domain!r}"
        for key, domain in named
        if domain is not None and domain not in pack.domains
    ]
    if problems:
        raise ConfigError(problems, where=f"reward '{reward.name}'")


def _template(
    reward: RewardSpec, models: Mapping[str, ResolvedModel], model: ResolvedModel, load: _Load
) -> str:
    """Give the text of the template that a scoring model's prompts are rendered with."""
    choice = reward.encoding.template
    if choice == "plain":
        return PLAIN_TEMPLATE
    if choice in ("strong", "own"):
        source = models["strong"] if choice == "strong" else model
        text = own_template(load(source.spec.path, source.spec.revision))
        if text is None:
            raise ConfigError(
                [
                    f"encoding.template: '{choice}' needs the chat template of model "
                    f"'{source.role}', which has none"
                ],
                where=f"reward '{reward.name}'",
                fix="set encoding.template to 'plain', or to a Jinja file",
            )
        return text
    try:
        return read_text(choice)
    except OSError as error:
        raise ConfigError(
            [
                "encoding.template: expected 'strong', 'own', 'plain' or a Jinja file, "
                f"got '{choice}' ({error.strerror or error})"
            ],
            where=f"reward '{reward.name}'",
        ) from None


def _tokenizer(model: ResolvedModel, template: str) -> TokenizerSpec:
    return TokenizerSpec(
        model_key=model.model_key,
        path=model.spec.path,
        revision=model.spec.revision,
        template=template,
        max_length=model.spec.max_length,
        vocab_size=model.vocab_size,
        close_turns=model.spec.engine == "classifier",
    )


def _check_vocabulary(spec: TokenizerSpec, model: ResolvedModel, load: _Load) -> None:
    encoder = ChatEncoder(load(spec.path, spec.revision), spec.template)
    check_vocabulary(encoder, spec.vocab_size, who=f"models.{model.role}")


def _route_plan(
    reward: RewardSpec,
    models: Mapping[str, ResolvedModel],
    pack: PromptPack | None,
    scoring: Sequence[EngineSpec],
    load: _Load,
) -> RoutePlan | None:
    routing = reward.routing
    if routing.mode != "adaptive":
        return None
    assert pack is not None
    model = models[routing.model]
    own = own_template(load(model.spec.path, model.spec.revision))
    tokenizer = _tokenizer(model, PLAIN_TEMPLATE if own is None else own)
    _check_vocabulary(tokenizer, model, load)
    domains = routing.domains or pack.router_domains
    key = router_key(
        pack,
        model.model_key,
        domains,
        # A prompt too long for the router falls back, so the limit decides too.
        encoding_key=content_hash(
            [tokenizer.template, model.tokenizer_hash(), tokenizer.max_length]
        ),
        threshold=routing.threshold,
        fallback=routing.fallback,
        calibrate=routing.calibrate,
    )
    (alone,) = share_weights([model.engine_spec])
    return RoutePlan(
        pack=pack,
        domains=tuple(domains),
        # A router that is also a scoring model stays loaded from one stage to the next.
        engine=next((spec for spec in scoring if spec.name == alone.name), alone),
        tokenizer=tokenizer,
        threshold=routing.threshold,
        fallback=routing.fallback,
        calibrate=routing.calibrate,
        key=key,
    )
