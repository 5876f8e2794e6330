"""Settings: one frozen dataclass per stage, and the ways to fill it."""

from gtqlora.config.building import BuildConfig
from gtqlora.config.export import FORMATS, ExportConfig, Format
from gtqlora.config.judges import is_code, must_be_named
from gtqlora.config.reading import JUDGE_KEYS, RENAMED, STAGES, build, build_recorded, of_the_edit, to_dict
from gtqlora.config.stages import (
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
)

__all__ = [
    "FORMATS",
    "JUDGE_KEYS",
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
    "must_be_named",
    "of_the_edit",
    "to_dict",
]
