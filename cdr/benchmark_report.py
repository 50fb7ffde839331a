"""What an evaluation found: accuracies with intervals, length, what was left out, who was routed.

A score over one group of pairs has Wilson's interval, a weighted one (a section of several subsets,
a mean of sections) a stratified bootstrap's. Pure: judged pairs in, numbers and text out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Final, Literal

import pandas as pd

from cdr.accuracy import (
    Interval,
    LengthEffect,
    Stratum,
    Tally,
    accuracy_interval,
    bin_by_length,
    measure_length,
    weighted_accuracy,
)
from cdr.rewardbench import PRIOR_SETS, SUBSETS, leaderboard_mean, mean_of_sections, weigh_subsets
from cdr.text_table import render_table

Level = Literal["subset", "section", "overall", "domain", "length", "length_prior"]
Verdict = Literal["above chance", "not above chance", "below chance"]

JUDGED_COLUMNS: Final = (
    "prompt_id",
    "section",
    "subset",
    "domain",
    "domain_source",
    "margin",
    "chosen_num_tokens",
    "rejected_num_tokens",
    "status",
    "reason",
)
"""What a report is made of: these columns of `benchmark_pairs`, one row per pair."""

MEAN_OF_SECTIONS: Final = "mean of sections"
LEADERBOARD: Final = "leaderboard mean"
ALL_PAIRS: Final = "all pairs"
OVER_SECTIONS: Final = "all"


@dataclass(frozen=True)
class Score:
    """One accuracy.

    Args:
        level: what kind of group it is of.
        section: the subset's or section's; `all` for scores over sections.
        name: the group.
        accuracy: 0 to 1; None: absent.
        interval: 95 %; None: absent.
        tally: the pairs judged, unweighted.
        left_out: pairs rejected or failed.
        longer_wins: accuracy of "the longer answer is better", weighted alike; None: absent.
        weight: a subset's, in its section; None for others.
    """

    level: Level
    section: str
    name: str
    accuracy: float | None
    interval: Interval | None
    tally: Tally
    left_out: int
    longer_wins: float | None
    weight: float | None = None

    @property
    def verdict(self) -> Verdict | None:
        """Whether the reward is told from a coin; None without pairs.

        Weighted and by the pairs alone: a bootstrap of a few pairs each knows no spread.
        """
        if not self.tally.total or self.interval is None:
            return None
        low = min(self.interval[0], self.tally.interval[0])
        high = max(self.interval[1], self.tally.interval[1])
        return "above chance" if low > 0.5 else "below chance" if high < 0.5 else "not above chance"

    def as_row(self) -> dict[str, Any]:
        """Give the columns of `benchmark_results` that the score decides."""
        low, high = self.interval or (None, None)
        return {
            "level": self.level,
            "section": self.section,
            "name": self.name,
            "accuracy": self.accuracy,
            "ci_low": low,
            "ci_high": high,
            "weight": self.weight,
            "pairs": self.tally.total,
            "wins": self.tally.wins,
            "ties": self.tally.ties,
            "left_out": self.left_out,
            "longer_wins": self.longer_wins,
        }


@dataclass(frozen=True)
class Report:
    """All that one evaluation found.

    Args:
        scores: subsets of each section and the section itself, in the order of the sections; then
            overall, by domain, by length difference, and by RewardBench's length prior.
        length: effect of length per section, and over `all`; sections without pairs are left out.
        balanced_intervals: bootstrap intervals of the balanced accuracies, likewise.
        left_out: pairs by section and reason.
        routed: pairs judged by section and domain; `none` where prompts were left as they are.
        fallbacks: pairs whose domain is the router's fallback.
    """

    scores: tuple[Score, ...]
    length: Mapping[str, LengthEffect]
    balanced_intervals: Mapping[str, Interval]
    left_out: Mapping[str, Mapping[str, int]]
    routed: Mapping[str, Mapping[str, int]]
    fallbacks: int

    def at(self, level: Level) -> list[Score]:
        """Give the scores of one level."""
        return [score for score in self.scores if score.level == level]

    def get(self, level: Level, name: str) -> Score | None:
        """Give one score; None where there is none of that name."""
        return next((score for score in self.at(level) if score.name == name), None)

    @property
    def pairs(self) -> int:
        """Pairs of the benchmark, left out or not."""
        return self.judged + sum(sum(reasons.values()) for reasons in self.left_out.values())

    @property
    def judged(self) -> int:
        """Pairs that have a verdict."""
        return sum(score.tally.total for score in self.at("section"))

    def warnings(self) -> list[str]:
        """Say which sections do not speak for the reward."""
        near = [s for s in self.at("section") if s.verdict == "not above chance"]
        below = [s for s in self.at("section") if s.verdict == "below chance"]
        found = []
        if near:
            found.append(
                f"not above chance in {_names(near)}: their intervals hold 50 %. More pairs may "
                "tell; else this pair of models does not see the difference there."
            )
        if below:
            found.append(f"below chance in {_names(below)}: the reward prefers the worse answers.")
        for section, effect in self.length.items():
            if self.may_be_length(section):
                found.append(
                    f"{section} may be length: balanced for it, the interval "
                    f"{show_interval(self.balanced_intervals[section])} holds 50 % (longer wins: "
                    f"{show_percent(effect.longer_wins.accuracy)})."
                )
        return found

    def may_be_length(self, section: str) -> bool:
        """Tell whether a section is above chance, but would not be with lengths balanced."""
        score, interval = self.get("section", section), self.balanced_intervals.get(section)
        return bool(score and score.verdict == "above chance" and interval and interval[0] <= 0.5)

    def metrics(self) -> dict[str, Any]:
        """Give every number by name, for MLflow; None where absent."""
        by_level: dict[str, dict[str, dict[str, Any]]] = {}
        for score in self.scores:
            name = score.name if score.level != "subset" else f"{score.section}.{score.name}"
            low, high = score.interval or (None, None)
            numbers = {
                "accuracy": score.accuracy,
                "ci_low": low,
                "ci_high": high,
                "longer_wins": score.longer_wins,
                "pairs": score.tally.total,
                "ties": score.tally.ties,
                "left_out": score.left_out,
            }
            for number, value in numbers.items():
                by_level.setdefault(number, {}).setdefault(score.level, {})[name] = value
        return {
            **by_level,
            "balanced_accuracy": {n: e.balanced_accuracy for n, e in self.length.items()},
            "balanced_ci_low": {n: low for n, (low, _) in self.balanced_intervals.items()},
            "balanced_ci_high": {n: high for n, (_, high) in self.balanced_intervals.items()},
            "favours_longer": {name: e.favours_longer for name, e in self.length.items()},
            "routed": {section: dict(row) for section, row in self.routed.items()},
            "counts": self.counts(),
        }

    def counts(self) -> dict[str, int]:
        """Give every count by name, for `runs`."""
        reasons: dict[str, int] = {}
        for by_reason in self.left_out.values():
            for reason, count in by_reason.items():
                reasons[f"left_out.{reason}"] = reasons.get(f"left_out.{reason}", 0) + count
        sections = self.at("section")
        return {
            "pairs": self.pairs,
            "judged": self.judged,
            "wins": sum(score.tally.wins for score in sections),
            "ties": sum(score.tally.ties for score in sections),
            "fallbacks": self.fallbacks,
            **reasons,
        }

    def render(self) -> str:
        """Write the numbers for a terminal; accuracies in percent."""
        blocks = (self._scores(), self._lengths(), self._routing(), self._left_out())
        return "\n".join(line for block in blocks for line in block)

    def _scores(self) -> list[str]:
        header = (
            "accuracy, %", "pairs", "left out", "accuracy", "95 % CI", "ties", "longer wins", ""
        )  # fmt: skip
        rows = [
            (
                f"  {score.name}" if score.level == "subset" else score.name,
                score.tally.total,
                score.left_out,
                show_percent(score.accuracy),
                show_interval(score.interval),
                score.tally.ties,
                show_percent(score.longer_wins),
                (score.level == "section" and score.verdict) or "",
            )
            for score in (*self.scores_by_section(), *self.at("overall"))
        ]
        return render_table(header, rows)

    def scores_by_section(self) -> Iterable[Score]:
        """Give each section's score with those of its subsets behind it, if it has several."""
        for section in self.at("section"):
            yield section
            subsets = [score for score in self.at("subset") if score.section == section.name]
            if len(subsets) > 1:
                yield from subsets

    def _lengths(self) -> list[str]:
        header = (
            "length", "longer wins", "chosen longer", "chosen shorter", "balanced", "95 % CI",
            "favours longer",
        )  # fmt: skip
        rows = [
            (
                section,
                show_percent(effect.longer_wins.accuracy),
                show_percent(effect.where_longer.accuracy),
                show_percent(effect.where_shorter.accuracy),
                show_percent(effect.balanced_accuracy),
                show_interval(self.balanced_intervals.get(section)),
                show_percent(effect.favours_longer),
            )
            for section, effect in self.length.items()
        ]
        lines = ["", *render_table(header, rows)]
        groups: tuple[tuple[Level, str], ...] = (
            ("length", "chosen − rejected, tokens"),
            ("length_prior", "RewardBench's length prior"),
        )
        for level, title in groups:
            found = [
                (
                    f"  {score.name}",
                    score.tally.total,
                    show_percent(score.accuracy),
                    show_interval(score.interval),
                )
                for score in self.at(level)
            ]
            if found:
                lines += ["", *render_table((title, "pairs", "accuracy", "95 % CI"), found)]
        return lines

    def _routing(self) -> list[str]:
        domains = sorted({domain for row in self.routed.values() for domain in row})
        if domains in ([], ["none"]):
            return []
        rows: list[tuple[object, ...]] = [
            (f"  {section}", *[row.get(name, 0) for name in domains])
            for section, row in self.routed.items()
        ]
        lines = ["", *render_table(("pairs by domain", *domains), rows)]
        scored = [
            (
                f"  {score.name}",
                score.tally.total,
                show_percent(score.accuracy),
                show_interval(score.interval),
                score.verdict or "",
            )
            for score in self.at("domain")
        ]
        header = ("accuracy by domain, %", "pairs", "accuracy", "95 % CI", "")
        lines += ["", *render_table(header, scored)]
        if self.fallbacks:
            lines.append(f"  the router was not sure of {self.fallbacks:,} (fallback)")
        return lines

    def _left_out(self) -> list[str]:
        if not self.left_out:
            return ["", "left out: 0"]
        lines = ["", "left out (see benchmark_pairs.reason and rejects):"]
        for section, reasons in self.left_out.items():
            listed = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
            lines.append(f"  {section}: {listed}")
        return lines


