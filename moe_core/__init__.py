"""Dense2MoE: dense diffusion transformers made sparse. Pure science: torch, diffusers, transformers, safetensors."""
