"""Experts with random numbers, as if trained, and what a tiny CLIP makes of fixed inputs."""

import torch


def encode(clip, dtype=torch.float32):
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    tokens = clip.tokenize(["a red dot", "two words more", ""])
    with torch.no_grad():
        return clip.model.encode_image(pixels, normalize=True), clip.model.encode_text(tokens, normalize=True)


def train_at_random_(pools, scale: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(3)
    for pool in pools.values():
        pool.reset_(generator)
        with torch.no_grad():
            pool.lora_B.copy_(torch.randn(pool.lora_B.shape, generator=generator) * scale)
            pool.counts.copy_(torch.randint(0, 50, pool.counts.shape, generator=generator))
