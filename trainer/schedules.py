"""Learning-rate schedules as functions of the step and of traced numbers, so that one program serves every length.

All return a factor in [0, 1] that multiplies the peak learning rate. The update of step s (counted from 0) uses factor(s).
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScheduleNumbers:
    """Lengths in optimizer steps (int32) and the factor at the end of the decay (float32)."""

    total_steps: jax.Array
    warmup_steps: jax.Array
    cooldown_steps: jax.Array
    final_factor: jax.Array


def _f32(x):
    return jnp.asarray(x).astype(jnp.float32)


def _warmup(step, n: ScheduleNumbers):
    return jnp.minimum((_f32(step) + 1.0) / jnp.maximum(_f32(n.warmup_steps), 1.0), 1.0)


def constant(step, n: ScheduleNumbers):
    """Linear warm-up, then 1."""
    return _warmup(step, n)


def cosine(step, n: ScheduleNumbers):
    """Linear warm-up, then half a cosine from 1 to final_factor at total_steps (Loshchilov & Hutter 2017)."""
    length = jnp.maximum(_f32(n.total_steps) - _f32(n.warmup_steps), 1.0)
    progress = jnp.clip((_f32(step) - _f32(n.warmup_steps)) / length, 0.0, 1.0)
    return _warmup(step, n) * (n.final_factor + (1.0 - n.final_factor) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress)))


def wsd(step, n: ScheduleNumbers):
    """Warm-up, stable, decay: 1 until total_steps - cooldown_steps, then 1 - sqrt(progress) down to final_factor
    (Haegele et al. 2024, section 3). Until the cool-down starts it does not depend on total_steps: runs that differ only in
    length share their trunk."""
    start = _f32(n.total_steps) - _f32(n.cooldown_steps)
    progress = jnp.clip((_f32(step) - start) / jnp.maximum(_f32(n.cooldown_steps), 1.0), 0.0, 1.0)
    return _warmup(step, n) * (n.final_factor + (1.0 - n.final_factor) * (1.0 - jnp.sqrt(progress)))


SCHEDULES: dict[str, Callable] = {"constant": constant, "cosine": cosine, "wsd": wsd}
