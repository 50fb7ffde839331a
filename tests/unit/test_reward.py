from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdr.reward import reward_key, reward_value, strong_term, term_name, weak_term
from cdr.reward_config import Condition, RewardSpec, TermSpec

Name = tuple[str, Condition]

STRONG: Name = ("strong", "conditioned")
WEAK: Name = ("weak", "conditioned")
MODELS = {
    "strong": {"path": "models/strong", "engine": "stub"},
    "weak": {"path": "models/weak", "engine": "stub"},
    "router": {"path": "models/router", "engine": "stub"},
}
MODEL_KEYS = {"strong": "key-s", "weak": "key-w", "router": "key-r"}
TEMPLATE_HASHES = {"strong": "template-1", "weak": "template-1", "router": "template-2"}

logprobs = st.floats(min_value=-1e4, max_value=0.0)


def make_spec(**changes: Any) -> RewardSpec:
    given = {"name": "r", "models": MODELS, "prompt_pack": "packs/p.yaml"}
    return RewardSpec.model_validate({**given, **changes})


def terms_of(form: str) -> tuple[TermSpec, ...]:
    return make_spec(form=form).resolved_terms()


def test_density_ratio_is_the_difference_of_the_two_sums() -> None:
    # -30.5 - (-42.25) = 11.75
    sums = {STRONG: -30.5, WEAK: -42.25}
    assert reward_value(terms_of("density_ratio"), sums, {}, "sum") == 11.75


def test_mean_divides_each_sum_by_that_models_own_token_count() -> None:
    # -30 / 10 - (-42 / 12) = -3 + 3.5 = 0.5
    sums, counts = {STRONG: -30.0, WEAK: -42.0}, {STRONG: 10, WEAK: 12}
    assert reward_value(terms_of("density_ratio"), sums, counts, "mean") == 0.5


def test_prompt_delta_compares_one_model_with_and_without_the_instruction() -> None:
    # -30 - (-33) = 3
    sums: dict[Name, float] = {STRONG: -30.0, ("strong", "plain"): -33.0}
    assert reward_value(terms_of("prompt_delta"), sums, {}, "sum") == 3.0


def test_pmi_takes_the_unconditional_logprobs_off_both_models() -> None:
    # (-30 - (-50)) - (-42 - (-55)) = 20 - 13 = 7
    sums: dict[Name, float] = {
        STRONG: -30.0,
        ("strong", "unconditional"): -50.0,
        WEAK: -42.0,
        ("weak", "unconditional"): -55.0,
    }
    assert reward_value(terms_of("pmi"), sums, {}, "sum") == 7.0


def test_weights_scale_their_terms() -> None:
    terms = (
        TermSpec(model="strong", condition="plain", weight=2.0),
        TermSpec(model="weak", condition="plain", weight=-0.5),
    )
    # 2 * (-3) - 0.5 * (-8) = -2
    sums: dict[Name, float] = {("strong", "plain"): -3.0, ("weak", "plain"): -8.0}
    assert reward_value(terms, sums, {}, "sum") == -2.0


@given(logprobs, logprobs, st.integers(1, 500), st.integers(1, 500))
def test_swapping_the_models_flips_the_sign(a: float, b: float, n: int, m: int) -> None:
    terms = terms_of("density_ratio")
    for reduction in ("sum", "mean"):
        one = reward_value(terms, {STRONG: a, WEAK: b}, {STRONG: n, WEAK: m}, reduction)
        other = reward_value(terms, {STRONG: b, WEAK: a}, {STRONG: m, WEAK: n}, reduction)
        assert one == -other


@given(logprobs, logprobs)
def test_models_that_agree_give_zero(conditioned: float, unconditional: float) -> None:
    sums: dict[Name, float] = {
        STRONG: conditioned,
        WEAK: conditioned,
        ("strong", "unconditional"): unconditional,
        ("weak", "unconditional"): unconditional,
    }
    assert reward_value(terms_of("density_ratio"), sums, {}, "sum") == 0.0
    assert reward_value(terms_of("pmi"), sums, {}, "sum") == pytest.approx(0.0, abs=1e-9)


def test_a_missing_term_is_an_error() -> None:
    with pytest.raises(KeyError):
        reward_value(terms_of("density_ratio"), {STRONG: -1.0}, {}, "sum")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        reward_value(terms_of("density_ratio"), {STRONG: bad, WEAK: bad}, {}, "sum")


