"""Doors from other tools: adapters over the public API. Each needs its tool installed and is imported by nothing else."""
