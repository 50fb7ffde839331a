"""Prompt packs: what they refuse, what they draw, and exactly what they render.

After a wanted change of a text, rewrite the golden files and the reference page with

    python -m tests.unit.test_prompt_pack

and read the difference before committing it.
"""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from cdr import prompt_reference
from cdr.chat import Message
from cdr.config import content_hash
from cdr.errors import ConfigError, RejectReason, RowRejected
from cdr.prompt_pack import PromptPack, load_prompt_pack

REPOSITORY = Path(__file__).parents[2]
PACK_FILES = sorted((REPOSITORY / "conf" / "prompts").rglob("*.yaml"))
GOLDEN = Path(__file__).parent / "golden" / "prompts"
REFERENCE_PAGE = REPOSITORY / "docs" / "reference" / "prompts.md"

CONVERSATIONS: dict[str, list[Message]] = {
    "single-turn": [{"role": "user", "content": "How many days are in 3 weeks?"}],
    "multi-turn": [
        {"role": "user", "content": "Is 91 prime?"},
        {"role": "assistant", "content": "No: 91 = 7 × 13."},
        {"role": "user", "content": "And 97?"},
    ],
    "system-message": [
        {"role": "system", "content": "You are a tutor.\nBe brief."},
        {"role": "user", "content": "Halve 7/8."},
    ],
}


def shipped_tree() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(PACK_FILES[0].read_text(encoding="utf-8"))
    return tree


def pack_of(tree: dict[str, Any]) -> PromptPack:
    return PromptPack.model_validate(tree)


def problems_of(tree: object, folder: Path) -> tuple[str, ...]:
    path = folder / "pack.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_prompt_pack(path)
    return caught.value.problems


def prompt_hashes(count: int) -> list[str]:
    return [content_hash(number) for number in range(count)]


def render_golden(name: str, placement: str) -> str:
    tree = shipped_tree()
    tree["layout"]["placement"] = placement
    messages = CONVERSATIONS[name]
    drawn = pack_of(tree).condition(messages, "math_code", content_hash(messages), seed=0)
    # Nothing may be added, so that the file shows the exact text.
    return "".join(f"<{turn['role']}>\n{turn['content']}\n" for turn in drawn.messages)


@pytest.fixture(scope="module")
def pack() -> PromptPack:
    return load_prompt_pack(REPOSITORY / "conf" / "prompts" / "cdr-v1.yaml")


def test_every_pack_in_conf_loads() -> None:
    assert PACK_FILES
    for path in PACK_FILES:
        assert load_prompt_pack(path).name == path.stem


def test_the_shipped_pack_has_the_domains_of_the_method(pack: PromptPack) -> None:
    assert set(pack.router_domains) == {"safety", "math_code", "chat"}
    assert set(pack.domains) == {*pack.router_domains, "chat_hard"}
    assert pack.domains["chat"].is_vanilla
    for name in ("safety", "math_code", "chat_hard"):
        assert len(pack.domains[name].instructions) >= 2
        assert len(pack.domains[name].exemplars) >= 6


def test_every_instruction_and_exemplar_is_drawn_and_shown_whole_before_the_query(
    pack: PromptPack,
) -> None:
    query = CONVERSATIONS["single-turn"][0]["content"]
    for name, domain in pack.domains.items():
        if domain.is_vanilla:
            continue
        shown = set()
        for prompt_hash in prompt_hashes(150):
            drawn = pack.condition(CONVERSATIONS["single-turn"], name, prompt_hash, seed=0)
            assert drawn.instruction_id is not None
            assert drawn.exemplar_id is not None
            instruction = domain.instructions[drawn.instruction_id]
            exemplar = domain.exemplars[drawn.exemplar_id]
            text = drawn.messages[-1]["content"]
            assert text.startswith(instruction)
            assert text.endswith(query)
            for part in (exemplar.user, exemplar.good, exemplar.bad, exemplar.why):
                assert part in text
            shown |= {drawn.instruction_id, drawn.exemplar_id}
        assert shown == {*domain.instructions, *domain.exemplars}


def test_chat_leaves_the_prompt_untouched(pack: PromptPack) -> None:
    for messages in CONVERSATIONS.values():
        drawn = pack.condition(messages, "chat", content_hash(messages), seed=0)
        assert (drawn.messages, drawn.instruction_id, drawn.exemplar_id) == (messages, None, None)


