"""Checkpoints that are whole or not there: what they hold, finding the newest good one, weights in and out."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align.core.errors import AlignError, CheckpointError
from align.core.files import (
    atomic_directory,
    clean_leftovers,
    commit_directory,
    partial_directory,
    stage_directory,
    verify_manifest,
)
from align.scoring.value import HEAD_FILE, ValueModel
from align.trainers.roles import RoleModule

logger = logging.getLogger(__name__)

STATE_FILE, TENSOR_FILE = "align_state.json", "align_state.safetensors"
TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders by step, oldest first."""
    found = [
        (int(match[1]), path) for path in Path(output_dir).glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def verify_checkpoint(path: str | Path) -> None:
    """Refuse a checkpoint that is cut short or changed.

    Raises:
        CheckpointError: names the file.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError("there is no such checkpoint", where=str(folder), mend="name a `checkpoint-N` folder")
    verify_manifest(folder)
    for needed in (STATE_FILE, TRAINER_STATE):
        if not (folder / needed).is_file():
            raise CheckpointError(f"`{needed}` is missing", where=str(folder), mend="use another checkpoint")


def step_of(folder: Path) -> int | None:
    """The optimiser step of a `checkpoint-N` folder."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run. Damaged ones are named in the log and passed over.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    folders = checkpoint_folders(output_dir)
    for folder in reversed(folders):
        try:
            verify_checkpoint(folder)
        except AlignError as error:
            logger.warning("passing over a damaged checkpoint:\n%s", error)
        else:
            return folder
    if folders:
        raise CheckpointError(
            "no checkpoint of this run is whole",
            where=str(output_dir),
            mend="use resume=never with another output_dir, or restore a checkpoint",
        )
    return None


@contextmanager
def staged(path: Path, main: bool, barrier: Any, info: Mapping[str, Any]) -> Iterator[Path]:
    """A folder that all ranks fill, renamed to `path` by the main rank when all have done so."""
    if main:
        stage_directory(path)
    barrier()
    partial = partial_directory(path)
    try:
        yield partial
        barrier()
        if main:
            commit_directory(path, info)
        barrier()
    except OSError as error:
        raise CheckpointError(
            "the checkpoint cannot be written",
            where=str(path),
            why=f"{error}; earlier checkpoints are untouched",
            mend="free space or lower `save_total_limit`, then run again: it resumes",
        ) from error
    finally:
        if main:
            shutil.rmtree(partial, ignore_errors=True)


def clean(output_dir: str | Path) -> None:
    """Remove what a killed save left behind."""
    for leftover in clean_leftovers(output_dir):
        logger.warning("removed %s, left by a save that was killed", leftover)


def prune(output_dir: str | Path, keep: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints, never the newest and never the best."""
    if keep is None or keep <= 0:
        return
    folders = checkpoint_folders(output_dir)
    for folder in folders[: max(0, len(folders) - keep)]:
        if best is None or folder.resolve() != Path(best).resolve():
            shutil.rmtree(folder, ignore_errors=True)


def save_state(folder: Path, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """What Trainer does not know: method state, metrics since the last log line, rejected rows, the EMA reference."""
    (folder / STATE_FILE).write_text(json.dumps(numbers, indent=1, sort_keys=True) + "\n")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSOR_FILE)


def load_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / STATE_FILE).read_text()), load_file(folder / TENSOR_FILE)


def save_roles(roles: RoleModule, folder: Path, state: Mapping[str, Tensor] | None, tokenizer: Any) -> None:
    """Each role in its own folder that `from_pretrained` loads. `state`: the gathered weights of a sharded module."""
    for name, model in roles.named_roles():
        prefix = f"roles.{name}."
        own = None if state is None else {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        model.save_pretrained(folder / name, state_dict=own)  # type: ignore[operator]
        share(folder / name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "policy")


def share(folder: Path) -> None:
    """Give weights the mode that other files get: safetensors 0.8 writes them for their owner alone."""
    like = next((file for file in sorted(folder.glob("*.json")) if file.is_file()), None)
    for file in folder.glob("*.safetensors"):
        if like is not None:
            file.chmod(like.stat().st_mode)


def copy_roles(roles: RoleModule, source: Path, target: Path) -> None:
    """Each role's folder of a checkpoint into the run's folder."""
    for name, _ in roles.named_roles():
        with atomic_directory(target / name) as folder:
            shutil.copytree(source / name, folder, dirs_exist_ok=True)


def load_roles(roles: RoleModule, folder: Path) -> None:
    """Weights of an unsharded module from a checkpoint, bit for bit.

    Raises:
        CheckpointError: weights are missing, or of another model.
    """
    for name, model in roles.named_roles():
        _load_weights(model, folder / name)


def _load_weights(model: nn.Module, folder: Path) -> None:
    state = _read_weights(model, folder)
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        result = set_peft_model_state_dict(model, state)
        missing = [key for key in result.missing_keys if "lora_" in key]
    else:
        result = model.load_state_dict(state, strict=False)
        # A tied weight is saved once; its other names count as missing and are not.
        own = dict(model.named_parameters(remove_duplicate=False))
        loaded = {own[key].data_ptr() for key in state if key in own}
        missing = [key for key in result.missing_keys if key not in own or own[key].data_ptr() not in loaded]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            "the weights do not fit the model",
            where=str(folder),
            why=f"missing {missing[:3]}, unexpected {list(result.unexpected_keys)[:3]}",
            mend="resume with the recipe that wrote the checkpoint",
        )


def _read_weights(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError("there are no safetensors weights", where=str(folder), mend="use another checkpoint")
    state: dict[str, Tensor] = {}
    for file in files:
        # A value model keeps its trunk as a plain transformers folder and its head beside it.
        prefix = "" if not isinstance(model, ValueModel) else "head." if file.name == HEAD_FILE else "trunk."
        state |= {f"{prefix}{name}": tensor for name, tensor in load_file(file).items()}
    return state
