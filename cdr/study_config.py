"""What a strong-over-weak study is asked: models with alignment scores, and labelled pairs.

    conf/study/*.yaml      one family of models on one benchmark

Every model is asked for log p(y | x) once, all under one template; a cell of the study is an
ordered pair of models, numerator over denominator, and its gap is the difference of their scores.

Source: arXiv 2411.02481, section 4.1 and appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from cdr.config import DatasetName, RunSpec, TablePlaces, WarehousePlace
from cdr.config_files import Spec, load_config
from cdr.evaluation_config import (
    EvaluateConfig,
    EvaluateTrackingSpec,
    PairsInputSpec,
    QuickSpec,
    StatisticsSpec,
    repeated_sections,
)
from cdr.reward_config import EncodingSpec, EngineName, ModelSpec, give_engine
from cdr.rewardbench import PRIOR_SETS, SECTIONS

ModelName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._\-]*$")]

_OURS = {"title", "score"}


class StudyModelSpec(ModelSpec):
    """A model of the study: how aligned it is, and how to run it."""

    title: str = Field("", description="How tables and figures name it; empty: its key.")
    score: float = Field(description="Its alignment score, in the unit that `score_name` says.")


class StudyEncodingSpec(EncodingSpec):
    """How messages become token ids; all models read the same text."""

    template: str = Field(
        "plain",
        description="Chat template of all models: `plain`, a Jinja file, or `own` where the models "
        "bring the same one.",
    )


class StudyTrackingSpec(EvaluateTrackingSpec):
    """Where MLflow keeps the run."""

    experiment: str = Field("cdr-pair-study", description="MLflow experiment.")


class StudyConfig(Spec):
    """One study: which models, which ordered pairs of them, which labelled pairs, where to."""

    study: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._\-]*$", description="Name of the study in all tables."
    )
    dataset: DatasetName = Field(description="Name of the benchmark in all tables.")
    warehouse: WarehousePlace
    tables: TablePlaces
    input: PairsInputSpec
    engine: EngineName = Field(
        "transformers", description="Engine of every model that names none itself."
    )
    score_name: str = Field(
        min_length=1, description="What the alignment scores are, for example `Arena-Hard`."
    )
    models: dict[ModelName, StudyModelSpec] = Field(
        description="Models by name, in the order of tables and figures."
    )
    cells: dict[str, tuple[str, ...]] | None = Field(
        None, description="Denominators by numerator. None: every model over every one."
    )
    reduction: Literal["sum", "mean"] = Field(
        "sum", description="Sum of token log-probs, or mean per token of that model's own count."
    )
    encoding: StudyEncodingSpec = StudyEncodingSpec()
    sections: tuple[str, ...] = Field(
        (*SECTIONS, PRIOR_SETS),
        description="Sections there may be; pairs of others are refused. The overall accuracy is "
        "the mean of these (Prior Sets aside), or over all pairs where one has none.",
    )
    statistics: StatisticsSpec = StatisticsSpec()
    quick: QuickSpec = QuickSpec()
    run: RunSpec = RunSpec()
    tracking: StudyTrackingSpec = StudyTrackingSpec()

    @model_validator(mode="before")
    @classmethod
    def _models_inherit_engine(cls, tree: Any) -> Any:
        return give_engine(tree)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if len(self.models) < 2:
            problems.append(f"models: a pair needs two, got {len(self.models)}")
        if self.encoding.template == "strong":
            problems.append(
                "encoding.template: a study has no strong model; expected 'plain', 'own' or a "
                "Jinja file"
            )
        problems += [
            f"models.{name}.engine: '{model.engine}' gives no log-probs, which a study compares"
            for name, model in self.models.items()
            if model.engine in ("api", "classifier")
        ]
        if self.cells is not None and not self.cells:
            problems.append("cells: names no pair of models; null takes every model over every one")
        for numerator, denominators in (self.cells or {}).items():
            if not denominators:
                problems.append(f"cells.{numerator}: names no denominator; leave it out")
            problems += [
                f"cells.{numerator}: no model '{name}'; known: {', '.join(self.models)}"
                for name in dict.fromkeys((numerator, *denominators))
                if name not in self.models
            ]
            if numerator in denominators:
                problems.append(f"cells.{numerator}: over itself every reward is 0; leave it out")
        problems += repeated_sections(self.sections)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def title_of(self, name: str) -> str:
        """Name a model as tables and figures do."""
        return self.models[name].title or name

    def cell_names(self) -> list[tuple[str, str]]:
        """Give (numerator, denominator) of every cell; a model over itself is one of all cells."""
        if self.cells is None:
            return [(one, other) for one in self.models for other in self.models]
        return [(one, other) for one, others in self.cells.items() for other in others]

    def gap(self, numerator: str, denominator: str) -> float:
        """Give score of numerator − score of denominator."""
        return self.models[numerator].score - self.models[denominator].score

    def as_evaluation(self) -> EvaluateConfig:
        """Give the evaluation that asks the same: a term per model, prompts as they are.

        Its reward is never computed; the study takes the terms apart.
        """
        names = {name for names in self.cell_names() for name in names}
        models = {
            name: spec.model_dump(exclude=_OURS)
            for name, spec in self.models.items()
            if name in names
        }
        reward = {
            "name": self.study,
            "models": models,
            "form": "custom",
            "terms": [{"model": name, "condition": "plain", "weight": 1.0} for name in models],
            "reduction": self.reduction,
            "routing": {"mode": "none"},
            "encoding": self.encoding.model_dump(),
        }
        shared = ("dataset", "warehouse", "tables", "sections", "statistics", "quick", "run")
        return EvaluateConfig.model_validate(
            {
                **{name: getattr(self, name) for name in shared},
                "input": self.input,
                "reward": reward,
                "tracking": self.tracking.model_dump(),
            }
        )


def load_study_config(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study YAML; see `cdr.config_files.load_config`."""
    return load_config(StudyConfig, path, overrides)
