"""Run folders and their status: what is written is what is read, whatever was killed in between."""

import json
import math
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest

from trainer import records
from trainer.records import RECORD_COLUMNS, NewerVersionError, RunFolder, complete

# Section 4 of the design, word for word.
_DESIGN = """run_id, sweep, status(done|diverged|failed), seed, trunk_id, cooldown_steps, unique_tokens, n_params (non-embedding),
n_params_total, tokens, flops, loss (final eval, nats/token), loss_std_err, loss_train, bits_per_byte, precision (name),
{weights,activations,output_gradients,kv,master_weights}_{format,bits,bits_effective,exp_bits,man_bits,block,rounding,source,log_mse},
quantized_fraction, dot_precision, execution (emulated|native), layout (solo|vmap|sharded), lr_rule, lr, batch_tokens, steps, schedule,
diverged_step, wall_s, tokens_per_s, device, n_devices, jax_version, code_version, data, data_sha256"""


def _record(**more):
    return {"run_id": "r", "status": "done"} | more


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "r")


# --- the record ---------------------------------------------------------------------------------------------------


def test_columns_are_those_of_the_design_in_order():
    plain = re.sub(r"\([^)]*\)", "", _DESIGN)
    braces = re.search(r"\{([^}]*)\}_\{([^}]*)\}", plain)
    roles = [f"{role}_{name}" for role in braces[1].split(",") for name in braces[2].split(",")]
    plain = plain.replace(braces[0], ",".join(roles))
    # What we add: the granularity of the scales beside each format, the formats of the moments and of attention, the use made of the device's
    # peak, places with a precision of their own, what low precision did to updates and gradients, memory, and the version of the record.
    added = {"record_version", "mfu", "exemptions", "edq", "lost_updates", "updates_per_ulp", "gradient_cosine", "gradient_magnitude"}
    endings, beginnings = ("_granularity", "_underflow", "_overflow", "_bytes_per_param"), ("adam_", "scores_", "probabilities_")
    added |= {name for name in RECORD_COLUMNS if name.endswith(endings) or name.startswith(beginnings)}
    assert [name for name in RECORD_COLUMNS if name not in added] == [name.strip() for name in plain.split(",")]


def test_a_record_is_filled_ordered_and_plain(run):
    run.finish(_record(tokens=np.int64(5), loss=jnp.float32(1.5), lr=1, ptq_int4=2.25, sweep="s"))
    raw = json.loads((run.path / "record.json").read_text())
    assert list(raw) == [*RECORD_COLUMNS, "ptq_int4"]
    given = {"run_id": "r", "status": "done", "tokens": 5, "loss": 1.5, "lr": 1.0, "ptq_int4": 2.25, "sweep": "s", "record_version": 1}
    assert {name: value for name, value in raw.items() if value is not None} == given
    assert type(raw["lr"]) is float and run.record() == raw


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_a_loss_that_is_no_number_is_null(run, value):
    run.finish(_record(status="diverged", loss=value, diverged_step=12))
    assert run.record()["loss"] is None and run.record()["diverged_step"] == 12
    assert "NaN" not in (run.path / "record.json").read_text()


@pytest.mark.parametrize(
    "record, words",
    [
        (_record(los=1.0), ["'los'", "ptq_<format>"]),
        (_record(tokens=1.5), ["'tokens'", "1.5", "int"]),
        (_record(seed=True), ["'seed'", "bool", "int"]),
        (_record(lr="fast"), ["'lr'", "'fast'", "float"]),
        (_record(precision=4), ["'precision'", "str"]),
        (_record(status="finished"), ["'finished'", "done, diverged, failed"]),
        ({"status": "done"}, ["'run_id' is missing"]),
    ],
)
def test_a_wrong_record_is_refused_in_one_line_and_not_written(run, record, words):
    with pytest.raises(ValueError) as caught:
        run.finish(record)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)
    assert run.record() is None and not run.path.exists()


def test_a_stop_while_writing_leaves_the_file_that_was(run, monkeypatch):
    run.write_config({"a": 1})

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records.os, "fsync", stop)
        run.write_config({"a": 2})
    assert run.config() == {"record_version": 1, "a": 1}
    (run.path / "record.json").write_text('{"torn": ')
    with pytest.raises(ValueError, match="record.json is not JSON"):
        run.record()


