"""One checked copy of the weights per node, whatever processes come, die or disagree."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cdr import weights
from cdr.engines.base import EngineSpec
from cdr.errors import ConfigError, ModelError, SetupError
from cdr.node_cache import size_of
from cdr.reward_config import ModelSpec
from cdr.weights import Source, fetch, fetch_small_files, hash_files, make_local

pytestmark = pytest.mark.timeout(120)

WEIGHTS = bytes(range(256)) * 1024
# Copies in small steps with pauses, so that a test can step in between.
SLOW = """
import sys, time
from cdr import copies, weights
copies._CHUNK_BYTES = 16 << 10
open_stream = copies.RemoteFolder.stream
class Slow:
    def __init__(self, stream): self.stream = stream
    def __enter__(self): return self
    def __exit__(self, *_): self.stream.close()
    def read(self, size):
        time.sleep(0.1)
        return self.stream.read(size)
copies.RemoteFolder.stream = lambda self, name: Slow(open_stream(self, name))
sys.exit(weights.main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CDR_CACHE", str(tmp_path / "new" / "cache"))
    return tmp_path / "new" / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_text('{"vocab_size": 100}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "README.md").write_text("a note")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    return folder


def source_of(folder: Path, **changes: Any) -> Source:
    checksum = hash_files(folder, weights.WEIGHT_FILES)
    return Source(**{"path": folder.as_uri(), "checksum": checksum, **changes})


def start(source: Source) -> subprocess.Popen[str]:
    argument = json.dumps(
        {"path": source.path, "revision": source.revision, "checksum": source.checksum}
    )
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, "fetch", argument],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_copy_has_the_files_that_are_safe_to_load_and_comes_once(
    model: Path, cache: Path
) -> None:
    first, second = fetch(source_of(model)), fetch(source_of(model))
    folder = Path(first.folder)
    assert {f.name for f in folder.iterdir() if f.name[0] != "."} == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
    }
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    copied = sum((model / n).stat().st_size for n in ("config.json", "tokenizer.json"))
    assert first.bytes_copied == len(WEIGHTS) + copied
    assert first.is_verified
    assert (second.folder, second.bytes_copied) == (first.folder, 0)
    assert folder.is_relative_to(cache)
    assert cache.stat().st_mode & 0o777 == 0o700


def test_two_processes_share_one_copy(model: Path, cache: Path) -> None:
    source = source_of(model)
    one = start(source)
    wait_for(lambda: any(cache.glob("weights/*.partial/model.safetensors")))
    other = start(source)
    results = [process.communicate(timeout=60) for process in (one, other)]
    answers = [json.loads(out) for out, _ in results]
    assert answers[0]["bytes_copied"] > len(WEIGHTS)
    assert answers[1]["bytes_copied"] == 0
    assert answers[0]["folder"] == answers[1]["folder"]
    assert "waiting for another process" in results[1][1]


