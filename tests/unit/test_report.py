"""The report page from values made by hand: what it says, what it must not hold, how it judges."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from cdr.chat import ChatEncoder
from cdr.config import AnnotateConfig, ReportSpec
from cdr.encoding import EncodingPlan, TokenizerSpec, ids_hash
from cdr.report.annotation_data import LengthEffect, Lengths
from cdr.report.annotation_page import render_annotation
from cdr.report.annotation_verdict import judge
from cdr.report.plots import Histogram, draw_histogram
from cdr.report.tokens import MAX_TOKENS, Piece, ScoredTerm, TokenReader, TokenRow, split_text
from cdr.report.verdict import Level
from cdr.summary import EngineUse
from tests.report_data import (
    IMAGE,
    SCRIPT,
    make_config,
    make_domain,
    make_report,
    make_side,
    with_summary,
)
from tests.tokenizers import CHATML_TEMPLATE, make_mistral_v1, make_small_bpe, make_smollm2


class Reader(HTMLParser):
    """Reads a page as a browser's parser would: tags with attributes, and the text in `main`."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(name))]


@pytest.fixture(scope="module")
def page() -> Reader:
    return Reader(render_annotation(make_report()))


def test_texts_are_shown_and_never_run(page: Reader) -> None:
    assert SCRIPT in page.text
    assert IMAGE in page.text
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "base"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_nothing_is_loaded_from_anywhere(page: Reader) -> None:
    assert page.values("src") == []
    assert {value[:1] for value in page.values("href")} == {"#", "d"}
    assert [value for value in page.values("href") if value.startswith("d")] == ["data:,"]
    (policy,) = [
        attributes["content"]
        for tag, attributes in page.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "script" not in policy
    assert "http" not in policy
    style = " ".join(value for value in page.values("style"))
    assert not re.search(r"url\((?!#)", style)
    assert "@import" not in page.text


def test_every_domain_has_its_numbers_plots_and_pairs(page: Reader) -> None:
    labels = page.values("aria-label")
    for kind in ("Histogram of the rewards", "Histogram of the margins", "Tokens of chosen"):
        assert sum(label.startswith(kind) for label in labels) == 3
    for name in ("chat", "math_code", "safety"):
        assert f"{name}: 2 of 40 pairs, drawn by hash" in page.text
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    anchors = [value[1:] for value in page.values("href") if value.startswith("#")]
    assert set(anchors) <= set(ids)


def test_a_token_has_its_number_beside_its_colour(page: Reader) -> None:
    # −1.0 + 2.25 = 1.25 under strong, −1.0 under weak.
    expected = "+2.25 nats (strong 1.25, weak −1.00)"
    shown = [(a["class"], a.get("title")) for tag, a in page.tags if tag == "i"]
    assert ("p4", expected) in shown
    assert ("n4", "−3.00 nats (strong −4.00, weak −1.00)") in shown
    assert ("z", "+0.01 nats (strong −0.99, weak −1.00)") in shown
    # 0.4 is in [0.25, 0.75), −0.1 in (−0.25, −0.05].
    assert {"p2", "n1"} <= {shade for shade, _ in shown}
    assert re.search(r"Heaviest tokens:\s+Sure, \+2\.25;\s+answer \+0\.40\s", page.text)
    assert re.search(r"Heaviest tokens:\s+Nope, −3\.00;\s+answer −0\.10\s", page.text)


def test_without_texts_no_text_is_there() -> None:
    text = Reader(render_annotation(make_report(texts=False))).text
    for word in ("Question", "Sure", "Nope", "example.com"):
        assert word not in text
    assert "report.texts: false" in text
    for told in ("chat-0", "margin 2.50", "Least sure pairs"):
        assert told in text


def test_missing_tokens_are_explained_and_texts_stand_alone() -> None:
    pair = make_report().pairs["chat"][0]
    bare = dataclasses.replace(
        pair,
        chosen=dataclasses.replace(pair.chosen, tokens=()),
        rejected=dataclasses.replace(pair.rejected, tokens=()),
    )
    data = make_report(
        ("chat",), pairs={"chat": (bare,)}, unsure_pairs=(), tokens_missing="Not kept, set KEY."
    )
    page = Reader(render_annotation(data))
    assert "Not kept, set KEY." in page.text
    assert bare.chosen.text is not None
    assert bare.chosen.text in page.text
    assert [tag for tag, _ in page.tags if tag == "i"] == []


def test_models_with_tokens_of_their_own_are_shown_each() -> None:
    pair = make_report().pairs["chat"][0]
    rows = (
        TokenRow(
            ("strong/conditioned",), (Piece("Hel", (-1.0,), -1.0), Piece("lo", (-2.0,), -2.0))
        ),
        TokenRow(("weak/conditioned",), (Piece("Hello", (-4.0,), 4.0),), rest=7, rest_reward=1.5),
    )
    shown = dataclasses.replace(pair, chosen=dataclasses.replace(pair.chosen, tokens=rows))
    text = Reader(render_annotation(make_report(("chat",), pairs={"chat": (shown,)}))).text
    assert "In the tokens of strong:" in text
    assert "In the tokens of weak:" in text
    assert "… and 7 more tokens: +1.50 nats" in text


def test_speed_is_told_unless_scoring_took_less_than_the_second_that_runs_keeps() -> None:
    measured = make_report()
    assert "300 tokens/s while scoring" in measured.summary.render()
    assert "300 tokens/s" in Reader(render_annotation(measured)).text
    assert measured.summary.metrics()["tokens_per_s"] == 300.0
    brief = with_summary(measured, scoring_s=0.0)
    assert "tokens/s" not in brief.summary.render()
    assert "tokens/s" not in Reader(render_annotation(brief)).text
    assert "tokens_per_s" not in brief.summary.metrics()


def test_what_engines_did_is_told_where_they_were_asked() -> None:
    plain = make_report()
    assert "strong 12 s, weak 11 s" in Reader(render_annotation(plain)).text
    assert "sent to vLLM again" not in Reader(render_annotation(plain)).text
    assert "sent to vLLM again" not in plain.summary.render()
    assert "90% of the time that waves took" in Reader(render_annotation(plain)).text
    assert "engines           90%   busy while there were waves" in plain.summary.render()
    again = with_summary(plain, engines=EngineUse({"strong": 12.4}, resubmitted=1234))
    # A run that found everything in the store asked no engine.
    assert "busy" not in again.summary.render()
    assert "1,234 sent to vLLM again" in Reader(render_annotation(again)).text
    assert "requests        1,234   sent to vLLM again" in again.summary.render()
    counts = again.summary.counts()
    assert counts["requests_resubmitted"] == 1234
    assert again.summary.metrics()["load_s.strong"] == 12.4
    # What a page built from the tables later has of it.
    assert EngineUse.read(counts) == EngineUse({"strong": 12.0}, resubmitted=1234)
    assert EngineUse.read(plain.summary.counts()) == plain.summary.engines


def test_an_empty_run_has_a_page_too() -> None:
    data = with_summary(make_report((), pairs={}, unsure_pairs=()), domains={}, pairs=0, ok=0)
    assert "There is no pair." in Reader(render_annotation(data)).text


def test_domains_without_a_router_or_beyond_the_pages_number_have_their_row() -> None:
    names = ("chat", "safety")
    quiet = make_domain(confidence=None, unsure=0, routed=0)
    data = make_report(names, domains={"chat": quiet}, hidden=("safety",))
    data = dataclasses.replace(data, pairs={"chat": data.pairs["chat"]})
    html = render_annotation(data)
    for name in names:
        assert f'<th scope="row">{name}</th>' in html


def test_the_same_numbers_give_the_same_bytes() -> None:
    assert render_annotation(make_report()) == render_annotation(make_report())
    svg = draw_histogram(
        Histogram(0.0, 1.0, (1, 2)), axis="x", rows="y", key="k", label='a "<b>" label'
    )
    assert 'aria-label="a &#34;&lt;b&gt;&#34; label"' in svg
    for trace in ("matplotlib", "date", "http", "<style", "#01020"):
        assert trace not in svg.replace("k-matplotlib.axis", "").lower()


# --- the verdict ---------------------------------------------------------------------------------


def levels(data: Any, about: str) -> list[Level]:
    return [found.level for found in judge(data).findings if about in found.what]


def test_a_run_without_faults_is_not_warned_of() -> None:
    verdict = judge(make_report())
    assert verdict.headline == "Nothing looks wrong"
    assert all(found.next is None for found in verdict.findings)


@pytest.mark.parametrize(
    ("sxy", "level"),
    # R² = sxy² / (400 · 100): 0.04, 0.25, 0.5625.
    [(40.0, Level.FINE), (-100.0, Level.LOOK), (150.0, Level.STOP)],
)
def test_length_that_explains_rewards_is_told(sxy: float, level: Level) -> None:
    domain = make_domain(effect=LengthEffect(400.0, 100.0, sxy))
    assert levels(make_report(("chat",), domains={"chat": domain}), "Length explains") == [level]


@pytest.mark.parametrize(
    ("longer", "shorter", "level"),
    [(60, 40, Level.FINE), (30, 70, Level.LOOK), (90, 10, Level.STOP), (9, 1, Level.LOOK)],
)
def test_one_side_always_longer_is_told(longer: int, shorter: int, level: Level) -> None:
    domain = make_domain(lengths=Lengths(longer, shorter, 0))
    data = make_report(("chat",), domains={"chat": domain})
    assert levels(data, "Chosen is the longer one") == [level]


def test_the_worst_finding_comes_first_and_names_what_to_do() -> None:
    data = with_summary(
        make_report(), no_pair={"tie": 40}, rejected={"too_long": 2}, candidates=482
    )
    verdict = judge(data)
    first, second = verdict.findings[:2]
    # 40 of 160 prompts: a quarter.
    assert (first.level, "40 prompts (25.0%) gave no pair: tie 40." in first.what) == (
        Level.STOP,
        True,
    )
    assert first.next is not None
    assert second.what.startswith("2 candidates (0.4%) were rejected")
    assert verdict.headline == "Do not train on these pairs yet: 1 thing stands against it"


def test_cut_candidates_are_told() -> None:
    # 120 of the summary's 480 candidates.
    data = make_report(("chat",), domains={"chat": make_domain(cut=120)})
    assert levels(data, "120 candidates (25%) were cut") == [Level.LOOK]


def test_unsure_routes_small_margins_and_mixed_engines_are_told() -> None:
    domain = make_domain(unsure=20, routed=40, small_margins=40)
    data = make_report(("chat",), domains={"chat": domain}, engine_versions=("torch 1", "torch 2"))
    assert levels(data, "The router was unsure of 20 of 40 prompts") == [Level.STOP]
    # 40 of the summary's 120 pairs.
    assert levels(data, "40 pairs (33%) have a margin below 1 nat") == [Level.STOP]
    assert levels(data, "torch 1, torch 2") == [Level.LOOK]


def test_the_configs_own_warnings_are_in_the_verdict() -> None:
    config = make_config()
    models = {role: {"path": "m", "engine": "stub"} for role in ("strong", "weak", "router")}
    reward = {**config.reward.model_dump(), "models": models}
    data = make_report(config=make_config(reward=reward))
    assert levels(data, "not known to be preference-tuned from weak") == [Level.LOOK]


def test_length_effect_is_that_of_a_line_through_the_deviations() -> None:
    # Deviations of x: −1, 0, 1; of y: −2, 1, 1: sxx 2, syy 6, sxy 3; R² 9/12, slope 3/2.
    effect = LengthEffect(2.0, 6.0, 3.0)
    assert effect.share == pytest.approx(0.75)
    assert effect.slope == pytest.approx(1.5)
    assert (effect + effect).share == pytest.approx(0.75)
    assert LengthEffect(0.0, 6.0, 0.0).share is None


# --- tokens --------------------------------------------------------------------------------------

TEXTS = (
    "Hello, world.",
    "naïve 🦊🦊 日本語, e\N{COMBINING ACUTE ACCENT} 👩\N{ZERO WIDTH JOINER}🚒\n\n  indented",
    "\N{REPLACEMENT CHARACTER}? \N{REPLACEMENT CHARACTER}",
)


def tokenizers() -> list[PreTrainedTokenizerFast]:
    return [
        make_smollm2(),
        make_small_bpe(CHATML_TEMPLATE, special=("<|im_end|>", "<|im_start|>")),
        make_mistral_v1(),
    ]


@pytest.mark.parametrize("number", range(3), ids=["smollm2", "bytes", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_spell_the_text_and_break_no_character(number: int, text: str) -> None:
    encoder = ChatEncoder(tokenizers()[number], "own")
    ids = encoder.encode_completion(text, "length").ids
    pieces = list(split_text(ids, encoder.decode))
    assert sum(size for _, size in pieces) == len(ids)
    assert "".join(piece for piece, _ in pieces) == encoder.decode(ids)
    own = [piece for piece, _ in pieces if "\N{REPLACEMENT CHARACTER}" in piece]
    assert len(own) == text.count("\N{REPLACEMENT CHARACTER}")


def test_a_control_token_is_shown_by_its_name() -> None:
    encoder = ChatEncoder(make_smollm2(), "own")
    ids: Sequence[int] = encoder.encode_completion("Yes.", "stop").ids
    assert [piece for piece, _ in split_text(ids, encoder.decode)][-1] == "<|im_end|>"


def test_tokens_are_shown_only_where_their_ids_are_those_that_were_scored(tmp_path: Path) -> None:
    tokenizer = make_smollm2()
    tokenizer.save_pretrained(tmp_path)
    spec = TokenizerSpec("m", str(tmp_path), None, CHATML_TEMPLATE, 1024, 1 << 20)
    plan = EncodingPlan((spec,), (("m", "plain"),), None, 0, "reject", True, False)
    reader = TokenReader(plan, {"m/plain": "m"}, {"m/plain": 2.0})
    text = "fox " * 400
    ids = ChatEncoder(tokenizer, "own").encode_completion(text, "stop").ids
    term = ScoredTerm(ids_hash(ids), [-1.0] * len(ids))
    (row,) = reader.read(text, "stop", {"m/plain": term})
    assert [piece.reward for piece in row.pieces] == [-2.0] * MAX_TOKENS
    assert row.rest == len(ids) - MAX_TOKENS > 100
    assert row.rest_reward == -2.0 * row.rest
    # Another text, another end, another tokenizer: the numbers are not theirs.
    assert reader.read(text + "!", "stop", {"m/plain": term}) == ()
    assert reader.read(text, "length", {"m/plain": term}) == ()
    changed = ScoredTerm(ids_hash(ids[1:]), term.logprobs)
    assert reader.read(text, "stop", {"m/plain": changed}) == ()


# --- the config ----------------------------------------------------------------------------------


def test_the_page_is_on_with_texts_unless_told_otherwise() -> None:
    assert make_config().report == ReportSpec(enabled=True, texts=True, pairs_per_domain=10)
    quiet: AnnotateConfig = make_config(report={"enabled": False})
    assert not quiet.report.enabled


def test_a_side_without_texts_has_no_tokens() -> None:
    assert make_side("a", None, 1.0).tokens == ()
