"""Training a small FLUX pipeline from nothing: the VAE, then (after `moe_core.text_training`) the transformer.

- `VAETrainee` and `FlowTrainee` are trainees in the sense of `moe_core.training`: the loop, the devices and the
  checkpoints are the caller's.
- Flow matching as FLUX's: x_t = (1 - sigma) * x0 + sigma * noise, the model predicts noise - x0, its timestep argument
  is sigma.
- The pictures are encoded once, by the finished VAE; the transformer trains on latents that are shifted and scaled as
  FluxPipeline expects.
- What is drawn for a sample (picture, noise, sigma) is a function of (seed, position) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor, nn

from moe_core import noise
from moe_core.config import TimestepConfig
from moe_core.errors import DataError
from moe_core.text_training import tokens

_VALIDATION_BATCH = 128


class VAEStep(nn.Module):
    """Loss of the VAE: mean squared error of the reconstruction + `kl_weight` * mean KL divergence a latent value."""

    def __init__(self, vae: AutoencoderKL, kl_weight: float) -> None:
        super().__init__()
        self.vae = vae
        self.kl_weight = kl_weight

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`images` [B, 3, S, S] in [-1, 1], `noise` [B, C, h, w] -> scalars "loss", "reconstruction", "kl"."""
        posterior = self.vae.encode(batch["images"]).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * batch["noise"]).sample
        reconstruction = F.mse_loss(decoded, batch["images"])
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": reconstruction + self.kl_weight * kl, "reconstruction": reconstruction, "kl": kl}


class FlowStep(nn.Module):
    """Loss of the transformer: mean squared error of the predicted velocity."""

    def __init__(self, pipeline: FluxPipeline, guidance_scale: float | None) -> None:
        super().__init__()
        self.transformer = pipeline.transformer
        self.text_encoder = pipeline.text_encoder
        self.text_encoder_2 = pipeline.text_encoder_2
        self.guidance_scale = guidance_scale

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalar "loss".

        `latents`, `noise` [B, T, C] packed; `sigma` [B]; `clip_ids` [B, L1], `t5_ids` [B, L2] token numbers; `img_ids`
        [T, 3].
        """
        sigma = batch["sigma"][:, None, None]
        text = self.text_encoder_2(batch["t5_ids"])[0]
        guidance = None if self.guidance_scale is None else torch.full_like(batch["sigma"], self.guidance_scale)
        velocity = self.transformer(
            hidden_states=(1 - sigma) * batch["latents"] + sigma * batch["noise"],
            encoder_hidden_states=text,
            pooled_projections=self.text_encoder(batch["clip_ids"]).pooler_output,
            timestep=batch["sigma"],
            guidance=guidance,
            img_ids=batch["img_ids"],
            txt_ids=batch["img_ids"].new_zeros(text.shape[1], 3),
            return_dict=False,
        )[0]
        return {"loss": F.mse_loss(velocity.float(), batch["noise"] - batch["latents"])}


class VAETrainee:
    """The VAE of a pipeline, as a trainee. `images`, `validation`: uint8 [N, S, S, 3]."""

    def __init__(self, vae: AutoencoderKL, kl_weight: float, images: Tensor, validation: Tensor, seed: int) -> None:
        _check_pictures(images, vae)
        _check_pictures(validation, vae)
        self.module = VAEStep(vae, kl_weight)
        self.rates: dict[str, float] = {}
        self.images, self.validation, self.seed = images, validation, seed

    def batch(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Pictures and posterior noise of these sample positions."""
        rows = noise.sample_index(self.seed, positions, len(self.images))
        return self._batch(self.images[rows], self.seed, positions)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """{"loss", "reconstruction", "kl"} on the validation pictures, with fixed noise."""
        totals: dict[str, float] = {}
        for start in range(0, len(self.validation), _VALIDATION_BATCH):
            part = self.validation[start : start + _VALIDATION_BATCH]
            losses = self.module(self._batch(part, self.seed + 1, range(start, start + len(part))))
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(part) / len(self.validation)
        return totals

    def save(self, folder: Path) -> None:
        """Writes the VAE, its shift and scale set to those of the training pictures, as a diffusers model folder."""
        set_latent_scale(self.module.vae, self.images)
        self.module.vae.save_pretrained(folder)

    def _batch(self, pictures: Tensor, seed: int, positions: Sequence[int]) -> dict[str, Tensor]:
        vae = self.module.vae
        side = pictures.shape[1] // _factor(vae)
        drawn, _ = noise.draw(seed, positions, (vae.config.latent_channels, side, side), TimestepConfig())
        return {"images": to_signed(pictures).to(vae.device), "noise": drawn.to(vae.device)}


