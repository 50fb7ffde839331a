"""The benchmarks' own tools on our answer files, a stub in the judge's place: `make check-tools`.

tests/unit/test_judging.py has what is told to the tools and read back; here the tools themselves
load the answers, put them to a judge and write their results. Each has an environment of its own,
which the target makes. Nothing is fetched.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cdr.answer_files import Answer, read_questions
from cdr.downstream_config import DownstreamConfig
from cdr.judging import Verdicts, judge_answers
from tests.chat_endpoint import Endpoint, Reply, say, serve

ENVIRONMENTS = Path(__file__).resolve().parents[2] / ".venv-tools"

# U+2028 ends a line for str.splitlines, and not for the tools; an answer may be empty.
ANSWERS: dict[str, tuple[str, ...]] = {
    "Why 1?": ("Yes.\nNo \u2028 more.", "And yes."),
    "Why 2?": ('«Ü» "quoted" {braces}', "Once more."),
    "Why 3?": ("", ""),
}

Judging = Callable[[str, Mapping[str, Any], list[dict[str, Any]], Callable[[str], Reply]], Any]


@pytest.fixture
def judging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judging:
    """Judge `ANSWERS` with a tool and a stub; give the verdicts, and what the stub was asked."""
    monkeypatch.setenv("JUDGE_KEY", "any")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(
        benchmark: str,
        judge: Mapping[str, Any],
        rows: list[dict[str, Any]],
        reply: Callable[[str], Reply],
    ) -> tuple[Verdicts, Endpoint]:
        python = ENVIRONMENTS / benchmark / "bin" / "python"
        if not python.exists():
            pytest.skip(f"no {python}: make check-tools makes it")
        file = tmp_path / "questions"
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        file.write_text(json.dumps(rows) if benchmark == "alpaca_eval" else lines)
        with serve(lambda question, _: reply(question)) as endpoint:
            config = DownstreamConfig.model_validate(
                {
                    "dataset": "pol",
                    "benchmark": benchmark,
                    "questions": str(file),
                    "answers": str(tmp_path / "answers"),
                    "warehouse": "w",
                    "policy": {"path": "p", "engine": "stub"},
                    "sampling": {"temperature": 0, "max_new_tokens": 8},
                    "judge": {
                        "python": str(python),
                        "base_url": endpoint.base_url,
                        "api_key_variable": "JUDGE_KEY",
                        **judge,
                    },
                }
            )
            questions = read_questions(config.benchmark, file)
            answers = {
                question.id: Answer(ANSWERS[question.turns[0]][: len(question.turns)])
                for question in questions
            }
            found = judge_answers(config, questions, answers, model="pol")
            asked = len(endpoint.asked)
            again = judge_answers(config, questions, answers, model="pol")
            assert (again.scores, len(endpoint.asked)) == (found.scores, asked)
        return found, endpoint

    return run


def text_of(body: Mapping[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def test_alpaca_eval_loads_and_compares_our_answers(judging: Judging, tmp_path: Path) -> None:
    rows = [
        {"instruction": name, "output": f"reference to {name}", "generator": "ref"}
        for name in ANSWERS
    ]
    preferred = {"Why 1?": 0.9, "Why 2?": 0.2, "Why 3?": 0.5}

    def reply(question: str) -> Reply:
        """Prefer ours as `preferred` says; the tool shows the two in either order, as m and M."""
        (name,) = [name for name in ANSWERS if f'"instruction": """{name}"""' in question]
        first = question.index(f"reference to {name}") > question.index('identifier": "M"')
        ours, other = ("m", "M") if first else ("M", "m")
        p = preferred[name]
        top = [
            {"token": token, "logprob": math.log(value), "bytes": None}
            for token, value in ((ours, p), (other, 1 - p))
        ]
        status, body = say("m", role="assistant")
        body["choices"][0]["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        body["usage"]["total_tokens"] = 12
        return status, body

    references = tmp_path / "references.json"
    references.write_text(json.dumps(rows))
    judge = {"model": "my/judge", "references": str(references), "length_controlled": False}
    found, endpoint = judging("alpaca_eval", judge, rows, reply)
    # (0.9 + 0.2 + 0.5) / 3
    assert found.scores["win_rate"].value == pytest.approx(100 * 1.6 / 3, abs=0.01)
    assert (found.judge, found.unjudged, len(endpoint.asked)) == ("my/judge", 0, 3)
    shown = "".join(map(text_of, endpoint.asked))
    assert all(f'"output": """{answer}"""' in shown for answer, _ in ANSWERS.values())
    assert {body["model"] for body in endpoint.asked} == {"my/judge"}


def test_fastchat_loads_and_scores_both_turns_of_our_answers(
    judging: Judging, tmp_path: Path
) -> None:
    rows = [
        {"question_id": 80 + n, "category": "math" if n == 2 else "writing", "turns": [name, "So?"]}
        for n, name in enumerate(ANSWERS, 1)
    ]
    # The tool's prompts are not in its package: these have their names and slots.
    one, two = (
        "[Q1]{question}[A1]{answer}",
        "[Q1]{question_1}[A1]{answer_1}[Q2]{question_2}[A2]{answer_2}",
    )
    prompts = {
        "single-v1": one,
        "single-math-v1": one + "[R1]{ref_answer_1}",
        "single-v1-multi-turn": two,
        "single-math-v1-multi-turn": two + "[R1]{ref_answer_1}[R2]{ref_answer_2}",
        "pair-v2": "", "pair-v2-multi-turn": "", "pair-math-v1": "", "pair-math-v1-multi-turn": "",
    }  # fmt: skip
    data = tmp_path / "tool" / "data"
    references = data / "mt_bench" / "reference_answer" / "gpt-4.jsonl"
    references.parent.mkdir(parents=True)
    template = {"type": "single", "system_prompt": "Rate.", "output_format": "[[rating]]"}
    (data / "judge_prompts.jsonl").write_text(
        "".join(
            json.dumps({**template, "name": name, "prompt_template": text}) + "\n"
            for name, text in prompts.items()
        )
    )
    row = {"question_id": 82, "choices": [{"index": 0, "turns": ["four", "five"]}]}
    references.write_text(json.dumps(row) + "\n")

    def reply(question: str) -> Reply:
        """Rate the first turn 6 and the second 8; one less with a reference."""
        rating = (8 if "[Q2]" in question else 6) - ("[R1]four" in question)
        return say(f"As it is. Rating: [[{rating}]]", role="assistant")

    found, endpoint = judging("mt_bench", {"folder": str(tmp_path / "tool")}, rows, reply)
    # (6 + 5 + 6) / 3, (8 + 7 + 8) / 3, and both together.
    scores = {name: score.value for name, score in found.scores.items()}
    assert scores == pytest.approx({"turn_1": 17 / 3, "turn_2": 23 / 3, "score": 40 / 6})
    assert (found.judge, found.unjudged, len(endpoint.asked)) == ("gpt-4", 0, 6)
    shown = {text_of(body) for body in endpoint.asked}
    for name, (first, second) in ANSWERS.items():
        assert any(re.match(re.escape(f"[Q1]{name}[A1]{first}"), text) for text in shown)
        assert any(f"[A1]{first}[Q2]So?[A2]{second}" in text for text in shown)