def test_only_the_last_user_turn_changes_and_the_input_stays_as_it_was(pack: PromptPack) -> None:
    messages = copy.deepcopy(CONVERSATIONS["multi-turn"])
    drawn = pack.condition(messages, "safety", "ab", seed=0)
    assert drawn.messages[:-1] == messages[:-1]
    assert drawn.messages[-1] != messages[-1]
    assert messages == CONVERSATIONS["multi-turn"]


def test_system_placement_keeps_every_turn_and_merges_the_system_message() -> None:
    tree = shipped_tree()
    tree["layout"]["placement"] = "system"
    own, turn = CONVERSATIONS["system-message"]
    drawn = pack_of(tree).condition([own, turn], "safety", "ab", seed=0)
    assert [message["role"] for message in drawn.messages] == ["system", "user"]
    assert drawn.messages[0]["content"].endswith("\n\n" + own["content"])
    assert drawn.messages[1] == turn


def test_without_exemplar_the_same_instruction_stays(pack: PromptPack) -> None:
    messages = CONVERSATIONS["single-turn"]
    whole = pack.condition(messages, "safety", "ab", seed=0)
    bare = pack.condition(messages, "safety", "ab", seed=0, with_exemplar=False)
    assert bare.instruction_id == whole.instruction_id
    assert bare.exemplar_id is None
    assert "Example request" in whole.messages[-1]["content"]
    assert "Example request" not in bare.messages[-1]["content"]


def test_the_draw_depends_on_prompt_seed_and_domain_only(pack: PromptPack) -> None:
    def ids(seed: int, domain: str = "safety") -> list[str | None]:
        messages = CONVERSATIONS["single-turn"]
        return [
            pack.condition(messages, domain, prompt_hash, seed).exemplar_id
            for prompt_hash in prompt_hashes(200)
        ]

    assert ids(0) == ids(0)
    # Eight exemplars: an independent draw agrees on about 1/8 of 200 prompts, 25.
    assert sum(a == b for a, b in zip(ids(0), ids(1), strict=True)) < 60
    tree = shipped_tree()
    tree["domains"]["copy"] = {**tree["domains"]["safety"], "router_label": "copy"}
    pack = pack_of(tree)
    assert sum(a == b for a, b in zip(ids(0), ids(0, "copy"), strict=True)) < 60


def test_draws_are_even_and_instruction_and_exemplar_independent(pack: PromptPack) -> None:
    drawn = [
        pack.condition(CONVERSATIONS["single-turn"], "math_code", prompt_hash, seed=3)
        for prompt_hash in prompt_hashes(1600)
    ]
    # 1600 draws over 8 exemplars: 200 each, standard deviation sqrt(1600 · 1/8 · 7/8) = 13.
    exemplars = Counter(d.exemplar_id for d in drawn)
    assert len(exemplars) == 8
    assert all(abs(count - 200) < 66 for count in exemplars.values())
    # Over 16 combinations: 100 each, standard deviation sqrt(1600 · 1/16 · 15/16) = 10.
    both = Counter((d.instruction_id, d.exemplar_id) for d in drawn)
    assert len(both) == 16
    assert all(abs(count - 100) < 50 for count in both.values())


def test_a_new_exemplar_moves_only_the_prompts_it_wins(pack: PromptPack) -> None:
    tree = shipped_tree()
    exemplars = tree["domains"]["safety"]["exemplars"]
    exemplars["one-more"] = dict(next(iter(exemplars.values())))
    larger = pack_of(tree)
    messages = CONVERSATIONS["single-turn"]
    moved = 0
    for prompt_hash in prompt_hashes(900):
        before = pack.condition(messages, "safety", prompt_hash, seed=0)
        after = larger.condition(messages, "safety", prompt_hash, seed=0)
        assert before.instruction_id == after.instruction_id
        assert after.exemplar_id in (before.exemplar_id, "one-more")
        moved += before.exemplar_id != after.exemplar_id
    # One of nine exemplars wins 900/9 = 100 prompts, standard deviation 9.4.
    assert 50 < moved < 150


