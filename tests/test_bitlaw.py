"""The command line as a user meets it: verbs, exit codes, and one line on stderr for every bad input."""
from __future__ import annotations

import importlib
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import pytest

import bitlaw
from tests.trainer.tiny import TINY, folders, shared_program

ROOT = pathlib.Path(bitlaw.__file__).parent
assert jax.device_count() == 8  # before any verb asks for one device per core


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Every command runs in an empty folder, with prepared data in another one."""
    monkeypatch.setenv("BITLAW_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(importlib.import_module("trainer.sweep.execute"), "Program", shared_program)


def _train(*overrides):
    return ["train", *TINY, *overrides]


def _cluster(*settings):
    return ["sweep", *TINY, "steps=3", "launcher=slurm", *settings]


def _files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# Arguments -> what the one line must hold: the key, the value, and what would be accepted.
BAD = {
    "no such verb": (["trian"], ["trian", "train, sweep"]),
    "length missing": (_train(), ["none of them", "steps, tokens, tokens_per_param"]),
    "length twice": (_train("steps=3", "tokens=99"), ["steps=3, tokens=99", "exactly one"]),
    "misspelt key": (_train("steps=3", "sede=1"), ["sede", "accepted keys: ", "seed"]),
    "misspelt nested key": (_train("steps=3", "optimizer.learning_rate=1"), ["optimizer.learning_rate", "accepted keys: ", "lr, lr_rule"]),
    "misspelt key of a product": (_train("steps=3", "precision.weights.dgrad.bit=4"), ["precision.weights.dgrad.bit", "bits"]),
    "added key": (_train("steps=3", "+new=1"), ["new=1", "accepted keys: "]),
    "removed key": (_train("steps=3", "~seed"), ["seed is missing"]),
    "no override": (_train("steps=3", "fast"), ["'fast'", "key=value"]),
    "no option": (_train("steps=3", "--fast"), ["--fast", "--config-dir"]),
    "unknown model": (_train("steps=3", "model=3k"), ["model/3k", "accepted: ", "25k"]),
    "unknown precision": (_train("steps=3", "precision=fp9"), ["precision/fp9", "bfloat16", "float32", "quartet"]),
    "unknown data": (_train("steps=3", "data=wikipedia"), ["data/wikipedia", "file, stdlib, synthetic"]),
    "unknown schedule": (_train("steps=3", "schedule.name=linear"), ["schedule.name=linear", "constant, cosine, wsd"]),
    "unknown optimizer": (_train("steps=3", "optimizer.name=sgd"), ["optimizer.name=sgd", "adamw"]),
    "unknown logger": (_train("steps=3", "logger=tensorboard"), ["logger/tensorboard", "none, wandb"]),
    "wrong type": (_train("steps=many"), ["steps", "'many'", "Integer"]),
    "half a step": (_train("steps=1.5"), ["steps", "1.5", "Integer"]),
    "no step": (_train("steps=0"), ["steps=0", "1 or more"]),
    "steps beyond int32": (_train("steps=3000000000"), ["steps=3000000000", "2147483647"]),
    "negative seed": (_train("steps=3", "seed=-1"), ["seed=-1", "0 to 4294967295"]),
    "micro-batches that do not divide": (_train("steps=3", "accumulate=3"), ["accumulate=3", "batch_size=4"]),
    "odd heads": (_train("steps=3", "model.num_heads=3"), ["model.num_heads=3", "divisor"]),
    "learning rate": (_train("steps=3", "optimizer.lr=nan"), ["optimizer.lr=nan", "accepted: "]),
    "clipping to nothing": (_train("steps=3", "optimizer.clip_norm=0"), ["optimizer.clip_norm=0.0", "null for no clipping"]),
    "cool-down": (_train("steps=3", "schedule.cooldown_fraction=2"), ["schedule.cooldown_fraction=2.0", "0.0 to 1.0"]),
    "evaluation of more than there is": (_train("steps=3", "eval.sequences=500"), ["eval.sequences=500", "2 to 124"]),
    "windows longer than the data": (_train("steps=3", "seq_len=30000"), ["seq_len=30000", "19000"]),
    "no files": (_train("steps=3", "data=file", "data.paths=[nothing.txt]"), ["data.paths", "nothing.txt"]),
    "table too large": (_train("steps=3", "data.order=12"), ["data.order=12", "1048576"]),
    "width of a fixed format": (_train("steps=3", "precision=mxfp4", "precision.weights.bits=5"), ["precision.weights.bits=5", "'mxfp4'", "format, rounding"]),
    "width of float32": (_train("steps=3", "precision=float32", "precision.weights.bits=5"), ["precision.weights.bits=5", "'float32'", "can be overridden: format"]),
    "width that nothing reads": (_train("steps=3", "precision=fp8", "precision.weights.rounding=null", "precision.bits=4"), ["precision.bits=4", "precision=fp8", "precision=int"]),
    "width too small": (_train("steps=3", "precision.bits=0"), ["bits=0", "1 to 16"]),
    "width missing": (_train("steps=3", "precision.weights.format=minifloat"), ["precision.weights"]),
    "product that a role is not in": (_train("steps=3", "precision.weights.wgrad.bits=4"), ["precision.weights.wgrad", "forward, dgrad"]),
    "format that is none": (_train("steps=3", "precision=float32", "precision.weights.format=int99"), ["precision.weights.format='int99'", "accepted: "]),
    "format that may be three": (_train("steps=3", "precision=float32", "precision.weights.format=e4m3"), ["e4m3", "240", "448", "480"]),
    "block without a size": (_train("steps=3", "precision.weights.granularity=block"), ["precision.weights", "block"]),
    "rounding": (_train("steps=3", "precision.weights.rounding=up"), ["precision.weights.rounding=up", "nearest_even", "stochastic"]),
    "source": (_train("steps=3", "precision.weights.source=guessed"), ["precision.weights.source=guessed", "current"]),
    "plugin": (_train("steps=3", "plugins=[no.such]"), ["plugins=no.such", "PYTHONPATH"]),
    "sweep in a train": (_train("steps=3", "seed=1,2"), ["seed=1,2", "bitlaw sweep"]),
    "config folder": (["train", "--config-dir", "nowhere", "steps=3"], ["--config-dir=nowhere"]),
    "runs folder": (_train("steps=3", "runs_dir=/proc/nowhere"), ["runs_dir=/proc/nowhere", "cannot be written"]),
    "sweep's name": (_train("steps=3", "sweep=../up"), ["sweep='../up'"]),
    "unknown sweep": (["sweep", "sweep=nothing"], ["sweep=nothing", "demo"]),
    "launcher": (["sweep", *TINY, "steps=3", "launcher=cloud"], ["launcher=cloud", "local"]),
    "launcher's key": (_cluster("launcher.tim=3h"), ["launcher.tim", "accepted keys: partition, account, time"]),
    "launcher's time": (_cluster("launcher.time=30"), ["launcher.time=30", "90m", "1-12:00:00"]),
    "launcher's nodes": (_cluster("launcher.nodes=0"), ["launcher.nodes=0", "1 or more"]),
    "launcher's type": (_cluster("launcher.nodes=two"), ["launcher.nodes=two", "Integer"]),
    "launcher's warning": (_cluster("launcher.time=1m"), ["launcher.signal_delay_s=120", "less than the 1 min"]),
    "launcher's own option": (_cluster("launcher.sbatch.array=3"), ["launcher.sbatch.array=3", "launcher.array_parallelism="]),
    "several launchers": (_cluster("launcher.partition=a,b"), ["launcher.partition=a,b", "one value"]),
    "settings without a launcher": (["sweep", *TINY, "steps=3", "launcher.time=3h"], ["launcher.time=3h", "launcher=local has no settings"]),
    "dry run": (["sweep", *TINY, "steps=3", "dry_run=maybe"], ["dry_run=maybe", "true, false"]),
    "range": (["sweep", *TINY, "steps=3", "seed=range(0"], ["seed=range(0"]),
    "one bad point of a sweep": (["sweep", *TINY, "steps=3", "precision.bits=4,3,0"], ["bits=0", "1 to 16"]),
    "status of nothing": (["status", "nowhere"], ["nowhere"]),
    "status without a folder": (["status"], ["bitlaw status DIR"]),
    "data by no name": (["data", "nothing"], ["nothing", "synthetic"]),
    "unknown quantity": (["answer", "optimal_bit", "--until", "0.3", "--budget", "1h", *TINY], ["'optimal_bit'", "optimal_bits", "gamma_w"]),
    "quantity's input": (["answer", "loss_gap", "--until", "0.3", "--budget", "1h", *TINY], ["loss_gap", "--at N=..."]),
    "until what": (["answer", "optimal_bits", "--until", "0", "--budget", "1h", *TINY], ["--until 0", "positive"]),
    "no duration": (["answer", "optimal_bits", "--until", "0.3", "--budget", "soon", *TINY], ["--budget=soon", "540s, 9m, 1.5h"]),
    "no axis of widths": (["answer", "optimal_bits", "--until", "0.3", "--budget", "1h", *TINY, "steps=3,4"], ["several widths", "precision.bits=3,4"]),
    "no axis of sizes": (["answer", "optimal_bits", "--until", "0.3", "--budget", "1h", *TINY, "steps=3,4,5", "precision.bits=2,3,4"], ["N is ", "vary it"]),
    "no axis of lengths": (["answer", "E", "--until", "0.3", "--budget", "1h", *TINY, "model.num_layers=1,2", "steps=3", "precision.bits=2,3,4"], ["D is ", "vary it"]),
    "answer elsewhere": (["answer", "E", "--until", "0.3", "--budget", "1h", *TINY, "steps=3,4", "launcher=slurm"], ["launcher", "local"]),
    "formats takes nothing": (["formats", "int4"], ["int4", "takes none"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, capfd, tmp_path):
    """Exit code 2, one line on stderr that names key, value and what would do, nothing on stdout, no run begun."""
    arguments, expected = BAD[name]
    assert bitlaw.main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("bitlaw: ") and err.count("\n") == 1
    assert [text for text in expected if text not in err] == [], err
    assert _files(tmp_path / "here") == set()


@pytest.mark.parametrize("content, expected", [
    ("", "runs:"), ("runs:", "runs:"), ("runs: model=2k", "runs:"), ("runs:\n  - [1]", "runs:"), ("lines:\n  - model=2k", "runs:"), ("runs:\n - a: : b", "broken.yaml"),
    ("runs:\n  - model=2k steps=3 sede=0,1", "sede"), ("runs:\n  - \"model='2k\"", "model="), ("runs: []", "runs:"),
])  # fmt: skip
def test_bad_sweep_file_is_one_line(content, expected, capfd, tmp_path):
    (tmp_path / "mine" / "sweep").mkdir(parents=True)
    (tmp_path / "mine" / "sweep" / "broken.yaml").write_text(content)
    assert bitlaw.main(["sweep", "--config-dir", str(tmp_path / "mine"), "sweep=broken"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("bitlaw: ") and err.count("\n") == 1 and expected in err


@pytest.mark.parametrize("content, expected", [("name: [", "mine.yaml"), ("defaults: [schema]\nwidth: 3\n", "width"), ("defaults: [nothing]\n", "nothing")])
def test_bad_group_file_is_one_line(content, expected, capfd, tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "mine.yaml").write_text(content)
    assert bitlaw.main(["train", "--config-dir", str(tmp_path / "mine"), "model=mine", "steps=3"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("bitlaw: ") and err.count("\n") == 1 and expected in err


@pytest.mark.parametrize("verb", bitlaw.VERBS)
def test_help(verb, capfd, tmp_path):
    """Every verb says what it takes, with code 0, and does nothing else."""
    try:
        code = bitlaw.main([verb, "--help"])
    except SystemExit as end:  # argparse's way
        code = end.code
    assert code == 0
    assert f"bitlaw {verb}" in capfd.readouterr().out
    assert _files(tmp_path / "here") == set()


def test_usage(capsys):
    """Without a verb the usage, as an error; asked for, not as one. It names every verb."""
    assert (bitlaw.main([]), bitlaw.main(["--help"])) == (2, 0)
    out = capsys.readouterr().out
    assert all(out.count(f"\n  {verb} ") == 2 for verb in bitlaw.VERBS)


# --- what works ---------------------------------------------------------------------------------------------------------


def test_train_again_is_done(capfd, tmp_path):
    """A run says its result; the same command says it again and trains nothing; status agrees."""
    assert bitlaw.main(_train("steps=3")) == 0
    ((run_id, folder),) = folders("runs").items()
    first = capfd.readouterr().out
    assert first.startswith(run_id) and f"loss {folder.record()['loss']:.4f}" in first
    before = (folder.path / "record.json").stat().st_mtime_ns
    assert bitlaw.main(_train("steps=3", "log_every=2")) == 0
    assert capfd.readouterr().out == first and (folder.path / "record.json").stat().st_mtime_ns == before
    assert bitlaw.main(["status", "runs"]) == 0
    assert _files(tmp_path / "here") >= {"runs/train/plan.json", f"runs/train/{run_id}/record.json"}


def test_dry_run_writes_nothing(capfd, tmp_path):
    assert bitlaw.main(["sweep", *TINY, "steps=3,6", "precision.bits=3,4", "dry_run=true"]) == 0
    out = capfd.readouterr().out
    assert "4 runs, 0 done, 0 failed before; 1 cohorts, 1 programs" in out and "int3, int4" in out and _files(tmp_path / "here") == set()


def test_a_failed_run_is_told_and_tried_again(capfd, monkeypatch):
    """Exit code 1 and the reason; no traceback on the screen, the whole of it in error.txt; the same command tries again."""
    from trainer import loop

    def batches(*_):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "batches", batches)
        assert bitlaw.main(_train("steps=3")) == 1
    err = capfd.readouterr().err
    (folder,) = folders("runs").values()
    assert "OSError: the disk is gone" in err and "Traceback" not in err and "Traceback" in (folder.path / "error.txt").read_text()
    assert bitlaw.main(["status", "runs"]) == 1
    assert bitlaw.main(_train("steps=3")) == 0 and bitlaw.main(["status", "runs"]) == 0


def test_a_run_that_another_process_trains_is_left_alone(capfd):
    """Refused in one line while the other process lives, and nothing of its is touched; afterwards the run can be had."""
    assert bitlaw.main(_train("steps=3", "seed=5")) == 0
    (folder,) = folders("runs").values()
    (folder.path / "record.json").unlink()
    # A process that holds the run's lease as a training one does, until its standard input is closed.
    claim = f"from trainer.records import RunFolder; from trainer import lease; import sys\nwith lease.held([RunFolder({str(folder.path.resolve())!r}).lease]): print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", claim], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=_environment()) as other:
        other.stdout.readline()
        capfd.readouterr()
        before = _files(folder.path)
        assert bitlaw.main(_train("steps=3", "seed=5")) == 2
        err = capfd.readouterr().err
        assert f"process {other.pid}" in err.splitlines()[-1] and folder.record() is None and _files(folder.path) == before
    assert bitlaw.main(_train("steps=3", "seed=5")) == 0 and folder.record()["status"] == "done"


PLUGIN = """
    import numpy as np
    import formats
    from trainer.data import Dataset, register

    formats.register("powers", formats.minifloat(3, 0, "fn"))

    @register("counting")
    def load(data):
        tokens = (np.arange(4000) % data.vocab_size).astype(np.uint8)
        return Dataset("counting", tokens[:3000], tokens[3000:], data.vocab_size, f"counting to {data.vocab_size}", 1.0, None)
