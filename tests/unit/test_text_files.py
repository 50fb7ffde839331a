"""Configs and packs read from a path, a URI, S3, or the package itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import yaml

from cdr import text_files
from cdr.config import load_annotate_config
from cdr.errors import ConfigError
from cdr.files import hadoop_place
from cdr.prompt_pack import load_prompt_pack
from cdr.reward_config import load_reward_config
from cdr.text_files import is_uri, package_conf, read_text, resolve_beside

ROOT = Path(__file__).resolve().parents[2]
RUN = {
    "dataset": "d",
    "warehouse": "../tables",
    "input": {"path": "s3://bucket/completions"},
    "reward": "../rewards/mistral-dpo-over-sft.yaml",
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as a wheel lays it out, with an empty working directory beside it."""
    site = tmp_path / "site-packages"
    shutil.copytree(ROOT / "conf", site / "cdr_conf", ignore=shutil.ignore_patterns("models"))
    monkeypatch.setattr(text_files, "__file__", str(site / "cdr" / "text_files.py"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return site


def test_a_documented_name_is_found_in_the_installed_package(installed: Path) -> None:
    config = load_annotate_config("conf/annotate/demo.yaml")
    assert config.input.path == str(installed / "cdr_conf/demo/completions.jsonl")
    assert config.reward.prompt_pack == str(installed / "cdr_conf/prompts/cdr-v1.yaml")
    # Outside of the package's configs: not a place to write tables to.
    assert config.warehouse == str(Path.cwd() / "warehouse/demo")
    swapped = load_annotate_config(
        "conf/annotate/demo.yaml", ["reward=conf/rewards/mistral-dpo-over-sft.yaml"]
    )
    assert swapped.reward.name == "mistral-dpo-over-sft"


def test_a_file_here_wins_over_the_package(installed: Path) -> None:
    Path("conf/annotate").mkdir(parents=True)
    Path("conf/annotate/demo.yaml").write_text(yaml.safe_dump({**RUN, "dataset": "mine"}))
    with pytest.raises(ConfigError, match=r"cwd/conf/rewards/mistral-dpo-over-sft.yaml: no such"):
        load_annotate_config("conf/annotate/demo.yaml")
    Path("conf/rewards").mkdir()
    shutil.copy(installed / "cdr_conf/rewards/mistral-dpo-over-sft.yaml", "conf/rewards")
    config = load_annotate_config("conf/annotate/demo.yaml")
    assert config.dataset == "mine"
    assert config.warehouse == str(Path.cwd() / "conf/tables")


def test_a_missing_name_is_reported_as_it_was_given(installed: Path) -> None:
    with pytest.raises(ConfigError, match=r"conf/annotate/dmo.yaml: no such file"):
        load_annotate_config("conf/annotate/dmo.yaml")


def test_a_checkout_reads_its_own_conf_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert package_conf() == ROOT / "conf"
    assert load_annotate_config("conf/annotate/demo.yaml").warehouse == str(ROOT / "warehouse/demo")


def test_a_file_uri_and_what_it_names_are_read() -> None:
    uri = (ROOT / "conf/rewards/mistral-dpo-over-sft.yaml").as_uri()
    reward = load_reward_config(uri)
    assert reward.prompt_pack == (ROOT / "conf/prompts/cdr-v1.yaml").as_uri()
    pack = load_prompt_pack(reward.prompt_pack)
    assert pack.key == load_prompt_pack(ROOT / "conf/prompts/cdr-v1.yaml").key


@pytest.mark.parametrize(
    ("value", "place", "found"),
    [
        ("./b.yaml", "s3://bucket/cdr/run/a.yaml", "s3://bucket/cdr/run/b.yaml"),
        ("../b.yaml", "s3://bucket/cdr/run/a.yaml", "s3://bucket/cdr/b.yaml"),
        ("../b", "s3a://bucket/cdr/a.yaml", "s3a://bucket/b"),
        ("../b.yaml", "/Volumes/main/cdr/files/a.yaml", "/Volumes/main/cdr/b.yaml"),
        ("./b.yaml", "dbfs:/Volumes/main/cdr/files/a.yaml", "/Volumes/main/cdr/files/b.yaml"),
        ("./b.yaml", "dbfs:/cdr/a.yaml", "/dbfs/cdr/b.yaml"),
    ],
)
def test_relative_values_are_beside_their_file(value: str, place: str, found: str) -> None:
    assert resolve_beside(value, place) == found


def test_a_uri_has_two_slashes() -> None:
    assert is_uri("s3://bucket/key")
    assert not is_uri("dbfs:/Volumes/main")
    assert not is_uri("/Volumes/main/a://b")


@pytest.mark.parametrize("uri", ["ftp://host/run.yaml", "https://host/run.yaml", "dbfs://x/y"])
def test_a_scheme_that_nothing_reads_is_refused_with_the_remedy(uri: str) -> None:
    with pytest.raises(ConfigError, match=f"nothing here reads '{uri.split(':')[0]}://'") as caught:
        load_annotate_config(uri)
    assert "/Volumes/" in str(caught.value)


def test_a_missing_file_behind_a_uri_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file"):
        load_annotate_config((tmp_path / "nothing.yaml").as_uri())


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a server that plays S3."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="cdr")
    yield "cdr"
    server.stop()


def test_a_run_its_reward_and_its_pack_are_read_from_s3(bucket: str) -> None:
    s3 = boto3.client("s3")
    for name in ("rewards/mistral-dpo-over-sft.yaml", "prompts/cdr-v1.yaml"):
        s3.upload_file(str(ROOT / "conf" / name), bucket, name)
    s3.put_object(Bucket=bucket, Key="annotate/run.yaml", Body=yaml.safe_dump(RUN).encode())
    config = load_annotate_config(f"s3://{bucket}/annotate/run.yaml")
    assert config.warehouse == "s3://cdr/tables"
    assert config.reward.name == "mistral-dpo-over-sft"
    assert config.reward.prompt_pack == "s3://cdr/prompts/cdr-v1.yaml"
    assert load_prompt_pack(config.reward.prompt_pack).name == "cdr-v1"
    # Hadoop's name for the same place.
    assert load_annotate_config(f"s3a://{bucket}/annotate/run.yaml").warehouse == "s3a://cdr/tables"
    with pytest.raises(ConfigError, match=r"s3://cdr/annotate/other.yaml: no such file"):
        load_annotate_config(f"s3://{bucket}/annotate/other.yaml")


def test_text_behind_a_uri_is_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("π − σ".encode())
    assert read_text((tmp_path / "a.txt").as_uri()) == "π − σ"


@pytest.mark.parametrize(
    ("place", "known_as"),
    [
        ("/Volumes/main/cdr/files/warehouse", "file:/Volumes/main/cdr/files/warehouse"),
        ("dbfs:/Volumes/main/cdr/files", "file:/Volumes/main/cdr/files"),
        ("file:/Volumes/main", "file:/Volumes/main"),
        ("s3://bucket/warehouse", "s3://bucket/warehouse"),
        ("/data/warehouse", "/data/warehouse"),
    ],
)
def test_hadoop_sees_a_volume_as_the_mounted_folder(place: str, known_as: str) -> None:
    assert hadoop_place(place) == known_as