def test_a_mean_over_no_tokens_is_an_error() -> None:
    counts = {STRONG: 3, WEAK: 0}
    with pytest.raises(ValueError, match=r"weak/conditioned: num_tokens must be >= 1, got 0"):
        reward_value(terms_of("density_ratio"), {STRONG: -1.0, WEAK: 0.0}, counts, "mean")


@pytest.mark.parametrize(
    ("form", "strong", "weak"),
    [
        ("density_ratio", "strong/conditioned", "weak/conditioned"),
        ("prompt_delta", "strong/conditioned", "strong/plain"),
        ("pmi", "strong/conditioned", "strong/unconditional"),
    ],
)
def test_the_first_term_of_each_sign_is_shown_as_strong_and_weak(
    form: str, strong: str, weak: str
) -> None:
    found_strong, found_weak = strong_term(terms_of(form)), weak_term(terms_of(form))
    assert found_strong is not None
    assert found_weak is not None
    assert (term_name(found_strong), term_name(found_weak)) == (strong, weak)


def test_a_reward_of_one_sign_has_no_term_of_the_other() -> None:
    likelihood = (TermSpec(model="strong", condition="plain", weight=1.0),)
    penalty = (TermSpec(model="weak", condition="plain", weight=-1.0),)
    assert weak_term(likelihood) is None
    assert strong_term(penalty) is None


def key_of(
    spec: RewardSpec | None = None,
    model_keys: dict[str, str] = MODEL_KEYS,
    pack_key: str | None = "pack-1",
    route_key: str | None = "route-1",
    template_hashes: dict[str, str] = TEMPLATE_HASHES,
) -> str:
    return reward_key(spec or make_spec(), model_keys, pack_key, route_key, template_hashes)


def test_the_key_ignores_what_does_not_change_a_number() -> None:
    density_ratio_by_hand = [
        {"model": "strong", "condition": "conditioned", "weight": 1.0},
        {"model": "weak", "condition": "conditioned", "weight": -1.0},
    ]
    moved = {role: {**model, "path": f"elsewhere/{role}"} for role, model in MODELS.items()}
    judge = {**MODELS, "judge": {"path": "models/judge", "engine": "stub"}}
    renamed_router = {**MODELS, "small": MODELS["router"]}
    same = {
        "name and description": key_of(make_spec(name="other", description="why")),
        "order of roles": key_of(make_spec(models=dict(reversed(MODELS.items())))),
        "paths of models, by whose keys they count": key_of(make_spec(models=moved)),
        "path of the pack": key_of(make_spec(prompt_pack="elsewhere.yaml")),
        "a model that no term asks": key_of(make_spec(models=judge)),
        "spelling of the form": key_of(make_spec(form="custom", terms=density_ratio_by_hand)),
        "name of the template": key_of(make_spec(encoding={"template": "own"})),
        "name of the router's role": reward_key(
            make_spec(models=renamed_router, routing={"model": "small"}),
            MODEL_KEYS,
            "pack-1",
            "route-1",
            TEMPLATE_HASHES,
        ),
    }
    assert {case for case, key in same.items() if key != key_of()} == set()


def test_the_key_changes_with_everything_that_changes_a_number() -> None:
    shorter = {**MODELS, "weak": {**MODELS["weak"], "max_length": 512}}
    changed = {
        "": key_of(),
        "form": key_of(make_spec(form="pmi")),
        "reduction": key_of(make_spec(reduction="mean")),
        "seed": key_of(make_spec(seed=1)),
        "routing": key_of(make_spec(routing={"threshold": 0.5})),
        "fixed domain": key_of(make_spec(routing={"mode": "fixed", "domain": "safety"})),
        "other fixed domain": key_of(make_spec(routing={"mode": "fixed", "domain": "chat"})),
        "end of turn": key_of(make_spec(encoding={"score_end_of_turn": False})),
        "max_length": key_of(make_spec(models=shorter)),
        "pack": key_of(pack_key="pack-2"),
        "no pack": key_of(pack_key=None),
        "strong": key_of(model_keys={**MODEL_KEYS, "strong": "key-t"}),
        "weak": key_of(model_keys={**MODEL_KEYS, "weak": "key-t"}),
        "router": key_of(route_key="route-2"),
        "no router": key_of(route_key=None),
        "swapped": key_of(model_keys={**MODEL_KEYS, "strong": "key-w", "weak": "key-s"}),
        "template": key_of(template_hashes={**TEMPLATE_HASHES, "weak": "template-3"}),
    }
    assert len(set(changed.values())) == len(changed)
