"""The jobs, one folder each: what a person runs."""
