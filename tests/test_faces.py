"""`trainer` and `scaling` import what they offer when it is first used, and offer it whatever was imported before."""
from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("part", ["trainer", "scaling"])
def test_names_are_there_and_are_not_their_modules(part):
    face = importlib.import_module(part)
    modules = {path.stem for path in (ROOT / part).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    for name in modules & set(face.__all__):
        importlib.import_module(f"{part}.{name}")
    for name in face.__all__:
        value = getattr(face, name)
        assert name == "optimizers" or type(value) is not type(sys), f"{part}.{name} is a module"
    assert set(face.__all__) <= set(dir(face))
    with pytest.raises(AttributeError, match=f"module '{part}' has no attribute 'nothing'; it has "):
        face.nothing


@pytest.mark.parametrize("module, absent", [("trainer.status", "jax, flax, scipy"), ("scaling.cli", "jax, scipy, matplotlib")])
def test_quick_verbs_import_little(module, absent):
    script = f"import sys, {module}; print([name for name in '{absent}'.split(', ') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
