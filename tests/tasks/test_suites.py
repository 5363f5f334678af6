"""Suites: a benchmark's prompts from its files to the pictures that it asks for, each with a seed of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_core.config import Params, parse
from moe_core.errors import ConfigError, DataError
from moe_core.metrics.scorer import Prompt
from tasks import suite_prompts, suites
from tasks.places import PROMPTS, SUITES

ROOT = Path(__file__).resolve().parents[2]
# Characters at which `splitlines` parts, and those that JSON writes otherwise.
ODD = 'a\u2028seven\u0085of\x1cred, "quoted" \\ é 七'
OWN = [
    {"tag": "single_object", "include": [{"class": "seven", "count": 1}], "prompt": "a seven"},
    {"tag": "colors", "include": [{"class": "four", "count": 1, "color": "red"}], "prompt": "a red four"},
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with the data's own prompts and two files of the user's."""
    (tmp_path / PROMPTS).parent.mkdir(parents=True)
    (tmp_path / PROMPTS).write_text("".join(json.dumps(record) + "\n" for record in OWN))
    (tmp_path / "mine.txt").write_text(f"{ODD}\ntwo fours\n{ODD}\n", encoding="utf-8")
    lines = [{"prompt": f"prompt {i}", "id": f"k{i}", "kind": "ab"[i % 3 == 0]} for i in range(12)]
    (tmp_path / "kinds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.fixture
def params() -> Callable[..., Params]:
    """Makes parameters with these suites beside the own one."""

    def make(seed: int = 0, **more: dict[str, Any]) -> Params:
        values = yaml.safe_load((ROOT / "params.yaml").read_text())
        values["seed"] = seed
        values["eval"]["suites"] = {"own": {"prompts": "own", "scorers": ["scenes"]}} | {
            name: {"scorers": ["clip_score"], **suite} for name, suite in more.items()
        }
        return parse(Params, values)

    return make


MINE = {"prompts": "text", "path": "mine.txt", "images_per_prompt": 3}


def test_prompts_come_back_as_the_user_wrote_them(root: Path, params: Callable[..., Params]) -> None:
    kinds = {"prompts": "jsonl", "path": "kinds.jsonl"}
    asked = params(mine=MINE, kinds=kinds)
    assert suite_prompts.collect(root, asked) == {"mine": 3, "kinds": 12}
    own, mine, found = suites.read(root, asked.eval)
    assert own.prompts == tuple(Prompt(f"{i:05d}", r["prompt"], r["tag"], r) for i, r in enumerate(OWN))
    assert [(prompt.id, prompt.text) for prompt in mine.prompts] == [
        ("00001", ODD),
        ("00002", "two fours"),
        ("00003", ODD),
    ]
    assert [prompt.kind for prompt in found.prompts] == list("baabaabaabaa")
    told = json.loads((root / SUITES / suites.INDEX).read_text())
    assert set(told["mine"]["sha256"]) == {"mine.txt"}
    assert own.missing is mine.missing is found.missing is None
    # To another place on demand; what the DAG has is left alone.
    before = (root / SUITES / suites.INDEX).read_bytes()
    other = params(kinds={**kinds, "count": 2})
    assert suite_prompts.collect(root, other, root / "else" / "where") == {"kinds": 2}
    assert (root / SUITES / suites.INDEX).read_bytes() == before
    assert len(suites.read(root, other.eval, root / "else" / "where")[1].prompts) == 2


def test_a_part_of_the_prompts_has_its_share_of_each_kind(root: Path, params: Callable[..., Params]) -> None:
    def part(seed: int, count: int) -> list[str]:
        asked = params(seed, kinds={"prompts": "jsonl", "path": "kinds.jsonl", "count": count})
        suite_prompts.collect(root, asked)
        [_, found] = suites.read(root, asked.eval)
        assert sorted(prompt.kind for prompt in found.prompts) == sorted("ab" * (count // 2))
        return [prompt.id for prompt in found.prompts]

    assert part(0, 4) == part(0, 4)
    assert set(part(0, 4)) < set(part(0, 6))
    assert len({tuple(part(seed, 4)) for seed in range(5)}) > 1


def test_a_benchmark_that_is_not_there_says_what_to_get(root: Path, params: Callable[..., Params]) -> None:
    asked = params(dpg={"prompts": "dpg", "path": "ella/dpg_bench"})
    assert suite_prompts.collect(root, asked) == {}
    [_, dpg] = suites.read(root, asked.eval)
    assert dpg.missing == (
        "eval.suites.dpg.path is ella/dpg_bench, where nothing lies; docs/metrics.md says what to fetch"
    )
    assert suites.pictures(dpg, 0) == []
    # A folder that lacks its files is a benchmark that is not there; the others go on.
    (root / "ella" / "dpg_bench").mkdir(parents=True)
    (root / "compbench").mkdir()
    asked = params(
        dpg={"prompts": "dpg", "path": "ella/dpg_bench"},
        compbench={"prompts": "compbench", "path": "compbench"},
        mine=MINE,
    )
    assert suite_prompts.collect(root, asked) == {"mine": 3}
    missing = {suite.name: suite.missing for suite in suites.read(root, asked.eval)}
    assert "has no dpg_bench.csv or no prompts/*.txt" in str(missing["dpg"])
    assert "fetch examples/dataset" in str(missing["compbench"])
    assert missing["mine"] is None


def test_a_part_has_every_kind(root: Path, params: Callable[..., Params]) -> None:
    lines = [{"prompt": f"prompt {i}", "id": f"k{i}", "kind": "abc"[i % 3]} for i in range(12)]
    (root / "three.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="count is 2, but there are 3 kinds of prompts; each must have one at least"):
        suite_prompts.collect(root, params(three={"prompts": "jsonl", "path": "three.jsonl", "count": 2}))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("mine.txt", "", r"mine\.txt is empty"),
        ("mine.txt", "a seven\n\na four\n", r"mine\.txt, line 2: the prompt is ''"),
        (
            "twice.jsonl",
            '{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n',
            r"line 2: id 'x' is that of line 1",
        ),
        ("odd.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', r"odd\.jsonl, line 2 is .* must be an object with 'prompt'"),
    ],
)
def test_files_that_are_wrong_are_named(
    root: Path, params: Callable[..., Params], name: str, content: str, told: str
) -> None:
    (root / name).write_text(content)
    with pytest.raises(DataError, match=told):
        suite_prompts.collect(
            root, params(mine={**MINE, "prompts": {"txt": "text"}.get(name[-3:], "jsonl"), "path": name})
        )
    # Nothing is left that a stage could take for prompts.
    assert not (root / SUITES).exists()


def test_suites_without_prompts_with_ids_twice_or_empty_texts_are_named() -> None:
    with pytest.raises(DataError, match="suite mine has no prompts; it must have one at least"):
        suite_prompts.check("mine", [])
    with pytest.raises(DataError, match="suite mine has the prompt id 'a' twice; ids must be unique"):
        suite_prompts.check("mine", [Prompt("a", "one"), Prompt("b", "two"), Prompt("a", "three")])
    with pytest.raises(DataError, match="suite mine: prompt 'b' is empty"):
        suite_prompts.check("mine", [Prompt("a", "one"), Prompt("b", " \n")])


def test_own_prompts_that_are_none_are_named(root: Path, params: Callable[..., Params]) -> None:
    (root / PROMPTS).write_text("")
    with pytest.raises(DataError, match=r"prompts\.jsonl is empty"):
        suites.own_suite(root, params().eval)


def test_a_pictures_seed_is_of_its_suite_prompt_and_index_alone(root: Path, params: Callable[..., Params]) -> None:
    asked = params(mine=MINE, again=MINE)
    suite_prompts.collect(root, asked)
    own, mine, again = suites.read(root, asked.eval)
    pictures = suites.pictures(mine, 0)
    assert [(p.prompt.id, p.number, p.index) for p in pictures[:4]] == [
        ("00001", 0, 0),
        ("00001", 0, 1),
        ("00001", 0, 2),
        ("00002", 1, 0),
    ]
    assert [p.file for p in pictures[2:4]] == ["00000-02.png", "00001-00.png"]
    every = [p.seed for suite in (own, mine, again) for p in suites.pictures(suite, 0)]
    assert len(set(every)) == len(every)
    assert all(0 <= seed < 2**63 for seed in every)
    assert suites.pictures(mine, 0) == pictures
    assert not {p.seed for p in suites.pictures(mine, 1)} & set(every)
    # Prompts that come or go before it, or more pictures a prompt, change none of the others' seeds.
    fewer = suites.Suite("mine", mine.config.model_copy(update={"images_per_prompt": 2}), mine.prompts[1:])
    seeds = {(p.prompt.id, p.index): p.seed for p in pictures}
    assert all(seeds[p.prompt.id, p.index] == p.seed for p in suites.pictures(fewer, 0))
    assert suites.fingerprint(mine) == suites.fingerprint(again)
    assert suites.fingerprint(mine) != suites.fingerprint(fewer)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mine": {"prompts": "text"}}, "path is None with prompts 'text'"),
        ({"mine": {"prompts": "own", "path": "x"}}, "path is x with prompts 'own'"),
        ({"mine": {"prompts": "own"}}, "suites.mine has own prompts, as own has"),
        ({"mine": {**MINE, "scorers": ["a", "a"]}}, "each may come once"),
        ({"mine": {**MINE, "scorers": []}}, "scorers"),
        ({"../mine": MINE}, "a name must be of letters, digits and _ alone"),
        ({"mine": {**MINE, "count": 1}}, "count"),
    ],
)
def test_suites_that_cannot_be_are_refused(params: Callable[..., Params], changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        params(**changes)
