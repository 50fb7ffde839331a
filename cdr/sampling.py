"""Best-of-N sampling: N completions per prompt from a policy model, for a reward to choose from.

    prompts -> validate -> what is missing -> sample in waves -> completions

A sample's seed is a hash of (base seed, prompt, sample number): it depends on no other row, so more
prompts or more samples per prompt leave what is there as it is. A wave is one atomic commit to
`completions`; the next run samples what the table lacks. Text is a function of the seed up to
rounding: in float32 other rows in the batch hardly ever change a token, in bfloat16 now and then.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from cdr.chat import ChatEncoder, check_vocabulary, load_chat_template
from cdr.config import EncodingSpec, ModelSpec, RewardSpec, RoutingSpec, TermSpec, content_hash
from cdr.config_files import load_config
from cdr.encoding import TokenizerSpec
from cdr.engines.base import EngineSpec
from cdr.errors import ConfigError, InputError, RejectReason
from cdr.inputs import prompt_hash
from cdr.models import ResolvedModel, resolve_models
from cdr.progress import TaskCounter
from cdr.stages import MapFunction
from cdr.staging import Staging
from cdr.tables import COMPLETIONS, MESSAGES, Warehouse

GENERATED_DDL = (
    "prompt_id string, completion_id string, completion string, finish_reason string, "
    "num_tokens int, seed bigint, reason string, detail string, error string"
)
"""What a sampling function yields: a row per sample, with `error` where there is none this time;
or one row with `reason` for a prompt that is refused for good."""


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PromptColumnsSpec(_Spec):
    """Names of the input's columns. None: the input has no such column."""

    prompt: str = Field("prompt", description="Text, or messages: an array of role and content.")
    prompt_id: str | None = Field(None, description="None: derived from the prompt's content.")
    domain: str | None = Field(None, description="Carried along, for routing.mode `column`.")


class PromptsSpec(_Spec):
    """Where prompts come from."""

    path: str | None = Field(None, description="File or folder; a Delta table's folder.")
    table: str | None = Field(None, description="Catalog name; instead of `path`.")
    format: Literal["delta", "parquet", "json"] = Field("delta", description="json: one per line.")
    columns: PromptColumnsSpec = PromptColumnsSpec()

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.table is None):
            raise ValueError("path: give exactly one of path and table")
        return self


class SamplingSpec(_Spec):
    """How completions are drawn. More `num_samples` add to a dataset; the rest makes another."""

    num_samples: int = Field(4, ge=1, description="Completions per prompt.")
    temperature: float = Field(0.8, ge=0, description="0 takes the likeliest token.")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus mass kept.")
    max_new_tokens: int = Field(512, ge=1, description="Tokens at most, end of turn included.")
    seed: int = Field(0, description="Base seed.")


class GenerateRunSpec(_Spec):
    """How the work is carried out."""

    wave_prompts: int = Field(5000, ge=1, description="Prompts per wave (one atomic commit).")
    request_tokens: int = Field(
        65_536, ge=256, description="Tokens, prompts and samples, per request to the engine."
    )
    max_hours: float | None = Field(
        None, gt=0, description="Stop in good order after the wave in flight at this age."
    )
    max_rejected_fraction: float = Field(
        0.05, ge=0, le=1, description="Exit code 3 above this share of rejected prompts."
    )
    max_failed_fraction: float = Field(
        0.01, ge=0, le=1, description="Exit code 3 above this share of failed samples."
    )
    devices: int | None = Field(
        None, ge=1, description="Devices to keep busy. None: what the cluster announces."
    )


class GenerateConfig(_Spec):
    """One sampling run: which prompts, which policy, how many completions, where to."""

    dataset: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._\-]*$", description="Name of the set of completions."
    )
    warehouse: str = Field(description="Folder (or URI) of the tables.")
    tables: dict[str, str] = Field(
        default_factory=dict, description="Other places per table: a path, or a catalog name."
    )
    input: PromptsSpec
    policy: ModelSpec
    template: str = Field(
        "own", description="Chat template: `own`, `plain` (for base models), or a Jinja file."
    )
    special_tokens_in_text: Literal["reject", "as_text"] = Field(
        "reject", description="Prompts that hold a special token's string: refuse, or encode."
    )
    sampling: SamplingSpec = SamplingSpec()
    run: GenerateRunSpec = GenerateRunSpec()


