"""Models of a hub, played by a small server on this machine: what comes, and what is said when not.

Each call runs in a process of its own, because the hub's client reads its environment once.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(120)

COMMIT, OTHER = "c" * 40, "d" * 40
FILES = {
    "config.json": b'{"vocab_size": 100}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "consolidated.safetensors": b"again" * 1000,
    "pytorch_model.bin": b"pickle",
    "onnx/config.json": b"{}",
    "data/filtered-00000-of-00001.parquet": b"PAR1 pairs",
    "data/raw-00000-of-00001.parquet": b"PAR1 more pairs",
}


class Hub(BaseHTTPRequestHandler):
    """The routes that a snapshot needs; gated and missing models answer as the hub does."""

    asked: list[str]

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        name = path.removeprefix("/api/models").removeprefix("/api").removeprefix("/datasets")
        repo, revision = "/".join(name.split("/")[1:3]), path.split("/")[-1]
        if repo == "acme/gated" and "resolve" in path:
            is_known = "Authorization" in self.headers
            return self._refuse(403 if is_known else 401, "GatedRepo")
        if repo not in ("acme/model", "acme/gated"):
            return self._refuse(401, "RepoNotFound")
        if OTHER in path:
            return self._refuse(404, "RevisionNotFound")
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in FILES.items()
            ]
            return self._send(json.dumps(entries).encode())
        if path.startswith("/api/"):
            siblings = [{"rfilename": name, "size": len(body)} for name, body in FILES.items()]
            info = {"id": repo, "sha": revision, "siblings": siblings}
            return self._send(json.dumps(info).encode())
        body = FILES.get(path.partition(f"/resolve/{COMMIT}/")[2])
        if body is None:
            return self._refuse(404, "EntryNotFound")
        return self._send(body)

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """The hub's address, and the paths it was asked for."""
    asked: list[str] = []
    handler = type("Handler", (Hub,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def fetch(
    folder: Path, endpoint: str, repo: str, revision: str = COMMIT, *, first: str = "", **more: str
) -> Any:
    """Fetch in another process, which runs the code `first` before; give its answer."""
    code = f"{first}\nimport sys; from cdr import weights; sys.exit(weights.main(sys.argv[1:]))"
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_HOME": str(folder / "hf"),
        "CDR_CACHE": str(folder / "cache"),
        "HF_ENDPOINT": endpoint,
        **more,
    }
    source = json.dumps({"path": repo, "revision": revision})
    done = subprocess.run(
        [sys.executable, *(["-c", code] if first else ["-m", "cdr.weights"]), "fetch", source],
        env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert (done.returncode != 0) == ("error" in answer), done.stderr
    return answer


def test_a_model_of_the_hub_comes_once_without_other_formats(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    endpoint, asked = hub
    answer = fetch(tmp_path, endpoint, "acme/model")
    names = ("config.json", "tokenizer.json", "model.safetensors")
    assert {f.name for f in Path(answer["folder"]).iterdir()} == set(names)
    assert answer["bytes_copied"] == sum(len(FILES[name]) for name in names)
    assert (Path(answer["folder"]) / "model.safetensors").read_bytes() == FILES["model.safetensors"]

    asked.clear()
    again = fetch(tmp_path, endpoint, "acme/model")
    assert (again["folder"], again["bytes_copied"]) == (answer["folder"], 0)
    assert asked == []


def test_a_filled_cache_does_offline(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, asked = hub
    fetch(tmp_path, endpoint, "acme/model")
    asked.clear()
    # A cache that someone else filled: nothing of ours says what is in it.
    offline = fetch(
        tmp_path, endpoint, "acme/model", HF_HUB_OFFLINE="1", CDR_CACHE=str(tmp_path / "other")
    )
    assert (offline["bytes_copied"], asked) == (0, [])
    missing = fetch(tmp_path / "empty", endpoint, "acme/model", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in missing["error"]
    assert f"hf download acme/model --revision {COMMIT}" in missing["error"]


@pytest.mark.parametrize(
    ("repo", "revision", "token", "what", "fix"),
    [
        ("acme/gated", COMMIT, "", "is gated, and this process, which has no token", "licence at"),
        ("acme/gated", COMMIT, "hf_secret", "is gated, and the token of HF_TOKEN", "HF_TOKEN"),
        ("acme/none", COMMIT, "", "there is no model 'acme/none'", "check the name"),
        ("acme/model", OTHER, "", f"has no commit {OTHER}", "commits/main"),
    ],
)
def test_each_refusal_says_what_to_do(
    hub: tuple[str, list[str]],
    tmp_path: Path,
    repo: str,
    revision: str,
    token: str,
    what: str,
    fix: str,
) -> None:
    answer = fetch(tmp_path, hub[0], repo, revision, HF_TOKEN=token)
    assert what in answer["error"]
    assert fix in answer["error"]
    assert "hf_secret" not in answer["error"]


def test_only_the_asked_split_of_a_data_set_comes(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    program = (
        "import sys\n"
        "from cdr.errors import CdrError\n"
        "from cdr.hub import download_split\n"
        "try:\n"
        "    print([file.name for file in download_split(*sys.argv[1:])])\n"
        "except CdrError as error:\n"
        "    print(error)\n"
    )

    def download(repo: str, split: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", program, repo, COMMIT, split],
            env={**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": hub[0], "HF_TOKEN": ""},
            capture_output=True, text=True, timeout=100, check=True,
        ).stdout  # fmt: skip

    assert download("acme/model", "filtered") == "['filtered-00000-of-00001.parquet']\n"
    assert not any("raw-0" in path for path in hub[1] if "resolve" in path)
    assert "has no Parquet files of the split 'test'" in download("acme/model", "test")
    assert "there is no data set 'acme/none'" in download("acme/none", "filtered")


def test_a_hub_that_cannot_be_reached_is_told_from_one_that_refuses(tmp_path: Path) -> None:
    # The client tries again after 1, 2, 4, 8 and 8 s, which nothing can set.
    impatient = "import time; time.sleep = lambda seconds: None"
    answer = fetch(tmp_path, "http://127.0.0.1:9", "acme/model", first=impatient)
    assert "http://127.0.0.1:9 cannot be reached" in answer["error"]
    assert "HTTPS_PROXY" in answer["error"]


def test_a_plan_finds_out_once_that_the_hub_is_out_of_reach(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    program = (
        "import sys, time\n"
        "from huggingface_hub import HfApi\n"
        "from cdr.errors import CdrError\n"
        "from cdr.weights import fetch_small_files\n"
        "look_up, asked = HfApi.repo_info, []\n"
        "HfApi.repo_info = lambda *a, **k: (asked.append(a[1]), look_up(*a, **k))[1]\n"
        "time.sleep = lambda seconds: sys.exit('the client waits')\n"
        "for repo in sys.argv[1:]:\n"
        "    try:\n"
        f"        print(fetch_small_files(repo, {COMMIT!r}, is_patient=False).name)\n"
        "    except CdrError as error:\n"
        "        print(error.what)\n"
        "print(asked)\n"
    )

    def plan(endpoint: str, *repos: str, **more: str) -> tuple[list[str], str]:
        done = subprocess.run(
            [sys.executable, "-c", program, *repos],
            env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint,
                 "CDR_CACHE": str(tmp_path / "cache"), **more},
            capture_output=True, text=True, timeout=100, check=True,
        )  # fmt: skip
        return done.stdout.splitlines(), done.stderr

    lost = "http://127.0.0.1:9"
    lines, log = plan(lost, "acme/model", "acme/other")
    assert all(line.startswith(f"{lost} cannot be reached (ConnectError)") for line in lines[:2])
    assert ["'acme/model'" in lines[0], "'acme/other'" in lines[1]] == [True, True]
    assert (lines[2], log) == ("['acme/model']", "")
    # What was downloaded before does; nothing of ours says that it is complete.
    assert plan(hub[0], "acme/model")[0][0] == COMMIT
    assert plan(lost, "acme/model", CDR_CACHE=str(tmp_path / "new"))[0][0] == COMMIT


def test_a_disk_without_room_is_seen_before_the_download(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    endpoint, asked = hub
    full = (
        "import shutil, types\nshutil.disk_usage = lambda folder: types.SimpleNamespace(free=100)"
    )
    error = fetch(tmp_path, endpoint, "acme/model", first=full)["error"]
    assert "the disk is too full for 'acme/model'" in error
    assert "HF_HOME" in error
    assert not any("resolve" in path for path in asked)
