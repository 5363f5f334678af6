"""The benchmarks of `eval.suites`: their prompts as stage `source` leaves them, and the pictures that they ask for.

- The data's own prompts are GenEval records in `data/prompts.jsonl`; a benchmark's are in `data/suites/` (`tasks.suite_prompts`).
- What seed a picture has is a function of the run's seed, its suite, its prompt and its number among the prompt's pictures.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
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


def read(root: Path, config: EvalConfig, collected: Path = SUITES) -> list[Suite]:
    """The suites in their order, as stage `source` left them, or whoever called `suite_prompts.collect` for another folder."""
    folder = root / collected
    told = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    suites = []
    for name, suite in config.suites.items():
        if suite.prompts == "own":
            suites.append(own_suite(root, config))
        elif "missing" in told[name]:
            suites.append(Suite(name, suite, missing=told[name]["missing"]))
        else:
            # By line feeds alone: a prompt may hold other characters at which `splitlines` parts.
            lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
            suites.append(Suite(name, suite, tuple(Prompt(**json.loads(line)) for line in lines)))
    return suites


def own_suite(root: Path, config: EvalConfig) -> Suite:
    """The suite of the data's own prompts."""
    records = read_prompts(root / PROMPTS)
    prompts = (Prompt(f"{i:05d}", record["prompt"], record["tag"], record) for i, record in enumerate(records))
    return Suite(config.own, config.suites[config.own], tuple(prompts))


def fingerprint(suite: Suite) -> str:
    """SHA-256 of a suite's prompts, with all that is said of them."""
    lines = (json.dumps(asdict(prompt), sort_keys=True) + "\n" for prompt in suite.prompts)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def pictures(suite: Suite, seed: int) -> list[Picture]:
    """All pictures that a suite asks for; a picture's seed is a function of (seed, suite, prompt, index) alone."""
    return [
        Picture(prompt, number, index, noise.derive_seed(seed, f"picture/{suite.name}/{prompt.id}/{index}"))
        for number, prompt in enumerate(suite.prompts)
        for index in range(suite.config.images_per_prompt)
    ]
