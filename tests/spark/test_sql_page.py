"""Every query of docs/how-to/sql.md runs, says the same in Spark and DuckDB, and says what is so.

Expected answers are computed here from the tables' rows, read by neither of the two.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import duckdb
import numpy as np
import pytest
from pyspark.sql import SparkSession

from tests.spark.annotated import REWARD, Annotated

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "sql.md"
TABLES = ("routes", "logprobs", "rewards", "preferences", "unpaired", "rejects", "runs")
SETUP = ("Set up", "Which pairs are there?")
# Its columns are Delta's, and some are only filled on Databricks.
HISTORY = "Which version came from what?"
# On this warehouse nothing failed.
MAY_BE_EMPTY = {"Which candidates have no score this time?"}

Ask = Callable[[str], list[dict[str, Any]]]


@dataclass(frozen=True)
class Block:
    """A fenced block of the page.

    Args:
        heading: the one it stands under.
        language: as the fence says.
        text: its statements.
    """

    heading: str
    language: str
    text: str

    @property
    def is_portable(self) -> bool:
        return "-- Spark only" not in self.text

    @property
    def is_query(self) -> bool:
        return self.language == "sql" and "CREATE" not in self.text


def read_blocks() -> list[Block]:
    found, heading = [], ""
    pieces = re.split(r"^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    # Text and blocks take turns.
    for text, block in zip(pieces[::2], pieces[1::2], strict=False):
        headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
        heading = headings[-1] if headings else heading
        language, _, content = block.partition("\n")
        found.append(Block(heading, language.strip(), content))
    return found


BLOCKS = read_blocks()
QUERIES = {block.heading: block for block in BLOCKS if block.is_query}
by_question = pytest.mark.parametrize("question", QUERIES)
by_portable_question = pytest.mark.parametrize(
    "question", [name for name, block in QUERIES.items() if block.is_portable]
)


def filled(text: str, annotated: Annotated) -> str:
    return text.replace("/full/path/to/warehouse", str(annotated.warehouse)).replace(
        "/full/path/to/input.jsonl", str(annotated.input)
    )


def statements(annotated: Annotated, *, spark: bool) -> list[str]:
    """The page's statements that name things, in order."""
    texts = [
        filled(block.text, annotated)
        for block in BLOCKS
        if block.language == "sql" and not block.is_query and (spark or block.is_portable)
    ]
    return [one for text in texts for one in text.split(";") if one.strip()]


@pytest.fixture(scope="module")
def ask_spark(spark: SparkSession, annotated: Annotated) -> Iterator[Ask]:
    """Put a question of the page to Spark, once: nothing changes the tables."""
    for statement in statements(annotated, spark=True):
        spark.sql(statement)

    @cache
    def ask(question: str) -> list[dict[str, Any]]:
        rows = spark.sql(filled(QUERIES[question].text, annotated)).collect()
        return [row.asDict(recursive=True) for row in rows]

    yield ask
    for name in (*TABLES, "pairs", "candidates"):
        spark.catalog.dropTempView(name)


@pytest.fixture(scope="module")
def ask_duckdb(annotated: Annotated) -> Ask:
    """Put a question of the page to DuckDB, set up by the page's own Python."""
    (code,) = [block.text for block in BLOCKS if block.language == "python"]
    names: dict[str, Any] = {}
    exec(filled(code, annotated), names)
    db: duckdb.DuckDBPyConnection = names["db"]
    for statement in statements(annotated, spark=False):
        db.execute(statement)

    def ask(question: str) -> list[dict[str, Any]]:
        answer = db.execute(QUERIES[question].text)
        columns = [column[0] for column in answer.description or ()]
        return [dict(zip(columns, row, strict=True)) for row in answer.fetchall()]

    return ask


def test_the_page_is_read_whole() -> None:
    blocks = [block for block in BLOCKS if block.language == "sql"]
    assert len(QUERIES) == len([block for block in blocks if block.is_query])
    assert len(QUERIES) >= 25
    assert sum(QUERIES[name].is_portable for name in QUERIES) >= 15
    assert {block.heading for block in blocks if not block.is_query} == set(SETUP)


