from __future__ import annotations

import gzip
import os
import signal
import threading
import time
from typing import Any
from xml.etree import ElementTree

import pytest
import trio
from google.protobuf import descriptor_pb2, message_factory
from tests.support.daemon import running, settings

from hbone.errors import ConfigurationError
from ztunnel import heap, profiler
from ztunnel.flamegraph import WIDTH, flame_graph
from ztunnel.pprof import pprof
from ztunnel.profiler import Busy, collapsed, joined, sample

SVG = "{http://www.w3.org/2000/svg}"


def spend(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


async def test_cpu_time_is_put_down_to_the_function_that_used_it() -> None:
    async def spender() -> None:
        spend(0.3)

    before = time.process_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(spender)
        stacks = await sample(0.4, 100)
    used = time.process_time() - before
    found = sum(spent for stack, spent in stacks.items() if any(name.endswith(".spend") for name in stack))
    assert 0.2e6 < found <= used * 1e6
    assert sum(stacks.values()) <= used * 1e6 * 1.01
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


async def test_what_a_thread_spends_is_its_own() -> None:
    thread = threading.Thread(target=spend, args=(0.3,), name="digger")
    async with trio.open_nursery() as nursery:
        thread.start()
        stacks = await sample(0.5, 100)
        nursery.start_soon(lambda: trio.to_thread.run_sync(thread.join))
    named = {stack: spent for stack, spent in stacks.items() if stack[0] == "thread digger"}
    assert any(stack[-1].endswith(".spend") for stack in named)


async def test_one_profile_at_a_time_and_none_elsewhere_than_on_the_main_thread() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sample, 0.2, 10)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Busy, match="already"):
            await sample(0.1, 10)
    await sample(0.01, 10)
    with pytest.raises(ConfigurationError, match="main thread"):
        await trio.to_thread.run_sync(trio.run, sample, 0.1, 10)


async def test_a_profile_that_is_given_up_leaves_no_timer() -> None:
    with trio.move_on_after(0.05):
        await sample(60, 100)
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    os.kill(os.getpid(), signal.SIGPROF)  # a last one may come late, and ends nothing


STACKS = {("main", 'f<"x">'): 3_000_000, ("main", "g;h"): 1_000_000, ("other",): 2_000_000, ("thin",): 10}


def test_collapsed_is_a_line_a_stack() -> None:
    assert collapsed(STACKS).splitlines() == ['main;f<"x"> 3000000', "main;g:h 1000000", "other 2000000", "thin 10"]


def test_pprof_is_read_back_by_its_definition() -> None:
    file = descriptor_pb2.FileDescriptorProto(name="profile.proto", syntax="proto3")
    kinds = {"int": 3, "text": 9, "message": 11}

    def message(name: str, *fields: tuple[str, int, str, str]) -> None:
        found = file.message_type.add(name=name)
        for field, number, kind, label in fields:
            kept = found.field.add(name=field, number=number, type=kinds.get(kind, 11), label=3 if label else 1)
            if kind not in kinds:
                kept.type_name = kind

    message("ValueType", ("type", 1, "int", ""), ("unit", 2, "int", ""))
    message("Sample", ("location_id", 1, "int", "many"), ("value", 2, "int", "many"))
    message("Line", ("function_id", 1, "int", ""))
    message("Location", ("id", 1, "int", ""), ("line", 4, "Line", "many"))
    message("Function", ("id", 1, "int", ""), ("name", 2, "int", ""), ("system_name", 3, "int", ""))
    message(
        "Profile",
        ("sample_type", 1, "ValueType", "many"),
        ("sample", 2, "Sample", "many"),
        ("location", 4, "Location", "many"),
        ("function", 5, "Function", "many"),
        ("string_table", 6, "text", "many"),
        ("time_nanos", 9, "int", ""),
        ("duration_nanos", 10, "int", ""),
        ("period_type", 11, "ValueType", ""),
        ("period", 12, "int", ""),
    )
    found: Any = message_factory.GetMessages([file])["Profile"]()
    found.ParseFromString(gzip.decompress(pprof(STACKS, 2.0, 100, 1_700_000_000.0)))
    texts = found.string_table
    assert texts[0] == ""
    assert (texts[found.sample_type[0].type], texts[found.sample_type[0].unit]) == ("cpu", "nanoseconds")
    names = {function.id: texts[function.name] for function in found.function}
    places = {place.id: names[place.line[0].function_id] for place in found.location}
    stacks = {
        tuple(places[number] for number in reversed(sample.location_id)): sample.value[0] for sample in found.sample
    }
    assert stacks == {stack: spent * 1000 for stack, spent in STACKS.items()}
    assert (found.time_nanos, found.duration_nanos, found.period) == (1_699_999_998 * 10**9, 2 * 10**9, 10**7)


