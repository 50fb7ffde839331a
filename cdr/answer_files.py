"""Question and answer files of AlpacaEval 2, Arena-Hard and MT-Bench, as their own tools have them.

| benchmark | questions | answers |
|---|---|---|
| `alpaca_eval` | JSON list of instruction | JSON list of instruction, output, generator |
| `arena_hard`, 2025 | JSON lines of uid, prompt | JSON lines of uid, model, messages |
| `arena_hard`, 2024 | of question_id, turns (of content) | of question_id, model_id, choices |
| `mt_bench` | of question_id, two turns (of text) | of question_id, model_id, choices |

The two forms of Arena-Hard are told apart by the question file: each release of the tool reads its
own. Seen in alpaca_eval 0.6.6, fschat 0.2.36 and lmarena/arena-hard-auto. Files on this machine's
disk, where the tools read them; no Spark.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cdr.errors import InputError

Benchmark = Literal["alpaca_eval", "arena_hard", "mt_bench"]

_ID_KEYS: Mapping[Benchmark, tuple[str, ...]] = {
    "alpaca_eval": (),
    "arena_hard": ("uid", "question_id"),
    "mt_bench": ("question_id",),
}


@dataclass(frozen=True)
class Question:
    """A question of a benchmark.

    Args:
        id: the file's id as text; AlpacaEval has none, so its place in the file, from `00001`.
        turns: what the user says, one text per turn; at least one.
        category: the file's; None where it has none.
        row: the question as it stands in the file.
    """

    id: str
    turns: tuple[str, ...]
    category: str | None
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a policy said to a question, turn by turn.

    Args:
        turns: one text per turn of the question.
        num_tokens: tokens of each, of the policy's tokenizer; None where not known.
    """

    turns: tuple[str, ...]
    num_tokens: tuple[int, ...] | None = None


def read_questions(benchmark: Benchmark, path: str | Path) -> list[Question]:
    """Read a benchmark's question file.

    Args:
        benchmark: whose file it is.
        path: the file that the benchmark's tool reads.

    Returns:
        The questions in the file's order, at least one.

    Raises:
        InputError: the file is missing, empty, of another form, or holds an id twice.
    """
    rows = _read_rows(benchmark, path)
    questions = [_question(benchmark, row, place, path) for place, row in enumerate(rows, 1)]
    if not questions:
        raise InputError("there is no question in it", where=str(path))
    ids = [question.id for question in questions]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise InputError(f"questions share an id: {', '.join(twice[:3])}", where=str(path))
    return questions


def write_answers(
    benchmark: Benchmark,
    path: str | Path,
    questions: Sequence[Question],
    answers: Mapping[str, Answer],
    *,
    model: str,
) -> None:
    """Write a policy's answers in the form that the benchmark's tool reads.

    A file that says the same already stays as it is, with its time stamps.

    Args:
        benchmark: whose form.
        path: the file; its folder is made.
        questions: from `read_questions`.
        answers: by question id, with `num_tokens`; one for every question.
        model: what the tools call the policy; for JSON lines the file must have this name too.
    """
    place = Path(path)
    if place.exists() and _says(benchmark, place, questions, answers):
        return
    now = time.time()
    rows = [_row(benchmark, question, answers[question.id], model, now) for question in questions]
    if benchmark == "alpaca_eval":
        text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.with_name(f"{place.name}.new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, place)


def read_answers(
    benchmark: Benchmark, path: str | Path, questions: Sequence[Question]
) -> dict[str, Answer]:
    """Read answers that a tool, or `write_answers`, has written.

    Args:
        benchmark: whose form.
        path: the file.
        questions: what was asked.

    Returns:
        Answers by question id, of questions that have one there; those to others are left out.

    Raises:
        InputError: the file is missing or of another form, or answers none of the questions.
    """
    rows = _read_rows(benchmark, path)
    found: dict[str, Answer] = {}
    # AlpacaEval has no ids: its answers are known by the text of their question.
    by_text: dict[str, list[str]] = {}
    for question in questions:
        by_text.setdefault(question.turns[0], []).append(question.id)
    known = {question.id for question in questions}
    for place, row in enumerate(rows, 1):
        try:
            if benchmark == "alpaca_eval":
                waiting = by_text.get(row["instruction"])
                name = waiting.pop(0) if waiting else None
            else:
                name = _id(benchmark, row)
            turns = _answered(benchmark, row)
        except (KeyError, TypeError, IndexError):
            raise InputError(
                f"answer {place} is not in the form of {benchmark}",
                where=str(path),
                fix=f"give a file that its tool reads; this one has the keys {sorted(row)}",
            ) from None
        if name in known:
            found[str(name)] = Answer(turns)
    if not found:
        raise InputError("none of its answers is to one of the questions", where=str(path))
    return found


def model_of(benchmark: Benchmark, path: str | Path) -> str:
    """Give the name of the policy whose answers a file holds.

    Raises:
        InputError: the file is missing, empty, or names none.
    """
    rows = _read_rows(benchmark, path)
    names = ("generator",) if benchmark == "alpaca_eval" else ("model", "model_id")
    for row in rows[:1]:
        for name in names:
            if isinstance(row.get(name), str):
                return str(row[name])
    raise InputError(f"its answers have no {' or '.join(names)}", where=str(path))


def hash_answers(answers: Mapping[str, Answer]) -> str:
    """Hash what is said, in hex; equal for equal texts, whatever file they stand in."""
    said = {name: answer.turns for name, answer in answers.items()}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _says(
    benchmark: Benchmark, path: Path, questions: Sequence[Question], answers: Mapping[str, Answer]
) -> bool:
    try:
        return hash_answers(read_answers(benchmark, path, questions)) == hash_answers(answers)
    except InputError:
        return False


def _read_rows(benchmark: Benchmark, path: str | Path) -> list[dict[str, Any]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        if benchmark == "alpaca_eval":
            rows = json.loads(text)
        else:
            # Split at line feeds only: a text may hold other characters that end a line.
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror or error}",
            where=str(path),
            fix="docs/how-to/answer-benchmarks.md says where each benchmark keeps its files",
        ) from None
    except ValueError as error:
        form = "a JSON list" if benchmark == "alpaca_eval" else "JSON lines"
        raise InputError(f"is not {form}: {error}", where=str(path)) from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError("must hold objects", where=str(path))
    return rows


