"""Several rewards in one job: a row that fails is that row's matter, and what is done is shown.

    row after row, until the end, a stop signal, or an error that every row would meet
    -> the table of the rows that are done, their differences, router audits, the report page

`cdr.evaluation` has the life of one row.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Sequence

from cdr.cli import FAILED, KEPT, OK, STOPPED, explain_spark_error
from cdr.errors import CdrError, InputError, ModelError, SetupError, TableError
from cdr.evaluation import (
    Evaluated,
    EvaluationRun,
    record_comparison,
    report_rows,
    summarize_rows,
)
from cdr.evaluation_plan import EvaluationPlan
from cdr.executors import settle_device
from cdr.redaction import first_line
from cdr.runs import StopSignal
from cdr.tables import RUNS
from cdr.warehouse import Warehouse

EvaluateRow = Callable[[EvaluationPlan, EvaluationRun], Evaluated]


def evaluate_rows(
    plans: Sequence[EvaluationPlan], warehouse: Warehouse, evaluate_row: EvaluateRow
) -> int:
    """Carry out the plans, one after the other; print what those say together that are done.

    Args:
        plans: the rows, at least one.
        warehouse: where the tables are.
        evaluate_row: the recipe of one row.

    Returns:
        Exit code: 4 after a stop signal, 1 where a row failed, else the highest of the rows'.

    Raises:
        SetupError: this cluster has not what a row's models need; no row has begun then.
        Exception: the error of the only row, or one that every row would meet: of the input, the
            tables, the setup. What was done before is printed first.
    """
    for plan in plans[1:]:  # the first one's run begins with this
        # A model that cannot run here at all is the matter of its row, which says so in its turn.
        with contextlib.suppress(ModelError):
            settle_device(plan.annotation.config.run, plan.annotation.engines(), warehouse.spark)
    done: list[Evaluated] = []
    missing = {plan.name: "not begun" for plan in plans}
    code = OK
    try:
        with StopSignal(warehouse.spark, plans[0].config.run.max_hours) as stop:
            for plan in plans:
                if stop.requested:
                    print(f"\nstopped: {stop.requested}. {KEPT}")
                    code = STOPPED
                    break
                missing[plan.name] = "failed"
                try:
                    with EvaluationRun(plan, warehouse, stop) as run:
                        done.append(evaluate_row(plan, run))
                except Exception as error:
                    if len(plans) == 1 or _is_of_every_row(error, warehouse):
                        raise
                    _say(plan, error)
                    continue
                if run.exit_code == STOPPED:
                    missing[plan.name] = "stopped"
                    code = STOPPED
                    break
                del missing[plan.name]
                code = max(code, run.exit_code)
    except Exception:
        try:
            _show(done, missing, warehouse)
        except Exception as error:  # the first one is told, and this may well come of it
            print(f"warning: not all of it could be shown: {first_line(error)}", file=sys.stderr)
        raise
    # The signals have their own handlers again: another one now ends the job at once.
    if not stop.is_urgent:
        _show(done, missing, warehouse)
    return FAILED if code != STOPPED and missing else code


def _is_of_every_row(error: Exception, warehouse: Warehouse) -> bool:
    """Tell an error of what rows share from one of a row's models; workers' errors are a row's."""
    if isinstance(error, InputError | SetupError | TableError):
        return True
    if "No space left on device" in str(error):
        return True
    try:
        warehouse.exists(RUNS)
    except Exception:  # the tables are out of reach, or Spark is no more
        return True
    return False


def _say(plan: EvaluationPlan, error: Exception) -> None:
    known = str(error) if isinstance(error, CdrError) else explain_spark_error(error)
    if known is None:
        traceback.print_exception(error)
        known = first_line(error)
    print(f"\nrow '{plan.name}' failed: {known}", file=sys.stderr)


def _show(done: list[Evaluated], missing: dict[str, str], warehouse: Warehouse) -> None:
    if done:
        text, comparisons = summarize_rows(done)
        print(f"\n{text}")
        if page := report_rows(done, warehouse):
            print(f"\nreport: {page}")
        first = done[0].plan
        for found in comparisons:
            record_comparison(found, first.annotation.dataset, first.config, warehouse)
    if done and missing:
        listed = ", ".join(f"{name} ({state})" for name, state in missing.items())
        print(f"\nwithout a result: {listed}")
