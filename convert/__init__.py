"""Making checkpoints: `python -m convert.random_checkpoint`."""
