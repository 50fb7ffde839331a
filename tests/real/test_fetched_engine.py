"""A model behind a URI in the engine host: fetched, loaded once, and the same numbers as here."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from cdr.engines.base import EngineSpec, ScoringGroup
from cdr.engines.client import connect
from cdr.engines.device import Device
from cdr.engines.launch import LOG, HostOptions, host_folder
from cdr.engines.owner import Owner
from cdr.engines.transformers import TransformersEngine
from cdr.errors import EngineError
from cdr.weights import WEIGHT_FILES, hash_files

pytestmark = pytest.mark.timeout(300)

GROUPS = [ScoringGroup((1, 2, 3), ((4, 5), (6,))), ScoringGroup((1, 2), ((7, 8, 9),))]


def test_a_model_behind_a_uri_scores_like_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setenv("CDR_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    here = EngineSpec("here", "transformers", str(folder), max_length=64)
    there = EngineSpec(
        "there", "transformers", folder.as_uri(), max_length=64,
        checksum=hash_files(folder, WEIGHT_FILES),
    )  # fmt: skip
    unpinned = EngineSpec("unpinned", "transformers", folder.as_uri())
    expected = TransformersEngine(here, num_threads=1).score(GROUPS)

    device, owner = Device("cpu", ("fetched",)), Owner.of(os.getpid())
    with connect(device, HostOptions(owner=owner, num_threads=1)) as client:
        try:
            client.set_engines([there])
            client.set_engines([there])
            log = (host_folder(device, owner) / LOG).read_text()
            outcomes = client.score("there", GROUPS)
            with pytest.raises(EngineError, match=r"cdr\.weights checksum file://"):
                client.set_engines([unpinned])
        finally:
            client.shutdown()
    assert (log.count("loading there"), log.count("fetched file://")) == (1, 1)
    for group, wanted in zip(outcomes, expected, strict=True):
        for outcome, logprobs in zip(group, wanted, strict=True):
            np.testing.assert_array_equal(outcome.value, logprobs)
