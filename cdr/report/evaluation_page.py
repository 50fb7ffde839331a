"""The page of an evaluation, from the values in `EvaluationData`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cdr.benchmark_report import MEAN_OF_SECTIONS, Score
from cdr.evaluation_plan import sample_options
from cdr.redaction import redact
from cdr.report.evaluation import MAX_ROWS_READ, EvaluatedRow, EvaluationData, Margins
from cdr.report.evaluation_verdict import judge_evaluation
from cdr.report.html import SUBMIT, Plot, render, show_number
from cdr.report.plots import ScoreLine, draw_mirrored, draw_scores
from cdr.report.reward_text import RewardText, reward_facts

_OVERALL = "Overall"
_DRAWN_PAIRS = 5
"""Pairs from which a subset is drawn: an interval of fewer spans nearly everything."""


def render_evaluation(data: EvaluationData) -> str:
    """Write the page.

    Args:
        data: from `cdr.report.evaluation`, or made by hand.

    Returns:
        HTML, the same for the same data.
    """
    facts = [dict(_asked(row)) for row in data.rows]
    labels = list(dict.fromkeys(label for found in facts for label in found))
    differ = [name for name in labels if len({found.get(name) for found in facts}) > 1]
    columns = [*data.sections, _OVERALL]
    return render(
        "evaluation.html.jinja",
        data=data,
        verdict=judge_evaluation(data),
        asked=[(name, facts[0][name]) for name in labels if name not in differ],
        differ=differ,
        facts=facts,
        columns=columns,
        has_printed=any(row.printed for row in data.rows),
        side_by_side=list(_side_by_side(data)) if len(data.rows) > 1 else [],
        rows=[_show_row(row, place, columns) for place, row in enumerate(data.rows)],
        commands=list(_commands(data)),
        MAX_ROWS_READ=MAX_ROWS_READ,
    )


def _asked(row: EvaluatedRow) -> Iterator[tuple[str, str]]:
    config = row.config
    yield "labelled pairs", str(redact(config.input.place))
    if config.input.revision is not None:
        yield "revision", f"{config.input.revision}, split {config.input.split}"
    for table, version in row.run.input_versions.items():
        yield f"version of {table}", str(version)
    whole = row.run.dataset == config.dataset
    yield "sample", "all pairs" if whole else row.run.dataset.removeprefix(f"{config.dataset}.")
    yield "sections", ", ".join(config.sections_in_use())
    yield from reward_facts(row.reward)
    if row.reward.routing.mode in ("adaptive", "column"):
        # In the order of the sections: `runs` keeps configs sorted by key.
        known = [name for name in config.sections_in_use() if name in config.oracle]
        yield "right domains", ", ".join(f"{name}: {config.oracle[name]}" for name in known)
    yield (
        "intervals",
        f"95 %; {config.statistics.resamples:,} bootstrap draws, seed {config.statistics.seed}",
    )


# --- a row's numbers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    """An accuracy of the table of rows."""

    score: Score | None
    may_be_length: bool
    printed: float | None


@dataclass(frozen=True)
class _Row:
    """A row with all that is drawn of it."""

    row: EvaluatedRow
    reward: RewardText
    cells: list[_Cell]
    domains: list[str]
    accuracy: Plot | None
    lengths: Plot | None
    margins: list[Plot]

    @property
    def has_tokens(self) -> bool:
        shown = (self.row.pairs or {}).values()
        pairs = (pair for found in shown for pair in (*found.wins, *found.losses))
        return any(side.tokens for pair in pairs for side in (pair.chosen, pair.rejected))


def _show_row(row: EvaluatedRow, place: int, columns: Sequence[str]) -> _Row:
    report, reward = row.report, RewardText.of(row.reward)
    scores = [
        score
        for score in (*report.scores_by_section(), *report.at("overall"))
        if score.level != "subset" or score.tally.total >= _DRAWN_PAIRS
    ]
    domains = sorted({domain for found in report.routed.values() for domain in found})
    bins = report.at("length")
    told = (
        "with 95 % intervals; the dotted line is a coin's 50 %, the upright bar what “the longer "
        f"answer is better” reaches; subsets of fewer than {_DRAWN_PAIRS} pairs: see the table"
    )
    return _Row(
        row=row,
        reward=reward,
        cells=[_cell(row, column) for column in columns],
        domains=[] if domains == ["none"] else domains,
        accuracy=_plot_scores(scores, f"a{place}", f"Accuracy by section and subset {told}"),
        lengths=_plot_scores(
            bins, f"l{place}",
            "Accuracy by tokens of chosen − tokens of rejected, with 95 % intervals",
        ),
        margins=[
            _plot_margins(section, found, f"m{place}-{number}", reward.unit)
            for number, (section, found) in enumerate(row.margins.items())
        ],
    )  # fmt: skip


def _cell(row: EvaluatedRow, column: str) -> _Cell:
    report = row.report
    if column == _OVERALL:
        return _Cell(report.get("overall", MEAN_OF_SECTIONS), False, row.printed.get(column))
    return _Cell(
        report.get("section", column), report.may_be_length(column), row.printed.get(column)
    )


def _side_by_side(data: EvaluationData) -> Iterator[Plot]:
    for number, section in enumerate(data.sections):
        found = [(row.title, row.report.get("section", section)) for row in data.rows]
        told = f"{section}: accuracy of each row, with 95 % intervals"
        shown = [(title, score) for title, score in found if score]
        plot = _plot(shown, f"s{number}", told, width_in=3.0)
        if plot is not None:
            yield plot


def _plot_scores(scores: Iterable[Score], key: str, told: str) -> Plot | None:
    return _plot([(score.name, score) for score in scores], key, told)


def _plot(
    named: Sequence[tuple[str, Score]], key: str, told: str, width_in: float = 4.4
) -> Plot | None:
    lines = [
        ScoreLine(name, score.accuracy, score.interval, score.longer_wins, score.level == "subset")
        for name, score in named
        if score.accuracy is not None
    ]
    if not lines:
        return None
    numbers = ", ".join(f"{line.name} {line.accuracy:.0%}" for line in lines)
    return Plot(
        draw_scores(lines, key=key, label=f"{told}: {numbers}", width_in=width_in), f"{told}."
    )


def _plot_margins(section: str, margins: Margins, key: str, unit: str) -> Plot:
    told = (
        f"{section}: median |margin| won {show_number(margins.won_median)}, lost "
        f"{show_number(margins.lost_median)} {unit}; of the surer half {margins.surest_won:.0%} won"
    )
    svg = draw_mirrored(
        margins.won, margins.lost, axis=f"|margin|, {unit}", key=key,
        label=f"Margins of pairs won, upwards, and lost, downwards. {told}",
    )  # fmt: skip
    return Plot(svg, told)


# --- what next -----------------------------------------------------------------------------------


def _commands(data: EvaluationData) -> Iterator[tuple[str, str]]:
    first, *others = data.rows
    sample = sample_options(first.config, first.run.dataset)
    yield (
        "Where it is surest and wrong (SQL)",
        "SELECT p.section, p.subset, p.prompt_id, round(p.margin, 2) AS margin,\n"
        "       a.completion AS better_answer, b.completion AS preferred_answer\n"
        f"FROM {data.benchmark_pairs} p\n"
        f"JOIN {data.rewards} a ON a.run_id = p.run_id AND a.prompt_id = p.prompt_id\n"
        "  AND a.completion_id = 'a'\n"
        f"JOIN {data.rewards} b ON b.run_id = p.run_id AND b.prompt_id = p.prompt_id\n"
        "  AND b.completion_id = 'b'\n"
        f"WHERE p.run_id = '{first.run.run_id}' AND p.outcome = 'loss'\n"
        "ORDER BY p.margin LIMIT 20",
    )
    if first.reward.reduction == "sum" and first.reward.is_per_token:
        yield (
            "The same rewards per token (scores nothing)",
            f"{SUBMIT} jobs/evaluate.py --config YOURS{sample} \\\n    --set reward.reduction=mean",
        )
    adaptive = any(row.reward.routing.mode == "adaptive" for row in data.rows)
    if adaptive and not any(row.reward.routing.mode == "column" for row in data.rows):
        yield (
            "What the router's mistakes cost",
            f"{SUBMIT} jobs/evaluate.py --config YOURS{sample} --audit-router",
        )
    if others:
        yield (
            "Other rows against each other (scores nothing)",
            f"{SUBMIT} jobs/evaluate.py --config YOURS{sample} \\\n"
            f"    --compare {others[-1].reward.name} {first.reward.name}",
        )
    yield (
        "Annotate with it, where it is above chance",
        f"{SUBMIT} jobs/annotate.py --config YOURS \\\n    --set reward=THE_REWARD.yaml",
    )
    if data.ui_command:
        yield "These runs in MLflow", data.ui_command
    yield "Build this page again", data.rebuild
