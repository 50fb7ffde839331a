"""What the description of a registered reward's version says of the runs made with it."""

from __future__ import annotations

from cdr.version_links import list_run


def line(number: int, job: str = "annotate") -> str:
    return f"- {job}: [2026-{number}](#/experiments/1/runs/{number:032x})"


def test_runs_are_listed_below_what_people_wrote_newest_first_and_once() -> None:
    text = list_run("Our champion.", line(1), "r/3")
    heading = "Newest runs with it (all: search runs for `` tags.`cdr.reward_version` = 'r/3' ``):"
    assert text == f"Our champion.\n\n{heading}\n\n{line(1)}"
    text = list_run(text, line(2, "train_simpo"), "r/3")
    assert text.splitlines()[-2:] == [line(2, "train_simpo"), line(1)]
    # A training that goes on is the same run; a person has written below the list meanwhile.
    text = list_run(f"{text}\n\nNot for code.\n- nor maths", line(1), "r/3")
    assert text == (
        f"Our champion.\n\nNot for code.\n- nor maths\n\n{heading}\n\n"
        f"{line(1)}\n{line(2, 'train_simpo')}"
    )
    assert list_run("", line(1), "r/3") == f"{heading}\n\n{line(1)}"


def test_only_the_newest_are_kept_and_only_what_the_registry_has_room_for() -> None:
    text = "Ours."
    for number in range(300):
        text = list_run(text, line(number), "r/3")
    assert text.splitlines()[-20:] == [line(number) for number in range(299, 279, -1)]
    assert text.count("- annotate") == 20
    long = list_run("x" * 4700 + "\n" + text, line(300), "r/3")
    assert 4900 < len(long) <= 5000
    assert line(300) in long
    full = "x" * 5000
    assert list_run(full, line(1), "r/3") == full
