"""Data: `load(config.data) -> Dataset`, then `batch(dataset.train, seed, step, ...)`, a pure function; no loader, no state."""

from trainer.data import files as files, stdlib as stdlib, synthetic as synthetic  # they register themselves
from trainer.data.batches import batch, batches, num_windows, validation_windows
from trainer.data.cli import prepare
from trainer.data.dataset import Dataset
from trainer.data.registry import load, names, register

__all__ = ["Dataset", "batch", "batches", "load", "names", "num_windows", "prepare", "register", "validation_windows"]