def score_pairs(
    judged: pd.DataFrame, sections: Sequence[str], *, resamples: int, seed: int
) -> Report:
    """Score judged pairs.

    Args:
        judged: `JUDGED_COLUMNS`, one row per pair.
        sections: those of the benchmark, in order; one without pairs is absent, not 0.
        resamples: of the bootstrap.
        seed: of its draws.
    """
    ok = judged[judged["status"] == "ok"].copy()
    ok["margin"] = ok["margin"].astype("float64")
    ok["difference"] = (ok["chosen_num_tokens"] - ok["rejected_num_tokens"]).astype("int64")
    out = judged[judged["status"] != "ok"]
    scorer = _Scorer(resamples, seed)
    scores: list[Score] = []
    parts: dict[str, list[tuple[pd.DataFrame, float]]] = {}
    # Where prior sets are not part of the table, their absence says nothing.
    shown = [s for s in sections if s != PRIOR_SETS or (judged["section"] == s).any()]
    for section in shown:
        rows = ok[ok["section"] == section]
        missing = out[out["section"] == section]
        groups = {str(name): group for name, group in rows.groupby("subset", sort=True)}
        weights = weigh_subsets(section, {name: len(group) for name, group in groups.items()})
        parts[section] = [(group, weights[name]) for name, group in groups.items()]
        scores.append(scorer.weigh("section", section, section, parts[section], len(missing)))
        for name in sorted({*rows["subset"], *missing["subset"]}):
            group = rows[rows["subset"] == name]
            left_out = int((missing["subset"] == name).sum())
            scores.append(
                scorer.weigh("subset", section, name, [(group, 1.0)], left_out, weights.get(name))
            )
    means: list[tuple[str, Any]] = [
        (MEAN_OF_SECTIONS, mean_of_sections(parts, [s for s in shown if s != PRIOR_SETS])),
        (ALL_PAIRS, [(ok, 1.0)]),
    ]
    if PRIOR_SETS in shown:
        means.insert(1, (LEADERBOARD, leaderboard_mean(parts)))
    for name, weighed in means:
        scores.append(scorer.weigh("overall", OVER_SECTIONS, name, weighed or [], len(out)))
    domain = ok["domain"].fillna("none")
    scores += [
        scorer.weigh("domain", OVER_SECTIONS, str(name), [(group, 1.0)], 0)
        for name, group in ok.groupby(domain, sort=True)
    ]
    margins, differences = ok["margin"].to_numpy(), ok["difference"].to_numpy()
    scores += [
        Score(
            "length", OVER_SECTIONS, found.label, found.tally.accuracy, found.tally.interval,
            found.tally, 0, None,
        )
        for found in bin_by_length(margins, differences)
    ]  # fmt: skip
    prior = ok["subset"].map({name: s.length_prior for name, s in SUBSETS.items()}).dropna()
    scores += [
        scorer.weigh("length_prior", OVER_SECTIONS, str(name), [(ok.loc[group.index], 1.0)], 0)
        for name, group in prior.groupby(prior, sort=True)
    ]
    effects = {
        name: measure_length(rows["margin"].to_numpy(), rows["difference"].to_numpy())
        for name, rows in ((s, ok[ok["section"] == s]) for s in shown)
        if len(rows)
    }
    effects[OVER_SECTIONS] = measure_length(margins, differences)
    balanced = {
        name: accuracy_interval(effect.strata, resamples=resamples, seed=seed)
        for name, effect in effects.items()
    }
    return Report(
        scores=tuple(scores),
        length=effects,
        balanced_intervals={name: found for name, found in balanced.items() if found},
        left_out=_count_by_section(out, out["reason"], shown),
        routed=_count_by_section(ok, domain, shown),
        fallbacks=int((ok["domain_source"] == "fallback").sum()),
    )


