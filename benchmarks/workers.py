"""Programs that live in processes of their own and are driven in turn from one.

The number of host devices of JAX is fixed when it starts, and thread pools of two frameworks in one process disturb each other.
So each combination gets a process that builds its programs once and then waits; the driver visits them one at a time, and whatever
else the machine is doing meets all of them alike.
"""
from __future__ import annotations

import importlib
import multiprocessing
import traceback

from benchmarks import timing

QUIT = None


def _serve(connection, factory: str, arguments: dict) -> None:
    """Build the programs, send their names, then time the one that each message names."""
    try:
        module, function = factory.rsplit(".", 1)
        programs = getattr(importlib.import_module(module), function)(**arguments)
        connection.send(list(programs))
        while (request := connection.recv()) is not QUIT:
            name, repeats = request
            connection.send(timing.visit(programs[name], repeats))
    except Exception:  # whatever it was is the driver's to show
        connection.send(RuntimeError(traceback.format_exc()))


class Worker:
    """A process with programs. `factory`: dotted name of a function that makes {name: timing.Program} of `arguments`."""

    def __init__(self, factory: str, **arguments):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, factory, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.names: list[str] = self._receive()

    def _receive(self):
        try:
            answer = self._connection.recv()
        except EOFError:
            raise RuntimeError("a benchmark process ended without a word (killed?)") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def visits(self, prefix: str = "", repeats: int = 3) -> dict[str, timing.Visit]:
        """A visit to each program, under prefix + its name."""
        return {prefix + name: lambda name=name: self._visit(name, repeats) for name in self.names}

    def _visit(self, name: str, repeats: int) -> float:
        self._connection.send((name, repeats))
        return self._receive()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        if self._process.is_alive():
            self._connection.send(QUIT)
        self._process.join()