def _id(benchmark: Benchmark, row: Mapping[str, Any]) -> str:
    for key in _ID_KEYS[benchmark]:
        if key in row:
            return str(row[key])
    raise KeyError("id")


def _question(
    benchmark: Benchmark, row: Mapping[str, Any], place: int, path: str | Path
) -> Question:
    turns: tuple[Any, ...]
    try:
        if benchmark == "alpaca_eval":
            name, turns = f"{place:05d}", (row["instruction"],)
        else:
            name = _id(benchmark, row)
            if "uid" in row:
                turns = (row["prompt"],)
            elif benchmark == "arena_hard":
                turns = tuple(turn["content"] for turn in row["turns"])
            else:
                turns = tuple(row["turns"])
    except (KeyError, TypeError):
        turns = ()
    if not turns or not all(isinstance(text, str) and text.strip() for text in turns):
        raise InputError(
            f"question {place} is not in the form of {benchmark}",
            where=str(path),
            fix="docs/how-to/answer-benchmarks.md says where each benchmark keeps its questions",
        )
    category = row.get("category")
    return Question(name, turns, None if category is None else str(category), row)


def _row(
    benchmark: Benchmark, question: Question, answer: Answer, model: str, now: float
) -> dict[str, Any]:
    given = question.row
    if benchmark == "alpaca_eval":
        carried = {"dataset": given["dataset"]} if "dataset" in given else {}
        return {
            **carried,
            "instruction": given["instruction"],
            "output": answer.turns[0],
            "generator": model,
        }
    # The tools make ids up; this one is the same for the same answer.
    answer_id = hashlib.sha256(f"{model}:{question.id}:{answer.turns}".encode()).hexdigest()[:22]
    if "uid" in given:
        # Without the tool's `metadata`, whose token counts are tiktoken's: its own script
        # utils/add_markdown_info.py adds them for the style-controlled scores.
        said = {"role": "assistant", "content": {"answer": answer.turns[0]}}
        asked = {"role": "user", "content": given["prompt"]}
        return {
            "uid": given["uid"],
            "ans_id": answer_id,
            "model": model,
            "messages": [asked, said],
            "tstamp": now,
        }
    if benchmark == "mt_bench":
        turns: list[Any] = list(answer.turns)
    else:
        counts = answer.num_tokens or (0,) * len(answer.turns)
        turns = [
            {"content": text, "token_len": count}
            for text, count in zip(answer.turns, counts, strict=True)
        ]
    return {
        "question_id": given["question_id"],
        "answer_id": answer_id,
        "model_id": model,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": now,
    }


def _answered(benchmark: Benchmark, row: Mapping[str, Any]) -> tuple[str, ...]:
    if benchmark == "alpaca_eval":
        return (row["output"],)
    if "messages" in row:
        content = row["messages"][-1]["content"]
        return (content["answer"] if isinstance(content, dict) else content,)
    turns = row["choices"][0]["turns"]
    return tuple(turn if isinstance(turn, str) else turn["content"] for turn in turns)