def test_an_edited_exemplar_moves_no_prompt(pack: PromptPack) -> None:
    tree = shipped_tree()
    tree["domains"]["safety"]["exemplars"]["country-joke"]["good"] = "No."
    edited = pack_of(tree)
    messages = CONVERSATIONS["single-turn"]
    changed = set()
    for prompt_hash in prompt_hashes(100):
        before = pack.condition(messages, "safety", prompt_hash, seed=0)
        after = edited.condition(messages, "safety", prompt_hash, seed=0)
        assert before.exemplar_id == after.exemplar_id
        if before.messages != after.messages:
            changed.add(after.exemplar_id)
    assert changed == {"country-joke"}


@pytest.mark.parametrize("placement", ["user", "system"])
@pytest.mark.parametrize(
    "text", ["{{ 7 * 7 }}", "{% for x in range(9) %}{{ x }}{% endfor %}", "{{ criteria", "{# a #}"]
)
def test_templates_in_user_text_stay_text(text: str, placement: str) -> None:
    tree = shipped_tree()
    tree["layout"]["placement"] = placement
    messages: list[Message] = [
        {"role": "system", "content": text},
        {"role": "user", "content": f"  {text}\n"},
    ]
    drawn = pack_of(tree).condition(messages, "safety", "ab", seed=0)
    assert drawn.messages[0]["content"].endswith(text)
    assert drawn.messages[1]["content"].endswith(f"  {text}\n")


def test_an_unknown_domain_is_rejected_with_the_known_ones(pack: PromptPack) -> None:
    with pytest.raises(RowRejected, match="'poetry' is not in prompt pack 'cdr-v1': chat") as e:
        pack.condition(CONVERSATIONS["single-turn"], "poetry", "ab", seed=0)
    assert e.value.reason is RejectReason.UNKNOWN_DOMAIN


@pytest.mark.parametrize("messages", [[], CONVERSATIONS["multi-turn"][:2]])
def test_a_prompt_that_does_not_end_with_a_user_turn_is_rejected(
    pack: PromptPack, messages: list[Message]
) -> None:
    with pytest.raises(RowRejected) as e:
        pack.condition(messages, "safety", "ab", seed=0)
    assert e.value.reason is RejectReason.BAD_MESSAGES


def test_all_problems_of_a_pack_are_reported_at_once(tmp_path: Path) -> None:
    tree = shipped_tree()
    tree["layout"]["criterion"] = "x"
    tree["domains"]["safety"]["exemplars"]["country-joke"]["goood"] = "x"
    tree["domains"]["safety"]["exemplars"]["painkiller-limit"]["why"] = " "
    tree["domains"]["math_code"]["instructions"]["Two Words"] = "x"
    tree["router"]["task"] = "{{ conversation }} {{ labels }}"
    del tree["name"]
    found = "\n".join(problems_of(tree, tmp_path))
    for expected in (
        "layout.criterion: unknown key",
        "domains.safety.exemplars.country-joke.goood: unknown key; did you mean 'good'?",
        "domains.safety.exemplars.painkiller-limit.why: ",
        "domains.math_code.instructions.Two Words",
        "router.task.uses labels; known here: domains, conversation",
        "name: is required",
    ):
        assert expected in found


def test_problems_across_keys_are_reported(tmp_path: Path) -> None:
    tree = shipped_tree()
    tree["router"]["domains"] = ["safety", "poetry", "safety"]
    tree["domains"]["chat"]["router_label"] = tree["domains"]["safety"]["router_label"]
    found = problems_of(tree, tmp_path)
    assert len(found) == 3
    assert found[0].startswith("router.domains: 'poetry' is not in domains")
    assert found[1] == "router.domains: each may stand once"
    assert found[2].endswith("router_label: is taken by 'chat'")


@pytest.mark.parametrize(
    ("field", "template", "expected"),
    [
        ("user_turn", "{{ criteria }}", "must hold 2 texts verbatim"),
        ("user_turn", "{{ criteria }} {{ query | upper }}", "must hold 2 texts verbatim"),
        ("criteria", "{{ instruction }} {{ exemplar.user }}", "does not render"),
        ("system_turn", "{{ criteria }} {{ system.__class__ }}", "does not render"),
        ("user_turn", "{{ criteria }} {% if query %}", "not a Jinja template"),
    ],
)
def test_a_layout_that_would_lose_text_or_leave_the_sandbox_is_refused(
    tmp_path: Path, field: str, template: str, expected: str
) -> None:
    tree = shipped_tree()
    tree["layout"][field] = template
    assert expected in "\n".join(problems_of(tree, tmp_path))


