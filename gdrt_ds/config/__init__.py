"""The settings of a run: `RunConfig` is the whole tree, `load_config` reads a file and overrides."""

from gdrt_ds.config.base import PartName, Section
from gdrt_ds.config.derived import block_samples, micro_batch_size
from gdrt_ds.config.loading import dump_config, known_keys, load_config
from gdrt_ds.config.model_section import LoraSection, ModelSection, TinySection
from gdrt_ds.config.objective_sections import DroSection, GroupsSection, ObjectiveOptions
from gdrt_ds.config.sections import (
    DataSection,
    LogSection,
    PromptSection,
    RunConfig,
    RunSection,
    TrainSection,
)

__all__ = [
    "DataSection",
    "DroSection",
    "GroupsSection",
    "LogSection",
    "LoraSection",
    "ModelSection",
    "ObjectiveOptions",
    "PartName",
    "PromptSection",
    "RunConfig",
    "RunSection",
    "Section",
    "TinySection",
    "TrainSection",
    "block_samples",
    "dump_config",
    "known_keys",
    "load_config",
    "micro_batch_size",
]
