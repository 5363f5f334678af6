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


class FieldsConfig(Section):
    """Where a sample's values stand: keys of its JSON (WebDataset, JourneyDB, folder) or columns of the manifest.

    A dot goes into a nested object: `Task2.Caption`. A key that has the dot in its own name is found first.
    """

    caption: str = Field("txt", min_length=1, description="`txt`: the text file beside the image; else a key or column")
    image: str | None = Field(None, description="kind=manifest and journeydb: the image's path, relative to data.root")
    width: str | None = Field(None, description="pixels; with height: too small or too long is dropped unread")
    height: str | None = None
    aesthetic_score: str | None = None
    language: str | None = None
    meta: tuple[str, ...] | None = Field(None, description="keys that go into the shards' index; null: all of them")


class FiltersConfig(Section):
    """Which samples are wanted; null is no filter. What a filter drops is counted, and is not broken."""

    min_side: int | None = Field(None, gt=0, description="pixels of the image's shorter side")
    max_aspect: float | None = Field(None, ge=1, description="longer side over shorter side")
    min_aesthetic_score: float | None = None
    caption_min_chars: int | None = Field(None, gt=0)
    caption_max_chars: int | None = Field(None, gt=0)
    languages: tuple[str, ...] | None = Field(None, min_length=1)
    drop_duplicates: bool = Field(
        True, description="of images equal byte for byte the first in the source's order stays"
    )


class ShardConfig(Section):
    """How image-text pairs become shards."""

    samples_per_shard: int = Field(gt=0)
    validation_samples: int = Field(gt=0)
    calibration_samples: int = Field(gt=0)
    max_reject_share: float = Field(
        0.01, ge=0, lt=1, description="of broken samples, and of broken files; what a filter drops does not count"
    )
    batch_size: int = Field(
        64, gt=0, description="images encoded at once; fixed, so that the latents do not depend on workers"
    )
    text_embeddings: Literal["none", "stored"] = Field(
        "none", description="stored: the captions' T5 and CLIP features too, in bf16 (FLUX.1: 4 MB a sample)"
    )


class DataConfig(Section):
    """The image-text data."""

    name: str
    kind: Literal["embedded", "webdataset", "journeydb", "manifest", "folder"]
    path: str | None = Field(
        None,
        description="webdataset: a folder of .tar files. journeydb: its train/ or valid/ folder, or the .jsonl in it."
        " manifest: a .parquet or .jsonl file, or a folder of them. folder: images with their captions beside them",
    )
    root: str | None = Field(
        None,
        description="manifest, journeydb, folder: no image outside this folder is read; null: the manifest's folder, imgs/, path",
    )
    embedded: EmbeddedDataConfig | None = None
    fields: FieldsConfig
    filters: FiltersConfig
    buckets: tuple[tuple[int, int], ...] | None = Field(
        None,
        min_length=1,
        description="[width, height] pixels; an image goes to the nearest aspect ratio. null: one square of model.resolution",
    )
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
        if self.kind != "embedded" and not self.path:
            raise ValueError(f"kind is '{self.kind}'; then path must be given")
        if self.kind != "embedded" and self.embedded is not None:
            raise ValueError(
                f"kind is '{self.kind}'; then embedded must be null (the preset data={self.kind} has it so)"
            )
        return self

    @model_validator(mode="after")
    def _fields_named(self) -> DataConfig:
        fields, filters = self.fields, self.filters
        if self.kind in ("manifest", "journeydb"):
            if not fields.image:
                raise ValueError(f"kind is '{self.kind}'; then fields.image must name the field with the image's path")
            if fields.caption == "txt":
                raise ValueError(f"kind is '{self.kind}'; then fields.caption must name a field, not 'txt'")
        elif fields.image:
            raise ValueError(f"fields.image is '{fields.image}'; kind '{self.kind}' has no paths, so it must be null")
        for wanted, value, field in (
            ("min_aesthetic_score", filters.min_aesthetic_score, "aesthetic_score"),
            ("languages", filters.languages, "language"),
        ):
            if value is not None and getattr(fields, field) is None:
                raise ValueError(f"filters.{wanted} is {value}; then fields.{field} must name the field to look at")
        if (fields.width is None) != (fields.height is None):
            raise ValueError("fields.width and fields.height must both be given, or both be null")
        low, high = filters.caption_min_chars, filters.caption_max_chars
        if low is not None and high is not None and low > high:
            raise ValueError(f"filters.caption_min_chars is {low}, above caption_max_chars, {high}")
        return self

    @model_validator(mode="after")
    def _buckets_differ(self) -> DataConfig:
        seen: dict[float, tuple[int, int]] = {}
        for width, height in self.buckets or ():
            if width <= 0 or height <= 0:
                raise ValueError(f"buckets has [{width}, {height}]; sides must be positive")
            ratio = width / height
            if ratio in seen:
                raise ValueError(f"buckets has {list(seen[ratio])} and [{width}, {height}] of one aspect ratio")
            seen[ratio] = (width, height)
        return self

    def buckets_or(self, resolution: int) -> tuple[tuple[int, int], ...]:
        """The buckets; one square of `resolution` pixels where none are given."""
        return self.buckets or ((resolution, resolution),)
