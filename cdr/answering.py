"""A benchmark's answers as sampling runs: questions in, one completion per question and turn out.

    questions -> prompts of turn 1 -> sampling runs -> prompts of turn 2 (with the answers) -> ...

A sampling run has one temperature, so questions are grouped by theirs: MT-Bench's two turns at
three temperatures are six runs. Each is a dataset of `completions` of its own, `NAME.turn-1.t-0.7`,
and resumes as any sampling run does.

A benchmark has hundreds of questions, so these go through the driver, which writes files of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pyspark.sql import Row
from pyspark.sql import functions as F

from cdr.answer_files import Answer, Question
from cdr.chat import Message
from cdr.downstream_config import DownstreamConfig
from cdr.errors import InputError
from cdr.sampling import GenerateConfig
from cdr.staging import Staging
from cdr.tables import COMPLETIONS, REJECTS
from cdr.warehouse import Warehouse

_PROMPT_DDL = "prompt_id string, prompt array<struct<role: string, content: string>>"


@dataclass(frozen=True)
class _Drawn:
    """A sampled answer: its text without white space around it, as the tools keep answers."""

    text: str
    finish_reason: str
    num_tokens: int


class Conversations:
    """What a policy has been asked and has answered so far.

    Args:
        config: the resolved config.
        questions: of the benchmark, at least one.
        warehouse: where the samples are.
        staging: for the prompts.
    """

    def __init__(
        self,
        config: DownstreamConfig,
        questions: Sequence[Question],
        warehouse: Warehouse,
        staging: Staging,
    ) -> None:
        self._config, self._questions = config, questions
        self._warehouse, self._staging = warehouse, staging
        self._drawn: dict[str, list[_Drawn]] = {question.id: [] for question in questions}

    @property
    def num_turns(self) -> int:
        """Turns of the longest question."""
        return max(len(question.turns) for question in self._questions)

    def runs(self, turn: int) -> list[GenerateConfig]:
        """Write a turn's prompts; give a sampling run for each temperature, ascending.

        Args:
            turn: from 1; the turns before it have been taken.
        """
        config = self._config
        asked: dict[float, list[tuple[str, list[Message]]]] = {}
        for question in self._questions:
            if len(question.turns) >= turn:
                temperature = config.temperature_of(question.category)
                row = (question.id, self._messages(question, turn))
                asked.setdefault(temperature, []).append(row)
        runs = []
        for temperature, rows in sorted(asked.items()):
            name = f"{config.dataset}.turn-{turn}.t-{temperature:g}"
            frame = self._warehouse.spark.createDataFrame(rows, _PROMPT_DDL)
            self._staging.write(name, frame)
            runs.append(config.sampling_config(name, self._staging.place(name), temperature))
        return runs

    def take(self, turn: int, runs: Sequence[GenerateConfig]) -> None:
        """Take the answers that a turn's sampling runs have drawn.

        Raises:
            InputError: a question has none, with the reasons: a file without it would be refused
                by one tool and judged as if it were whole by another.
        """
        wanted = {
            question.id: question for question in self._questions if len(question.turns) >= turn
        }
        names = [run.dataset for run in runs]
        rows = self._warehouse.read_one_per_key(COMPLETIONS).where(F.col("dataset").isin(names))
        columns = ("prompt_id", "completion", "finish_reason", "num_tokens", "prompt")
        # One row per question of a benchmark. A sample may be of a question that has since been
        # taken away, or of another question under this id: it is no answer to ours.
        drawn = {
            name: _Drawn(text.strip(), reason, count)
            for name, text, reason, count, prompt in rows.select(*columns).collect()
            if name in wanted and _as_messages(prompt) == self._messages(wanted[name], turn)
        }
        if missing := wanted.keys() - drawn.keys():
            raise self._incomplete(turn, missing, names)
        for name, answer in drawn.items():
            self._drawn[name].append(answer)

    def answers(self) -> dict[str, Answer]:
        """Give the answers by question id; every turn has been taken."""
        return {
            name: Answer(
                tuple(drawn.text for drawn in turns), tuple(drawn.num_tokens for drawn in turns)
            )
            for name, turns in self._drawn.items()
        }

    def counts(self) -> dict[str, int]:
        """Count questions, answers, and answers that are empty or reached `max_new_tokens`."""
        drawn = [answer for turns in self._drawn.values() for answer in turns]
        return {
            "questions": len(self._questions),
            "answers": len(drawn),
            "empty": sum(not answer.text for answer in drawn),
            "cut": sum(answer.finish_reason == "length" for answer in drawn),
        }

    def _messages(self, question: Question, turn: int) -> list[Message]:
        messages: list[Message] = []
        for asked, answer in zip(
            question.turns, self._drawn[question.id][: turn - 1], strict=False
        ):
            messages.append(Message(role="user", content=asked))
            messages.append(Message(role="assistant", content=answer.text))
        return [*messages, Message(role="user", content=question.turns[turn - 1])]

    def _incomplete(self, turn: int, missing: set[str], names: Sequence[str]) -> InputError:
        rejects = self._warehouse.read(REJECTS).where(
            F.col("dataset").isin([f"{name}.prompts" for name in names])
        )
        found = {row[0]: row[1] for row in rejects.select("prompt_id", "reason").collect()}
        reasons = Counter(found.get(name, "failed") for name in missing)
        told = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))
        return InputError(
            f"turn {turn}: {len(missing):,} questions have no answer ({told}), for example "
            f"{', '.join(sorted(missing)[:3])}; no file is written",
            where=f"dataset {names[0]}",
            fix="failed: run again; too_long: a higher policy.max_length, or a lower "
            "sampling.max_new_tokens with another dataset; duplicate_id: the questions have "
            "changed, --set dataset=NEW_NAME",
        )


def _as_messages(prompt: Sequence[Row]) -> list[Message]:
    return [Message(role=row["role"], content=row["content"]) for row in prompt]
