from __future__ import annotations

from bench.breakdown import Breakdown, python_functions, report, samples, system_calls

RECORDED = """\
\tffffffff8141fa59 tcp_sendmsg_locked+0x12 ([kernel.kallsyms])
\tffffffff8142b95e __x64_sys_sendto ([kernel.kallsyms])
\tffffffff821ea011 do_syscall_64 ([kernel.kallsyms])
\t           cf503 send (/usr/lib/libc.so.6)

\tffffffffc0a2b95e nft_do_chain ([nf_tables])
\tffffffff8142b95e __x64_sys_sendto ([kernel.kallsyms])

\tffffffff8142b95e asm_exc_page_fault ([kernel.kallsyms])

\t          1aee35 _PyEval_EvalFrameDefault (/opt/lib/libpython3.so.1.0)
\t          1aee36 main (/opt/lib/libpython3.so.1.0)

\t               0 [unknown] (/opt/bin/envoy)
"""

PERF_TRACE = """\

 Summary of events:

 python3 (18845), 2448 events, 100.0%

   syscall            calls  errors  total       min       avg       max       stddev
                                     (msec)    (msec)    (msec)    (msec)        (%)
   --------------- --------  ------ -------- --------- --------- ---------     ------
   epoll_wait           408      0   498.890     0.000     1.223     7.813      3.13%
   sendto               400      2    12.112     0.016     0.030     0.187      2.23%

 python3 (18846), 48 events, 1.0%

   sendto                 8      0    11.450     0.015     0.028     0.392      4.03%
"""

STRACE = """\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 63.39    0.015679          23       408           epoll_wait
 20.16    0.004987           7       408         2 sendto
------ ----------- ----------- --------- --------- ----------------
100.00    0.024736          12       816         2 total
"""


def test_a_sample_in_the_kernel_belongs_to_its_system_call() -> None:
    assert samples(RECORDED).system == {"sendto": 2, "page faults": 1}


def test_a_sample_in_a_program_belongs_to_the_function_that_ran() -> None:
    found = samples(RECORDED)
    assert found.user == {"_PyEval_EvalFrameDefault [libpython3.so.1.0]": 1, "? [envoy]": 1}
    assert found.modules == {"libpython3.so.1.0": 1, "envoy": 1}


def test_both_tools_count_the_same_calls() -> None:
    assert system_calls(PERF_TRACE) == system_calls(STRACE) == {"epoll_wait": 408, "sendto": 408}


def test_python_functions_are_those_that_ran() -> None:
    text = (
        "<module> (a.py:1);run (/x/ztunnel/cli.py:5);turn (/x/dataplane/reactor.py:7) 30\nrun (/x/ztunnel/cli.py:6) 2\n"
    )
    assert python_functions(text) == {"turn (dataplane/reactor.py)": 30, "run (ztunnel/cli.py)": 2}


def test_report_counts_calls_per_unit() -> None:
    found = samples(RECORDED)
    found.calls, found.units = system_calls(STRACE), 204.0
    text = report("rr_1 through ours", found, "round trip", 1.0)
    assert "user 40%, system 60% of 5 samples" in text
    assert "calls per round trip  4.0: epoll_wait 2.0, sendto 2.0" in text


def test_nothing_found_is_reported_too() -> None:
    assert "calls per GB  0.0" in report("x", Breakdown(), "GB", 1e9)