@by_question
def test_query_gives_rows_in_spark(question: str, ask_spark: Ask) -> None:
    rows = ask_spark(question)
    assert rows or question in MAY_BE_EMPTY
    for name in rows[0] if rows and question != HISTORY else ():
        assert any(row[name] is not None for row in rows), f"{name} is always null"


def same(a: Any, b: Any) -> bool:
    """Whether two engines mean the same: NaN and null, Decimal, int and float, last digits."""
    numbers = [math.nan if value is None else value for value in (a, b)]
    if any(isinstance(value, str | bool) for value in numbers):
        return bool(a == b)
    first, second = (float(value) for value in numbers)
    if math.isnan(first) or math.isnan(second):
        return math.isnan(first) and math.isnan(second)
    # Half a unit of the last digit: a decimal and a binary fraction may round apart.
    return math.isclose(first, second, rel_tol=1e-9, abs_tol=0.011)


@by_portable_question
def test_duckdb_says_the_same(question: str, ask_spark: Ask, ask_duckdb: Ask) -> None:
    ours, theirs = ask_spark(question), ask_duckdb(question)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert list(a) == list(b)
        assert all(same(a[name], b[name]) for name in a), (a, b)


# --- what is so --------------------------------------------------------------------------------


def name_of(domain: str | None) -> str:
    return domain or "none"


def test_margins_by_domain(ask_spark: Ask, annotated: Annotated) -> None:
    margins = defaultdict(list)
    for pair in annotated.latest("preferences"):
        margins[name_of(pair["domain"])].append(pair["margin"])
    rows = ask_spark("How large are the margins, by domain?")
    assert [row["domain"] for row in rows] == sorted(margins)
    for row in rows:
        values = margins[row["domain"]]
        assert row["pairs"] == len(values)
        expected = np.percentile(values, [10, 50, 90])
        assert [row["p10"], row["p50"], row["p90"]] == pytest.approx(expected, abs=0.0051)


def test_prompts_without_a_pair(ask_spark: Ask, annotated: Annotated) -> None:
    outcomes = Counter((name_of(row["domain"]), "pair") for row in annotated.latest("preferences"))
    outcomes += Counter((name_of(r["domain"]), r["reason"]) for r in annotated.latest("unpaired"))
    rows = ask_spark("How many prompts have no pair, and why?")
    assert {(r["domain"], r["outcome"]): r["prompts"] for r in rows} == outcomes
    assert sum(outcomes.values()) == 12  # ten prompts, the twin, and the lonely one
    assert any(reason == "one_candidate" for _, reason in outcomes)
    for row in rows:
        whole = sum(count for (domain, _), count in outcomes.items() if domain == row["domain"])
        assert float(row["share"]) == pytest.approx(row["prompts"] / whole, abs=0.00051)


def test_pairs_that_turn_round_per_token(ask_spark: Ask, annotated: Annotated) -> None:
    turned = defaultdict(list)
    for p in annotated.latest("preferences"):
        chosen = p["chosen_reward"] / p["chosen_num_tokens"]
        turned[name_of(p["domain"])].append(
            chosen < p["rejected_reward"] / p["rejected_num_tokens"]
        )
    for row in ask_spark("How many pairs would turn round per token?"):
        assert float(row["turned_round"]) == pytest.approx(mean(turned[row["domain"]]), abs=0.00051)


def test_the_most_length_driven_pairs_come_first(ask_spark: Ask, annotated: Annotated) -> None:
    gaps = sorted(
        (abs(p["chosen_num_tokens"] - p["rejected_num_tokens"])
         for p in annotated.latest("preferences")), reverse=True
    )  # fmt: skip
    rows = ask_spark("Which pairs are driven by length most?")
    assert [abs(row["extra_tokens"]) for row in rows] == gaps[:20]


