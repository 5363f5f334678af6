"""Sections `models` and `eval`: which models are judged, and what is generated and measured."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moe_core.config.section import Section


class ClassifierConfig(Section):
    """The evaluator's digit classifier, trained on digits that no scene shows."""

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    width: int = Field(gt=0)
    test_share: float = Field(0.3, gt=0, lt=1)


class EvaluatedModel(Section):
    """A model that is evaluated, timed and reported."""

    checkpoint: str = Field(description="its transformer's folder")
    reference: str = Field(
        description="what its evaluation reads besides: the teacher's pictures, or the teacher itself"
    )


class EvalConfig(Section):
    """What is generated and measured."""

    prompts: int = Field(gt=1, description="two at least: of one picture there is no covariance, hence no FID")
    batch_size: int = Field(
        gt=0,
        description="images a unit of work, and validation samples at once; fixed, so that results do not depend on workers",
    )
    classifier: ClassifierConfig | None = Field(
        description="what finds the objects of a picture; null judges nothing, as for pictures of any kind there is no such classifier"
    )
    latency_batch_sizes: tuple[Annotated[int, Field(gt=0)], ...] = Field((1,), min_length=1)
    latency_rounds: int = Field(gt=0)
    gallery: int = Field(8, gt=0, description="prompts in the report's same-noise gallery")
