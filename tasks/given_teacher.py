"""A teacher that is given, as a folder or on the hub: fetched, checked, its LoRA fused, and put into place.

- Only what a FluxPipeline loads is fetched and copied: no second copy of the weights in one file, no other precision, no pickle.
- Small files come first, so that a model that does not fit is refused before its weights are fetched.
- Files are copied, not linked: DVC makes outs read-only when it takes them into its cache, with `cache.type hardlink` by a link to
  the very file, which would be the user's own. A file system that can share blocks (XFS, Btrfs) does so.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_core import checkpoint
from moe_core.config import LoRAConfig, Params
from moe_core.config.given_teacher import INDEX, PARTS, WEIGHTS, check_description, check_teacher, lora_file
from moe_core.errors import ConfigError
from moe_core.flux_shapes import dense_shapes
from tasks import outs

if TYPE_CHECKING:
    from moe_core.lora import Change

SMALL = ("*.json", "*.txt", "*.model")
"""Configurations and vocabularies, in the folder of a part."""
TOP = (INDEX, "LICENSE*")
NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""Errors of file systems that cannot copy by themselves."""


def write(params: Params, folder: Path, done: Callable[[int, int], None]) -> dict[str, Any]:
    """Makes `folder`, a FluxPipeline; returns what is worth knowing of where it is from.

    `done(files written, all)` is called as it goes on. Raises ConfigError or CheckpointError, before anything is written, for
    what is no FLUX pipeline, does not fit the parameters, or cannot be fetched.
    """
    model = params.model
    lora = None if model.lora is None else _lora_file(model.lora)
    if model.source == "hub":
        source = _fetch(
            str(model.path), model.revision, [*TOP, *(f"{part}/{name}" for part in PARTS for name in SMALL)]
        )
        check_description(source, params)
        changes = _changes(lora, source)
        names = [f"{part}/{name}" for part in WEIGHTS for name in checkpoint.weight_names(source / part, WEIGHTS[part])]
        source = _fetch(str(model.path), source.name, names)
    else:
        source = Path(str(model.path))
        check_description(source, params)
        changes = _changes(lora, source)
    check_teacher(source, params)
    files = pipeline_files(source)
    transformer = set(checkpoint.weight_files(source / "transformer"))
    with outs.folder(folder) as partial:
        for number, path in enumerate(files, 1):
            target = partial / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            if model.lora is not None and path in transformer:
                _fuse(path, target, changes, model.lora.scale)
            else:
                copy(path, target)
            done(number, len(files))
    found: dict[str, Any] = {"revision": source.name} if model.source == "hub" else {}
    if model.lora is not None:
        found["lora"] = {"layers": len(changes), "scale": model.lora.scale}
    return found


def pipeline_files(source: Path) -> list[Path]:
    """The files of a pipeline folder that a FluxPipeline loads, and its licence."""
    files = [path for name in TOP for path in sorted(source.glob(name))]
    for part in PARTS:
        files += sorted(path for name in SMALL for path in (source / part).glob(name))
        files += checkpoint.weight_files(source / part, WEIGHTS[part]) if part in WEIGHTS else []
    return files


def copy(source: Path, target: Path) -> None:
    """Copies a file within the kernel; the file system shares its blocks if it can."""
    with source.open("rb") as old, target.open("xb") as new:
        left = os.fstat(old.fileno()).st_size
        try:
            while left and (count := os.copy_file_range(old.fileno(), new.fileno(), left)):
                left -= count
        except OSError as error:
            if error.errno not in NO_KERNEL_COPY:
                raise
    if left:
        shutil.copyfile(source, target)


def _changes(lora: Path | None, source: Path) -> dict[str, Change]:
    if lora is None:
        return {}
    # Torch and diffusers load where there is something to compute.
    from moe_core.lora import read_lora

    return read_lora(lora, dense_shapes(checkpoint.read_config(source / "transformer")))


def _fuse(path: Path, target: Path, changes: dict[str, Change], scale: float) -> None:
    from moe_core.lora import fuse_file  # as above

    fuse_file(path, target, changes, scale)


def _lora_file(lora: LoRAConfig) -> Path:
    if (file := lora_file(lora)) is not None:
        return file
    return _fetch(lora.path, lora.revision, [str(lora.weight_name)], "model.lora") / str(lora.weight_name)


def _fetch(repository: str, revision: str | None, names: Iterable[str], section: str = "model") -> Path:
    """The folder in the hub's own cache with the files of these names or patterns; what lies there is not fetched again."""
    # Only here: a small preset needs no hub.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    what = f"{section}.path is the hub id '{repository}'" + (f", revision '{revision}'" if revision else "")
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(names)))
    except GatedRepoError as error:
        raise ConfigError(
            f"{what}, which is gated: accept its licence at https://huggingface.co/{repository} and set HF_TOKEN to a token of"
            " that account"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"{what}, but the hub cannot be reached and its cache lacks it; fetch it once where there is a net, or use"
            f" {section}.path with a local folder"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ConfigError(f"{what}, but the hub refuses it: {error}") from error
