"""Fingerprints from a real DVC repository, and the resume folder that bears one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moe_core.errors import CheckpointError, ConfigError, DataError
from tasks.fingerprint import Identity, identify
from tasks.resume import ResumeFolder


def test_the_identity_is_what_dvc_hashes(project: Path) -> None:
    [first] = identify(project, "first")
    assert first.params == {"seed": 0, "moe.top_k": 2}
    assert first.deps["data/set"].endswith(".dir")
    assert first.data() == {"data/set": first.deps["data/set"]}
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q", "first"], check=True, capture_output=True)
    locked = yaml.safe_load((project / "dvc.lock").read_text())["stages"]["first"]
    assert {dep["path"]: dep["md5"] for dep in locked["deps"]} == first.deps
    assert identify(project, "first") == [first]


def test_code_data_and_listed_params_change_it_and_nothing_else_does(project: Path) -> None:
    [before] = identify(project, "first")
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["compute"]["num_workers"] = 7
    params["moe"]["split"] = "random"
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    assert identify(project, "first")[0].fingerprint == before.fingerprint
    params["moe"]["top_k"] = 3
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    after = identify(project, "first")[0]
    assert after.fingerprint != before.fingerprint
    assert before.difference(after) == ["parameter moe.top_k is 2 here and 3 there"]
    (project / "code.py").write_text("# other code\n")
    assert "dependency code.py" in after.difference(identify(project, "first")[0])[0]


def test_a_level_of_a_foreach_has_its_own(project: Path) -> None:
    medium, small = identify(project, "level@M", "level@S")
    assert medium.stage == "level@M"
    assert medium.fingerprint != small.fingerprint
    assert list(small.params) == ["mob.levels.S"]


def test_unknown_stage_and_missing_data_are_named(project: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing is no stage of dvc\.yaml; its stages are first, level@M"):
        identify(project, "nothing")
    (project / "code.py").unlink()
    with pytest.raises(DataError, match=r"code\.py, which stage first depends on, does not exist; `dvc repro first`"):
        identify(project, "first")


IDENTITY = Identity("stage", {"code.py": "1"}, {"seed": 0})


def test_a_finished_stage_leaves_no_folder(tmp_path: Path) -> None:
    with ResumeFolder(tmp_path, IDENTITY) as folder:
        (folder.path / "checkpoint").touch()
    with ResumeFolder(tmp_path, IDENTITY) as folder:
        assert (folder.path / "checkpoint").exists()
        folder.finish()
    assert not folder.path.exists()


def test_a_folder_of_other_parameters_is_refused_with_the_difference(tmp_path: Path) -> None:
    with ResumeFolder(tmp_path, IDENTITY) as folder:
        pass
    other = Identity("stage", {"code.py": "1"}, {"seed": 1})
    folder.path.rename(tmp_path / f"stage-{other.fingerprint}")
    with pytest.raises(
        CheckpointError, match="belongs to other parameters: parameter seed is 1 here and 0 there; remove"
    ):
        with ResumeFolder(tmp_path, other):
            pass
    (tmp_path / f"stage-{other.fingerprint}" / "identity.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        with ResumeFolder(tmp_path, other):
            pass


HOLD = """
import sys, time
from pathlib import Path
from tasks.fingerprint import Identity
from tasks.resume import ResumeFolder
with ResumeFolder(Path(sys.argv[1]), Identity("stage", {"code.py": "1"}, {"seed": 0})) as folder:
    print("held", flush=True)
    sys.stdin.readline()
    folder.finish()
    print(folder.path.exists(), flush=True)
"""


def test_a_second_equal_run_waits_and_finds_what_the_first_left(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)], cwd=root, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )

    first = start()
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    second = start()
    assert second.stderr is not None
    assert "another run holds" in second.stderr.readline()
    told, _ = first.communicate("go\n", timeout=30)
    assert told == "True\n"
    told, _ = second.communicate("go\n", timeout=30)
    assert told == "held\nFalse\n"


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.communicate()
    with ResumeFolder(tmp_path, IDENTITY) as folder:
        assert json.loads((folder.path / "identity.json").read_text())["params"] == {"seed": 0}


HALF_WRITTEN = """
import sys, time
from pathlib import Path
from dvc.repo import Repo
with Repo(".") as repo, repo.lock:
    Path("dvc.lock").write_text("schema: '2.0'\\nstages:\\n  first:\\n    cmd")
    print("half", flush=True)
    time.sleep(2)
    Path("dvc.lock").unlink()
"""


def test_a_lock_file_that_another_stage_is_writing_is_waited_for(project: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HALF_WRITTEN], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        assert identify(project, "first")[0].stage == "first"
        assert writer.wait() == 0