def load_generate_config(path: str | Path, overrides: Sequence[str] = ()) -> GenerateConfig:
    """Read a sampling YAML; see `cdr.config_files.load_config`."""
    return load_config(GenerateConfig, path, overrides)


@dataclass(frozen=True)
class SamplingPlan:
    """A checked sampling run; crosses to workers.

    Args:
        config: the resolved config.
        limit: prompts at most; None for all.
        engine: the policy.
        tokenizer: its tokenizer.
        sampling_key: hash of all that decides a sample besides prompt and sample number.
    """

    config: GenerateConfig
    limit: int | None
    engine: EngineSpec
    tokenizer: TokenizerSpec
    sampling_key: str

    def load_encoder(self) -> ChatEncoder:
        """Load the policy's encoder."""
        return ChatEncoder.load(
            self.tokenizer.path,
            self.tokenizer.revision,
            template=self.tokenizer.template,
            special_tokens_in_text=self.config.special_tokens_in_text,
            score_end_of_turn=False,
        )


def plan_sampling(config: GenerateConfig, *, limit: int | None = None) -> SamplingPlan:
    """Resolve and check all that a config names; loads no weights.

    Args:
        config: the config.
        limit: prompts at most, None for all. A prompt's samples are the same in either case.

    Raises:
        ConfigError: policy or template is missing, or they do not fit.
    """
    model = _resolve_policy(config.policy)
    tokenizer = TokenizerSpec(
        model_key=model.model_key,
        path=model.spec.path,
        revision=model.spec.revision,
        template=_template(config),
        max_length=model.spec.max_length,
        vocab_size=model.vocab_size,
    )
    decisive = config.sampling.model_dump(mode="json", exclude={"num_samples"})
    text = [tokenizer.template, model.tokenizer_hash(), config.special_tokens_in_text]
    key = content_hash([model.model_key, text, decisive])
    plan = SamplingPlan(config, limit, model.engine_spec, tokenizer, key)
    check_vocabulary(plan.load_encoder(), tokenizer.vocab_size, who="policy")
    return plan


