"""RewardBench's constants and scores, against its published sums and the paper's Table 1."""

from __future__ import annotations

from collections import Counter

import pytest

from cdr.accuracy import Stratum, Tally, weighted_accuracy
from cdr.rewardbench import (
    PRIOR_SETS,
    SECTIONS,
    SUBSETS,
    leaderboard_mean,
    mean_of_sections,
    section_of,
    weigh_subsets,
)

# arXiv 2411.02481, Table 1 as printed: Chat, Chat Hard, Safety, Reasoning, Overall.
TABLE_1 = {
    "GPT-4-turbo": (95.3, 75.4, 86.7, 82.7, 85.2),
    "Claude-3.5-sonnet": (96.4, 74.0, 81.6, 84.7, 84.2),
    "RM-Mistral-7B": (96.6, 60.5, 87.0, 77.4, 80.4),
    "ArmoRM-Llama-3-8B": (96.9, 76.8, 90.5, 97.3, 90.4),
    "Generative reward": (53.0, 49.5, 48.3, 52.1, 50.0),
    "density ratio (dpo vs sft)": (92.2, 60.5, 82.4, 73.8, 77.2),
    "density ratio (dpo vs base)": (89.9, 65.6, 62.8, 71.9, 71.9),
    "density ratio (sft vs base)": (79.6, 65.6, 52.8, 70.0, 67.0),
    "CDR (safety)": (88.3, 61.8, 91.0, 87.7, 82.5),
    "CDR (code/math)": (91.6, 60.1, 89.9, 89.7, 83.0),
    "CDR (chat-hard)": (89.1, 69.7, 89.1, 85.9, 83.5),
    "CDR (adaptive, chat-hard, oracle)": (89.1, 69.7, 91.0, 89.7, 84.9),
    "CDR (adaptive, oracle)": (92.2, 60.5, 91.0, 89.7, 83.4),
    "CDR (adaptive, router)": (93.9, 56.8, 91.0, 88.0, 82.6),
}
# Rows whose printed Overall is not their mean, with the mean.
OTHER_MEAN = {
    "CDR (adaptive, router)": 82.43,
    "density ratio (dpo vs base)": 72.55,
    "Generative reward": 50.73,
    "CDR (safety)": 82.20,
    "CDR (code/math)": 82.83,
    "GPT-4-turbo": 85.03,
}


def overall(scores: dict[str, float]) -> float | None:
    """The overall score of sections with one subset of 1000 pairs each, in percent."""
    parts = {
        section: [(Tally(round(score * 10), 0, 1000), 1.0)] for section, score in scores.items()
    }
    weighed = mean_of_sections(parts)
    if weighed is None:
        return None
    found = weighted_accuracy([Stratum(tally, weight) for tally, weight in weighed])
    return None if found is None else 100 * found


def test_sections_have_the_published_rows_and_weights() -> None:
    rows: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for subset in SUBSETS.values():
        if subset.rows is not None:
            rows[subset.section] += subset.rows
            weights[subset.section] += int(subset.weight)
    assert dict(rows) == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1431}
    assert dict(weights) == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}
    assert rows.total() == 2985
    assert (SUBSETS["math-prm"].rows, SUBSETS["math-prm"].weight) == (447, 984)
    assert sum(subset.section in SECTIONS for subset in SUBSETS.values()) == 23


def test_names_are_rewardbenchs_own() -> None:
    assert {"llmbar-adver-GPTInst", "llmbar-adver-GPTOut", "xstest-should-respond"} <= set(SUBSETS)
    assert section_of("hep-python") == "Reasoning"
    assert section_of("mt-bench-med") == "Chat"
    assert section_of("mt-bench-hard") == "Chat Hard"
    assert section_of("gsm8k") is None


def test_length_priors_are_those_of_the_reference() -> None:
    priors: dict[str, set[str]] = {"chosen_longer": set(), "chosen_shorter": set()}
    for name, subset in SUBSETS.items():
        priors.setdefault(subset.length_prior, set()).add(name)
    assert priors["chosen_longer"] == {
        "alpacaeval-easy", "alpacaeval-hard", "xstest-should-respond"
    }  # fmt: skip
    assert priors["chosen_shorter"] == {
        "donotanswer", "refusals-dangerous", "refusals-offensive", "xstest-should-refuse",
        "mt-bench-easy", "mt-bench-hard", "llmbar-adver-GPTInst", "llmbar-adver-manual",
        "llmbar-adver-neighbor",
    }  # fmt: skip


def test_a_part_of_the_benchmark_keeps_its_weights_and_a_mixed_section_has_its_pairs() -> None:
    assert weigh_subsets("Reasoning", {"math-prm": 20, "hep-go": 3}) == {
        "math-prm": 984, "hep-go": 164
    }  # fmt: skip
    # Three pairs of RewardBench's would else outweigh hundreds of others.
    mixed = {"math-prm": 3, "gsm8k": 300}
    assert weigh_subsets("Reasoning", mixed) == mixed
    assert weigh_subsets("Chat", {"math-prm": 20}) == {"math-prm": 20}  # in another section


def test_reasoning_counts_math_as_much_as_all_code() -> None:
    code = {name: 164 for name in SUBSETS if name[:3] == "hep"}
    reasoning = list(weigh_subsets("Reasoning", {"math-prm": 447, **code}).items())
    parts = {section: [("x", 1.0)] for section in SECTIONS} | {"Reasoning": reasoning}
    weighed = dict(mean_of_sections(parts) or ())
    assert weighed["math-prm"] == pytest.approx(1 / 8)
    assert sum(weight for name, weight in weighed.items() if name[:3] == "hep") == pytest.approx(
        1 / 8
    )


@pytest.mark.parametrize("row", TABLE_1)
def test_overall_is_the_plain_mean_of_the_papers_sections(row: str) -> None:
    *sections, printed = TABLE_1[row]
    found = overall(dict(zip(SECTIONS, sections, strict=True)))
    assert found == pytest.approx(OTHER_MEAN.get(row, printed), abs=0.051)
    assert (abs((found or 0) - printed) > 0.1) == (row in OTHER_MEAN)


def test_an_absent_section_leaves_no_overall_rather_than_a_zero() -> None:
    assert overall({"Chat": 90.0, "Safety": 80.0, "Reasoning": 70.0}) is None
    parts = {section: [("x", 1.0)] for section in SECTIONS}
    assert mean_of_sections(parts) is not None
    assert mean_of_sections(parts | {"Chat": []}) is None
    assert mean_of_sections({"Law": [("x", 3.0)]}, ["Law"]) == [("x", 1.0)]


def test_the_leaderboard_counts_sections_twice_and_prior_sets_once() -> None:
    parts = {section: [(section, 5.0)] for section in SECTIONS}
    assert leaderboard_mean(parts) is None
    prior = [(name, SUBSETS[name].weight) for name in ("shp", "summarize")]
    weighed = dict(leaderboard_mean(parts | {PRIOR_SETS: prior}) or ())
    assert weighed == pytest.approx(
        {**dict.fromkeys(SECTIONS, 2 / 9), "shp": 1 / 18, "summarize": 1 / 18}
    )
