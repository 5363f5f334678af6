"""DPG-Bench (Hu et al. 2024, ELLA): long prompts, each cut into yes/no questions that depend on each other.

- Score of a picture: the share of questions answered "yes" whose parents count too. Score: the mean over prompts x 100.
- Categories (entity, attribute, ...): the share of questions answered "yes", whatever their parents, over all questions of all pictures.
- The answers are BLIP-VQA's. The official judge is mPLUG-large of ModelScope, which transformers does not have: these scores must not be
  compared with published ones.
- Faults of the official script that are not repeated: it drops the table's first question, takes the categories from a picture grid's last
  quarter, and leaves out whatever raises an error. docs/metrics.md says more.

Source: TencentQQGYLab/ELLA dpg_bench/compute_dpg_bench.py, dpg_bench/dpg_bench.csv, dpg_bench/prompts/.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from moe_core.errors import DataError
from moe_core.metrics import vqa
from moe_core.metrics.scorer import Measure, MissingAsset, Prompt, Row, Sample, ScorerSpec

CATEGORIES = ("entity", "attribute", "relation", "global", "other")
TABLE, FOLDER = "dpg_bench.csv", "prompts"
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
"""of the table, those that are read"""
SPEC = ScorerSpec(
    name="dpg",
    load_from="moe_core.metrics.dpg:load",
    measures=(
        Measure("dpg", "score", scale=100.0),
        *(
            Measure(f"dpg_{category}", f"{category}_yes", scale=100.0, weight=f"{category}_questions")
            for category in CATEGORIES
        ),
    ),
    assets=(vqa.ASSET,),
)


@dataclass(frozen=True)
class Question:
    """A yes/no question on a prompt's picture."""

    id: int
    """unique in its prompt, from 1"""
    text: str
    parents: tuple[int, ...]
    """ids of the questions without which this one does not count"""
    category: str
    """"attribute - color"; what stands before the dash is one of CATEGORIES"""

    @property
    def broad(self) -> str:
        """Of CATEGORIES."""
        return self.category.split("-")[0].strip()


class Answerer(Protocol):
    """What is needed of a VQA model."""

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]: ...


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a folder like ELLA's dpg_bench: dpg_bench.csv and prompts/<item_id>.txt, in the table's order.

    `record` is {"questions": [...]} of `Question`'s fields. Raises MissingAsset where table or texts are not there; DataError, which names
    the file and the prompt, where the table lacks a column or has a broken row, where table and texts are not of the same prompts, and
    where a question is twice there, has an unknown category or a parent that is not there, or depends on itself.
    """
    table = path / TABLE
    texts = {file.stem: file for file in sorted((path / FOLDER).glob("*.txt"))}
    if not table.is_file() or not texts:
        raise MissingAsset(
            f"{path} has no {TABLE} or no {FOLDER}/*.txt; it must be the folder dpg_bench of ELLA's repository"
        )
    questions = _read_table(table)
    for missing, what in (
        (sorted(set(questions) - set(texts)), f"questions in {TABLE}, and no {FOLDER}/<item_id>.txt"),
        (sorted(set(texts) - set(questions)), f"a text in {FOLDER}/, and no questions in {TABLE}"),
    ):
        if missing:
            raise DataError(f"{path}: {len(missing)} prompts have {what}: {_some(missing)}")
    prompts = []
    for name, asked in questions.items():
        text = texts[name].read_text(encoding="utf-8").strip()
        if not text:
            raise DataError(f"{texts[name]} is empty; it must hold the prompt")
        ordered = parents_first(asked, f"{table}, prompt {name}")
        record = {"questions": [asdict(question) | {"parents": list(question.parents)} for question in ordered]}
        prompts.append(Prompt(name, text, record=record))
    return prompts


def parents_first(questions: Sequence[Question], where: str) -> list[Question]:
    """The same questions, in their order but for those that must wait for a parent. Raises DataError for parents that are not there, or a cycle."""
    known = {question.id for question in questions}
    if len(known) < len(questions):
        twice = sorted({q.id for q in questions if sum(other.id == q.id for other in questions) > 1})
        raise DataError(f"{where} has question {_some(twice)} twice; ids must be unique")
    for question in questions:
        missing = [parent for parent in question.parents if parent not in known]
        if missing:
            raise DataError(
                f"{where}, question {question.id} depends on question {_some(missing)}, which is not there; it has {_some(sorted(known))}"
            )
    ordered: list[Question] = []
    done: set[int] = set()
    left = list(questions)
    while left:
        ready = next((question for question in left if done.issuperset(question.parents)), None)
        if ready is None:
            raise DataError(f"{where}: questions {_some([q.id for q in left])} depend on each other in a circle")
        ordered.append(ready)
        done.add(ready.id)
        left.remove(ready)
    return ordered


def row(questions: Sequence[Question], answers: Sequence[str]) -> Row:
    """What a picture's answers come to; `questions` are ordered by `parents_first`.

    `score`: the share that counts. Per category `<category>_yes`: the share of its questions answered "yes", 0 where it has none, and
    `<category>_questions`: their number. `answers`: JSON [{id, question, category, answer, counts}].
    """
    counts: dict[int, bool] = {}
    for question, answer in zip(questions, answers, strict=True):
        counts[question.id] = answer == "yes" and all(counts[parent] for parent in question.parents)
    told = [
        {
            "id": question.id,
            "question": question.text,
            "category": question.category,
            "answer": answer,
            "counts": counts[question.id],
        }
        for question, answer in zip(questions, answers, strict=True)
    ]
    made: Row = {"score": sum(counts.values()) / len(questions), "answers": json.dumps(told)}
    for category in CATEGORIES:
        own = [a == "yes" for question, a in zip(questions, answers, strict=True) if question.broad == category]
        made[f"{category}_yes"] = sum(own) / len(own) if own else 0.0
        made[f"{category}_questions"] = float(len(own))
    return made


class DpgScorer:
    """Asks a prompt's questions of its pictures."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer

    def score(self, samples: Sequence[Sample]) -> list[Row]:
        """`row`'s columns. Raises DataError for a prompt without questions."""
        asked = [_questions(sample.prompt) for sample in samples]
        images = [sample.image for sample, own in zip(samples, asked, strict=True) for _ in own]
        answers = iter(self._answerer.answer(images, [question.text for own in asked for question in own]))
        return [row(own, [next(answers) for _ in own]) for own in asked]


