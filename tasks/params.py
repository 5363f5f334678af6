"""Composes `params/` into `params.yaml`, as `dvc exp run -S` does: `python -m tasks.params experiment=scenes moe.top_k=4`.

The result is validated before it replaces the file.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import yaml
from dvc.utils.hydra import compose_and_dump
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from moe_core.errors import ConfigError, Dense2MoEError
from tasks import outs
from tasks.project import validated


def compose(root: Path, overrides: list[str]) -> str:
    """The text of a params.yaml; raises ConfigError for an override that Hydra or our own rules refuse."""
    with tempfile.TemporaryDirectory() as folder:
        composed = Path(folder) / "params.yaml"
        try:
            compose_and_dump(str(composed), str(root / "params"), None, "config", str(root), overrides)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(f"params/ cannot be composed with {', '.join(overrides)}: {_whole(error)}") from None
        text = composed.read_text(encoding="utf-8")
    validated(yaml.safe_load(text), "params/")
    return text


def _whole(error: BaseException) -> str:
    """The error with its causes: Hydra says what is wrong in the innermost one."""
    messages = [str(error).strip()]
    while (cause := error.__cause__) is not None:
        error = cause
        if str(error).strip() not in messages[-1]:
            messages.append(str(error).strip())
    return "; ".join(" ".join(message.split()) for message in messages)


def main(overrides: list[str]) -> int:
    """Writes ./params.yaml."""
    root = Path.cwd()
    try:
        outs.write_text(root / "params.yaml", compose(root, overrides))
    except Dense2MoEError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
