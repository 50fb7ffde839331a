"""What a policy study found: a value per policy, benchmark and metric, in print and in Delta.

Read from the records of what is done (`cdr.policy_study_run`), so a table can be made at any time,
of as many rows as there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cdr.policy_study import PolicyPlan
from cdr.policy_study_config import START, TRAIN
from cdr.tables import POLICY_RESULTS
from cdr.text_table import render_table
from cdr.warehouse import Warehouse

Records = Mapping[str, Mapping[str, Any]]
"""Records by label of the stages that are done."""


def list_results(plan: PolicyPlan, records: Records) -> list[dict[str, Any]]:
    """Give the columns of `policy_results` but `run_id`, a row per value.

    Args:
        plan: the study.
        records: of its stages that are done; a benchmark that is not has no rows.
    """
    config, found = plan.config, []
    for row in plan.rows:
        trained = records.get(f"{row}.{TRAIN}", {}).get("outcome", {})
        for name, stage in plan.answering(row).items():
            if stage.label not in records:
                continue
            outcome = records[stage.label]["outcome"]
            start = config.train.start
            about = {
                "study": config.study,
                "row": row,
                "benchmark": name,
                "title": config.title_of(row),
                "reward_key": plan.rewards.get(row),
                **{key: trained.get(key) for key in ("learning_rate", "beta")},
                "validation_accuracy": trained.get("validation_accuracy"),
                "policy": trained.get("policy") or start.neutral_name,
                "answers": outcome["model"],
                "mlflow_run_id": outcome.get("mlflow_run_id"),
            }
            for metric, value in _values(outcome).items():
                printed = config.rows[row].printed.get(name, {}).get(metric)
                found.append({**about, "metric": metric, "printed": printed, **value})
    return found


def _values(outcome: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Give value, interval, questions and judge by metric."""
    answers = outcome["answers"]
    none = {"ci_low": None, "ci_high": None, "judge": None}
    found = {
        f"length_{unit}": {**none, "value": answers[f"{unit}_mean"],
                           "questions": answers["questions"]}
        for unit in ("chars", "tokens")
    }  # fmt: skip
    judged = outcome.get("judge", {})
    for metric, score in judged.items():
        if isinstance(score, Mapping):
            found[metric] = _estimate(score, judged["judge"])
    for role, metric in (("reward", "reward_win_rate"), ("held_out_reward", "held_out_win_rate")):
        if role in outcome:
            found[metric] = _estimate(outcome[role]["win_rate"], outcome[role]["reward"])
    return found


def _estimate(score: Mapping[str, Any] | None, judge: str) -> dict[str, Any]:
    score = score or {}
    return {
        **{key: score.get(key) for key in ("value", "ci_low", "ci_high")},
        "questions": score.get("count", 0),
        "judge": judge,
    }


def render_results(plan: PolicyPlan, records: Records) -> str:
    """Write the table for a terminal: a policy a row, published values in brackets."""
    config = plan.config
    values = {
        (one["row"], one["benchmark"], one["metric"]): one for one in list_results(plan, records)
    }
    columns = [
        (name, metric, f"{name} {head}")
        for name in config.benchmarks
        for metric, head in config.columns_of(name).items()
    ]
    has_printed = any(row.printed for row in config.rows.values())
    lines = []
    for row in plan.rows:
        cells = []
        for benchmark, metric, _ in columns:
            cell = _cell(values.get((row, benchmark, metric)))
            if has_printed:
                printed = config.rows[row].printed.get(benchmark, {}).get(metric)
                cell += " (-)" if printed is None else f" ({printed:g})"
            cells.append(cell)
        trained = records.get(f"{row}.{TRAIN}", {}).get("outcome", {})
        accuracy = trained.get("validation_accuracy")
        lines.append(
            (
                config.title_of(row),
                *cells,
                *(f"{trained[key]:g}" if trained else None for key in ("learning_rate", "beta")),
                None if accuracy is None else f"{100 * accuracy:.1f}%",
            )
        )
    header = ("policy", *(head for _, _, head in columns), "rate", "beta", "accuracy")
    notes = [
        "±: half of the 95 % interval; rate, beta: the best of the search, by its accuracy on "
        "the row's own validation pairs"
    ]
    if config.judged_by == "rewards":
        names = {
            one["judge"]: None for one in values.values() if one["metric"].endswith("_win_rate")
        }
        notes.append(f"WR: percent of questions won over {config.title_of(START)}, ties half; by "
                     f"{', '.join(names) or 'the rewards'}")  # fmt: skip
    if has_printed:
        notes.append("in brackets: as published")
    return "\n".join([*render_table(header, lines), *notes])


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None or found["value"] is None:
        return "-"
    if found["metric"].startswith("length_"):
        return f"{found['value']:,.0f}"
    return f"{found['value']:.1f} ±{(found['ci_high'] - found['ci_low']) / 2:.1f}"


def metrics_of(plan: PolicyPlan, records: Records) -> dict[str, Any]:
    """Give the values by row, benchmark and metric, for MLflow."""
    found: dict[str, Any] = {}
    for one in list_results(plan, records):
        place = found.setdefault(one["row"], {}).setdefault(one["benchmark"], {})
        place[one["metric"]] = one["value"]
    return found


def write_results(plan: PolicyPlan, records: Records, warehouse: Warehouse, run_id: str) -> int:
    """Put the values in the place of those that the table has of these rows; give their number."""
    results = [{**one, "run_id": run_id} for one in list_results(plan, records)]
    names = POLICY_RESULTS.names()
    for row in plan.rows:  # one without results loses those of an earlier configuration
        values = [tuple(one[name] for name in names) for one in results if one["row"] == row]
        frame = warehouse.spark.createDataFrame(values, POLICY_RESULTS.schema())
        warehouse.replace(POLICY_RESULTS, frame, study=plan.config.study, row=row)
    return len(results)