def sample_seed(base_seed: int, prompt_hash: str, number: int) -> int:
    """Give the seed of a prompt's `number`-th sample: 63 bits, whatever else is sampled."""
    digest = hashlib.sha256(f"{base_seed}:{prompt_hash}:{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # Spark's bigint is signed


def read_prompts(spark: SparkSession, source: PromptsSpec) -> DataFrame:
    """Read prompts, one row each, with a reason on those that cannot be used.

    What a chat template refuses (roles, order, special tokens) shows when they are encoded.

    Returns:
        prompt_id, prompt_hash, prompt (messages), domain, row (JSON), reason and detail (null for
        usable prompts).

    Raises:
        InputError: the input is missing, unreadable, empty, or lacks a column.
    """
    rows = _read(spark, source)
    columns = source.columns
    needed = [name for name in columns.model_dump().values() if name is not None]
    if missing := [name for name in needed if name not in rows.columns]:
        raise InputError(
            f"the input lacks the columns {missing}; it has {rows.columns}",
            where=source.path or source.table,
            fix="map your names, for example --set input.columns.prompt=question",
        )
    if rows.isEmpty():
        raise InputError("the input has no rows", where=source.path or source.table)
    prompt = F.col(f"`{columns.prompt}`")
    if isinstance(rows.schema[columns.prompt].dataType, T.StringType):
        user = F.struct(F.lit("user").alias("role"), prompt.alias("content"))
        prompt = F.when(prompt.isNotNull(), F.array(user))
    else:
        prompt = F.transform(prompt, lambda m: F.struct(m["role"], m["content"]))
    messages = prompt.cast(MESSAGES)
    named = rows.select(
        _optional(columns.prompt_id).alias("given_id"),
        messages.alias("prompt"),
        F.when(messages.isNotNull(), prompt_hash(messages)).alias("prompt_hash"),
        _optional(columns.domain).alias("domain"),
        F.to_json(F.struct("*")).alias("row"),
    ).withColumn("prompt_id", F.coalesce("given_id", "prompt_hash"))
    # A prompt that stands twice is sampled once; an id with two prompts names neither.
    once = named.groupBy("prompt_id", "prompt_hash").agg(
        *(F.min_by(name, "row").alias(name) for name in ("prompt", "domain", "row"))
    )
    twice = once.groupBy("prompt_id").agg(F.count("*").alias("prompts"))
    last = F.element_at("prompt", -1)["content"]
    rules = (
        (F.col("prompt").isNull(), RejectReason.NULL_PROMPT, "the prompt is null"),
        (F.size("prompt") == 0, RejectReason.EMPTY_PROMPT, "the prompt has no messages"),
        (F.length(F.trim(last)) == 0, RejectReason.EMPTY_PROMPT, "the last message is empty"),
        (
            F.col("prompts") > 1,
            RejectReason.DUPLICATE_ID,
            "this prompt_id stands for more than one prompt",
        ),
    )
    return once.join(twice, on="prompt_id", how="left").select(
        "prompt_id", "prompt_hash", "prompt", "domain", "row",
        F.coalesce(*(F.when(rule, reason.value) for rule, reason, _ in rules)).alias("reason"),
        F.coalesce(*(F.when(rule, F.lit(detail)) for rule, _, detail in rules)).alias("detail"),
    )  # fmt: skip


def read_samples(plan: SamplingPlan, warehouse: Warehouse) -> DataFrame:
    """Read the dataset's samples, one row per key.

    Raises:
        InputError: the dataset was sampled in another way.
    """
    rows = warehouse.read_one_per_key(COMPLETIONS).where(
        F.col("dataset") == plan.config.dataset
    )
    if not rows.where(F.col("sampling_key") != plan.sampling_key).isEmpty():
        raise InputError(
            f"dataset '{plan.config.dataset}' holds samples of another policy, template, seed or "
            "temperature; ids would stand for two texts",
            where=warehouse.place(COMPLETIONS),
            fix="--set dataset=NEW_NAME, or delete the rows of this one",
        )
    return rows


@dataclass(frozen=True)
class SampleWork:
    """What a run has to sample.

    Args:
        prompts: usable prompts, and with `reason` those that are not.
        rows: a row per prompt with missing samples: prompt_id, prompt_hash, prompt, numbers, wave.
        num_prompts: rows of `prompts`.
        num_missing_prompts: rows of `rows`.
        num_missing: samples to draw.
        num_waves: values of `wave`, from 0.
    """

    prompts: DataFrame
    rows: DataFrame
    num_prompts: int
    num_missing_prompts: int
    num_missing: int
    num_waves: int


def plan_samples(plan: SamplingPlan, warehouse: Warehouse, staging: Staging) -> SampleWork:
    """Find what has to be sampled: N samples of every usable prompt less what there is.

    Raises:
        InputError: as for `read_prompts` and `read_samples`.
    """
    prompts = read_prompts(warehouse.spark, plan.config.input)
    if plan.limit is not None:
        prompts = prompts.orderBy("prompt_hash", "prompt_id").limit(plan.limit)
    done = read_samples(plan, warehouse).groupBy("prompt_id").agg(
        F.collect_set("completion_id").alias("done"),
        F.max(prompt_hash(F.col("prompt"))).alias("sampled_hash"),
    )  # fmt: skip
    other = F.col("reason").isNull() & (F.col("sampled_hash") != F.col("prompt_hash"))
    text = "completions holds samples of another prompt under this prompt_id"
    joined = staging.write(
        "prompts",
        prompts.join(done, on="prompt_id", how="left")
        .withColumn("reason", F.when(other, RejectReason.DUPLICATE_ID.value).otherwise(
            F.col("reason")))
        .withColumn("detail", F.when(other, text).otherwise(F.col("detail")))
        .drop("sampled_hash"),
    )  # fmt: skip
    numbers = F.sequence(F.lit(1), F.lit(plan.config.sampling.num_samples))
    missing = F.filter(
        numbers,
        lambda n: ~F.array_contains(F.coalesce("done", F.array()), completion_id(n)),
    )
    rows = joined.where("reason IS NULL").withColumn("numbers", missing).where("size(numbers) > 0")
    observed = Observation()
    totals = rows.agg(F.count("*"), F.coalesce(F.sum(F.size("numbers")), F.lit(0))).first()
    assert totals is not None
    del observed
    num_waves = math.ceil(totals[0] / plan.config.run.wave_prompts)
    bucket = F.conv(F.substring("prompt_hash", 1, 8), 16, 10).cast("bigint")
    return SampleWork(
        prompts=joined,
        rows=rows.withColumn("wave", bucket % max(num_waves, 1)),
        num_prompts=joined.count(),
        num_missing_prompts=totals[0],
        num_missing=totals[1],
        num_waves=num_waves,
    )