"""


def test_plugins(tmp_path, monkeypatch, capfd):
    """A module of the user's adds a format and a data set by name; both are in the record, and the run learns to count."""
    (tmp_path / "my_plugin.py").write_text(textwrap.dedent(PLUGIN))
    monkeypatch.syspath_prepend(tmp_path)
    command = _train("data.name=counting", "precision=float32", "precision.weights.rounding=null", "precision.weights.format=powers", "steps=60",
                     "optimizer.lr=0.03")  # fmt: skip
    assert bitlaw.main(command) == 2 and "powers" in capfd.readouterr().err
    assert bitlaw.main([*command, "plugins=[my_plugin]"]) == 0
    (folder,) = folders("runs").values()
    record = folder.record()
    assert (record["data"], record["weights_format"], record["weights_bits"], record["data_sha256"]) == ("counting", "powers", 4.0, "counting to 11")
    assert record["loss"] < 1.0 < 2.0 < folder.metrics()[0]["loss"]


@pytest.mark.slow
def test_answer(capfd):
    """A real sweep on synthetic text: no more than it takes is trained, the same command answers at once, and a budget that is too small says so."""
    sweep = [o for o in TINY if not o.startswith("model.num_layers")] + ["model.num_layers=1,2,3", "steps=20,40,80", "precision.bits=2,3,4,32", "seed=0,1"]
    command = ["answer", "loss", "--at", "N=1000,D=1500,weights_bits=4,activations_bits=4", "--until", "100%", "--budget", "60s", *sweep]
    code = bitlaw.main(command)
    while code == 1:  # a slow machine: compiling took the time, and the same command goes on
        assert "goes on" in capfd.readouterr().out.splitlines()[-1]
        code = bitlaw.main(command)
    out = capfd.readouterr().out
    records = [folder.record() for folder in folders("runs").values()]
    assert code == 0 and 7 <= len(records) < 72 and {record["status"] for record in records} == {"done"}  # 5 constants and 2 runs, of 72
    assert f": {len(records)} runs" in out and out.splitlines()[-1].startswith("loss is ")
    assert bitlaw.main(command) == 0
    assert f"round 1: {len(records)} runs" in capfd.readouterr().out and len(folders("runs")) == len(records)
    assert bitlaw.main(["answer", "optimal_bits", "--at", "compute=1e15", "--until", "1e-9", "--budget", "1s", *sweep]) == 1
    out = capfd.readouterr().out
    assert out.splitlines()[-1].startswith("optimal_bits is not settled: ") and "does not depend on compute" in out


