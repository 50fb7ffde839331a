"""What all tiers of tests share.

Property tests try the same examples every time, so that a failure is a change's and not the day's;
`pytest --hypothesis-profile=default` draws others.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest file of the last tier first among its own.

    Workers take the files in order. Towards the end of it one would be busy with that file for
    minutes while the other has nothing left.
    """

    def place(item: pytest.Item) -> tuple[bool, bool]:
        is_last_tier = item.path.parent == TESTS / "real"
        return is_last_tier, is_last_tier and item.path.name != "test_vllm_engine.py"

    items.sort(key=place)
