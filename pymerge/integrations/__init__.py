"""Doors from other tools: adapters over the public API, each imported only by its tool."""
