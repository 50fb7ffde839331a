"""The report of whole runs on stub models: its numbers against ones worked out from the rows."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from cdr.config import ReportSpec
from cdr.errors import TableError
from cdr.plan import AnnotationPlan
from cdr.report import build
from cdr.report.annotation_data import AnnotationData
from cdr.report.annotation_gather import RunRows, gather_annotation
from cdr.report.build import rebuild_report, report_command, write_page
from cdr.report.pairs import ShownCandidate
from cdr.report.tokens import TokenRow
from cdr.runs import RunRecord
from cdr.summary import EngineUse, summarize
from cdr.tables import PREFERENCES, REJECTS, REWARDS, RUNS, UNPAIRED, Table
from cdr.warehouse import Warehouse
from jobs.annotate import annotate
from jobs.report import main
from tests.spark.test_stages import collect, make_plan, stub
from tests.tokenizers import CHATML_TEMPLATE, make_small_bpe, make_smollm2

PROMPTS = 14
FILLER = " Ask the council, naïve 🦊 or 日本."


def make_rows() -> list[dict[str, Any]]:
    """Four candidates per prompt, of 1 to 4 sentences; one prompt holds a control token."""
    rows = [
        {
            "prompt_id": f"p{i}",
            "prompt": [{"role": "user", "content": f"Question {i}: <b>may</b> I keep a fox?"}],
            "domain": None,
            "completion_id": f"p{i}-{j}",
            "completion": f"<script>alert({j})</script> is answer {j} to {i}." + FILLER * j,
            "finish_reason": "length" if j == 3 else "stop",
        }
        for i in range(PROMPTS)
        for j in range(4)
    ]
    rows[0] |= {"completion": "<|im_start|>user"}
    return rows


def with_report(plan: AnnotationPlan, **spec: Any) -> AnnotationPlan:
    config = plan.config.model_copy(update={"report": ReportSpec(**spec)})
    return dataclasses.replace(plan, config=config)


@dataclass(frozen=True)
class Run:
    """A finished run: what it printed, its page, and what the page is made of."""

    plan: AnnotationPlan
    warehouse: Warehouse
    printed: str
    page: str
    data: AnnotationData

    @property
    def run_id(self) -> str:
        return self.data.run.run_id


@pytest.fixture(scope="module")
def run(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Weak counts tokens its own way; strong is asked twice, so two terms share their tokens."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("smollm2", "small")}
    make_smollm2().save_pretrained(folders["smollm2"])
    special = ("<|im_end|>", "<|im_start|>")
    make_small_bpe(CHATML_TEMPLATE, special=special).save_pretrained(folders["small"])
    folder = tmp_path_factory.mktemp("run")
    reward = {
        "models": {
            "strong": stub(folders["smollm2"], "strong"),
            "weak": stub(folders["small"], "weak"),
            "router": stub(folders["smollm2"], "router"),
        },
        "form": "custom",
        "terms": [
            {"model": "strong", "condition": "conditioned", "weight": 1.0},
            {"model": "strong", "condition": "plain", "weight": -0.5},
            {"model": "weak", "condition": "conditioned", "weight": -0.5},
        ],
        "routing": {"mode": "adaptive"},
    }
    plan = make_plan(folder, make_rows(), reward, store_token_logprobs=True)
    plan = with_report(plan, pairs_per_domain=3)
    warehouse = Warehouse(spark, plan.config.warehouse)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        assert annotate(plan, warehouse) == 0
    (row,) = collect(warehouse, RUNS)
    (path,) = (folder / "warehouse/reports").iterdir()
    frames = {t: warehouse.read(t) for t in (REWARDS, PREFERENCES, REJECTS, UNPAIRED)}
    summary = summarize(
        frames[REWARDS], frames[REJECTS], frames[PREFERENCES], frames[UNPAIRED],
        asked=0, scored=0, tokens=0, scoring_s=0, engines=EngineUse(), wall_s=0,
    )  # fmt: skip
    rows = RunRows(frames[REWARDS], frames[PREFERENCES], frames[REJECTS])
    record = RunRecord(**row)
    data = gather_annotation(
        rows, warehouse, plan.config, record, summary, plan.reward, rebuild="again"
    )
    return Run(plan, warehouse, printed.getvalue(), path.read_text(encoding="utf-8"), data)


def rows_of(run: Run, table: Table, domain: str | None = None) -> list[dict[str, Any]]:
    rows = [row for row in collect(run.warehouse, table) if row.get("status", "ok") == "ok"]
    return rows if domain is None else [row for row in rows if row["domain"] == domain]


def test_a_run_prints_where_its_page_is(run: Run) -> None:
    page = f"{run.plan.config.warehouse}/reports/{run.run_id}.html"
    assert f"report: {page}" in run.printed
    assert "warning" not in run.printed
    assert Path(page).read_text(encoding="utf-8") == run.page


def test_length_effect_and_sides_are_those_of_the_rows(run: Run) -> None:
    assert set(run.data.domains) == {row["domain"] for row in rows_of(run, REWARDS)}
    for name, domain in run.data.domains.items():
        by_prompt: dict[str, list[tuple[int, float]]] = {}
        for row in rows_of(run, REWARDS, name):
            by_prompt.setdefault(row["prompt_id"], []).append((row["num_tokens"], row["reward"]))
        deviations = np.concatenate(
            [np.array(points) - np.mean(points, axis=0) for points in by_prompt.values()]
        )
        x, y = deviations.T
        assert domain.effect.slope == pytest.approx(np.polyfit(x, y, 1)[0])
        assert domain.effect.share == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)

        ends = [row["finish_reason"] for row in rows_of(run, REWARDS, name)]
        assert domain.cut == ends.count("length") > 0

        pairs = rows_of(run, PREFERENCES, name)
        lengths = [(pair["rejected_num_tokens"], pair["chosen_num_tokens"]) for pair in pairs]
        sides = Counter(np.sign(chosen - rejected) for rejected, chosen in lengths)
        found = domain.lengths
        assert (found.longer, found.shorter, found.equal) == (sides[1], sides[-1], sides[0])
        assert Counter(found.sample) == Counter(lengths), "fewer than a sample: all are drawn"
        assert domain.small_margins == sum(pair["margin"] < 1 for pair in pairs)


def test_histograms_count_every_row_once(run: Run) -> None:
    for name, domain in run.data.domains.items():
        for found, values in (
            (domain.rewards, [row["reward"] for row in rows_of(run, REWARDS, name)]),
            (domain.margins, [row["margin"] for row in rows_of(run, PREFERENCES, name)]),
        ):
            assert found is not None
            inside = np.clip(values, found.low + 1e-9, found.high - 1e-9)
            edges = np.linspace(found.low, found.high, len(found.counts) + 1)
            assert list(found.counts) == np.histogram(inside, edges)[0].tolist()
        confidence = {
            row["prompt_id"]: row["domain_confidence"] for row in rows_of(run, REWARDS, name)
        }
        assert domain.confidence is not None
        edges = np.linspace(0, 1, 21)
        expected = np.histogram(list(confidence.values()), edges)[0].tolist()
        assert list(domain.confidence.counts) == expected
        assert domain.routed == len(confidence)
        assert domain.unsure == sum(value < 0.5 for value in confidence.values())
    assert dict(run.data.rejects) == {("encode", "special_token_in_text"): 1}


def test_pairs_are_the_same_few_every_time_and_the_least_sure_come_first(run: Run) -> None:
    for name, shown in run.data.pairs.items():
        pairs = rows_of(run, PREFERENCES, name)
        assert len(shown) == min(3, len(pairs))
        assert {pair.prompt_id for pair in shown} <= {pair["prompt_id"] for pair in pairs}
        # Drawn by hash of the prompt: neither by place nor by margin.
        again = run.warehouse.read(PREFERENCES).where(F.col("domain") == name).repartition(5)
        draw = F.sha2(F.concat(F.lit("report:"), F.col("prompt_hash")), 256)
        first = again.orderBy(draw).limit(3).select("prompt_id").collect()
        assert [pair.prompt_id for pair in shown] == [row[0] for row in first]
    margins = sorted(pair["margin"] for pair in rows_of(run, PREFERENCES))
    assert [pair.margin for pair in run.data.unsure_pairs] == margins[:10]


def test_tokens_add_up_to_the_reward_and_spell_the_completion(run: Run) -> None:
    assert run.data.tokens_missing is None
    sides = [
        side
        for shown in (*run.data.pairs.values(), run.data.unsure_pairs)
        for pair in shown
        for side in (pair.chosen, pair.rejected)
    ]
    assert len(sides) > 10
    ends = {row["completion_id"]: row["finish_reason"] for row in rows_of(run, REWARDS)}
    for side in sides:
        strong, weak = side.tokens
        assert strong.terms == ("strong/conditioned", "strong/plain")
        assert weak.terms == ("weak/conditioned",)
        # A token's log-prob is kept as float32, the sum as double.
        assert total(side.tokens) == pytest.approx(side.reward, abs=1e-3)
        for name, value in side.terms.items():
            (row,) = (row for row in side.tokens if name in row.terms)
            column = row.terms.index(name)
            assert sum(p.logprobs[column] for p in row.pieces) == pytest.approx(value, abs=1e-3)
        spelled = "".join(piece.text for piece in strong.pieces)
        assert spelled.removesuffix("<|im_end|>") == side.text
        assert spelled.endswith("<|im_end|>") == (ends[side.completion_id] == "stop")


def total(rows: Sequence[TokenRow]) -> float:
    return sum(sum(piece.reward for piece in row.pieces) + row.rest_reward for row in rows)


def test_texts_of_the_tables_are_text_in_the_page(run: Run) -> None:
    assert "<script" not in run.page
    assert "<b>may</b>" not in run.page
    first = next(iter(run.data.pairs.values()))[0]
    assert first.prompt is not None
    assert html.escape(first.prompt[0]["content"]) in run.page


def lines_that_differ(one: str, other: str) -> set[str]:
    first, second = one.splitlines(), other.splitlines()
    assert len(first) == len(second)
    changed = [a for a, b in zip(first, second, strict=True) if a != b]
    return {re.sub(r"<[^>]+>", " ", line).split()[0] for line in changed}


def test_the_page_can_be_built_again_with_and_without_texts(
    run: Run, spark: SparkSession, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run.plan.config.warehouse
    path = Path(rebuild_report(spark, root))
    again = path.read_text(encoding="utf-8")
    # Of a run of seconds, the time of scoring is only known in whole ones.
    assert lines_that_differ(run.page, again) <= {"wall", "scoring"}

    assert main(["--warehouse", root, "--run", run.run_id, "--without-texts"]) == 0
    assert f"report: {path}" in capsys.readouterr().out
    bare = path.read_text(encoding="utf-8")
    assert "Question" not in bare
    assert "council" not in bare
    assert all(pair.prompt_id in bare for pair in run.data.unsure_pairs)
    path.write_text(run.page, encoding="utf-8")


def test_without_kept_tokens_or_models_the_page_says_why(run: Run) -> None:
    changed = run.plan.config.model_copy(update={"report": ReportSpec()})
    frames = {t: run.warehouse.read(t) for t in (REWARDS, PREFERENCES, REJECTS)}
    rows = RunRows(frames[REWARDS], frames[PREFERENCES], frames[REJECTS])
    data = gather_annotation(
        rows, run.warehouse, changed, run.data.run, run.data.summary, None, rebuild="again"
    )
    assert data.tokens_missing is not None
    assert "not on this machine" in data.tokens_missing
    (first, *_) = data.unsure_pairs
    assert isinstance(first.chosen, ShownCandidate)
    assert first.chosen.text is not None
    assert first.chosen.tokens == ()


def test_a_page_that_fails_costs_the_run_nothing_and_a_later_run_replaces_the_rows(
    run: Run,
    spark: SparkSession,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(_: object) -> str:
        raise RuntimeError("no ink")

    monkeypatch.setattr(build, "render_annotation", refuse)
    assert annotate(run.plan, run.warehouse) == 0
    captured = capsys.readouterr()
    (later,) = {row["run_id"] for row in collect(run.warehouse, REWARDS)}
    assert later != run.run_id
    assert "RuntimeError: no ink" in captured.err
    assert report_command(run.warehouse, later) in captured.err
    assert "report:" not in captured.out
    outcomes = {row["run_id"]: row["outcome"] for row in collect(run.warehouse, RUNS)}
    assert outcomes[later] == "done"

    with pytest.raises(TableError, match=f"has replaced them; runs with rows: {later}"):
        rebuild_report(spark, run.plan.config.warehouse, run_ids=[run.run_id])
    with pytest.raises(
        TableError, match=f"no annotate or evaluate run 'x' .*: {later}, {run.run_id}"
    ):
        rebuild_report(spark, run.plan.config.warehouse, run_ids=["x"])


def test_a_page_goes_into_the_file_system_that_holds_the_tables(
    spark: SparkSession, tmp_path: Path
) -> None:
    # One that is no local folder to Python; Hadoop looks up where it is mounted.
    spark._jsc.hadoopConfiguration().set("fs.viewfs.mounttable.t.link./data", tmp_path.as_uri())
    page = "<p>naïve 🦊</p>\n" * 1000
    place = write_page(Warehouse(spark, "viewfs://t/data"), ["run-1"], page)
    assert place == "viewfs://t/data/reports/run-1.html"
    assert (tmp_path / "reports/run-1.html").read_text(encoding="utf-8") == page
