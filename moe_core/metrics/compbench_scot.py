"""T2I-CompBench++'s S-CoT: ShareGPT4V describes the picture, then grades how well it fits the prompt, 1 to 5.

- The words of both questions are read from the official script, which is parsed and never run: a grade depends on the wording, and so
  none is retyped here.
- An answer that is not the JSON it was asked for counts as a full mark, as in the official script; `scot_unparsed` says how many did.
- Decoding is greedy. The official script samples (temperature 0.2, top-p 0.7) without a seed.
- One picture at a time, as there. A picture of another category gets nan: no measure looks at it.

Source: Karine-Huang/T2I-CompBench, MLLM_eval/ShareGPT4V-CoT_eval/Share_eval.py, which calls the non-spatial category "action".
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from moe_core.errors import DataError
from moe_core.metrics.loading import load_model, load_part
from moe_core.metrics.scorer import Row, Sample

OFFICIAL_NAMES = {"non_spatial": "action", "complex": "complex"}
"""our kind -> the script's category"""
GRADES = {"1": 0.2, "2": 0.4, "3": 0.6, "4": 0.8, "5": 1.0}
MOST_TOKENS = 512
"""of a description and of an answer"""


@dataclass(frozen=True)
class Questions:
    """What a category's pictures are asked."""

    opening: str
    """the system's words and the turn's begin, with the picture's place"""
    describe: str
    before: str
    """of the grading question, before the prompt"""
    after: str

    def first(self) -> str:
        """All that is said before the description."""
        return self.opening + self.describe

    def second(self, description: str, prompt: str) -> str:
        """All that is said before the grade."""
        return f"{self.first()}{description}</s> USER: {self.before}{prompt}{self.after} ASSISTANT:"


def read_questions(script: Path, category: str) -> Questions:
    """A category's questions out of the official script, without running it.

    They are: the string with "<image>" that is assigned to `prompt`; and under `args.category == "<category>"`, what is added to `prompt`,
    and the f-string that is assigned to `query`, with the prompt as its one value. Raises DataError if one of the three is not there
    just once.
    """
    try:
        tree = ast.parse(script.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{script} is no Python file; it must be the official Share_eval.py ({error})") from error
    openings = [
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and _is_name(node.targets[0], "prompt")
        and isinstance(node.value, ast.Constant)
        and "<image>" in str(node.value.value)
    ]
    own = [
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and _asks_for(node.test, category)
        for part in node.body
    ]
    added = [
        _template(part.value) for part in own if isinstance(part, ast.AugAssign) and _is_name(part.target, "prompt")
    ]
    queries = [
        _template(part.value) for part in own if isinstance(part, ast.Assign) and _is_name(part.targets[0], "query")
    ]
    if (len(openings), [len(t) for t in added], [len(t) for t in queries]) != (1, [1], [2]):
        raise DataError(
            f"{script} has {len(openings)} openings, {len(added)} descriptions and {len(queries)} gradings of category {category!r};"
            " it must have one of each, the grading with the prompt in it once: is it the official Share_eval.py?"
        )
    return Questions(str(openings[0]), added[0][0], queries[0][0], queries[0][1])


def grade(answer: str) -> float | None:
    """0.2 to 1 of the JSON's `score`, 1 to 5; None if there is none. A missing closing brace is added, as in the official script."""
    closed = answer if answer.endswith("}") else answer + '"\n}'
    try:
        parsed = json.loads(closed.replace("\n", ""))
    except ValueError:
        return None
    return GRADES.get(str(parsed.get("score"))) if isinstance(parsed, dict) else None


class ShareGpt4V:
    """ShareGPT4V in transformers' LLaVA format."""

    def __init__(self, model: Any, processor: Any, device: torch.device, most_tokens: int = MOST_TOKENS) -> None:
        self._model, self._processor, self._device, self._most_tokens = model, processor, device, most_tokens

    @classmethod
    def load(cls, folder: str, device: torch.device) -> ShareGpt4V:
        """From a folder or hub id with safetensors. Half precision on an accelerator, as in the official script.

        Raises Unloadable, or DataError where weights are missing.
        """
        from transformers import LlavaForConditionalGeneration, LlavaProcessor

        dtype = torch.float32 if device.type == "cpu" else torch.float16
        model = load_model(LlavaForConditionalGeneration, folder, "ShareGPT4V", dtype=dtype)
        processor = load_part(LlavaProcessor, folder)
        if processor.patch_size is None:
            # Saved before processors knew how many places a picture takes.
            processor.patch_size = model.config.vision_config.patch_size
            processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
            processor.num_additional_image_tokens = 1
        return cls(model.to(device).eval(), processor, device)

    @torch.inference_mode()
    def say(self, image: Image.Image, text: str) -> str:
        """What the model says after `text`, which has the picture's place "<image>" once."""
        inputs = self._processor(images=image, text=text, return_tensors="pt").to(self._device, self._model.dtype)
        said = self._model.generate(
            **inputs, do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=self._most_tokens
        )
        return self._processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


class SCotScorer:
    """Grades pictures of the non-spatial and complex categories."""

    def __init__(self, model: ShareGpt4V, questions: Mapping[str, Questions]) -> None:
        self._model, self._questions = model, questions

    def score(self, samples: Sequence[Sample]) -> list[Row]:
        """`scot`: 0.2 to 1, and 1 for an answer without a grade; `scot_unparsed`: whether it is such; `scot_answer`: its words."""
        return [self._row(sample) for sample in samples]

    def _row(self, sample: Sample) -> Row:
        questions = self._questions.get(sample.prompt.kind)
        if questions is None:
            return {"scot": math.nan, "scot_unparsed": math.nan, "scot_answer": ""}
        description = self._model.say(sample.image, questions.first())
        answer = self._model.say(sample.image, questions.second(description, sample.prompt.text))
        found = grade(answer)
        return {"scot": 1.0 if found is None else found, "scot_unparsed": float(found is None), "scot_answer": answer}


def load(assets: Mapping[str, str], device: torch.device) -> SCotScorer:
    """From `sharegpt4v` (the model) and `compbench_share_eval` (the official script)."""
    script = Path(assets["compbench_share_eval"])
    questions = {kind: read_questions(script, name) for kind, name in OFFICIAL_NAMES.items()}
    return SCotScorer(ShareGpt4V.load(assets["sharegpt4v"], device), questions)


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _asks_for(test: ast.expr, category: str) -> bool:
    """Whether a condition is `<anything>.category == "<category>"`."""
    return (
        isinstance(test, ast.Compare)
        and isinstance(test.left, ast.Attribute)
        and test.left.attr == "category"
        and isinstance(test.ops[0], ast.Eq)
        and isinstance(test.comparators[0], ast.Constant)
        and test.comparators[0].value == category
    )


def _template(node: ast.expr) -> list[str]:
    """The pieces of a string between its values; [] for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if not isinstance(node, ast.JoinedStr):
        return []
    pieces = [""]
    for part in node.values:
        if isinstance(part, ast.Constant):
            pieces[-1] += str(part.value)
        else:
            pieces.append("")
    return pieces
