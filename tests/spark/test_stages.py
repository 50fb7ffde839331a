"""Whole annotate runs on stub models, in one session: routing, every form of reward, the store.

Expected numbers are worked out here, from token ids, the stub's own log-probs and plain arithmetic;
what the job says of itself is never the source.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import yaml
from pyspark.sql import Row, SparkSession

from cdr.chat import ChatEncoder, Message
from cdr.config import AnnotateConfig
from cdr.encoding import Candidate, PromptEncoder, ids_hash
from cdr.engines.base import ScoringGroup
from cdr.engines.stub import StubEngine
from cdr.plan import AnnotationPlan, RoutePlan, plan_annotation
from cdr.router import router_messages
from cdr.tables import LOGPROBS, REJECTS, REWARDS, ROUTES, RUNS, TABLES, Table
from cdr.warehouse import Warehouse
from jobs.annotate import annotate, dry_run
from tests.tokenizers import CHATML_TEMPLATE, make_small_bpe, make_smollm2

PACK = Path(__file__).resolve().parents[2] / "conf" / "prompts" / "cdr-v1.yaml"
Key = tuple[str, bytes, bytes]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders for stubs to borrow tokenizers from: the weak model counts tokens its own way."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("smollm2", "small")}
    make_smollm2().save_pretrained(folders["smollm2"])
    special = ("<|im_end|>", "<|im_start|>")
    make_small_bpe(CHATML_TEMPLATE, special=special).save_pretrained(folders["small"])
    return folders


def messages(number: int) -> list[Message]:
    return [{"role": "user", "content": f"Question {number}: may I keep a fox?"}]


def prompt_hash(prompt: Sequence[Message]) -> str:
    """Hash messages as the input stage does: sha256 of role:characters:content of each."""
    text = "".join(f"{m['role']}:{len(m['content'])}:{m['content']}" for m in prompt)
    return hashlib.sha256(text.encode()).hexdigest()


def make_rows(domains: Sequence[str | None], start: int = 0) -> list[dict[str, Any]]:
    """Two candidates per prompt; no text comes twice, so no question is asked twice."""
    return [
        {
            "prompt_id": f"p{i}",
            "prompt": messages(i),
            "domain": domain,
            "completion_id": f"p{i}-{j}",
            "completion": f"Answer {j} to {i}." + " Ask the council." * j,
            "finish_reason": "stop",
        }
        for i, domain in enumerate(domains, start)
        for j in (0, 1)
    ]


def make_plan(
    folder: Path, rows: Sequence[Mapping[str, Any]], reward: dict[str, Any], **run: Any
) -> AnnotationPlan:
    source = folder / "input.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ("prompt_id", "completion_id", "finish_reason", "domain")
    config = {
        "dataset": "d",
        "warehouse": str(folder / "warehouse"),
        "input": {
            "path": str(source),
            "format": "json",
            "columns": {name: name for name in columns},
        },
        "reward": {"name": "r", "prompt_pack": str(PACK), **reward},
        "run": {"max_rejected_fraction": 1, **run},
        "tracking": {"enabled": False},
        "report": {"enabled": False},
    }
    return plan_annotation(AnnotateConfig.model_validate(config))


def stub(folder: Path, role: str, **spec: Any) -> dict[str, Any]:
    return {"path": str(folder), "engine": "stub", "adapter": role, **spec}


def collect(warehouse: Warehouse, table: Table) -> list[dict[str, Any]]:
    rows: list[Row] = warehouse.read(table).collect()
    return [row.asDict(recursive=True) for row in rows]


@dataclass(frozen=True)
class Decision:
    """A route, worked out by hand; `label_logprobs` null where the router cannot read x."""

    label_logprobs: dict[str, float] | None
    domain: str | None
    confidence: float | None


def decide(plan: RoutePlan, prompt: list[Message]) -> Decision:
    """Ask the stub in this process and take the softmax of its labels' log-probs."""
    encoder = ChatEncoder.load(plan.tokenizer.path, None, template="own", score_end_of_turn=False)
    prefix = encoder.encode_prefix(router_messages(prompt, plan.pack, plan.domains))
    labels = [
        encoder.encode_completion(plan.pack.domains[name].router_label, None).ids
        for name in plan.domains
    ]
    assert {len(ids) for ids in labels} == {1}, "nothing to normalise by length"
    if len(prefix) + 1 > plan.tokenizer.max_length:
        return Decision(None, None, None)
    (answers,) = StubEngine(plan.engine).score([ScoringGroup(prefix, tuple(labels))])
    sums = {name: float(answer[0]) for name, answer in zip(plan.domains, answers, strict=True)}
    total = sum(math.exp(value) for value in sums.values())
    best = max(sums, key=lambda name: sums[name])
    return Decision(sums, best, math.exp(sums[best]) / total)


