"""Processes that run a test's function on every rank of a gloo group.

    results = run(4, case, *args)  # [case(*args) on rank 0, on rank 1, ...]

``case`` is a function of a test module. The processes are started once per session and size, and kept. A function that
raises on one rank, or does not return in time, fails its test: the processes are killed then, and started again for the
next one. They are forked from a server that has imported torch, so this takes a tenth of a second.
"""

from __future__ import annotations

import functools
import multiprocessing
import pickle
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

TIMEOUT = 60.0  # seconds for one function; a collective that waits for a rank ends with an error before
PATIENCE = timedelta(seconds=30)
GRACE = 15.0  # seconds for the other ranks once one has failed
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = [  # by the server, for what each process would import in seconds
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
    "geoopt",
    "pytest",
]


class RankError(AssertionError):
    """What went wrong on each rank."""


def _report(failures: dict[int, str]) -> str:
    """What has failed, once if it is the same on several ranks."""
    texts: dict[str, list[int]] = {}
    for rank, text in failures.items():
        texts.setdefault(text, []).append(rank)
    return "\n".join(f"--- rank {', '.join(map(str, ranks))}:\n{text}" for text, ranks in texts.items())


class Pool:
    """Processes of one group.

    Attributes:
        store: where the ranks meet.
        processes, connections: one for each rank.
    """

    def __init__(self, world: int, patience: timedelta = PATIENCE) -> None:
        CONTEXT.set_forkserver_preload(PRELOADED)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes, self.connections = [], []
        for rank in range(world):
            ours, theirs = CONTEXT.Pipe()
            args = (rank, world, self.store.port, patience, theirs)
            process = CONTEXT.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def run(self, case: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """Return the result of every rank; raise a RankError if one has none, and kill all."""
        found = self.outcomes(case, *args, timeout=timeout)
        failures = {rank: found.get(rank, (False, "no answer in time")) for rank in range(len(self.processes))}
        failures = {rank: text for rank, (well, text) in failures.items() if not well}
        if failures:
            self.stop()
            raise RankError(_report(failures))
        return [found[rank][1] for rank in range(len(self.processes))]

    def outcomes(self, case: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> dict[int, tuple[bool, Any]]:
        """Return, for every rank that has ended in time, whether it has returned, and its result or its traceback."""
        request = pickle.dumps((case, args))
        waiting = {ours: rank for rank, ours in enumerate(self.connections)}
        for ours in self.connections:
            try:
                ours.send_bytes(request)
            except OSError:
                del waiting[ours]
        end, found = time.monotonic() + timeout, {}
        while waiting and (left := end - time.monotonic()) > 0:
            for ours in connection.wait(list(waiting), left):
                rank = waiting.pop(ours)
                try:
                    found[rank] = pickle.loads(ours.recv_bytes())
                except EOFError:
                    found[rank] = False, "the process has ended"
                if not found[rank][0]:
                    end = min(end, time.monotonic() + GRACE)
        return found

    def stop(self) -> None:
        """Kill the processes."""
        for process, ours in zip(self.processes, self.connections, strict=True):
            process.kill()
            process.join()
            process.close()
            ours.close()
        self.processes, self.connections = [], []


_POOLS: dict[int, Pool] = {}


def run(world: int, case: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Return ``case(*args)`` of each of so many ranks, which have a default process group."""
    if world not in _POOLS or not _POOLS[world].processes:
        _POOLS[world] = Pool(world)
    return _POOLS[world].run(case, *args, timeout=timeout)


def stop_all() -> None:
    """Kill all processes."""
    while _POOLS:
        _POOLS.popitem()[1].stop()


# On the ranks.


@functools.cache
def mesh(*shape: int) -> DeviceMesh:
    """Return a mesh of all ranks; the dimensions of one of two dimensions are called "replicate" and "shard"."""
    names = {1: ("shard",), 2: ("replicate", "shard")}[len(shape)]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _serve(rank: int, world: int, port: int, patience: timedelta, theirs: connection.Connection) -> None:
    """Run what comes until the other end is closed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
    while True:
        try:
            request = theirs.recv_bytes()
        except EOFError:
            return
        try:
            case, args = pickle.loads(request)
            torch.manual_seed(0)
            answer = pickle.dumps((True, case(*args)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        theirs.send_bytes(answer)
