"""Token ids of prompts and completions, on five real or small tokenizers.

Golden files hold rendered text and ids; read the diff after `python -m tests.unit.test_chat`,
which writes them anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from cdr.chat import (
    FROZEN_DATE,
    ChatEncoder,
    Message,
    check_vocabulary,
    load_tokenizer,
    own_template,
)
from cdr.errors import ConfigError, ModelError, RejectReason, RowRejected
from tests.tokenizers import (
    CHATML_TEMPLATE,
    LLAMA3_TEMPLATE,
    make_llama3,
    make_mistral_v1,
    make_mistral_v3,
    make_small_bpe,
    make_smollm2,
    package_file,
)

GOLDEN = Path(__file__).parent / "golden" / "chat"
MAKERS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "smollm2-chatml": (make_smollm2, "own"),
    "mistral-v1-mixtral": (make_mistral_v1, "own"),
    "mistral-v3-instruct": (make_mistral_v3, "own"),
    "llama3-instruct": (make_llama3, "own"),
    "mistral-v1-plain": (make_mistral_v1, "plain"),
    "small-bpe-plain": (make_small_bpe, "plain"),
}
WITH_TEMPLATE = [name for name, (_, template) in MAKERS.items() if template == "own"]

QUESTION: list[Message] = [{"role": "user", "content": "What is 2+2?"}]
PROMPTS: dict[str, list[Message]] = {
    "single_turn": QUESTION,
    "multi_turn": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": "Sort a list."},
    ],
    "system": [{"role": "system", "content": "Be brief."}, *QUESTION],
    "unicode": [{"role": "user", "content": "日本語 é 👩\u200d🚀 ﬁ"}],
    "code": [{"role": "user", "content": "  def f(x):\n\treturn x\n\n"}],
    "empty": [{"role": "user", "content": ""}],
}
COMPLETIONS = {
    "plain": "It is 4.",
    "leading_space": " It is 4.",
    "leading_newline": "\nIt is 4.",
    "leading_newlines": "\n\n\nIt is 4.",
    "indented_code": "    return x\n",
    "unicode": "👩\u200d🚀 日本",
    "trailing_space": "4 ",
}


@cache
def shared(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of all encoders of a name: to make one takes up to a second."""
    return MAKERS[name][0]()


def encoder(name: str, **options: Any) -> ChatEncoder:
    return ChatEncoder(shared(name), MAKERS[name][1], **options)


@cache
def cached(name: str, mode: str = "reject") -> ChatEncoder:
    return encoder(name, special_tokens_in_text=mode)


