"""Reference page of every key a config may hold, written from the models in `cdr.config`.

    python -m cdr.config_reference > docs/reference/config.md

A test compares the page with what this prints, so that the two cannot drift apart.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cdr.config import AnnotateConfig, RunSpec
from cdr.downstream_config import DownstreamConfig, DownstreamTrackingSpec
from cdr.evaluation_config import (
    EvaluateConfig,
    EvaluateTrackingSpec,
    PairsInputSpec,
    QuickSpec,
    StatisticsSpec,
)
from cdr.policy_study_config import PolicyStudyConfig, PolicyStudyTrackingSpec
from cdr.reward_config import ApiSpec, ModelSpec, RewardSpec
from cdr.sampling import GenerateConfig
from cdr.simpo_config import SimpoConfig, SimpoTrackingSpec
from cdr.study_config import StudyConfig, StudyEncodingSpec, StudyModelSpec, StudyTrackingSpec

_INTRODUCTION = """\
# Config reference

<!-- Written by `python -m cdr.config_reference`. Edit the descriptions in cdr/config.py,
cdr/reward_config.py, cdr/evaluation_config.py, cdr/study_config.py, cdr/simpo_config.py,
cdr/downstream_config.py, cdr/sampling.py and cdr/policy_study_config.py. -->

A run is one YAML file in `conf/annotate/`, a reward one in `conf/rewards/`; a run names its reward
by file. So does an evaluation (`conf/evaluate/`, `conf/benchmark/`); its keys, those of a study
(`conf/study/`), a training (`conf/train/`), a downstream run (`conf/downstream/`), a sampling run
(`conf/generate/`) and a policy study (`conf/study/table2.yaml`) come last. Unknown keys are errors,
and all problems of a file are reported together, before Spark starts.

## Where values come from

1. `reward:` may name another YAML file; its content takes the place of the name. A run may also
   name a registered reward there (`models:/NAME@ALIAS`, `models:/NAME/3`).
2. A value that starts with `./` or `../` inside a file is a path relative to that file. Anything
   else (absolute paths, `s3://...`, hub ids, paths given by `--set`) is taken as it is.
3. `${oc.env:NAME}` reads the environment, `${oc.env:NAME,default}` with a default.
4. `--set a.b=c` wins over files, and the last one over earlier ones.
   `--set reward=FILE` swaps the whole reward, whatever its place among the `--set` options.

## Revisions

A model from a hub is pinned to a commit, because a log-prob is stored under its model's identity:
an unpinned model would change its numbers in silence. This prints the newest commit of a model:

    python -c "from huggingface_hub import model_info; print(model_info('OWNER/NAME').sha)"

Put the 40 digits in quotes: YAML reads a hash of digits only as a number. A model in a folder has
no revision; its identity is a hash of the folder's content.

## Keys
"""

_EVALUATION = """
## Keys of an evaluation

`reward`, `run` and `tracking` are as above; MLflow's experiment is `cdr-evaluate`.
"""

_STUDY = """
## Keys of a study

A model has the keys of `reward.models` above, and these two of its own. `input`, `quick` and
`statistics` are as for an evaluation, `run` and `tracking` as above; MLflow's experiment is
`cdr-pair-study`, and the default of `encoding.template` is `plain`.
"""

_TRAINING = """
## Keys of a SimPO training

MLflow's experiment is `cdr-simpo`; it should be in the store of the annotate run, to link the two.
"""

_DOWNSTREAM = """
## Keys of a downstream run

For `conf/downstream/`. `policy` is a model as in a reward, `scoring` is as `run` above, and
`statistics` as an evaluation's; MLflow's experiment is `cdr-downstream`.
"""

_SAMPLING = """
## Keys of a sampling run

`policy` takes the keys of `reward.models.<role>`, and `tables` is as above.
"""

_POLICY_STUDY = """
## Keys of a policy study

