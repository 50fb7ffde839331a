"""The page of an evaluation from values made by hand: what it says and hides, how it judges."""

from __future__ import annotations

import dataclasses
import re

import pandas as pd
import pytest

from cdr.report.evaluation import EvaluationData, measure_margins
from cdr.report.evaluation_page import render_evaluation
from cdr.report.evaluation_verdict import judge_evaluation
from cdr.report.plots import ScoreLine, draw_scores
from cdr.report.verdict import Level
from tests.report_data import (
    IMAGE,
    SCRIPT,
    SECTIONS,
    make_evaluated,
    make_evaluation,
    make_judged,
)
from tests.unit.test_report import Reader


@pytest.fixture(scope="module")
def page() -> Reader:
    return Reader(render_evaluation(make_evaluation()))


def squeeze(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_texts_and_names_are_shown_and_never_run(page: Reader) -> None:
    for text in (SCRIPT, IMAGE, "CDR <i>router</i>", SECTIONS[1]):
        assert text in page.text
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "base"}
    assert page.values("src") == []
    assert {value[:1] for value in page.values("href")} == {"#", "d"}
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in page.values("href") if value.startswith("#")} <= set(ids)


def test_rows_stand_side_by_side_with_interval_verdict_and_published_score(page: Reader) -> None:
    text = squeeze(page.text)
    # 45 of 50, 10 of 50; the mean of sections is absent, as one of them is.
    first = r"plain ratio 90\.0 \(92\.2\)[\d.]+–[\d.]+above chance 20\.0[\d.]+–[\d.]+below chance"
    assert re.search(first, text)
    assert re.search(r"52\.0[\d.]+–[\d.]+not above chance – CDR", text)
    second = r"CDR <i>router</i> 80\.0 \(92\.2\)[\d.]+–[\d.]+above chancemay be length"
    assert re.search(second, text)
    assert "log p strong/conditioned − log p weak/conditioned, sum" in text
    assert "stub-model, adapter s (stub, auto)" in text


def test_differences_from_the_first_row_are_told_where_they_are_sure(page: Reader) -> None:
    # Of 50 pairs each: A wins 45, 10, 26, B wins 40, 45, 45, the same pairs first.
    text = squeeze(page.text)
    assert re.search(r"Chat5090\.080\.0−10\.0−[\d.]+ to −[\d.]+50[\d.]+A", text)
    assert re.search(r"</b>5020\.090\.0\+70\.0\+[\d.]+ to \+[\d.]+035[\d.e-]+B", text)
    assert "not compared, as only one of the two has a verdict" not in text


def test_a_row_has_its_length_routes_margins_reasons_and_surest_pairs(page: Reader) -> None:
    text = squeeze(page.text)
    assert "Chat: surest wins" in text
    assert "Chat: surest losses" in text
    assert "margin −4.50, safety" in text
    assert "Chattoo_long3" in text
    # 10 of 50 pairs of each section went to safety, where chat is right.
    assert "Chat401080%" in text
    assert "−25 to −6" in text
    labels = page.values("aria-label")
    # A plot of every section for both rows: margins of each row, and the rows against each other.
    assert sum(label.startswith("Margins of pairs won") for label in labels) == 6
    assert sum("accuracy of each row" in label for label in labels) == 3
    assert ("p4", "+2.25 nats (strong 1.25, weak −1.00)") in [
        (a["class"], a.get("title")) for tag, a in page.tags if tag == "i"
    ]


def test_without_texts_no_text_is_there() -> None:
    row = make_evaluated("plain", make_judged({"Chat": 45}), texts=False)
    text = Reader(render_evaluation(make_evaluation([row]))).text
    for word in ("Question", "Sure", "Nope", "example.com"):
        assert word not in text
    assert "report.texts: false" in text
    assert "chat-1" in text
    assert "Rows side by side" not in text


def test_a_row_beyond_the_pages_number_names_its_own_page() -> None:
    row = make_evaluated("plain", make_judged({"Chat": 45}))
    data = make_evaluation([dataclasses.replace(row, pairs=None)])
    assert f"jobs/report.py --run {row.run.run_id}" in Reader(render_evaluation(data)).text


def test_an_evaluation_without_a_verdict_has_a_page_too() -> None:
    judged = make_judged({"Chat": 45}, left_out=2).query("status != 'ok'")
    data = make_evaluation([make_evaluated("plain", judged)])
    text = Reader(render_evaluation(data)).text
    assert "There is no verdict" in text
    assert "2 of 2 (too_long 2)" in text


def test_a_name_is_no_formula_and_no_markup_in_a_plot() -> None:
    lines = [ScoreLine("costs $5_{ or $6 <b>日本</b>", 0.5, None), ScoreLine("x" * 60, 0.5, (0, 1))]
    svg = draw_scores(lines, key="k", label="scores")
    assert "costs $5_{ or $6 &lt;b&gt;" in svg
    assert f">{'x' * 25}…<" in svg


def test_margins_are_counted_once_and_the_surer_half_is_told() -> None:
    # |margin| 0.1 to 5.0; the first 45 are won, so of the 25 largest (2.6 to 5.0) 20 are.
    judged = make_judged({"Chat": 45}, left_out=1)
    found = measure_margins(judged, ["Absent", "Chat"])
    assert list(found) == ["Chat"]
    chat = found["Chat"]
    assert (sum(chat.won.counts), sum(chat.lost.counts)) == (45, 5)
    assert chat.surest_won == pytest.approx(20 / 25)
    assert (chat.won_median, chat.lost_median) == (pytest.approx(2.3), pytest.approx(4.8))
    assert measure_margins(pd.DataFrame(judged.query("status != 'ok'")), ["Chat"]) == {}


# --- the verdict ---------------------------------------------------------------------------------


def found(data: EvaluationData, about: str) -> tuple[Level, str]:
    (finding,) = [f for f in judge_evaluation(data).findings if about in f.what]
    return finding.level, finding.what


def test_each_verdict_is_told_once_with_the_rows_it_is_of() -> None:
    data = make_evaluation()
    below = f"plain ratio: {SECTIONS[1]} 20% of 50."
    assert found(data, "Below chance") == (
        Level.STOP, f"Below chance, the worse answers are preferred, or tied: {below}"
    )  # fmt: skip
    level, what = found(data, "Not above chance")
    assert (level, "plain ratio: Maths 52% of 50." in what) == (Level.LOOK, True)
    level, what = found(data, "May be length")
    assert (level, f"CDR <i>router</i>: Chat, {SECTIONS[1]}, Maths." in what) == (Level.LOOK, True)
    assert found(data, "favourite is nearly always")[0] == Level.LOOK
    assert found(data, "Pairs left out") == (
        Level.LOOK, "Pairs left out: plain ratio: 3 of 153 (too_long 3)."
    )  # fmt: skip
    assert found(data, "right domain")[0] == Level.LOOK  # 80 %
    assert judge_evaluation(data).headline.startswith("Do not annotate with this yet: 1 thing")


def test_an_evaluation_without_faults_is_not_warned_of() -> None:
    row = make_evaluated("plain", make_judged({"Chat": 50}), routing={"mode": "none"})
    verdict = judge_evaluation(make_evaluation([row]))
    assert verdict.headline == "Nothing looks wrong"
    assert [f.what for f in verdict.findings] == [
        "Above chance: Chat 100% of 50.", "All 50 pairs were judged."
    ]  # fmt: skip
