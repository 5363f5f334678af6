"""Which backend is the fastest for a size: measured once on this machine, and remembered in a file.

- A case is a device, torch's version, threads, precision, number of tokens (to the next power of two), experts and widths, and whether there is a
  backward pass.
- The file is `backends.json` in `$DENSE2MOE_CACHE`, else in `dense2moe/` of the user's cache folder. `dense2moe backends` prints it; without it
  all is measured anew. What is in it stays as long as the candidates are the same: backends round
  differently, and a run that is resumed or repeated here shall give the same bits.
- Processes that measure the same case at once agree on the first result that is written.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

ROUNDS, LEAST, PATIENCE = 5, 2, 1.0
"""Timed rounds of a case at most and at least, and the seconds after which no further one begins."""

Case = tuple[str, ...]

FIELDS = ("device", "torch", "threads", "precision", "tokens", "top-k", "experts", "expert width", "width", "passes")

_known: dict[Case, str] = {}


def case_of(x_TD: Tensor, w1_EFD: Tensor, top_k: int, trained: bool) -> Case:
    """What a choice holds for, in the order of FIELDS."""
    tokens = 1 << max(len(x_TD) - 1, 0).bit_length()
    experts, expert_width, width = w1_EFD.shape
    sizes = (tokens, top_k, experts, expert_width, width)
    threads = 0 if x_TD.is_cuda else torch.get_num_threads()
    passes = "forward, backward" if trained else "forward"
    device = torch.cuda.get_device_name(x_TD.device) if x_TD.is_cuda else processor()
    precision = str(x_TD.dtype).removeprefix("torch.")
    return (device, torch.__version__, str(threads), precision, *map(str, sizes), passes)


def fastest(case: Case, candidates: Mapping[str, Callable[[], None]]) -> str:
    """The name of the candidate that took least, now or when the case was first met.

    A case that was measured among other candidates is measured anew. Raises what a candidate raised, if all of them did.
    """
    if _known.get(case) in candidates:
        return _known[case]
    found = _read().get(case)
    if found is None or found["seconds"].keys() != candidates.keys():
        found = _write(case, _measure(candidates))
    _known[case] = found["backend"]
    return _known[case]


def table() -> list[dict[str, str]]:
    """What has been measured on this machine, a row a case: FIELDS, `backend`, and `times` of the candidates."""
    rows = []
    for case, found in sorted(_read().items()):
        times = ", ".join(
            f"{name} failed" if seconds is None else f"{name} {1e3 * seconds:.3g} ms"
            for name, seconds in found["seconds"].items()
        )
        rows.append({**dict(zip(FIELDS, case)), "backend": found["backend"], "times": times})
    return rows


def path() -> Path:
    """Where choices are remembered."""
    own = os.environ.get("DENSE2MOE_CACHE")
    folder = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dense2moe"
    return folder / "backends.json"


def _measure(candidates: Mapping[str, Callable[[], None]]) -> dict[str, float | None]:
    """The least seconds of each, in turn, after one round that does not count: it takes memory and loads kernels. None: it failed."""
    seconds: dict[str, float | None] = {name: None for name in candidates}
    failed: dict[str, Exception] = {}
    began = time.perf_counter()
    for turn in range(ROUNDS + 1):
        for name, run in candidates.items():
            if name in failed:
                continue
            started = time.perf_counter()
            try:
                run()
            except Exception as error:  # noqa: BLE001 a kernel that cannot be built here must not stop a model that others can run
                log.warning("expert backend %s failed where it was measured, and is left out: %r", name, error)
                failed[name], seconds[name] = error, None
                continue
            taken = time.perf_counter() - started
            if turn:
                best = seconds[name]
                seconds[name] = taken if best is None else min(taken, best)
        if turn >= LEAST and time.perf_counter() - began > PATIENCE:
            break
    if len(failed) == len(candidates):
        raise failed[next(iter(candidates))]
    return seconds


def _read() -> dict[Case, dict[str, Any]]:
    try:
        text = path().read_text()
    except FileNotFoundError:
        return {}
    except OSError as error:
        log.warning("the table of backends cannot be read: %s: %s", path(), error)
        return {}
    try:
        return {
            tuple(entry["case"]): {"backend": entry["backend"], "seconds": dict(entry["seconds"])}
            for entry in json.loads(text)
        }
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is no table of backends (%r); it is made anew", path(), error)
        return {}


def _write(case: Case, seconds: Mapping[str, float | None]) -> dict[str, Any]:
    """Adds a case, unless another process was faster; returns what stands in the file."""
    ran = {name: taken for name, taken in seconds.items() if taken is not None}
    entry = {"backend": min(ran, key=ran.__getitem__), "seconds": dict(seconds)}
    try:
        with _locked():
            entries = _read()
            if case in entries and entries[case]["seconds"].keys() == seconds.keys():
                return entries[case]
            entries[case] = entry
            part = path().with_suffix(".partial")
            lines = [{"case": list(case), **found} for case, found in entries.items()]
            part.write_text(json.dumps(lines, indent=1) + "\n")
            part.replace(path())
    except OSError as error:
        log.warning("choice of the expert backend is not remembered: %s: %s", path(), error)
    return entry


@contextmanager
def _locked() -> Iterator[None]:
    path().parent.mkdir(parents=True, exist_ok=True)
    with path().with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@cache
def processor() -> str:
    """This machine's CPU, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
