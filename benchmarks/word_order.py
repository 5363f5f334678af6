"""Does the teacher know word order? Its loss on real pictures with their captions, less its loss when the captions' two objects are exchanged.

    python -m benchmarks.word_order        on the checkout's data/source and data/teacher; prints a line a kind of prompt

Exchanged: the digits of "a two left of a three", the colours of "a red two and a blue three". A model that does not know which word belongs
to which gains nothing from the right caption.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import FluxPipeline

from moe_core import noise, teacher_training
from moe_core.config import Params
from moe_core.teacher_training import FlowTrainee, LatentCaptions
from tasks import pictures
from tasks.places import TEACHER
from tasks.project import read_params

EXCHANGED = {
    "position": (re.compile(r"(an? \w+) (left of|right of|above|below) (an? \w+)"), r"\3 \2 \1"),
    "colour attribution": (re.compile(r"a (\w+) (\w+) and a (\w+) (\w+)"), r"a \3 \2 and a \1 \4"),
}


def loss(pipeline: FluxPipeline, params: Params, latents: torch.Tensor, captions: list[str]) -> float:
    """Mean squared error of the velocity, with fixed noise."""
    data = LatentCaptions(latents, captions)
    seed = noise.derive_seed(params.seed, "word-order")
    model = params.model
    assert model.training is not None
    timesteps = model.training.timesteps
    trainee = FlowTrainee(pipeline, model.guidance_scale, model.max_sequence_length, data, data, timesteps, seed)
    return trainee.validate()["loss"]


def main() -> None:
    """Prints both losses for the validation pictures of each kind."""
    torch.set_num_threads(1)
    root = Path.cwd()
    params = read_params(root)
    pipeline = FluxPipeline.from_pretrained(root / TEACHER)
    found = pictures.load(root, params)
    latents = teacher_training.encode(pipeline.vae, found.validation)
    for kind, (pattern, order) in EXCHANGED.items():
        rows = [i for i, caption in enumerate(found.validation_captions) if pattern.fullmatch(caption)]
        if not rows:
            print(f"{kind}: no such caption in the validation split")
            continue
        captions = [found.validation_captions[i] for i in rows]
        right = loss(pipeline, params, latents[rows], captions)
        wrong = loss(pipeline, params, latents[rows], [pattern.sub(order, caption) for caption in captions])
        print(f"{kind}: {len(rows)} pictures, loss {right:.4f}, with the objects exchanged {wrong - right:+.4f}")


if __name__ == "__main__":
    main()