def test_the_router_decides_once_per_prompt_and_unsure_or_unread_prompts_fall_back(
    spark: SparkSession, tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    folder = tokenizers["smollm2"]
    rows = make_rows([None] * 8)
    too_long = [{"role": "user", "content": "word " * 600}]
    rows += [{**row, "prompt_id": "long", "prompt": too_long} for row in make_rows([None], 8)]

    def plan_with(rows: Sequence[Mapping[str, Any]], threshold: float) -> AnnotationPlan:
        models = {role: stub(folder, role) for role in ("strong", "weak")}
        models["router"] = stub(folder, "router", max_length=600)
        routing = {"mode": "adaptive", "threshold": threshold, "fallback": "chat"}
        return make_plan(tmp_path, rows, {"models": models, "routing": routing})

    prompts = {row["prompt_id"]: row["prompt"] for row in rows}
    asked = plan_with(rows, 0).reward.route
    assert asked is not None
    decisions = {name: decide(asked, prompt) for name, prompt in prompts.items()}
    assert decisions["long"].confidence is None
    # Between two of eight values: rounding decides nothing.
    threshold = median(d.confidence for d in decisions.values() if d.confidence is not None)

    plan = plan_with(rows, threshold)
    warehouse = Warehouse(spark, plan.config.warehouse)
    assert annotate(plan, warehouse) == 0
    first_routes = {row["prompt_hash"]: row for row in collect(warehouse, ROUTES)}
    assert len(first_routes) == 9
    rewards = {row["prompt_id"]: row for row in collect(warehouse, REWARDS)}
    for name, decision in decisions.items():
        is_sure = decision.confidence is not None and decision.confidence >= threshold
        reward = rewards[name]
        route = first_routes[reward["prompt_hash"]]
        expected = (decision.domain, "router") if is_sure else ("chat", "fallback")
        assert (route["domain"], route["domain_source"]) == expected
        assert (reward["domain"], reward["domain_source"]) == expected
        assert route["label_logprobs"] == decision.label_logprobs
        assert reward["domain_confidence"] == route["confidence"]
        if decision.confidence is None:
            assert route["confidence"] is None
        else:
            assert route["confidence"] == pytest.approx(decision.confidence, rel=1e-12)
        assert (reward["exemplar_id"] is None) == (expected[0] == "chat")
    sources = Counter(row["domain_source"] for row in first_routes.values())
    assert sources == {"router": 4, "fallback": 5}

    # What is stored is what counts, even where the router would say something else by now.
    name = next(name for name, reward in rewards.items() if reward["domain"] == "chat")
    changed = rewards[name]["prompt_hash"]
    spark.sql(
        f"UPDATE {warehouse.sql_name(ROUTES)} SET domain = 'safety', confidence = 0.125 "
        f"WHERE prompt_hash = '{changed}'"
    )
    more = [*rows, *make_rows([None] * 2, 20)]
    assert annotate(plan_with(more, threshold), warehouse) == 0
    routes = {row["prompt_hash"]: row for row in collect(warehouse, ROUTES)}
    assert len(collect(warehouse, ROUTES)) == len(routes) == 11
    first_routes[changed] |= {"domain": "safety", "confidence": 0.125}
    assert {key: routes[key] for key in first_routes} == first_routes
    for reward in collect(warehouse, REWARDS):
        if reward["prompt_id"] == name:
            assert (reward["domain"], reward["domain_confidence"]) == ("safety", 0.125)
            assert reward["instruction_id"] is not None


def test_a_prompt_whose_route_failed_is_failed_and_not_remembered(
    spark: SparkSession, tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    folder = tokenizers["smollm2"]
    (label,) = make_smollm2().encode("Safety")
    models = {role: stub(folder, role) for role in ("strong", "weak")}
    models["router"] = stub(folder, "router", extra={"nan_token": label})
    plan = make_plan(tmp_path, make_rows([None]), {"models": models})
    warehouse = Warehouse(spark, plan.config.warehouse)
    assert annotate(plan, warehouse) == 3
    assert collect(warehouse, ROUTES) == collect(warehouse, LOGPROBS) == []
    for reward in collect(warehouse, REWARDS):
        assert (reward["status"], reward["reward"], reward["domain"]) == ("failed", None, None)
        assert reward["error"] == "router: non_finite_logprob"


def test_completions_that_cannot_be_scored_fail_alone_and_the_exit_code_says_so(
    spark: SparkSession, tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    rows = make_rows([None] * 6)
    rows[3]["completion"] += " zebra"  # kills the strong engine
    rows[8]["completion"] += " piano"  # gives it NaN
    tokenizer = make_smollm2()
    (zebra,), (piano,) = (tokenizer.encode(word)[-1:] for word in (" zebra", " piano"))
    knobs = {"kill_token": zebra, "nan_token": piano}
    folder = tokenizers["smollm2"]
    models = {"strong": stub(folder, "strong", extra=knobs), "weak": stub(folder, "weak")}
    plan = make_plan(tmp_path, rows, {"models": models, "routing": {"mode": "none"}})
    warehouse = Warehouse(spark, plan.config.warehouse)
    assert annotate(plan, warehouse) == 3
    rewards = collect(warehouse, REWARDS)
    failed = {row["completion_id"]: row["error"] for row in rewards if row["status"] != "ok"}
    assert set(failed) == {rows[3]["completion_id"], rows[8]["completion_id"]}
    assert failed[rows[3]["completion_id"]].startswith("engine_died_twice")
    assert failed[rows[8]["completion_id"]].startswith("non_finite_logprob")
    assert len(rewards) == 12
    assert len(collect(warehouse, LOGPROBS)) == 2 * 12 - 2, "only scores are stored"
    (run,) = collect(warehouse, RUNS)
    assert run["outcome"] == "over_threshold"


@dataclass(frozen=True)
class Done:
    """A run that is over: its plan and what it left, read at once."""

    plan: AnnotationPlan
    run_id: str
    counts: dict[str, int]
    rewards: list[dict[str, Any]]
    rejects: list[dict[str, Any]]
    logprobs: dict[Key, dict[str, Any]]


DOMAINS = [*["safety"] * 8, *["chat"] * 3]
EDITED = " It is kind, too."


@pytest.fixture(scope="module")
def runs(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Path]
) -> dict[str, Done]:
    """Three runs into one warehouse.

    pmi: by the input's domains. mean: the same terms by the mean, with one exemplar edited, the
    one that most prompts drew. delta: a prompt delta with one domain for all.
    """
    folder = tmp_path_factory.mktemp("runs")
    rows = make_rows([*DOMAINS, "poetry"])
    reward = {
        "models": {
            "strong": stub(tokenizers["smollm2"], "strong"),
            "weak": stub(tokenizers["small"], "weak"),
        },
        "encoding": {"template": "own"},
        "form": "pmi",
        "routing": {"mode": "column"},
    }
    warehouse = Warehouse(spark, str(folder / "warehouse"))

    def run(plan: AnnotationPlan) -> Done:
        assert annotate(plan, warehouse) == 0
        last = max(collect(warehouse, RUNS), key=lambda row: row["started_at"])
        stored = collect(warehouse, LOGPROBS)
        by_key = {
            (r["model_key"], bytes(r["prefix_hash"]), bytes(r["completion_hash"])): r
            for r in stored
        }
        assert len(by_key) == len(stored), "a log-prob stands twice"
        return Done(
            plan,
            last["run_id"],
            last["counts"],
            [r for r in collect(warehouse, REWARDS) if r["reward_key"] == plan.reward.key],
            collect(warehouse, REJECTS),
            by_key,
        )

    done = {"pmi": run(make_plan(folder, rows, reward, store_token_logprobs=True))}
    drawn = Counter(r["exemplar_id"] for r in done["pmi"].rewards if r["exemplar_id"])
    pack = yaml.safe_load(PACK.read_text())
    pack["domains"]["safety"]["exemplars"][drawn.most_common(1)[0][0]]["why"] += EDITED
    edited = folder / "pack.yaml"
    edited.write_text(yaml.safe_dump(pack))
    reward |= {"prompt_pack": str(edited), "reduction": "mean"}
    done["mean"] = run(make_plan(folder, rows, reward))
    reward |= {"form": "prompt_delta", "reduction": "sum"}
    reward["routing"] = {"mode": "fixed", "domain": "safety"}
    done["delta"] = run(make_plan(folder, rows, reward))
    return done


@dataclass(frozen=True)
class Term:
    """A log-prob that a candidate's reward takes in: its question, and its row in the store."""

    key: Key
    question: ScoringGroup
    sum: float
    num_tokens: int


def terms_of(done: Done) -> Iterator[tuple[dict[str, Any], dict[str, Term]]]:
    """Find each candidate's rows in the store by the ids it encodes to, not by what the job says.

    Yields:
        The candidate's row of `rewards`, and its terms by `model/condition`.
    """
    encoder = PromptEncoder(done.plan.reward.encoding)
    roles = {model.model_key: role for role, model in done.plan.reward.models.items()}
    for reward in done.rewards:
        candidate = Candidate(reward["completion_id"], reward["completion"], "stop")
        encoded = encoder.encode(
            reward["prompt"], reward["prompt_hash"], reward["domain"], [candidate]
        )
        terms = {}
        for view in encoded.views:
            question = ScoringGroup(view.prefix_ids, (view.candidates[0].ids,))
            key = (view.model_key, ids_hash(view.prefix_ids), ids_hash(view.candidates[0].ids))
            row = done.logprobs[key]
            name = f"{roles[view.model_key]}/{view.condition}"
            terms[name] = Term(key, question, row["logprob_sum"], row["num_tokens"])
        yield reward, terms


def test_a_column_gives_the_domains_and_refuses_those_it_does_not_know(
    runs: dict[str, Done],
) -> None:
    done = runs["pmi"]
    assert {r["prompt_id"]: r["domain"] for r in done.rewards} == {
        f"p{i}": domain for i, domain in enumerate(DOMAINS)
    }
    assert {(r["domain_source"], r["domain_confidence"]) for r in done.rewards} == {
        ("column", None)
    }
    for reward in done.rewards:
        is_vanilla = reward["domain"] == "chat"
        assert (reward["instruction_id"] is None, reward["exemplar_id"] is None) == (
            (is_vanilla, is_vanilla)
        )
    assert {(r["completion_id"], r["reason"]) for r in done.rejects} == {
        ("p11-0", "unknown_domain"), ("p11-1", "unknown_domain")
    }  # fmt: skip


def test_a_fixed_domain_is_everybodys(runs: dict[str, Done]) -> None:
    done = runs["delta"]
    assert len(done.rewards) == 2 * (len(DOMAINS) + 1)
    assert {(r["domain"], r["domain_source"]) for r in done.rewards} == {("safety", "fixed")}
    assert all(reward["exemplar_id"] for reward in done.rewards)
    assert done.rejects == []


def test_every_form_weighs_the_log_probs_of_the_store_as_the_paper_writes_it(
    runs: dict[str, Done],
) -> None:
    for reward, of in terms_of(runs["pmi"]):
        strong = of["strong/conditioned"].sum - of["strong/unconditional"].sum
        weak = of["weak/conditioned"].sum - of["weak/unconditional"].sum
        assert reward["reward"] == pytest.approx(strong - weak, rel=1e-12)
        assert reward["strong_logprob"] == of["strong/conditioned"].sum
    for reward, of in terms_of(runs["mean"]):
        # Each model by its own count of tokens.
        lengths = {name.split("/")[0]: term.num_tokens for name, term in of.items()}
        assert lengths["weak"] > lengths["strong"]
        strong = of["strong/conditioned"].sum - of["strong/unconditional"].sum
        weak = of["weak/conditioned"].sum - of["weak/unconditional"].sum
        expected = strong / lengths["strong"] - weak / lengths["weak"]
        assert reward["reward"] == pytest.approx(expected, rel=1e-12)
        assert reward["num_tokens"] == lengths["strong"]
    for reward, of in terms_of(runs["delta"]):
        assert set(of) == {"strong/conditioned", "strong/plain"}
        delta = of["strong/conditioned"].sum - of["strong/plain"].sum
        assert reward["reward"] == pytest.approx(delta, rel=1e-12)


def test_the_store_holds_what_the_engine_said_and_every_token_of_it_when_asked_to(
    runs: dict[str, Done],
) -> None:
    done = runs["pmi"]
    specs = {engine.name: engine for engine in done.plan.reward.engines}
    seen = set()
    for _, terms in terms_of(done):
        for term in terms.values():
            row = done.logprobs[term.key]
            ((said,),) = StubEngine(specs[term.key[0]]).score([term.question])
            assert np.array_equal(np.asarray(row["token_logprobs"], np.float32), said)
            assert row["logprob_sum"] == said.sum(dtype=np.float64)
            assert row["num_tokens"] == len(said)
            assert row["num_prefix_tokens"] == len(term.question.prefix_ids)
            seen.add(term.key)
    assert seen == set(done.logprobs), "the store holds what no candidate asks about"
    later = [row for row in runs["delta"].logprobs.values() if row["run_id"] != done.run_id]
    assert {row["token_logprobs"] for row in later} == {None}


def test_an_edited_exemplar_scores_the_prompts_that_drew_it_and_a_new_mean_costs_nothing(
    runs: dict[str, Done],
) -> None:
    before, after = runs["pmi"], runs["mean"]
    drawn = {row["prompt_id"]: row["exemplar_id"] for row in before.rewards}
    assert drawn == {row["prompt_id"]: row["exemplar_id"] for row in after.rewards}
    edited = Counter(filter(None, drawn.values())).most_common(1)[0][0]
    expected = {
        terms[f"{model}/conditioned"].key
        for reward, terms in terms_of(after)
        if reward["exemplar_id"] == edited
        for model in ("strong", "weak")
    }
    prompts = sum(exemplar == edited for exemplar in drawn.values())
    assert 0 < prompts < DOMAINS.count("safety")
    assert len(expected) == prompts * 2 * 2  # candidates, models
    assert after.logprobs.keys() - before.logprobs.keys() == expected
    assert {after.logprobs[key]["run_id"] for key in expected} == {after.run_id}
    assert after.counts["logprobs_scored"] == len(expected)
    assert {key: after.logprobs[key] for key in before.logprobs} == before.logprobs


def test_another_form_scores_only_the_terms_that_are_new(runs: dict[str, Done]) -> None:
    before, after = runs["mean"], runs["delta"]
    given = dict(zip((f"p{i}" for i in range(len(DOMAINS))), DOMAINS, strict=True))
    expected = {
        terms[f"strong/{condition}"].key
        for reward, terms in terms_of(after)
        for condition, is_stored in (
            ("conditioned", given.get(reward["prompt_id"]) == "safety"),
            # T(x) of a vanilla domain is x.
            ("plain", given.get(reward["prompt_id"]) == "chat"),
        )
        if not is_stored
    }
    assert after.logprobs.keys() - before.logprobs.keys() == expected
    assert after.counts["logprobs_scored"] == len(expected) == 2 * (8 + 3 + 2)


def test_a_dry_run_reckons_what_a_model_would_cost_and_neither_loads_nor_writes_anything(
    spark: SparkSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Too large for any machine, and its weights are not there: only its sizes are read.
    model = tmp_path / "model"
    make_smollm2().save_pretrained(model)
    layers, hidden, mlp, heads, vocab = 10_000_000, 4096, 11008, 32, 49152
    sizes = {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": mlp,
        "num_attention_heads": heads, "vocab_size": vocab, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(sizes))
    (model / "model.safetensors").touch()
    reward = {
        "models": {"strong": {"path": str(model), "dtype": "bfloat16"}},
        "form": "prompt_delta",
        "routing": {"mode": "fixed", "domain": "safety"},
    }
    plan = make_plan(tmp_path, make_rows([None] * 3), reward)
    measured = {"bfloat16": 8e12, "float32": 2e12}
    monkeypatch.setattr("cdr.forecast.matmul_flops", measured.__getitem__)
    warehouse = Warehouse(spark, plan.config.warehouse)
    assert dry_run(plan, warehouse) == 0
    printed = capsys.readouterr().out

    encoder = PromptEncoder(plan.reward.encoding)
    views = [
        view
        for i in range(3)
        for view in encoder.encode(
            messages(i),
            prompt_hash(messages(i)),
            "safety",
            [Candidate("", row["completion"], "stop") for row in make_rows([None], i)],
        ).views
    ]
    assert "log-probs    12 asked, 0 in the store (0%), 12 to score in 1 waves" in printed
    prefix = sum(len(view.prefix_ids) for view in views)
    completion = sum(len(candidate.ids) for view in views for candidate in view.candidates)
    # Per token 2 FLOPs for each weight of the layers; attention to half of one's own text and all
    # before it; the head, in float32, on completions only.
    body = 2 * layers * (4 * hidden**2 + 3 * hidden * mlp) * (prefix + completion)
    attended = prefix * prefix / 6 / 2 + completion * (prefix / 6 + completion / 12 / 2)
    attention = 4 * layers * hidden * attended
    head = 2 * hidden * vocab * completion
    for device, bfloat16, float32, efficiency in (
        ("this machine's CPU", 8e12, 2e12, 0.5),
        ("NVIDIA A100", 312e12, 19.5e12, 0.4),
    ):
        seconds = ((body + attention) / bfloat16 + head / float32) / efficiency
        (line,) = [line for line in printed.splitlines() if f"on one {device} " in line]
        (hours,) = re.findall(r"\(([\d.]+) device-hours", line)
        assert float(hours) == pytest.approx(seconds / 3600, abs=0.005)
        assert float(hours) > 1, "too little to compare"
    assert not any(warehouse.exists(table) for table in TABLES)
    assert list((tmp_path / "warehouse").rglob("*.parquet")) == []
