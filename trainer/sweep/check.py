"""What a cohort's runs are to go on from, looked at before anything is compiled or written."""
from __future__ import annotations

import functools

import jax

from trainer import build, checkpoint, step
from trainer.fine_tune import given_params
from trainer.sweep.plan import Cohort


def check_beginnings(cohort: Cohort) -> None:
    """ValueError, one line, when a run's checkpoints, or those of its `init_from`, are of another model: the user's to mend, and no
    failure of the run."""
    begun = [run for run in cohort.runs if checkpoint.steps(run.folder.checkpoints)]
    for run in begun:
        state = jax.eval_shape(functools.partial(step.init, cohort.structure), build.hyper(run.config))
        checkpoint.check(run.folder.checkpoints, state)
    for source in {run.config.init_from for run in cohort.runs if run not in begun} - {None}:
        given_params(cohort.structure.model, source)