def test_exemplars_without_instruction_are_refused(tmp_path: Path) -> None:
    tree = shipped_tree()
    tree["domains"]["safety"]["instructions"] = {}
    assert "need at least one instruction" in problems_of(tree, tmp_path)[0]


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pack.yaml"
    path.write_text("name: a\nversion: 1\nname: b\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="key 'name' is given twice"):
        load_prompt_pack(path)


@pytest.mark.parametrize("content", ["- a list", "a: [", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "pack.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError):
        load_prompt_pack(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_prompt_pack(tmp_path / "none.yaml")


def test_the_key_changes_with_every_text_that_decides_rendering() -> None:
    def set_at(tree: dict[str, Any], *path: str) -> None:
        for step in path[:-1]:
            tree = tree[step]
        tree[path[-1]] += " More."

    safety = shipped_tree()["domains"]["safety"]
    edits: list[tuple[str, ...]] = [
        ("layout", "criteria"),
        ("layout", "user_turn"),
        ("layout", "system_turn"),
    ]
    edits += [("domains", "safety", "instructions", name) for name in safety["instructions"]]
    edits += [
        ("domains", "safety", "exemplars", name, part)
        for name, exemplar in safety["exemplars"].items()
        for part in exemplar
    ]
    keys = {pack_of(shipped_tree()).key}
    for path in edits:
        tree = shipped_tree()
        set_at(tree, *path)
        keys.add(pack_of(tree).key)
    tree = shipped_tree()
    exemplars = tree["domains"]["safety"]["exemplars"]
    exemplars["renamed"] = exemplars.pop("country-joke")
    keys.add(pack_of(tree).key)
    tree = shipped_tree()
    tree["layout"]["placement"] = "system"
    keys.add(pack_of(tree).key)
    assert len(keys) == 1 + len(edits) + 2


def test_the_key_ignores_comments_order_version_and_router(tmp_path: Path) -> None:
    def shuffled(value: Any, rng: random.Random) -> Any:
        if not isinstance(value, dict):
            return value
        names = list(value)
        rng.shuffle(names)
        return {name: shuffled(value[name], rng) for name in names}

    tree = shuffled(shipped_tree(), random.Random(0))
    tree["version"] += 1
    tree["router"]["system"] += " Please."
    tree["domains"]["safety"]["description"] += ", spam"
    path = tmp_path / "pack.yaml"
    text = "# A comment.\n" + yaml.safe_dump(tree, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    assert load_prompt_pack(path).key == pack_of(shipped_tree()).key


@pytest.mark.parametrize("placement", ["user", "system"])
@pytest.mark.parametrize("name", list(CONVERSATIONS))
def test_rendered_prompts_are_the_golden_ones(name: str, placement: str) -> None:
    golden = (GOLDEN / f"{name}.{placement}.txt").read_text(encoding="utf-8")
    assert render_golden(name, placement) == golden


def test_the_reference_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert prompt_reference.main([str(REPOSITORY / "conf" / "prompts" / "cdr-v1.yaml")]) == 0
    assert capsys.readouterr().out == REFERENCE_PAGE.read_text(encoding="utf-8")


def test_the_reference_command_names_a_bad_pack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prompt_reference.main([str(tmp_path / "none.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_demo_prompts_cover_all_domains_of_the_pack(pack: PromptPack) -> None:
    lines = (REPOSITORY / "conf" / "demo" / "prompts.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert len({row["prompt_id"] for row in rows}) == len(rows)
    counts = Counter(row["domain"] for row in rows)
    assert set(counts) == set(pack.domains)
    assert min(counts.values()) >= 12
    assert any(len(row["prompt"]) > 2 for row in rows)
    assert any(row["prompt"][0]["role"] == "system" for row in rows)
    for row in rows:
        assert set(row) == {"prompt_id", "domain", "prompt"}
        messages = row["prompt"]
        drawn = pack.condition(messages, row["domain"], content_hash(messages), seed=0)
        assert drawn.messages[-1]["content"].endswith(messages[-1]["content"])


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for conversation in CONVERSATIONS:
        for where in ("user", "system"):
            file = GOLDEN / f"{conversation}.{where}.txt"
            file.write_text(render_golden(conversation, where), encoding="utf-8")
    page = prompt_reference.render_reference(load_prompt_pack(PACK_FILES[0]))
    REFERENCE_PAGE.write_text(page, encoding="utf-8")
