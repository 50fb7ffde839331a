"""What the page of an evaluation says at its top: where each reward sees the difference, or not.

A section's verdict is the interval's (`cdr.benchmark_report`); the other limits are rules of thumb.
Rows with the same finding share its line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cdr.benchmark_report import Score
from cdr.benchmark_report import Verdict as Chance
from cdr.report.evaluation import EvaluatedRow, EvaluationData
from cdr.report.verdict import Finding, Level, Limits, Verdict, check_engines

ONE_SIDED = 0.85
"""Share of pairs in which the favourite is the longer answer, or the shorter one."""

SURE_LOSSES = 0.35  # of the surer half of the pairs
WRONG_ROUTES = 0.1  # of pairs with a right domain
TIES = Limits(0.02, 0.1)  # of judged pairs
SOME_PAIRS = 10  # of unequal length, for a share of them to be told
FEW_PAIRS = 30
"""Pairs of a section below which its accuracy says little."""


def judge_evaluation(data: EvaluationData) -> Verdict:
    """Check the rewards on a page against chance and against the limits above."""
    findings = [
        *_check_sections(data),
        *_check_length(data),
        *_check_pairs(data),
        *_check_routes(data),
        *_check_models(data),
    ]
    return Verdict.of(findings, stop="Do not annotate with this yet")


def _by_row(data: EvaluationData, found: Sequence[tuple[EvaluatedRow, str]]) -> str:
    """Join what was found; with the rows' names where there are several."""
    if len(data.rows) == 1:
        return "; ".join(text for _, text in found)
    return "; ".join(f"{row.title}: {text}" for row, text in found)


def _hint(data: EvaluationData) -> str:
    if any(row.reward.is_per_token and row.reward.reduction == "sum" for row in data.rows):
        return " Compare with reward.reduction: mean, which scores nothing again."
    return ""


def _check_sections(data: EvaluationData) -> Iterator[Finding]:
    wanted: tuple[tuple[Chance, Level, str, str | None], ...] = (
        (
            "below chance",
            Level.STOP,
            "Below chance, the worse answers are preferred, or tied",
            "Look whether strong and weak are swapped, or strong is the less aligned of the two; "
            "read the surest losses.",
        ),
        (
            "not above chance",
            Level.LOOK,
            "Not above chance, the intervals hold 50 %",
            "Take more pairs; if it stays so, do not annotate such prompts with this reward.",
        ),
        ("above chance", Level.FINE, "Above chance", None),
    )
    for chance, level, what, fix in wanted:
        found = []
        for row in data.rows:
            scores = [s for s in row.report.at("section") if s.verdict == chance]
            if scores:
                found.append((row, ", ".join(_name(score) for score in scores)))
        if found:
            yield Finding(level, f"{what}: {_by_row(data, found)}.", fix)
    empty = [(row, "no pair was judged") for row in data.rows if not row.report.judged]
    if empty:
        yield Finding(
            Level.STOP,
            f"There is no verdict: {_by_row(data, empty)}.",
            "See why pairs are left out.",
        )


def _name(score: Score) -> str:
    ties = f" ({score.tally.ties:,} tied)" if score.tally.ties else ""
    return f"{score.name} {score.tally.accuracy:.0%} of {score.tally.total:,}{ties}"


def _check_length(data: EvaluationData) -> Iterator[Finding]:
    found = []
    for row in data.rows:
        sections = [name for name in row.report.length if row.report.may_be_length(name)]
        if sections:
            found.append((row, ", ".join(sections)))
    if found:
        yield Finding(
            Level.LOOK,
            f"May be length: {_by_row(data, found)}. Were chosen answers longer as often as "
            "shorter, the intervals would hold 50 %.",
            f"Look at the accuracy by length difference.{_hint(data)}",
        )
    sided = []
    for row in data.rows:
        for name, effect in row.report.length.items():
            share = effect.favours_longer
            unequal = effect.where_longer.total + effect.where_shorter.total
            if share is None or unequal < SOME_PAIRS or not row.report.get("section", name):
                continue
            if max(share, 1 - share) >= ONE_SIDED:
                longer = share >= ONE_SIDED
                sided.append(
                    (row, f"{name} {share if longer else 1 - share:.0%} the "
                          f"{'longer' if longer else 'shorter'}")
                )  # fmt: skip
    if sided:
        yield Finding(
            Level.LOOK,
            f"The favourite is nearly always on one side of length: {_by_row(data, sided)}.",
            f"Such a reward sees little but length there.{_hint(data)}",
        )