# --- other processes ----------------------------------------------------------------------------------------------------


def _environment(**extra) -> dict:
    return {**os.environ, "JAX_PLATFORMS": "cpu", **extra}


def _script(*arguments, **extra) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "bitlaw.py"), *arguments], env=_environment(**extra), capture_output=True, text=True)


@pytest.mark.slow
def test_hydra_multirun():
    """`bitlaw train -m` sweeps as Hydra does, one run after another; a bad value is one line here too."""
    done = _script("train", "-m", *TINY, "steps=2", "precision.bits=4,8")
    assert done.returncode == 0, done.stderr
    assert sorted(folder.record()["weights_bits"] for folder in folders("runs").values()) == [4.0, 8.0]
    refused = _script("train", "-m", *TINY, "steps=2", "precision.bits=4,0")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "bits=0" in refused.stderr.splitlines()[-1] and refused.stderr.splitlines()[-1].startswith("bitlaw: ")


def test_a_shadowing_package_is_refused(tmp_path):
    """A `trainer` of the user's before bitlaw's on the path is not taken for it: one line names both."""
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("")
    command = [sys.executable, "-c", "import sys, bitlaw; sys.exit(bitlaw.main(sys.argv[1:]))", *_train("steps=3")]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    refused = subprocess.run(command, env=_environment(PYTHONPATH=paths), capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert str(tmp_path / "trainer") in refused.stderr and str(ROOT / "trainer") in refused.stderr


@pytest.mark.slow
def test_a_report_beside_a_long_sweep(tmp_path, monkeypatch, capfd):
    """Made anew while the sweep goes on, as a page that loads itself again; the last one, made when it is over, does not."""
    live, pages = bitlaw.LiveReport(), []
    monkeypatch.setattr(bitlaw.LiveReport, "EVERY_S", 0.0)

    def told(root):
        live(root)
        live._process.wait()
        pages.append((root / "report.html").read_text(encoding="utf-8"))

    assert importlib.import_module("trainer.cli").run("sweep", [*TINY, "steps=6", "seed=0,1", f"runs_dir={tmp_path}"], told) == 0
    live.finish()
    assert pages and all('http-equiv="refresh"' in page and "are not over yet" in page for page in pages[:1])
    last = (tmp_path / "adhoc" / "report.html").read_text(encoding="utf-8")
    assert "2 runs" in last and "refresh" not in last and "not over" not in last
