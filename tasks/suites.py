"""The benchmarks of `eval.suites`: their prompts as stage `source` leaves them, and the pictures that they ask for.

- The data's own prompts are GenEval records in `data/prompts.jsonl`; a benchmark's are in `data/suites/` (`tasks.suite_prompts`).
- What seed a picture has is a function of the run's seed, its suite, its prompt and its number among the prompt's pictures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from moe_core import noise
from moe_core.config import EvalConfig, SuiteConfig
from moe_core.metrics.scorer import Prompt
from tasks.places import PROMPTS, SUITES
from tasks.prompts import read_prompts

INDEX = "suites.json"


@dataclass(frozen=True)
class Suite:
    """A benchmark with its prompts; `missing` says why there are none."""

    name: str
    config: SuiteConfig
    prompts: tuple[Prompt, ...] = ()
    missing: str | None = None


@dataclass(frozen=True)
class Picture:
    """A picture that is to be made."""

    prompt: Prompt
    number: int
    """of the prompt in its suite"""
    index: int
    """of the picture among the prompt's"""
    seed: int

    @property
    def file(self) -> str:
        """Its file in the suite's folder."""
        return f"{self.number:05d}-{self.index:02d}.png"


def read(root: Path, config: EvalConfig) -> list[Suite]:
    """The suites in their order, as stage `source` left them."""
    told = json.loads((root / SUITES / INDEX).read_text(encoding="utf-8"))
    suites = []
    for name, suite in config.suites.items():
        if suite.prompts == "own":
            suites.append(own_suite(root, config))
        elif "missing" in told[name]:
            suites.append(Suite(name, suite, missing=told[name]["missing"]))
        else:
            lines = (root / SUITES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            suites.append(Suite(name, suite, tuple(Prompt(**json.loads(line)) for line in lines)))
    return suites


def own_suite(root: Path, config: EvalConfig) -> Suite:
    """The suite of the data's own prompts."""
    records = read_prompts(root / PROMPTS)
    prompts = (Prompt(f"{i:05d}", record["prompt"], record["tag"], record) for i, record in enumerate(records))
    return Suite(config.own, config.suites[config.own], tuple(prompts))


def pictures(suite: Suite, seed: int) -> list[Picture]:
    """All pictures that a suite asks for; a picture's seed is a function of (seed, suite, prompt, index) alone."""
    return [
        Picture(prompt, number, index, noise.derive_seed(seed, f"picture/{suite.name}/{prompt.id}/{index}"))
        for number, prompt in enumerate(suite.prompts)
        for index in range(suite.config.images_per_prompt)
    ]
