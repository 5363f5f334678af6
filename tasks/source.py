"""Stage `source`: the image-text pairs as a WebDataset folder, and the prompts that every model is evaluated on.

- Embedded presets: the scenes are drawn here, in the form in which a user's own data comes.
- A user's data stays where it is: `listing.json` names each tar with its size and time of change, and later stages depend on that, so
  that terabytes are not hashed. The flow forces this stage for such data, since DVC cannot see whether they changed.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from moe_core import noise
from moe_core.config import Params
from moe_core.data import embedded, webdataset
from moe_core.errors import DataError
from tasks import outs
from tasks.places import PROMPTS, SOURCE
from tasks.source_files import LISTING, tars_of
from tasks.stage import Stage, execute


def source(stage: Stage) -> None:
    """Writes data/source/ and data/prompts.jsonl."""
    data, root = stage.params.data, stage.root
    with outs.folder(root / SOURCE) as folder:
        if data.embedded is not None and data.kind == "embedded":
            tars = embedded.write_source(folder, data.embedded, noise.derive_seed(stage.params.seed, "source"))
            listing: list[dict[str, Any]] = [{"path": tar.name, "bytes": tar.stat().st_size} for tar in tars]
        else:
            listing = _listing(Path(str(data.path)))
        outs.write_json(folder / LISTING, {"tars": listing})
    prompts = _prompts(stage.params, root)
    outs.write_text(root / PROMPTS, "".join(json.dumps(prompt, sort_keys=True) + "\n" for prompt in prompts))
    size = sum(int(tar["bytes"]) for tar in listing)
    stage.summary({"tars": len(listing), "bytes": size, "prompts": len(prompts)})


def _listing(folder: Path) -> list[dict[str, Any]]:
    """A user's tars, by absolute path."""
    tars = webdataset.list_tars(folder)
    return [
        {"path": str(tar.resolve()), "bytes": tar.stat().st_size, "changed_ns": tar.stat().st_mtime_ns} for tar in tars
    ]


def _prompts(params: Params, root: Path) -> list[dict[str, Any]]:
    """GenEval records: made for embedded data; else the first captions of the data, which ask for no known object."""
    count = params.eval.prompts
    if params.data.embedded is not None and params.data.kind == "embedded":
        return embedded.make_prompts(params.data.embedded, noise.derive_seed(params.seed, "prompts"), count)
    samples = (
        sample
        for tar in tars_of(root)
        for sample in webdataset.read_samples(tar)
        if isinstance(sample, webdataset.Sample)
    )
    found = [{"tag": "caption", "include": [], "prompt": sample.caption} for sample in itertools.islice(samples, count)]
    if not found:
        raise DataError(
            f"the tars of {params.data.path} hold no sample with an image and a caption; at least one is needed"
        )
    return found


if __name__ == "__main__":
    execute("source", source)
