"""The process that times one thing: JSON request on stdin, JSON events on stdout, so that peaks of memory are its own.

A session on a CPU is timed without torch, which would count as memory of its own; one on a GPU with torch's tensors on
the card, as a pipeline calls it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from fp4trt.errors import CannotRun
from fp4trt.safetensors_file import tensors_in_file
from generation.bench.memory import CardWatch, resident_peak
from generation.bench.schedule import Call, Schedule, summary, timed
from trt_build.runtime.dlpack import DTYPES
from trt_build.session import Session, open_session

__all__ = ["main", "measure"]

_STORED: Final = {"BF16": "BFLOAT16", "F32": "FLOAT", "F16": "FLOAT16", "I64": "INT64", "I32": "INT32", "BOOL": "BOOL"}

Arrays = dict[str, Any]


def main() -> int:
    """Serve one request; return the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes: the parent decides
    events = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what libraries print must not mix with the events

    def emit(event: Mapping[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, args=(sys.stdin.fileno(),), daemon=True).start()
    try:
        closing = measure(request, lambda: emit({"event": "call"}))
    except Exception as error:  # a peer may fail in any way, and its reason is reported
        emit({"event": "error", "message": _one_line(error)})
        return 0
    emit({"event": "done", **closing})
    return 0


def _end_with_parent(stdin: int) -> None:
    while os.read(stdin, 1):  # not through sys.stdin, whose lock would abort the interpreter at its end
        pass
    os._exit(3)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    name = "" if getattr(error, "exit_code", None) else f"{type(error).__name__}: "
    return f"{name}{text}"[:400]


def measure(request: Mapping[str, Any], advance: Callable[[], None]) -> dict[str, Any]:
    """Open what a request names, and time it.

    Args:
        request: ``kind`` (``session`` or a peer), ``path`` of the artifact or the transformer's folder, ``weights``,
            ``device``, ``inputs`` (a safetensors file) and ``schedule``.
        advance: is called after each call of the model.
    """
    schedule = Schedule(**request["schedule"])
    begun = time.perf_counter()
    watch: Any = contextlib.nullcontext()
    if request["device"] != "cpu":
        from trt_build.runtime.card import open_card

        watch = CardWatch(open_card(int(request["device"].partition(":")[2])))
    with watch:
        inputs, call = _opened(request)
        loaded = time.perf_counter() - begun
        times = timed(schedule, inputs, call, advance)
    peak = resident_peak() if request["device"] == "cpu" else watch.peak
    return {**summary(times), "load_s": loaded, "memory_peak_bytes": peak}


def _opened(request: Mapping[str, Any]) -> tuple[Arrays, Call]:
    path, file = Path(request["path"]), Path(request["inputs"])
    if request["kind"] != "session":
        return _in_torch(request, path, file)
    session = open_session(path)
    if lacking := session.inputs.keys() - tensors_in_file(file).keys():
        raise CannotRun(f"it takes {', '.join(sorted(lacking))}, which the model of its config.json does not")
    return _on_card(session, file, request["device"]) if request["device"] != "cpu" else _on_cpu(session, file)


def _on_cpu(session: Session, file: Path) -> tuple[Arrays, Call]:
    first = next(iter(session.outputs))
    stored = tensors_in_file(file)
    inputs = {}
    for name, port in session.inputs.items():
        values = stored[name].bytes().view(DTYPES[_STORED[stored[name].dtype]]).reshape(stored[name].shape)
        inputs[name] = values.astype(DTYPES[port.dtype])
    return inputs, lambda given: np.asarray(session.run(given)[first])


def _on_card(session: Session, file: Path, device: str) -> tuple[Arrays, Call]:
    from generation.transformer import SessionTransformer

    transformer, ports = SessionTransformer(session), session.inputs
    inputs = {name: tensor.tensor().to(device) for name, tensor in tensors_in_file(file).items() if name in ports}
    return inputs, lambda given: transformer(**given)[0]


def _in_torch(request: Mapping[str, Any], folder: Path, file: Path) -> tuple[Arrays, Call]:
    import torch

    from generation.bench.peers import PEERS, make_model

    peer, device = PEERS[request["kind"]], request["device"]
    weights = None if request["weights"] is None else Path(request["weights"])
    model = make_model(peer, folder, weights, device)
    dtype = getattr(torch, peer.dtype)
    inputs = {name: tensor.tensor().to(device) for name, tensor in tensors_in_file(file).items()}
    inputs = {name: value.to(dtype) if value.dtype == torch.bfloat16 else value for name, value in inputs.items()}

    def call(given: Mapping[str, Any]) -> Any:
        with torch.inference_mode():
            found = model(**given, return_dict=False)[0]
        if device != "cpu":
            torch.cuda.synchronize(device)
        return found

    return inputs, call
