"""What answering a benchmark is asked to do: which policy, which questions, who judges.

    conf/downstream/*.yaml      one policy on one benchmark

Checked as a whole before Spark starts, as all configs are (`cdr.config`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cdr.answer_files import Benchmark
from cdr.config import DatasetName, RunSpec, TablePlaces, TrackingSpec, WarehousePlace
from cdr.config_files import MayBeFile, Spec, load_config
from cdr.evaluation_config import StatisticsSpec
from cdr.reward_config import ModelSpec, RewardSpec
from cdr.sampling import GenerateConfig, GenerateRunSpec, PromptsSpec, SamplingSpec


class AnswerSamplingSpec(Spec):
    """How answers are drawn, one per question. A change needs another `dataset`."""

    temperature: float = Field(ge=0, description="0 takes the likeliest token.")
    temperature_by_category: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="Other temperatures by the question's `category`, as MT-Bench has them.",
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus mass kept.")
    max_new_tokens: int = Field(ge=1, description="Tokens at most, end of turn included.")
    seed: int = Field(0, description="Base seed.")


class JudgeSpec(Spec):
    """The benchmark's own tool, which asks the judge; in an environment of its own."""

    python: str = Field(description="Python of the environment in which the tool is installed.")
    folder: str | None = Field(
        None,
        description="Arena-Hard: checkout of arena-hard-auto. MT-Bench: `fastchat/llm_judge` in a "
        "checkout of FastChat. They hold questions, reference answers and judge prompts. None for "
        "AlpacaEval.",
    )
    settings: str | None = Field(
        None, description="Arena-Hard: its settings file, a path from `folder`. None for others."
    )
    model: str | None = Field(
        None, description="Name of the judge at the endpoint. None: the tool's default."
    )
    references: str | None = Field(
        None,
        description="AlpacaEval: file of the reference's outputs. None: the tool's default, which "
        "it fetches from its hub.",
    )
    length_controlled: bool = Field(
        True,
        description="AlpacaEval: its length-controlled win rate, for which the tool fetches a file "
        "from its hub, and which is for the 805 questions only. False: the plain one alone.",
    )
    base_url: str | None = Field(
        None, description="An OpenAI-compatible endpoint, up to `/v1`. None: OpenAI's."
    )
    api_key_variable: str = Field(
        "OPENAI_API_KEY", description="Environment variable that holds the endpoint's key."
    )
    parallel: int = Field(4, ge=1, description="Questions to the endpoint at a time.")


class DownstreamTrackingSpec(TrackingSpec):
    """Where MLflow keeps the run."""

    experiment: str = Field("cdr-downstream", description="MLflow experiment.")


class DownstreamConfig(Spec):
    """One policy on one benchmark: its answers, and who judges or compares them."""

    dataset: DatasetName = Field(
        description="Name of the policy's answers, in `completions` and in the tools' files, where "
        "it stands for the policy.",
    )
    benchmark: Benchmark = Field(description="Whose questions, and whose form of files.")
    questions: str = Field(description="The benchmark's own question file, on this machine.")
    answers: str = Field(description="Folder for the answer files, on this machine.")
    warehouse: WarehousePlace
    tables: TablePlaces
    policy: ModelSpec
    training_run: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{32}$",
        description="MLflow run that trained the policy, quoted; the two runs are then linked. "
        "None: no link.",
    )
    template: str = Field(
        "own", description="Chat template: `own`, `plain` (for base models), or a Jinja file."
    )
    special_tokens_in_text: Literal["reject", "as_text"] = Field(
        "as_text", description="Questions that hold a special token's string: refuse, or encode."
    )
    sampling: AnswerSamplingSpec
    run: GenerateRunSpec = GenerateRunSpec()
    judge: JudgeSpec | None = Field(None, description="For `--judge`. None: there is none.")
    reward: Annotated[RewardSpec | None, MayBeFile()] = Field(
        None, description="For `--compare-with`: the reward that the policy was tuned by."
    )
    held_out_reward: Annotated[RewardSpec | None, MayBeFile()] = Field(
        None, description="For `--compare-with`: one that had no part in the tuning."
    )
    scoring: RunSpec = Field(RunSpec(), description="How the rewards are computed.")
    statistics: StatisticsSpec = StatisticsSpec()
    tracking: DownstreamTrackingSpec = DownstreamTrackingSpec()

    @model_validator(mode="after")
    def _judge_fits(self) -> Self:
        judge = self.judge
        if judge is None:
            return self
        problems = []
        if (judge.folder is None) != (self.benchmark == "alpaca_eval"):
            problems.append(
                "judge.folder: not for alpaca_eval"
                if judge.folder
                else f"judge.folder: is required for {self.benchmark}"
            )
        if (judge.settings is None) == (self.benchmark == "arena_hard"):
            problems.append(
                f"judge.settings: not for {self.benchmark}"
                if judge.settings
                else "judge.settings: is required for arena_hard"
            )
        if judge.references is not None and self.benchmark != "alpaca_eval":
            problems.append(f"judge.references: not for {self.benchmark}, `folder` has them")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_validator(mode="after")
    def _rewards_differ(self) -> Self:
        ours, other = self.reward, self.held_out_reward
        if ours is not None and other is not None and ours.name == other.name:
            raise ValueError(f"held_out_reward: has the name of the other, '{ours.name}'")
        return self

    def rewards(self) -> dict[str, RewardSpec]:
        """Give the rewards to compare by, by what they are here: `reward`, `held_out_reward`."""
        given = {"reward": self.reward, "held_out_reward": self.held_out_reward}
        return {name: reward for name, reward in given.items() if reward is not None}

    def temperature_of(self, category: str | None) -> float:
        """Give the temperature at which questions of a category are answered."""
        sampling = self.sampling
        return sampling.temperature_by_category.get(category or "", sampling.temperature)

    def sampling_config(self, dataset: str, prompts: str, temperature: float) -> GenerateConfig:
        """Give the sampling run that draws answers at one temperature.

        Args:
            dataset: name of its samples.
            prompts: Parquet folder of prompt_id and prompt.
            temperature: theirs.
        """
        return GenerateConfig(
            dataset=dataset,
            warehouse=self.warehouse,
            tables=self.tables,
            input=PromptsSpec.model_validate(
                {"path": prompts, "format": "parquet", "columns": {"prompt_id": "prompt_id"}}
            ),
            policy=self.policy,
            template=self.template,
            special_tokens_in_text=self.special_tokens_in_text,
            sampling=SamplingSpec(
                num_samples=1,
                temperature=temperature,
                top_p=self.sampling.top_p,
                max_new_tokens=self.sampling.max_new_tokens,
                seed=self.sampling.seed,
            ),
            run=self.run,
        )


def load_downstream_config(path: str | Path, overrides: Sequence[str] = ()) -> DownstreamConfig:
    """Read a downstream YAML; see `cdr.config_files.load_config`."""
    return load_config(DownstreamConfig, path, overrides)
