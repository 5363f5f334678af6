"""Files around the page cache: any place and length, any file system, memory of its own."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_core import direct
from moe_core.buffers import PAGE, SMALL, Buffers

LENGTH = 3 * PAGE + 77


def random_bytes(count: int) -> Tensor:
    return torch.randint(256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["as it is", "refused when set", "refused when used"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One that may go around its cache, one that says at once that it cannot, one that says so only when asked to read or write."""
    refused = OSError(errno.EINVAL, "Invalid argument")
    if request.param == "refused when set":

        def go_around(file: int, wanted: bool = True) -> None:
            raise refused

        monkeypatch.setattr(direct, "go_around", go_around)
    if request.param == "refused when used":

        def refusing(really: Callable[..., int]) -> Callable[..., int]:
            def call(file: int, *arguments) -> int:
                if fcntl.fcntl(file, fcntl.F_GETFL) & direct.DIRECT:
                    raise refused
                return really(file, *arguments)

            return call

        monkeypatch.setattr(os, "preadv", refusing(os.preadv))
        monkeypatch.setattr(os, "write", refusing(os.write))
    return request.param


@pytest.mark.parametrize("length", [0, 1, PAGE, LENGTH])
def test_what_is_written_page_by_page_is_read_from_anywhere(tmp_path: Path, file_system: str, length: int):
    expected, buffers = random_bytes(length), Buffers()
    path = tmp_path / "file"
    file = direct.opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for start in range(0, length, 2 * PAGE):
        part = expected[start : start + 2 * PAGE]
        block = buffers.take(len(part))[: len(part)].copy_(part)
        direct.write(file, block)
    os.close(file)
    assert path.read_bytes() == expected.numpy().tobytes()

    file = direct.opened(path, os.O_RDONLY)
    for first in (0, 1, PAGE - 1, PAGE, PAGE + 8, length):
        for end in (first, first + 1, first + PAGE, length, length + 1, length + 2 * PAGE):
            if end >= first:
                assert torch.equal(direct.read(file, buffers, first, end), expected[first:end]), (first, end)
    os.close(file)


def test_other_errors_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = direct.opened(tmp_path / "file", os.O_WRONLY | os.O_CREAT)

    def full(*arguments) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        direct.write(file, Buffers().take(PAGE))
    os.close(file)


@pytest.mark.parametrize("shape", [(3,), (SMALL,)])
def test_two_tensors_that_live_share_no_memory(shape: tuple[int, ...]):
    buffers, cpu = Buffers(), torch.device("cpu")
    first = buffers.empty(shape, torch.float32, cpu)
    part = first.fill_(1)[1:]
    del first
    second = buffers.empty(shape, torch.float32, cpu).fill_(2)
    assert part.eq(1).all()
    assert second.eq(2).all()
    assert second.is_contiguous()
    assert second.shape == shape
