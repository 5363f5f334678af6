"""Converts a model folder without the pipeline: no DVC, Ray or training, in a few GB of memory.

    python -m tasks.convert shared FLUX/transformer out/shared --importance data/importance
    python -m tasks.convert L FLUX/transformer out/L --importance data/importance
    python -m tasks.convert M out/L out/M --importance data/importance

- `shared` and `L` start from the dense transformer; a level of `mob.levels` from the folder of the model that it groups.
- The parameters are those of params.yaml in the working directory, which `python -m tasks.params` composes.
- Without `--importance`: `moe.split: random`, nothing in `moe` that is fitted to tokens, `moe.conditioning_dim: null`, and groups that are
  written out (`mob.levels.*.*.blocks`).
- The results are those that the KD stages start from, and untrained: `dvc repro` distils them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_core import noise, stream
from moe_core.config import Params
from moe_core.errors import ConfigError, Dense2MoEError
from tasks.importance_files import Importance, load
from tasks.project import read_params


def convert(level: str, source: Path, out: Path, params: Params, found: Importance | None) -> None:
    """Converts folder `source` to `level` in folder `out`. Raises ConfigError for an unknown level, and as `moe_core.stream` does."""
    # The same seed as in the KD stages.
    moe, seed = params.moe, noise.derive_seed(params.seed, "conversion")
    levels = params.mob.levels
    if level in ("shared", "L"):
        to = stream.to_shared if level == "shared" else stream.to_moe_joint
        scores, bank, tokens = (found.scores, found.conditioning, found.tokens) if found else ({}, None, None)
        to(source, out, scores, moe, bank, seed, tokens)
    elif level in levels:
        stream.to_mob(source, out, levels[level], params.mob, found.block_change if found else None, seed)
    else:
        raise ConfigError(f"level is {level}; it must be one of {', '.join(('shared', 'L', *levels))}")


def main(arguments: list[str]) -> int:
    """0, or 2 after one clear message."""
    parser = argparse.ArgumentParser(prog="python -m tasks.convert", description=__doc__.splitlines()[0])
    parser.add_argument("level", help="shared, L, or a level of mob.levels")
    parser.add_argument("source", type=Path, help="folder of the model to convert, in diffusers' format")
    parser.add_argument("out", type=Path, help="folder that is not there yet")
    parser.add_argument("--importance", type=Path, help="folder that stage importance wrote")
    chosen = parser.parse_args(arguments)
    try:
        found = load(chosen.importance) if chosen.importance else None
        convert(chosen.level, chosen.source, chosen.out, read_params(Path.cwd()), found)
    except Dense2MoEError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
