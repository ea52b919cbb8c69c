"""Sweeps: many runs planned, packed into cohorts, carried out, resumed."""

from trainer.sweep.execute import execute
from trainer.sweep.plan import Plan, make_plan

__all__ = ["Plan", "execute", "make_plan"]
