"""What a report page says at its top: is anything visibly wrong, and what to do about it.

The limits that checks go by are rules of thumb of this project, not results of the paper: they
decide what a reader is sent to look at, and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """How bad a finding is."""

    FINE = 0
    LOOK = 1
    STOP = 2


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Args:
        level: how bad it is.
        what: what was found, with the number.
        next: what to do; None where there is nothing to do.
    """

    level: Level
    what: str
    next: str | None = None


@dataclass(frozen=True)
class Limits:
    """Values from which a share is to be looked at, and from which it stops a reader."""

    look: float
    stop: float

    def level(self, value: float) -> Level:
        """Place a value."""
        return Level((value >= self.look) + (value >= self.stop))


@dataclass(frozen=True)
class Verdict:
    """All findings, the worst first.

    Args:
        findings: as `of` sorts them.
        stop: what a reader is told where one of them is a stop.
    """

    findings: tuple[Finding, ...]
    stop: str

    @classmethod
    def of(cls, findings: Iterable[Finding], *, stop: str) -> Verdict:
        """Sort findings; those of one level stay in their order."""
        return cls(tuple(sorted(findings, key=lambda finding: -finding.level)), stop)

    @property
    def level(self) -> Level:
        """The worst level."""
        return max((finding.level for finding in self.findings), default=Level.FINE)

    @property
    def headline(self) -> str:
        """The verdict in a sentence."""
        looks = sum(finding.level == Level.LOOK for finding in self.findings)
        stops = sum(finding.level == Level.STOP for finding in self.findings)
        if stops:
            stand = "thing stands" if stops == 1 else "things stand"
            return f"{self.stop}: {stops} {stand} against it"
        if looks:
            return f"Look at {looks} {'thing' if looks == 1 else 'things'} first"
        return "Nothing looks wrong"


def check_engines(versions: Sequence[str]) -> Iterator[Finding]:
    """Warn of log-probs that come from several versions of an engine.

    Args:
        versions: such as `vllm 0.32.0 / torch 2.13.0`. Several engines are no several versions.
    """
    engines = Counter(version.partition(" ")[0] for version in versions)
    mixed = [version for version in versions if engines[version.partition(" ")[0]] > 1]
    if mixed:
        yield Finding(
            Level.LOOK,
            "The log-probs were computed by several versions of the engine: "
            f"{', '.join(mixed)}. Small margins may come from that.",
            "See logprobs.engine_version; score into a new warehouse to compare.",
        )
