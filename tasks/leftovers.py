"""What a former experiment with other models left, where stages read whole folders: `python -m tasks.leftovers` removes it.

DVC removes a stage's outs before it runs, but not those of a stage that the experiment no longer has.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection
from pathlib import Path

from moe_core.errors import ConfigError, Dense2MoEError
from tasks.places import BASELINES, CURVES, EVALUATIONS, IMAGES, INSPECTIONS, MOB, STAGE_REPORTS, STUDIES, STUDY_REPORTS
from tasks.project import read_params


def find(root: Path, models: Collection[str], studies: Collection[str]) -> list[Path]:
    """Outs below `root` of models that are none of `models`, and of studies none of `studies`: the keys of these sections of the parameters."""
    named = [
        *((path, path.name) for folder in (MOB, BASELINES) for path in _inside(root / folder)),
        *((path, path.name) for path in _inside(root / IMAGES)),
        *((path, path.stem) for folder in (EVALUATIONS, INSPECTIONS) for path in _inside(root / folder)),
        *((path, path.stem.partition("-")[2]) for path in _reports(root)),
    ]
    studied = [(path, path.name) for folder in (STUDIES, STUDY_REPORTS) for path in _inside(root / folder)]
    studied += [(path, path.stem.partition("-")[2]) for path in (root / STAGE_REPORTS).glob("study*-*")]
    others = [path for path, model in named if model not in models]
    return sorted(others + [path for path, study in studied if study not in studies])


def check(root: Path, models: Collection[str]) -> None:
    """Raises ConfigError if there is such an out of a model below data/."""
    # A study's is read by nothing but that study.
    if found := [
        path for path in find(root, models, ()) if root / "data" in path.parents and root / STUDIES not in path.parents
    ]:
        raise ConfigError(
            f"{found[0]} belongs to no model of this experiment ({', '.join(models)}), but stages read the folder whole;"
            " `python -m tasks.leftovers` removes what a former experiment left (DVC's cache keeps it)"
        )


def remove(root: Path, models: Collection[str], studies: Collection[str]) -> list[Path]:
    """Removes them all, reports included, and returns what it removed."""
    found = find(root, models, studies)
    for path in found:
        # A DVC out may be a link into the cache: the link goes.
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return found


def _inside(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []


def _reports(root: Path) -> list[Path]:
    """Reports of the stages that there are one of for each model or level."""
    folders = (root / STAGE_REPORTS, root / CURVES)
    return [
        path
        for folder in folders
        for kind in ("mob_kd", "baseline", "generate", "evaluate")
        for path in folder.glob(f"{kind}-*")
    ]


def main() -> int:
    """Removes what is left in the checkout that this process stands in."""
    root = Path.cwd()
    try:
        params = read_params(root)
        for path in remove(root, params.models, params.studies):
            print(f"removed {path.relative_to(root)}")
    except Dense2MoEError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
