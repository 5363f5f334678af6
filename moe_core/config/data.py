"""Section `data`: the image-text pairs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moe_core.config.section import Section

KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's six task kinds, by the tags of its own files."""


Kind = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]


class EmbeddedDataConfig(Section):
    """Scenes made from scikit-learn's handwritten digits."""

    samples: int = Field(gt=0)
    kinds: tuple[Kind, ...] = Field(
        min_length=1, description="drawn with equal chance; one listed twice is trained on twice as often"
    )
    canvas: int = Field(16, description="side of the picture, pixels; a multiple of 8 * grid")
    grid: int = Field(2, ge=1, le=2, description="cells a side; a cell shows one digit or nothing")
    max_digits: int = Field(4, ge=1, le=4)
    colours: tuple[str, ...] = ("red", "green", "blue", "yellow", "white")
    generator_share: float = Field(0.7, gt=0, lt=1, description="leading share of the digits that scenes may use")


class ShardConfig(Section):
    """How image-text pairs become shards."""

    samples_per_shard: int = Field(gt=0)
    validation_samples: int = Field(gt=0)
    calibration_samples: int = Field(gt=0)
    max_reject_share: float = Field(0.01, ge=0, lt=1)
    max_caption_chars: int = Field(2000, gt=0)
    batch_size: int = Field(
        64, gt=0, description="images encoded at once; fixed, so that the latents do not depend on workers"
    )


class DataConfig(Section):
    """The image-text data."""

    name: str
    kind: Literal["embedded", "webdataset"]
    path: str | None = Field(
        None, description="kind=webdataset: folder of .tar files with image, .txt and optional .json members"
    )
    embedded: EmbeddedDataConfig | None = None
    shard: ShardConfig

    @model_validator(mode="after")
    def _complete(self) -> DataConfig:
        if self.kind == "embedded" and self.embedded is None:
            raise ValueError("kind is 'embedded'; then embedded must be given")
        kept = self.shard.validation_samples + self.shard.calibration_samples
        if self.embedded is not None and self.embedded.samples <= kept:
            raise ValueError(
                f"embedded.samples is {self.embedded.samples}; shard.validation_samples + shard.calibration_samples ="
                f" {kept} leave none to train on"
            )
        if self.kind == "webdataset" and not self.path:
            raise ValueError("kind is 'webdataset'; then path must be given")
        if self.kind == "webdataset" and self.embedded is not None:
            raise ValueError("kind is 'webdataset'; then embedded must be null (the preset data=webdataset has it so)")
        return self
