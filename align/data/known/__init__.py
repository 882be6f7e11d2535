"""Public data sets whose meaning is known: one schema each, with the direction of its preference."""

from align.data.known.base import Choices, Known
from align.data.known.table import BY_COLUMNS, KNOWN, by_name, find, hub_id, markdown, splits
from align.data.splits import Purpose

__all__ = ["BY_COLUMNS", "KNOWN", "Choices", "Known", "Purpose", "by_name", "find", "hub_id", "markdown", "splits"]
