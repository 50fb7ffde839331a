"""What decides a sample: its seed, the sampling key; and the demo input that was sampled."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdr.errors import ConfigError
from cdr.sampling import (
    GenerateConfig,
    SamplingPlan,
    load_generate_config,
    plan_sampling,
    sample_id,
    sample_seed,
)
from tests.tokenizers import CHATML_TEMPLATE, make_small_bpe, make_smollm2

CONF = Path(__file__).resolve().parents[2] / "conf"
HASHES = st.text("0123456789abcdef", min_size=64, max_size=64)


def test_seed_is_the_first_63_bits_of_a_hash() -> None:
    # printf '0:ab:1' | sha256sum gives cd73c655d3506317...; shifted right by one bit.
    assert sample_seed(0, "ab", 1) == 7402197236008366475


@given(st.integers(), HASHES, st.integers(1, 10**6))
def test_seed_fits_a_bigint(base: int, prompt_hash: str, number: int) -> None:
    assert 0 <= sample_seed(base, prompt_hash, number) < 2**63


def test_each_part_changes_the_seed() -> None:
    seeds = {sample_seed(0, "ab", 1), sample_seed(1, "ab", 1), sample_seed(0, "b", 1)}
    assert len(seeds | {sample_seed(0, "ab", 2)}) == 4


def test_sample_id_is_prompt_and_number() -> None:
    assert sample_id("p-7", 3) == "p-7-3"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    make_small_bpe(CHATML_TEMPLATE, special=special).save_pretrained(folder)
    return folder


def make_plan(folder: Path, **changes: Any) -> SamplingPlan:
    config = {
        "dataset": "d",
        "warehouse": "w",
        "input": {"path": "in", "format": "json"},
        "policy": {"path": str(folder), "engine": "stub"},
        **changes,
    }
    return plan_sampling(GenerateConfig.model_validate(config))


def test_what_decides_a_sample_changes_the_key(policy: Path) -> None:
    keys = [
        make_plan(policy).sampling_key,
        make_plan(policy, template="plain").sampling_key,
        make_plan(policy, special_tokens_in_text="as_text").sampling_key,
        make_plan(
            policy,
            policy={"path": str(policy), "engine": "stub", "extra": {"nan_token": 1}},
        ).sampling_key,
        *(
            make_plan(policy, sampling=change).sampling_key
            for change in ({"seed": 1}, {"temperature": 1}, {"top_p": 0.5}, {"max_new_tokens": 9})
        ),
    ]
    assert len(set(keys)) == len(keys)


def test_what_does_not_decide_a_sample_keeps_the_key(policy: Path) -> None:
    key = make_plan(policy).sampling_key
    assert make_plan(policy, sampling={"num_samples": 9}).sampling_key == key
    assert make_plan(policy, dataset="other", run={"wave_prompts": 1}).sampling_key == key


def test_a_missing_policy_is_named(tmp_path: Path) -> None:
    spec = {"path": str(tmp_path / "nowhere"), "dtype": "float32"}
    with pytest.raises(ConfigError, match=r"policy\.path: no such folder"):
        make_plan(tmp_path, policy=spec)


def test_a_missing_template_file_is_named(policy: Path) -> None:
    with pytest.raises(ConfigError, match="expected 'own', 'plain' or a Jinja file, got 'x"):
        make_plan(policy, template="x.jinja")


def test_every_problem_of_a_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "dataset: d\nwarehouse: w\ninput: {format: json}\n"
        "policy: {path: a/b}\nsampling: {top_p: 0, num_sample: 3}\n"
    )
    with pytest.raises(ConfigError) as error:
        load_generate_config(file)
    told = "\n".join(error.value.problems)
    for part in (
        "input.path: give exactly one of path and table",
        "policy.revision: must be a 40-digit commit hash",
        "sampling.top_p: input should be greater than 0",
        "sampling.num_sample: unknown key; did you mean 'num_samples'?",
    ):
        assert part in told


# --- the demo's input ---------------------------------------------------------------------------


def read_lines(name: str) -> list[dict[str, Any]]:
    text = (CONF / "demo" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_shipped_config_names_the_shipped_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDR_CACHE", "cache")
    config = load_generate_config(CONF / "generate" / "demo.yaml")
    assert config.policy.path == "cache/models/smollm2-135m-instruct"
    assert config.input.path == str(CONF / "demo" / "prompts.jsonl")
    assert config.policy.dtype == "float32"


def test_demo_holds_four_candidates_of_every_prompt() -> None:
    prompts = {row["prompt_id"]: row for row in read_lines("prompts.jsonl")}
    rows = read_lines("completions.jsonl")
    assert len(prompts) >= 48
    assert Counter(row["prompt_id"] for row in rows) == dict.fromkeys(prompts, 4)
    assert len({row["completion_id"] for row in rows}) == len(rows)
    for row in rows:
        given = prompts[row["prompt_id"]]
        assert (row["prompt"], row["domain"]) == (given["prompt"], given["domain"])


def test_demo_completions_can_be_scored() -> None:
    rows = read_lines("completions.jsonl")
    control = set(make_smollm2().all_special_tokens)
    assert {"<|im_start|>", "<|im_end|>"} <= control
    for row in rows:
        assert row["completion"].strip(), row["completion_id"]
        assert not any(token in row["completion"] for token in control), row["completion_id"]
    reasons = Counter(row["finish_reason"] for row in rows)
    assert set(reasons) == {"stop", "length"}
