"""Reads the files of an offline W&B run byte by byte."""

import json
import pathlib
import struct
import time


def _records(path: pathlib.Path):
    """The protocol buffers in a `.wandb` file: seven bytes of header, then LevelDB's log format (blocks of 32 KiB of
    chunks with crc32, length and type: 1 whole, 2 first, 3 middle, 4 last)."""
    from wandb.proto import wandb_internal_pb2

    raw = path.read_bytes()
    assert raw[:4] == b":W&B"[: len(raw)]
    place, content = 7, b""
    while place + 7 <= len(raw):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", raw[place : place + 7])
        if place + 7 + length > len(raw):
            return
        content += raw[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            content = b""
            yield record


def read_back(folder: pathlib.Path) -> dict:
    """What an offline run directory holds: identity, config, history rows and the summary in the end.

    W&B's service writes it from a process of its own, somewhat after `finish` returned: waits for the closing record.
    """
    deadline = time.monotonic() + 60
    while "exit_code" not in (found := _read(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _read(folder: pathlib.Path) -> dict:
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found = {"history": [], "summary": {}, "config": {}}
    for record in _records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            found["config"] |= config
            found |= {"id": record.run.run_id, "group": record.run.run_group, "project": record.run.project, "tags": list(record.run.tags)}
        elif kind == "history":
            found["history"].append({(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item})
        elif kind == "summary":
            found["summary"] |= {(i.key or i.nested_key[-1]): json.loads(i.value_json) for i in record.summary.update}
        elif kind == "exit":
            found["exit_code"] = record.exit.exit_code
    return found
