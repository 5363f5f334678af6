"""Sections `models` and `eval`: which models are judged, and what is generated and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

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


PromptFormat = Literal["own", "geneval", "dpg", "compbench", "mjhq", "text", "jsonl"]


class SuiteConfig(Section):
    """A benchmark: its prompts, how many pictures each gets, and who scores them."""

    prompts: PromptFormat = Field(
        description="own: those of stage `source`; else the format of what lies at `path`, as the benchmark publishes it"
    )
    path: Path | None = Field(None, description="file or folder with the prompts; relative to the checkout")
    count: int | None = Field(
        None, gt=1, description="so many of them, equally many of each kind, chosen by seed; null: all"
    )
    images_per_prompt: int = Field(1, gt=0)
    scorers: tuple[str, ...] = Field(min_length=1, description="by name; `dense2moe scorers` lists them")

    @model_validator(mode="after")
    def _has_prompts(self) -> SuiteConfig:
        if (self.path is None) != (self.prompts == "own"):
            raise ValueError(
                f"path is {self.path} with prompts '{self.prompts}'; prompts of a benchmark lie at a path, own ones do not"
            )
        if len(set(self.scorers)) != len(self.scorers):
            raise ValueError(f"scorers is {list(self.scorers)}; each may come once")
        return self


class ContrastiveConfig(Section):
    """The evaluator's small CLIP, trained on scenes of the evaluator's digits."""

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    scenes: int = Field(gt=0, description="training scenes")


class EvalConfig(Section):
    """What is generated and measured."""

    suites: dict[str, SuiteConfig] = Field(
        min_length=1,
        description="by name; the first is of the data's own prompts, and what latency, studies and gallery use",
    )
    models: dict[str, str] = Field(
        description="what scorers load: name of an asset -> folder, or hub id; `dense2moe scorers` says what each needs"
    )
    scoring_batch_size: int = Field(gt=0, description="pictures that a scorer is given at once; fixed, as batch_size")
    contrastive: ContrastiveConfig | None = Field(description="a CLIP for scenes; null trains none")
    prompts: int = Field(gt=1, description="two at least: of one picture there is no covariance, hence no FID")
    batch_size: int = Field(
        gt=0,
        description="images a unit of work, and validation samples at once; fixed, so that results do not depend on workers",
    )
    classifier: ClassifierConfig | None = Field(
        description="what finds the objects of a picture; null judges nothing, as for pictures of any kind there is no such classifier"
    )
    sanity: int | None = Field(
        gt=9,
        description="pictures of the teacher on which every metric must see corruption step by step; null: not tried",
    )
    latency_batch_sizes: tuple[Annotated[int, Field(gt=0)], ...] = Field((1,), min_length=1)
    latency_rounds: int = Field(gt=0)
    gallery: int = Field(8, gt=0, description="prompts in the report's same-noise gallery")

    @model_validator(mode="after")
    def _first_suite_is_own(self) -> EvalConfig:
        for name in self.suites:
            if not name.isidentifier():
                raise ValueError(f"suites has '{name}'; a name must be of letters, digits and _ alone")
        if self.sanity is not None and self.sanity > self.prompts:
            raise ValueError(
                f"sanity is {self.sanity}, but prompts is {self.prompts}; it takes the pictures of so many of them"
            )
        first = next(iter(self.suites))
        if self.suites[first].prompts != "own" or self.suites[first].images_per_prompt != 1:
            raise ValueError(f"suites.{first} is the first: its prompts must be 'own', one picture each")
        if others := [name for name, suite in self.suites.items() if suite.prompts == "own" and name != first]:
            raise ValueError(f"suites.{others[0]} has own prompts, as {first} has; one suite has them")
        return self

    @property
    def own(self) -> str:
        """Name of the suite of the data's own prompts."""
        return next(iter(self.suites))