@dataclass(frozen=True)
class _Scorer:
    """Scores groups of judged pairs; the draws of the bootstrap are its own."""

    resamples: int
    seed: int

    def weigh(
        self,
        level: Level,
        section: str,
        name: str,
        parts: Sequence[tuple[pd.DataFrame, float]],
        left_out: int,
        weight: float | None = None,
    ) -> Score:
        groups = [(group, share) for group, share in parts if len(group)]
        strata = [Stratum(Tally.of(group["margin"].to_numpy()), w) for group, w in groups]
        longer = [Stratum(Tally.of(group["difference"].to_numpy()), w) for group, w in groups]
        tally = reduce(add, (stratum.tally for stratum in strata), Tally(0, 0, 0))
        interval = accuracy_interval(strata, resamples=self.resamples, seed=self.seed)
        accuracy = weighted_accuracy(strata)
        return Score(
            level, section, name, accuracy, interval, tally, left_out,
            weighted_accuracy(longer), weight,
        )  # fmt: skip


def _count_by_section(
    rows: pd.DataFrame, by: pd.Series[Any], sections: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Count rows; sections in their order, those that are none of the benchmark's last."""
    others = sorted(set(rows["section"]) - set(sections))
    counts = {
        section: by[rows["section"] == section].value_counts().sort_index()
        for section in (*sections, *others)
    }
    return {
        section: {str(name): int(count) for name, count in found.items()}
        for section, found in counts.items()
        if len(found)
    }


def _names(scores: Sequence[Score]) -> str:
    return ", ".join(f"{score.name} ({show_percent(score.tally.accuracy)} %)" for score in scores)


def show_percent(share: float | None) -> str | None:
    """Write a share in percent, without the sign; None stays None."""
    return None if share is None else f"{100 * share:.1f}"


def show_interval(interval: Interval | None) -> str | None:
    """Write an interval likewise: `40.0–90.2`."""
    return None if interval is None else f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}"
