"""From a frozen config to what runs: the static structure of a step and the traced numbers of a run."""
from __future__ import annotations

import numpy as np

from trainer.config.frozen import ModelSpec, OptimizerSpec, PrecisionSpec, TrainConfig
from trainer.config.policies import added_parameters, build_policy
from trainer.model import ModelConfig
from trainer.optimizers import OptimizerNumbers
from trainer.schedules import ScheduleNumbers
from trainer.step import Hyper, StepStructure


def model_config(model: ModelSpec, optimizer: OptimizerSpec | None, vocab_size: int, precision: PrecisionSpec | None = None) -> ModelConfig:
    """The decoder's sizes; muP's base width comes from the optimizer's learning-rate rule, what a precision adds to blocks from it."""
    base = optimizer.base_width if optimizer is not None and optimizer.lr_rule == "mup" else 0
    return ModelConfig(model.num_layers, model.d_model, model.num_heads, model.d_ff, vocab_size, model.tied_head,
                       model.scan_layers, model.remat, base, **({} if precision is None else added_parameters(precision)))


def step_structure(config: TrainConfig, vocab_size: int) -> StepStructure:
    """Everything about the config's step that is compiled in."""
    model = model_config(config.model, config.optimizer, vocab_size, config.precision)
    return StepStructure(model, config.optimizer.name, config.schedule.name, config.batch_size, config.seq_len, config.accumulate,
                         config.options.telemetry_every)


def hyper(config: TrainConfig) -> Hyper:
    """The traced numbers of one run, as numpy scalars."""
    o, s = config.optimizer, config.schedule
    clip = np.inf if o.clip_norm is None else o.clip_norm
    return Hyper(
        optimizer=OptimizerNumbers(*(np.float32(x) for x in (o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, clip))),
        schedule=ScheduleNumbers(np.int32(config.steps), np.int32(s.warmup_steps), np.int32(s.cooldown_steps), np.float32(s.final_factor)),
        policy=build_policy(config.precision),
        key=np.array([0, config.seed], np.uint32),
        divergence_margin=np.float32(config.divergence_margin),
    )
