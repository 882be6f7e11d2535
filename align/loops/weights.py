"""What happens to a round's weights before the next one samples from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from align.core.errors import ModelError
from align.core.files import MANIFEST, atomic_directory


def extrapolate(trained: str | Path, before: str | Path, alpha: float, output: str | Path) -> Path:
    """trained + alpha * (trained - before), weight by weight in float32, as a model folder.

    Accelerated preference optimisation (arXiv 2410.06293), on weights: both are what the training of a round made, the
    second that of the round before (in the first round what the loop started from), and neither is extrapolated.
    For models whose logits are linear in the weights it is pi_{t+1} ~ hat_{t+1} (hat_{t+1} / hat_t)^alpha exactly.
    One file of weights is held in memory at a time.

    Raises:
        ModelError: a folder is no whole model, or the two have other weights.
    """
    trained, before, output = _folder(trained), _folder(before), Path(output)
    there = _where(before)
    with atomic_directory(output, info={"alpha": alpha}) as folder:
        for file in sorted(path for path in trained.iterdir() if path.is_file() and path.name != MANIFEST):
            if file.suffix != ".safetensors":
                shutil.copyfile(file, folder / file.name)
                continue
            with safe_open(file, "pt") as now:
                names = list(now.keys())
                _same(set(names), set(there), file, before)
                weights = {name: _moved(now.get_tensor(name), _read(there[name], name), alpha) for name in names}
                save_file(weights, folder / file.name, metadata=now.metadata())
    return output


def _moved(now: Tensor, old: Tensor, alpha: float) -> Tensor:
    # In bfloat16 the difference of a round is below what a weight resolves.
    new = now.float()
    return (new + alpha * (new - old.float())).contiguous()


def _folder(name: str | Path) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name)))


def _where(folder: Path) -> dict[str, Path]:
    """Name of a weight -> the file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    file = folder / "model.safetensors"
    if not file.is_file():
        raise ModelError(
            "weights can be extrapolated between whole models only",
            where=str(folder),
            why="it holds no model.safetensors",
            mend="train all weights, or leave `loop.extrapolate` out",
        )
    with safe_open(file, "pt") as weights:
        return dict.fromkeys(weights.keys(), file)


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as weights:
        return weights.get_tensor(name)


def _same(now: set[str], old: set[str], file: Path, before: Path) -> None:
    strange = sorted(now - old)
    if strange:
        raise ModelError(
            f"the weight `{strange[0]}` is not in the model of the round before",
            where=f"{file} and {before}",
            mend="start the loop from a model folder with the same weights",
        )