`annotate`, `train` and each of `benchmarks` name a file, or hold its keys, as above;
`--set train.training.epochs=2` changes one of them. MLflow's experiment is `cdr-policy-study`.
"""

_BOUNDS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}


# What a study has as an evaluation or a reward does.
_SAME_IN_STUDY = (
    ApiSpec, PairsInputSpec, QuickSpec, StatisticsSpec, StudyEncodingSpec, StudyTrackingSpec,
)  # fmt: skip


def render_config_reference() -> str:
    """Give the page as Markdown: one section per mapping of the config, depth first."""
    run = _sections(AnnotateConfig, "", "A run")
    # What stands under a run already.
    known = (RewardSpec, RunSpec, EvaluateTrackingSpec)
    evaluation = _sections(EvaluateConfig, "", "An evaluation", known)
    seen = (*known, *_SAME_IN_STUDY)
    study = _sections(StudyConfig, "", "A study", seen)
    training = _sections(SimpoConfig, "", "A training", (SimpoTrackingSpec,))
    told = (RewardSpec, RunSpec, ModelSpec, ApiSpec, StatisticsSpec, DownstreamTrackingSpec)
    downstream = _sections(DownstreamConfig, "", "A downstream run", told)
    parts = [_INTRODUCTION, *run, _EVALUATION, *evaluation, _STUDY, *study, _TRAINING, *training]
    sampling = _sections(GenerateConfig, "", "A sampling run", (ModelSpec, ApiSpec))
    parts += [_DOWNSTREAM, *downstream, _SAMPLING, *sampling]
    parts_of = (AnnotateConfig, SimpoConfig, DownstreamConfig, RewardSpec, PolicyStudyTrackingSpec)
    policy_study = _sections(PolicyStudyConfig, "", "A policy study", parts_of)
    return "".join([*parts, _POLICY_STUDY, *policy_study])


def _sections(
    model: type[BaseModel], key: str, whole: str, known: tuple[type[BaseModel], ...] = ()
) -> Iterator[str]:
    title = f"`{key}`" if key else whole
    fields = model.model_fields
    if model is StudyModelSpec:
        fields = {
            name: field for name, field in fields.items() if name not in ModelSpec.model_fields
        }
    rows = "".join(_row(name, field) for name, field in fields.items())
    yield (
        f"\n### {title}\n\n{inspect.getdoc(model)}\n\n"
        f"| key | value | default | meaning |\n|---|---|---|---|\n{rows}"
    )
    for name, field in model.model_fields.items():
        inner = _inner_model(field.annotation)
        if inner is not None and inner not in known:
            origin = get_origin(field.annotation)
            item = "role" if name == "models" else "name"
            step = f".<{item}>" if origin is dict else "[]" if origin is tuple else ""
            yield from _sections(inner, f"{key}.{name}{step}".removeprefix("."), whole, known)


def _row(name: str, field: FieldInfo) -> str:
    inner = _inner_model(field.annotation)
    if field.is_required():
        default = "required"
    elif inner is field.annotation:
        default = "see below"
    else:
        default = f"`{json.dumps(field.get_default(call_default_factory=True))}`"
    bounds = [
        f"{sign} {getattr(rule, kind.__name__.lower()):g}"
        for rule in field.metadata
        for kind, sign in _BOUNDS.items()
        if isinstance(rule, kind)
    ]
    value = ", ".join([_type_name(field.annotation), *bounds])
    meaning = field.description or (inspect.getdoc(inner) or "").split("\n")[0]
    # The descriptions speak Python, the page YAML; and a bare | would end the table's cell.
    meaning = re.sub(r"\bNone\b", "`null`", meaning).replace("|", "\\|")
    return f"| `{name}` | {value} | {default} | {meaning} |\n"


def _type_name(annotation: Any) -> str:
    """Name a type the way YAML shows it; `None` is in the default column."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments if a is not type(None))
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"mapping of {_type_name(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    names = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}
    return names.get(annotation, "anything")


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


if __name__ == "__main__":
    print(render_config_reference(), end="")
