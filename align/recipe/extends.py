"""`extends`: a recipe laid over another one, which may itself lie over a third."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.core.errors import ConfigError, raise_all, suggestion
from align.recipe import document, library
from align.recipe.document import Item

KEY = "extends"
_OWN = "provenance"
"""Not inherited: a claim belongs to the numbers it was made for, and the file above changes them."""
_SUFFIXES = (".yaml", ".yml")
_TAKES_OUT: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("train.max_steps", lambda value: value is not None, "train.num_train_epochs"),
    ("train.lr_scheduler_type", lambda value: value == "constant", "train.warmup_steps"),
    ("data.eval", lambda value: value is None, "eval"),
)
"""(option, test of its value, what it makes void). Written above, it takes the other out of what lies below, which
would otherwise be an option that nothing reads, in a file that need not be the user's."""


def read(path: str | Path, overrides: Sequence[str] = ()) -> Item:
    """A recipe with its bases below it and the overrides on top; no `extends` is left in it.

    Mappings merge; lists and scalars replace. A `method` of another name replaces the base's whole, since the options
    of one method mean nothing to another, and `provenance` is not inherited. Every value keeps the place where it was
    written.

    Raises:
        ConfigError: a file that cannot be read, a base that is not there, or a circle of bases.
    """
    root = _with_bases(_located(Path(path)), ())
    if any(word.removeprefix("--").partition("=")[0] == KEY for word in overrides):
        raise ConfigError(
            f"`{KEY}` cannot be an override", where="command line", mend=f"write `{KEY}:` at the top of the recipe"
        )
    given = Item({}, "command line")
    document.override(given, overrides)  # faults are reported below, on the whole recipe
    _take_out(root, given)
    _take_out_method(root, given)
    raise_all(document.override(root, overrides))
    return root


def _take_out_method(root: Item, given: Item) -> None:
    """An override that names another method leaves nothing of the file's one, as a recipe laid over it would."""
    new, old = given.value.get("method"), root.value.get("method")
    if new is None or old is None or _name(_as_mapping(new)) in (None, _name(_as_mapping(old))):
        return
    root.value["method"] = Item({}, old.where)


def _located(path: Path) -> Path:
    """The file of a shipped recipe where a command was given the recipe's full name, and no such file is there."""
    if path.exists() or path.suffix in _SUFFIXES:
        return path
    return next((one.path for one in library.shipped() if one.name == path.as_posix()), path)


def _with_bases(path: Path, above: tuple[Path, ...]) -> Item:
    root = document.read(path)
    entry = root.value.pop(KEY, None)
    if entry is None:
        return root
    base = _base(entry, path)
    chain = (*above, path.resolve())
    if base.resolve() in chain:
        circle = " -> ".join(str(one) for one in (*chain[chain.index(base.resolve()) :], base.resolve()))
        raise ConfigError(f"`{KEY}` goes in a circle", where=entry.where, why=circle, mend="take one of them out")
    below = _with_bases(base, chain)
    below.value.pop(_OWN, None)
    return merge(below, root)


def _base(entry: Item, path: Path) -> Path:
    """The file that `extends` names: a path, from the folder of the recipe that names it, or a shipped recipe."""
    name = entry.value
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"`{KEY}` is {entry.plain()!r}",
            where=entry.where,
            mend="give one path that ends in .yaml, or the name of a shipped recipe; a base may extend another",
        )
    if not name.endswith(_SUFFIXES):
        return library.find(name, entry.where).path
    found = path.parent / Path(name).expanduser()
    if not found.is_file():
        beside = [one.name for one in path.parent.glob("*.y*ml") if one.name != path.name]
        mend = suggestion(found.name, beside) if found.parent == path.parent and beside else ""
        raise ConfigError(
            f"there is no recipe `{name}` to extend",
            where=entry.where,
            why=f"paths are read from the folder of the recipe, `{path.parent}`",
            mend=mend or "correct the path",
        )
    return found


def merge(below: Item, above: Item) -> Item:
    """`above` over `below`, both whole recipes."""
    mine, base = above.value.get("method"), below.value.get("method")
    if mine is not None and base is not None:
        base = _as_mapping(base)
        own = mine.value.get("name") if isinstance(mine.value, dict) else None
        if own is not None and own.value != _name(base):
            base = Item({}, base.where)
        below = Item({**below.value, "method": base}, below.where)
    _take_out(below, above)
    return _merge(below, above)


def _take_out(below: Item, above: Item) -> None:
    """Remove from `below`, in place, what an option of `above` makes void, unless `above` has that too."""
    for key, holds, void in _TAKES_OUT:
        cause = _at(above, key)
        if cause is None or not holds(cause.value) or _at(above, void) is not None:
            continue
        parent, _, last = void.rpartition(".")
        owner = _at(below, parent) if parent else below
        if owner is not None and isinstance(owner.value, dict):
            owner.value.pop(last, None)


def _at(root: Item, key: str) -> Item | None:
    item: Item | None = root
    for name in key.split("."):
        item = item.value.get(name) if item is not None and isinstance(item.value, dict) else None
    return item


def _merge(below: Item, above: Item) -> Item:
    if not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    merged = dict(below.value)
    for key, item in above.value.items():
        merged[key] = _merge(merged[key], item) if key in merged else item
    return Item(merged, above.where)


def _as_mapping(method: Item) -> Item:
    """`method: dpo` is `method: {name: dpo}`."""
    return Item({"name": method}, method.where) if isinstance(method.value, str) else method


def _name(method: Item) -> object:
    name = method.value.get("name") if isinstance(method.value, dict) else None
    return None if name is None else name.value
