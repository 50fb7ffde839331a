"""Classifiers and judges as kinds of reward: what a config may say, and what they are shown."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cdr.chat import FROZEN_DATE, ChatEncoder, Message
from cdr.encoding import Candidate
from cdr.errors import ConfigError
from cdr.judge_encoding import JudgeEncoder, make_encoder
from cdr.plan import RewardPlan, plan_reward
from cdr.prompt_pack import load_prompt_pack
from cdr.reward_config import RewardSpec
from cdr.weights import CODE_FILES, WEIGHT_FILES, hash_files
from tests.tokenizers import make_llama3, make_mistral_v3, make_smollm2

PACK = Path(__file__).resolve().parents[2] / "conf" / "prompts" / "cdr-v1.yaml"
ONE_OUTPUT = {"id2label": {"0": "LABEL_0"}}


def make_classifier(folder: Path, **config: Any) -> Path:
    """A folder that says it is a classifier; its weights are never read here."""
    make_smollm2().save_pretrained(folder)
    sizes = {"vocab_size": 49152, "architectures": ["LlamaForSequenceClassification"], **config}
    (folder / "config.json").write_text(json.dumps(sizes))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def make_reward(folder: Path, model: dict[str, Any] | None = None, **changes: Any) -> RewardSpec:
    return RewardSpec.model_validate(
        {
            "name": "rm",
            "form": "classifier",
            "models": {
                "classifier": {"path": str(folder), "engine": "classifier", **(model or {})}
            },
            "routing": {"mode": "none"},
            "encoding": {"template": "own"},
            **changes,
        }
    )


def test_a_classifier_reads_the_whole_turn_as_its_template_writes_it() -> None:
    prompt: list[Message] = [{"role": "user", "content": "May I keep a fox?"}]
    for tokenizer in (make_smollm2(), make_llama3(), make_mistral_v3()):
        encoder = ChatEncoder(tokenizer, "own", close_turns=True)
        for finish_reason in ("stop", "length"):  # a classifier knows no answer without an end
            completion = encoder.encode_completion("Ask the council.", finish_reason)
            whole = tokenizer.apply_chat_template(
                [*prompt, {"role": "assistant", "content": "Ask the council."}],
                tokenize=True,
                strftime_now=FROZEN_DATE.strftime,
            )["input_ids"]
            assert [*encoder.encode_prefix(prompt), *completion.ids] == whole


@pytest.mark.parametrize(
    ("config", "model", "problem"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, {}, "must be a sequence classifier, is LlamaFor"),
        # transformers leaves its default of two labels out of the file.
        ({}, {}, r"output: is required for a classifier of 2 outputs \(LABEL_0, LABEL_1\)"),
        (ONE_OUTPUT, {"output": "score"}, "output: must be one of LABEL_0, got 'score'"),
        (
            {"auto_map": {"AutoModelForSequenceClassification": "gated.Gated"}},
            {},
            r"custom_code: the model brings code of its own \(gated\.Gated\), got false",
        ),
    ],
)
def test_a_model_that_would_be_read_wrongly_is_refused_before_anything_loads(
    tmp_path: Path, config: dict[str, Any], model: dict[str, Any], problem: str
) -> None:
    folder = make_classifier(tmp_path, **config)
    with pytest.raises(ConfigError, match=problem):
        plan_reward(make_reward(folder, model))


def test_own_code_needs_a_pin_that_covers_the_code(tmp_path: Path) -> None:
    auto_map = {"AutoModelForSequenceClassification": "gated.Gated"}
    folder = make_classifier(tmp_path, auto_map=auto_map)
    (folder / "gated.py").write_text("print('hello')")
    with pytest.raises(ValidationError, match="custom_code: needs pinned code"):
        make_reward(folder, {"custom_code": True})
    checksum = hash_files(folder, WEIGHT_FILES + CODE_FILES)
    allowed = {"custom_code": True, "output": "score", "checksum": checksum}
    plan = plan_reward(make_reward(folder, allowed))
    with pytest.raises(ConfigError, match="output: is required for a classifier of 2 outputs"):
        plan_reward(make_reward(folder, {**allowed, "output": None}))
    (engine,) = plan.engines
    assert (engine.custom_code, engine.output, engine.checksum) == (True, "score", checksum)
    assert "runs the Python code that comes with" in plan.spec.warnings()[0]
    (folder / "gated.py").write_text("print('hello again')")
    with pytest.raises(ConfigError, match="has checksum"):
        plan_reward(make_reward(folder, allowed))
    elsewhere = make_classifier(
        tmp_path / "b", auto_map={"AutoModelForSequenceClassification": "a/b--gated.Gated"}
    )
    (elsewhere / "gated.py").touch()
    checksum = hash_files(elsewhere, WEIGHT_FILES + CODE_FILES)
    with pytest.raises(ConfigError, match="the code lies in another repository"):
        plan_reward(make_reward(elsewhere, {**allowed, "checksum": checksum}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"reduction": "mean"}, "a classifier's score has no mean per token"),
        ({"models": {"classifier": {"path": "m"}}}, "must be 'classifier' for form 'classifier'"),
        (
            {"models": {"classifier": {"path": "m", "engine": "classifier", "adapter": "a"}}},
            "adapter: engine 'classifier' takes none",
        ),
        ({"models": {"classifier": {"path": "m", "output": "x"}}}, "only engine 'classifier' has"),
        ({"form": "judge"}, "needs a model 'judge'"),
        (
            {"form": "judge", "models": {"judge": {"path": "m", "engine": "classifier"}}},
            "a classifier cannot judge",
        ),
        (
            {
                "form": "custom",
                "models": {"strong": {"path": "m"}},
                "terms": [{"model": "strong", "condition": "compared", "weight": 1}],
            },
            "'compared' is that of form 'judge' alone",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        make_reward(Path("m"), **changes)


# --- the judge ------------------------------------------------------------------------------------


def plan_judge(folder: Path, **model: Any) -> RewardPlan:
    make_smollm2().save_pretrained(folder)
    strong = {"path": str(folder), "engine": "stub", **model}
    return plan_reward(
        RewardSpec.model_validate(
            {
                "name": "judge",
                "form": "judge",
                "models": {"judge": strong},
                "encoding": {"template": "own"},
                "prompt_pack": str(PACK),
                "routing": {"mode": "column"},
            }
        )
    )


def encode(plan: RewardPlan, *texts: str, domain: str | None = "safety") -> Any:
    encoder = make_encoder(plan.encoding)
    assert isinstance(encoder, JudgeEncoder)
    candidates = [Candidate(f"c{i}", text, "stop") for i, text in enumerate(texts)]
    prompt: list[Message] = [{"role": "user", "content": "May I keep a fox?"}]
    return encoder.encode(prompt, "0" * 64, domain, candidates)


def test_a_judge_is_shown_every_two_answers_in_both_orders_with_the_domains_criteria(
    tmp_path: Path,
) -> None:
    plan = plan_judge(tmp_path)
    texts = ("Yes.", "No.", "Ask the council.")
    encoded = encode(plan, *texts)
    shown = ChatEncoder(make_smollm2(), "own")
    letters = [shown.encode_completion(letter, "length").ids for letter in "AB"]
    assert all(len(ids) == 1 for ids in letters)
    drawn = load_prompt_pack(PACK).domains["safety"].instructions[encoded.instruction_id]
    seen = []
    for view in encoded.views:
        text = shown.decode(view.prefix_ids)
        assert drawn.strip() in text
        assert text.index("May I keep a fox?") < text.index("[Answer A]") < text.index("[Answer B]")
        first, second = view.candidates
        assert [first.ids, second.ids] == letters
        pair = [texts[int(c.completion_id[1])] for c in (first, second)]
        assert f"[Answer A]\n{pair[0]}\n[End" in text
        assert f"[Answer B]\n{pair[1]}\n[End" in text
        seen.append(tuple(pair))
        for candidate, answer in zip((first, second), pair, strict=True):
            assert candidate.num_tokens == len(shown.encode_completion(answer, "stop").ids)
    assert sorted(seen) == sorted(permutations(texts, 2))
    assert encode(plan, *texts, domain="chat").instruction_id is None


def test_equal_answers_are_one_and_what_cannot_be_compared_says_why(tmp_path: Path) -> None:
    plan = plan_judge(tmp_path, max_length=400)
    twins = encode(plan, "Yes.", "No.", "Yes.")
    names = [[c.completion_id for c in view.candidates] for view in twins.views]
    assert names == [["c0", "c2", "c1"], ["c1", "c0", "c2"]]
    assert not twins.rejected
    # One that was cut has a token less, wherever it stands: no end of turn.
    cut = [Candidate("c0", "Yes.", "stop"), Candidate("c1", "Yes.", "length")]
    for candidates in (cut, cut[::-1]):
        encoder = make_encoder(plan.encoding)
        prompt: list[Message] = [{"role": "user", "content": "May I keep a fox?"}]
        other = Candidate("c2", "No.", "stop")
        encoded = encoder.encode(prompt, "0" * 64, None, [*candidates, other])
        tokens = {c.completion_id: c.num_tokens for c in encoded.views[0].candidates}
        assert tokens["c0"] == tokens["c1"] + 1

    def reasons(*texts: str) -> dict[str, str]:
        return {name: reason.value for name, reason, _ in encode(plan, *texts).rejected}

    alone = "no_other_candidate"
    assert reasons("Yes.") == {"c0": alone}
    assert reasons("Yes.", "Yes.") == {"c0": alone, "c1": alone}
    assert reasons("Yes.", "No.<|im_end|>") == {"c1": "special_token_in_text", "c0": alone}
    # 400 tokens hold the criteria and two short answers, or one long one.
    long = "because " * 150
    assert reasons("Yes.", "No.", long) == {"c2": "too_long"}
    assert reasons("Yes.", long) == {"c1": "too_long", "c0": alone}


def test_a_judges_words_are_part_of_its_rewards_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = plan_judge(tmp_path).key
    monkeypatch.setattr("cdr.reward.JUDGE_KEY", "other words")
    assert plan_judge(tmp_path).key != key


# --- the judge behind an API ----------------------------------------------------------------------


def plan_api_judge(**model: Any) -> RewardPlan:
    api = {"base_url": "http://127.0.0.1:1/v1"}
    judge = {"path": "m", "engine": "api", "api": api, **model}
    changes = {"form": "judge", "models": {"judge": judge}}
    return plan_reward(make_reward(Path("m"), **changes))


def test_what_extra_adds_to_a_request_is_part_of_an_api_judges_key() -> None:
    (plain,), (extended,) = (
        plan_api_judge(**model).engines
        for model in ({}, {"extra": {"max_tokens": None, "max_completion_tokens": 16}})
    )
    # The key of a judge without it stays what it was: its answers are paid for.
    assert plain.name == "ac68a8bbcd9581fa"
    assert extended.name != plain.name
    assert json.loads(extended.extra) == {"max_tokens": None, "max_completion_tokens": 16}


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"dtype": "bfloat16"}, "dtype: means nothing to an endpoint"),
        ({"max_length": 4096}, "max_length: means nothing to an endpoint"),
        ({"revision": "0" * 40}, "revision: means nothing to an endpoint"),
        ({"extra": {"model": "other"}}, "'model' of a request is not the config's to set"),
        ({"api": None}, "engine 'api' needs it"),
    ],
)
def test_keys_without_a_meaning_for_an_endpoint_are_refused(
    model: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValidationError, match=problem):
        plan_api_judge(**model)
