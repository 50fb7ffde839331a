"""The router's task and its decisions; models are not needed for either."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdr.chat import Message
from cdr.errors import RejectReason, RowRejected
from cdr.prompt_pack import PromptPack, load_prompt_pack
from cdr.router import content_free_messages, decide_domain, router_key, router_messages

PACK_FILE = Path(__file__).parents[2] / "conf" / "prompts" / "cdr-v1.yaml"
DOMAINS = ("safety", "math_code", "chat")
QUERY: list[Message] = [{"role": "user", "content": "What is 7 × 8?"}]


@pytest.fixture(scope="module")
def pack() -> PromptPack:
    return load_prompt_pack(PACK_FILE)


def text_of(messages: list[Message]) -> str:
    return "\n".join(message["content"] for message in messages)


def test_the_task_lists_label_and_description_of_the_domains_asked_for(pack: PromptPack) -> None:
    task = text_of(router_messages(QUERY, pack, ["chat", "safety"]))
    for name in ("chat", "safety"):
        assert f"- {pack.domains[name].router_label}: {pack.domains[name].description}" in task
    assert pack.domains["math_code"].description not in task
    assert task.index(pack.domains["chat"].description) < task.index(
        pack.domains["safety"].description
    )


def test_all_that_prompts_share_comes_first(pack: PromptPack) -> None:
    one, other = (
        router_messages([{"role": "user", "content": query}], pack, DOMAINS) for query in "ab"
    )
    assert [message["role"] for message in one] == ["system", "user"]
    assert one[0] == other[0]
    start = one[1]["content"].index("User: a")
    assert one[1]["content"][:start] == other[1]["content"][:start]
    descriptions = "".join(pack.domains[name].description for name in DOMAINS)
    assert len(text_of([one[0]])) + start > len(descriptions)


def test_the_last_turn_is_whole_and_cuts_of_earlier_ones_are_marked(pack: PromptPack) -> None:
    limit = pack.router.earlier_turn_chars
    last = "y" * (3 * limit) + "{{ end }}"
    messages: list[Message] = [
        {"role": "system", "content": "x" * limit},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "z" * (limit + 7)},
        {"role": "user", "content": last},
    ]
    expected = (
        f"System: {'x' * limit}\nUser: Hello.\n"
        f"Assistant: {'z' * limit} [7 more characters]\nUser: {last}"
    )
    assert expected in router_messages(messages, pack, DOMAINS)[-1]["content"]


def test_no_message_is_rejected_and_an_unknown_domain_an_error(pack: PromptPack) -> None:
    with pytest.raises(RowRejected) as e:
        router_messages([], pack, DOMAINS)
    assert e.value.reason is RejectReason.BAD_MESSAGES
    with pytest.raises(KeyError, match="poetry"):
        router_messages(QUERY, pack, ["poetry"])


def test_the_content_free_task_differs_in_the_conversation_only(pack: PromptPack) -> None:
    free, task = content_free_messages(pack, DOMAINS), router_messages(QUERY, pack, DOMAINS)
    assert text_of(free).replace("N/A", QUERY[0]["content"]) == text_of(task)


def test_confidence_is_the_softmax_share_of_the_best_label() -> None:
    logprobs = {"safety": math.log(0.1), "math_code": math.log(0.3), "chat": math.log(0.1)}
    decision = decide_domain(logprobs, threshold=0.5, fallback="chat")
    assert (decision.domain, decision.source) == ("math_code", "router")
    assert decision.confidence == pytest.approx(0.3 / (0.1 + 0.3 + 0.1))


def test_below_the_threshold_the_fallback_is_taken_and_says_so() -> None:
    logprobs = {"safety": math.log(0.4), "chat": math.log(0.6)}
    decision = decide_domain(logprobs, threshold=0.7, fallback="safety")
    assert (decision.domain, decision.source) == ("safety", "fallback")
    assert decision.confidence == pytest.approx(0.6)


def test_labels_of_several_tokens_are_compared_per_token() -> None:
    # Per token -0.5 against -1.0; by sums the short label would win.
    decision = decide_domain(
        {"safety": -1.5, "chat": -1.0},
        threshold=0.0,
        fallback="chat",
        num_tokens={"safety": 3, "chat": 1},
    )
    assert decision.domain == "safety"
    assert decision.confidence == pytest.approx(1 / (1 + math.exp(-0.5)))


def test_calibration_takes_out_what_the_model_says_to_nothing() -> None:
    logprobs = {"safety": -1.0, "chat": -2.0}
    prior = {"safety": -0.5, "chat": -3.0}
    assert decide_domain(logprobs, threshold=0, fallback="chat").domain == "safety"
    decision = decide_domain(logprobs, threshold=0, fallback="safety", prior_logprobs=prior)
    # safety: -1 + 0.5 = -0.5; chat: -2 + 3 = 1.
    assert decision.domain == "chat"
    assert decision.confidence == pytest.approx(1 / (1 + math.exp(-1.5)))


@given(st.permutations(["safety", "math_code", "chat"]))
def test_ties_do_not_depend_on_order(names: list[str]) -> None:
    decision = decide_domain(dict.fromkeys(names, -1.0), threshold=0, fallback="safety")
    assert (decision.domain, decision.source) == ("chat", "router")
    assert decision.confidence == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("safety", "prior"),
    [
        (math.nan, None),
        (-1.0, {"safety": math.nan, "chat": -1.0}),
        (-1.0, {"safety": -math.inf, "chat": -1.0}),
        (-math.inf, {"safety": -math.inf, "chat": -1.0}),
    ],
)
def test_numbers_that_decide_nothing_give_the_fallback_without_confidence(
    safety: float, prior: dict[str, float] | None
) -> None:
    for names in (("safety", "chat"), ("chat", "safety")):
        logprobs = {name: safety if name == "safety" else -2.0 for name in names}
        decision = decide_domain(logprobs, threshold=0, fallback="math_code", prior_logprobs=prior)
        assert (decision.domain, decision.confidence) == ("math_code", None)
        assert decision.source == "fallback"


def test_an_impossible_label_loses_and_all_impossible_decide_nothing() -> None:
    decision = decide_domain({"safety": -math.inf, "chat": -9.0}, threshold=0, fallback="safety")
    assert (decision.domain, decision.confidence) == ("chat", 1.0)
    impossible = dict.fromkeys(("safety", "chat"), -math.inf)
    assert decide_domain(impossible, threshold=0, fallback="chat").source == "fallback"


@given(st.dictionaries(st.sampled_from("abcd"), st.floats(-500, 0), min_size=1))
def test_confidence_is_a_share_and_never_below_an_even_split(logprobs: dict[str, float]) -> None:
    decision = decide_domain(logprobs, threshold=0, fallback="a")
    assert decision.source == "router"
    assert logprobs[decision.domain] == max(logprobs.values())
    assert decision.confidence is not None
    assert 1 / len(logprobs) - 1e-12 <= decision.confidence <= 1


def key_of(pack: PromptPack, **changes: object) -> str:
    given: dict[str, object] = {
        "model_key": "m",
        "domains": DOMAINS,
        "encoding_key": "e",
        "threshold": 0.5,
        "fallback": "chat",
        "calibrate": True,
    }
    return router_key(pack, **(given | changes))  # type: ignore[arg-type]


def edited(pack: PromptPack, section: str, field: str, text: str) -> PromptPack:
    tree = pack.model_dump()
    (tree["router"] if section == "router" else tree["domains"][section])[field] = text
    return PromptPack.model_validate(tree)


def test_the_key_changes_with_all_that_decides_a_route(pack: PromptPack) -> None:
    keys = [
        key_of(pack),
        key_of(pack, model_key="other"),
        key_of(pack, domains=("safety", "chat")),
        key_of(pack, domains=("chat", "math_code", "safety")),
        key_of(pack, encoding_key="other"),
        key_of(pack, threshold=0.6),
        key_of(pack, fallback="safety"),
        key_of(pack, calibrate=False),
        key_of(edited(pack, "router", "system", "Sort this.")),
        key_of(edited(pack, "router", "task", "{{ conversation }}")),
        key_of(edited(pack, "chat", "description", "anything")),
        key_of(edited(pack, "chat", "router_label", "talk")),
    ]
    assert len(set(keys)) == len(keys)


def test_the_key_ignores_what_the_router_never_sees(pack: PromptPack) -> None:
    tree = pack.model_dump()
    tree["version"] += 1
    tree["domains"]["safety"]["instructions"]["weigh-harm"] = "Be good."
    tree["domains"]["chat_hard"]["description"] = "not asked for"
    tree["router"]["domains"] = ["chat"]
    assert key_of(PromptPack.model_validate(tree)) == key_of(pack)


def test_the_key_takes_whole_numbers_for_the_same_threshold(pack: PromptPack) -> None:
    assert key_of(pack, threshold=1) == key_of(pack, threshold=1.0)
