"""Stage `evaluator`: who judges pictures of scenes: a digit classifier and a small CLIP, trained and tested on digits that no scene shows.

Without `eval.classifier` there is nobody who judges, and the folder says so.
"""

from __future__ import annotations

import numpy as np
import torch
from safetensors.numpy import save_file

from moe_core import noise
from moe_core.data import embedded
from moe_core.errors import ConfigError
from moe_core.metrics import fid, scene_clip, scene_detector, scene_scorers
from moe_core.metrics.classifier import train_classifier
from tasks import outs
from tasks.places import CLIP, EVALUATOR
from tasks.stage import Stage, execute

CEILING_SCENES = 1000
"""Real scenes on which the detector's own error is measured."""


def evaluator(stage: Stage) -> None:
    """Writes data/evaluator/ and reports the classifier's own accuracy."""
    wanted = stage.params.eval.classifier
    if wanted is None:
        with outs.folder(stage.root / EVALUATOR) as folder:
            outs.write_json(folder / "none.json", {"judges": False})
        stage.summary({})
        return
    # One: so small a network gains nothing by more, and loses much where another stage runs beside it.
    torch.set_num_threads(1)
    config = stage.params.data.embedded
    if config is None:
        raise ConfigError("data.embedded is null; the evaluator's classifier knows the embedded digits only")
    images, classes = embedded.evaluator_digits(config)
    classifier, metrics = train_classifier(images, classes, wanted, noise.derive_seed(stage.params.seed, "evaluator"))
    seed = noise.derive_seed(stage.params.seed, "source")
    # Scenes past those of the data set: of the same kind, made of the same digits, never trained on.
    scenes = [embedded.make_scene(config, seed, config.samples + i) for i in range(CEILING_SCENES)]
    real = fid.features(np.stack([scene.image for scene in scenes]), classifier, config.grid)
    with outs.folder(stage.root / EVALUATOR) as folder:
        classifier.save(folder)
        outs.write_json(folder / scene_scorers.JUDGE_FILE, {"grid": config.grid})
        save_file({"features": real}, folder / scene_scorers.FEATURES_FILE)
        if (small := stage.params.eval.contrastive) is not None:
            clip, processor, separation = scene_clip.train(
                config,
                noise.derive_seed(stage.params.seed, "contrastive"),
                small.steps,
                small.batch_size,
                small.learning_rate,
                small.scenes,
            )
            scene_clip.save(clip, processor, folder / CLIP)
            metrics |= {f"clip_{name}": value for name, value in separation.items()}
    stage.summary({**metrics, "detector_accuracy": scene_detector.own_accuracy(scenes, classifier, config.grid)})


if __name__ == "__main__":
    execute("evaluator", evaluator)
