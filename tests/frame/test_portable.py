"""Nothing in the packages runs on POSIX only, reads the clock into a result, or names one machine's paths."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

import fp4trt

ROOT = Path(fp4trt.__file__).parents[1]
PACKAGES = ("calibration", "exporter", "fp4trt", "generation", "onnx_functions", "trt_build")
SOURCES = [path for room in PACKAGES for path in sorted((ROOT / room).rglob("*.py"))]

POSIX_MODULES = set("crypt curses fcntl grp nis ossaudiodev posix pty pwd resource spwd syslog termios tty".split())
POSIX_OS = set(
    "chown chroot ctermid fchdir fchmod fchown fork forkpty getegid geteuid getgid getgrouplist getloadavg"
    " getpgid getpgrp getpriority getsid getuid killpg lchown lockf major mkfifo mknod nice openpty"
    " posix_fadvise posix_fallocate posix_spawn pread preadv pwrite pwritev register_at_fork"
    " sched_getaffinity sendfile setgid setpgid setsid setuid statvfs symlink sysconf tcgetpgrp ttyname uname"
    " wait wait3 wait4 waitid".split()
)
POSIX_SIGNALS = set("SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGALRM SIGCHLD SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGCONT".split())
POSIX_METHODS = {"symlink_to", "hardlink_to", "lchmod"}
FORBIDDEN = {
    "os": POSIX_OS,
    "signal": POSIX_SIGNALS | {"alarm", "setitimer", "pthread_kill", "sigwait", "pause"},
    "asyncio": {"add_signal_handler"},
}
CLOCK = {
    "time": {"time", "time_ns", "ctime", "strftime", "asctime", "localtime", "gmtime"},
    "datetime": {"now", "today", "utcnow"},
    "date": {"today"},
}


def forbidden_names(tree: ast.AST, table: dict[str, set[str]]) -> Iterator[str]:
    """Yield `module.name` for each use or import of a name that `table` forbids."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value
            module = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
            if node.attr in table.get(module, ()):
                yield f"{module}.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module in table:
            yield from (f"{node.module}.{a.name}" for a in node.names if a.name in table[node.module])


def posix_only(tree: ast.AST) -> Iterator[str]:
    """Yield what a Windows machine could not run."""
    yield from forbidden_names(tree, FORBIDDEN)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in POSIX_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in POSIX_MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Attribute) and node.attr in POSIX_METHODS:
            yield node.attr
        elif isinstance(node, ast.Call):
            yield from forbidden_arguments(node)


def forbidden_arguments(call: ast.Call) -> Iterator[str]:
    """Yield the arguments that ask for a fork, or for a function that runs between fork and exec."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    first = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None
    if name in {"get_context", "set_start_method"} and first in {"fork", "forkserver"}:
        yield f"{name}({first!r})"
    yield from (k.arg for k in call.keywords if k.arg == "preexec_fn")


def found_in_sources(check: Callable[[str], Iterable[str]]) -> dict[str, list[str]]:
    """Return what a check finds, by file."""
    found = {path.relative_to(ROOT).as_posix(): list(check(path.read_text(encoding="utf-8"))) for path in SOURCES}
    return {name: names for name, names in found.items() if names}


def test_no_file_uses_anything_posix_only():
    assert found_in_sources(lambda text: posix_only(ast.parse(text))) == {}


def test_no_file_reads_a_calendar_clock():
    assert found_in_sources(lambda text: forbidden_names(ast.parse(text), CLOCK)) == {}


def test_no_file_holds_an_absolute_path():
    machines = re.compile(r"[\"'\s](/(?:home|root|tmp|work|opt|Users|mnt)/\S*|[A-Z]:\\\\\w+)")
    assert found_in_sources(machines.findall) == {}


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos.fork()",
        "from os import symlink",
        "import fcntl",
        "from resource import getrusage",
        "import signal\nsignal.SIGKILL",
        "import multiprocessing\nmultiprocessing.get_context('fork')",
        "import multiprocessing as m\nm.set_start_method('forkserver')",
        "import subprocess\nsubprocess.Popen([], preexec_fn=f)",
        "path.symlink_to(other)",
    ],
)
def test_the_check_sees(code):
    assert list(posix_only(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos.replace(a, b)",
        "import multiprocessing\nmultiprocessing.get_context('spawn')",
        "a.wait()",
    ],
)
def test_the_check_lets_pass(code):
    assert list(posix_only(ast.parse(code))) == []
