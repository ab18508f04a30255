"""One model in a process of its own, with a limit on memory and time: a crash is a result like others."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch

from tests.torchvision_stub import detectors
from tests.zoo.check import check

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h

# A server imports the libraries once, and forks for each model.
_server = multiprocessing.get_context("forkserver")
_PRELOAD = ["tests.zoo.worker", "torchvision.models", "timm", "transformers.models.auto.modeling_auto"]
_PRELOAD += ["transformers.modeling_utils"]


def start() -> None:
    """Start the server of processes."""
    _server.set_forkserver_preload(_PRELOAD)


def run(spec: str, rules: list[str], seconds: float, gigabytes: float) -> list[dict[str, Any]]:
    """Results of one model, one a rule, whatever happens to its process."""
    receive, send = _server.Pipe(duplex=False)
    process = _server.Process(target=_work, args=(send, spec, rules, gigabytes), daemon=True)
    process.start()
    send.close()
    rows: list[dict[str, Any]] = []
    why = ""
    for _ in rules:
        try:
            if not receive.poll(seconds):
                why = f"not done after {seconds:g} s"
                break
            rows.append(receive.recv())
        except EOFError:
            process.join()
            why = f"its process ended with code {process.exitcode}"
            break
    process.kill()
    process.join()
    seen = {row["rule"] for row in rows}
    return rows + [{"spec": spec, "rule": rule, "ok": False, "problems": [why]} for rule in rules if rule not in seen]


def _work(send: Connection, spec: str, rules: list[str], gigabytes: float) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # glibc would keep what large models let go, in pieces that fit nothing else
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 4 << 20)
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    # Libraries print what they like.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if not os.environ.get("ZOO_NOISE"):
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    detectors()
    for rule in rules:
        row: dict[str, Any]
        try:
            row = check(spec, rule)
        except Exception as error:
            traceback.print_exc()
            row = {"ok": False, "problems": [f"{type(error).__name__}: {error}"]}
        send.send({"spec": spec, "rule": rule, **row})
