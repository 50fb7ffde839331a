"""The part of the recipe that annotating, evaluating and the pair study share.

Not a job of its own: `jobs/annotate.py`, `jobs/evaluate.py` and `jobs/pair_study.py` call it.
"""

from __future__ import annotations

from typing import NamedTuple

from pyspark.sql import DataFrame

from cdr.forecast import assume_routes, forecast
from cdr.routing import give_domains, plan_routing, route_wave
from cdr.scoring import Work, plan_waves, plan_work, score_wave
from cdr.scoring_run import ScoringRun
from cdr.stages import Context, encode, group_prompts, reject, reward
from udfs.encode import ENCODED_DDL, make_encode
from udfs.route import make_route
from udfs.score import make_score


class Asked(NamedTuple):
    """Candidates whose log-probs are in the store: their domains, their token ids, the work."""

    routed: DataFrame
    encoded: DataFrame
    work: Work


class Scored(NamedTuple):
    """This dataset's rows of `rewards` and `rejects` as just written, and what was asked."""

    rewards: DataFrame
    rejects: DataFrame
    work: Work


def ask_models(candidates: DataFrame, run: ScoringRun) -> Asked:
    """Route and encode candidates, and score what the store lacks."""
    context = run.context
    prompts = group_prompts(candidates)
    routing = plan_routing(prompts, context)
    for buckets in run.routing_waves(routing):
        run.routed(route_wave(buckets, routing, context, make_route, run.counter))
    routed = give_domains(prompts, routing, context)
    encoded = encode(routed, context, make_encode(context.plan.encoding), ENCODED_DDL)
    work = plan_work(encoded, context)
    for wave in run.scoring_waves(plan_waves(work, context), work):
        run.scored(score_wave(wave, work, context, make_score, run.counter))
    return Asked(routed, encoded, work)


def score_candidates(candidates: DataFrame, run: ScoringRun) -> Scored:
    """Route, encode, score and reward candidates."""
    routed, encoded, work = ask_models(candidates, run)
    rewards = reward(candidates, routed, encoded, run.failures(), run.context)
    return Scored(rewards, reject(candidates, encoded, run.context), work)


def forecast_candidates(candidates: DataFrame, context: Context) -> str:
    """Say what scoring the candidates would take."""
    routed = assume_routes(group_prompts(candidates), context)
    encoded = encode(routed, context, make_encode(context.plan.encoding), ENCODED_DDL)
    return forecast(candidates, routed, plan_work(encoded, context), context)
