"""Stage `evaluator`: the digit classifier that judges pictures, trained and tested on digits that no scene shows.

Without `eval.classifier` there is nobody who judges, and the folder says so.
"""

from __future__ import annotations

import torch

from moe_core import noise
from moe_core.data import embedded
from moe_core.errors import ConfigError
from moe_core.metrics import scene_detector
from moe_core.metrics.classifier import train_classifier
from tasks import outs
from tasks.places import EVALUATOR
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
    with outs.folder(stage.root / EVALUATOR) as folder:
        classifier.save(folder)
    seed = noise.derive_seed(stage.params.seed, "source")
    # Scenes past those of the data set: of the same kind, made of the same digits, never trained on.
    scenes = [embedded.make_scene(config, seed, config.samples + i) for i in range(CEILING_SCENES)]
    stage.summary({**metrics, "detector_accuracy": scene_detector.own_accuracy(scenes, classifier, config.grid)})


if __name__ == "__main__":
    execute("evaluator", evaluator)
