"""What `cdr.config`, `cdr.reward_config` and `cdr.config_files` accept, and how they say no."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import ValidationError

from cdr.config import AnnotateConfig, PairSpec, content_hash, load_annotate_config
from cdr.config_files import MayBeFile, Spec, load_config
from cdr.config_reference import render_config_reference
from cdr.errors import ConfigError
from cdr.reward_config import RewardSpec, is_hub_id, load_reward_config

CONF = Path(__file__).resolve().parents[2] / "conf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

Write = Callable[..., Path]


def reward_tree(**changes: Any) -> dict[str, Any]:
    """A smallest valid reward: hub ids, no conditioning."""
    return {
        "name": "dpo-over-sft",
        "models": {
            "strong": {"path": "acme/dpo", "revision": COMMIT, "tuned_from": "weak"},
            "weak": {"path": "acme/sft", "revision": COMMIT},
        },
        "routing": {"mode": "none"},
        **changes,
    }


def annotate_tree(**changes: Any) -> dict[str, Any]:
    return {
        "dataset": "demo",
        "warehouse": "/data/warehouse",
        "input": {"path": "/data/completions"},
        "reward": reward_tree(),
        **changes,
    }


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(tree: object, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree), encoding="utf-8")
        return path

    return write


def problems_of(load: Callable[..., object], *args: object) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(*args)
    return caught.value.problems


def required_variables(path: Path) -> list[str]:
    """Names of the `${oc.env:NAME}` without a default in a shipped file."""
    text = path.read_text(encoding="utf-8")
    parts = [part.split("}")[0] for part in text.split("${oc.env:")[1:]]
    return [part for part in parts if "," not in part and part != "HOME"]


# --- the files we ship -------------------------------------------------------------------------

SHIPPED_REWARDS = sorted((CONF / "rewards").rglob("*.yaml"))
SHIPPED_RUNS = sorted((CONF / "annotate").rglob("*.yaml"))
# Every YAML of conf/ is one of these; the other kinds have tests of their own.
OTHER_KINDS = {
    "prompts",
    "generate",
    "cluster",
    "evaluate",
    "benchmark",
    "study",
    "train",
    "downstream",
}


def test_every_yaml_in_conf_is_of_a_known_kind() -> None:
    known = {*SHIPPED_REWARDS, *SHIPPED_RUNS}
    strays = [
        path
        for path in CONF.rglob("*.y*ml")
        if path not in known and path.relative_to(CONF).parts[0] not in OTHER_KINDS
    ]
    assert strays == []
    assert len(SHIPPED_REWARDS) >= 5
    assert len(SHIPPED_RUNS) >= 2


@pytest.mark.parametrize("path", SHIPPED_REWARDS, ids=lambda path: path.stem)
def test_shipped_reward_loads_and_is_named_like_its_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in required_variables(path):
        monkeypatch.setenv(name, COMMIT)
    reward = load_reward_config(path)
    assert reward.name == path.stem
    if reward.prompt_pack is None:
        assert reward.routing.mode == "none"
    else:
        assert Path(reward.prompt_pack).parent == CONF / "prompts"


@pytest.mark.parametrize("path", SHIPPED_RUNS, ids=lambda path: path.stem)
def test_shipped_annotate_config_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in required_variables(path):
        monkeypatch.setenv(name, "somewhere")
    assert load_annotate_config(path).reward.resolved_terms()


def test_papers_run_has_the_papers_pair_and_router(monkeypatch: pytest.MonkeyPatch) -> None:
    path = CONF / "annotate" / "ultrafeedback.yaml"
    for name in required_variables(path):
        monkeypatch.setenv(name, "somewhere")
    config = load_annotate_config(path)
    assert {role: model.path for role, model in config.reward.models.items()} == {
        "strong": "NousResearch/Nous-Hermes-2-Mistral-7B-DPO",
        "weak": "teknium/OpenHermes-2.5-Mistral-7B",
        "router": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    }
    assert config.reward.routing.mode == "adaptive"
    assert config.reward.routing.domains == ("safety", "math_code", "chat")
    assert config.pairs.rejected == "random"
    assert config.pairs.validation_fraction > 0


def test_only_pairs_without_preference_tuning_and_custom_code_warn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warned = set()
    for path in SHIPPED_REWARDS:
        for name in required_variables(path):
            monkeypatch.setenv(name, COMMIT)
        if load_reward_config(path).warnings():
            warned.add(path.stem)
    assert warned == {"mistral-sft-over-base", "llama3-sft-over-base", "armorm-llama3-8b"}


# --- reading -----------------------------------------------------------------------------------


def test_reward_may_be_a_file_beside_the_run(write: Write) -> None:
    write(reward_tree(name="from-file"), "rewards/r.yaml")
    run = write(annotate_tree(reward="../rewards/r.yaml"), "annotate/run.yaml")
    assert load_annotate_config(run).reward.name == "from-file"


class Leaf(Spec):
    value: int = 0
    other: str = ""


class Branch(Spec):
    leaf: Annotated[Leaf | None, MayBeFile()] = None


class Root(Spec):
    branch: Annotated[Branch, MayBeFile()]
    leaves: dict[str, Annotated[Leaf, MayBeFile()]]


def test_files_name_files_at_any_depth_and_set_swaps_each(tmp_path: Path) -> None:
    folder = tmp_path / "below"
    folder.mkdir()
    (folder / "leaf.yaml").write_text("value: 1\nother: ./text")
    (folder / "leaf2.yaml").write_text("value: 2")
    (folder / "branch.yaml").write_text("leaf: ./leaf.yaml")
    root = tmp_path / "root.yaml"
    root.write_text("branch: ./below/branch.yaml\nleaves: {a: ./below/leaf.yaml, b: {value: 5}}")
    loaded = load_config(Root, root)
    # A path in a file is relative to that file.
    leaf = Leaf(value=1, other=str(folder / "text"))
    assert (loaded.branch.leaf, loaded.leaves) == (leaf, {"a": leaf, "b": Leaf(value=5)})
    swapped = [f"branch.leaf={folder}/leaf2.yaml", "branch.leaf.other=x", "leaves.a.value=7"]
    loaded = load_config(Root, root, swapped)
    assert loaded.branch.leaf == Leaf(value=2, other="x")
    assert loaded.leaves["a"] == Leaf(value=7, other=leaf.other)
    assert problems_of(load_config, Root, root, ["leaves.a.valu=7"]) == (
        "leaves.a.valu: unknown key; did you mean 'value'?",
    )
    assert problems_of(load_config, Root, root, ["leaves.b=nowhere.yaml"]) == (
        "nowhere.yaml: no such file",
    )


def test_set_reward_swaps_the_file_and_later_overrides_apply_to_it(write: Write) -> None:
    run = write(annotate_tree())
    other = write(reward_tree(name="other"), "other.yaml")
    config = load_annotate_config(run, ["reward.reduction=mean", f"reward={other}"])
    assert (config.reward.name, config.reward.reduction) == ("other", "mean")


def test_only_the_reward_may_be_a_file(write: Write) -> None:
    other = write({"min_margin": 1.0}, "pairs.yaml")
    (problem,) = problems_of(load_annotate_config, write(annotate_tree()), [f"pairs={other}"])
    assert problem.startswith("pairs: input should be a valid dictionary")
    assert problems_of(load_reward_config, write(reward_tree()), [f"reward={other}"]) == (
        f"reward: unknown key; known: {', '.join(RewardSpec.model_fields)}",
    )


def test_only_dot_slash_values_are_relative_to_their_own_file(write: Write, tmp_path: Path) -> None:
    pack = reward_tree(prompt_pack="../prompts/p.yaml", description="a/b")
    write(pack, "rewards/r.yaml")
    run = write(
        annotate_tree(
            reward="../rewards/r.yaml",
            warehouse="s3://bucket/w",
            input={"path": "./in.jsonl", "format": "json"},
        ),
        "annotate/run.yaml",
    )
    config = load_annotate_config(run)
    assert config.input.path == str(tmp_path / "annotate" / "in.jsonl")
    assert config.reward.prompt_pack == str(tmp_path / "prompts" / "p.yaml")
    assert config.reward.description == "a/b"
    assert config.warehouse == "s3://bucket/w"
    assert load_annotate_config(run, ["warehouse=../w"]).warehouse == "../w"


def test_set_wins_over_the_file_and_the_last_set_wins(write: Write) -> None:
    run = write(annotate_tree(pairs={"min_margin": 1.0, "seed": 7}))
    pairs = load_annotate_config(run, ["pairs.min_margin=2", "pairs.min_margin=3.5"]).pairs
    assert (pairs.min_margin, pairs.seed) == (3.5, 7)


def test_set_value_may_hold_an_equals_sign(write: Write) -> None:
    uri = "https://host/?a=b"
    config = load_annotate_config(write(annotate_tree()), [f"tracking.uri={uri}"])
    assert config.tracking.uri == uri


@pytest.mark.parametrize("item", ["pairs.min_margin", "=3", "pairs..seed=3", "pairs.=3"])
def test_set_without_key_or_value_says_what_it_expects(write: Write, item: str) -> None:
    assert problems_of(load_annotate_config, write(annotate_tree()), [item]) == (
        f"--set {item}: expected KEY=VALUE",
    )


def test_every_set_that_cannot_be_merged_is_named(write: Write) -> None:
    items = ["dataset=[1", "reward.models=[]"]
    found = problems_of(load_annotate_config, write(annotate_tree()), items)
    assert len(found) == 2
    assert all(problem.startswith(f"--set {i}: ") for problem, i in zip(found, items, strict=True))


def test_environment_fills_values(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDR_TEST_WAREHOUSE", "s3://bucket/w")
    monkeypatch.delenv("CDR_TEST_ABSENT", raising=False)
    run = write(
        annotate_tree(
            warehouse="${oc.env:CDR_TEST_WAREHOUSE}", dataset="${oc.env:CDR_TEST_ABSENT,fallback}"
        )
    )
    config = load_annotate_config(run)
    assert (config.warehouse, config.dataset) == ("s3://bucket/w", "fallback")


def test_every_unset_variable_is_named_and_a_revision_tells_where_to_look(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CDR_TEST_ABSENT", raising=False)
    monkeypatch.delenv("CDR_TEST_REVISION", raising=False)
    tree = annotate_tree(warehouse="${oc.env:CDR_TEST_ABSENT}")
    tree["reward"]["models"]["strong"]["revision"] = "${oc.env:CDR_TEST_REVISION}"
    with pytest.raises(ConfigError) as caught:
        load_annotate_config(write(tree))
    assert sorted(caught.value.problems) == [
        "reward.models.strong.revision: environment variable 'CDR_TEST_REVISION' is not set",
        "warehouse: environment variable 'CDR_TEST_ABSENT' is not set",
    ]
    assert caught.value.fix is not None
    assert "model_info(" in caught.value.fix


def test_reference_to_a_missing_key_names_the_key_that_holds_it(write: Write) -> None:
    (problem,) = problems_of(load_annotate_config, write(annotate_tree(dataset="${nothing}")))
    assert problem.startswith("dataset: ")
    assert "nothing" in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dataset: [1", "cannot be read as YAML"),
        ("- a\n- b", "expected a mapping of keys, got list"),
        ("3", "cannot be read as YAML"),
        ("dataset: a\ndataset: b", "duplicate key dataset"),
    ],
)
def test_what_is_not_a_mapping_of_keys_is_refused(write: Write, text: str, expected: str) -> None:
    (problem,) = problems_of(load_annotate_config, write(text))
    assert expected in problem


def test_empty_file_names_the_required_keys(write: Write) -> None:
    assert problems_of(load_annotate_config, write("")) == tuple(
        f"{key}: is required" for key in ("dataset", "warehouse", "input", "reward")
    )


def test_missing_files_are_named(write: Write, tmp_path: Path) -> None:
    absent = tmp_path / "absent.yaml"
    assert problems_of(load_annotate_config, absent) == (f"{absent}: no such file",)
    run = write(annotate_tree(reward="./absent.yaml"))
    assert problems_of(load_annotate_config, run) == (f"{absent}: no such file",)


# --- refusing ----------------------------------------------------------------------------------


def test_all_problems_come_at_once_with_file_and_remedy(write: Write) -> None:
    tree = annotate_tree(
        dataset="no spaces",
        pairs={"min_margin": -1, "min_margn": -2, "rejected": "worst"},
        run={"max_hours": "soon"},
    )
    tree["reward"]["models"]["weak"]["revision"] = "main"
    del tree["warehouse"]
    run = write(tree)
    with pytest.raises(ConfigError) as caught:
        load_annotate_config(run)
    keys = [problem.split(":")[0] for problem in caught.value.problems]
    assert sorted(keys) == [
        "dataset",
        "pairs.min_margin",
        "pairs.min_margn",
        "pairs.rejected",
        "reward.models.weak.revision",
        "run.max_hours",
        "warehouse",
    ]
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert text.startswith("7 problems in the config\n")
    assert f"where: {run}" in text
    assert "docs/reference/config.md" in text


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ("datset=x", "datset: unknown key; did you mean 'dataset'?"),
        ("pairs.min_margn=1", "pairs.min_margn: unknown key; did you mean 'min_margin'?"),
        (
            "pairs.length_window.ratoi=2",
            "pairs.length_window.ratoi: unknown key; did you mean 'ratio'?",
        ),
        (
            "reward.models.weak.dtyp=float32",
            "reward.models.weak.dtyp: unknown key; did you mean 'dtype'?",
        ),
        (
            "pairs.length_window.zzz=2",
            "pairs.length_window.zzz: unknown key; known: tokens, ratio",
        ),
    ],
)
def test_unknown_keys_are_errors_with_the_nearest_known_one(
    write: Write, item: str, problem: str
) -> None:
    assert problems_of(load_annotate_config, write(annotate_tree()), [item]) == (problem,)


def test_unknown_key_does_not_hide_what_else_is_wrong_with_its_model(write: Write) -> None:
    tree = reward_tree()
    tree["models"]["weak"] = {"path": "acme/sft", "revison": "main"}
    unknown, hidden = problems_of(load_reward_config, write(tree))
    assert unknown == "models.weak.revison: unknown key; did you mean 'revision'?"
    # What stood under the wrong key is checked as if it stood under the right one.
    assert hidden.startswith("models.weak.revision: must be a 40-digit commit hash")
    assert "got 'main'" in hidden


@pytest.mark.parametrize(
    ("item", "key"),
    [
        ("run.task_tokens=many", "run.task_tokens"),
        ("run.task_tokens=1.5", "run.task_tokens"),
        ("tracking.enabled=perhaps", "tracking.enabled"),
        ("pairs=3", "pairs"),
        ("reward.models=3", "reward.models"),
        ("pairs.min_margin=.nan", "pairs.min_margin"),
        ("pairs.dice_alpha=.inf", "pairs.dice_alpha"),
        ("pairs.validation_fraction=1", "pairs.validation_fraction"),
        ("reward.routing.threshold=1.1", "reward.routing.threshold"),
        ("input.format=csv", "input.format"),
        ("reward.name=Has Spaces", "reward.name"),
    ],
)
def test_wrong_types_and_ranges_are_named_by_key(write: Write, item: str, key: str) -> None:
    (problem,) = problems_of(load_annotate_config, write(annotate_tree()), [item])
    assert problem.startswith(f"{key}: ")


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:12], COMMIT.upper(), COMMIT + "0"])
def test_hub_id_needs_a_full_commit_hash(write: Write, revision: str | None) -> None:
    tree = reward_tree()
    tree["models"]["weak"]["revision"] = revision
    with pytest.raises(ConfigError) as caught:
        load_reward_config(write(tree))
    (problem,) = caught.value.problems
    assert problem.startswith(
        "models.weak.revision: must be a 40-digit commit hash for the hub id 'acme/sft'"
    )
    assert caught.value.fix is not None
    assert "model_info(" in caught.value.fix


def test_hash_of_digits_only_must_be_quoted(write: Write) -> None:
    text = yaml.safe_dump(reward_tree()).replace(COMMIT, "1" * 40)
    found = problems_of(load_reward_config, write(text))
    assert len(found) == 2
    assert all(problem.endswith("put it in quotes") for problem in found)
    assert load_reward_config(write(text.replace("1" * 40, f'"{"1" * 40}"')))


def test_adapter_is_pinned_like_a_model_and_both_problems_show(write: Write) -> None:
    tree = reward_tree()
    tree["models"]["weak"] = {"path": "acme/sft", "adapter": "acme/lora"}
    found = problems_of(load_reward_config, write(tree))
    assert [problem.split(":")[0] for problem in found] == [
        "models.weak.revision",
        "models.weak.adapter_revision",
    ]


def test_revision_without_a_hub_id_is_refused(write: Write, tmp_path: Path) -> None:
    tree = reward_tree()
    tree["models"]["strong"] = {
        "path": str(tmp_path),
        "revision": COMMIT,
        "adapter_revision": COMMIT,
    }
    assert problems_of(load_reward_config, write(tree)) == (
        f"models.strong.revision: only a hub id has one, '{tmp_path}' is a folder",
        "models.strong.adapter_revision: is given, but adapter is not",
    )


def test_folder_of_the_shape_owner_name_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("acme/model")
    (tmp_path / "acme" / "model").mkdir(parents=True)
    assert not is_hub_id("acme/model")
    assert not is_hub_id("/acme/model")
    assert not is_hub_id("a/b/c")


# --- rules across keys -------------------------------------------------------------------------


def test_forms_are_the_papers_equations() -> None:
    def terms(form: str) -> set[tuple[str, str, float]]:
        reward = RewardSpec.model_validate(reward_tree(form=form))
        return {(term.model, term.condition, term.weight) for term in reward.resolved_terms()}

    ratio = {("strong", "conditioned", 1.0), ("weak", "conditioned", -1.0)}
    assert terms("density_ratio") == ratio
    assert terms("prompt_delta") == {("strong", "conditioned", 1.0), ("strong", "plain", -1.0)}
    # (strong − strong's prior) − (weak − weak's prior)
    assert terms("pmi") == ratio | {
        ("strong", "unconditional", -1.0),
        ("weak", "unconditional", 1.0),
    }


STRONG = {"model": "strong", "weight": 1.0}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"form": "custom"}, "terms: are given exactly when form is 'custom'"),
        ({"terms": [STRONG]}, "terms: are given exactly when form is 'custom'"),
        (
            {"form": "custom", "terms": [{"model": "judge", "weight": 1.0}]},
            "models: form 'custom' needs a model 'judge', got ['strong', 'weak']",
        ),
        (
            {"form": "custom", "terms": [STRONG | {"weight": 0}]},
            "terms: weight of strong/conditioned must not be 0",
        ),
        (
            {"form": "custom", "terms": [STRONG, STRONG]},
            "terms: each (model, condition) may stand once; add up the weights",
        ),
        (
            {"routing": {"mode": "column"}},
            "prompt_pack: routing.mode 'column' needs one",
        ),
        (
            {"routing": {"mode": "adaptive"}, "prompt_pack": "p.yaml"},
            "models: routing.mode 'adaptive' needs a model 'router', got ['strong', 'weak']",
        ),
        (
            {"routing": {"mode": "fixed"}, "prompt_pack": "p.yaml"},
            "routing.domain: is set exactly when mode is 'fixed'",
        ),
    ],
)
def test_reward_keys_must_fit_together(write: Write, changes: dict[str, Any], problem: str) -> None:
    assert problem in problems_of(load_reward_config, write(reward_tree(**changes)))


def test_strongs_template_needs_a_strong_model(write: Write) -> None:
    judge = {"path": "acme/judge", "revision": COMMIT}
    terms = [{"model": "judge", "weight": 1.0}]
    tree = reward_tree(models={"judge": judge}, form="custom", terms=terms)
    assert problems_of(load_reward_config, write(tree)) == (
        "encoding.template: 'strong' needs a model 'strong'",
    )
    assert load_reward_config(write(tree | {"encoding": {"template": "own"}}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"path": None}, "input.path: give exactly one of path and table"),
        ({"table": "a.b"}, "input.path: give exactly one of path and table"),
        (
            {"prompts_path": "p"},
            "input.prompts_path: is given exactly when layout is 'joined'",
        ),
        (
            {"layout": "joined", "prompts_path": "p"},
            "input.columns.prompt_id: layout 'joined' needs it",
        ),
        ({"format": "json", "version": 3}, "input.version: only Delta tables have versions"),
    ],
)
def test_input_keys_must_fit_together(write: Write, changes: dict[str, Any], problem: str) -> None:
    run = write(annotate_tree(input={"path": "/data/completions"} | changes))
    assert problems_of(load_annotate_config, run) == (problem,)


def test_column_routing_needs_the_column(write: Write) -> None:
    reward = reward_tree(routing={"mode": "column"}, prompt_pack="p.yaml")
    run = write(annotate_tree(reward=reward))
    assert problems_of(load_annotate_config, run) == (
        "input.columns.domain: reward.routing.mode 'column' needs the domain's column",
    )
    assert load_annotate_config(run, ["input.columns.domain=topic"]).input.columns.domain == "topic"


@pytest.mark.parametrize(
    ("form", "tuned_from", "warns"),
    [
        ("density_ratio", "weak", False),
        ("density_ratio", "acme/sft", False),
        ("density_ratio", None, True),
        ("density_ratio", "acme/other", True),
        ("pmi", None, True),
        ("prompt_delta", None, False),
    ],
)
def test_strong_not_tuned_from_weak_warns(form: str, tuned_from: str | None, warns: bool) -> None:
    tree = reward_tree(form=form)
    tree["models"]["strong"]["tuned_from"] = tuned_from
    assert bool(RewardSpec.model_validate(tree).warnings()) is warns


# --- values ------------------------------------------------------------------------------------


def test_configs_are_frozen(write: Write) -> None:
    config = load_annotate_config(write(annotate_tree()))
    with pytest.raises(ValidationError, match="frozen"):
        config.dataset = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.reward.routing.mode = "none"  # type: ignore[misc]


def test_loaded_config_survives_json(write: Write) -> None:
    config = load_annotate_config(write(annotate_tree()))
    assert AnnotateConfig.model_validate_json(config.model_dump_json()) == config


def test_content_hash_ignores_the_order_of_keys_only() -> None:
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1})
    different: list[object] = [{"a": 1}, {"a": 2}, {"a": "1"}, {"a": None}, [1, 2], [2, 1], "é"]
    assert len({content_hash(value) for value in different}) == len(different)


def test_content_hash_is_the_same_on_every_machine() -> None:
    # printf '{"a":1}' | sha256sum
    assert content_hash({"a": 1}) == (
        "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    )


def test_pair_key_changes_with_every_key_of_pairs_and_with_nothing_else() -> None:
    changes: dict[str, Any] = {
        "rejected": "lowest",
        "length_window": {"ratio": 1.5},
        "fallback": "no_pair",
        "dice_alpha": 0.1,
        "drop_length_stopped": True,
        "min_margin": 0.5,
        "validation_fraction": 0.2,
        "seed": 1,
    }
    assert set(changes) == set(PairSpec.model_fields)
    keys = {PairSpec.model_validate({key: value}).key() for key, value in changes.items()}
    assert len(keys | {PairSpec().key()}) == len(changes) + 1
    assert PairSpec(min_margin=0.0).key() == PairSpec().key()


# --- the reference page ------------------------------------------------------------------------


def test_reference_page_is_what_the_models_say() -> None:
    page = CONF.parent / "docs" / "reference" / "config.md"
    assert page.read_text(encoding="utf-8") == render_config_reference(), (
        "stale page: python -m cdr.config_reference > docs/reference/config.md"
    )


def test_reference_page_explains_every_key() -> None:
    rows = [line for line in render_config_reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    assert [row for row in rows if row.endswith("|  |")] == []
    assert all(len(re.split(r"(?<!\\)\|", row)) == 6 for row in rows)
