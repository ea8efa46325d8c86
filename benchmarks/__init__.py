"""Measured comparisons beside peft. `python -m benchmarks` runs the 256-token cells; `--all` every cell; results are JSON in results/."""
