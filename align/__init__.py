"""Preference training for language models: a model, data, the name of a method."""

__version__ = "0.1.0.dev0"
