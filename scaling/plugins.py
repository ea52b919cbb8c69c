"""Modules of the user's that register laws (`scaling.laws.add`), imported before a verb of the command line runs."""
from __future__ import annotations

import argparse
import importlib


def module_names(text: str) -> list[str]:
    """"mine,more.laws" -> ["mine", "more.laws"], as an argparse type. Refuses what cannot name a module."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise argparse.ArgumentTypeError(f"{name!r} is not the name of a module; give NAME or NAME,NAME")
    return names


def load_plugins(names: list[str]) -> None:
    """Imports the modules in order. ValueError, one line, for one that is not found or that imports what is not found."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"--plugins {name}: cannot be imported ({error}); accepted: the name of a module on PYTHONPATH") from None
