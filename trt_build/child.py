"""The process that holds TensorRT: JSON request on stdin, JSON events on stdout, the engine in NAME.partial.

Nothing ends a build from inside its process, so the parent ends the process; and when the parent dies, the
end of stdin ends this one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trt_build.callbacks import EngineFile, LogRecord, make_logger, make_monitor, make_writer

__all__ = ["build_engine", "main"]

Emit = Callable[[dict[str, Any]], None]


def main() -> int:
    """Serve one build request; return the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes: the parent decides
    events = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what TensorRT prints must not mix with the events
    request = json.loads(sys.stdin.readline())
    finished = threading.Event()
    orphaned = (sys.stdin.fileno(), Path(request["partial"]), finished)
    threading.Thread(target=_end_with_parent, args=orphaned, daemon=True).start()

    def emit(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    closing = build_engine(request, _throttled(emit))
    finished.set()
    emit(closing)
    return 0


def build_engine(request: dict[str, Any], on_progress: Callable[[float, str], None]) -> dict[str, Any]:
    """Build an engine into request["partial"] and return the closing event.

    The request holds backend, onnx, partial, compute_capabilities, profiles [{input: [min, opt, max]}] and
    weight_streaming. The event is {"event": "done", "bytes", "sha256", "layers"} or {"event": "error",
    "kind": "graph" | "build" | "write", "message", "errno"}.
    """
    if request["backend"] == "tensorrt_rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when polygraphy is imported
    trt = importlib.import_module(request["backend"])
    record = LogRecord()
    builder = trt.Builder(make_logger(trt, record))
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse_from_file(request["onnx"]):
        found = [parser.get_error(index) for index in range(parser.num_errors)]
        return _error("graph", "; ".join(_parser_message(error) for error in found[:1]) or _last(record))
    config = _make_config(request, builder, network, make_monitor(trt, on_progress))
    try:
        file = EngineFile(Path(request["partial"]))
    except OSError as error:
        return _write_error(error)
    built = _stream(trt, builder, network, config, file)
    return _close(file, built, record)


def _stream(trt: Any, builder: Any, network: Any, config: Any, file: EngineFile) -> bool:
    if hasattr(builder, "build_serialized_network_to_stream"):
        return bool(builder.build_serialized_network_to_stream(network, config, make_writer(trt, file)))
    plan = builder.build_serialized_network(network, config)  # an older TensorRT
    return plan is not None and file.write(bytes(plan)) > 0


def _close(file: EngineFile, built: bool, record: LogRecord) -> dict[str, Any]:
    try:
        with file.file as opened:
            if file.error is None:
                os.fsync(opened.fileno())
        if file.error is not None:
            raise file.error
    except OSError as error:
        return _write_error(error)
    if not built or file.offered == 0:
        return _error("build", _last(record))
    size = file.path.stat().st_size
    if size != file.offered:
        return _error("write", f"{size} of {file.offered} bytes were written")
    return {"event": "done", "bytes": size, "sha256": file.digest.hexdigest(), "layers": record.layers}


def _strongly_typed(trt: Any) -> int:
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _make_config(request: dict[str, Any], builder: Any, network: Any, monitor: Any) -> Any:
    from polygraphy.backend.trt import Profile
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    profiles = [Profile() for _ in request["profiles"]]
    for profile, shapes in zip(profiles, request["profiles"], strict=True):
        for name, (low, best, high) in shapes.items():
            profile.add(name, min=low, opt=best, max=high)
    trt = importlib.import_module(request["backend"])
    options = {
        "profiles": profiles,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,  # without it the log has no layer information
        "progress_monitor": monitor,
        "weight_streaming": request["weight_streaming"],
    }
    if request["backend"] == "tensorrt_rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        pairs = [divmod(int(name.removeprefix("SM")), 10) for name in request["compute_capabilities"]]
        return CreateConfigRTX(compute_capabilities=pairs, **options)(builder, network)
    from polygraphy.backend.trt import CreateConfig

    return CreateConfig(**options)(builder, network)


def _throttled(emit: Emit) -> Callable[[float, str], None]:
    last_time, last_phase = 0.0, ""

    def on_progress(fraction: float, phase: str) -> None:
        nonlocal last_time, last_phase
        now = time.monotonic()
        if phase != last_phase or now - last_time > 0.1:
            last_time, last_phase = now, phase
            emit({"event": "progress", "fraction": fraction, "phase": phase})

    return on_progress


def _end_with_parent(stdin: int, partial: Path, finished: threading.Event) -> None:
    while os.read(stdin, 1):  # not through sys.stdin, whose lock would abort the interpreter at its end
        pass
    if finished.is_set():
        return
    with contextlib.suppress(OSError):
        partial.unlink()
    os._exit(3)


def _parser_message(error: Any) -> str:
    where = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_name() else ""
    what = str(error.code()).rpartition(".")[2]  # the description alone may be the word "false"
    return _one_line(f"{where}{what}: {error.desc()}")


def _last(record: LogRecord) -> str:
    """The first error is the cause; those that follow are its echoes."""
    return _one_line(record.errors[0]) if record.errors else "no reason given"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:600]


def _write_error(error: OSError) -> dict[str, Any]:
    return _error("write", error.strerror or str(error), error.errno)


def _error(kind: str, message: str, number: int | None = None) -> dict[str, Any]:
    return {"event": "error", "kind": kind, "message": message, "errno": number}
