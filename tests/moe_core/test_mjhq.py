"""MJHQ-30K's prompts, the part of them that is taken, and prompts of one's own."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from moe_core.errors import DataError
from moe_core.metrics import aggregate, clip_score, image_reward, mjhq, mps, plain_prompts
from moe_core.metrics.scorer import Prompt, ScorerSpec


def _written(folder: Path, text: str | bytes) -> Path:
    path = folder / "prompts"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def _set(**sizes: int) -> list[Prompt]:
    return [Prompt(f"{kind}{i}", f"a {kind}", kind) for kind, size in sizes.items() for i in range(size)]


def _ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


def test_reads_the_official_form(tmp_path: Path):
    meta = {
        "b1": {"category": "people", "prompt": "an old man, studio light — 35 mm"},
        "a0": {"category": "logo", "prompt": "a fox ", "aspect": "1:1"},
        "c2": {"category": "logo", "prompt": "a fox "},
    }
    assert mjhq.read_prompts(_written(tmp_path, json.dumps(meta, ensure_ascii=False))) == [
        Prompt("b1", "an old man, studio light — 35 mm", "people"),
        Prompt("a0", "a fox ", "logo", {"aspect": "1:1"}),
        Prompt("c2", "a fox ", "logo"),
    ]


GOOD = '"a": {"category": "art", "prompt": "x"}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{" + GOOD, "no JSON"),
        ("[1]", "no object with prompts"),
        ("{}", "no object with prompts"),
        ("{" + GOOD + ", " + GOOD + "}", "the key 'a' twice"),
        ('{"a": {"category": "art", "prompt": "x", "prompt": "y"}}', "the key 'prompt' twice"),
        ('{"a": "x"}', "prompt 'a' is 'x'; it must be an object"),
        ('{"a": {"category": "art"}}', "prompt 'a': prompt is None"),
        ('{"a": {"category": "art", "prompt": " "}}', "prompt 'a': prompt is ' '"),
        ('{"a": {"category": "art", "prompt": 3}}', "prompt 'a': prompt is 3"),
        ('{"a": {"category": "", "prompt": "x"}}', "prompt 'a': category is ''"),
        ('{"": {"category": "art", "prompt": "x"}}', "without an id"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_faults_of_the_official_form_are_named(tmp_path: Path, text: str | bytes, said: str):
    path = _written(tmp_path, text)
    with pytest.raises(DataError, match=said) as error:
        mjhq.read_prompts(path)
    assert str(path) in str(error.value)


def test_each_kind_gives_as_many():
    prompts = _set(art=50, food=30, logo=40)
    kinds = Counter(prompt.kind for prompt in mjhq.stratified(prompts, 30, seed=1))
    assert kinds == {"art": 10, "food": 10, "logo": 10}
    kinds = Counter(prompt.kind for prompt in mjhq.stratified(prompts, 31, seed=1))
    assert sorted(kinds.values()) == [10, 10, 11]


def test_a_small_kind_gives_all_it_has():
    kinds = Counter(prompt.kind for prompt in mjhq.stratified(_set(art=50, food=2, logo=40), 22, seed=1))
    assert kinds == {"art": 10, "food": 2, "logo": 10}


def test_the_part_depends_on_seed_and_ids_alone():
    prompts = _set(art=40, food=40)
    part = mjhq.stratified(prompts, 20, seed=3)
    assert _ids(part) == [prompt.id for prompt in prompts if prompt in part]
    mixed = prompts.copy()
    random.Random(0).shuffle(mixed)
    assert set(_ids(mjhq.stratified(mixed, 20, seed=3))) == set(_ids(part))
    assert set(_ids(mjhq.stratified(prompts, 20, seed=4))) != set(_ids(part))
    assert set(_ids(part)) < set(_ids(mjhq.stratified(prompts, 33, seed=3)))
    assert mjhq.stratified(prompts, 80, seed=3) == prompts


def test_the_part_is_the_same_in_every_version():
    # sha256sum of "0/a" to "0/e" begins with d321, 7d9a, 2881, 9d84, 7ed4.
    assert _ids(mjhq.stratified([Prompt(key, "x") for key in "abcde"], 2, seed=0)) == ["b", "c"]


@pytest.mark.parametrize("count", [0, -1, 6])
def test_impossible_counts_are_refused(count: int):
    with pytest.raises(DataError, match=f"{count} prompts are asked for, but there are 5"):
        mjhq.stratified(_set(art=5), count, seed=0)


def test_ids_that_come_twice_are_refused():
    with pytest.raises(DataError, match="4 prompts but 2 ids"):
        mjhq.stratified(_set(art=2) + _set(art=2), 1, seed=0)


def test_text_has_a_prompt_a_line(tmp_path: Path):
    path = _written(tmp_path, "\ufeffa cat\r\na dog\u2028at night\n a cat\n")
    assert plain_prompts.read_text(path) == [
        Prompt("00001", "a cat"),
        Prompt("00002", "a dog\u2028at night"),
        Prompt("00003", " a cat"),
    ]
    assert len(plain_prompts.read_text(_written(tmp_path, "one\ntwo"))) == 2


@pytest.mark.parametrize(
    ("text", "said"), [("", "is empty"), ("a\n\nb\n", "line 2: the prompt is ''"), ("a\n \n", "line 2")]
)
def test_faults_of_text_are_named(tmp_path: Path, text: str, said: str):
    path = _written(tmp_path, text)
    with pytest.raises(DataError, match=said) as error:
        plain_prompts.read_text(path)
    assert str(path) in str(error.value)


def test_jsonl_may_say_id_and_kind(tmp_path: Path):
    records: list[dict[str, Any]] = [
        {"prompt": "a cat"},
        {"prompt": "a dog", "id": 7, "kind": "animals"},
        {"id": "x", "prompt": "a cat"},
    ]
    path = _written(tmp_path, "\n".join(map(json.dumps, records)) + "\n")
    assert plain_prompts.read_jsonl(path) == [
        Prompt("00001", "a cat"),
        Prompt("7", "a dog", "animals"),
        Prompt("x", "a cat"),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "line 2 is no JSON"),
        ("a dog", "line 2 is no JSON"),
        ('"a dog"', "an object with 'prompt'"),
        ('{"text": "a dog"}', "an object with 'prompt'"),
        ('{"prompt": ""}', "the prompt is ''"),
        ('{"prompt": ["a dog"]}', r"the prompt is \['a dog'\]"),
        ('{"prompt": "a dog", "tag": "x"}', "key 'tag' is unknown"),
        ('{"prompt": "a dog", "id": true}', "id is True"),
        ('{"prompt": "a dog", "id": ""}', "id is ''"),
        ('{"prompt": "a dog", "id": 1.5}', "id is 1.5"),
        ('{"prompt": "a dog", "kind": 1}', "kind is 1"),
        ('{"prompt": "a dog", "id": "one"}', "id 'one' is that of line 1 too"),
    ],
)
def test_faults_of_jsonl_are_named(tmp_path: Path, line: str, said: str):
    path = _written(tmp_path, '{"prompt": "a cat", "id": "one"}\n' + line + "\n")
    with pytest.raises(DataError, match=said) as error:
        plain_prompts.read_jsonl(path)
    assert f"{path}, line 2" in str(error.value)


def test_an_own_id_must_not_be_a_lines_number(tmp_path: Path):
    path = _written(tmp_path, '{"prompt": "a", "id": "00002"}\n{"prompt": "b"}\n')
    with pytest.raises(DataError, match="id '00002' is that of line 1 too"):
        plain_prompts.read_jsonl(path)


@pytest.mark.parametrize("spec", [clip_score.SPEC, image_reward.SPEC, mps.SPEC], ids=lambda spec: spec.name)
def test_a_score_is_the_mean_over_prompts_and_told_by_category(spec: ScorerSpec):
    (measure,) = spec.measures
    rows = [
        ("a", "art", 0, 1.0),
        ("a", "art", 1, 3.0),
        ("b", "art", 0, 5.0),
        ("c", "food", 0, -1.0),
        ("c", "food", 1, -3.0),
    ]
    table = aggregate.by_prompt(pd.DataFrame(rows, columns=["id", "kind", "index", measure.column]), [measure.column])
    found = aggregate.estimate(table, measure, seed=0)
    assert (found.value, found.count) == (pytest.approx((2 + 5 - 2) / 3), 3)
    kinds = aggregate.by_kind(table, measure, seed=0)
    assert {kind: told.value for kind, told in kinds.items()} == {"art": pytest.approx(3.5), "food": pytest.approx(-2)}
    assert measure.by_kind
    assert measure.rising
