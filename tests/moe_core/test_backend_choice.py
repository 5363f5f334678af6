"""The choice of a backend: measured once, remembered for this machine, agreed on by processes, and told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_core import backend_choice, backends
from moe_core.backend_choice import FIELDS, case_of, fastest
from moe_core.moe import MoELayer


@pytest.fixture(autouse=True)
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DENSE2MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backend_choice, "_known", {})
    return tmp_path / "cache" / "backends.json"


def case(tokens: int = 100, trained: bool = False, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    return case_of(torch.empty(tokens, 16, dtype=dtype), torch.empty(4, 8, 16), 2, trained)


class Counted:
    """A backend that tells how often it ran, and takes its time."""

    def __init__(self, loops: int) -> None:
        self.loops, self.calls = loops, 0

    def __call__(self) -> None:
        self.calls += 1
        for _ in range(self.loops):
            torch.ones(64, 64) @ torch.ones(64, 64)


def test_the_fastest_is_measured_once_and_remembered(own_table: Path, monkeypatch: pytest.MonkeyPatch):
    slow, fast = Counted(400), Counted(1)
    assert fastest(case(), {"slow": slow, "fast": fast}) == "fast"
    measured = slow.calls
    assert fastest(case(), {"slow": slow, "fast": fast}) == "fast"
    monkeypatch.setattr(backend_choice, "_known", {})  # another process
    assert fastest(case(), {"slow": slow, "fast": fast}) == "fast"
    assert slow.calls == measured
    # A choice among other candidates does not bind: one of them may have been installed since.
    monkeypatch.setattr(backend_choice, "_known", {})
    assert fastest(case(), {"slow": slow, "new": Counted(1)}) == "new"
    assert fastest(case(), {"slow": slow}) == "slow"


def test_cases_differ_by_what_a_choice_holds_for():
    cases = {case(), case(300), case(trained=True), case(dtype=torch.bfloat16)}
    assert len(cases) == 4
    assert case(65) == case(100) == case(128) != case(129)
    assert len(case()) == len(FIELDS)


def test_processes_agree_on_the_first_that_is_written(own_table: Path):
    first = backend_choice._write(case(), {"a": 1.0, "b": 2.0})
    later = backend_choice._write(case(), {"a": 2.0, "b": 1.0})
    assert first["backend"] == later["backend"] == "a"
    assert len(json.loads(own_table.read_text())) == 1


def test_processes_at_once_lose_nothing(own_table: Path):
    code = """
import sys, torch
from moe_core import backend_choice
for tokens in range(8):
    case = backend_choice.case_of(torch.empty(1 << tokens, 16), torch.empty(4, int(sys.argv[1]), 16), 2, False)
    backend_choice.fastest(case, {"only": lambda: None})
"""
    running = [subprocess.Popen([sys.executable, "-c", code + f"# {i}", str(i)]) for i in range(1, 3)]
    assert [process.wait(60) for process in running] == [0, 0]
    assert len(backend_choice.table()) == 16


def test_a_broken_table_is_told_and_made_anew(own_table: Path, caplog: pytest.LogCaptureFixture):
    own_table.parent.mkdir()
    own_table.write_text("{")
    assert fastest(case(), {"only": lambda: None}) == "only"
    assert str(own_table) in caplog.text
    assert [row["backend"] for row in backend_choice.table()] == ["only"]


def test_a_table_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DENSE2MOE_CACHE", str(tmp_path / "file"))
    assert fastest(case(), {"only": lambda: None}) == "only"
    assert "cannot be read" in caplog.text
    assert "not remembered" in caplog.text


def test_a_candidate_that_fails_is_left_out_and_told(own_table: Path, caplog: pytest.LogCaptureFixture):
    def broken() -> None:
        raise RuntimeError("no compiler")

    assert fastest(case(), {"broken": broken, "slow": Counted(400), "fast": Counted(1)}) == "fast"
    assert "broken failed where it was measured" in caplog.text
    assert "broken failed" in backend_choice.table()[0]["times"]
    with pytest.raises(RuntimeError, match="no compiler"):
        fastest(case(300), {"broken": broken})


def test_auto_is_one_that_can_run_and_leaves_no_gradient(own_table: Path):
    x_TD, gates_TK = torch.randn(40, 16, requires_grad=True), torch.rand(40, 2)
    indices_TK = torch.rand(40, 4).topk(2).indices
    weights = [torch.randn(*shape, requires_grad=True) for shape in ((4, 8, 16), (4, 8), (4, 16, 8))]
    assert backends.choose(x_TD, gates_TK, indices_TK, *weights) in ("by_expert", "grouped_mm")
    assert x_TD.grad is None
    assert all(weight.grad is None for weight in weights)
    [row] = backend_choice.table()
    assert row["passes"] == "forward, backward"
    assert {"by_expert", "grouped_mm"} == {entry.split()[0] for entry in row["times"].split(", ")}


@pytest.mark.parametrize("reentrant", [False, True])
def test_auto_measures_inside_a_checkpointed_block(own_table: Path, reentrant: bool):
    torch.manual_seed(0)
    layer = MoELayer(16, 16, 8, 6, 2)
    x_BTD = torch.randn(2, 20, 16, requires_grad=True)
    checkpoint(layer, x_BTD, use_reentrant=reentrant).sum().backward()
    found, x_BTD.grad = x_BTD.grad, None
    assert own_table.exists()
    layer.backend = "loop"
    layer(x_BTD).sum().backward()
    torch.testing.assert_close(found, x_BTD.grad)


def test_by_shape_asks_nobody(own_table: Path):
    x_TD, gates_TK = torch.randn(40, 16), torch.rand(40, 2)
    indices_TK = torch.rand(40, 4).topk(2).indices
    for hidden, expected in ((8, "grouped_mm"), (6, "by_expert")):  # 24 bytes are no multiple of 16
        weights = [torch.randn(*shape) for shape in ((4, hidden, 16), (4, hidden), (4, 16, hidden))]
        found = [backends.run_experts(name, x_TD, gates_TK, indices_TK, *weights) for name in ("by_shape", expected)]
        assert torch.equal(*found)
    assert not own_table.exists()


def test_command_prints_the_table(own_table: Path):
    ask = [sys.executable, "-c", "import sys; from tasks.command import main; sys.exit(main())", "backends"]
    assert "no choice" in subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    fastest(case(), {"only": lambda: None})
    printed = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    assert "| only |" in printed
    assert str(own_table) in printed
