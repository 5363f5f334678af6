"""DPG-Bench: the reader on hand-made folders, the dependency rule and the aggregation by hand, and one run of a small real BLIP."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from moe_core.errors import DataError
from moe_core.metrics import aggregate, dpg
from moe_core.metrics.dpg import SPEC, DpgScorer, Question, parents_first, read_prompts, row
from moe_core.metrics.scorer import MissingAsset, Prompt, Sample
from moe_core.metrics.vqa import BlipVQA
from tests.moe_core.tiny_blip import save

HEADER = (
    "item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple",
    "question_natural_language",
)  # fmt: skip
Line = tuple[str, str, str, str, str]
"""item, number, dependency, tuple, question"""
CAT: list[Line] = [
    ("cat7", "1", "0", "entity - whole (cat)", "Is there a cat?"),
    ("cat7", "2", "1", "attribute - color (cat, red)", "Is the cat red?"),
    ("cat7", "3", "1, 4", "relation - spatial (cat, ball, on)", "Is the cat on the ball?"),
    ("cat7", "4", "0", "entity - whole (ball)", 'Is there a "ball", round?'),
]
SKY: list[Line] = [
    ("12", "1", "0", "global - (photo)", "Is it a photo?"),
    ("12", "2", "0", "other - count (cats, ==2)", "Are there two cats?"),
]


def _folder(root: Path, lines: Sequence[Line], texts: dict[str, str] | None = None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "prompts").mkdir(exist_ok=True)
    with (root / "dpg_bench.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(HEADER)
        for item, number, dependency, what, question in lines:
            table.writerow((item, "a text,\nof two lines", "", number, dependency, "x", "y", what, question))
    for name, text in (texts or {line[0]: f"the text of {line[0]} \n" for line in lines}).items():
        (root / "prompts" / f"{name}.txt").write_text(text)
    return root


def _questions(*given: tuple[int, tuple[int, ...], str]) -> list[Question]:
    return [Question(number, f"q{number}?", parents, category) for number, parents, category in given]


def test_read_prompts(tmp_path: Path):
    prompts = read_prompts(_folder(tmp_path / "dpg", [*CAT, *SKY]))
    assert [(p.id, p.text, p.kind) for p in prompts] == [("cat7", "the text of cat7", ""), ("12", "the text of 12", "")]
    # The first row counts too, and a question stands after its parents.
    assert [q["id"] for q in prompts[0].record["questions"]] == [1, 2, 4, 3]
    assert prompts[0].record["questions"][3] == {
        "id": 3,
        "text": "Is the cat on the ball?",
        "parents": [1, 4],
        "category": "relation - spatial",
    }
    assert prompts[0].record["questions"][2]["text"] == 'Is there a "ball", round?'
    assert [q["category"] for q in prompts[1].record["questions"]] == ["global -", "other - count"]
    # It is kept as JSON between stages.
    assert (
        Prompt(**json.loads(json.dumps({"id": "cat7", "text": "x", "record": prompts[0].record}))).record
        == prompts[0].record
    )


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (
            ("12", "3", "7", "entity - whole (x)", "q"),
            "prompt 12, question 3 depends on question 7, which is not there",
        ),
        (("12", "2", "0", "entity - whole (x)", "q"), "prompt 12 has question 2 twice"),
        (("12", "3", "3", "entity - whole (x)", "q"), "prompt 12: questions 3 depend on each other in a circle"),
        (("12", "3", "no", "entity - whole (x)", "q"), "row 7: dependency is 'no'; it must be numbers"),
        (("12", "3", "1,", "entity - whole (x)", "q"), "row 7: dependency is '1,'"),
        (("12", "three", "0", "entity - whole (x)", "q"), "row 7: proposition_id is 'three'"),
        (("12", "0", "0", "entity - whole (x)", "q"), "row 7: proposition_id is '0'"),
        (("12", "3", "0", "action - (x)", "q"), r"row 7: tuple is 'action - \(x\)', of category 'action'"),
        (("12", "3", "0", "entity - whole (x)", " "), "row 7 has nothing in question_natural_language"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, line: Line, fault: str):
    with pytest.raises(DataError, match=fault):
        read_prompts(_folder(tmp_path / "dpg", [*CAT, *SKY, line]))


def test_table_and_texts_must_fit(tmp_path: Path):
    with pytest.raises(DataError, match=r"1 prompts have questions in dpg_bench.csv, and no prompts/<item_id>.txt: 12"):
        read_prompts(_folder(tmp_path / "a", [*CAT, *SKY], {"cat7": "x"}))
    with pytest.raises(
        DataError, match=r"2 prompts have a text in prompts/, and no questions in dpg_bench.csv: dog, owl"
    ):
        read_prompts(_folder(tmp_path / "b", CAT, {"cat7": "x", "owl": "x", "dog": "x"}))
    with pytest.raises(DataError, match=r"cat7.txt is empty"):
        read_prompts(_folder(tmp_path / "c", CAT, {"cat7": "\n"}))
    with pytest.raises(MissingAsset, match=r"has no dpg_bench\.csv or no"):
        read_prompts(tmp_path)
    folder = _folder(tmp_path / "d", CAT)
    (folder / "dpg_bench.csv").write_text("item_id,text,dependency\ncat7,x,0\n")
    with pytest.raises(DataError, match="has no column proposition_id, tuple, question_natural_language"):
        read_prompts(folder)
    (folder / "dpg_bench.csv").write_text(",".join(HEADER) + "\n")
    with pytest.raises(DataError, match="has no questions"):
        read_prompts(folder)


def test_parents_come_first():
    questions = _questions((3, (2,), "entity"), (1, (), "entity"), (2, (1,), "entity"), (4, (), "entity"))
    assert [q.id for q in parents_first(questions, "here")] == [1, 2, 3, 4]
    with pytest.raises(DataError, match="here: questions 1, 2, 3 depend on each other in a circle"):
        parents_first(_questions((1, (3,), "x"), (2, (1,), "x"), (3, (2,), "x"), (4, (), "x")), "here")


@pytest.mark.parametrize(
    ("answers", "counted"),
    [
        (["yes"] * 5, [True] * 5),
        (["no"] * 5, [False] * 5),
        # 1 no: its child 2 and grandchild 3 do not count, although answered "yes".
        (["no", "yes", "yes", "yes", "yes"], [False, False, False, True, False]),
        # 5 has two parents, 3 and 4.
        (["yes", "yes", "yes", "no", "yes"], [True, True, True, False, False]),
        (["yes", "yes", "no", "yes", "yes"], [True, True, False, True, False]),
        (["yes", "yes", "yes", "yes", "no"], [True, True, True, True, False]),
        # Only the word itself is a yes.
        (["yes", "yes sir", "yes", "Yes", "yes"], [True, False, False, False, False]),
    ],
)
def test_children_count_with_their_parents(answers: list[str], counted: list[bool]):
    questions = _questions(
        (1, (), "entity - whole"),
        (2, (1,), "attribute - color"),
        (3, (2,), "relation - spatial"),
        (4, (), "entity - part"),
        (5, (3, 4), "other - count"),
    )
    made = row(questions, answers)
    told = json.loads(made["answers"])
    assert [entry["counts"] for entry in told] == counted
    assert [entry["answer"] for entry in told] == answers
    assert made["score"] == pytest.approx(sum(counted) / 5)
    # Categories take the bare answers.
    assert made["entity_questions"] == 2
    assert made["entity_yes"] == pytest.approx(([answers[0], answers[3]].count("yes")) / 2)
    assert made["other_yes"] == float(answers[4] == "yes")
    assert (made["global_yes"], made["global_questions"]) == (0.0, 0.0)


class _Table:
    """Answers by the picture's colour and the question; BLIP-VQA is tested in its own module's tests."""

    def __init__(self, yes: set[tuple[str, str]]) -> None:
        self._yes = yes

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        names = {(255, 0, 0): "red", (0, 0, 255): "blue"}
        return [
            "yes" if (names[i.getpixel((0, 0))], q) in self._yes else "no"
            for i, q in zip(images, questions, strict=True)
        ]


RED, BLUE = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))


def test_scores_by_hand(tmp_path: Path):
    """Two prompts of four and two questions, two pictures each."""
    cat, sky = read_prompts(_folder(tmp_path / "dpg", [*CAT, *SKY]))
    yes = {
        ("red", "Is there a cat?"),
        ("red", "Is the cat red?"),
        ("red", 'Is there a "ball", round?'),
        # Blue shows no cat, so that its colour and its place do not count.
        ("blue", "Is the cat red?"),
        ("blue", "Is the cat on the ball?"),
        ("blue", 'Is there a "ball", round?'),
        ("red", "Is it a photo?"),
        ("blue", "Is it a photo?"),
        ("blue", "Are there two cats?"),
    }
    samples = [Sample(cat, 0, RED), Sample(sky, 0, RED), Sample(cat, 1, BLUE), Sample(sky, 1, BLUE)]
    rows = DpgScorer(_Table(yes)).score(samples)
    assert [made["score"] for made in rows] == pytest.approx([3 / 4, 1 / 2, 1 / 4, 1.0])
    keys = [{"id": s.prompt.id, "kind": s.prompt.kind, "index": s.index} for s in samples]
    pictures = pd.DataFrame([key | made for key, made in zip(keys, rows, strict=True)])
    columns = sorted({c for m in SPEC.measures for c in (m.column, m.weight) if c is not None})
    prompts = aggregate.by_prompt(pictures, columns)
    values = {m.name: aggregate.estimate(prompts, m, 0, 10).value for m in SPEC.measures}
    assert values == pytest.approx(
        {
            # (mean(3/4, 1/4) + mean(1/2, 1)) / 2
            "dpg": 62.5,
            # cat: yes, no; ball: yes, yes
            "dpg_entity": 75.0,
            "dpg_attribute": 100.0,
            # on the ball: no on red, yes on blue
            "dpg_relation": 50.0,
            "dpg_global": 100.0,
            "dpg_other": 50.0,
        }
    )


def test_categories_count_questions_not_prompts():
    # One prompt with three entities, none found; one with one, found: 1 of 4, not a half.
    three = row(_questions(*((i, (), "entity - whole") for i in (1, 2, 3))), ["no"] * 3)
    one = row(_questions((1, (), "entity - whole")), ["yes"])
    pictures = pd.DataFrame([{"id": n, "kind": "", "index": 0} | made for n, made in (("a", three), ("b", one))])
    entity = next(m for m in SPEC.measures if m.name == "dpg_entity")
    prompts = aggregate.by_prompt(pictures, ["entity_yes", "entity_questions"])
    assert aggregate.estimate(prompts, entity, 0, 10).value == pytest.approx(25.0)


def test_a_run_of_blip(tmp_path: Path):
    """The rows are what the model says of each picture and question alone."""
    weights = save(tmp_path / "blip")
    cat, sky = read_prompts(_folder(tmp_path / "dpg", [*CAT, *SKY]))
    samples = [Sample(cat, 0, RED), Sample(sky, 0, BLUE), Sample(cat, 1, BLUE)]
    scorer = SPEC.load({"blip_vqa": weights}, torch.device("cpu"))
    rows = scorer.score(samples)
    blip = BlipVQA.load(weights, torch.device("cpu"))
    for sample, made in zip(samples, rows, strict=True):
        told = [entry["answer"] for entry in json.loads(made["answers"])]
        assert told == [blip.answer([sample.image], [q["text"]])[0] for q in sample.prompt.record["questions"]]
        assert scorer.score([sample]) == [made]


def test_faults_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="prompt 9 has no questions"):
        DpgScorer(_Table(set())).score([Sample(Prompt("9", "x"), 0, RED)])
    with pytest.raises(MissingAsset, match="dpg needs BLIP-VQA, Salesforce/blip-vqa-capfilt-large"):
        SPEC.load({}, torch.device("cpu"))
    with pytest.raises(MissingAsset, match=r"has no config\.json, model\.safetensors"):
        dpg.SPEC.load({"blip_vqa": str(tmp_path)}, torch.device("cpu"))
