"""Process groups: on record from the start, and gone after `stop`, whatever they do about it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from flows import processes
from tests.flows.repository import until

STUBBORN = "trap '' TERM; while :; do sleep 0.1; done"


def test_record_names_the_command_itself(tmp_path: Path) -> None:
    record = tmp_path / "groups" / "one"
    process = processes.start(["sleep", "100"], record=record, log=tmp_path / "log")
    until(record.is_file, 10)
    assert int(record.read_text()) == process.pid
    assert processes.leader(record) == process.pid
    until(lambda: psutil.Process(process.pid).name() == "sleep", 10)
    processes.stop([record])
    assert process.wait(5) < 0
    assert not record.exists()


def test_stop_ends_those_who_ignore_term_and_those_in_sessions_of_their_own(tmp_path: Path) -> None:
    record = tmp_path / "groups" / "one"
    program = f"""
import subprocess, time
subprocess.Popen(["sh", "-c", {STUBBORN!r}])
subprocess.Popen(["sh", "-c", {STUBBORN!r}], start_new_session=True)
subprocess.Popen(["env", "-i", "sleep", "100"])
time.sleep(100)
"""
    processes.start([sys.executable, "-c", program], record=record, log=tmp_path / "log")
    # The program, two shells with a sleep each now and then, and one that has dropped its environment.
    until(lambda: len(processes.members([record])) >= 4, 20)
    killed = processes.stop([record], grace_s=0.5)
    assert len(killed) >= 2
    assert not processes.members([record])


def test_orphans_are_found_after_their_leader_is_gone(tmp_path: Path) -> None:
    record = tmp_path / "groups" / "one"
    leader = processes.start(["sh", "-c", "sleep 100 & env -i sleep 100 & wait"], record=record, log=tmp_path / "log")
    until(lambda: len(processes.members([record])) == 3, 10)
    leader.kill()
    leader.wait()
    assert processes.leader(record) is None
    assert len(processes.members([record])) == 2
    processes.stop([record])
    assert not processes.members([record])


def test_a_strangers_process_with_a_recycled_number_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen(["sleep", "100"], start_new_session=True)
    try:
        record = tmp_path / "one"
        record.write_text(str(stranger.pid))
        assert processes.leader(record) is None
        processes.stop([record])
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_stop_of_nothing_is_nothing(tmp_path: Path) -> None:
    assert processes.stop([tmp_path / "never"]) == []


def test_the_output_is_in_the_log_and_the_environment_is_given(tmp_path: Path) -> None:
    process = processes.start(
        ["sh", "-c", "echo $WORD"],
        record=tmp_path / "r",
        log=tmp_path / "logs" / "log",
        env={"WORD": "hello", "PATH": os.environ["PATH"]},
    )
    assert process.wait(10) == 0
    assert (tmp_path / "logs" / "log").read_text() == "hello\n"