def load(assets: Mapping[str, str], device: torch.device) -> DpgScorer:
    """From `blip_vqa`."""
    return DpgScorer(vqa.BlipVQA.load(assets["blip_vqa"], device))


def _questions(prompt: Prompt) -> list[Question]:
    if not prompt.record.get("questions"):
        raise DataError(f"prompt {prompt.id} has no questions; DPG-Bench's prompts are read from its folder")
    made = [Question(q["id"], q["text"], tuple(q["parents"]), q["category"]) for q in prompt.record["questions"]]
    return parents_first(made, f"prompt {prompt.id}")


def _read_table(table: Path) -> dict[str, list[Question]]:
    """The questions by prompt, both in the table's order."""
    questions: dict[str, list[Question]] = {}
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        missing = [column for column in COLUMNS if column not in (rows.fieldnames or ())]
        if missing:
            raise DataError(
                f"{table} has no column {', '.join(missing)}; its first line must name {', '.join(COLUMNS)}"
            )
        for number, line in enumerate(rows, start=1):
            where = f"{table}, row {number}"
            if any(not (line[column] or "").strip() for column in COLUMNS):
                empty = [column for column in COLUMNS if not (line[column] or "").strip()]
                raise DataError(f"{where} has nothing in {', '.join(empty)}")
            questions.setdefault(line["item_id"].strip(), []).append(_question(line, where))
    if not questions:
        raise DataError(f"{table} has no questions; it must have one a row")
    return questions


def _question(line: Mapping[str, Any], where: str) -> Question:
    number, dependency = line["proposition_id"].strip(), line["dependency"].strip()
    if not re.fullmatch(r"\d+", number) or int(number) < 1:
        raise DataError(f"{where}: proposition_id is {number!r}; it must be a whole number from 1")
    if not re.fullmatch(r"\d+(\s*,\s*\d+)*", dependency):
        raise DataError(
            f"{where}: dependency is {dependency!r}; it must be numbers of questions with commas, or 0 for none"
        )
    parents = tuple(dict.fromkeys(int(parent) for parent in dependency.split(",") if int(parent)))
    # "global - (illustration)" is of "global -": nothing after the dash.
    question = Question(
        int(number), line["question_natural_language"].strip(), parents, line["tuple"].split("(")[0].strip()
    )
    if question.broad not in CATEGORIES:
        raise DataError(
            f"{where}: tuple is {line['tuple']!r}, of category '{question.broad}'; there are {', '.join(CATEGORIES)}"
        )
    return question


def _some(names: Sequence[Any], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name) for name in names[:most]) + more
