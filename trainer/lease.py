"""Leases: a file says which living process works on something, for any number of launchers on one file system, NFS among them.

A lease appears by `link`, which creates or fails in one step on every file system that knows it (O_EXCL elsewhere), whole from the first
moment. A thread touches it as long as its process lives. On the host of its holder a lease stands while that process lives; elsewhere while
it is touched. One that does not stand is removed under a second lease that lasts for the removal, so that of many launchers that find
a dead one, one takes its place. A holder that was frozen for so long that another took over notices at the next touch: `lost`.
"""
from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator

BEAT_S = 20.0
STALE_S = 180.0  # on another host, without a touch, by the file system's clock
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # what file systems without hard links say
REMOVAL_S = 60.0  # a removal that lasts longer was killed


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lease."""

    host: str
    pid: int

    @property
    def me(self) -> bool:
        return self == Holder(socket.gethostname(), os.getpid())


class Lease:
    """Held by this process until `release`, unless it is `lost`."""

    def __init__(self, path: pathlib.Path, token: str | None):
        self.path, self._token, self.lost = path, token, False
        if token is not None:
            _KEEPER.add(self)

    def beat(self) -> None:
        """Touch it; `lost` is True afterwards when it is another's by now."""
        mark = _read(self.path)
        if mark is None or mark.get("token") != self._token:
            self.lost = True
        else:
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Give it up; of a lease that this process held before, only the outermost counts."""
        if self._token is None:
            return
        _KEEPER.remove(self)
        mark = _read(self.path)
        if mark is not None and mark.get("token") == self._token:
            self.path.unlink(missing_ok=True)


def take(path: pathlib.Path) -> Lease | Holder:
    """The lease at `path`, or the living process that has it. The folder must exist."""
    while True:
        token = uuid.uuid4().hex
        if _create(path, token):
            return Lease(path, token)
        other = holder(path, _clock(path))
        if other is not None:
            return Lease(path, None) if other.me else other
        _remove(path)


def holder(path: pathlib.Path, now: float | None = None) -> Holder | None:
    """The living process that holds the lease, None for a dead one or none. now: by the file system's clock, default this machine's."""
    mark = _read(path)
    if mark is None:
        return None
    if mark["host"] == socket.gethostname():
        alive = _process_alive(mark["pid"]) and process_start(mark["pid"]) == mark["process_start"]
    else:
        alive = _age(path, now) < STALE_S
    return Holder(mark["host"], mark["pid"]) if alive else None


def discard_dead(path: pathlib.Path) -> None:
    """Remove the lease if there is one and its holder is gone."""
    if path.exists() and holder(path, _clock(path)) is None:
        _remove(path)


def _read(path: pathlib.Path) -> dict | None:
    """What a lease says; one that says nothing readable (O_EXCL, and then a kill) is of no host, and lasts while it is fresh."""
    try:
        mark = json.loads(path.read_text())
        return {"host": str(mark["host"]), "pid": int(mark["pid"]), "process_start": mark["process_start"], "token": mark.get("token")}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return {"host": "?", "pid": 0, "process_start": None, "token": None}


def _create(path: pathlib.Path, token: str) -> bool:
    """Whether the lease is ours now."""
    mark = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "process_start": process_start(os.getpid()), "token": token})
    work = path.with_name(f".{path.name}-{token}")
    try:
        work.write_text(mark)
        os.link(work, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            with path.open("x") as file:
                file.write(mark)
        except FileExistsError:
            return False
    finally:
        work.unlink(missing_ok=True)
    return True


def _remove(path: pathlib.Path) -> None:
    """Remove the lease if it is dead, under the removal's own lease; where another removes, wait a moment."""
    removal = path.with_name(f"{path.name}.removal")
    token = uuid.uuid4().hex
    if not _create(removal, token):
        if _age(removal, _clock(path)) > REMOVAL_S:
            removal.unlink(missing_ok=True)
        time.sleep(0.05)
        return
    try:
        if holder(path, _clock(path)) is None:
            path.unlink(missing_ok=True)
    finally:
        removal.unlink(missing_ok=True)


def _clock(path: pathlib.Path) -> float:
    """Now, by the clock that stamps files in this folder."""
    work = path.with_name(f".clock-{uuid.uuid4().hex}")
    try:
        work.touch()
        return work.stat().st_mtime
    finally:
        work.unlink(missing_ok=True)


def _age(path: pathlib.Path, now: float | None) -> float:
    try:
        return (time.time() if now is None else now) - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _process_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, but there
        return True
    return True


def process_start(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None where the system does not tell (no /proc), and of one that is dead and waits for
    its parent to notice (a zombie)."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # from field 3 on; the name in field 2 may hold spaces and brackets
    return None if fields[0] in "ZX" else fields[19]


class _Keeper:
    """The thread that touches this process's leases."""

    def __init__(self):
        self._leases: set[Lease] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, lease: Lease) -> None:
        with self._lock:
            self._leases.add(lease)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="bitlaw-leases")
                self._thread.start()

    def remove(self, lease: Lease) -> None:
        with self._lock:
            self._leases.discard(lease)

    def _run(self) -> None:
        while True:
            time.sleep(BEAT_S)
            with self._lock:
                leases = list(self._leases)
            for lease in leases:
                lease.beat()


_KEEPER = _Keeper()


@contextlib.contextmanager
def held(paths: list[pathlib.Path]) -> Iterator[list[Lease] | Holder]:
    """All of these leases, or one living process that has one of them; then none is kept. Taken in sorted order, so that two launchers
    that want the same do not take half of it each."""
    with contextlib.ExitStack() as stack:
        leases = []
        for path in sorted(paths):
            taken = take(path)
            if isinstance(taken, Holder):
                stack.close()
                yield taken
                return
            stack.callback(taken.release)
            leases.append(taken)
        yield leases
