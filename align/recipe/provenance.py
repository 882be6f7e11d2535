"""What repeats a run, kept in its folder: the resolved recipe, versions and git state; and whether a folder is ours."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import align
from align.core.errors import CheckpointError, ConfigError
from align.core.files import atomic_write, clean_leftovers
from align.core.hashing import digest
from align.recipe import rules
from align.recipe.sections import Recipe

RECIPE, PROVENANCE = "recipe.yaml", "provenance.json"
MAY_CHANGE = frozenset(
    {
        "train.tokens_per_micro_batch",
        "train.logging_steps",
        "train.report_to",
        "train.resume",
        "train.output_dir",
        "rollout.keep",
        "sampler.batch_size",
        "sampler.gpu_memory_utilization",
        "sampler.enforce_eager",
        "sampler.urls",
        "sampler.served_as",
        "sampler.wait",
        "sampler.deadline",
        "sampler.retries",
        "provenance.paper",
        "provenance.claim",
        "provenance.checked",
    }
)
"""What a resumed run may change (the number of ranks is not in a recipe): servers move, and have other addresses."""
_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "deepspeed",
    "bitsandbytes",
    "vllm",
)


def check_output(recipe: Recipe, uses: rules.Uses, clean: bool = True) -> None:
    """Refuse an output folder that holds something else, or a run with another recipe. One process calls it.

    `clean` removes what a killed save left there; without it the folder stays untouched, for it may be in use.

    Raises:
        CheckpointError: the folder is used and is not a run, or its records were changed.
        ConfigError: it is a run that this recipe may not continue.
    """
    folder = Path(recipe.train.output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError("`train.output_dir` is a file", where=str(folder), mend="name another folder")
    if clean:
        clean_leftovers(folder)
    now = yaml.safe_load(rules.to_yaml(recipe, uses))
    if folder.is_dir() and any(folder.iterdir()):
        before = _read(folder)
        if recipe.train.resume == "never":
            raise ConfigError(
                "`train.output_dir` is used",
                where=str(folder),
                why="it holds a run and `train.resume` is never",
                mend="name another folder, or write `resume: auto` to continue",
            )
        # A folder without a checkpoint has nothing that another recipe could continue wrongly.
        if any(folder.glob("checkpoint-*")) or any(folder.glob("round-*")):
            _refuse_changes(folder, before, now)
    if recipe.train.resume not in ("auto", "never"):
        start = Path(recipe.train.resume).expanduser().resolve().parent
        if start != folder.resolve() and (start / RECIPE).is_file():
            _refuse_changes(start, _read(start), now)


def save(recipe: Recipe, uses: rules.Uses) -> None:
    """Write `recipe.yaml` and `provenance.json` into the output folder. One process calls it.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    folder = Path(recipe.train.output_dir).expanduser()
    text = rules.to_yaml(recipe, uses)
    record = {
        "recipe_digest": digest(text),
        "align": align.__version__,
        "python": platform.python_version(),
        "versions": versions(),
        "git": {
            "align": git_state(Path(align.__file__).parent),
            "working_directory": git_state(Path.cwd()),
        },
        "arguments": sys.argv[1:],
    }
    atomic_write(folder / RECIPE, text)
    atomic_write(folder / PROVENANCE, json.dumps(record, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit of a folder's repository and whether tracked files differ from it; None outside a repository."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=folder, check=True, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL
    )
    return done.stdout.strip()


def _read(folder: Path) -> dict[str, Any]:
    """The recipe that a run's folder holds."""
    try:
        text = (folder / RECIPE).read_text(encoding="utf-8")
        record = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        plain = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise CheckpointError(
            "`train.output_dir` is used and is not a run",
            where=str(folder),
            why=f"it is not empty and has no {Path(error.filename).name}",
            mend="name a new folder",
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError("the run's records cannot be read", where=str(folder), why=str(error)) from error
    if not isinstance(record, dict) or not isinstance(plain, dict) or record.get("recipe_digest") != digest(text):
        raise CheckpointError(
            f"`{RECIPE}` does not match `{PROVENANCE}`",
            where=str(folder),
            why="one of them was changed after the run began",
            mend="restore them, or name a new folder",
        )
    return plain


def _refuse_changes(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = differences(before, now)
    if changed:
        lines = [f"`{key}`: {old!r} there, {new!r} now" for key, (old, new) in changed.items()]
        raise ConfigError(
            "the run in this folder has another recipe",
            where=str(folder),
            why="; ".join(lines),
            mend="name another `train.output_dir`; a resumed run may change ranks, budgets, servers and logging only",
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`section.key` -> (before, now) for what differs and a resumed run may not change."""
    old, new = _flat(before), _flat(now)
    keys = [key for key in {**old, **new} if key not in MAY_CHANGE]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, item in value.items():
            found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: value}
