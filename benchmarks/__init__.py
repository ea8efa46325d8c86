"""Measured comparisons beside peft. `python -m benchmarks` runs the 256-token cells, `--all` every cell; JSON in results/."""
