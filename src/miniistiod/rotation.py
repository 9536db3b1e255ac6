"""The steps by which one root takes the place of another. Pure: what may happen when, by facts and a clock.

```text
published   both roots are in the bundle; the old one signs
signing     the new one signs; port 15012 still shows a certificate of the old one
serving     port 15012 shows a certificate of the new one
(done)      the old root is gone from the bundle, and its key from the state
```

A holder learns a new root only by renewing, so the new one signs when every certificate from before the publication
has ended. Port 15012 moves when the operator says that the root files of stock ztunnels have both roots. The old root
goes when all that it signed has ended.
"""

from __future__ import annotations

import enum

import attrs

__all__ = ["SKEW", "Facts", "Plan", "Rotation", "Step", "plan"]

SKEW = 120.0
"""Seconds that a step waits longer, for hosts whose clocks are behind ours."""


class Step(enum.Enum):
    """Where a rotation is, and what comes next."""

    PUBLISHED = "published"
    SIGNING = "signing"
    SERVING = "serving"
    DONE = "done"

    @property
    def next(self) -> Step:
        """The step after this one."""
        return {
            Step.PUBLISHED: Step.SIGNING,
            Step.SIGNING: Step.SERVING,
            Step.SERVING: Step.DONE,
            Step.DONE: Step.DONE,
        }[self]


@attrs.frozen(kw_only=True)
class Rotation:
    """A rotation under way, as the state keeps it. Times are seconds since 1970."""

    old: int
    """Id of the root that goes."""
    new: int
    """Id of the root that comes."""
    generation: int
    """Certificates recorded under a lower one were handed out with the old root only."""
    published: float
    signing: float | None = None
    serving: float | None = None
    skew: float = SKEW

    @property
    def step(self) -> Step:
        """Where it is."""
        if self.serving is not None:
            return Step.SERVING
        return Step.PUBLISHED if self.signing is None else Step.SIGNING


@attrs.frozen(kw_only=True)
class Facts:
    """What is still in use, by when it ends; seconds since 1970, 0 for nothing."""

    unaware: float = 0.0
    """Certificates of holders that know the old root only."""
    old: float = 0.0
    """Certificates that the old root signed."""
    tokens: float = 0.0
    """One-time tokens that name the old root, unused."""


@attrs.frozen(kw_only=True)
class Plan:
    """The next step of a rotation."""

    next: Step
    opens: float
    """From when on it breaks nothing."""
    by_itself: bool
    """It is taken when it opens; else somebody has to say so."""
    waits_for: str
    """What ends then; for people."""

    def due(self, now: float) -> bool:
        """Whether it is to be taken now without anybody's word."""
        return self.by_itself and now >= self.opens


def plan(rotation: Rotation, facts: Facts) -> Plan:
    """What comes next, and when."""
    if rotation.step is Step.PUBLISHED:
        return Plan(
            next=Step.SIGNING,
            opens=_after(rotation.published, facts.unaware, rotation.skew),
            by_itself=True,
            waits_for="the end of the certificates whose holders know the old root only",
        )
    if rotation.step is Step.SIGNING:
        assert rotation.signing is not None
        return Plan(
            next=Step.SERVING,
            opens=max(rotation.signing, facts.tokens),
            by_itself=False,
            waits_for="your word that the root files of stock ztunnels are updated, and the end of the one-time tokens"
            " that name the old root",
        )
    assert rotation.serving is not None
    return Plan(
        next=Step.DONE,
        opens=_after(rotation.serving, facts.old, rotation.skew),
        by_itself=True,
        waits_for="the end of the certificates that the old root signed",
    )


def _after(begin: float, end: float, skew: float) -> float:
    """When what ended at `end` has ended by every clock; at once when there is nothing."""
    return max(begin, end + skew) if end else begin
