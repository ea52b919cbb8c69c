"""Configuration: schemas for Hydra at the edge, `freeze` to frozen dataclasses, and a run's identity."""

from trainer.config.compose import Composer, axes, config_dir, hydra_ready
from trainer.config.freeze import freeze, load_plugins
from trainer.config.frozen import NUMERICS_VERSION, TrainConfig, digest, run_id, trunk_id

__all__ = ["NUMERICS_VERSION", "Composer", "TrainConfig", "axes", "config_dir", "digest", "freeze", "hydra_ready",
           "load_plugins", "run_id", "trunk_id"]
