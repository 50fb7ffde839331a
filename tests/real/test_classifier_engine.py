"""The classifier engine against the model's own forward, one whole sequence at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama import modeling_llama

from cdr.engines.base import EngineSpec, ScoringGroup
from cdr.engines.classifier import ClassifierEngine
from cdr.errors import ModelError
from tests.real.test_transformers_engine import ARCHITECTURES, SIZES

# As ArmoRM's: it imports a docstring that transformers 5 has no more.
CODE = '''
from transformers import LlamaForSequenceClassification
from transformers.models.llama.modeling_llama import LLAMA_INPUTS_DOCSTRING
from transformers.utils import add_start_docstrings_to_model_forward

class Gated(LlamaForSequenceClassification):
    """Nineteen objectives and one score, as ArmoRM has: here the score is twice their sum."""

    @add_start_docstrings_to_model_forward(LLAMA_INPUTS_DOCSTRING)
    def forward(self, *args, **kwargs):
        result = super().forward(*args, **kwargs)
        result.score = 2 * result.logits.sum(-1)
        return result
'''
GROUPS = [
    ScoringGroup((1, 2, 3, 4), ((5, 6, 7), (5, 6, 9, 10), (11,))),
    ScoringGroup((1, 2, 8), ((5, 0),)),
]


def save_classifier(folder: Path, architecture: str = "llama", **overrides: Any) -> Path:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture](
        **{**SIZES, "num_labels": 1} | ARCHITECTURES[architecture] | overrides
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def load(path: Path, **fields: Any) -> ClassifierEngine:
    fields = {"max_length": 128, **fields}
    return ClassifierEngine(EngineSpec("m", "classifier", str(path), **fields), num_threads=1)


def own_logits(path: Path) -> list[list[float]]:
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.inference_mode():
        return [
            model(input_ids=torch.tensor([group.prefix_ids + ids])).logits[0].tolist()
            for group in GROUPS
            for ids in group.completions_ids
        ]


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", {}),
        ("mistral", {}),  # a window of five tokens
        # The padding token ends a turn, as in many chat models: the score is taken before it.
        ("qwen2", {"pad_token_id": 0}),
    ],
)
def test_scores_are_those_of_the_models_own_forward(
    tmp_path: Path, architecture: str, overrides: dict[str, Any]
) -> None:
    path = save_classifier(tmp_path, architecture, **overrides)
    expected = [row[0] for row in own_logits(path)]
    assert max(expected) - min(expected) > 0.1
    engine = load(path)
    for groups, rows in ((GROUPS, expected), (GROUPS[::-1], expected[3:] + expected[:3])):
        scores = [found for group in engine.score(groups) for found in group]
        assert [found.shape for found in scores] == [(1,)] * 4
        assert [float(found[0]) for found in scores] == pytest.approx(rows, abs=1e-5)


def test_one_of_several_outputs_is_taken_by_its_label(tmp_path: Path) -> None:
    labels = {0: "helpful", 1: "honest", 2: "harmless"}
    path = save_classifier(tmp_path, num_labels=3, id2label=labels)
    expected = [row[2] for row in own_logits(path)]
    scores = [float(found[0]) for group in load(path, output="harmless").score(GROUPS)
              for found in group]  # fmt: skip
    assert scores == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ModelError, match="has 3 outputs, and none is named"):
        load(path)
    with pytest.raises(ModelError, match="no output 'polite'"):
        load(path, output="polite")


def test_a_model_without_a_head_is_refused_and_not_given_a_random_one(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["llama"](**SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"the weights lack score\.weight"):
        load(tmp_path)


def test_a_models_own_code_runs_only_where_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    path = save_classifier(tmp_path / "model", num_labels=3)
    expected = [2 * sum(row) for row in own_logits(path)]
    (path / "gated.py").write_text(CODE)
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "gated.Gated"}
    (path / "config.json").write_text(json.dumps(config))
    engine = load(path, custom_code=True, output="score")
    scores = [float(found[0]) for group in engine.score(GROUPS) for found in group]
    assert scores == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ModelError, match="'logits' must be one number per sequence, is \\(1, 3\\)"):
        load(path, custom_code=True)
    assert not hasattr(modeling_llama, "LLAMA_INPUTS_DOCSTRING")  # lent, not given
    (path / "gated.py").write_text(f"from transformers import NoSuchName\n{CODE}")
    with pytest.raises(ModelError, match=r"cannot be imported: .*NoSuchName"):
        load(path, custom_code=True, output="score")