def test_old_records_stay_readable_and_newer_ones_are_refused_by_name(run):
    """A folder of before the version was written is of version 1; one of version 2 may mean something else by any name in it."""
    run.path.mkdir()
    for name, read in (("record.json", run.record), ("config.json", run.config)):
        for about in ({}, {"record_version": 1}):
            (run.path / name).write_text(json.dumps(about | {"status": "done"}))
            assert read() == about | {"status": "done"}
        (run.path / name).write_text(json.dumps({"record_version": 2}))
        with pytest.raises(NewerVersionError, match=f"{name} has record_version 2; this bitlaw reads up to 1: use .* newer one$"):
            read()
        (run.path / name).write_text(json.dumps({"record_version": "2"}))
        with pytest.raises(ValueError, match="record_version '2', which is no version"):
            read()


# --- metrics ------------------------------------------------------------------------------------------------------


def test_rows_come_back_with_what_was_not_finite(run):
    run.append_metrics([{"step": 1, "loss": 2.5}, {"step": np.int32(2), "loss": jnp.float32(2.25), "lr": np.float64(0.1)}])
    run.append_metrics([{"step": 3, "loss": math.nan, "grad_norm": np.float32("inf"), "val_loss": -math.inf}])
    assert run.metrics()[:2] == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25, "lr": 0.1}]
    last = run.metrics()[2]
    assert math.isnan(last.pop("loss")) and last == {"step": 3, "grad_norm": math.inf, "val_loss": -math.inf}
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    strict = json.loads(lines[2], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {
        "step": 3, "loss": None, "grad_norm": None, "val_loss": None,
        "nonfinite": {"loss": "nan", "grad_norm": "inf", "val_loss": "-inf"},
    }  # fmt: skip


def test_a_torn_line_is_passed_over_and_then_cut_off(run):
    run.append_metrics([{"step": step} for step in (1, 2, 3)])
    path = run.path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        steps = [row["step"] for row in run.metrics()]
        assert steps == [1, 2, 3][: whole[:cut].count(b"\n")]
        run.append_metrics([{"step": 9}])
        assert [row["step"] for row in run.metrics()] == [*steps, 9]


def test_a_broken_line_inside_is_not_passed_over(run):
    run.append_metrics([{"step": 1}, {"step": 2}])
    path = run.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"step": 1}', b'{"step" 1}'))
    with pytest.raises(ValueError, match="metrics.jsonl line 1 is not JSON"):
        run.metrics()


def test_the_last_row_is_read_from_the_tail(run, monkeypatch):
    """The last row that `metrics` would give, wherever a kill cut the file and however the tail that is read falls."""
    assert run.last_row() is None
    run.append_metrics([{"step": 1, "text": "x" * 40}, {"step": 2, "loss": math.inf}, {"step": 3, "text": "y" * 70}])
    path = run.path / "metrics.jsonl"
    whole = path.read_bytes()
    for tail in (1, 7, 50, 4096):
        monkeypatch.setattr(records, "_TAIL", tail)
        for cut in range(len(whole) + 1):
            path.write_bytes(whole[:cut])
            assert run.last_row() == (run.metrics() or [None])[-1]
    for broken in (b"{\n", b"[1]\n", b"\xff\n"):
        path.write_bytes(whole + broken)
        with pytest.raises(ValueError, match="metrics.jsonl, the last line, is not"):
            run.last_row()


def test_truncation_drops_what_a_resumed_run_logs_again(run):
    run.truncate(3)
    assert run.metrics() == []
    run.append_metrics([{"step": step, "loss": math.nan if step == 2 else 1.0} for step in range(1, 6)])
    before = (run.path / "metrics.jsonl").read_bytes()
    run.truncate(5)
    assert (run.path / "metrics.jsonl").read_bytes() == before
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "lo')
    run.truncate(5)
    assert (run.path / "metrics.jsonl").read_bytes() == before
    run.truncate(3)
    assert (run.path / "metrics.jsonl").read_bytes() == b"".join(before.splitlines(keepends=True)[:3])


def test_the_scaling_side_reads_what_is_written(run):
    scaling = pytest.importorskip("scaling")
    run.append_metrics([{"step": 1, "loss": 2.0, "tokens": 10}, {"step": 2, "loss": math.nan, "tokens": 20}])
    run.finish(_record(tokens=20, loss=2.0, weights_format="int4", weights_bits=4, ptq_int4=2.5))
    row = scaling.table(run.path.parent).select("run_id, tokens, loss, weights_bits, weights_block, ptq_int4").fetchall()
    assert row == [("r", 20, 2.0, 4.0, None, 2.5)]
    assert scaling.curves(run.path.parent).select("run_id, step, loss").fetchall() == [("r", 1, 2.0), ("r", 2, None)]
