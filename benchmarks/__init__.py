"""How fast it is, measured through the public interface. Each file is a command: `python -m benchmarks.step --help`."""
