"""What every method must pass, importable by users; `align.testing.tiny` makes small models and data."""

from align.testing.checks import Check, battery, check_method, model_battery

__all__ = ["Check", "battery", "check_method", "model_battery"]
