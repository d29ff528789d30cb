"""The parts of gpu_suite.py: what a GPU has to decide, each a function that yields rows (setting.py)."""
