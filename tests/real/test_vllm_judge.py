"""The API judge against a real OpenAI-compatible server: vLLM's, with the demo model.

What a stub cannot show: that a real server takes our requests, counts the tokens of our question,
and says no in the way we read (`tests/unit/test_api_judge.py` has every way there is).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import permutations

import pytest
import requests

from cdr.api_judge import ApiJudge
from cdr.chat import ChatEncoder, Message
from cdr.demo_model import resolve_demo_model_dir
from cdr.engines.vllm_setup import find_vllm_version
from cdr.errors import ModelError, RejectReason
from cdr.judge import LABELS, judge_messages
from cdr.reward_config import ApiSpec

MODEL = resolve_demo_model_dir()
MAX_LENGTH = 512
ANSWERS = ("Ask the council first.", "No.", "Foxes are wild animals, so a licence may be needed.")

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(find_vllm_version() is None, reason="no vLLM: run make setup-vllm"),
    pytest.mark.skipif(
        not (MODEL / "model.safetensors").is_file(),
        reason="the demo model is not there: run jobs/make_demo_model.py",
    ),
]


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the demo model; give where."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL),
        "--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", str(MAX_LENGTH), "--max-num-seqs", "4", "--enforce-eager",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w") as stream:
        server = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=log.parent
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while not _is_up(url):
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        server.terminate()
        server.wait(60)


def _is_up(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).ok
    except requests.ConnectionError:
        return False


def make_api(base_url: str, monkeypatch: pytest.MonkeyPatch) -> ApiSpec:
    monkeypatch.setenv("JUDGE_KEY", "none")
    prices = {"prompt_price": 10, "answer_price": 30}
    return ApiSpec(base_url=base_url, api_key_variable="JUDGE_KEY", concurrency=4, **prices)


def test_a_real_server_judges_what_it_is_asked(
    base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = make_api(base_url, monkeypatch)
    prompt: list[Message] = [{"role": "user", "content": "May I keep a fox?"}]
    asked = [judge_messages(prompt, None, *pair) for pair in permutations(ANSWERS, 2)]
    too_long = judge_messages(prompt, None, "No. " * MAX_LENGTH, "Yes.")
    with ApiJudge("judge", api) as judge:
        *verdicts, refused = judge.ask([json.dumps(question) for question in [*asked, too_long]])
    encoder = ChatEncoder.load(str(MODEL), None, template="own")
    for question, verdict in zip(asked, verdicts, strict=True):
        assert verdict.error is None
        # A model of this size may write something else than a letter.
        assert verdict.verdict in LABELS or verdict.reason is RejectReason.JUDGE_UNCLEAR
        assert verdict.answered_by == "judge"
        # The server reads what an engine of ours would.
        assert verdict.prompt_tokens == len(encoder.encode_prefix(question))
        assert verdict.answer_tokens is not None
        assert 0 < verdict.answer_tokens <= api.max_tokens
        assert verdict.cost_usd(api) == pytest.approx(
            (verdict.prompt_tokens * 10 + verdict.answer_tokens * 30) / 1e6
        )
    assert (refused.verdict, refused.reason) == (None, RejectReason.JUDGE_REFUSED)


def test_a_real_server_that_lacks_the_model_ends_the_run(
    base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        ApiJudge("gpt-4", make_api(base_url, monkeypatch)) as judge,
        pytest.raises(ModelError, match="answered 404 for model 'gpt-4'"),
    ):
        list(judge.ask([json.dumps([{"role": "user", "content": "A or B?"}])]))
