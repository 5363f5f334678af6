"""The errors this project raises on purpose. Each message names the thing, its value and the rule it breaks."""


class Dense2MoEError(Exception):
    """Base of all; a stage prints its message alone, without a traceback."""


class ConfigError(Dense2MoEError, ValueError):
    """A parameter is unknown, out of range, or contradicts another."""


class DataError(Dense2MoEError, ValueError):
    """A dataset is empty, broken beyond the stated share, or not what its manifest says."""


class CheckpointError(Dense2MoEError, ValueError):
    """A checkpoint folder is incomplete, has a wrong hash, or belongs to other parameters."""


class TrainingError(Dense2MoEError, ArithmeticError):
    """A training run went wrong by the numbers: its loss is infinite or not a number."""


class EvaluationError(Dense2MoEError, ValueError):
    """Pictures cannot be made or judged as asked: one is missing, broken or not a number, or too large for the memory."""