def test_stacks_of_several_processes_stand_below_their_names() -> None:
    assert joined({"daemon": STACKS}) is STACKS
    assert joined({"daemon": {("a",): 1}, "worker 0": {("a",): 2}}) == {("daemon", "a"): 1, ("worker 0", "a"): 2}


def test_the_graph_is_svg_with_a_title_for_each_function_and_widths_by_time() -> None:
    drawn = ElementTree.fromstring(flame_graph(STACKS, "a <title>", "a & note"))
    groups = {group.get("data-name"): group for group in drawn.iter(f"{SVG}g")}
    assert set(groups) == {"all", "main", 'f<"x">', "g;h", "other"}  # one that is too thin is left out
    titles = {name: group.findtext(f"{SVG}title") for name, group in groups.items()}
    assert titles["main"] == "main\n4.00 s, 66.7%"
    widths = {name: float(str(group.find(f"{SVG}rect").get("width"))) for name, group in groups.items()}  # type: ignore[union-attr]
    assert widths["all"] == WIDTH - 20
    assert widths['f<"x">'] == pytest.approx(widths["main"] * 3 / 4, abs=0.1)
    left = {name: float(str(group.find(f"{SVG}rect").get("x"))) for name, group in groups.items()}  # type: ignore[union-attr]
    assert left["other"] == pytest.approx(left["main"] + widths["main"], abs=0.2)
    assert not {"href", "src"} & {name for element in drawn.iter() for name in element.keys()}  # noqa: SIM118


def test_the_graph_of_an_idle_process_says_so() -> None:
    assert b"No CPU time was used" in flame_graph({}, "t", "n")


async def test_the_page_is_a_graph_or_text_and_refuses_what_is_out_of_bounds() -> None:
    async with running() as ztunnel:
        code, body = await ztunnel.http("admin", "/debug/pprof/profile?seconds=1")
        assert code == 200
        assert "CPU of ztunnel" in body
        ElementTree.fromstring(body)
        async with trio.open_nursery() as nursery:

            async def text() -> None:
                code, body = await ztunnel.http("admin", "/debug/pprof/profile?seconds=2&format=collapsed")
                assert code == 200
                assert all(line.rpartition(" ")[2].isdigit() for line in body.splitlines())

            nursery.start_soon(text)
            while not profiler._running:
                await trio.sleep(0.01)
            code, body = await ztunnel.http("admin", "/debug/pprof/profile?seconds=1")
            assert (code, "already" in body) == (503, True)
        for query, what in (
            ("seconds=0", "invalid seconds value; expected 1-300\n"),
            ("seconds=301", "invalid seconds value; expected 1-300\n"),
            ("seconds=x", "invalid seconds value; expected 1-300\n"),
            ("frequency=1001", "invalid frequency value; expected 1-1000\n"),
            ("format=pdf", "invalid format value; expected svg, collapsed or pprof\n"),
        ):
            assert await ztunnel.http("admin", f"/debug/pprof/profile?{query}") == (400, what)


async def test_heap_shows_types_and_once_traced_lines() -> None:
    async with running() as ztunnel:
        code, body = await ztunnel.http("admin", "/debug/pprof/heap")
        assert code == 200
        assert "builtins.dict" in body
        assert "activate=true" in body
        try:
            path = "/debug/pprof/heap/profiling"
            assert await ztunnel.http("admin", f"{path}?activate=true") == (200, "heap profiling active: false\n")
            assert (await ztunnel.http("admin", f"{path}?activate=1", "POST"))[0] == 400
            assert not heap.is_tracing()
            answer = await ztunnel.http("admin", f"{path}?activate=true", "POST")
            assert answer == (200, "heap profiling active: true\n")
            assert ".py:" in (await ztunnel.http("admin", "/debug/pprof/heap"))[1]
        finally:
            heap.trace(False)


async def test_workers_are_in_the_profile_and_in_the_heap() -> None:
    async with running(settings(ZTUNNEL_WORKER_THREADS="2")) as ztunnel:
        await ztunnel.sync()
        await ztunnel.until_ready()
        body = (await ztunnel.http("admin", "/debug/pprof/heap"))[1]
        assert all(f"{name}: " in body for name in ("daemon", "worker 0", "worker 1"))
        stacks = await ztunnel.daemon.view.profile(1, 100)
        assert list(stacks) == ["daemon", "worker 0", "worker 1"]
        assert (await ztunnel.status())["workers"][0]["state"] == "serving"
