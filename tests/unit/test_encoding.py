"""A prompt with its candidates as token ids: two models with tokenizers of their own, one verdict.

The strong model reads ChatML (SmolLM2's tokenizer), the weak one Mistral's brackets. What is
expected comes from the tokenizers' own `apply_chat_template`, not from the code under test.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache, partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from cdr import chat
from cdr.chat import Message
from cdr.config import content_hash
from cdr.encoding import (
    Candidate,
    EncodedPrompt,
    EncodedView,
    EncodingPlan,
    PromptEncoder,
    TokenizerSpec,
    ids_hash,
)
from cdr.prompt_pack import PromptPack
from tests.tokenizers import make_mistral_v3, make_smollm2

TOKENIZERS = {"strong": make_smollm2, "weak": make_mistral_v3}
INSTRUCTION = "Prefer exact numbers."
EXEMPLARS = {
    name: {"user": f"{name}?", "good": f"{name}: 4", "bad": f"{name}: 5", "why": "Count."}
    for name in ("apples", "pears", "plums")
}
PROMPT: list[Message] = [{"role": "user", "content": "How many legs has a spider?"}]
PROMPT_HASH = content_hash(PROMPT)


def make_pack(**exemplars: dict[str, str]) -> PromptPack:
    """A vanilla domain, and `maths` with one instruction and three exemplars or edited ones."""
    return PromptPack.model_validate(
        {
            "name": "test",
            "version": 1,
            "layout": {
                "criteria": "{{ instruction }}{% if exemplar %} Q: {{ exemplar.user }} "
                "A: {{ exemplar.good }} Not: {{ exemplar.bad }} {{ exemplar.why }}{% endif %}",
                "user_turn": "{{ criteria }}\n\n{{ query }}",
                "system_turn": "{{ criteria }}{% if system %} {{ system }}{% endif %}",
            },
            "router": {
                "domains": ["maths", "chat"],
                "system": "{{ domains }}",
                "task": "{{ domains }} {{ conversation }}",
            },
            "domains": {
                "chat": {"description": "talk", "router_label": "Talk"},
                "maths": {
                    "description": "numbers",
                    "router_label": "Numbers",
                    "instructions": {"exact": INSTRUCTION},
                    "exemplars": {**EXEMPLARS, **exemplars},
                },
            },
        }
    )


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> EncodingPlan:
    """All that a PMI-like reward and a prompt delta ask of two models."""
    specs = []
    for name, make in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp(name)
        make().save_pretrained(folder)
        specs.append(TokenizerSpec(name, str(folder), None, "own", 4096, 1 << 20))
    return EncodingPlan(
        tokenizers=tuple(specs),
        views=(
            ("strong", "conditioned"),
            ("strong", "plain"),
            ("weak", "conditioned"),
            ("weak", "unconditional"),
        ),
        pack=make_pack(),
        seed=0,
        special_tokens_in_text="reject",
        score_end_of_turn=True,
        drop_exemplar_when_too_long=False,
    )


@pytest.fixture(scope="module", autouse=True)
def _load_tokenizers_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "load_tokenizer", cache(chat.load_tokenizer))
        yield


@pytest.fixture(scope="module")
def encoder(plan: EncodingPlan) -> PromptEncoder:
    return PromptEncoder(plan)


def limited(plan: EncodingPlan, *, drop_exemplar: bool = False, **max_lengths: int) -> EncodingPlan:
    """The plan with other lengths that its models take."""
    specs = tuple(
        replace(spec, max_length=max_lengths.get(spec.model_key, spec.max_length))
        for spec in plan.tokenizers
    )
    return replace(plan, tokenizers=specs, drop_exemplar_when_too_long=drop_exemplar)


def candidates(*texts: str) -> list[Candidate]:
    return [Candidate(f"c{i}", text, "stop") for i, text in enumerate(texts)]


def conditioned(exemplar_id: str | None) -> list[Message]:
    """T of the prompt, written out by hand."""
    text = INSTRUCTION
    if exemplar_id is not None:
        text += f" Q: {exemplar_id}? A: {exemplar_id}: 4 Not: {exemplar_id}: 5 Count."
    return [{"role": "user", "content": f"{text}\n\n{PROMPT[0]['content']}"}]


@cache
def tokenizer_of(model: str) -> PreTrainedTokenizerFast:
    return TOKENIZERS[model]()


def template_ids(model: str, messages: Iterable[Message], *, header: bool) -> list[int]:
    """What the tokenizer itself makes of messages."""
    tokenizer = tokenizer_of(model)
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=header
    )
    return list(tokenizer.encode(text, add_special_tokens=False))


def views_of(encoded: EncodedPrompt) -> dict[str, EncodedView]:
    return {f"{view.model_key}/{view.condition}": view for view in encoded.views}


def kept_ids(view: EncodedView) -> list[str]:
    return [candidate.completion_id for candidate in view.candidates]


def longest_row(encoded: EncodedPrompt, model: str) -> int:
    """Tokens of a model's longest prefix with its longest completion."""
    views = [view for view in encoded.views if view.model_key == model]
    return max(len(v.prefix_ids) + len(c.ids) for v in views for c in v.candidates)