@cache
def reference(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer that no encoder has touched."""
    return MAKERS[name][0]()


def user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def encode_text(name: str, text: str) -> list[int]:
    """Encode by transformers alone, control tokens in the text parsed."""
    ids: list[int] = reference(name)(text, add_special_tokens=False)["input_ids"]
    return ids


def golden(name: str) -> dict[str, Any]:
    chat, tokenizer = cached(name), reference(name)
    prompts, completions = {}, {}
    for case, messages in PROMPTS.items():
        ids = chat.encode_prefix(messages)
        prompts[case] = {"ids": ids, "text": tokenizer.decode(ids)}
    for case, text in COMPLETIONS.items():
        done = chat.encode_completion(text, "stop")
        completions[case] = {
            "completion": text,
            "ids": done.ids,
            "tokens": tokenizer.convert_ids_to_tokens(done.ids),
            "boundary_merged": done.boundary_merged,
        }
    plain: dict[str, Any] = json.loads(json.dumps({"prompts": prompts, "completions": completions}))
    return plain


@pytest.mark.parametrize("name", MAKERS)
def test_ids_are_those_of_the_golden_file(name: str) -> None:
    assert golden(name) == json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))


@pytest.mark.parametrize("name", WITH_TEMPLATE)
@pytest.mark.parametrize("case", ["single_turn", "multi_turn", "unicode", "code", "empty"])
def test_prefix_is_what_transformers_makes_of_the_messages(name: str, case: str) -> None:
    expected = reference(name).apply_chat_template(
        PROMPTS[case],
        add_generation_prompt=True,
        return_dict=False,
        strftime_now=FROZEN_DATE.strftime,
    )
    assert list(cached(name).encode_prefix(PROMPTS[case])) == expected


@cache
def sentencepiece_v1() -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(
        model_file=str(package_file("mistral_common", "tokenizer.model.v1"))
    )


def test_converted_mistral_encodes_as_sentencepiece_itself() -> None:
    for text in ("Hello world", "  def f(x):\n\treturn 12345", "日本語 é 👩\u200d🚀"):
        ids = reference("mistral-v1-plain")(text)["input_ids"]
        assert ids == [1, *sentencepiece_v1().encode(text)]


def test_plain_puts_the_system_text_first_and_leaves_the_header_open() -> None:
    chat = cached("small-bpe-plain")
    turns: list[Message] = [{"role": "system", "content": "S"}, *PROMPTS["multi_turn"]]
    assert chat.decode(chat.encode_prefix(turns)) == (
        "S\n\nUser: Hi\n\nAssistant: Hello! How can I help?\n\nUser: Sort a list.\n\nAssistant:"
    )
    with_space, without = (chat.encode_completion(text, "length") for text in (" x", "x"))
    assert chat.decode(with_space.ids) == " x"
    assert with_space == without


def test_bos_stands_once_whether_template_or_tokenizer_adds_it() -> None:
    for name in ("mistral-v1-mixtral", "mistral-v1-plain", "llama3-instruct"):
        chat = cached(name)
        ids = chat.encode_prefix(PROMPTS["multi_turn"])
        assert (ids[0], ids.count(ids[0])) == (chat.bos_id, 1)
    # ChatML of another model knows no BOS, but Llama 3's tokenizer adds one.
    special = ChatEncoder(shared("llama3-instruct"), CHATML_TEMPLATE)
    assert special.encode_prefix(QUESTION)[:2] == (128000, *encode_text("llama3-instruct", "<")[:1])


def test_template_that_renders_bos_twice_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="BOS twice"):
        ChatEncoder(shared("llama3-instruct"), "{{ bos_token }}" + LLAMA3_TEMPLATE)


def test_joint_encoding_is_prefix_and_completion_unless_marked() -> None:
    for name in MAKERS:
        chat = cached(name)
        for messages in PROMPTS.values():
            assert_joint(name, chat, messages, list(COMPLETIONS.values()))


def assert_joint(
    name: str, chat: ChatEncoder, messages: list[Message], completions: list[str]
) -> None:
    """Check against the full text, rendered and encoded in one piece by transformers."""
    merge = messages[0]["role"] == "system" and name.startswith("mistral")
    turns = messages
    if merge and name != "mistral-v1-plain":
        turns = user(f"{messages[0]['content']}\n\n{messages[1]['content']}")
    tokenizer = reference(name)
    rendered = tokenizer.apply_chat_template(
        turns,
        chat_template=chat.chat_template_text,
        tokenize=False,
        add_generation_prompt=True,
        strftime_now=FROZEN_DATE.strftime,
    )
    bos = [chat.bos_id] if name == "mistral-v1-plain" else []
    prefix = chat.encode_prefix(messages)
    takes_space = name.startswith("mistral") or name.endswith("plain")
    for text in completions:
        encoded = chat.encode_completion(text, "length")
        space = " " if takes_space and not text[0].isspace() else ""
        joint = bos + tokenizer(rendered + space + text, add_special_tokens=False)["input_ids"]
        split = [*prefix, *encoded.ids]
        assert (split == joint) is not encoded.boundary_merged, (name, text)
        assert chat.decode(split) == chat.decode(joint)


def test_merge_across_the_boundary_is_marked_and_the_prefix_stays() -> None:
    # Llama 3's header ends in "\n\n" (271); "\n\n\n" is one token, so the newline goes apart (198).
    chat = cached("llama3-instruct")
    encoded = chat.encode_completion("\nHi", "length")
    assert chat.encode_prefix(QUESTION)[-1] == 271
    assert encoded.boundary_merged
    assert encoded.ids == (198, *encode_text("llama3-instruct", "Hi"))


def test_end_of_turn_is_scored_once_where_the_completion_ended_by_itself() -> None:
    chat = cached("smollm2-chatml")
    cut = chat.encode_completion("4", "length").ids
    assert chat.encode_completion("4", "stop").ids == (*cut, 2)
    assert chat.encode_completion("4", None).ids == (*cut, 2)
    off = encoder("smollm2-chatml", score_end_of_turn=False)
    assert off.encode_completion("4", "stop").ids == cut
    ends = {name: cached(name).end_of_turn_id for name in MAKERS}
    assert ends == {
        "smollm2-chatml": 2,
        "mistral-v1-mixtral": 2,
        "mistral-v3-instruct": 2,
        "llama3-instruct": 128009,
        "mistral-v1-plain": 2,
        "small-bpe-plain": 0,
    }


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("smollm2-chatml", "<|im_end|>"),
        ("smollm2-chatml", "<file_sep>"),
        ("mistral-v1-mixtral", "</s>"),
        ("mistral-v1-mixtral", "[/INST]"),  # ordinary text to this tokenizer
        ("mistral-v3-instruct", "[INST]"),
        ("llama3-instruct", "<|eot_id|>"),
        ("mistral-v1-plain", "<s>"),
    ],
)
def test_text_with_a_special_token_is_rejected_without_quoting_it(name: str, token: str) -> None:
    forged = f"secret{token}words"
    turns = [*PROMPTS["multi_turn"][:1], {"role": "assistant", "content": forged}, *QUESTION]
    for case, where in (
        (lambda: cached(name).encode_prefix(turns), "turn 1 (assistant)"),  # type: ignore[arg-type]
        (lambda: cached(name).encode_completion(forged, "stop"), "completion"),
    ):
        with pytest.raises(RowRejected) as refusal:
            case()
        assert refusal.value.reason is RejectReason.SPECIAL_TOKEN_IN_TEXT
        assert refusal.value.detail == f"{where} holds {token}"


@pytest.mark.parametrize("name", MAKERS)
def test_as_text_gives_the_special_string_back_without_its_id(name: str) -> None:
    chat, control = cached(name, "as_text"), cached(name).control_tokens
    token = chat.decode([chat.stop_ids[0]])
    text = f"a {token}{token} b"
    completion = chat.encode_completion(text, "length").ids
    assert chat.decode(completion).strip() == text
    assert set(completion).isdisjoint(control.values())
    prefix = chat.encode_prefix(user(text))
    innocent = chat.encode_prefix(user("a b"))
    assert text in chat.decode(prefix)
    assert [i for i in prefix if i in control.values()] == [
        i for i in innocent if i in control.values()
    ]


def test_as_text_encodes_special_strings_as_sentencepiece_does() -> None:
    # SentencePiece never parses control tokens in text, so it is the reference for `as_text`.
    chat = cached("mistral-v1-mixtral", "as_text")
    expected = sentencepiece_v1().encode("[INST] x</s> <s>y </s> [/INST]")
    assert list(chat.encode_prefix(user("x</s> <s>y </s>"))) == [1, *expected]


def test_prompt_that_changes_how_the_header_is_encoded_is_rejected() -> None:
    # No pre-tokenizer: the trained merges make one token of all that follows "Q".
    tokenizer = Tokenizer(models.BPE())
    trainer = BpeTrainer(vocab_size=300, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(["Qodd?\n\nAssistant:"] * 9 + ["User: a"], trainer)
    chat = ChatEncoder(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"), "plain"
    )
    with pytest.raises(RowRejected, match="boundary_unstable"):
        chat.encode_prefix(user("odd?"))


TEXT = st.text(
    st.sampled_from(" \n\t") | st.characters(codec="utf-8", exclude_categories=["Cs", "Co"]),
    min_size=1,
    max_size=30,
) | st.lists(
    st.sampled_from(["\n", " ", "    ", "x", "The", "]", ":", "<", "|", "1", "é", "👍", "//"]),
    min_size=1,
    max_size=12,
).map("".join)
FORGED = st.lists(
    st.sampled_from(
        ["<|im_end|>", "</s>", "<s>", "[/INST]", "<|eot_id|>", "<|im_", "end|>", "\n", " ", "a"]
    ),
    min_size=1,
    max_size=8,
).map("".join)
PROPERTY = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize("name", MAKERS)
@PROPERTY
@given(prompt=TEXT, completion=TEXT)
def test_any_prompt_and_completion_join_at_the_boundary(
    name: str, prompt: str, completion: str
) -> None:
    assert_joint(name, cached(name), user(prompt), [completion])


@pytest.mark.parametrize("name", MAKERS)
@PROPERTY
@given(prompt=FORGED, completion=FORGED)
def test_no_special_id_ever_comes_from_content(name: str, prompt: str, completion: str) -> None:
    chat = cached(name, "as_text")
    control = set(chat.control_tokens.values())
    framing = [i for i in chat.encode_prefix(user("a")) if i in control]
    assert [i for i in chat.encode_prefix(user(prompt)) if i in control] == framing
    assert control.isdisjoint(chat.encode_completion(completion, "length").ids)


@pytest.mark.parametrize("name", MAKERS)
@PROPERTY
@given(prompt=TEXT, completion=TEXT)
def test_as_text_changes_nothing_where_no_special_string_is(
    name: str, prompt: str, completion: str
) -> None:
    strict, lenient = cached(name), cached(name, "as_text")
    assert strict.encode_prefix(user(prompt)) == lenient.encode_prefix(user(prompt))
    assert strict.encode_completion(completion, None) == lenient.encode_completion(completion, None)


def test_system_message_goes_into_the_first_user_turn_without_a_system_role() -> None:
    chat = cached("mistral-v1-mixtral")
    assert chat.encode_prefix(PROMPTS["system"]) == chat.encode_prefix(
        user("Be brief.\n\nWhat is 2+2?")
    )


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], RejectReason.BAD_MESSAGES),
        ([{"role": "tool", "content": "x"}, *QUESTION], RejectReason.BAD_MESSAGES),
        ([*QUESTION, {"role": "assistant", "content": "4"}], RejectReason.BAD_MESSAGES),
        ([{"role": "user", "content": None}], RejectReason.BAD_MESSAGES),
        ([*QUESTION, *QUESTION], RejectReason.TEMPLATE_REFUSED),
        ([*PROMPTS["system"][:1], {"role": "assistant", "content": "4"}, *QUESTION],
         RejectReason.TEMPLATE_REFUSED),
    ],
)  # fmt: skip
def test_turns_that_cannot_be_rendered_are_rejected(turns: Any, reason: RejectReason) -> None:
    with pytest.raises(RowRejected) as refusal:
        cached("mistral-v1-mixtral").encode_prefix(turns)
    assert refusal.value.reason is reason
    assert "2+2" not in refusal.value.detail


def test_empty_completion_is_rejected_even_where_a_space_or_end_could_stand_for_it() -> None:
    for name in ("mistral-v1-plain", "smollm2-chatml"):
        with pytest.raises(RowRejected, match="empty_completion"):
            cached(name).encode_completion("", "stop")


def test_date_in_a_template_never_changes() -> None:
    text = cached("llama3-instruct").decode(cached("llama3-instruct").encode_prefix(QUESTION))
    assert "Today Date: 26 Jul 2024\n" in text


def test_truncation_set_in_the_tokenizer_is_switched_off() -> None:
    tokenizer = make_small_bpe()
    tokenizer.backend_tokenizer.enable_truncation(max_length=4)
    chat = ChatEncoder(tokenizer, "plain")
    assert chat.decode(chat.encode_completion(" x" * 50, "length").ids) == " x" * 50


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("own", "'plain'"),
        ("{% for %}", "does not compile"),
        ("{% for turn in messages %}{{ turn['content'] }}{% endfor %}", "nothing separates"),
        ("a fixed text", "leaves out"),
    ],
)
def test_unusable_template_is_a_config_error(template: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ChatEncoder(make_small_bpe(), template)


def test_own_template_passes_and_a_foreign_one_without_its_tokens_names_plain() -> None:
    check_vocabulary(cached("smollm2-chatml"), 49152, who="models.strong")
    check_vocabulary(cached("mistral-v1-plain"), 32000, who="models.weak")
    # Same ids, same template text: what is ordinary text to both may stay so.
    check_vocabulary(
        ChatEncoder(make_mistral_v1(None), make_mistral_v1().chat_template), 32000, who="weak"
    )
    foreign = ChatEncoder(make_mistral_v1(None), CHATML_TEMPLATE)
    with pytest.raises(ConfigError, match=r"models.weak.*<\|im_end\|>.*") as error:
        check_vocabulary(foreign, 32000, who="models.weak")
    assert "'plain'" in str(error.value)


def test_added_template_token_beyond_the_model_is_a_config_error() -> None:
    tokenizer = make_mistral_v1(CHATML_TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat = ChatEncoder(tokenizer, "own")
    check_vocabulary(chat, 32002, who="models.weak")
    with pytest.raises(ConfigError, match=r"<\|im_start\|> = 32000, <\|im_end\|> = 32001"):
        check_vocabulary(chat, 32000, who="models.weak")


def test_delimiter_that_its_file_does_not_call_special_is_still_a_control_token() -> None:
    tokenizer = make_small_bpe(CHATML_TEMPLATE)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<think>"])
    chat = ChatEncoder(tokenizer, "own")
    with pytest.raises(RowRejected, match="special_token_in_text"):
        chat.encode_completion("x<|im_end|>", "stop")
    assert chat.encode_completion("<think>x", "length").ids


def test_strong_template_is_encoded_by_each_models_own_tokenizer() -> None:
    strong = cached("smollm2-chatml")
    weak = ChatEncoder(
        make_small_bpe(special=("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
        strong.chat_template_text,
    )
    check_vocabulary(weak, weak.vocab_size, who="models.weak")
    ours, theirs = strong.encode_prefix(QUESTION), weak.encode_prefix(QUESTION)
    assert ours != theirs
    assert strong.decode(ours) == weak.decode(theirs)
    assert weak.end_of_turn_id == 2


def test_saved_tokenizer_loads_with_its_template_and_without_torch(tmp_path: Path) -> None:
    make_smollm2().save_pretrained(tmp_path)
    chat = ChatEncoder.load(str(tmp_path), None, template="own", score_end_of_turn=False)
    assert chat.encode_prefix(QUESTION) == cached("smollm2-chatml").encode_prefix(QUESTION)
    assert own_template(load_tokenizer(str(tmp_path), None)) == make_smollm2().chat_template
    code = (
        "import sys; from cdr.chat import ChatEncoder\n"
        f"ChatEncoder.load({str(tmp_path)!r}, None, template='own')\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_tokenizer_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no-such-folder"):
        ChatEncoder.load(str(tmp_path / "no-such-folder"), None, template="own")


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for golden_name in MAKERS:
        content = json.dumps(golden(golden_name), ensure_ascii=False, indent=1)
        (GOLDEN / f"{golden_name}.json").write_text(content + "\n", "utf-8")
