"""The one exception family: what went wrong, where, why, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class AlignError(Exception):
    """An error that a user can act on.

    Args:
        what: what is wrong, in one clause.
        where: the place, for example `recipe.yaml:12` or `pairs.jsonl:4096`.
        why: the reason, where it is not plain from `what`.
        mend: what to do about it.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", mend: str = "") -> None:
        self.what, self.where, self.why, self.mend = what, where, why, mend
        super().__init__(self.__str__())

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.why:
            text += f"\n  why: {self.why}"
        if self.mend:
            text += f"\n  mend: {self.mend}"
        return text

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        # Keyword-only arguments do not survive the default pickling, which loader workers need.
        return _rebuild, (type(self), self.what, self.where, self.why, self.mend)


def _rebuild(kind: type[AlignError], what: str, where: str, why: str, mend: str) -> AlignError:
    return kind(what, where=where, why=why, mend=mend)


class ConfigError(AlignError):
    """A recipe, option or argument that cannot be used as written."""


class DataError(AlignError):
    """Data that cannot be read, or too much of it that is bad."""


class ModelError(AlignError):
    """A model or tokenizer that is missing, unsafe or unsuitable."""


class CheckpointError(AlignError):
    """A checkpoint, cache or artefact that is incomplete, damaged or of another run."""


class TrainingError(AlignError):
    """A run that must not go on (non-finite loss, failed step-zero check)."""


class FeedbackError(AlignError):
    """A judgement that could not be had: a judge that failed, hung, died or answered nonsense."""


class SamplerError(AlignError):
    """An engine or server that draws completions and failed, does not answer, or answers nonsense."""


class MissingExtra(AlignError):
    """An optional dependency that is not installed."""


class ErrorList(ConfigError):
    """Several configuration errors, reported at once."""

    def __init__(self, errors: Iterable[AlignError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(str(error) for error in self.errors))

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return ErrorList, (self.errors,)


def raise_all(errors: Iterable[AlignError]) -> None:
    """Raise nothing, the single error, or an `ErrorList` of all of them."""
    found = tuple(errors)
    if len(found) == 1:
        raise found[0]
    if found:
        raise ErrorList(found)


def suggestion(name: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known names, or all of them if few, else nothing."""
    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(f"`{candidate}`" for candidate in near) + "?"
    return "known: " + ", ".join(names) if len(names) <= 40 else ""
