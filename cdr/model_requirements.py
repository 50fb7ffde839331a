"""What an environment needs to load a registered reward and to get its numbers again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from cdr.errors import SetupError
from cdr.plan import RewardPlan
from cdr.reward_files import PACKAGE


def list_requirements(plan: RewardPlan) -> list[str]:
    """List what a version needs beside this package's own code, which it brings along.

    Returns:
        What the package and its extras of the reward's engines require, each at the version that is
        installed here; as wide as the package has it where it is not, such as vLLM on a laptop.

    Raises:
        SetupError: the package runs without being installed, so that nobody knows.
    """
    try:
        needed = [Requirement(text) for text in metadata.requires(PACKAGE) or []]
    except metadata.PackageNotFoundError:
        raise SetupError(
            f"{PACKAGE} is not installed, so what a version of the reward needs is not known",
            fix="pip install --no-deps the wheel (make package), or -e . in a checkout",
        ) from None
    # An engine that needs more than the package does has an extra of its name.
    extras = {"", *(model.engine_spec.engine for model in plan.models.values())}
    used = [
        requirement
        for requirement in needed
        if requirement.marker is None
        or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
    ]
    # It makes the ids, and transformers takes many versions of it.
    used.append(Requirement("tokenizers"))
    return sorted(_pin(requirement) for requirement in used)


def _pin(requirement: Requirement) -> str:
    """Give a requirement at the version that is installed."""
    for name in _names(requirement.name):
        with contextlib.suppress(metadata.PackageNotFoundError):
            # `2.13.0+cpu` says where it came from, and no public index has it.
            return f"{name}=={metadata.version(name).partition('+')[0]}"
    return f"{requirement.name}{requirement.specifier}"


def _names(package: str) -> Iterator[str]:
    """Give a package's name, and then what else is installed in its place: vLLM for CPUs."""
    yield package
    yield from metadata.packages_distributions().get(package, ())  # reads every package's files
