"""What the how-to pages tell people to write is accepted as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from cdr.prompt_pack import load_prompt_pack
from cdr.reward_config import load_reward_config

ROOT = Path(__file__).resolve().parents[2]


def yaml_of(page: str) -> str:
    text = (ROOT / "docs" / "how-to" / page).read_text(encoding="utf-8")
    (found,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    return str(found)


def test_the_domain_of_the_page_fits_into_a_copy_of_the_pack(tmp_path: Path) -> None:
    pack = yaml.safe_load((ROOT / "conf" / "prompts" / "cdr-v1.yaml").read_text(encoding="utf-8"))
    pack["domains"] |= yaml.safe_load(yaml_of("own-domain.md"))["domains"]
    pack["router"]["domains"].append("billing")
    file = tmp_path / "support-v1.yaml"
    file.write_text(yaml.safe_dump(pack | {"name": "support-v1"}), encoding="utf-8")
    loaded = load_prompt_pack(str(file))
    assert "billing" in loaded.router_domains
    drawn = loaded.condition([{"role": "user", "content": "Q"}], "billing", "0" * 64, seed=0)
    assert "State what the policy says" in drawn.messages[-1]["content"]
    assert drawn.exemplar_id == "late-refund"


def test_the_pair_of_the_page_is_a_reward_without_warnings(tmp_path: Path) -> None:
    file = tmp_path / "my-pair.yaml"
    file.write_text(yaml_of("own-pair.md"), encoding="utf-8")
    reward = load_reward_config(str(file))
    assert [term.model for term in reward.resolved_terms()] == ["strong", "weak"]
    assert list(reward.warnings()) == []
