"""The recipes that ship with the package: where they are, what they say of themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import align
from align.core.errors import ConfigError, suggestion

LAUNCHERS = "accelerate"
"""The folder of launcher configurations, which are no recipes."""


@dataclass(frozen=True)
class Shipped:
    """A shipped recipe. `name` is its path below the folder of recipes, without `.yaml`: `llama-3-8b-instruct/dpo`."""

    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def title(self) -> str:
        """The first sentence of the comment that the file begins with."""
        lines = []
        for line in self.text.splitlines():
            if not line.startswith("#"):
                break
            lines.append(line.lstrip("# ").rstrip())
        first, dot, _ = " ".join(lines).partition(". ")
        return first + dot.strip()


def folder() -> Path:
    """The folder of shipped recipes: in the installed package, or at the root of a source tree.

    Raises:
        ConfigError: there is none.
    """
    package = Path(align.__file__).resolve().parent
    for candidate in (package / "recipes", package.parent / "recipes"):
        if (candidate / LAUNCHERS).is_dir():
            return candidate
    raise ConfigError("no recipes are installed", where=str(package), mend="install the package again")


def shipped() -> tuple[Shipped, ...]:
    """All shipped recipes by name."""
    return tuple(sorted(_scan(folder()), key=lambda one: one.name))


def launchers() -> tuple[Path, ...]:
    """Configurations for `accelerate launch --config_file`."""
    return tuple(sorted((folder() / LAUNCHERS).glob("*.yaml")))


def find(name: str, where: str = "") -> Shipped:
    """The shipped recipe of a name; the last part of the name is enough where only one recipe ends so.

    Raises:
        ConfigError: there is none, or several.
    """
    wanted = name.removesuffix(".yaml").strip("/")
    known = {one.name: one for one in shipped()}
    if wanted in known:
        return known[wanted]
    ending = [one for full, one in known.items() if full.endswith("/" + wanted)]
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise ConfigError(
            f"`{name}` may be any of {len(ending)} shipped recipes",
            where=where,
            mend="write one of " + ", ".join(f"`{one.name}`" for one in ending),
        )
    near = suggestion(wanted, known)
    raise ConfigError(
        f"there is no shipped recipe `{name}`",
        where=where,
        mend=near if near.startswith("did") else "`align recipes list` shows them; a path ends in .yaml",
    )


def _scan(root: Path) -> Iterator[Shipped]:
    for path in root.rglob("*.yaml"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] != LAUNCHERS:
            yield Shipped("/".join(parts), path)
