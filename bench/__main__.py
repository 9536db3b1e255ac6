"""`make bench`: our proxies beside others, in turns, in one table."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import trio

from bench import publish
from bench.catalogue import WORKLOADS
from bench.figures import Limits, judge
from bench.measure import raise_descriptor_limit
from bench.peers import Plan
from bench.run import progress, run
from bench.tables import terminal
from hbone.errors import HboneError
from hbone.testing.hosts import namespace_obstacle

SPARE_DESCRIPTORS = 1500


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="make bench",
        description=__doc__,
        epilog="ZTUNNEL_RS=PATH adds a Rust ztunnel; BENCH_PEER=name=host:port,pid,pid adds a pair that already runs, "
        "reached from the network namespace of its first process (several: with blanks between).",
    )
    made.add_argument("--quick", action="store_true", help="two short rounds and small sizes, under a minute")
    made.add_argument("--rounds", type=int, default=8, metavar="N", help="turns of each peer (%(default)s)")
    made.add_argument("--seconds", type=float, default=1.5, metavar="S", help="length of one turn (%(default)s)")
    made.add_argument("--workload", action="append", choices=list(WORKLOADS), help="only this one; may be repeated")
    made.add_argument("--workers", type=int, default=1, metavar="N", help="workers of each proxy (%(default)s)")
    made.add_argument("--pure", action="store_true", help="ours as plain Python, even where `make compiled` was run")
    made.add_argument("--loopback", action="store_true", help="loopback hosts, even where namespaces can be made")
    made.add_argument(
        "--control-plane", action="store_true", help="miniistiod instead: 100,000 workloads, 1,000 subscribers"
    )
    made.add_argument(
        "--publish",
        action="store_true",
        help="put the figures into README.md and docs/bench.svg too; rounds that the hypervisor disturbed are made "
        "again, up to --rounds of them for each workload",
    )
    made.add_argument("--profile", action="store_true", help="where time goes, instead of how much it is")
    return made


def plan_of(options: argparse.Namespace, descriptors: int) -> Plan:
    """What the run is to be like.

    Args:
        options: of the command line.
        descriptors: how many a process may have; connections are fewer.
    """
    quick = options.quick
    return Plan(
        namespaces=not options.loopback and not namespace_obstacle(),
        rounds=2 if quick else options.rounds,
        seconds=0.1 if quick else options.seconds,
        idle_streams=min(500 if quick else 10_000, descriptors - SPARE_DESCRIPTORS),
        idle_tunnels=min(50 if quick else 1000, descriptors - SPARE_DESCRIPTORS),
        pushed=1_000 if quick else 100_000,
        spare=options.rounds if options.publish else 0,
        workers=options.workers,
        workloads=tuple(options.workload or ()),
        pure=options.pure,
    )


async def bench(options: argparse.Namespace) -> int:
    """Measure, print and write.

    Returns:
        The exit code.
    """
    descriptors = raise_descriptor_limit()
    if options.control_plane:
        return await bench_control_plane(options)
    plan = plan_of(options, descriptors)
    if not plan.namespaces:
        why = "as asked" if options.loopback else namespace_obstacle()
        print(f"hosts are loopback addresses and the client uses SOCKS5 ({why}); figures are not those of the README")
    with tempfile.TemporaryDirectory(prefix="hbone-bench-") as directory:
        if options.profile:
            from bench.profiler import profile

            return await profile(Path(directory), plan)
        outcome = await run(Path(directory), plan)
    whole = not (options.quick or options.workload or options.loopback)
    verdict = judge(outcome.samples, outcome.host, Limits() if whole else Limits(rounds=1))
    print(terminal(outcome.samples, outcome.facts, outcome.peers, verdict))
    for note in outcome.notes:
        print(note)
    print("noise: " + ", ".join(f"{name} {value:.1%}" for name, value in verdict.noise.items()))
    if options.workload:
        return 0
    written = publish.write(outcome, verdict, publish=options.publish)
    print("written: " + " ".join(str(path.relative_to(publish.ROOT)) for path in written))
    return 0


async def bench_control_plane(options: argparse.Namespace) -> int:
    """Measure miniistiod.

    Returns:
        The exit code.
    """
    from bench import control

    with tempfile.TemporaryDirectory(prefix="hbone-bench-") as directory:
        return await control.run(Path(directory), control.QUICK if options.quick else control.FULL)


def ended_by(problem: BaseException) -> int:
    """Say why a run ended before its time.

    Returns:
        The exit code.

    Raises:
        BaseException: the problem itself, when it is a fault of the bench.
    """
    group = problem if isinstance(problem, BaseExceptionGroup) else BaseExceptionGroup("", [problem])
    if group.subgroup(KeyboardInterrupt):
        return 130
    if group.subgroup(lambda one: not isinstance(one, HboneError | BaseExceptionGroup)):
        raise problem
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    print(f"make bench: {error}", file=sys.stderr)
    return 1


def main() -> int:
    """Run the command line.

    Returns:
        The exit code.
    """
    options = parser().parse_args()
    if options.publish and (
        options.quick or options.workload or options.loopback or options.pure or options.workers != 1
    ):
        print(
            "make bench: --publish needs a whole run: no --quick, --workload, --loopback, --pure or --workers",
            file=sys.stderr,
        )
        return 2
    if options.rounds < 1 or options.seconds <= 0 or options.workers < 1:
        print("make bench: --rounds, --seconds and --workers must be more than 0", file=sys.stderr)
        return 2
    try:
        return trio.run(bench, options)
    except (HboneError, KeyboardInterrupt, BaseExceptionGroup) as problem:
        progress("")
        return ended_by(problem)


if __name__ == "__main__":
    raise SystemExit(main())
