"""A benchmark's report and comparisons from judged pairs, the arithmetic worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cdr.accuracy import compute_wilson_interval
from cdr.benchmark_plots import draw_report
from cdr.benchmark_report import ALL_PAIRS, JUDGED_COLUMNS, MEAN_OF_SECTIONS, Report, score_pairs
from cdr.comparison import audit_router, compare_judged, render_rows
from cdr.errors import InputError
from cdr.rewardbench import PRIOR_SETS, SECTIONS

ALL_SECTIONS = (*SECTIONS, PRIOR_SETS)


def pair(
    section: str,
    subset: str,
    margin: float | None,
    difference: int = 0,
    domain: str | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    """A judged pair; one without a margin was left out for the reason."""
    ok = margin is not None
    return {
        "section": section,
        "subset": subset,
        "domain": domain,
        "domain_source": "router" if domain else "none",
        "margin": margin,
        "chosen_num_tokens": 1000 + difference if ok else None,
        "rejected_num_tokens": 1000 if ok else None,
        "status": "ok" if ok else "rejected",
        "reason": reason,
    }


def judged(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    named = [{"prompt_id": f"{number:04d}", **row} for number, row in enumerate(rows)]
    return pd.DataFrame(named, columns=list(JUDGED_COLUMNS))


def score(rows: Sequence[dict[str, Any]], sections: Sequence[str] = ALL_SECTIONS) -> Report:
    return score_pairs(judged(rows), sections, resamples=2000, seed=0)


REASONING = [
    *[pair("Reasoning", "math-prm", 1.0)] * 1,
    *[pair("Reasoning", "math-prm", -1.0)] * 3,
    *[pair("Reasoning", "hep-cpp", 1.0)] * 4,
]


def test_a_section_weighs_its_subsets_as_rewardbench_does() -> None:
    section = score(REASONING).get("section", "Reasoning")
    assert section is not None
    # math-prm 1/4 at 984, hep-cpp 4/4 at 164.
    assert section.accuracy == pytest.approx((984 / 4 + 164) / (984 + 164))
    assert (section.tally.wins, section.tally.total) == (5, 8)
    assert section.interval is not None
    assert section.interval[0] < section.accuracy < section.interval[1]


def test_a_section_with_a_subset_of_ones_own_weighs_every_pair_alike() -> None:
    rows = [*REASONING, *[pair("Reasoning", "gsm8k", -1.0)] * 2]
    section = score(rows).get("section", "Reasoning")
    assert section is not None
    assert (section.accuracy, section.interval) == (0.5, compute_wilson_interval(5, 10))


def test_a_verdict_is_the_weighted_intervals_and_the_pairs() -> None:
    # All of hep-cpp's few pairs are won: their weight alone draws no spread.
    rows = [*[pair("Reasoning", "math-prm", 1.0)] * 2, *[pair("Reasoning", "hep-cpp", 1.0)]]
    found = score(rows).get("section", "Reasoning")
    assert found is not None
    assert (found.interval, found.verdict) == ((1.0, 1.0), "not above chance")
    # Most pairs are won, those that weigh are not.
    rows = [pair("Reasoning", "hep-cpp", 1.0)] * 60 + [pair("Reasoning", "math-prm", -1.0)] * 10
    found = score(rows).get("section", "Reasoning")
    assert found is not None
    assert found.tally.interval[0] > 0.5
    assert found.verdict == "not above chance"


def test_subsets_have_their_weights_and_wilsons_interval() -> None:
    subsets = {s.name: s for s in score(REASONING).at("subset")}
    assert {name: s.weight for name, s in subsets.items()} == {
        "hep-cpp": 164, "math-prm": 984
    }  # fmt: skip
    assert subsets["math-prm"].interval == compute_wilson_interval(1, 4)


def test_an_absent_section_is_null_and_so_is_the_mean() -> None:
    report = score(REASONING)
    for name in ("Chat", "Chat Hard", "Safety"):
        absent = report.get("section", name)
        assert absent is not None
        assert (absent.accuracy, absent.interval, absent.tally.total) == (None, None, 0)
        assert absent.verdict is None
    mean = report.get("overall", MEAN_OF_SECTIONS)
    assert mean is not None
    assert mean.accuracy is None
    everything = report.get("overall", ALL_PAIRS)
    assert everything is not None
    assert everything.accuracy == 5 / 8
    assert report.get("section", PRIOR_SETS) is None


def test_overall_is_the_mean_of_sections_whatever_their_sizes() -> None:
    rows = [pair("Chat", "a", 1.0)] * 9 + [pair("Chat", "a", -1.0)]
    rows += [pair("Chat Hard", "b", -1.0), pair("Safety", "c", 1.0), pair("Reasoning", "d", 0.0)]
    mean = score(rows).get("overall", MEAN_OF_SECTIONS)
    assert mean is not None
    assert mean.accuracy == pytest.approx((0.9 + 0 + 1 + 0) / 4)
    assert mean.tally.ties == 1  # the tie is a loss


def test_prior_sets_come_with_the_leaderboards_mean() -> None:
    rows = [pair(section, "x", 1.0) for section in SECTIONS]
    rows += [pair(PRIOR_SETS, "shp", -1.0), pair(PRIOR_SETS, "summarize", 1.0)]
    leaderboard = score(rows).get("overall", "leaderboard mean")
    assert leaderboard is not None
    assert leaderboard.accuracy == pytest.approx((4 * 2 * 1 + 0.5) / 9)


def test_pairs_left_out_are_counted_by_section_and_reason_and_change_no_accuracy() -> None:
    rows = [pair("Chat", "a", 1.0), pair("Chat", "a", None, reason="too_long")]
    rows += [pair("Safety", "c", None, reason="equal_completions")] * 2
    rows += [pair("unknown", "poetry", None, reason="unknown_section")]
    report = score(rows)
    assert report.left_out == {
        "Chat": {"too_long": 1},
        "Safety": {"equal_completions": 2},
        "unknown": {"unknown_section": 1},
    }
    assert (report.judged, report.pairs) == (1, 5)
    chat, safety = report.get("section", "Chat"), report.get("section", "Safety")
    assert chat is not None
    assert safety is not None
    assert (chat.accuracy, chat.left_out, safety.accuracy, safety.left_out) == (1.0, 1, None, 2)
    text = report.render()
    assert "Chat: too_long 1" in text
    assert "unknown: unknown_section 1" in text
    assert report.counts()["left_out.equal_completions"] == 2


def test_longer_wins_is_weighted_as_the_accuracy_is() -> None:
    rows = [pair("Reasoning", "math-prm", -1.0, difference=5)]
    rows += [pair("Reasoning", "hep-go", 1.0, difference=-5)]
    section = score(rows).get("section", "Reasoning")
    assert section is not None
    assert section.longer_wins == pytest.approx(984 / (984 + 164))
    assert section.accuracy == pytest.approx(164 / (984 + 164))


def test_a_reward_that_only_sees_length_is_warned_of() -> None:
    rows = [pair("Chat", "a", 1.0, difference=30)] * 40
    rows += [pair("Chat", "a", -1.0, difference=-30)] * 10
    report = score(rows, ["Chat"])
    chat = report.get("section", "Chat")
    assert chat is not None
    assert chat.verdict == "above chance"
    effect = report.length["Chat"]
    assert (effect.balanced_accuracy, effect.favours_longer) == (0.5, 1.0)
    assert [w for w in report.warnings() if "may be length" in w]
    assert [(s.name, s.accuracy) for s in report.at("length")] == [
        ("-100 to -26", 0.0), ("26 to 100", 1.0)
    ]  # fmt: skip


def test_sections_near_chance_are_warned_of_and_others_are_not() -> None:
    rows = [pair("Chat", "a", 1.0)] * 26 + [pair("Chat", "a", -1.0)] * 24
    rows += [pair("Safety", "c", 1.0)] * 45 + [pair("Safety", "c", -1.0)] * 5
    rows += [pair("Reasoning", "d", 1.0)] * 5 + [pair("Reasoning", "d", -1.0)] * 45
    report = score(rows)
    verdicts = {s.name: s.verdict for s in report.at("section")}
    assert verdicts["Chat"] == "not above chance"
    assert verdicts["Safety"] == "above chance"
    assert verdicts["Reasoning"] == "below chance"
    near, below = report.warnings()
    assert near.startswith("not above chance in Chat (52.0 %)")
    assert below.startswith("below chance in Reasoning (10.0 %)")


def test_length_priors_explain_sum_against_mean() -> None:
    rows = [pair("Chat", "alpacaeval-easy", 1.0), pair("Chat", "mt-bench-easy", -1.0)]
    rows += [pair("Chat", "of-my-own", -1.0)]
    scores = {s.name: s.tally.total for s in score(rows).at("length_prior")}
    assert scores == {"chosen_longer": 1, "chosen_shorter": 1}


def test_nothing_judged_is_a_report_too() -> None:
    report = score([pair("Chat", "a", None, reason="too_long")])
    assert report.judged == 0
    assert "Chat: too_long 1" in report.render()
    assert not [value for value in report.metrics()["accuracy"]["overall"].values() if value]


def test_metrics_hold_no_nan() -> None:
    def leaves(tree: Any) -> list[Any]:
        if isinstance(tree, dict):
            return [leaf for value in tree.values() for leaf in leaves(value)]
        return [tree]

    numbers = [value for value in leaves(score(REASONING).metrics()) if value is not None]
    assert numbers
    assert all(math.isfinite(value) for value in numbers)


# --- two rewards -------------------------------------------------------------------------------


def compare(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> Any:
    return compare_judged(
        judged(a), judged(b), ("first", "second"), sections=SECTIONS, resamples=2000, seed=0
    )


def test_two_rewards_are_compared_on_the_pairs_both_judged() -> None:
    a = [pair("Reasoning", "math-prm", m) for m in (1.0, 1.0, -1.0, 1.0)]
    b = [pair("Reasoning", "math-prm", m) for m in (2.0, -1.0, 1.0)]
    b += [pair("Reasoning", "math-prm", None, reason="too_long")]
    found = compare(a, b)
    assert found.unpaired == 1
    difference = found.differences["Reasoning"]
    assert (difference.paired.only_a, difference.paired.only_b, difference.value) == (1, 1, 0.0)
    assert MEAN_OF_SECTIONS not in found.differences
    text = found.render()
    assert "A = first" in text
    assert "only one reward has a verdict: 1" in text


def test_differences_are_weighted_as_scores_are() -> None:
    a = [pair("Reasoning", "math-prm", -1.0), pair("Reasoning", "hep-go", 1.0)]
    b = [pair("Reasoning", "math-prm", 1.0), pair("Reasoning", "hep-go", -1.0)]
    found = compare(a, b).differences
    assert found["Reasoning"].value == pytest.approx((984 - 164) / (984 + 164))
    assert found[ALL_PAIRS].value == 0.0


def test_a_mean_over_all_sections_is_compared_too() -> None:
    a = [pair(section, "x", -1.0) for section in SECTIONS]
    b = [pair(section, "x", 1.0 if section == "Chat" else -1.0) for section in SECTIONS]
    assert compare(a, b).differences[MEAN_OF_SECTIONS].value == pytest.approx(0.25)


def test_rewards_without_a_pair_in_common_are_refused() -> None:
    with pytest.raises(InputError, match="no pair was judged by both"):
        compare([pair("Chat", "a", 1.0)], [pair("Chat", "a", None, reason="too_long")])


def test_the_audit_says_where_prompts_went_and_what_it_costs() -> None:
    domains = ["chat", "chat", "safety", "math_code"]
    router = [pair("Chat", "a", 1.0, domain=domain) for domain in domains]
    oracle = [pair("Chat", "a", m, domain="chat") for m in (1.0, 1.0, 1.0, -1.0)]
    lost = compare(router, oracle)
    text = audit_router(judged(router), score(router), {"Chat": "chat"}, lost)
    (line,) = [line for line in text.splitlines() if line.startswith("Chat  ")][:1]
    assert line.split() == ["Chat", "chat", "50.0", "math_code", "1,", "safety", "1"]
    assert "accuracy lost against the oracle" in text
    assert "--audit-router" in audit_router(judged(router), score(router), {"Chat": "chat"}, None)


def test_a_domains_accuracy_has_its_interval_and_verdict() -> None:
    rows = [pair("Chat", "a", 1.0, domain="chat")] * 5
    rows += [pair("Safety", "c", m, domain="safety") for m in (1.0, -1.0)]
    lines = score(rows).render().splitlines()
    (start,) = [n for n, line in enumerate(lines) if line.startswith("accuracy by domain, %")]
    assert lines[start + 1].split() == [
        "chat", "5", "100.0", "56.6–100.0", "above", "chance",  # 5 / (5 + 1.96²)
    ]  # fmt: skip
    assert lines[start + 2].split() == [
        "safety", "2", "50.0", "9.5–90.5", "not", "above", "chance",
    ]  # fmt: skip


def test_a_table_of_rows_prints_published_numbers_beside() -> None:
    rows = [pair(section, "x", 1.0) for section in SECTIONS]
    report, part = score(rows), score(rows[:2])
    text = render_rows([("all", report, {"Chat": 92.2}), ("part", part, {})], ALL_SECTIONS)
    header, first, second, *_ = text.splitlines()
    assert header.split() == ["row", "Chat", "Chat", "Hard", "Safety", "Reasoning", "Overall"]
    assert first.split()[:3] == ["all", "100.0", "(92.2)"]
    assert second.split()[-2:] == ["-", "(-)"]


def test_figures_are_files_and_routing_is_drawn_where_there_is_some(tmp_path: Path) -> None:
    plain = draw_report(score(REASONING), "plain", tmp_path)
    assert [file.name for file in plain] == ["accuracy.png", "length.png"]
    routed = [pair("Chat", "a", 1.0, domain="chat"), pair("Safety", "c", -1.0, domain="safety")]
    files = draw_report(score(routed), "routed", tmp_path)
    assert [file.name for file in files] == ["accuracy.png", "length.png", "routing.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
