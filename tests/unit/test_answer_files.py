"""Files of AlpacaEval, Arena-Hard and MT-Bench: the contract of their tools' own loaders.

What each tool reads is written out here as its code reads it; `make check-tools` asks the tools.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cdr.answer_files import (
    Answer,
    Benchmark,
    Question,
    hash_answers,
    model_of,
    read_answers,
    read_questions,
    write_answers,
)
from cdr.errors import InputError

# U+2028 ends a line for str.splitlines, and not for the tools.
TEXTS = ("Yes.\nNo \u2028 more.", '«Ü» "quoted"', "")
QUESTIONS: dict[str, tuple[Benchmark, list[dict[str, Any]]]] = {
    "alpaca_eval": (
        "alpaca_eval",
        [
            {"instruction": f" Why {i}?\n", "output": "x", "generator": "ref", "dataset": "own"}
            for i in (1, 2)
        ]
        # Twice the same question, as sets have it: each keeps its own answer.
        + [{"instruction": " Why 1?\n", "output": "y", "generator": "ref", "dataset": "own"}],
    ),
    "arena_2025": (
        "arena_hard",
        [{"uid": f"u{i}", "category": "hard_prompt", "prompt": f"Why {i}?"} for i in (1, 2, 3)],
    ),
    "arena_2024": (
        "arena_hard",
        [
            {"question_id": f"q{i}", "category": "c", "turns": [{"content": f"Why {i}?"}]}
            for i in (1, 2, 3)
        ],
    ),
    "mt_bench": (
        "mt_bench",
        [
            {"question_id": 80 + i, "category": "math", "turns": [f"Why {i}?", "And?"]}
            for i in (1, 2, 3)
        ],
    ),
}


def write_questions(folder: Path, form: str) -> Path:
    benchmark, rows = QUESTIONS[form]
    file = folder / f"{form}.questions"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(json.dumps(rows) if benchmark == "alpaca_eval" else lines)
    return file


def make_answers(questions: list[Question]) -> dict[str, Answer]:
    return {
        question.id: Answer(
            tuple(f"{TEXTS[number]}{turn}" * (number < 2) for turn in range(len(question.turns))),
            tuple(7 + turn for turn in range(len(question.turns))),
        )
        for number, question in enumerate(questions)
    }


@pytest.fixture(params=sorted(QUESTIONS))
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def written(folder: Path, form: str) -> tuple[Path, list[Question], dict[str, Answer]]:
    benchmark, _ = QUESTIONS[form]
    questions = read_questions(benchmark, write_questions(folder, form))
    answers = make_answers(questions)
    file = folder / "new" / "pol.jsonl"
    write_answers(benchmark, file, questions, answers, model="pol")
    return file, questions, answers


def test_answers_come_back_by_question(tmp_path: Path, form: str) -> None:
    file, questions, answers = written(tmp_path, form)
    benchmark, _ = QUESTIONS[form]
    back = read_answers(benchmark, file, questions)
    assert {name: found.turns for name, found in back.items()} == {
        name: answer.turns for name, answer in answers.items()
    }
    assert hash_answers(back) == hash_answers(answers)
    assert model_of(benchmark, file) == "pol"


def test_the_same_answers_leave_the_file_as_it_is(tmp_path: Path, form: str) -> None:
    file, questions, answers = written(tmp_path, form)
    benchmark, _ = QUESTIONS[form]
    before = file.read_bytes()
    write_answers(benchmark, file, questions, answers, model="pol")
    assert file.read_bytes() == before
    first = questions[0].id
    other = {**answers, first: Answer(("Else.",) * len(questions[0].turns), (1, 1))}
    if form == "arena_2024":
        other[first] = Answer(("Else.",), (1,))
    write_answers(benchmark, file, questions, other, model="pol")
    assert read_answers(benchmark, file, questions)[first].turns[0] == "Else."


def test_alpaca_evals_own_keys(tmp_path: Path) -> None:
    file, questions, answers = written(tmp_path, "alpaca_eval")
    # alpaca_eval.utils.load_or_convert_to_dataframe reads records; `evaluate` joins on instruction.
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert [list(row) for row in rows] == [["dataset", "instruction", "output", "generator"]] * 3
    assert [row["instruction"] for row in rows] == [q.row["instruction"] for q in questions]
    assert [row["output"] for row in rows] == [answers[q.id].turns[0] for q in questions]
    assert {row["generator"] for row in rows} == {"pol"}
    assert [q.id for q in questions] == ["00001", "00002", "00003"]


def test_mt_benchs_own_reading(tmp_path: Path) -> None:
    file, questions, answers = written(tmp_path, "mt_bench")
    with file.open() as stream:  # fastchat.llm_judge.common.load_model_answers
        rows = {row["question_id"]: row for row in map(json.loads, stream)}
    assert list(rows) == [81, 82, 83]  # whole numbers, as in the question file
    for question in questions:
        row = rows[question.row["question_id"]]
        assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert row["choices"] == [{"index": 0, "turns": list(answers[question.id].turns)}]
        assert row["model_id"] == "pol"


def test_arena_hards_own_reading(tmp_path: Path) -> None:
    file, questions, answers = written(tmp_path, "arena_2025")
    with file.open() as stream:  # utils/completion.py, load_model_answers
        rows = {row["uid"]: row for row in map(json.loads, stream)}
    for question in questions:
        row = rows[question.id]
        # gen_judgment.py, pairwise_judgment
        assert row["messages"][-1]["content"]["answer"] == answers[question.id].turns[0]
        assert row["messages"][0] == {"role": "user", "content": question.row["prompt"]}
        assert row["model"] == "pol"
        # show_result.py would take token counts other than tiktoken's for its own.
        assert "metadata" not in row


def test_arena_hards_own_reading_in_2024(tmp_path: Path) -> None:
    file, questions, answers = written(tmp_path, "arena_2024")
    with file.open() as stream:  # utils.py of 2024, load_model_answers
        rows = {row["question_id"]: row for row in map(json.loads, stream)}
    for question in questions:
        row = rows[question.id]
        (turn,) = row["choices"][0]["turns"]
        # gen_judgment.py takes the content, show_result.py's length column token_len.
        assert turn == {"content": answers[question.id].turns[0], "token_len": 7}
        assert row["model_id"] == "pol"


@pytest.mark.parametrize(
    ("benchmark", "text", "said"),
    [
        ("mt_bench", '{"question_id": 1}\n', "question 1 is not in the form of mt_bench"),
        ("mt_bench", '{"question_id": 1, "turns": ["a", " "]}\n', "question 1 is not in the form"),
        ("arena_hard", '{"uid": "a"}\n', "question 1 is not in the form of arena_hard"),
        ("arena_hard", '{"uid": "a", "prompt": "x"}\n' * 2, "questions share an id: a"),
        ("alpaca_eval", "[]", "there is no question in it"),
        ("alpaca_eval", '{"instruction": "x"}', "must hold objects"),
        ("alpaca_eval", "no", "is not a JSON list"),
        ("mt_bench", "[1]\n", "must hold objects"),
    ],
)
def test_a_question_file_of_another_form_is_refused(
    tmp_path: Path, benchmark: Benchmark, text: str, said: str
) -> None:
    file = tmp_path / "questions"
    file.write_text(text)
    with pytest.raises(InputError, match=said):
        read_questions(benchmark, file)


def test_answers_of_another_form_or_benchmark_are_refused(tmp_path: Path) -> None:
    questions = read_questions("mt_bench", write_questions(tmp_path, "mt_bench"))
    file = tmp_path / "answers"
    file.write_text('{"question_id": 81, "output": "x"}\n')
    with pytest.raises(InputError, match="answer 1 is not in the form of mt_bench"):
        read_answers("mt_bench", file, questions)
    row = {"question_id": 7, "choices": [{"turns": ["a", "b"]}]}
    file.write_text(f"{json.dumps(row)}\n")
    with pytest.raises(InputError, match="none of its answers"):
        read_answers("mt_bench", file, questions)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_answers("mt_bench", tmp_path / "absent", questions)