@dataclass(frozen=True)
class LatentCaptions:
    """Latents [N, C, h, w], shifted and scaled, and their captions."""

    latents: Tensor
    captions: Sequence[str]

    def __post_init__(self) -> None:
        if len(self.latents) != len(self.captions) or not len(self.latents):
            raise DataError(
                f"{len(self.latents)} latents and {len(self.captions)} captions;"
                " there must be equally many, and at least one"
            )


class FlowTrainee:
    """The transformer of a pipeline, and those of its text encoders that are not frozen, as a trainee."""

    def __init__(
        self,
        pipeline: FluxPipeline,
        guidance_scale: float | None,
        max_sequence_length: int,
        train: LatentCaptions,
        validation: LatentCaptions,
        timesteps: TimestepConfig,
        seed: int,
    ) -> None:
        self.pipeline = pipeline
        self.module = FlowStep(pipeline, guidance_scale)
        self.rates: dict[str, float] = {}
        self.train, self.validation, self.timesteps, self.seed = train, validation, timesteps, seed
        self._tokens = {
            text: number for number, text in enumerate(dict.fromkeys([*train.captions, *validation.captions]))
        }
        captions = list(self._tokens)
        self._clip_ids, self._t5_ids = tokens(pipeline, captions, max_sequence_length)

    def batch(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Inputs of `FlowStep` for these sample positions."""
        rows = noise.sample_index(self.seed, positions, len(self.train.latents))
        return self._batch(self.train, rows, self.seed, positions)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """{"loss"} on the validation samples, with fixed noise and sigmas."""
        total, count = 0.0, len(self.validation.latents)
        for start in range(0, count, _VALIDATION_BATCH):
            rows = list(range(start, min(start + _VALIDATION_BATCH, count)))
            total += (
                float(self.module(self._batch(self.validation, rows, self.seed + 1, rows))["loss"]) * len(rows) / count
            )
        return {"loss": total}

    def save(self, folder: Path) -> None:
        """Writes the whole pipeline, with `FluxPipeline.save_pretrained`."""
        self.pipeline.save_pretrained(folder)

    def _batch(
        self, data: LatentCaptions, rows: Sequence[int], seed: int, positions: Sequence[int]
    ) -> dict[str, Tensor]:
        device = self.pipeline.transformer.device
        latents = data.latents[list(rows)]
        drawn, sigma = noise.draw(seed, positions, tuple(latents.shape[1:]), self.timesteps)
        count, channels, height, width = latents.shape
        numbers = [self._tokens[data.captions[row]] for row in rows]
        batch = {
            "latents": FluxPipeline._pack_latents(latents, count, channels, height, width),
            "noise": FluxPipeline._pack_latents(drawn, count, channels, height, width),
            "sigma": sigma,
            "clip_ids": self._clip_ids[numbers],
            "t5_ids": self._t5_ids[numbers],
            "img_ids": FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, device, torch.float32),
        }
        return {name: value.to(device) for name, value in batch.items()}


def to_signed(pictures: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] -> latents [B, C, h, w] (the posterior's mode), on the CPU.

    Shifted and scaled as FluxPipeline expects.
    """
    latents = vae.encode(to_signed(pictures).to(vae.device, vae.dtype)).latent_dist.mode()
    return ((latents - vae.config.shift_factor) * vae.config.scaling_factor).float().cpu().contiguous()


@torch.no_grad()
def set_latent_scale(vae: AutoencoderKL, pictures: Tensor, samples: int = 2048) -> None:
    """Sets shift and scaling factor so that the latents of the leading pictures have mean 0 and deviation 1."""
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    latents = torch.cat([encode(vae, part) for part in pictures[:samples].split(_VALIDATION_BATCH)])
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))


def _factor(vae: AutoencoderKL) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _check_pictures(pictures: Tensor, vae: AutoencoderKL) -> None:
    if (
        pictures.dtype != torch.uint8
        or pictures.ndim != 4
        or pictures.shape[3] != 3
        or pictures.shape[1] != pictures.shape[2]
    ):
        raise DataError(f"pictures are {pictures.dtype} {list(pictures.shape)}; they must be uint8 [N, S, S, 3]")
    if not len(pictures) or pictures.shape[1] % (2 * _factor(vae)):
        raise DataError(
            f"there are {len(pictures)} pictures of side {pictures.shape[1]};"
            f" there must be some, of a side that {2 * _factor(vae)} divides"
        )
