"""Post-training: clips become latents once, then the networks, or adapters of them, learn to denoise."""
