"""People's image-text data, a module a kind, behind one seam: `units` lists what there is, `read` gives samples and rejects.

The listing is deterministic and small; a unit is read by one task. `reading.keep` decodes what `read` gives.
"""

from __future__ import annotations

from pathlib import Path

from moe_core.config import DataConfig
from moe_core.data.sources.folder import Folder
from moe_core.data.sources.journeydb import JourneyDB
from moe_core.data.sources.manifest import Manifest
from moe_core.data.sources.units import Source
from moe_core.data.sources.webdataset import WebDataset


def open_source(data: DataConfig, made: Path) -> Source:
    """The source that `data` names; `made` is the folder of what stage `source` wrote (kind embedded)."""
    path = made if data.kind == "embedded" else Path(str(data.path))
    root = Path(data.root) if data.root else None
    if data.kind in ("embedded", "webdataset"):
        return WebDataset(path, data.fields, data.filters)
    if data.kind == "journeydb":
        return JourneyDB(path, root, data.fields, data.filters)
    if data.kind == "manifest":
        return Manifest(path, root or (path if path.is_dir() else path.parent), data.fields, data.filters)
    return Folder(path, root or path, data.fields, data.filters)
