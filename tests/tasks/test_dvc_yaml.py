"""dvc.yaml against the code: every module and parameter that a stage uses is listed, and no more re-runs than must."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo

from moe_core.config import Params, parse
from moe_core.errors import ConfigError
from tasks.params import compose
from tasks.tracking import flatten
from tests.tasks.imports import ROOT, closure, direct

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pygtrie", "ignore::DeprecationWarning:dvc")

CONFIG = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "moe_core" / "config").glob("*.py")
    # What it makes of an arm stands in no file of parameters.
    if path.name != "studies.py"
)
PLUMBING = {
    "moe_core/errors.py": "messages",
    **dict.fromkeys(CONFIG, "checks values; every value that is used stands in params.yaml (tested below)"),
    "moe_core/checkpoint.py": "refuses folders that are no whole checkpoint; what passes is read elsewhere",
    "moe_core/flux_shapes.py": "what such a check compares with",
    "moe_core/lora_shapes.py": "the same for a LoRA",
    "moe_core/folders.py": "moves finished folders into place",
    "moe_core/training.py": "a protocol: types alone",
    "moe_core/dtensors.py": "where weights lie (tested: equal to one worker's)",
    "moe_core/sharding.py": "the same",
    "moe_core/buffers.py": "memory that is used again",
    "moe_core/backend_choice.py": "takes one of several backends that are equal to rounding (tested)",
    "moe_core/shards.py": "reads and writes tensors as they are (tested)",
    "tasks/stage.py": "opens and closes what a stage runs in",
    "tasks/tracking.py": "MLflow; writes no out",
    "tasks/progress.py": "how far a stage is; writes no out",
    "tasks/leftovers.py": "refuses to run where something lies that no stage makes",
    "tasks/project.py": "where the checkout is",
    "tasks/places.py": "paths, which dvc.yaml has as well",
    "tasks/fingerprint.py": "hashes what is listed here",
    "tasks/resume.py": "a resumed run ends as one never killed (tested)",
    "tasks/checkpoints.py": "the same",
    "tasks/phase.py": "hands a job over to the workers",
    "tasks/launch.py": "starts workers",
    "tasks/run_training.py": "starts the loop, which is listed: tasks/training.py",
    "tasks/cluster.py": "starts or joins Ray",
    "tasks/ray_settings.py": "what Ray is told",
    "tasks/actors.py": "deals units of work to processes (tested: the same for any number of them)",
    "moe_core/compiling.py": "the same blocks through a compiler (tested: equal to rounding)",
    "tasks/outs.py": "moves finished files into place",
}
"""Modules that run a stage without deciding its result, and why: a change to them must not train a teacher anew."""
DVC = [sys.executable, "-m", "dvc"]
LOOP = {"tasks/training.py", "tasks/optimizer.py", "tasks/curves.py", "tasks/worker.py", "moe_core/muon.py"}


@pytest.fixture(scope="module")
def stages() -> dict[str, Any]:
    """Address -> resolved stage."""
    with Repo(str(ROOT)) as repo:
        return {stage.name: stage for stage in repo.index.stages if hasattr(stage, "name")}


def needed(module: str) -> set[str]:
    """What the stage's result depends on, by its imports; plumbing is not entered, the loop counts where it is started."""
    found: set[str] = set()
    todo = {module}
    while todo:
        name = todo.pop()
        if name in PLUMBING:
            if name == "tasks/run_training.py":
                todo |= LOOP - found
            continue
        found.add(name)
        todo |= {path.relative_to(ROOT).as_posix() for path in direct(ROOT / name)} - found
    return found


def modules(listed: str) -> set[str]:
    """A listed module, or those of a listed package."""
    found = (ROOT / listed).glob("*.py") if listed.startswith(("moe_core/", "tasks/")) else ()
    return {listed} if listed.endswith(".py") else {path.relative_to(ROOT).as_posix() for path in found}


def test_every_stage_lists_the_modules_that_it_uses_and_no_others(stages: dict[str, Any]) -> None:
    for address, stage in stages.items():
        module = f"tasks/{address.partition('@')[0]}.py"
        listed = {file for dep in stage.deps for file in modules(dep.def_path)}
        assert listed == needed(module), f"{address}: missing {needed(module) - listed}, idle {listed - needed(module)}"


def test_plumbing_is_real_and_free_of_science() -> None:
    for name in PLUMBING:
        assert (ROOT / name).is_file(), name
    assert set(closure(ROOT / "tasks/stage.py")) <= set(PLUMBING) | {
        "tasks/curves.py",
        "moe_core/references.py",
        "moe_core/config/studies.py",
    }


def test_no_stage_depends_on_where_it_runs(stages: dict[str, Any]) -> None:
    for address, stage in stages.items():
        keys = [key for dep in stage.deps for key in getattr(dep, "params", ())]
        assert keys, address
        assert not [key for key in keys if key.split(".")[0] == "compute"], address


def used_params(name: str) -> set[str]:
    """Dotted parameters that a module reads off something called params or config: what can be seen in its source."""
    sections = set(Params.model_fields)
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        chain: list[str] = []
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in ("params", "config", "p"):
            chain.insert(0, node.id)
            path = chain[1:]
            if path and path[0] in sections and len(path) > 1 and not path[1].startswith("model_"):
                found.add(".".join(path[:2]))
    return found