def test_what_a_killed_process_left_is_gone_on_with_and_never_used(
    model: Path, cache: Path
) -> None:
    (model / "model-2.safetensors").write_bytes(b"small")
    source = source_of(model)
    process = start(source)
    partial = cache / "weights" / f"{source.checksum}.partial"
    wait_for(lambda: (size_of(partial / "model.safetensors") or 0) > 0)
    wait_for(lambda: size_of(partial / "model-2.safetensors") == 5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (partial / "model.safetensors").stat().st_size < len(WEIGHTS)
    assert not (cache / "weights" / str(source.checksum)).exists()

    fetched = fetch(source)
    whole = sum(
        (model / name).stat().st_size
        for name in ("model.safetensors", "model-2.safetensors", "config.json", "tokenizer.json")
    )
    assert len(WEIGHTS) <= fetched.bytes_copied <= whole - 5  # the small file was taken over
    assert (Path(fetched.folder) / "model.safetensors").read_bytes() == WEIGHTS
    assert not partial.exists()


def test_a_damaged_leftover_is_thrown_away(model: Path, cache: Path) -> None:
    source = source_of(model)
    partial = cache / "weights" / f"{source.checksum}.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(bytes(len(WEIGHTS)))
    (partial / "evil.bin").write_bytes(b"x")
    fetched = fetch(source)
    assert (Path(fetched.folder) / "model.safetensors").read_bytes() == WEIGHTS
    assert not (Path(fetched.folder) / "evil.bin").exists()


def test_a_finished_copy_that_lost_bytes_is_made_again(model: Path) -> None:
    file = Path(fetch(source_of(model)).folder) / "model.safetensors"
    os.truncate(file, 10)
    assert fetch(source_of(model)).bytes_copied > 0
    assert file.read_bytes() == WEIGHTS


def test_verifying_reads_what_is_there(model: Path) -> None:
    file = Path(fetch(source_of(model)).folder) / "model.safetensors"
    assert fetch(source_of(model), verify=True).is_verified
    file.write_bytes(bytes(len(WEIGHTS)))  # the same size
    with pytest.raises(ModelError, match="has checksum"):
        fetch(source_of(model), verify=True)
    local = Source(str(model), checksum=source_of(model).checksum)
    assert fetch(local, verify=True).is_verified
    with pytest.raises(ModelError, match="has checksum"):
        fetch(Source(str(model), checksum="0" * 64), verify=True)


def test_other_content_than_the_checksum_says_is_refused_and_not_kept(
    model: Path, cache: Path
) -> None:
    found, expected = str(source_of(model).checksum), "f" * 64
    with pytest.raises(ModelError) as caught:
        fetch(source_of(model, checksum=expected))
    assert found in str(caught.value)
    assert expected in str(caught.value)
    assert list((cache / "weights").glob("f*")) == [cache / "weights" / f"{expected}.lock"]


def test_a_uri_without_a_checksum_names_the_command_that_prints_it(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        fetch(Source(model.as_uri()))
    command = str(caught.value.fix).removeprefix("print it with: python -m cdr.weights ")
    assert weights.main(command.split()) == 0
    assert capsys.readouterr().out == f'checksum: "{source_of(model).checksum}"\n'


def test_a_full_disk_is_seen_before_copying(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(free=len(WEIGHTS) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(ModelError) as caught:
        fetch(source_of(model))
    assert "it needs 0.00 GiB more, there are 0.00 GiB" in caught.value.what
    assert "CDR_CACHE" in str(caught.value.fix)


def test_a_disk_that_fills_up_while_copying_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(model)
    open_file = Path.open

    def open_full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "wb":
            return open_file(Path("/dev/full"), mode, 0)
        return open_file(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(ModelError, match="the disk is too full"):
        fetch(source)


@pytest.mark.parametrize("as_uri", [True, False])
def test_pickled_weights_are_refused(model: Path, as_uri: bool) -> None:
    (model / "model.safetensors").unlink()
    source = source_of(model) if as_uri else Source(str(model))
    with pytest.raises(ModelError, match=r"lacks \*\.safetensors; pytorch_model\.bin is not load"):
        fetch(source)


def test_what_is_not_there_says_where(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        fetch(Source(str(tmp_path / "none")))
    for path in ((tmp_path / "none").as_uri(), "nothing://a/b"):
        with pytest.raises(ModelError, match="cannot be read"):
            fetch(Source(path, checksum="0" * 64))
    (model / "config.json").unlink()
    with pytest.raises(ModelError, match=r"lacks config\.json"):
        fetch(Source(str(model)))


def test_a_cache_that_cannot_be_written_names_the_variable(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CDR_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SetupError, match="CDR_CACHE"):
        fetch(source_of(model))


def test_small_files_come_without_weights_and_anew_when_they_change(model: Path) -> None:
    first = fetch_small_files(model.as_uri(), None)
    assert {f.name for f in first.iterdir() if f.name[0] != "."} == {
        "config.json",
        "tokenizer.json",
    }
    assert fetch_small_files(model.as_uri(), None) == first
    (model / "tokenizer.json").write_text('{"changed": true}')
    second = fetch_small_files(model.as_uri(), None)
    assert (second / "tokenizer.json").read_text() == '{"changed": true}'
    assert (first / "tokenizer.json").read_text() == "{}"
    assert fetch_small_files(str(model), None) == model


def test_a_network_mount_is_copied_and_a_folder_used_where_it_lies(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checksum = source_of(model).checksum
    spec = EngineSpec("m", "transformers", str(model), checksum=checksum)
    assert make_local(spec) == spec
    monkeypatch.setattr(weights, "_NETWORK_MOUNTS", (f"{model.parent}/",))
    local = make_local(spec)
    assert local.path != str(model)
    assert hash_files(Path(local.path), weights.WEIGHT_FILES) == checksum


def test_an_adapter_is_fetched_like_its_model(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"lora")
    (adapter / "adapter_config.json").write_text("{}")
    spec = EngineSpec(
        "m", "transformers", str(model),
        adapter_path=adapter.as_uri(), adapter_checksum=hash_files(adapter, weights.ADAPTER_FILES),
    )  # fmt: skip
    local = make_local(spec)
    assert (Path(str(local.adapter_path)) / "adapter_model.safetensors").read_bytes() == b"lora"
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"lacks adapter_model\.safetensors; adapter_model\.bin"):
        make_local(EngineSpec("m", "transformers", str(model), adapter_path=str(adapter)))


def test_a_stub_has_nothing_to_fetch() -> None:
    spec = EngineSpec("s", "stub", "s3://nowhere/at-all")
    assert make_local(spec) == spec
    assert not weights.may_be_fetched(spec)


# --- S3, played by moto on this machine -----------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="models")
        yield client
        client.close()
    server.stop()


def test_a_model_on_s3_is_planned_by_its_small_files_and_copied_with_its_checksum(
    s3: Any, model: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in model.rglob("*.*"):
        key = f"a/{file.relative_to(model).as_posix()}"
        s3.put_object(Bucket="models", Key=key, Body=file.read_bytes())
    assert weights.main(["checksum", "s3://models/a"]) == 0
    checksum = json.loads(capsys.readouterr().out.partition(": ")[2])
    assert checksum == source_of(model).checksum

    small = fetch_small_files("s3://models/a/", None)
    assert sorted(f.name for f in small.iterdir() if f.name[0] != ".") == [
        "config.json",
        "tokenizer.json",
    ]
    fetched = fetch(Source("s3a://models/a", checksum=checksum))
    assert fetched.is_verified
    assert (Path(fetched.folder) / "model.safetensors").read_bytes() == WEIGHTS
    assert fetch(source_of(model)).bytes_copied == 0  # the same content from another place


def test_a_prefix_or_bucket_that_is_not_there_is_told(s3: Any) -> None:
    for path in ("s3://models/none", "s3://no-such-bucket/a"):
        with pytest.raises(ModelError, match="cannot be read") as caught:
            fetch(Source(path, checksum="0" * 64))
        assert "credentials" in str(caught.value.fix)


# --- the plan -------------------------------------------------------------------------------------


def test_a_copied_model_has_the_key_of_the_folder_it_is_a_copy_of(model: Path) -> None:
    from tests.unit.test_models import resolve

    checksum = source_of(model).checksum
    here = resolve(model)
    there = resolve(model, path=model.as_uri(), checksum=checksum)
    assert there.model_key == here.model_key
    assert there.engine_spec.checksum == here.engine_spec.checksum == checksum
    assert there.engine_spec.path == model.as_uri()
    with pytest.raises(ConfigError, match=r"models\.strong\.path: .* has checksum"):
        resolve(model, checksum="0" * 64)


def test_a_config_is_told_every_checksum_it_lacks() -> None:
    with pytest.raises(ValueError, match="checksum: is required") as caught:
        ModelSpec(path="s3://b/m", adapter="s3://b/a", adapter_checksum="abc")
    told = str(caught.value)
    assert "print it with: python -m cdr.weights checksum s3://b/m" in told
    assert "adapter_checksum: must be 64 hex digits, got 'abc'" in told
    with pytest.raises(ValueError, match="adapter_checksum: is given, but adapter is not"):
        ModelSpec(path="folder", adapter_checksum="0" * 64)
    assert ModelSpec(path="s3://b/m", checksum="0" * 64).revision is None


def test_a_large_folder_is_hashed_once_and_again_when_a_file_is_written(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = model / "model.safetensors"
    os.truncate(large, 65 << 20)  # takes no disk

    def age() -> None:
        for file in model.iterdir():
            os.utime(file, (1e9, 1e9))

    age()
    expected = hash_files(model, weights.WEIGHT_FILES)
    source = Source(str(model))
    assert weights.hash_source(source) == expected
    with monkeypatch.context() as patch:
        patch.setattr(weights, "hash_files", lambda *_: pytest.fail("hashed again"))
        assert weights.hash_source(source) == expected
    with large.open("r+b") as stream:
        stream.write(b"other")  # of the same size, and with the same time
    age()
    assert weights.hash_source(source) == hash_files(model, weights.WEIGHT_FILES) != expected
    assert len(list((cache / "checksums").iterdir())) == 2