def _check_pairs(data: EvaluationData) -> Iterator[Finding]:
    left_out, stops = [], False
    for row in data.rows:
        report = row.report
        if report.judged < report.pairs:
            by_reason = {
                name.removeprefix("left_out."): count
                for name, count in report.counts().items()
                if name.startswith("left_out.")
            }
            listed = ", ".join(f"{reason} {count:,}" for reason, count in by_reason.items())
            left_out.append(
                (row, f"{report.pairs - report.judged:,} of {report.pairs:,} ({listed})")
            )
            stops |= row.run.outcome == "over_threshold"
    if left_out:
        yield Finding(
            Level.STOP if stops else Level.LOOK,
            f"Pairs left out: {_by_row(data, left_out)}.",
            "Read what each reason means in docs/how-to/evaluate.md; what failed is tried again by "
            "the next run.",
        )
    else:
        pairs = data.rows[0].report.pairs
        yield Finding(Level.FINE, f"All {pairs:,} pairs were judged.")
    few = dict.fromkeys(
        f"{score.name} ({score.tally.total})"
        for row in data.rows
        for score in row.report.at("section")
        if 0 < score.tally.total < FEW_PAIRS
    )
    if few:
        yield Finding(
            Level.LOOK,
            f"Fewer than {FEW_PAIRS} pairs: {', '.join(few)}. Such accuracies say little.",
            "Evaluate on more pairs of your own kind before you annotate.",
        )
    ties, level = [], Level.FINE
    for row in data.rows:
        count = row.report.counts()["ties"]
        if count:
            level = max(level, TIES.level(count / row.report.judged))
            ties.append((row, f"{count:,} of {row.report.judged:,}"))
    if level:
        yield Finding(
            level,
            f"Ties, which count as losses: {_by_row(data, ties)}.",
            "The reward cannot tell such answers apart: look whether they differ at all.",
        )
    sure = [
        (row, f"{name} {1 - margins.surest_won:.0%}")
        for row in data.rows
        for name, margins in row.margins.items()
        if 1 - margins.surest_won >= SURE_LOSSES
        and (score := row.report.get("section", name)) is not None
        and score.verdict == "above chance"
    ]
    if sure:
        yield Finding(
            Level.LOOK,
            "Above chance, and often wrong even where the margin is large (losses in the surer "
            f"half of the pairs): {_by_row(data, sure)}.",
            "Read the surest losses; a least margin (pairs.min_margin) will not help there.",
        )


def _check_routes(data: EvaluationData) -> Iterator[Finding]:
    found, level = [], Level.FINE
    for row in data.rows:
        right, total = row.right_routes
        if row.reward.routing.mode == "adaptive" and total:
            level = max(level, Level(1 - right / total >= WRONG_ROUTES))
            found.append((row, f"{right:,} of {total:,} ({right / total:.0%})"))
    if found:
        yield Finding(
            level,
            f"Pairs that the router gave their section's right domain: {_by_row(data, found)}.",
            "See where they went below; --audit-router says what the mistakes cost."
            if level
            else None,
        )


def _check_models(data: EvaluationData) -> Iterator[Finding]:
    for text in dict.fromkeys(text for row in data.rows for text in row.reward.warnings()):
        yield Finding(Level.LOOK, f"{text[0].upper()}{text[1:]}")
    yield from check_engines(sorted({name for row in data.rows for name in row.engine_versions}))
