"""The experiment: a typed schema, read from YAML with `key=value` overrides.

The YAML describes the experiment, not the machine. Everything is checked here, before anything starts. For
each unknown key, wrong type or invalid combination, the error has one line with the place and the remedy.
Nothing here imports torch.
"""

from disttrain.config.loading import (
    config_text,
    differences,
    dump_config,
    flatten,
    json_schema,
    load_config,
    parse_config,
    settings,
    shown,
)
from disttrain.config.schema import (
    AugmentConfig,
    ColorJitterConfig,
    Config,
    DataConfig,
    GroupConfig,
    ModelConfig,
    OptimConfig,
    OptimizerFields,
    Role,
    ScheduleConfig,
    TrainConfig,
    frozen_patterns,
    role,
)

__all__ = [
    "AugmentConfig",
    "ColorJitterConfig",
    "Config",
    "DataConfig",
    "GroupConfig",
    "ModelConfig",
    "OptimConfig",
    "OptimizerFields",
    "Role",
    "ScheduleConfig",
    "TrainConfig",
    "config_text",
    "differences",
    "dump_config",
    "flatten",
    "frozen_patterns",
    "json_schema",
    "load_config",
    "parse_config",
    "role",
    "settings",
    "shown",
]
