"""From an evaluate config to one plan per row: a reward on labelled pairs, as annotating sees it.

A pair is a prompt with two candidates, `a` the chosen answer and `b` the rejected one, so a row's
plan holds the plan of an annotate run over them, and goes through the same stages and store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from cdr.config import AnnotateConfig, ColumnsSpec, InputSpec, content_hash, trial_name
from cdr.errors import ConfigError
from cdr.evaluation_config import EvaluateConfig, RowSpec
from cdr.plan import AnnotationPlan, plan_annotation

CHOSEN, REJECTED = "a", "b"
"""`completion_id` of a pair's two candidates."""

ORACLE = ".oracle"
"""What is put behind the name of a reward whose router is replaced by the true domains."""


@dataclass(frozen=True)
class Sample:
    """Which pairs of the benchmark are taken.

    Args:
        pairs: how many at most.
        kind: `limit`: those whose hashes come first; `quick`: equal shares of the sections.
        seed: of the hashes.
    """

    pairs: int
    kind: Literal["limit", "quick"]
    seed: int = 0


@dataclass(frozen=True)
class EvaluationPlan:
    """A checked evaluation of one reward.

    Args:
        config: the resolved config, the other rows included.
        name: the row's.
        annotation: the same as an annotate run over the pairs; has dataset and reward key.
        oracle: the right domain by section.
        sample: which pairs; None for all.
    """

    config: EvaluateConfig
    name: str
    annotation: AnnotationPlan
    oracle: Mapping[str, str]
    sample: Sample | None

    @property
    def title(self) -> str:
        """How a table names the row."""
        row = self.config.rows.get(self.name)
        return (row.title if row else "") or self.name

    @property
    def printed(self) -> Mapping[str, float]:
        """Published scores in percent by section and `Overall`; empty without any."""
        row = self.config.rows.get(self.name)
        return row.printed if row else {}

    def own_config(self) -> EvaluateConfig:
        """Give the config of this row alone: its reward is the row's, nothing is left to change."""
        row = self.config.rows.get(self.name)
        return self.config.model_copy(
            update={
                "rows": {self.name: RowSpec(title=row.title, printed=row.printed)} if row else {},
                "reward": self.annotation.config.reward,
                "oracle": dict(self.oracle),
            }
        )

    def recorded(self) -> dict[str, object]:
        """Give the config of this row alone, JSON-able, for `runs` and MLflow."""
        sample = None if self.sample is None else vars(self.sample)
        return {**self.own_config().model_dump(mode="json"), "sample": sample}


def make_sample(config: EvaluateConfig, *, limit: int | None, quick: bool) -> Sample | None:
    """Give the sample that a command line asks for.

    Raises:
        ConfigError: both are asked for.
    """
    if quick and limit is not None:
        raise ConfigError(
            ["--limit: not with --quick"], fix=f"--quick --set quick.pairs={limit} takes that many"
        )
    if quick:
        return Sample(config.quick.pairs, "quick", config.quick.seed)
    return None if limit is None else Sample(limit, "limit")


def dataset_name(config: EvaluateConfig, sample: Sample | None) -> str:
    """Name the benchmark in the tables; see `trial_name`."""
    return (
        config.dataset if sample is None else trial_name(config.dataset, sample.pairs, sample.kind)
    )


def sample_options(config: EvaluateConfig, dataset: str) -> str:
    """Give the options that take the sample of a `dataset_name` again; nothing for the whole."""
    if dataset == config.dataset:
        return ""
    kind, _, pairs = dataset.removeprefix(f"{config.dataset}.").partition("-")
    return f" --limit {pairs}" if kind == "limit" else f" --quick --set quick.pairs={pairs}"


def plan_evaluation(
    config: EvaluateConfig,
    *,
    sample: Sample | None = None,
    with_oracle: bool = False,
    reward_version: str | None = None,
) -> list[EvaluationPlan]:
    """Resolve and check all that a config names, row by row; loads no weights.

    Args:
        config: the config.
        sample: which pairs; None for all.
        with_oracle: behind each row with a router, add it with the true domains in its place, if
            no row is that already.
        reward_version: `NAME/3` where the config's reward is a registered one. Rows that change it
            are no version.

    Raises:
        ConfigError: a model, template, pack or domain is missing or does not fit.
    """
    configs = {name: _annotate_config(config, name, sample) for name in config.row_names()}
    plans = [_plan(config, name, annotate, sample) for name, annotate in configs.items()]
    plans = [
        replace(plan, annotation=replace(plan.annotation, reward_version=reward_version))
        if config.rows.get(plan.name, RowSpec()).is_whole
        else plan
        for plan in plans
    ]
    if not with_oracle:
        return plans
    known = {plan.annotation.reward.key for plan in plans}
    found = []
    for plan in plans:
        found.append(plan)
        if plan.annotation.reward.route is None:
            continue
        oracle = _plan_oracle(plan, configs[plan.name])
        if oracle.annotation.reward.key not in known:
            found.append(oracle)
    return found


def _plan_oracle(router: EvaluationPlan, annotate: AnnotateConfig) -> EvaluationPlan:
    reward = annotate.reward
    routing = reward.routing.model_copy(update={"mode": "column"})
    change = {"routing": routing, "name": f"{reward.name}{ORACLE}"}
    oracle = annotate.model_copy(update={"reward": reward.model_copy(update=change)})
    return _plan(router.config, f"{router.name}{ORACLE}", oracle, router.sample)


def _plan(
    config: EvaluateConfig, name: str, annotate: AnnotateConfig, sample: Sample | None
) -> EvaluationPlan:
    plan = plan_annotation(annotate)
    row = config.rows.get(name)
    oracle = config.oracle if row is None or row.oracle is None else row.oracle
    if annotate.reward.routing.mode == "column" and config.input.columns.domain is None:
        # The domains come from the sections here: two rows may differ in nothing else.
        domains = {section: oracle.get(section) for section in config.sections_in_use()}
        _check_domains(plan, domains, name)
        key = content_hash([plan.reward.key, domains])
        plan = replace(plan, reward=replace(plan.reward, key=key))
    return EvaluationPlan(config, name, plan, oracle, sample)


def _check_domains(plan: AnnotationPlan, domains: Mapping[str, str | None], name: str) -> None:
    known = plan.reward.given_domains or ()
    problems = [
        f"oracle.{section}: must be a domain of the prompt pack ({', '.join(known)}), "
        f"got {domain!r}"
        for section, domain in domains.items()
        if domain not in known
    ]
    if problems:
        raise ConfigError(problems, where=f"row '{name}'")


def _annotate_config(config: EvaluateConfig, name: str, sample: Sample | None) -> AnnotateConfig:
    source = config.input
    return AnnotateConfig(
        dataset=dataset_name(config, sample),
        warehouse=config.warehouse,
        tables=config.tables,
        # The columns are those of `cdr.labelled_pairs.load_pairs`.
        input=InputSpec(
            path=source.path,
            table=source.table,
            format=source.format,
            version=source.version,
            layout="ab",
            columns=ColumnsSpec(
                completion="chosen", completion_b="rejected", prompt_id="prompt_id", domain="domain"
            ),
        ),
        reward=config.reward_of(name),
        run=config.run,
        tracking=config.tracking,
    )