def test_every_parameter_that_a_stage_reads_is_listed(stages: dict[str, Any]) -> None:
    for address, stage in stages.items():
        keys = {key for dep in stage.deps for key in getattr(dep, "params", ())}
        for module in needed(f"tasks/{address.partition('@')[0]}.py"):
            for used in used_params(module):
                section = used.split(".")[0]
                if section == "compute" or module.startswith("tasks/report"):
                    continue
                listed = section in keys or any(
                    k == used or k.startswith(used + ".") or used.startswith(k + ".") for k in keys
                )
                assert listed, f"{address}: {module} reads {used}"


def test_params_yaml_is_composed_and_has_every_key_so_that_no_default_in_code_can_change_a_result() -> None:
    text = (ROOT / "params.yaml").read_text()
    assert compose(ROOT, []) == text
    assert_complete(yaml.safe_load(text))


@pytest.mark.parametrize("preset", sorted(path.stem for path in (ROOT / "params" / "experiment").glob("*.yaml")))
def test_every_preset_has_every_key(preset: str) -> None:
    own_data = "override /data: webdataset" in (ROOT / "params" / "experiment" / f"{preset}.yaml").read_text()
    values = yaml.safe_load(compose(ROOT, [f"experiment={preset}", *(["data.path=/tars"] if own_data else [])]))
    assert_complete(values)


@pytest.mark.parametrize("preset", sorted(path.stem for path in (ROOT / "params" / "compute").glob("*.yaml")))
def test_every_compute_preset_has_every_key(preset: str) -> None:
    assert_complete(yaml.safe_load(compose(ROOT, [f"compute={preset}"])))


def assert_complete(values: dict[str, Any]) -> None:
    whole = parse(Params, values).model_dump(mode="json")
    assert sorted(flatten(whole).keys() - flatten(values).keys()) == [], "keys whose value is a default of the code"
    assert whole == values


def test_an_override_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match="params/ cannot be composed with"):
        compose(ROOT, ["experiment=nothing"])
    with pytest.raises(ConfigError, match="params/: moe: top_k is 13, but there are 12 experts"):
        compose(ROOT, ["moe.top_k=13"])


def changed(folder: Path) -> set[str]:
    """Stages that DVC would run, by what it says of their own deps and params: those downstream follow from the graph."""
    with Repo(str(folder)) as repo, repo.lock:
        graph = repo.index.graph
        own = {stage for stage in repo.index.stages if hasattr(stage, "name") and stage.changed_deps()}
        follow = {s.name for s in graph if hasattr(s, "name") for o in own if s is o or _reaches(graph, s, o)}
    return {name.partition("@")[0] if name.startswith(("mob", "generate", "evaluate")) else name for name in follow}


def _reaches(graph: Any, consumer: Any, producer: Any) -> bool:
    todo, seen = [consumer], set()
    while todo:
        here = todo.pop()
        for upstream in graph.successors(here):
            if upstream is producer:
                return True
            if upstream not in seen:
                seen.add(upstream)
                todo.append(upstream)
    return False


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A copy of the project whose outs are dummies that DVC takes for finished: `dvc commit` writes dvc.lock from them."""
    for name in ("tasks", "moe_core", "params"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, tmp_path / name)
    for command in (["git", "init", "-q"], [*DVC, "init", "-q"]):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    with Repo(str(tmp_path)) as repo:
        paths = {out.def_path for stage in repo.index.stages for out in stage.outs}
        parts = {dep.def_path for stage in repo.index.stages for dep in stage.deps}
    for path in sorted(paths):
        if Path(path).suffix:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(path)
        else:
            (tmp_path / path).mkdir(parents=True, exist_ok=True)
            (tmp_path / path / "file").write_text(path)
    for path in sorted(parts):
        if not (tmp_path / path).exists():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            if Path(path).suffix:
                (tmp_path / path).write_text(path)
            else:
                (tmp_path / path).mkdir()
                (tmp_path / path / "file").write_text(path)
    subprocess.run([*DVC, "commit", "-q", "-f"], cwd=tmp_path, check=True, capture_output=True)
    assert changed(tmp_path) == set()
    return tmp_path


def test_a_parameter_re_runs_what_it_touches_and_no_more(finished: Path) -> None:
    text = (finished / "params.yaml").read_text()

    def after(*path: str, value: Any) -> set[str]:
        values = yaml.safe_load(text)
        section = values
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value
        (finished / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return changed(finished)

    judged = {"evaluate", "report"}
    shown = {"generate", "latency", *judged}
    assert after("mob", "alpha", value=0.25) == {"mob_kd", *shown}
    assert after("kd", "mob", "lambda_balance", value=0.5) == {"mob_kd", *shown}
    assert after("mob", "levels", "M", "double", "size", value=2) == {"mob_kd", *shown}
    assert after("moe", "top_k", value=1) == {"shared_expert_kd", "moe_kd", "mob_kd", *shown}
    assert after("eval", "latency_rounds", value=2) == {"latency", "report"}
    assert after("eval", "scoring_batch_size", value=3) == {"sanity", *judged}
    assert after("model", "num_inference_steps", value=3) == {"sanity", *shown}
    assert after("compute", "num_workers", value=2) == set()
    (finished / "params.yaml").write_text(text)
    (finished / "tasks" / "tracking.py").write_text("# other\n")
    assert changed(finished) == set()
    (finished / "tasks" / "evaluate.py").write_text("# other\n")
    assert changed(finished) == judged
    # A scorer more makes no picture again.
    (finished / "moe_core" / "metrics" / "registry.py").write_text("# other\n")
    assert changed(finished) == {"sanity", *judged}
