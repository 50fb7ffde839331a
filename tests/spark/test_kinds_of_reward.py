"""Classifiers and judges through the jobs: the same stages, tables and store as density ratios."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from pyspark.sql import SparkSession
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from cdr.candidate_rows import hash_messages
from cdr.chat import ChatEncoder, Message
from cdr.config import AnnotateConfig
from cdr.encoding import Candidate
from cdr.engines.base import EngineSpec, ScoringGroup
from cdr.engines.stub import StubEngine
from cdr.errors import ModelError
from cdr.evaluation_config import EvaluateConfig
from cdr.evaluation_plan import plan_evaluation
from cdr.judge import judge_messages
from cdr.judge_encoding import make_encoder
from cdr.plan import plan_annotation, plan_reward
from cdr.questions import sum_logprobs
from cdr.registration import register_reward
from cdr.registry import global_store
from cdr.reward_config import RewardSpec
from cdr.tables import (
    BENCHMARK_PAIRS,
    LOGPROBS,
    PREFERENCES,
    REJECTS,
    REWARDS,
    RUNS,
    VERDICTS,
    Table,
)
from cdr.warehouse import Warehouse
from cdr.weighing import mean_letter_mass
from jobs.annotate import annotate, dry_run
from jobs.evaluate import evaluate
from tests.chat_endpoint import Reply, say, serve
from tests.tokenizers import make_smollm2

PAIRS = [
    {
        "prompt": f"Question {n}: may I keep a fox?",
        "chosen": f"Ask the council about fox {n}." + " Please." * n,
        "rejected": "No." * (1 + n % 3),
    }
    for n in range(6)
]
PACK = Path(__file__).resolve().parents[2] / "conf" / "prompts" / "cdr-v1.yaml"
NO_ROUTING = {"routing": {"mode": "none"}, "encoding": {"template": "own"}}

# Of MLflow itself: old pandas and pydantic calls, and type hints of its own classes.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    r"ignore:[\s\S]*type hint[\s\S]*:UserWarning",
)


def collect(warehouse: Warehouse, table: Table) -> list[dict[str, Any]]:
    return [row.asDict(recursive=True) for row in warehouse.read(table).collect()]


def write(file: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(file), "format": "json"}


def last_counts(warehouse: Warehouse) -> dict[str, int]:
    counts: dict[str, int] = max(collect(warehouse, RUNS), key=lambda row: row["run_id"])["counts"]
    return counts


def make_classifier(folder: Path) -> tuple[LlamaForSequenceClassification, PreTrainedTokenizerFast]:
    """A trained reward model in small: its head and layers are far from zero."""
    tokenizer = make_smollm2()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_labels=1, initializer_range=0.5, pad_token_id=None,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model, tokenizer


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry for the module: creating its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def predict(reward: dict[str, Any], store: str, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Register a reward, load it as anybody would who has its name, and ask it."""
    done = register_reward(plan_reward(RewardSpec.model_validate(reward)), uri=store, alias="a")
    assert done.is_new
    with global_store(store):
        model = mlflow.pyfunc.load_model(f"models:/{reward['name']}@a")
        found: pd.DataFrame = model.predict(pd.DataFrame(rows))
    assert set(found["status"]) == {"ok"}
    return found


