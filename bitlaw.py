"""bitlaw: the console script and the import face.

    import bitlaw as bl;  bl.formats.quantize(x, "mxfp4");  bl.trainer.train(...);  bl.scaling.fit(...)
"""
from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

PARTS = ("formats", "trainer", "scaling")
USAGE = """usage: bitlaw VERB ...
  demo                                 the main job in small: sweep, fit, report; minutes on two cores
  train KEY=VALUE ...                  one run                       e.g. bitlaw train model=25k precision=int4 steps=500
  sweep [sweep=NAME] KEY=V1,V2 ...     many runs in shared programs  (dry_run=true shows the plan; run again to resume)
  status DIR [--watch]                 what is done, running, failed, diverged, missing; --watch: until nothing moves
  table DIR ... --out FILE             the run table as .parquet or .csv
  fit TABLE --law NAME                 fit a scaling law
  compare TABLE --laws A,B --holdout SQL
  predict FIT.json N=1e9 D=2e10 ...    a prediction with its interval
  plan FIT.json --compute 1e21         the best N, D and precision for a budget; --regions: which pass in which precision; --next: which run
  answer QUANTITY --until H --budget TIME sweep=NAME    train only those runs of a sweep that settle a question
  stats TABLE                          variance between seeds, gaps by matched seed, best of k, accuracies: no law needed
  report DIR --out report.html         one self-contained page
  data NAME                            prepare a data set
  wandb-sync DIR [--again]             replay finished runs to Weights & Biases ($WANDB_MODE, offline by default)
  formats                              the catalogue of number formats
`bitlaw VERB --help` says more."""


def __getattr__(name: str):
    """The three parts, imported when first used."""
    if name not in PARTS:
        raise AttributeError(f"module 'bitlaw' has no attribute {name!r}; it has {', '.join(PARTS)}")
    return _part(name)


def _part(name: str):
    """A part of bitlaw; refuses a package of the user's that shadows it."""
    module = importlib.import_module(name)
    found, own = Path(module.__file__).resolve().parent, Path(__file__).resolve().parent / name
    if found != own:
        raise ImportError(f"'{name}' is {found}, which hides bitlaw's own {own}; rename yours or run elsewhere")
    return module


def _formats(argv: list[str]) -> int:
    if argv:
        raise ValueError(f"{argv[0]} is not an option; `bitlaw formats` takes none")
    from rich.console import Console
    from rich.table import Table

    rows = _part("formats").table()
    table = Table()
    for column in rows[0]:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else f"{value:g}" if isinstance(value, float) else str(value) for value in row.values()))
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
    return 0


def _dispatch(verb: str, argv: list[str]) -> int:
    if verb == "formats":
        return _formats(argv)
    if verb in ("table", "fit", "compare", "predict", "plan", "stats", "report"):
        _part("scaling")
        return importlib.import_module("scaling.cli").run(verb, argv)
    _part("trainer")
    if verb == "status":
        return importlib.import_module("trainer.status").status_main(argv)
    if verb == "wandb-sync":
        return importlib.import_module("trainer.replay").replay_main(argv)
    _part("formats")
    if verb == "train":
        return importlib.import_module("trainer.cli").run(verb, argv)
    if verb == "sweep":
        return _sweep(argv)
    if verb == "answer":
        return _answer(argv)
    if verb == "data":
        return importlib.import_module("trainer.data").prepare(argv)
    return _demo(argv)


class LiveReport:
    """report.html in the folder of a sweep that takes longer than EVERY_S, made anew that often by a process of its own while the sweep
    goes on, and once when it is over."""

    EVERY_S = 300.0

    def __init__(self):
        self._last, self._root, self._process = time.monotonic(), None, None

    def __call__(self, root: Path) -> None:
        busy = self._process is not None and self._process.poll() is None
        if not busy and time.monotonic() - self._last >= self.EVERY_S:
            self._last, self._root = time.monotonic(), root
            self._process = self._start("--refresh", "60")

    def _start(self, *more: str) -> subprocess.Popen:
        command = [sys.executable, str(Path(__file__).resolve()), "report", str(self._root), "--out", str(self._root / "report.html"), "--bootstrap", "20", *more]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def finish(self) -> None:
        """The last one, if there was one before."""
        if self._process is not None:
            self._process.wait()
            self._start().wait()


def _sweep(argv: list[str]) -> int:
    """trainer, with a report beside it while it takes long."""
    live = LiveReport()
    try:
        return importlib.import_module("trainer.cli").run("sweep", argv, live)
    finally:
        live.finish()


def _answer(argv: list[str]) -> int:
    """trainer and scaling in turns: the sweep's runs are the candidates, scaling says which are worth their time, trainer trains them."""
    _part("scaling")
    text = importlib.import_module("scaling.answer_text")
    try:
        asked = text.parse(argv)
    except SystemExit as done:  # argparse leaves this way after printing --help
        return int(done.code or 0)
    source = importlib.import_module("trainer.cli").candidates(asked.overrides, asked.budget, asked.config_dir)
    return text.run(asked, source, source.stop.max_wall)


def _demo(argv: list[str]) -> int:
    """trainer, then scaling: the sweep `demo`, then its run table, fits, report and three sentences."""
    _part("scaling")
    code = importlib.import_module("trainer.cli").run("sweep", ["sweep=demo", *argv])
    root = Path(next((a.partition("=")[2] for a in argv if a.startswith("runs_dir=")), "runs")) / "demo"
    if code or "dry_run=true" in argv:
        return code
    return importlib.import_module("scaling.cli").conclude(root)


PLAIN = ("demo", "status", "wandb-sync", "formats")  # verbs whose line of USAGE says it all
VERBS = ("demo", "train", "sweep", "status", "table", "fit", "compare", "predict", "plan", "answer", "stats", "report", "data", "wandb-sync", "formats")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done; 1 runs failed or are missing, or a fit did not converge; 2 bad input, one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    try:
        if argv[0] not in VERBS:
            raise ValueError(f"{argv[0]} is not a verb; accepted: {', '.join(VERBS)}")
        if argv[0] in PLAIN and argv[1:] in (["-h"], ["--help"]):
            print(next(f"usage: bitlaw {line.strip()}" for line in USAGE.splitlines() if line.split()[0] == argv[0]))
            return 0
        return _dispatch(argv[0], argv[1:])
    except (ValueError, ImportError) as error:
        print(f"bitlaw: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `bitlaw status DIR | head`: what was wanted has been read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"bitlaw: {error.filename or 'a file'} cannot be read or written ({error.strerror or error})", file=sys.stderr)
        return 1 if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else 2  # the disk's doing, or the path's
    except KeyboardInterrupt:
        print("bitlaw: interrupted; the same command goes on from the last checkpoints", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
