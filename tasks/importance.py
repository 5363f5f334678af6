"""Stage `importance`: Taylor scores of every FFN segment (eq. 6), each block's change (Fig. 3), and tokens of every FFN, over the calibration split.

The split is cut into fixed units of work; each unit's sums are kept, and added in the order of units. So the result does not depend on the
number of workers, and a killed run goes on with the units that are left.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_core.config import Params, parse
from tasks import outs
from tasks.places import IMPORTANCE, SHARDS, TEACHER
from tasks.stage import Stage, execute, workers

if TYPE_CHECKING:
    import torch

UNITS = "units"


def importance(stage: Stage) -> None:
    """Writes data/importance/."""
    # Ray Train brings torch; after the parameters were checked.
    from tasks import launch

    assert stage.resume is not None
    folder = stage.resume.path
    (folder / UNITS).mkdir(exist_ok=True)
    arguments = {"root": stage.root, "params": stage.params.model_dump(mode="json"), "units": folder / UNITS}
    with stage.ray():
        launch.workers("tasks.importance:work", arguments, folder, stage.params.compute)
    with outs.folder(stage.root / IMPORTANCE) as out:
        samples, loss = merge(folder / UNITS, out)
    stage.summary({"samples": samples, "flow_matching_loss": loss / samples})


def work(device: torch.device, threads: int, root: Path, params: dict[str, Any], units: Path) -> None:
    """In every worker: each so many-th unit that is not there yet."""
    # Torch and diffusers load in the workers, not in the driver.
    import torch
    from safetensors.torch import save_file

    from moe_core import noise, sampling
    from moe_core.data.latents import LatentDataset
    from moe_core.importance import ImportanceAccumulator
    from tasks.batches import make_batch
    from tasks.worker import Worker

    torch.set_num_threads(threads)
    worker, config = Worker.here(device), parse(Params, params)
    precision = config.model.precision
    pipeline = sampling.load_pipeline(root / TEACHER, None, device, sampling.DTYPES[precision], without=("vae",))
    data = LatentDataset(root / SHARDS, "calibration")
    seed, size = noise.derive_seed(config.seed, "importance"), config.kd.importance_batch_size
    tokens = math.ceil(config.kd.calibration_tokens / len(data))
    token_seed = noise.derive_seed(config.seed, "calibration-tokens")
    for number, positions in enumerate(data.cuts(size)):
        target = units / f"{number:06d}"
        if number % worker.size != worker.rank or target.exists():
            continue
        accumulator = ImportanceAccumulator(pipeline.transformer, tokens, token_seed)
        batch = make_batch(pipeline, data, positions, seed, positions, config)
        with sampling.autocast(device, precision):
            accumulator.update(batch, data.get(positions)[1], positions[0])
        with outs.folder(target) as folder:
            save_file(
                {**accumulator.state, "conditioning": accumulator.conditioning_vectors()}, folder / "sums.safetensors"
            )
            save_file(accumulator.tokens(), folder / "tokens.safetensors")
            outs.write_json(folder / "rows.json", {"blocks": accumulator.blocks, "rows": accumulator.rows})


def merge(units: Path, out: Path) -> tuple[int, float]:
    """Adds the units in order and writes the stage's files; returns the number of samples and their summed loss."""
    import torch  # loaded already, by Ray Train
    from safetensors.torch import load_file

    from tasks import importance_files

    sums: dict[str, torch.Tensor] = {}
    conditioning, rows, blocks = [], [], []
    in_order = sorted(units.glob("[0-9]*"))
    for unit in in_order:
        tensors = load_file(unit / "sums.safetensors")
        conditioning.append(tensors.pop("conditioning"))
        for name, value in tensors.items():
            sums[name] = sums[name] + value if name in sums else value
        found = json.loads((unit / "rows.json").read_text())
        blocks = found["blocks"]
        rows += found["rows"]
    samples, loss = int(sums.pop("samples")), float(sums.pop("loss"))
    importance_files.save(out, sums, torch.cat(conditioning), blocks, rows)
    importance_files.save_tokens(out, [unit / "tokens.safetensors" for unit in in_order])
    return samples, loss


if __name__ == "__main__":
    execute("importance", importance, resumable=True, joins=workers)
