"""How well a tuned model tells chosen from rejected, and the model card that says so.

    reward(x, y) = log p_tuned(y | x) − log p_start(y | x)

A pair counts as right when the chosen answer's reward is strictly higher. Beside it stands what
length alone would reach: an accuracy that does not beat it shows nothing. Pure functions, no torch.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cdr.accuracy import Tally
from cdr.dpo_data import EncodedPair

ALL_SECTIONS: Final = "All"


@dataclass(frozen=True)
class HeldOutPair:
    """A pair's log-ratios.

    Args:
        section: what results are reported by.
        subset: finer than section.
        chosen_ratio: log p_tuned − log p_start of the chosen answer, sum over its tokens, nats.
        rejected_ratio: the same of the rejected one.
        chosen_tokens: tokens of the chosen answer, end-of-turn token included.
        rejected_tokens: the same of the rejected one.
    """

    section: str
    subset: str
    chosen_ratio: float
    rejected_ratio: float
    chosen_tokens: int
    rejected_tokens: int


def summarize(pairs: Sequence[HeldOutPair]) -> dict[str, dict[str, Any]]:
    """Compute accuracies per section, and over all pairs under `All`.

    Args:
        pairs: held-out pairs with their ratios.

    Returns:
        Per section: `n`, `accuracy_sum` with `ci95` and `ties`, `accuracy_mean` (ratio per token)
        with its own, `longer_wins` (accuracy of "more tokens is better", a tie being wrong), and
        `subsets` (n and accuracy_sum each).
    """
    sections = {
        name: [p for p in pairs if p.section == name] for name in {p.section for p in pairs}
    }
    result = {name: _summarize_section(sections[name]) for name in sorted(sections)}
    result[ALL_SECTIONS] = _summarize_section(pairs)
    del result[ALL_SECTIONS]["subsets"]
    return result


def count_sources(pairs: Iterable[EncodedPair]) -> list[dict[str, Any]]:
    """Count pairs per source and licence, most first."""
    counts = Counter((item.pair.source, item.pair.license) for item in pairs)
    return [
        {"source": source, "license": license_, "pairs": number}
        for (source, license_), number in sorted(counts.items(), key=lambda c: (-c[1], c[0]))
    ]


def describe_command(argv: Sequence[str]) -> str:
    """Give the training's command line for the card, absolute paths cut to their last part.

    Args:
        argv: the arguments behind the job's name.
    """
    words = [Path(word).name if Path(word).is_absolute() else word for word in argv]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    start = "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"
    return " ".join([start, "-m jobs.train_dpo", *words])


def render_table(held_out: Mapping[str, Mapping[str, Any]]) -> str:
    """Render the result of `summarize` as a Markdown table."""
    lines = [
        "| section | n | ratio, sum | 95 % CI | ties | ratio per token | 95 % CI | longer wins |",
        "| --- | ---: | ---: | --- | ---: | ---: | --- | ---: |",
    ]
    for section in sorted(held_out, key=lambda name: (name == ALL_SECTIONS, name)):
        row = held_out[section]
        lines.append(
            f"| {section} | {row['n']} | {row['accuracy_sum']:.3f} | {_interval(row['ci95_sum'])} "
            f"| {row['ties_sum']} | {row['accuracy_mean']:.3f} | {_interval(row['ci95_mean'])} "
            f"| {row['longer_wins']:.3f} |"
        )
    return "\n".join(lines)


def render_card(metrics: Mapping[str, Any]) -> str:
    """Render the adapter's README from the content of its metrics.json."""
    config, data, training = metrics["config"], metrics["data"], metrics["training"]
    held_out_by_source = {
        (row["source"], row["license"]): row["pairs"] for row in data["held_out_pairs_by_source"]
    }
    sources = "\n".join(
        f"| {row['source']} | {row['license']} | {row['pairs']} "
        f"| {held_out_by_source.get((row['source'], row['license']), 0)} |"
        for row in data["train_pairs_by_source"]
    )
    end = (
        "It ran to its planned end"
        if training["finished"]
        else f"**It was stopped early**, at step {training['steps']} of {training['planned_steps']}"
    )
    left_out = ", ".join(f"{n} {reason}" for reason, n in data["left_out_of_train"].items())
    left_out_test = ", ".join(f"{n} {reason}" for reason, n in data["left_out_of_held_out"].items())
    hyper = "\n".join(f"| {key} | {value} |" for key, value in sorted(config.items()))
    return f"""---
base_model: {config["base_name"]}
library_name: peft
license: apache-2.0
tags: [dpo, lora, trl]
---

# {config["base_name"]}, tuned with DPO

A LoRA adapter on `{config["base_name"]}`: the strong model of the demo, whose weak model is its own
start. It exists to show density-ratio rewards on a laptop, and is no assistant to be used: a model
of this size is often wrong, and its refusals are no protection.

## How it was made

```
{metrics["command"]}
```

- Method: DPO (arXiv 2305.18290) with TRL; LoRA of rank {config["rank"]} on every linear layer but
  the head; beta {config["beta"]}, learning rate {config["learning_rate"]}, seed {config["seed"]}.
- Length: {data["train_pairs"]} pairs ({data["train_tokens"]} tokens), {config["batch_size"]} per
  step. {end}; {training["steps"]} of {training["planned_steps"]} steps are done.
- Pairs longer than {config["max_length"]} tokens (prompt and longer answer) are left out, never
  cut. Left out of the training pairs: {left_out or "none"}; of the held-out ones:
  {left_out_test or "none"}. Of those that fit, {data["not_drawn"]} were not drawn (sections, and
  the subsets in them, have equal shares as far as they reach).

## Held-out pairs

Reward of an answer: log p_tuned − log p_start, as a sum over its tokens or per token. A pair is
right when the chosen answer's is strictly higher. {config["holdout_fraction"]:.0%} of each
section's prompts are held out by hash; they share neither prompt nor group with a training pair.
Intervals are Wilson's. "Longer wins" is what choosing the answer with more tokens reaches.

{render_table(metrics["held_out"])}

## Data

None of it is stored here.

| source | licence | training pairs | held-out pairs |
| --- | --- | ---: | ---: |
{sources}

Pairs per section in training: {_list_counts(data["train_pairs_by_section"])}.

## Configuration

| key | value |
| --- | --- |
{hyper}
"""


