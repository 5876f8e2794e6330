"""Settings: one frozen dataclass per stage, and the ways to fill it."""

from gtqlora.config.export import FORMATS, ExportConfig, Format
from gtqlora.config.reading import RENAMED, STAGES, build, build_recorded, of_the_edit, to_dict
from gtqlora.config.stages import (
    BuildConfig,
    DiagnoseConfig,
    Direction,
    Dtype,
    ExpertFormat,
    Mode,
    ModelConfig,
    Objective,
    ProjectConfig,
    StageConfig,
    Target,
    TrainConfig,
    VerifyConfig,
    is_code,
)

__all__ = [
    "FORMATS",
    "RENAMED",
    "STAGES",
    "BuildConfig",
    "DiagnoseConfig",
    "Direction",
    "Dtype",
    "ExpertFormat",
    "ExportConfig",
    "Format",
    "Mode",
    "ModelConfig",
    "Objective",
    "ProjectConfig",
    "StageConfig",
    "Target",
    "TrainConfig",
    "VerifyConfig",
    "build",
    "build_recorded",
    "is_code",
    "of_the_edit",
    "to_dict",
]
