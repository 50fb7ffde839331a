"""Study configs: the paper's models and scores, cells, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cdr.errors import ConfigError
from cdr.pair_study import plan_study
from cdr.study_config import StudyConfig, load_study_config
from tests.tokenizers import CHATML_TEMPLATE, make_small_bpe
from tests.unit.test_config import COMMIT, CONF, required_variables

# The others are studies of policies: test_policy_study.py.
SHIPPED = sorted(p for p in (CONF / "study").rglob("*.yaml") if not p.stem.startswith("table2"))


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    for name in required_variables(path):
        monkeypatch.setenv(name, COMMIT)
    return load_study_config(path)


def tree(**changes: Any) -> dict[str, Any]:
    models = {
        name: {"path": f"/models/{name}", "score": score, "engine": "stub"}
        for name, score in (("base", 0.0), ("sft", 1.5), ("dpo", 4.0))
    }
    return {
        "study": "small",
        "dataset": "bench",
        "warehouse": "/data/warehouse",
        "input": {"path": "/data/pairs", "columns": {"subset": "subset"}},
        "score_name": "points",
        "models": models,
        **changes,
    }


def test_shipped_files_are_found() -> None:
    names = {"mistral", "llama3", "iterative_dpo_mistral", "iterative_dpo_llama3", "demo"}
    assert {path.stem for path in SHIPPED} == names


# Arena-Hard of the paper's appendix C.2, in its order.
C2 = {
    "mistral": (0.0, 1.3, 6.9, 5.6, 10.4, 9.9, 7.5, 7.3, 6.9, 16.6, 7.0),
    "llama3": (0.0, 3.3, 5.8, 10.8, 12.5, 15.9, 17.2, 17.8, 20.3, 22.3),
}
# And of C.1: base, SFT, iterations 0 to 2.
C1 = {"mistral": (0.0, 6.2, 12.5, 15.5, 16.7), "llama3": (0.0, 3.1, 15.9, 35.9, 41.2)}


def test_the_papers_studies_have_221_cells_and_21_of_a_model_over_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cells = []
    for family, scores in C2.items():
        config = load(CONF / "study" / f"{family}.yaml", monkeypatch)
        assert tuple(model.score for model in config.models.values()) == scores
        paths = [model.path for model in config.models.values()]
        assert len(set(paths)) == len(paths) == len(scores)
        assert config.encoding.template == "plain"
        cells += config.cell_names()
    assert len(cells) == 11**2 + 10**2 == 221
    assert sum(one == other for one, other in cells) == 21


@pytest.mark.parametrize("family", C1)
def test_an_iteration_is_over_the_one_before_over_sft_and_over_base(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(CONF / "study" / f"iterative_dpo_{family}.yaml", monkeypatch)
    assert tuple(model.score for model in config.models.values()) == C1[family]
    assert config.cells == {
        "dpo-iter0": ("sft", "base"),
        "dpo-iter1": ("dpo-iter0", "sft", "base"),
        "dpo-iter2": ("dpo-iter1", "sft", "base"),
    }
    assert config.gap("dpo-iter1", "sft") == pytest.approx(C1[family][3] - C1[family][1])
    # What the larger study scores is not scored again.
    larger = load(CONF / "study" / f"{family}.yaml", monkeypatch)
    for name in ("base", "sft"):
        one, other = (c.models[name].model_dump(exclude={"score"}) for c in (config, larger))
        assert one == other


def test_a_study_asks_each_model_of_a_cell_once_and_plainly() -> None:
    config = StudyConfig.model_validate(tree(cells={"dpo": ["sft"]}))
    reward = config.as_evaluation().reward
    assert [(term.model, term.condition) for term in reward.resolved_terms()] == [
        ("sft", "plain"), ("dpo", "plain"),
    ]  # fmt: skip
    assert reward.routing.mode == "none"
    assert reward.encoding.template == "plain"


API = {"path": "gpt", "engine": "api", "api": {"base_url": "http://localhost/v1"}, "score": 9}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cells": {"dpo": ["stf"]}}, "cells.dpo: no model 'stf'; known: base, sft, dpo"),
        ({"cells": {"dpo": ["dpo"]}}, "cells.dpo: over itself every reward is 0"),
        ({"cells": {}}, "cells: names no pair of models"),
        ({"cells": {"dpo": []}}, "cells.dpo: names no denominator"),
        (
            {"models": {**tree()["models"], "gpt": API}},
            "models.gpt.engine: 'api' gives no log-prob",
        ),
        ({"sections": ["Chat", "Chat"]}, "sections: 'Chat' is named twice"),
        ({"encoding": {"template": "strong"}}, "a study has no strong model"),
        ({"models": {"base": tree()["models"]["base"]}}, "models: a pair needs two, got 1"),
        ({"models": {"a": {"path": "/x", "engine": "stub"}}}, "models.a.score: is required"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree(**changes), sort_keys=False))
    with pytest.raises(ConfigError) as caught:
        load_study_config(tmp_path / "study.yaml")
    assert any(message in problem for problem in caught.value.problems)


def make_folder(folder: Path, template: str | None) -> dict[str, Any]:
    """A model folder with a tokenizer and hardly a weight."""
    tokenizer = make_small_bpe()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 1 << 20}))
    (folder / "model.safetensors").write_bytes(folder.name.encode())
    return {"path": str(folder), "score": 0}


def test_missing_models_other_templates_and_twins_are_refused_before_spark_starts(
    tmp_path: Path,
) -> None:
    one = make_folder(tmp_path / "one", CHATML_TEMPLATE)
    two = make_folder(tmp_path / "two", CHATML_TEMPLATE + "{# mine #}")

    def problems(**changes: Any) -> tuple[str, ...]:
        config = StudyConfig.model_validate(tree(**changes))
        with pytest.raises(ConfigError) as caught:
            plan_study(config)
        return caught.value.problems

    lost = {"path": str(tmp_path / "lost"), "score": 0}
    (missing,) = problems(models={"one": one, "lost": lost})
    assert missing.startswith("models.lost.path: ")
    own = {"encoding": {"template": "own"}}
    assert problems(models={"one": one, "two": two}, **own) == (
        "encoding.template: 'own' gives two another template than one",
    )
    assert problems(models={"one": one, "again": one, "two": two}) == (
        "models: one and again are the same weights, run in the same way",
    )
    plain = plan_study(StudyConfig.model_validate(tree(models={"one": one, "two": two})))
    assert list(plain.model_keys) == ["one", "two"]