def test_a_classifier_gives_its_own_scores_asks_once_and_is_compared_with_a_judge(
    spark: SparkSession, tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = make_classifier(tmp_path / "model")
    path = str(tmp_path / "model")
    classifier = {"path": path, "engine": "classifier", "dtype": "float32", "max_length": 512}
    reward = {
        "name": "rm",
        "form": "classifier",
        "models": {"classifier": classifier},
        **NO_ROUTING,
    }
    whole = {
        "dataset": "bench",
        "warehouse": str(tmp_path / "warehouse"),
        "reward": reward,
        "tracking": {"enabled": False},
    }
    judge = {"form": "judge", "models": {"judge": {"path": path, "engine": "stub"}}}
    rows = {"rm": {}, "judge": {"change": judge}}
    config = {**whole, "input": write(tmp_path / "pairs.jsonl", PAIRS), "rows": rows}
    warehouse = Warehouse(spark, str(tmp_path / "warehouse"))
    plans = plan_evaluation(EvaluateConfig.model_validate(config))
    # The second time all is in the one store: a score per answer, two letters per order of a pair.
    for first, second in (
        ("12 asked, 0 were", "24 asked, 0 were"),
        ("12 asked, 12", "24 asked, 24"),
    ):
        assert evaluate(plans, warehouse) == 0
        said = capsys.readouterr().out
        for text in ("6 of 6 pairs judged", first, second, "A = rm\nB = judge", "McNemar"):
            assert text in said

    def ask(prompt: str, answer: str) -> float:
        """What a user of transformers would do: the whole conversation by its template."""
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            return float(model(input_ids=ids).logits[0, 0])

    rewards = [row for row in collect(warehouse, REWARDS) if row["reward_name"] == "rm"]
    assert len(rewards) == 12
    for row in rewards:
        score = ask(row["prompt"][0]["content"], row["completion"])
        assert row["reward"] == row["strong_logprob"] == pytest.approx(score, abs=1e-4)
        assert row["weak_logprob"] is None
    judged = collect(warehouse, BENCHMARK_PAIRS)
    by_margin = {row["outcome"]: row["margin"] for row in judged if row["reward_name"] == "rm"}
    assert by_margin.keys() <= {"win", "loss"}
    assert all((margin > 0) == (outcome == "win") for outcome, margin in by_margin.items())

    # The same answers to annotate: every score is in the store, and the better one is chosen.
    candidates = [
        {"prompt": pair["prompt"], "completion": pair[side]}
        for pair in PAIRS
        for side in ("chosen", "rejected")
    ]
    config = {
        **whole,
        "dataset": "mine",
        "input": write(tmp_path / "candidates.jsonl", candidates),
        "run": {"store_token_logprobs": True},
    }
    assert annotate(plan_annotation(AnnotateConfig.model_validate(config)), warehouse) == 0
    assert last_counts(warehouse)["logprobs_scored"] == 0
    assert len(collect(warehouse, LOGPROBS)) == 12 + 24
    for pair in collect(warehouse, PREFERENCES):
        prompt = pair["prompt"][0]["content"]
        scores = [ask(prompt, pair[side][0]["content"]) for side in ("chosen", "rejected")]
        assert pair["margin"] == pytest.approx(scores[0] - scores[1], abs=1e-4)
        assert pair["margin"] > 0
    (run_id,) = {row["run_id"] for row in collect(warehouse, PREFERENCES)}
    page = tmp_path / "warehouse" / "reports" / f"{run_id}.html"
    assert "score of classifier" in page.read_text()

    # Registered, it is the same reward.
    scored = predict(reward, store, candidates)
    stored = {(row["prompt"][0]["content"], row["completion"]): row for row in rewards}
    for candidate, (_, row) in zip(candidates, scored.iterrows(), strict=True):
        expected = stored[candidate["prompt"], candidate["completion"]]
        assert row["reward"] == pytest.approx(expected["reward"], abs=1e-4)
        assert row["strong_logprob"] == row["reward"]
        assert pd.isna(row["weak_logprob"])
        assert row["num_tokens"] == expected["num_tokens"]


PMI = {
    ("strong", "conditioned"): 1.0,
    ("strong", "unconditional"): -1.0,
    ("weak", "conditioned"): -1.0,
    ("weak", "unconditional"): 1.0,
}
CUSTOM = {("strong", "plain"): 2.0, ("weak", "conditioned"): -0.5}


@pytest.mark.parametrize(
    ("weights", "form"),
    [
        (PMI, {"form": "pmi"}),
        (
            CUSTOM,
            {
                "form": "custom",
                "terms": [
                    {"model": m, "condition": c, "weight": w} for (m, c), w in CUSTOM.items()
                ],
                "reduction": "mean",
            },
        ),
    ],
    ids=["pmi", "custom"],
)
def test_a_registered_reward_is_its_formula_over_what_the_models_say(
    weights: dict[tuple[str, str], float], form: dict[str, Any], tmp_path: Path, store: str
) -> None:
    make_smollm2().save_pretrained(tmp_path)
    model = {"path": str(tmp_path), "engine": "stub", "max_length": 4096}
    reward = {
        "name": form["form"],
        "models": {"strong": {**model, "adapter": "s"}, "weak": {**model, "adapter": "w"}},
        "prompt_pack": str(PACK),
        "routing": {"mode": "fixed", "domain": "safety"},
        "encoding": {"template": "own"},
        **form,
    }
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
    scored = predict(reward, store, rows)
    plan = plan_reward(RewardSpec.model_validate(reward))
    keys = {role: plan.models[role].model_key for role in ("strong", "weak")}
    encoder = make_encoder(plan.encoding)
    for row, found in zip(rows, scored["reward"], strict=True):
        messages: list[Message] = [{"role": "user", "content": row["prompt"]}]
        only = [Candidate("c", row["completion"], None)]
        encoded = encoder.encode(messages, hash_messages(messages), "safety", only)
        asked = {(view.model_key, view.condition): view for view in encoded.views}
        terms = {}
        for role, condition in weights:
            view = asked[keys[role], condition]
            group = ScoringGroup(view.prefix_ids, (view.candidates[0].ids,))
            ((logprobs,),) = StubEngine(EngineSpec(keys[role], "stub", "")).score([group])
            count = len(logprobs) if form.get("reduction") == "mean" else 1
            terms[role, condition] = sum_logprobs(logprobs) / count
        assert len(set(terms.values())) == len(weights), "two conditions read the same"
        expected = sum(weight * terms[term] for term, weight in weights.items())
        assert found == pytest.approx(expected, rel=1e-12)


def test_a_judge_compares_all_candidates_in_both_orders_and_asks_once(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_smollm2()
    tokenizer.save_pretrained(tmp_path / "model")
    answers = ["Yes.", "No.", "Ask the council.", "Yes."]  # the last is the first again
    rows = [
        {"prompt_id": "p", "completion_id": f"c{n}", "prompt": "May I keep a fox?", "completion": a}
        for n, a in enumerate(answers)
    ]
    rows.append({"prompt_id": "alone", "completion_id": "a", "prompt": "Hm?", "completion": "Hm."})
    source = write(tmp_path / "in.jsonl", rows)
    columns = {"prompt_id": "prompt_id", "completion_id": "completion_id"}
    config = AnnotateConfig.model_validate(
        {
            "dataset": "d",
            "warehouse": str(tmp_path / "warehouse"),
            "input": {**source, "columns": columns},
            "reward": {
                "name": "generative",
                "form": "judge",
                "models": {"judge": {"path": str(tmp_path / "model"), "engine": "stub"}},
                **NO_ROUTING,
            },
            "run": {"max_rejected_fraction": 1},
            "tracking": {"enabled": False},
        }
    )
    plan, warehouse = plan_annotation(config), Warehouse(spark, config.warehouse)
    assert annotate(plan, warehouse) == 0

    (spec,) = plan.reward.engines
    stub = StubEngine(EngineSpec(spec.name, "stub", ""))
    encoder = ChatEncoder(tokenizer, "own")
    letters = tuple(encoder.encode_completion(letter, "length").ids for letter in "AB")
    different = answers[:3]

    def log_odds_of_the_first(first: str, second: str) -> float:
        asked = judge_messages(
            [{"role": "user", "content": "May I keep a fox?"}], None, first, second
        )
        a, b = stub.score([ScoringGroup(encoder.encode_prefix(asked), letters)])[0]
        return sum_logprobs(a) - sum_logprobs(b)

    odds = {pair: log_odds_of_the_first(*pair) for pair in permutations(different, 2)}
    expected = {
        one: sum(odds[one, other] - odds[other, one] for other in different if other != one) / 4
        for one in different
    }
    rewards = {row["completion_id"]: row for row in collect(warehouse, REWARDS)}
    assert {name: row["completion"] for name, row in rewards.items()} == {
        f"c{n}": answer for n, answer in enumerate(answers)
    }
    for row in rewards.values():
        assert row["reward"] == pytest.approx(expected[row["completion"]])
        assert row["num_tokens"] == len(encoder.encode_completion(row["completion"], "stop").ids)
        # Four questions, and what the letter got in each.
        assert {term["num_tokens"] for term in row["terms"].values()} == {1}
        assert len(row["terms"]) == 4
    assert rewards["c0"]["reward"] == rewards["c3"]["reward"]
    assert rewards["c0"]["rank"] == rewards["c3"]["rank"]
    stored = collect(warehouse, LOGPROBS)
    assert len(stored) == 6 * 2
    mass = sum(math.exp(row["logprob_sum"]) for row in stored) / 6
    assert mean_letter_mass(warehouse.read(REWARDS)) == pytest.approx(mass)
    assert f"gives its two letters {mass:.1%} of the probability" in capsys.readouterr().out
    (rejected,) = collect(warehouse, REJECTS)
    assert (rejected["prompt_id"], rejected["reason"]) == ("alone", "no_other_candidate")

    (pair,) = collect(warehouse, PREFERENCES)
    assert annotate(plan, warehouse) == 0
    assert last_counts(warehouse)["logprobs_scored"] == 0
    assert collect(warehouse, LOGPROBS) == stored
    (again,) = collect(warehouse, PREFERENCES)
    for side in ("chosen_id", "rejected_id", "margin"):
        assert pair[side] == again[side]


def test_an_api_judge_is_never_asked_twice_and_what_it_will_not_judge_is_rejected(
    spark: SparkSession,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    is_broke = is_down = True

    def answer(question: str, _: int) -> Reply:
        if is_broke and len(endpoint.asked) > 1:
            return 402, {"error": {"message": "pay first"}}
        if "fox 3" in question:
            return say(None, refusal="I can't help with that.")
        if "fox 4" in question:
            return say("A")  # whatever is shown there
        if "fox 5" in question and is_down:
            return 503, {}
        first = question.partition("[Answer A]")[2].partition("[End")[0]
        return say("A" if "council" in first else "B")

    candidates = [
        {"prompt": pair["prompt"], "completion": pair[side]}
        for pair in PAIRS
        for side in ("rejected", "chosen")
    ]
    with serve(answer) as endpoint:
        api = {
            "base_url": endpoint.base_url, "api_key_variable": "JUDGE_KEY", "retries": 0,
            "wave_questions": 5, "prompt_price": 10, "answer_price": 30, "concurrency": 1,
        }  # fmt: skip
        config = AnnotateConfig.model_validate(
            {
                "dataset": "d",
                "warehouse": str(tmp_path / "warehouse"),
                "input": write(tmp_path / "in.jsonl", candidates),
                "reward": {
                    "name": "gpt",
                    "form": "judge",
                    "models": {"judge": {"path": "gpt-4-turbo", "engine": "api", "api": api}},
                    **NO_ROUTING,
                },
                "run": {"max_rejected_fraction": 1, "max_failed_fraction": 1},
                "tracking": {"enabled": False},
            }
        )
        plan, warehouse = plan_annotation(config), Warehouse(spark, config.warehouse)
        assert dry_run(plan, warehouse) == 0
        assert "12 asked, 0 in the store" in capsys.readouterr().out
        assert not endpoint.asked
        with pytest.raises(ModelError, match=r"pay first \(1 of this wave's answers are kept\)"):
            annotate(plan, warehouse)
        assert (len(endpoint.asked), len(collect(warehouse, VERDICTS))) == (2, 1)
        is_broke = False
        assert annotate(plan, warehouse) == 0
        # Nine answers of ten tokens read and two written.
        assert "9 questions answered, 90 tokens read, 18 written, 0.0014 USD" in (
            capsys.readouterr().out
        )
        assert len(endpoint.asked) == 2 + 11
        first = {row["prompt"][0]["content"]: row for row in collect(warehouse, REWARDS)}
        failed = [row["error"] for row in collect(warehouse, REWARDS) if row["status"] == "failed"]
        assert failed == ["judge_unavailable"] * 2
        is_down = False
        assert annotate(plan, warehouse) == 0
        assert len(endpoint.asked) == 2 + 11 + 2
        counts = last_counts(warehouse)
        assert (counts["judge_questions"], counts["judge_prompt_tokens"]) == (2, 20)
        assert counts["judge_answer_tokens"] == 4
    assert len(first) == 5
    verdicts = collect(warehouse, VERDICTS)
    assert len(verdicts) == 12
    assert {row["answered_by"] for row in verdicts} == {"stub-2026"}
    assert all("secret" not in str(row.values()) for row in verdicts)
    assert collect(warehouse, LOGPROBS) == []
    rewards = collect(warehouse, REWARDS)
    for row in rewards:
        wins = 1.0 if "council" in row["completion"] else -1.0
        # A judge that likes a place, not an answer, gives a tie.
        assert row["reward"] == (0.0 if "Question 4" in row["prompt"][0]["content"] else wins)
        assert row["status"] == "ok"
    reasons = {(row["stage"], row["reason"]) for row in collect(warehouse, REJECTS)}
    assert reasons == {("judge", "judge_refused")}
    assert len(rewards) == 12 - len(collect(warehouse, REJECTS)) == 10
    chosen = {row["chosen"][0]["content"] for row in collect(warehouse, PREFERENCES)}
    assert chosen == {pair["chosen"] for n, pair in enumerate(PAIRS) if n not in (3, 4)}

    # As the guide says: without their verdicts, refused questions are asked again.
    warehouse.delta(VERDICTS).delete("reason = 'judge_refused'")
    assert dry_run(plan, warehouse) == 0
    assert "12 asked, 10 in the store" in capsys.readouterr().out
