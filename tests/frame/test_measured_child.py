"""What the benchmarks say that a process cost is what it cost."""

from __future__ import annotations

import sys

import pytest

from benchmarks.measure.child import ChildFailed, run

MEGABYTES = 200
TAKE_MEMORY = f"held = bytearray(b'x') * ({MEGABYTES} << 20)"
REST = "import time; time.sleep(0.3)"


def _python(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join(lines)]


def test_the_peak_of_memory_counts_though_it_is_given_back() -> None:
    little = run(_python(REST))
    much = run(_python(TAKE_MEMORY, REST, "del held", REST))
    assert MEGABYTES - 10 < (much.peak_rss - little.peak_rss) / 2**20 < MEGABYTES + 20


def test_a_process_that_the_command_starts_counts_with_it() -> None:
    alone = run(_python(TAKE_MEMORY, REST))
    inner = f"{TAKE_MEMORY}; {REST}"
    both = run(_python(TAKE_MEMORY, "import subprocess, sys", f"subprocess.run([sys.executable, '-c', {inner!r}])"))
    assert both.peak_rss - alone.peak_rss > (MEGABYTES - 10) << 20


def test_processor_time_is_not_that_of_the_clock() -> None:
    asleep = run(_python("import time; time.sleep(1)"))
    assert asleep.seconds > 1
    assert asleep.core_seconds < 0.7
    busy = run(_python("import time", "while time.process_time() < 1: pass"))
    assert 0.8 < busy.core_seconds < 1.5


def test_the_last_line_is_the_answer_and_may_be_missing() -> None:
    assert run(_python("print('said before')", "print('{\"nodes\": 3}')")).answer == {"nodes": 3}
    assert run(_python("print('done')")).answer == {}
    assert run(_python("")).answer == {}


def test_a_command_that_fails_is_no_measurement() -> None:
    with pytest.raises(ChildFailed, match=r"ended with 3:\nno such luck"):
        run(_python("import sys", "print('no such luck', file=sys.stderr)", "sys.exit(3)"))
