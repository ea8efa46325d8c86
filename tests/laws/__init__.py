"""The laws of design.md over the whole registry: each a check function, each with mutants that it must reject."""
