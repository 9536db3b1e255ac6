"""Dials for a tunnel whose streams are reset before they carried anything."""

from __future__ import annotations

from ztunnel.dataplane.restraint import WAIT_SECONDS, Restraint


def test_nine_wasted_dials_cost_nothing_and_the_tenth_makes_the_next_wait() -> None:
    restraint = Restraint(0.0)
    for _ in range(9):
        restraint.wasted(0.0)
        assert restraint.wait(0.0) == 0.0
    restraint.wasted(0.0)
    assert restraint.wait(0.0) == WAIT_SECONDS


def test_a_tunnel_that_behaves_again_is_served_at_once_again() -> None:
    restraint = Restraint(0.0)
    for _ in range(10_000):
        restraint.wasted(0.0)
    assert restraint.wait(2.0) == WAIT_SECONDS
    assert restraint.wait(3.0) == 0.0


def test_a_few_wasted_dials_a_second_are_no_attack() -> None:
    restraint = Restraint(0.0)
    for turn in range(1000):
        now = turn / 4
        assert restraint.wait(now) == 0.0
        restraint.wasted(now)
