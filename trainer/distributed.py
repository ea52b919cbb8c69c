"""Several processes that run one program together (`jax.distributed`): how they meet, which one writes, what they must agree on.

Every process draws the same batches, makes the same decisions and calls the same programs in the same order; the first one alone
writes run folders and prints. With one process all of this is nothing.
"""
from __future__ import annotations

import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

SHUTDOWN_S = 30  # after an error: how long the others, which wait for this process's part, are waited for before all go down


def join(asked: bool | None) -> None:
    """Meet the other processes, before anything else is asked of JAX. asked: True or False, or None for: if Slurm started several tasks in
    this step. Who and where they are is as `jax.distributed` finds it: from Slurm, Open MPI, Kubernetes, or JAX_COORDINATOR_ADDRESS."""
    if asked is None:
        asked = slurm_tasks(os.environ) > 1
    if not asked or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(local_device_ids=local_devices(os.environ), shutdown_timeout_seconds=SHUTDOWN_S)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"distributed=true is not possible here ({str(error).splitlines()[0]}); accepted: inside srun, mpirun or a Kubernetes "
                         "job, and before JAX is used") from error


def slurm_tasks(env: Mapping[str, str]) -> int:
    """How many tasks `srun` started in this step; 1 outside one (a batch script has the job's SLURM_NTASKS, but no step)."""
    return int(env.get("SLURM_NTASKS", "1")) if "SLURM_STEP_NODELIST" in env else 1


def local_devices(env: Mapping[str, str]) -> list[int] | None:
    """What `jax.distributed.initialize` takes as local_device_ids. In a Slurm step JAX gives a process the one device of number
    SLURM_LOCALID: with one task on a node it would drive the first GPU and leave the others idle (jax issue 16788). An empty list leaves it all that
    it sees; None, with several tasks on a node, is JAX's own way of one device for each. JAX_LOCAL_DEVICE_IDS says otherwise."""
    nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
    if "JAX_LOCAL_DEVICE_IDS" in env or slurm_tasks(env) > nodes:
        return None
    return []


def several() -> bool:
    """True in a program of more than one process. Does not start JAX's backends when nobody has joined."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def leads() -> bool:
    """True in the process that writes."""
    return not several() or jax.process_index() == 0


def agreed(value: int) -> int:
    """The first process's value, in all of them: for what depends on a clock, a signal, a process id. All must ask at the same place."""
    return type(value)(multihost_utils.broadcast_one_to_all(np.int32(value))) if several() else value


def wait(place: str) -> None:
    """Until every process is at this place."""
    if several():
        multihost_utils.sync_global_devices(place)