def test_a_view_is_the_conversation_as_its_models_own_template_writes_it(
    encoder: PromptEncoder,
) -> None:
    answers = candidates("Eight.", " It has 8 legs.")
    encoded = encoder.encode(PROMPT, PROMPT_HASH, "maths", answers)
    assert (encoded.instruction_id, encoded.exemplar_dropped) == ("exact", False)
    prompts = {
        "conditioned": conditioned(encoded.exemplar_id),
        "plain": PROMPT,
        "unconditional": [Message(role="user", content="")],
    }
    assert list(views_of(encoded)) == [
        *("strong/conditioned", "strong/plain", "weak/conditioned", "weak/unconditional")
    ]
    for view in encoded.views:
        prompt = prompts[view.condition]
        assert list(view.prefix_ids) == template_ids(view.model_key, prompt, header=True)
        for answer, scored in zip(answers, view.candidates, strict=True):
            turn = Message(role="assistant", content=answer.completion)
            whole = template_ids(view.model_key, [*prompt, turn], header=False)
            # ChatML writes a line break behind the end of a turn, which is not the model's to say.
            assert (*view.prefix_ids, *scored.ids) == tuple(whole)[
                : len(view.prefix_ids) + len(scored.ids)
            ]
            assert len(whole) - len(view.prefix_ids) - len(scored.ids) in (0, 1)


def test_a_vanilla_domain_and_no_domain_leave_the_prompt_as_it_is(encoder: PromptEncoder) -> None:
    for domain in ("chat", None):
        encoded = encoder.encode(PROMPT, PROMPT_HASH, domain, candidates("Eight."))
        views = views_of(encoded)
        assert views["strong/conditioned"].prefix_ids == views["strong/plain"].prefix_ids
        assert (encoded.instruction_id, encoded.exemplar_id) == (None, None)


def test_the_exemplar_is_dropped_for_all_candidates_and_both_models_or_for_none(
    plan: EncodingPlan, encoder: PromptEncoder
) -> None:
    answers = candidates("Eight.", "It has eight legs, four on each side.")
    ask = partial(
        PromptEncoder.encode,
        messages=PROMPT, prompt_hash=PROMPT_HASH, domain="maths", candidates=answers,
    )  # fmt: skip
    free = ask(encoder)
    limit = longest_row(free, "weak") - 1  # one token too few, for one candidate of one model

    refused = ask(PromptEncoder(limited(plan, weak=limit)))
    ((refused_id, reason, detail),) = refused.rejected
    assert (refused_id, reason) == ("c1", "too_long")
    assert detail.endswith(f"the model takes {limit}")
    assert refused.exemplar_id == free.exemplar_id
    assert [kept_ids(view) for view in refused.views] == [["c0"]] * 4

    dropped = ask(PromptEncoder(limited(plan, weak=limit, drop_exemplar=True)))
    assert dropped.rejected == ()
    assert dropped.exemplar_dropped
    assert (dropped.instruction_id, dropped.exemplar_id) == ("exact", None)
    for view in dropped.views:
        expected = conditioned(None) if view.condition == "conditioned" else None
        if expected is not None:
            assert list(view.prefix_ids) == template_ids(view.model_key, expected, header=True)
        assert view.candidates == views_of(free)[f"{view.model_key}/{view.condition}"].candidates

    # Where it does not help, the row is too long as it would have been.
    hopeless = limited(plan, weak=longest_row(dropped, "weak") - 1, drop_exemplar=True)
    assert [item[:2] for item in ask(PromptEncoder(hopeless)).rejected] == [("c1", "too_long")]
    # Room enough: nothing is dropped.
    roomy = limited(plan, weak=limit + 1, drop_exemplar=True)
    assert ask(PromptEncoder(roomy)) == free


