"""Evaluations on stub models, in one session: pairs in, verdicts out, nothing lost on the way."""

from __future__ import annotations

import html
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyspark.sql import SparkSession

from cdr.comparison import load_judged
from cdr.errors import InputError, TableError
from cdr.evaluation_config import EvaluateConfig
from cdr.evaluation_plan import EvaluationPlan, make_sample, plan_evaluation
from cdr.labelled_pairs import load_pairs, split_pairs
from cdr.scoring_run import make_context
from cdr.tables import BENCHMARK_PAIRS, BENCHMARK_RESULTS, LOGPROBS, REJECTS, REWARDS, RUNS, Table
from cdr.warehouse import Warehouse
from jobs.evaluate import dry_run, evaluate, main
from jobs.report import main as report
from tests.tokenizers import make_smollm2

ROOT = Path(__file__).resolve().parents[2]
PACK = ROOT / "conf" / "prompts" / "cdr-v1.yaml"
SHARED = Path(os.environ.get("CDR_SHARED", ROOT.parent / "shared")) / "data" / "pairs"
REWARDBENCH = {"subset": "subset", "id": "id"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_smollm2().save_pretrained(folder)
    return folder


def pair(subset: str, number: int, **changes: Any) -> dict[str, Any]:
    """A pair in RewardBench's columns; its ids start anew in each subset, as RewardBench's do."""
    return {
        "id": number,
        "subset": subset,
        "prompt": f"Question {number} of {subset}: may I keep a fox?",
        "chosen": f"Answer to {number} of {subset}." + " Ask the council." * (number % 3),
        "rejected": f"Nobody knows {number} of {subset}." + " No." * (number % 4),
        "chosen_model": "someone",
        **changes,
    }


def make_config(
    folder: Path,
    tokenizer: Path,
    pairs: Sequence[dict[str, Any]],
    columns: dict[str, str],
    **changes: Any,
) -> EvaluateConfig:
    source = folder / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    models = {
        role: {"path": str(tokenizer), "engine": "stub", "adapter": role, "tuned_from": "weak"}
        for role in ("strong", "weak", "router")
    }
    return EvaluateConfig.model_validate(
        {
            "dataset": "bench",
            "warehouse": str(folder / "warehouse"),
            "input": {"path": str(source), "format": "json", "columns": columns},
            "reward": {"name": "r", "models": models, "prompt_pack": str(PACK)},
            "run": {"max_rejected_fraction": 1},
            "statistics": {"resamples": 200},
            "tracking": {"enabled": False},
            "report": {"enabled": False},
            **changes,
        }
    )


def collect(warehouse: Warehouse, table: Table) -> list[dict[str, Any]]:
    return [row.asDict(recursive=True) for row in warehouse.read(table).collect()]


GOOD = [
    *[pair("alpacaeval-easy", number) for number in range(3)],
    *[pair("refusals-dangerous", number) for number in range(3)],
    *[pair("math-prm", number) for number in range(4)],
    *[pair("hep-go", number) for number in range(2)],
]
BAD = {
    "poetry/0": (pair("poetry", 0), "unknown_subset"),
    "hep-go/7": (pair("hep-go", 7, rejected=pair("hep-go", 7)["chosen"]), "equal_completions"),
    "hep-go/8": (pair("hep-go", 8, rejected=None), "null_completion"),
    "hep-go/9": (pair("hep-go", 9, chosen="Yes.<|im_end|>"), "special_token_in_text"),
}
PLAIN = {"change": {"routing": {"mode": "none"}}}


@dataclass(frozen=True)
class Done:
    """An evaluation of a reward and its oracle, the first of them done twice; tables after each.

    The page is the first job's, which shows both.
    """

    config: EvaluateConfig
    plans: list[EvaluationPlan]
    warehouse: Warehouse
    tables: list[dict[str, list[dict[str, Any]]]]
    output: str
    page: Path

    @property
    def run_ids(self) -> list[str]:
        """Of the reward, of its oracle, and of the reward again."""
        return sorted(row["run_id"] for row in self.tables[1]["runs"])


@pytest.fixture(scope="module")
def done(
    spark: SparkSession,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: Path,
) -> Done:
    import contextlib
    import io

    rows = [*GOOD, *(row for row, _ in BAD.values())]
    config = make_config(
        tmp_path_factory.mktemp("run"), tokenizer, rows, REWARDBENCH,
        rows={"cdr": {"title": "CDR, router", "printed": {"Chat": 92.2}}},
        run={"max_rejected_fraction": 1, "store_token_logprobs": True},
        report={"pairs_per_section": 1},
    )  # fmt: skip
    plans = plan_evaluation(config, with_oracle=True)
    warehouse = Warehouse(spark, config.warehouse)
    tables, printed = [], io.StringIO()
    with contextlib.redirect_stdout(printed):
        for todo in (plans, plans[:1]):
            assert evaluate(todo, warehouse) == 0
            found = (BENCHMARK_PAIRS, BENCHMARK_RESULTS, LOGPROBS, REWARDS, REJECTS, RUNS)
            tables.append({table.name: collect(warehouse, table) for table in found})
    (page,) = Path(config.warehouse, "reports").glob("*-and-1-more-*.html")
    return Done(config, plans, warehouse, tables, printed.getvalue(), page)


def test_every_pair_comes_back_under_every_reward_with_a_verdict_or_a_reason(done: Done) -> None:
    keys = {plan.annotation.reward.key: plan.name for plan in done.plans}
    assert list(keys.values()) == ["cdr", "cdr.oracle"]
    pairs = done.tables[0]["benchmark_pairs"]
    assert Counter(keys[row["reward_key"]] for row in pairs) == dict.fromkeys(
        keys.values(), len(GOOD) + len(BAD)
    )
    for key in keys:
        left_out = {
            row["prompt_id"]: row["reason"]
            for row in pairs
            if row["reward_key"] == key and row["status"] != "ok"
        }
        assert left_out == {name: reason for name, (_, reason) in BAD.items()}
    assert {row["section"] for row in pairs if row["prompt_id"] == "poetry/0"} == {"unknown"}
    assert all(row["outcome"] is None for row in pairs if row["status"] != "ok")


def test_a_verdict_is_the_strict_comparison_of_the_rewards_table(done: Done) -> None:
    rewards = {
        (row["reward_key"], row["prompt_id"], row["completion_id"]): row
        for row in done.tables[0]["rewards"]
    }
    judged = [row for row in done.tables[0]["benchmark_pairs"] if row["status"] == "ok"]
    assert len(judged) == 2 * len(GOOD)
    for row in judged:
        chosen, rejected = (rewards[row["reward_key"], row["prompt_id"], w] for w in ("a", "b"))
        original = next(p for p in GOOD if f"{p['subset']}/{p['id']}" == row["prompt_id"])
        assert (chosen["completion"], rejected["completion"]) == (
            original["chosen"], original["rejected"]
        )  # fmt: skip
        margin = chosen["reward"] - rejected["reward"]
        assert row["margin"] == margin
        assert row["outcome"] == ("win" if margin > 0 else "tie" if margin == 0 else "loss")
        lengths = (row["chosen_num_tokens"], row["rejected_num_tokens"])
        assert lengths == (chosen["num_tokens"], rejected["num_tokens"])


def test_results_are_the_weighted_shares_of_the_stored_pairs(done: Done) -> None:
    for plan in done.plans:
        key = plan.annotation.reward.key
        results = {
            (row["level"], row["name"]): row
            for row in done.tables[0]["benchmark_results"]
            if row["reward_key"] == key
        }
        wins: Counter[str] = Counter()
        for row in done.tables[0]["benchmark_pairs"]:
            if row["reward_key"] == key:
                wins[row["subset"]] += row["outcome"] == "win"
        expected = (984 * wins["math-prm"] / 4 + 164 * wins["hep-go"] / 2) / (984 + 164)
        reasoning = results["section", "Reasoning"]
        assert reasoning["accuracy"] == pytest.approx(expected)
        assert reasoning["ci_low"] <= reasoning["accuracy"] <= reasoning["ci_high"]
        assert (reasoning["pairs"], reasoning["left_out"]) == (6, 3)
        assert results["section", "Chat Hard"]["accuracy"] is None
        assert results["overall", "mean of sections"]["accuracy"] is None
        assert results["overall", "all pairs"]["wins"] == wins.total()


def test_the_oracle_gives_each_section_its_domain(done: Done) -> None:
    oracle = done.plans[1].annotation.reward.key
    domains = {
        row["section"]: row["domain"]
        for row in done.tables[0]["benchmark_pairs"]
        if row["reward_key"] == oracle and row["status"] == "ok"
    }
    assert domains == {"Chat": "chat", "Safety": "safety", "Reasoning": "math_code"}
    assert "router audit" in done.output
    assert "accuracy lost against the oracle" in done.output
    assert "A = CDR, router\nB = cdr.oracle" in done.output


def test_rewards_share_the_store_and_a_second_run_scores_nothing(done: Done) -> None:
    first, second = done.tables
    stored = first["logprobs"]
    keys = {(r["model_key"], r["prefix_hash"], r["completion_hash"]) for r in stored}
    assert len(keys) == len(stored)
    counts = {row["run_id"]: row["counts"] for row in second["runs"]}
    in_order = [counts[run_id] for run_id in sorted(counts)]
    assert len(in_order) == 3
    # Two models; of two pairs one answer is refused, and the other scored.
    everything = 2 * (2 * len(GOOD) + 2)
    assert in_order[0]["logprobs_scored"] == everything
    # Where the router was right, the oracle's questions are in the store.
    oracle = done.plans[0].oracle
    right = {
        row["prompt_id"]
        for row in first["benchmark_pairs"]
        if row["reward_name"] == "cdr" and row["domain"] == oracle.get(row["section"], "none")
    }
    assert 0 < len(right) < len(GOOD)
    assert in_order[1]["logprobs_asked"] == everything
    assert in_order[1]["logprobs_scored"] == everything - sum(
        2 * (2 if name in {f"{p['subset']}/{p['id']}" for p in GOOD} else 1) for name in right
    )
    assert in_order[2]["logprobs_scored"] == 0
    assert len(second["logprobs"]) == len(stored)
    assert len(second["benchmark_pairs"]) == len(first["benchmark_pairs"])


def test_stored_pairs_are_found_by_name_or_key(done: Done) -> None:
    key = done.plans[0].annotation.reward.key
    by_name = load_judged(done.warehouse, "bench", "cdr")
    by_key = load_judged(done.warehouse, "bench", key[:12])
    assert by_name.equals(by_key)
    assert len(by_name) == len(GOOD) + len(BAD)
    with pytest.raises(InputError) as caught:
        load_judged(done.warehouse, "bench", "other")
    assert "evaluated here: cdr, cdr.oracle" in str(caught.value)


def test_a_dry_run_says_what_is_left_and_writes_nothing(
    done: Done, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(done.plans[:1], done.warehouse) == 0
    assert "(100%)" in capsys.readouterr().out
    assert len(collect(done.warehouse, RUNS)) == 3


def test_compare_prints_what_is_stored_and_scores_nothing(
    done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "evaluate.yaml"
    config.write_text(yaml.safe_dump(done.config.model_dump(mode="json", exclude_unset=True)))
    assert main(["--config", str(config), "--compare", "cdr", "cdr.oracle"]) == 0
    text = capsys.readouterr().out
    assert "A = cdr\nB = cdr.oracle" in text
    assert f"{len(GOOD)}" in next(line for line in text.splitlines() if "all pairs" in line)
    assert len(collect(done.warehouse, RUNS)) == 3


# --- the page ----------------------------------------------------------------------------------


def test_the_page_shows_both_rows_and_the_surest_pairs_of_each(done: Done) -> None:
    assert f"report: {done.page}\n" in done.output
    assert done.page.name.startswith(f"{done.run_ids[0]}-and-1-more-")
    page = done.page.read_text(encoding="utf-8")
    titles = [html.unescape(title) for title in re.findall(r'<h2 id="row-\d">(.*?)</h2>', page)]
    assert titles == ["CDR, router", "cdr.oracle"]
    rows = re.split(r'<h2 id="row-\d">', page)[1:]
    for shown, run_id in zip(rows, done.run_ids, strict=False):
        ours = [row for row in done.tables[0]["benchmark_pairs"] if row["run_id"] == run_id]
        for section in ("Chat", "Safety", "Reasoning"):
            margins = {
                row["prompt_id"]: row["margin"]
                for row in ours
                if row["section"] == section and row["status"] == "ok"
            }
            for kind, extreme in (
                ("wins", max(margins.values())),
                ("losses", min(margins.values())),
            ):
                is_one = extreme > 0 if kind == "wins" else extreme < 0
                heading = f"<h4>{section}: surest {kind}</h4>"
                assert (heading in shown) == is_one
                if is_one:
                    (first,) = [name for name, margin in margins.items() if margin == extreme]
                    text = shown.partition(heading)[2]
                    assert re.findall(r"prompt <code>(.*?)</code>", text)[0] == first
    # Every reason and every answer's tokens: colours stand where log-probs of tokens were kept.
    for _, reason in BAD.values():
        assert f'<th scope="row">{reason}</th>' in page
    assert "without colours" not in page
    assert re.search(r'<i class="[pn]\d" title="[+−]', page)
    assert "(92.2)" in page


def test_the_page_is_built_again_from_the_tables(
    done: Done, capsys: pytest.CaptureFixture[str]
) -> None:
    root, (first, oracle, again) = done.config.warehouse, done.run_ids
    single = Path(root, "reports", f"{again}.html")
    made = single.read_text(encoding="utf-8")
    assert report(["--warehouse", root, "--run", again]) == 0
    assert single.read_text(encoding="utf-8") == made, "as the run itself has made it"

    # The last run of each reward, in the order they began.
    assert report(["--warehouse", root, "--evaluation", "--without-texts"]) == 0
    (path,) = Path(root, "reports").glob(f"{oracle}-and-1-more-*.html")
    assert f"report: {path}" in capsys.readouterr().out
    bare = path.read_text(encoding="utf-8")
    assert bare.index("cdr.oracle</h2>") < bare.index("CDR, router</h2>")
    assert "Question" not in bare
    assert "council" not in bare

    with pytest.raises(TableError, match=f"'{first}' has no rows in 'benchmark_pairs'"):
        report(["--warehouse", root, "--run", first, oracle])
    with pytest.raises(TableError, match="benchmarks evaluated here: bench"):
        report(["--warehouse", root, "--evaluation", "other"])


# --- reading pairs, without scoring ------------------------------------------------------------


def read(spark: SparkSession, config: EvaluateConfig, **sample: Any) -> list[dict[str, Any]]:
    wanted = make_sample(config, limit=sample.get("limit"), quick=sample.get("quick", False))
    (plan,) = plan_evaluation(config, sample=wanted)
    context = make_context(plan.annotation, Warehouse(spark, config.warehouse))
    with context.staging:
        return [row.asDict(recursive=True) for row in load_pairs(plan, context).collect()]


def test_quick_takes_equal_shares_of_sections_and_subsets(
    spark: SparkSession, tmp_path: Path, tokenizer: Path
) -> None:
    rows = [pair("alpacaeval-easy", n) for n in range(20)]
    rows += [pair("math-prm", n) for n in range(20)] + [pair("hep-go", n) for n in range(10)]
    rows += [pair("donotanswer", n) for n in range(2)]
    config = make_config(
        tmp_path, tokenizer, rows, REWARDBENCH, rows={"plain": PLAIN}, quick={"pairs": 14}
    )
    drawn = read(spark, config, quick=True)
    assert Counter(row["subset"] for row in drawn) == {
        "alpacaeval-easy": 6, "math-prm": 3, "hep-go": 3, "donotanswer": 2
    }  # fmt: skip
    assert drawn == read(spark, config, quick=True)
    other = config.model_copy(update={"quick": config.quick.model_copy(update={"seed": 1})})
    assert drawn != read(spark, other, quick=True)
    assert len(read(spark, config, limit=5)) == 5


def test_pairs_of_any_table_need_no_section_and_no_id(
    spark: SparkSession, tmp_path: Path, tokenizer: Path
) -> None:
    def answer(text: str, role: str = "assistant") -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    prompt = [{"role": "user", "content": "Which?"}]
    rows = [
        {"ask": prompt, "good": answer("this"), "bad": answer("that")},
        {"ask": prompt, "good": answer("this"), "bad": answer("that")},
        {"ask": prompt, "good": answer("this"), "bad": answer("that", "user")},
    ]
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    found = read(spark, make_config(tmp_path, tokenizer, rows, columns))
    assert {row["section"] for row in found} == {"All"}
    (broken,) = [row for row in found if row["reason"]]
    assert broken["reason"] == "bad_messages"
    first, second = sorted(row["prompt_id"] for row in found if not row["reason"])
    assert second == f"{first}-2"
    assert {(row["chosen"], row["rejected"]) for row in found if not row["reason"]} == {
        ("this", "that")
    }


def test_a_column_names_sections_and_others_are_refused(
    spark: SparkSession, tmp_path: Path, tokenizer: Path
) -> None:
    rows = [{**pair("x", n), "topic": topic} for n, topic in enumerate(["Law", "Care", None])]
    config = make_config(tmp_path, tokenizer, rows, {"section": "topic"}, sections=["Law"])
    found = {row["section"]: row["reason"] for row in read(spark, config)}
    assert found == {"Law": None, "Care": "unknown_section", "unknown": "unknown_section"}


def test_a_table_of_another_shape_is_refused_with_what_to_do(
    spark: SparkSession, tmp_path: Path, tokenizer: Path
) -> None:
    with pytest.raises(InputError) as lacks:
        read(spark, make_config(tmp_path, tokenizer, [{"text": "x"}], {}))
    assert "lacks the columns ['prompt', 'chosen', 'rejected']" in str(lacks.value)
    assert "input.columns.chosen=good" in str(lacks.value)
    rows = [pair("poetry", n) for n in range(3)]
    with pytest.raises(InputError) as unfit:
        read(spark, make_config(tmp_path, tokenizer, rows, REWARDBENCH))
    assert "no pair of the input fits: unknown_subset 3" in str(unfit.value)
    assert "input.columns.section" in str(unfit.value)


@pytest.mark.shared
def test_real_pairs_come_back_whole_and_are_judged(
    spark: SparkSession, tmp_path: Path, tokenizer: Path
) -> None:
    files = sorted(SHARED.glob("*.jsonl"))
    if not files:
        pytest.skip(f"no preference pairs at {SHARED}; CDR_SHARED names the folder above data/")
    texts = [line for file in files for line in file.read_text("utf-8").split("\n") if line]
    lines = [json.loads(text) for text in texts]
    config = make_config(
        tmp_path, tokenizer, [], {"section": "section", "subset": "subset", "id": "id"},
        quick={"pairs": 24}, rows={"plain": PLAIN},
    )  # fmt: skip
    source = config.input.model_copy(update={"path": f"{SHARED}/*.jsonl"})
    config = config.model_copy(update={"input": source})
    found = read(spark, config)
    assert Counter((row["section"], row["subset"]) for row in found) == Counter(
        (line["section"], line["subset"]) for line in lines
    )
    assert len({row["prompt_id"] for row in found}) == len(lines)
    (plan,) = plan_evaluation(config, sample=make_sample(config, limit=None, quick=True))
    warehouse = Warehouse(spark, config.warehouse)
    assert evaluate([plan], warehouse) == 0
    pairs = collect(warehouse, BENCHMARK_PAIRS)
    assert Counter(row["section"] for row in pairs) == dict.fromkeys(
        ("Chat", "Chat Hard", "Safety", "Reasoning"), 6
    )


def test_candidates_of_a_pair_that_does_not_fit_have_its_reason(
    spark: SparkSession, tmp_path: Path, tokenizer: Path
) -> None:
    config = make_config(tmp_path, tokenizer, [GOOD[0], BAD["hep-go/7"][0]], REWARDBENCH)
    plan = plan_evaluation(config)[0]
    context = make_context(plan.annotation, Warehouse(spark, config.warehouse))
    with context.staging:
        rows = split_pairs(load_pairs(plan, context), context).collect()
    assert {(row["prompt_id"], row["completion_id"]): row["reason"] for row in rows} == {
        ("alpacaeval-easy/0", "a"): None,
        ("alpacaeval-easy/0", "b"): None,
        ("hep-go/7", "a"): "equal_completions",
        ("hep-go/7", "b"): "equal_completions",
    }
