"""Small reports' data, made by hand: an annotate run of three domains, an evaluation of two rows.

Texts and names try to break the page.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Sequence
from typing import Any

import pandas as pd

from cdr.benchmark_report import JUDGED_COLUMNS, score_pairs
from cdr.chat import Message
from cdr.comparison import compare_judged
from cdr.config import AnnotateConfig
from cdr.evaluation_config import EvaluateConfig
from cdr.report.annotation_data import AnnotationData, DomainReport, LengthEffect, Lengths
from cdr.report.evaluation import EvaluatedRow, EvaluationData, SurestPairs, measure_margins
from cdr.report.pairs import ShownCandidate, ShownPair
from cdr.report.plots import Histogram
from cdr.report.tokens import Piece, TokenRow
from cdr.runs import RunRecord
from cdr.summary import DomainSummary, EngineUse, Summary

SCRIPT = "<script>document.title='broken'; fetch('https://example.com/x')</script>"
IMAGE = "<img src='https://example.com/pixel.png' onerror=\"document.title='broken'\">"
TERMS = ("strong/conditioned", "weak/conditioned")


def make_config(**changes: Any) -> AnnotateConfig:
    model = {"path": "stub-model", "engine": "stub"}
    tree = {
        "dataset": "toy",
        "warehouse": "/data/warehouse",
        "input": {"path": "/data/completions", "version": 3},
        "reward": {
            "name": "toy-reward",
            "models": {
                "strong": {**model, "adapter": "s", "tuned_from": "weak"},
                "weak": model,
                "router": model,
            },
            "prompt_pack": "conf/prompts/cdr-v1.yaml",
        },
    }
    return AnnotateConfig.model_validate({**tree, **changes})


def make_row(text: str, rewards: dict[str, float]) -> TokenRow:
    """One piece per word; `rewards` has those that are not 0.01."""
    words = [f"{' ' if n else ''}{word}" for n, word in enumerate(text.split(" "))]
    pieces = [
        Piece(word, (-1.0 + value, -1.0), value)
        for word in words
        for value in [rewards.get(word.strip(" ,"), 0.01)]
    ]
    return TokenRow(TERMS, tuple(pieces))


def make_side(name: str, text: str | None, reward: float, **rewards: float) -> ShownCandidate:
    tokens = () if text is None else (make_row(text, rewards),)
    return ShownCandidate(
        completion_id=name,
        text=text,
        reward=reward,
        num_tokens=12,
        terms={TERMS[0]: -20.0 + reward, TERMS[1]: -20.0},
        tokens=tokens,
    )


def make_pair(number: int, domain: str, *, margin: float = 2.5, texts: bool = True) -> ShownPair:
    message = Message(role="user", content=f"Question {number} about {domain}? {SCRIPT}")
    chosen = f"Sure, answer {number}.\nSecond line: naïve 🦊 日本. {SCRIPT}"
    rejected = f"Nope, answer {number}. {IMAGE}"
    return ShownPair(
        prompt_id=f"{domain}-{number}",
        domain=domain,
        confidence=0.75,
        conditioned_by=None if domain == "chat" else "helpful-1, exemplar-7",
        margin=margin,
        prompt=(message,) if texts else None,
        chosen=make_side("a", chosen if texts else None, 1.5, Sure=2.25, answer=0.4),
        rejected=make_side("b", rejected if texts else None, 1.5 - margin, Nope=-3.0, answer=-0.1),
    )


def make_domain(**changes: Any) -> DomainReport:
    values: dict[str, Any] = {
        "rewards": Histogram(-10.0, 10.0, (0, 2, 5, 30, 60, 40, 13, 8, 1, 1)),
        "margins": Histogram(0.0, 8.0, (5, 12, 9, 6, 4, 2, 1, 1)),
        "confidence": Histogram(0.0, 1.0, (0, 0, 0, 1, 2, 3, 4, 6, 10, 14)),
        "unsure": 3,
        "routed": 40,
        "lengths": Lengths(
            longer=22, shorter=16, equal=2, sample=tuple((20 + n, 60 - n) for n in range(40))
        ),
        "effect": LengthEffect(sxx=400.0, syy=100.0, sxy=40.0),
        "small_margins": 1,
    }
    return DomainReport(**{**values, **changes})


def make_summary(names: tuple[str, ...], **changes: Any) -> Summary:
    domain = DomainSummary(
        prompts=40,
        candidates=160,
        pairs=40,
        reward_quantiles=(-6.0, -2.0, 0.5, 2.0, 6.0),
        margin_quantiles=(0.5, 1.2, 2.5, 4.0, 6.5),
        chosen_tokens=41.5,
        rejected_tokens=40.0,
        chosen_longer=0.55,
    )
    values: dict[str, Any] = {
        "candidates": 480,
        "ok": 480,
        "failed": 0,
        "rejected": {},
        "domains": dict.fromkeys(names, domain),
        "routed": {"router": 120},
        "asked": 960,
        "scored": 900,
        "pairs": 120,
        "no_pair": {},
        "length_fallbacks": 0,
        "tokens": 90_000,
        "scoring_s": 300.0,
        "engines": EngineUse({"strong": 12.0, "weak": 11.0}, busy_s=540.0, at_hand_s=600.0),
        "wall_s": 400.0,
    }
    return Summary(**{**values, **changes})


def make_report(
    names: tuple[str, ...] = ("chat", "math_code", "safety"), *, texts: bool = True, **changes: Any
) -> AnnotationData:
    """Make a report in which nothing looks wrong."""
    config = make_config(report={"texts": texts})
    record = RunRecord(
        run_id="20260131T120000-1a2b3c",
        job="annotate",
        dataset="toy",
        reward_name="toy-reward",
        reward_key="k",
        config_hash="h",
        config="{}",
        input_versions={"completions": 3},
        outcome="done",
        started_at=dt.datetime(2026, 1, 31, 12, tzinfo=dt.UTC),
    )
    values: dict[str, Any] = {
        "run": record,
        "config": config,
        "summary": make_summary(names),
        "engine_versions": ("stub 1",),
        "domains": {name: make_domain() for name in names},
        "hidden": (),
        "pairs": {name: tuple(make_pair(n, name, texts=texts) for n in range(2)) for name in names},
        "unsure_pairs": tuple(make_pair(9, n, margin=0.02, texts=texts) for n in names[:1]),
        "tokens_missing": None,
        "rebuild": "jobs/report.py --warehouse /data/warehouse --run 20260131T120000-1a2b3c",
        "preferences": "delta.`/data/warehouse/preferences`",
    }
    return AnnotationData(**{**values, **changes})


def with_summary(data: AnnotationData, **changes: Any) -> AnnotationData:
    """Change numbers of the summary."""
    return dataclasses.replace(data, summary=dataclasses.replace(data.summary, **changes))


# --- an evaluation -------------------------------------------------------------------------------

SECTIONS = ("Chat", "Law & <b>order</b>", "Maths", "Absent")


def make_judged(wins: dict[str, int], *, longer: bool = False, left_out: int = 0) -> pd.DataFrame:
    """Fifty pairs per section; of them so many won, by margins of 0.1, 0.2, ... either way.

    Args:
        wins: by section.
        longer: chosen is longer where the pair is won, and shorter where it is lost.
        left_out: pairs of the first section that have no verdict, besides.
    """
    rows = []
    for section, won in wins.items():
        for number in range(50):
            size = 0.1 * (1 + number)
            difference = 20 if (number < won if longer else number % 2) else -20
            rows.append(
                {
                    "prompt_id": f"{section}/{number:02d}",
                    "section": section,
                    "subset": f"{section}, part {number % 2}: $x",
                    "domain": "chat" if number % 5 else "safety",
                    "domain_source": "router",
                    "margin": size if number < won else -size,
                    "chosen_num_tokens": 60 + difference,
                    "rejected_num_tokens": 60,
                    "status": "ok",
                    "reason": None,
                }
            )
    empty = {"margin": None, "chosen_num_tokens": None, "rejected_num_tokens": None}
    rows += [
        {**rows[0], **empty, "prompt_id": f"out-{n}", "status": "rejected", "reason": "too_long"}
        for n in range(left_out)
    ]
    return pd.DataFrame(rows, columns=list(JUDGED_COLUMNS))


def make_evaluated(
    title: str, judged: pd.DataFrame, *, texts: bool = True, **reward: Any
) -> EvaluatedRow:
    """Make a row; its run's id ends with its title's first letter."""
    model = {"path": "stub-model", "engine": "stub"}
    name = title.partition(" ")[0].lower()
    tree = {
        "dataset": "bench",
        "warehouse": "/data/warehouse",
        "input": {"path": "/data/pairs", "columns": {"section": "s", "subset": "t"}},
        "reward": {
            "name": name,
            "models": {
                "strong": {**model, "adapter": "s", "tuned_from": "weak"},
                "weak": model,
                "router": model,
            },
            "prompt_pack": "conf/prompts/cdr-v1.yaml",
            **reward,
        },
        "rows": {name: {"title": title, "printed": {"Chat": 92.2}}},
        "sections": list(SECTIONS),
        "oracle": dict.fromkeys(SECTIONS, "chat"),
        "report": {"texts": texts},
    }
    config = EvaluateConfig.model_validate(tree)
    record = RunRecord(
        run_id=f"20260131T120000-{name[0]}",
        job="evaluate",
        dataset="bench",
        reward_name=name,
        reward_key=name,
        config_hash="h",
        config="{}",
        input_versions={},
        outcome="done",
        counts={"logprobs_asked": 400, "logprobs_scored": 300},
        started_at=dt.datetime(2026, 1, 31, 12, tzinfo=dt.UTC),
    )
    report = score_pairs(judged, SECTIONS, resamples=200, seed=0)
    sections = [name for name in report.length if name in SECTIONS]
    return EvaluatedRow(
        title=title,
        run=record,
        config=config,
        report=report,
        margins=measure_margins(judged, sections),
        pairs={
            section: SurestPairs(
                wins=(make_pair(1, "chat", texts=texts),),
                losses=(make_pair(2, "safety", margin=-4.5, texts=texts),),
            )
            for section in sections
        },
    )


def make_evaluation(rows: Sequence[EvaluatedRow] | None = None, **changes: Any) -> EvaluationData:
    """Make an evaluation of two rows: above, below and at chance; the second one is all length."""
    a = make_judged({"Chat": 45, SECTIONS[1]: 10, "Maths": 26}, left_out=3)
    b = make_judged({"Chat": 40, SECTIONS[1]: 45, "Maths": 45}, longer=True)
    default = [make_evaluated("plain ratio", a), make_evaluated("CDR <i>router</i>", b)]
    compared = compare_judged(
        a, b, ("plain ratio", "CDR <i>router</i>"), sections=SECTIONS, resamples=200, seed=0
    )
    values: dict[str, Any] = {
        "rows": tuple(default if rows is None else rows),
        "comparisons": (compared,) if rows is None else (),
        "rebuild": "jobs/report.py --warehouse /data/warehouse --run 20260131T120000-p",
        "benchmark_pairs": "delta.`/data/warehouse/benchmark_pairs`",
        "rewards": "delta.`/data/warehouse/rewards`",
    }
    return EvaluationData(**{**values, **changes})