def test_what_one_model_cannot_read_neither_is_asked_about(
    plan: EncodingPlan, encoder: PromptEncoder
) -> None:
    # Each is a control token of one tokenizer and ordinary text to the other.
    answers = candidates("Eight.", "Eight<|im_end|>", "Eight[/INST]", "", "8")
    encoded = encoder.encode(PROMPT, PROMPT_HASH, "maths", answers)
    assert [kept_ids(view) for view in encoded.views] == [["c0", "c4"]] * 4
    assert [item[:2] for item in encoded.rejected] == [
        ("c1", "special_token_in_text"),
        ("c2", "special_token_in_text"),
        ("c3", "empty_completion"),
    ]
    for forged in ("<|im_end|>", "[/INST]"):
        prompt = [Message(role="user", content=f"How many{forged}?")]
        whole = encoder.encode(prompt, PROMPT_HASH, "maths", answers)
        assert whole.views == ()
        assert {item[:2] for item in whole.rejected} == {
            (answer.completion_id, "special_token_in_text") for answer in answers
        }
        assert (whole.instruction_id, whole.exemplar_id) == (None, None)
    # As text, it is what the user wrote, and no id of it is a control token's.
    as_text = PromptEncoder(replace(plan, special_tokens_in_text="as_text"))
    encoded = as_text.encode(PROMPT, PROMPT_HASH, "maths", answers)
    assert [item[:2] for item in encoded.rejected] == [("c3", "empty_completion")]
    for view in encoded.views:
        control = set(tokenizer_of(view.model_key).all_special_ids)
        assert all(not control & set(candidate.ids[:-1]) for candidate in view.candidates)


PIECES = ("Eight", " legs", "<|im_start|>", "</s>", "[INST]", "\n\n", " é", " word" * 20)


NARROW = {"strong": 100, "weak": 90}


@pytest.fixture(scope="module")
def narrow_encoder(plan: EncodingPlan) -> PromptEncoder:
    return PromptEncoder(limited(plan, **NARROW))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=4).map("".join), min_size=1, max_size=5))
def test_every_candidate_is_in_all_views_or_refused_once(
    narrow_encoder: PromptEncoder, texts: list[str]
) -> None:
    encoded = narrow_encoder.encode(PROMPT, PROMPT_HASH, "maths", candidates(*texts))
    refused = [identifier for identifier, _, _ in encoded.rejected]
    kept = [name for name in (f"c{i}" for i in range(len(texts))) if name not in refused]
    assert len(refused) == len(set(refused)) == len(texts) - len(kept)
    assert [kept_ids(view) for view in encoded.views] == ([kept] * 4 if kept else [])
    for model, limit in NARROW.items():
        assert not kept or longest_row(encoded, model) <= limit


def test_an_edited_exemplar_changes_the_prefixes_of_the_prompts_that_drew_it_and_no_other(
    plan: EncodingPlan, encoder: PromptEncoder
) -> None:
    edited = PromptEncoder(
        replace(plan, pack=make_pack(pears={**EXEMPLARS["pears"], "why": "Count again."}))
    )
    drew = 0
    for number in range(30):
        prompt = [Message(role="user", content=f"What is {number} + 1?")]
        ask = partial(
            PromptEncoder.encode,
            messages=prompt, prompt_hash=content_hash(prompt), domain="maths",
            candidates=candidates("One.", f"{number + 1}"),
        )  # fmt: skip
        before, after = ask(encoder), ask(edited)
        is_drawn = before.exemplar_id == "pears"
        drew += is_drawn
        assert after.exemplar_id == before.exemplar_id
        for old, new in zip(before.views, after.views, strict=True):
            changes = is_drawn and old.condition == "conditioned"
            assert (ids_hash(new.prefix_ids) != ids_hash(old.prefix_ids)) == changes
            assert new.candidates == old.candidates
    assert 0 < drew < 30


def test_a_hash_of_ids_is_the_same_for_ever() -> None:
    # The first half of: printf '\0\0\0\0\1\0\0\0\377\277\0\0' | sha256sum
    # Another hash would score every row of every warehouse again.
    assert ids_hash((0, 1, 49151)).hex() == "1fd1ced160303328a4e7d93e3722d35e"
    assert ids_hash((1, 0, 49151)) != ids_hash((0, 1, 49151))
