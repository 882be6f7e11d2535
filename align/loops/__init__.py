"""Rounds: what happens between two trainings. Import from its modules: an index of loops must not import torch."""
