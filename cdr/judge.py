"""A judge: a model reads two answers to a prompt and says which one is better.

The judge is never asked to explain: it is shown the conversation, the domain's criteria (those that
T(x) has) and the answers as A and B, and the letter it prefers is its verdict. Models favour a
place, so each pair is shown in both orders. With the letters' log-probs,

    d(y, z) = ½ [ log p("A" | y first, z second) − log p("B" | y first, z second)
                + log p("B" | z first, y second) − log p("A" | z first, y second) ]

is the log-odds that y is the better one, in nats; a constant favour for a place or letter cancels.
The reward of y is the mean of d(y, z) over the other candidates z. With all pairs asked that is the
least-squares Bradley–Terry score, times N / (N − 1).

Source of the baseline: arXiv 2411.02481, Table 1, "Generative reward": the strong model with the
same instructions. Wording, letters and both orders are ours (docs/decisions/0007-reward-kinds.md).
The mean is here twice, as the maths of `cdr.reward`: for one candidate in plain Python
(`mean_odds`) and for a table as a Spark column (`mean_odds_column`). The two agree to the last bit.
No torch, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cdr.config import content_hash

if TYPE_CHECKING:
    from pyspark.sql import Column

    from cdr.chat import Message

LABELS = ("A", "B")
"""What the judge may say: the letter of the first answer, the letter of the second."""

SYSTEM = "You compare two answers to the same conversation and say which one is better."
TASK = """\
{criteria}[Conversation]
{conversation}
[End of conversation]

[Answer A]
{first}
[End of answer A]

[Answer B]
{second}
[End of answer B]

Which answer is better? Reply with one letter, A or B, and nothing else."""

JUDGE_KEY = content_hash([SYSTEM, TASK, LABELS])
"""Hash of all words of ours that a verdict depends on."""


def judge_messages(
    messages: Sequence[Message], criteria: str | None, first: str, second: str
) -> list[Message]:
    """Ask which of two answers is better.

    Args:
        messages: the prompt x, at least one message.
        criteria: instruction and exemplar of the domain; None for none.
        first: the answer that is shown as A.
        second: the answer that is shown as B.

    Returns:
        A system message and a user turn. What does not depend on the answers comes first, so that
        all pairs of a prompt share it as a prefix.
    """
    conversation = "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)
    task = TASK.format(
        criteria=f"Criteria:\n{criteria}\n\n" if criteria else "",
        conversation=conversation,
        first=first,
        second=second,
    )
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task}]


def mean_odds(odds: Sequence[float | None]) -> float | None:
    """Give a candidate's reward from what it got in each question it stands in.

    Args:
        odds: for it against its rival, at least one, in any order: log-odds in nats, or of a
            verdict 1 where it won and −1 where it lost; None where the question has no answer.

    Returns:
        The mean; None where an answer lacks.
    """
    # Sorted: a sum of doubles depends on its order. Not the built-in sum(), as in `cdr.reward`.
    total = 0.0
    for one in sorted(one for one in odds if one is not None):
        total += one
    return None if None in odds else total / len(odds)


def mean_odds_column(odds: Column, questions: Column) -> Column:
    """Build the same mean for each row of a table.

    Args:
        odds: array of doubles, without those of questions that have no answer.
        questions: number of questions, at least 1.

    Returns:
        A double; null where an answer lacks.
    """
    from pyspark.sql import functions as F

    total = F.aggregate(F.array_sort(odds), F.lit(0.0), lambda whole, one: whole + one)
    return F.when(F.size(odds) == questions, total / questions)
