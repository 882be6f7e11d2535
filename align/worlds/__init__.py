"""Small controlled tasks with a known gold reward, for the demo, tests, docs and comparisons of methods."""

from align.worlds.base import WORLDS, Preferred, World, world

__all__ = ["WORLDS", "Preferred", "World", "world"]
