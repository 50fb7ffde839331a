"""How a SimPO policy does on validation pairs, which of a grid is best, and the card that says so.

    reward(x, y) = β · mean log p_policy(y | x)

A pair counts as right when the chosen answer's reward, which is its log-prob per token whatever β
is, is strictly higher. Pure functions, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cdr.accuracy import Tally
from cdr.dpo_data import EncodedPair, describe_counts
from cdr.text_table import render_table

ALL_DOMAINS: Final = "All"


def measure_predictions(output: Any) -> dict[str, float]:
    """Measure a trainer's predictions for its curves.

    Args:
        output: transformers' `EvalPrediction`; `predictions` are mean log-probs per token of
            chosen and rejected, [n, 2] nats.

    Returns:
        `accuracy` of the pairs, 0 to 1; means of `margin` (chosen − rejected), `chosen_logprob`
        and `rejected_logprob`, nats per token.
    """
    scores = np.asarray(output.predictions, dtype=np.float64)
    return _measure(scores[:, 0], scores[:, 1])


def summarize(pairs: Sequence[EncodedPair], scores: NDArray[Any]) -> dict[str, dict[str, Any]]:
    """Summarize validation pairs by domain, and all of them under `All`.

    Args:
        pairs: n pairs.
        scores: their mean log-probs per token of chosen and rejected, [n, 2] nats, in order.

    Returns:
        Per domain what `measure_predictions` gives, `n`, `ci95` of the accuracy, `ties`, and
        `longer_wins`, the accuracy of "more tokens is better".
    """
    values = np.asarray(scores, dtype=np.float64)
    domains = np.array([item.pair.section for item in pairs])
    longer = np.array([len(item.chosen_ids) - len(item.rejected_ids) for item in pairs])
    chosen_by = {name: domains == name for name in sorted(set(domains.tolist()))}
    chosen_by[ALL_DOMAINS] = np.ones(len(pairs), dtype=bool)
    result = {}
    for name, rows in chosen_by.items():
        chosen, rejected = values[rows, 0], values[rows, 1]
        tally = Tally.of(chosen - rejected)
        result[name] = {
            "n": tally.total,
            **_measure(chosen, rejected),
            "ci95": list(tally.interval),
            "ties": tally.ties,
            "longer_wins": Tally.of(longer[rows]).accuracy,
        }
    return result


def take_start(entries: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Take how the start model did from a trainer's log entries of step 0; None without them."""
    if not entries:
        return None
    names = ("accuracy", "margin", "chosen_logprob", "rejected_logprob")
    return {name: entries[0][f"eval_{name}"] for name in names}


def choose_best(points: Mapping[str, Mapping[str, Any]]) -> str:
    """Name the best point of a grid.

    Args:
        points: each point's metrics by its name, at least one.

    Returns:
        The one with the highest validation accuracy; of equals the one with the largest mean
        margin per token; of equals again, and without validation pairs, the first.
    """

    def rank(name: str) -> tuple[float, float]:
        everything = (points[name]["validation"] or {}).get(ALL_DOMAINS)
        return (everything["accuracy"], everything["margin"]) if everything else (0.0, 0.0)

    return max(points, key=rank)


def render_search(metrics: Mapping[str, Any]) -> str:
    """Write a search's result for a terminal: a line per point, the best one marked."""
    rows = []
    for name, point in metrics["points"].items():
        config, validation = point["config"], point["validation"]
        everything = validation[ALL_DOMAINS] if validation else None
        rows.append(
            (
                "*" if name == metrics["best"] else "",
                f"{config['learning_rate']:g}",
                f"{config['beta']:g}",
                f"{config['gamma']:g}",
                point["training"]["steps"],
                f"{point['training']['loss'][-1]['loss']:.4f}",
                f"{point['start']['accuracy']:.3f}" if point["start"] else None,
                f"{everything['accuracy']:.3f}" if everything else None,
                _interval(everything["ci95"]) if everything else None,
                f"{everything['margin']:.3f}" if everything else None,
            )
        )
    header = (
        *("", "rate", "beta", "gamma", "steps", "loss", "start"),
        *("accuracy", "95 % CI", "margin"),
    )
    data = metrics["data"]
    lines = [
        *render_table(header, rows),
        "",
        f"accuracy and margin (nats per token) on {data['validation_pairs']:,} validation pairs; "
        "start: the start model's",
    ]
    return "\n".join(lines)


def render_card(metrics: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    """Render the policy's README.

    Args:
        metrics: of the search.
        origin: where the pairs came from, by name.
    """
    point = metrics["points"][metrics["best"]]
    config, data = point["config"], metrics["data"]
    is_adapter = config["lora_rank"] is not None
    left_out = "; ".join(
        f"{split}: {describe_counts(counts)}" for split, counts in data["left_out"].items()
    )
    validation = point["validation"] or {}
    rows = "\n".join(
        f"| {name} | {row['n']} | {row['accuracy']:.3f} | {_interval(row['ci95'])} "
        f"| {row['ties']} | {row['margin']:.3f} | {row['longer_wins']:.3f} |"
        for name, row in validation.items()
    )
    start = point["start"]
    before = f"The start model has {start['accuracy']:.3f}." if start else ""
    places = "\n".join(f"| {name} | {value} |" for name, value in origin.items())
    hyper = "\n".join(f"| {key} | {value} |" for key, value in sorted(config.items()))
    return f"""---
base_model: {config["base_name"]}
library_name: {"peft" if is_adapter else "transformers"}
tags: [simpo, trl{", lora" if is_adapter else ""}]
---

# {config["base_name"]}, tuned with SimPO

{"A LoRA adapter on" if is_adapter else "All weights of"} `{config["base_name"]}`, trained with
SimPO (arXiv 2405.14734) on preference pairs that were annotated without human labels. It is the
best of {len(metrics["points"])} by validation reward accuracy; `metrics.json` beside the folder has
all.

- {data["train_pairs"]} training pairs ({data["train_tokens"]} tokens), {config["batch_size"]} per
  step, {point["training"]["steps"]} of {point["training"]["planned_steps"]} steps.
- Pairs longer than {config["max_length"]} tokens are left out, never cut. Left out: {left_out}.

## Validation pairs

A pair is right when the chosen answer's log-prob per token is higher. {before} These labels are the
reward's own: they say whether the policy learned them, not whether they are right.

| domain | n | accuracy | 95 % CI | ties | margin, nats per token | longer wins |
| --- | ---: | ---: | --- | ---: | ---: | ---: |
{rows}

## Where the pairs came from

| | |
| --- | --- |
{places}

## Configuration

| key | value |
| --- | --- |
{hyper}
"""


def _measure(chosen: NDArray[Any], rejected: NDArray[Any]) -> dict[str, float]:
    return {
        "accuracy": Tally.of(chosen - rejected).accuracy or 0.0,
        "margin": float(np.mean(chosen - rejected)),
        "chosen_logprob": float(np.mean(chosen)),
        "rejected_logprob": float(np.mean(rejected)),
    }


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.2f}–{bounds[1]:.2f}"
