"""The loops that ship, one class each; found by their decorator, so this file names none."""
