"""The steps of a root rotation: what opens when, as a table."""

from __future__ import annotations

import attrs
import pytest

from miniistiod.rotation import Facts, Rotation, Step, plan

START = 1_000_000.0
HOUR = 3600.0
PUBLISHED = Rotation(old=1, new=2, generation=5, published=START, skew=60.0)
SIGNING = attrs.evolve(PUBLISHED, signing=START + HOUR)
SERVING = attrs.evolve(SIGNING, serving=START + 2 * HOUR)

# rotation, what is in use, next step, when it opens (after START), taken by itself
TABLE = [
    (PUBLISHED, Facts(), Step.SIGNING, 0.0, True),
    (PUBLISHED, Facts(unaware=START + 24 * HOUR), Step.SIGNING, 24 * HOUR + 60, True),
    (PUBLISHED, Facts(unaware=START - 30), Step.SIGNING, 30.0, True),
    (PUBLISHED, Facts(unaware=START - 90), Step.SIGNING, 0.0, True),
    (PUBLISHED, Facts(old=START + 90 * 24 * HOUR), Step.SIGNING, 0.0, True),
    (SIGNING, Facts(old=START + 24 * HOUR), Step.SERVING, HOUR, False),
    (SIGNING, Facts(tokens=START + 3 * HOUR), Step.SERVING, 3 * HOUR, False),
    (SERVING, Facts(), Step.DONE, 2 * HOUR, True),
    (SERVING, Facts(old=START + 25 * HOUR), Step.DONE, 25 * HOUR + 60, True),
    (SERVING, Facts(unaware=START + 99 * HOUR, tokens=START + 99 * HOUR), Step.DONE, 2 * HOUR, True),
]


@pytest.mark.parametrize(("rotation", "facts", "following", "opens", "by_itself"), TABLE)
def test_what_comes_next(rotation: Rotation, facts: Facts, following: Step, opens: float, by_itself: bool) -> None:
    found = plan(rotation, facts)
    assert (found.next, found.opens - START, found.by_itself) == (following, opens, by_itself)
    assert found.waits_for
    assert not found.due(found.opens - 0.001)
    assert found.due(found.opens) is by_itself


def test_steps_come_one_after_the_other() -> None:
    assert [item.step for item in (PUBLISHED, SIGNING, SERVING)] == [Step.PUBLISHED, Step.SIGNING, Step.SERVING]
    assert [step.next for step in Step] == [Step.SIGNING, Step.SERVING, Step.DONE, Step.DONE]
