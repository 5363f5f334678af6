"""Whether a given teacher, and the LoRA that goes into it, are what they should be, and the parameters fit them.

- Looked at before any work, whenever parameters are read: JSON files and the headers of safetensors files, without torch.
- Of the hub's teachers only FLUX.1 [dev]'s configurations are known; `tasks.given_teacher` asks all questions once a teacher is fetched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_core import checkpoint, references
from moe_core.config.agreement import check_baselines, check_blocks, check_widths
from moe_core.config.model import LATENT_PATCH, LoRAConfig, ModelConfig, check_guidance
from moe_core.errors import CheckpointError, ConfigError
from moe_core.flux_shapes import dense_shapes
from moe_core.lora_shapes import check_header

if TYPE_CHECKING:
    from moe_core.config import Params

INDEX = "model_index.json"
WEIGHTS: Mapping[str, str] = {
    "transformer": checkpoint.WEIGHTS,
    "vae": checkpoint.WEIGHTS,
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
"""The parts of a FluxPipeline that have weights, and the name of the file (or of its index, `.index.json`) in their folders."""
PARTS = (*WEIGHTS, "tokenizer", "tokenizer_2", "scheduler")
RESHAPED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "shift_terminal", "invert_sigmas")
"""Settings of a scheduler under which its noise levels are others than a shift gives."""
SCHEDULER = "scheduler/scheduler_config.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_given(params: Params) -> None:
    """Checks what lies in local folders, and hub ids that are known; raises ConfigError or CheckpointError, with the file."""
    model = params.model
    if model.source == "folder":
        check_teacher(Path(str(model.path)), params)
    configs = known_configs(model)
    if model.source == "hub" and configs is not None:
        _check_fit(Path(str(model.path)), configs, references.FLUX1_SCHEDULER, params)
    if model.source != "train" and model.lora is not None and (file := lora_file(model.lora)) is not None:
        stored = checkpoint.read_header(file)
        checkpoint.check_floats(stored)
        if not any("lora" in name for name in stored):
            raise CheckpointError(
                f"{file}: none of its {len(stored)} tensors is a LoRA's; their names must have lora_A or lora_down"
            )
        expected = None if configs is None else dense_shapes(configs["transformer"])
        check_header(file, {name: tensor.shape for name, tensor in stored.items()}, expected)


def known_configs(model: ModelConfig) -> dict[str, Mapping[str, Any]] | None:
    """A given teacher's configurations by part, those with weights; None where only the hub has them.

    Raises CheckpointError where a folder lacks one.
    """
    if model.source == "folder":
        return read_configs(Path(str(model.path)))
    if model.source == "hub" and model.path in references.FLUX1_HUB_IDS:
        found = (references.FLUX1_DEV, references.FLUX1_VAE, references.FLUX1_CLIP, references.FLUX1_T5)
        return dict(zip(WEIGHTS, found, strict=True))
    return None


def read_configs(folder: Path) -> dict[str, Mapping[str, Any]]:
    """The same of a pipeline folder."""
    return {part: checkpoint.read_config(folder / part) for part in WEIGHTS}


def check_teacher(folder: Path, params: Params) -> None:
    """A given teacher must be a whole FluxPipeline folder that the parameters fit."""
    check_description(folder, params)
    shapes = dense_shapes(checkpoint.read_config(folder / "transformer"))
    checkpoint.check_precision(folder / "transformer", checkpoint.check_weights(folder / "transformer", shapes))
    for part, weights in WEIGHTS.items():
        for file in checkpoint.weight_files(folder / part, weights):
            header = checkpoint.read_header(file)
            # Older CLIPs have their positions among the weights, and nobody reads them.
            checkpoint.check_floats({name: header[name] for name in header if not name.endswith("position_ids")})


def check_description(folder: Path, params: Params) -> None:
    """What can be said without the weights: their files may be absent yet."""
    if not (folder / INDEX).is_file():
        raise ConfigError(
            f"model.path is {folder}, but {folder / INDEX} does not exist; it must be a diffusers pipeline folder"
        )
    index = checkpoint.read_json(folder / INDEX)
    if index.get("_class_name") != "FluxPipeline":
        raise ConfigError(f"{folder / INDEX}: describes a {index.get('_class_name')}, not a FluxPipeline")
    for part in PARTS:
        if not any(index.get(part) or ()):
            raise ConfigError(f"{folder / INDEX}: lacks {part}; a FluxPipeline has {', '.join(PARTS)}")
        if not (folder / part).is_dir():
            raise ConfigError(f"{folder / part}: there is no such folder, but {INDEX} names {part}")
    configs = read_configs(folder)
    name = configs["transformer"].get("_class_name")
    if name != "FluxTransformer2DModel":
        file = folder / "transformer" / checkpoint.CONFIG
        raise ConfigError(f"{file}: describes a {name}, not a FluxTransformer2DModel")
    _check_fit(folder, configs, checkpoint.read_json(folder / SCHEDULER), params)


def _check_fit(
    where: Path, configs: Mapping[str, Mapping[str, Any]], scheduler: Mapping[str, Any], params: Params
) -> None:
    """The parts must fit each other and the parameters; `where`, a folder or a hub id, names their files in errors."""
    file = where / "transformer" / checkpoint.CONFIG
    config = configs["transformer"]
    try:
        check_blocks(params.moe, params.mob, int(config["num_layers"]), int(config["num_single_layers"]))
        width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
        check_widths(params.moe, width)
        check_baselines(
            params.baselines, params.moe, width, int(config["num_layers"]), int(config["num_single_layers"])
        )
        check_guidance(params.model.guidance_scale, bool(config.get("guidance_embeds")), "guidance_embeds")
        _check_parts_fit(config, configs)
        factor = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    except KeyError as error:
        raise ConfigError(f"{file}: {error} is missing, there or in the files of the other parts") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file}: {error}") from error
    if params.model.resolution % (factor * LATENT_PATCH):
        raise ConfigError(
            f"model.resolution is {params.model.resolution}; it must be a multiple of {factor * LATENT_PATCH}: the VAE's factor"
            f" {factor} times the patch of {LATENT_PATCH}"
        )
    _check_noise_levels(where / SCHEDULER, scheduler, params, factor)


def _check_parts_fit(config: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> None:
    for what, own, part, other in (
        ("in_channels", int(config["in_channels"]), "vae", LATENT_PATCH**2 * int(parts["vae"]["latent_channels"])),
        (
            "joint_attention_dim",
            int(config["joint_attention_dim"]),
            "text_encoder_2",
            int(parts["text_encoder_2"]["d_model"]),
        ),
        (
            "pooled_projection_dim",
            int(config["pooled_projection_dim"]),
            "text_encoder",
            int(parts["text_encoder"]["hidden_size"]),
        ),
    ):
        if own != other:
            raise ValueError(f"{what} is {own}, but the pipeline's {part} gives {other} channels")


def _check_noise_levels(file: Path, config: Mapping[str, Any], params: Params, factor: int) -> None:
    """A teacher distilled to a few steps knows the noise levels of its own sampler only: KD must draw just these."""
    timesteps, model = params.kd.timesteps, params.model
    if timesteps.kind != "discrete":
        return
    if other := [name for name in RESHAPED if config.get(name)]:
        raise ConfigError(
            f"{file}: has {other[0]} = {config[other[0]]}; kd.timesteps.kind 'discrete' knows a shift only"
        )
    if timesteps.steps != model.num_inference_steps:
        raise ConfigError(
            f"kd.timesteps.steps is {timesteps.steps}, but model.num_inference_steps is {model.num_inference_steps}; with kind"
            " 'discrete' they must be equal"
        )
    shift = sampler_shift(config, (model.resolution // (factor * LATENT_PATCH)) ** 2)
    if not math.isclose(timesteps.shift, shift, rel_tol=1e-4):
        raise ConfigError(
            f"kd.timesteps.shift is {timesteps.shift:g}, but the teacher's sampler shifts by {shift:.6f} at {model.resolution}"
            f" pixels ({file}); with kind 'discrete' they must be equal"
        )


def sampler_shift(scheduler: Mapping[str, Any], image_tokens: int) -> float:
    """The shift s of FluxPipeline's noise levels, sigma -> s sigma / (1 + (s - 1) sigma), by a scheduler_config.json.

    Dynamic: s = exp(mu), mu linear in the number of image tokens (diffusers' `calculate_shift`); FLUX.1 [dev] at 1024 px,
    4,096 tokens: exp(1.15). Else the fixed `shift`.
    """
    if not scheduler.get("use_dynamic_shifting"):
        return float(scheduler.get("shift", 1.0))
    least, most = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    mu = low + (high - low) * (image_tokens - least) / (most - least)
    if scheduler.get("time_shift_type", "exponential") == "linear":
        return float(mu)
    return math.exp(mu)


def lora_file(lora: LoRAConfig) -> Path | None:
    """The local file of a LoRA, or None if `model.lora.path` is a hub id; raises ConfigError for a path that is neither."""
    path = Path(lora.path)
    if path.is_file():
        if lora.weight_name is not None:
            raise ConfigError(
                f"model.lora.weight_name is '{lora.weight_name}', but model.lora.path {path} is a file; it must be null"
            )
        return _safetensors(path)
    if path.is_dir():
        if lora.weight_name is not None:
            if not (path / lora.weight_name).is_file():
                raise ConfigError(f"model.lora.weight_name is '{lora.weight_name}', but {path} has no such file")
            return path / lora.weight_name
        names = sorted(file.name for file in path.glob("*.safetensors"))
        if len(names) != 1:
            raise ConfigError(
                f"model.lora.path {path} has {len(names)} .safetensors files ({', '.join(names) or 'none'});"
                " model.lora.weight_name must name one"
            )
        return path / names[0]
    if path.suffix == ".safetensors" or not HUB_ID.fullmatch(lora.path):
        raise ConfigError(
            f"model.lora.path is '{path}'; there is no such file or folder, and a hub id has the form owner/name"
        )
    if lora.weight_name is None:
        raise ConfigError(
            f"model.lora.path is the hub id '{path}' (no such file or folder); then weight_name must be given"
        )
    return None


def _safetensors(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"model.lora.path is {path}; it must be a .safetensors file: reading one of another kind can run code, so it is not opened"
        )
    return path