def best_of(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The candidate with the highest reward, by prompt; of equals the first by id."""
    best: dict[str, tuple[float, str]] = {}
    for row in rows:
        if row["reward"] is not None:
            key = (-row["reward"], row["completion_id"])
            best[row["prompt_id"]] = min(best.get(row["prompt_id"], key), key)
    return {prompt: completion for prompt, (_, completion) in best.items()}


def rewards_by_run(annotated: Annotated) -> dict[str, list[dict[str, Any]]]:
    """Rows of `rewards` by run, the oldest first: plain, with the pack, with the edited pack."""
    found = defaultdict(list)
    for row in sorted(annotated.rows("rewards"), key=lambda row: row["run_id"]):
        found[row["run_id"]].append(row)
    assert len(found) == 3
    return dict(found)


def test_disagreement_of_two_rewards(ask_spark: Ask, annotated: Annotated) -> None:
    plain, _, ours = rewards_by_run(annotated).values()
    assert {row["reward_name"] for row in ours} == {REWARD}
    a, b = best_of(ours), best_of(plain)
    (row,) = ask_spark("How often do two rewards prefer another candidate?")
    assert row["prompts"] == len(a) == 12
    differ = mean(a[prompt] != b[prompt] for prompt in a)
    assert 0 < differ < 1
    assert float(row["differ"]) == pytest.approx(differ, abs=0.00051)

    other = {(r["prompt_id"], r["completion_id"]): r["reward"] for r in plain}
    turned = {
        p["prompt_id"]
        for p in annotated.latest("preferences")
        if other[p["prompt_id"], p["chosen_id"]] < other[p["prompt_id"], p["rejected_id"]]
    }
    assert turned
    rows = ask_spark("Which of these pairs would the other reward turn round?")
    assert {row["prompt_id"] for row in rows} == turned


def test_what_an_edited_pack_changed(ask_spark: Ask, annotated: Annotated) -> None:
    _, before, after = rewards_by_run(annotated).values()
    old = {(r["prompt_id"], r["completion_id"]): r for r in before}
    moved = Counter(
        row["domain"]
        for row in after
        if row["reward"] != old[row["prompt_id"], row["completion_id"]]["reward"]
    )
    rows = ask_spark("What did the new version of the prompt pack change?")
    assert {row["domain"]: row["moved"] for row in rows if row["moved"]} == moved
    # Only exemplars of `safety` were edited: all that drew one, and nothing else.
    assert set(moved) == {"safety"}
    assert moved["safety"] == sum(row["domain"] == "safety" for row in after)
    assert {row["other_exemplar"] for row in rows} == {0}
    assert sum(row["candidates"] for row in rows) == len(after)


def test_pairs_that_an_edited_pack_changed(ask_spark: Ask, annotated: Annotated) -> None:
    by_run = defaultdict(dict)
    for pair in annotated.rows("preferences"):
        by_run[pair["run_id"]][pair["prompt_id"]] = (pair["chosen_id"], pair["rejected_id"])
    _, before, after = (by_run[run] for run in sorted(by_run))
    changed = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    assert changed
    rows = ask_spark("Which pairs did it change?")
    assert {row["prompt_id"] for row in rows} == changed
    for row in rows:
        assert (row["chosen_now"], row["rejected_now"]) == after[row["prompt_id"]]


def test_thresholds_of_the_router(ask_spark: Ask, annotated: Annotated) -> None:
    routes = annotated.rows("routes")
    last = max(routes, key=lambda row: row["run_id"])["router_key"]
    confidences = [row["confidence"] for row in routes if row["router_key"] == last]
    rows = ask_spark("What would a higher threshold send to the fallback?")
    assert len(rows) == 4
    for row in rows:
        assert row["prompts"] == len(confidences) == 11  # the twin's route is p0's
        assert row["to_fallback"] == sum(c < float(row["threshold"]) for c in confidences)
    least = ask_spark("Which prompts was the router least sure of?")
    assert len(least) == 12
    assert least[0]["confidence"] == pytest.approx(min(confidences), abs=0.00051)


def test_what_the_input_held(ask_spark: Ask) -> None:
    rows = ask_spark("Which rows were rejected, and why?")
    assert {(row["reason"], row["candidates"]) for row in rows} == {
        ("null_completion", 1), ("special_token_in_text", 1)
    }  # fmt: skip
    sources = ask_spark("Where do the rejected rows come from?")
    assert sum(row["candidates"] for row in sources) == 2
    assert {row["source"] for row in sources} <= {"forum", "mail"}
    (twins,) = ask_spark("Which prompts come more than once?")
    assert (twins["ids"], twins["first_id"], twins["last_id"]) == (2, "p0", "twin")
    (tie,) = ask_spark("Which candidates tie?")
    assert (tie["prompt_id"], tie["candidates"], tie["texts"]) == ("p1", 2, 1)


def test_own_columns(ask_spark: Ask, annotated: Annotated) -> None:
    pairs = annotated.latest("preferences")
    sources = ask_spark("How do my own columns go with the margins?")
    text = {p["prompt_id"]: p["prompt"][0]["content"] for p in pairs}
    # The input's own rule: `forum` where the prompt's length is odd.
    expected = Counter("forum" if len(text[p["prompt_id"]]) % 2 else "mail" for p in pairs)
    assert {row["source"]: row["pairs"] for row in sources} == expected
    authors = ask_spark("How do I join a table of my own?")
    assert sum(row["chosen"] for row in authors) == len(pairs)


def test_storage_by_model(ask_spark: Ask, annotated: Annotated) -> None:
    stored = annotated.rows("logprobs")
    rows = ask_spark("How much of the store belongs to which model?")
    assert {r["model"]: (r["logprobs"], r["tokens"]) for r in rows} == {
        model: (
            sum(row["model_key"][:12] == model for row in stored),
            sum(row["num_tokens"] for row in stored if row["model_key"][:12] == model),
        )
        for model in {row["model_key"][:12] for row in stored}
    }
    assert len(rows) == 2
    assert {row["with_every_token"] for row in rows} == {row["logprobs"] for row in rows}
    on_disk = {
        folder.name.removeprefix("model_key=")[:12]: sum(
            file.stat().st_size for file in folder.glob("*.parquet")
        )
        for folder in (annotated.warehouse / "logprobs").glob("model_key=*")
    }
    sizes = ask_spark("How many bytes does each model take?")
    assert {row["model"]: row["bytes"] for row in sizes} == on_disk
    terms = ask_spark("Which model is behind which term of a reward?")
    assert {(row["reward_name"], row["term"].split("/")[0]) for row in terms} == {
        (name, role) for name in ("plain", REWARD) for role in ("strong", "weak")
    }
    assert {row["model"] for row in terms} == set(on_disk)


def test_tokens_add_up_to_the_reward(ask_spark: Ask, annotated: Annotated) -> None:
    widest = max(annotated.latest("preferences"), key=lambda pair: pair["margin"])
    rows = ask_spark("Which tokens make a completion's reward?")
    assert {row["completion_id"] for row in rows} == {widest["chosen_id"]}
    assert [row["position"] for row in rows] == list(range(widest["chosen_num_tokens"]))
    # Each is rounded to three digits.
    total = sum(row["reward"] for row in rows)
    assert total == pytest.approx(widest["chosen_reward"], abs=0.0006 * len(rows))


def test_runs_and_time_travel(ask_spark: Ask, annotated: Annotated) -> None:
    runs = {row["run_id"]: row for row in annotated.rows("runs")}
    rows = ask_spark("How fast was each run?")
    assert [row["run_id"] for row in rows] == sorted(runs)
    for row in rows:
        run = runs[row["run_id"]]
        assert row["tokens"] == run["counts"]["tokens"]
        seconds = (run["ended_at"] - run["started_at"]).total_seconds()
        assert row["seconds"] == pytest.approx(seconds, abs=1.01)
    then = Counter(
        (r["reward_name"], r["run_id"], r["split"]) for r in annotated.rows("preferences", 2)
    )
    now = Counter(
        (r["reward_name"], r["run_id"], r["split"]) for r in annotated.rows("preferences")
    )
    assert then != now
    rows = ask_spark("What did a training run see?")
    assert {(r["reward_name"], r["run_id"], r["split"]): r["pairs"] for r in rows} == then
    versions = ask_spark(HISTORY)
    assert {row["version"] for row in versions} == set(range(annotated.version("preferences") + 1))
