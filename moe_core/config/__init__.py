"""Typed parameters, one class a section of `params.yaml`.

- The sections are what `params/` composes; a key that is not listed here is an error.
- What cannot hold at once (r != r_s + n * r_n, top_k > n) is refused here, before any work.
- Nothing here says where a run takes place: `compute` is the one section that no stage's identity includes.
"""

from moe_core.config.baselines import BaselineConfig
from moe_core.config.compute import ComputeConfig, ComputingStage, StageCompute
from moe_core.config.data import (
    KINDS,
    DataConfig,
    EmbeddedDataConfig,
    FieldsConfig,
    FiltersConfig,
    Kind,
    ShardConfig,
)
from moe_core.config.evaluation import ClassifierConfig, ContrastiveConfig, EvalConfig, EvaluatedModel, SuiteConfig
from moe_core.config.kd import KDConfig, KDStageConfig, Part
from moe_core.config.model import (
    LATENT_PATCH,
    LoRAConfig,
    ModelConfig,
    TeacherTrainingConfig,
    TextConfig,
    TransformerConfig,
    VAEConfig,
)
from moe_core.config.params import Params
from moe_core.config.section import parse
from moe_core.config.sparse import MoBConfig, MoBGroupsConfig, MoBLevelConfig, MoEConfig
from moe_core.config.studies import ArmConfig, ClaimConfig, StudyConfig, arm_params
from moe_core.config.training import OptimizerConfig, TimestepConfig

__all__ = [
    "KINDS",
    "LATENT_PATCH",
    "ArmConfig",
    "BaselineConfig",
    "ClaimConfig",
    "ClassifierConfig",
    "ComputeConfig",
    "ComputingStage",
    "ContrastiveConfig",
    "DataConfig",
    "EmbeddedDataConfig",
    "EvalConfig",
    "EvaluatedModel",
    "FieldsConfig",
    "FiltersConfig",
    "KDConfig",
    "KDStageConfig",
    "Kind",
    "LoRAConfig",
    "MoBConfig",
    "MoBGroupsConfig",
    "MoBLevelConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Params",
    "Part",
    "ShardConfig",
    "StageCompute",
    "StudyConfig",
    "SuiteConfig",
    "TeacherTrainingConfig",
    "TextConfig",
    "TimestepConfig",
    "TransformerConfig",
    "VAEConfig",
    "arm_params",
    "parse",
]
