"""Training methods, one file each. Importing this package imports no torch; its names are made when first read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.core.registry import METHODS

if TYPE_CHECKING:
    from align.methods.base import Method, Term, Terms, Unit, method, option
    from align.methods.evaluate import terms

__all__ = ["METHODS", "Method", "Term", "Terms", "Unit", "method", "option", "terms"]


def __getattr__(name: str) -> Any:
    if name == "terms":
        from align.methods.evaluate import terms

        return terms
    if name in __all__:
        from align.methods import base

        return getattr(base, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
