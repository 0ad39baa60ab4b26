"""Run a function on several ranks: `run_ranks(2, work, argument)` gives what each rank returned.

The processes come from a fork server that has imported torch once, so a two-rank test costs 0.1 s and not
the 3 s of a fresh interpreter. The ranks meet through a file, never through a port. The function must stand
at the top level of its module; arguments and results travel by pickle.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TIMEOUT = 30.0  # seconds; for one collective, and (twice that) for a whole run

_PRELOADED = [
    "pytest",
    "torch._dynamo",  # what fully_shard imports at its first call
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
    "flux_trainer.flux",  # with all it needs
    "flux_trainer.runtime.signals",
    "transformers.models.clip.modeling_clip",  # what a run imports when it builds the text encoders
    "transformers.models.t5.modeling_t5",
]


def start(function: Callable[..., Any], *args: Any) -> BaseProcess:
    """Start `function(*args)` in a process of its own, from the fork server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_call, args=(_pack(function, args), None), daemon=True)
    process.start()
    return process


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = TIMEOUT,
    lost: Collection[int] = (),
) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks of a gloo process group; return the results in rank order.

    RANK, LOCAL_RANK and WORLD_SIZE are set as torchrun would, and the default process group exists.
    timeout: seconds for one collective; the whole run may take twice that.
    lost: ranks that the function kills on purpose; their result is None, and no barrier ends the run.
    Raises AssertionError with the traceback of every rank that failed, or of none when the run hung.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    packed = _pack(function, args)
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            group = (rank, world_size, f"{folder}/store", timeout, not lost)
            process = context.Process(target=_call, args=(packed, sender, group), daemon=True)
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        try:
            return _collect(processes, pipes, time.monotonic() + 2 * timeout, lost)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(
    processes: list[BaseProcess], pipes: list[Connection], deadline: float, lost: Collection[int]
) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    waiting = dict(enumerate(pipes))
    failures = []
    while waiting and time.monotonic() < deadline:
        ready = multiprocessing.connection.wait(list(waiting.values()), timeout=deadline - time.monotonic())
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            try:
                failed, value = pickle.loads(waiting[rank].recv_bytes())
            except EOFError:
                processes[rank].join(5)
                failed, value = rank not in lost, f"died with exit code {processes[rank].exitcode}"
            if failed:
                failures.append(f"rank {rank}: {value}")
                deadline = min(deadline, time.monotonic() + 5)  # the others may be stuck waiting for it
            elif rank not in lost:
                results[rank] = value
            del waiting[rank]
    if failures or waiting:
        hung = [f"rank {rank} did not end in time" for rank in waiting]
        raise AssertionError("\n".join(failures + hung))
    return results


def _pack(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str, str, str, bytes]:
    """Name the function by file, for test modules are not on the import path of a new process."""
    return (
        sys.modules[function.__module__].__file__ or "",
        function.__module__,
        function.__qualname__,
        pickle.dumps(args),
    )


def _unpack(packed: tuple[str, str, str, bytes]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    path, module_name, qualname, args = packed
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    function = sys.modules[module_name]
    for part in qualname.split("."):
        function = getattr(function, part)
    return function, pickle.loads(args)  # type: ignore[return-value]


def _call(
    packed: tuple[str, str, str, bytes],
    sender: Connection | None,
    group: tuple[int, int, str, float, bool] | None = None,
) -> None:
    """The body of a started process."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent.parent))
    if sender is None:
        function, args = _unpack(packed)
        function(*args)
        return
    from flux_trainer.runtime import peers

    assert group is not None
    rank, world_size, store, timeout, barrier = group
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        function, args = _unpack(packed)
        answer = (False, function(*args))
        if barrier and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        answer = (True, traceback.format_exc())
    sender.send_bytes(pickle.dumps(answer))
    sender.close()
    peers.leave()
    if not barrier or answer[0]:
        os._exit(int(answer[0]))  # a process group whose peers are gone cannot be taken down in order