def _summarize_section(pairs: Sequence[HeldOutPair]) -> dict[str, Any]:
    longer = Tally.of([pair.chosen_tokens - pair.rejected_tokens for pair in pairs])
    result: dict[str, Any] = {"n": len(pairs), "longer_wins": longer.accuracy or 0.0}
    margins: dict[str, Callable[[HeldOutPair], float]] = {
        "sum": lambda p: p.chosen_ratio - p.rejected_ratio,
        "mean": lambda p: p.chosen_ratio / p.chosen_tokens - p.rejected_ratio / p.rejected_tokens,
    }
    for name, margin in margins.items():
        tally = Tally.of([margin(pair) for pair in pairs])
        result[f"accuracy_{name}"] = tally.accuracy or 0.0
        result[f"ci95_{name}"] = list(tally.interval)
        result[f"ties_{name}"] = tally.ties
    result["subsets"] = {
        subset: _summarize_subset([pair for pair in pairs if pair.subset == subset], margins["sum"])
        for subset in sorted({pair.subset for pair in pairs})
    }
    return result


def _summarize_subset(
    pairs: Sequence[HeldOutPair], margin: Callable[[HeldOutPair], float]
) -> dict[str, Any]:
    tally = Tally.of([margin(pair) for pair in pairs])
    return {"n": tally.total, "accuracy_sum": tally.accuracy}


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.2f}–{bounds[1]:.2f}"


def _list_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items())
