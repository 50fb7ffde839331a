"""Best-of-N sampling: N completions per prompt from a policy model, for a reward to choose from.

What a run is asked to do (`GenerateConfig`), and the checked plan of it. A sample's seed is a hash
of (base seed, prompt, sample number): it depends on no other row, so more prompts or more samples
per prompt leave what is there as it is. `cdr.sampling_stages` does the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cdr.chat import PLAIN_TEMPLATE, ChatEncoder, check_vocabulary, load_tokenizer, own_template
from cdr.config import (
    DatasetName,
    JobSpec,
    SourceSpec,
    TablePlaces,
    WarehousePlace,
    content_hash,
)
from cdr.config_files import Spec, load_config
from cdr.encoding import TokenizerSpec
from cdr.engines.base import EngineSpec
from cdr.errors import ConfigError
from cdr.models import ResolvedModel, resolve_models
from cdr.reward_config import EncodingSpec, ModelSpec, RewardSpec, RoutingSpec, TermSpec
from cdr.text_files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class PromptColumnsSpec(Spec):
    """Names of the input's columns. None: the input has no such column."""

    prompt: str = Field("prompt", description="Text, or messages: an array of role and content.")
    prompt_id: str | None = Field(None, description="None: derived from the prompt's content.")
    domain: str | None = Field(None, description="Carried along, for routing.mode `column`.")


class PromptsSpec(SourceSpec):
    """Where prompts come from."""

    columns: PromptColumnsSpec = PromptColumnsSpec()


class SamplingSpec(Spec):
    """How completions are drawn. More `num_samples` add to a dataset; the rest makes another."""

    num_samples: int = Field(4, ge=1, description="Completions per prompt.")
    temperature: float = Field(0.8, ge=0, description="0 takes the likeliest token.")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus mass kept.")
    max_new_tokens: int = Field(512, ge=1, description="Tokens at most, end of turn included.")
    seed: int = Field(0, description="Base seed.")


class GenerateRunSpec(JobSpec):
    """How the work is carried out."""

    wave_prompts: int = Field(5000, ge=1, description="Prompts per wave (one atomic commit).")
    request_tokens: int = Field(
        65_536, ge=256, description="Tokens, prompts and samples, per request to the engine."
    )


class GenerateConfig(Spec):
    """One sampling run: which prompts, which policy, how many completions, where to."""

    dataset: DatasetName = Field(description="Name of the set of completions.")
    warehouse: WarehousePlace
    tables: TablePlaces
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
        text_key: hash of all that decides how a prompt becomes token ids.
        sampling_key: hash of all that decides a sample besides prompt and sample number.
    """

    config: GenerateConfig
    limit: int | None
    engine: EngineSpec
    tokenizer: TokenizerSpec
    text_key: str
    sampling_key: str

    def load_encoder(self) -> ChatEncoder:
        """Load the policy's tokenizer and make its encoder."""
        return self.make_encoder(load_tokenizer(self.tokenizer.path, self.tokenizer.revision))

    def make_encoder(self, tokenizer: PreTrainedTokenizerFast) -> ChatEncoder:
        """Make the policy's encoder from its tokenizer."""
        return ChatEncoder(
            tokenizer,
            self.tokenizer.template,
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
    loaded = load_tokenizer(model.spec.path, model.spec.revision)
    tokenizer = TokenizerSpec(
        model_key=model.model_key,
        path=model.spec.path,
        revision=model.spec.revision,
        template=_template(config, loaded),
        max_length=model.spec.max_length,
        vocab_size=model.vocab_size,
    )
    decisive = config.sampling.model_dump(mode="json", exclude={"num_samples"})
    text = [tokenizer.template, model.tokenizer_hash(), config.special_tokens_in_text]
    key = content_hash([model.model_key, text, decisive])
    plan = SamplingPlan(config, limit, model.engine_spec, tokenizer, content_hash(text), key)
    check_vocabulary(plan.make_encoder(loaded), tokenizer.vocab_size, who="policy")
    return plan


def sample_seed(base_seed: int, prompt_hash: str, number: int) -> int:
    """Give the seed of a prompt's `number`-th sample: 63 bits, whatever else is sampled."""
    digest = hashlib.sha256(f"{base_seed}:{prompt_hash}:{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # Spark's bigint is signed


def sample_id(prompt_id: str, number: int) -> str:
    """Give the completion_id of a prompt's `number`-th sample."""
    return f"{prompt_id}-{number}"


def _resolve_policy(spec: ModelSpec) -> ResolvedModel:
    """Find the policy as a reward's models are found: as the only term, log p(y|x)."""
    term = TermSpec(model="policy", condition="plain", weight=1)
    reward = RewardSpec(
        name="policy",
        models={"policy": spec},
        form="custom",
        terms=(term,),
        routing=RoutingSpec(mode="none"),
        encoding=EncodingSpec(template="own"),
    )
    try:
        return resolve_models(reward)["policy"]
    except ConfigError as error:
        problems = [problem.removeprefix("models.") for problem in error.problems]
        raise ConfigError(problems, fix=error.fix) from None


def _template(config: GenerateConfig, tokenizer: PreTrainedTokenizerFast) -> str:
    """Give the text of the template that prompts are rendered with."""
    choice = config.template
    if choice == "plain":
        return PLAIN_TEMPLATE
    if choice == "own":
        text = own_template(tokenizer)
        if text is None:
            raise ConfigError(
                ["template: 'own' needs a policy with a chat template, this one has none"],
                fix="set template to 'plain', or to a Jinja file",
            )
        return text
    try:
        return read_text(choice)
    except OSError as error:
        raise ConfigError(
            [
                "template: expected 'own', 'plain' or a Jinja file, "
                f"got '{choice}' ({error.strerror or error})"
            ]
        ) from None
