"""A run's data: prepared, looked at, and delivered as whole global batches."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from align.core.errors import ConfigError, DataError
from align.data.groups import TokenGroup, beside
from align.data.known import Purpose
from align.data.prepare import PreparedData, SourceSpec, prepare_data
from align.data.rejected import RejectedLog
from align.data.stream import GlobalBatch, GroupDataset, Hole, collate
from align.data.tokenise import Tokeniser
from align.methods.base import Method
from align.trainers.config import AlignConfig

logger = logging.getLogger(__name__)

REJECTED_FILE = "rejected.jsonl"
_PEEK = 8


class BatchLoader(DataLoader):
    """Delivers global batches; never dispatched or padded by accelerate, whose `even_batches` repeats rows.

    It has a generator of its own: making an iterator must not draw from the run's random state, which a resume
    restores.
    """

    def __init__(self, dataset: GroupDataset, sampler: Any, workers: int, seed: int) -> None:
        super().__init__(
            dataset,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            generator=torch.Generator().manual_seed(seed),
            persistent_workers=workers > 0,
        )

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


@dataclass(eq=False)
class DataSide:
    """Training or evaluation data.

    Attributes:
        units: units of the method that one row gives (a pair read as singles gives two completions).
    """

    prepared: PreparedData
    units: int

    @property
    def dataset(self) -> GroupDataset:
        return self.prepared.dataset

    def rows_per_step(self, global_batch_size: int) -> int:
        if global_batch_size % self.units:
            raise ConfigError(
                f"`global_batch_size` is {global_batch_size}, and every row gives {self.units} units",
                mend=f"use a multiple of {self.units}",
            )
        return global_batch_size // self.units

    def loader(self, args: AlignConfig, shuffle: bool, batch_size: int | None = None, repeat: int = 1) -> BatchLoader:
        """Global batches of `batch_size` units (the arguments' by default), each given `repeat` times in a row."""
        rows = self.rows_per_step(batch_size or args.global_batch_size)
        sampler = self.prepared.sampler(rows, args.seed, shuffle, repeat)
        return BatchLoader(self.dataset, sampler, args.dataloader_num_workers if shuffle else 0, args.seed)


class RunData:
    """The streams of a run, and the account of what was left out."""

    def __init__(self, train: DataSide, evaluation: DataSide | None) -> None:
        self.train, self.eval = train, evaluation
        self._first_step_rows: int | None = None
        self._group: TokenGroup | None = None

    @classmethod
    def prepare(cls, train: Any, evaluation: Any, tokenizer: Any, method: Method, args: AlignConfig) -> RunData:
        """Open, look at and refuse data before anything is trained.

        Raises:
            DataError: not readable, not fit for the method's view, or too many bad rows.
        """
        tokenise = tokeniser_for(tokenizer, method, args)
        # Only rank 0 writes, each row once; a resumed run goes on with the file.
        path = Path(args.output_dir) / REJECTED_FILE if args.should_save else None
        resumes = args.resume != "never" and any(Path(args.output_dir).glob("checkpoint-*"))
        rejected = RejectedLog(path, args.max_bad_fraction, resume=resumes)
        sides = [_side(train, tokenise, rejected, "train")]
        if evaluation is not None:
            sides.append(_side(evaluation, tokenise, RejectedLog(None, args.max_bad_fraction), "eval"))
        return cls(sides[0], sides[1] if len(sides) > 1 else None)

    def note(self, batch: GlobalBatch) -> None:
        """Count a step's rows; every rank counts the same, so every rank stops at the same step.

        Raises:
            DataError: more rows are bad than `max_bad_fraction` allows.
        """
        if self._first_step_rows is None:
            self._first_step_rows = self.train.prepared.rows_parsed
        if batch.groups:
            self._group = batch.groups[0]
        self.train.prepared.rejected.record(batch)

    def dummy(self) -> TokenGroup:
        """Any group seen so far; a step without rows runs it times zero, so that ranks stay together."""
        if self._group is None:
            dataset = self.train.dataset
            items = (dataset[row] for row in range(len(dataset)))
            self._group = next((item for item in items if not isinstance(item, Hole)), None)
        if self._group is None:
            raise DataError("no row is usable", mend="look at rejected.jsonl in the output folder")
        return self._group

    def describe(self) -> dict[str, Any]:
        """For manifests: what the data are, and how much of them was read before the first step."""
        sides = {"train": self.train} | ({"eval": self.eval} if self.eval is not None else {})
        described = {
            name: {"fingerprint": side.prepared.fingerprint, **side.prepared.report} for name, side in sides.items()
        }
        described["train"]["rows_parsed_before_first_step"] = self._first_step_rows
        return described

    def state_dict(self) -> dict[str, Any]:
        return self.train.prepared.rejected.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.train.prepared.rejected.load_state_dict(state)


def tokeniser_for(tokenizer: Any, method: Method, args: AlignConfig) -> Tokeniser:
    """How rows become tokens in a run with these arguments."""
    # What is sampled has its room in `max_length`, and the rows of an online method give prompts alone.
    online = method.rollouts() is not None
    return Tokeniser(
        tokenizer,
        "prompts" if online else method.view,
        args.max_length - (getattr(args, "max_new_tokens", 0) if online else 0),
        score=args.score,  # type: ignore[arg-type]
        truncation=args.truncation,  # type: ignore[arg-type]
        chat_template=_template(args.chat_template),
        pairs=args.pairs,  # type: ignore[arg-type]
        needs=frozenset() if online else method.requires(),
        contexts=method.contexts(),
    )


def _side(given: Any, tokenise: Tokeniser, rejected: RejectedLog, purpose: Purpose) -> DataSide:
    prepared = prepare_data(_sources(given), tokenise, rejected=rejected, purpose=purpose)
    report = prepared.report
    logger.info(
        "%d rows, %d looked at: %d kept, %d bad, %d dropped",
        *(report[name] for name in ("rows", "looked", "kept", "bad", "dropped")),
    )
    for reason, found in report["reasons"].items():
        logger.info("left out: %d x %s (%s)", found["count"], reason, ", ".join(found["rows"]))
    if rejected.path is not None and report["reasons"]:
        logger.info("every row left out is in %s", rejected.path)
    return DataSide(prepared, _units(prepared, tokenise.view))


def _sources(given: Any) -> Sequence[Any]:
    """A path, a Dataset, rows, or a list of sources, as a list of sources."""
    if isinstance(given, (list, tuple)) and given and all(isinstance(one, (str, Path, SourceSpec)) for one in given):
        return given
    if isinstance(given, (list, tuple)) and given and all(isinstance(one, Mapping) and "name" in one for one in given):
        known = set(SourceSpec.__dataclass_fields__)
        if all(set(one) <= known for one in given):
            return given
    return [given]


def _units(prepared: PreparedData, view: str) -> int:
    if view != "singles":
        return 1
    items = prepared.dataset.__getitems__(range(min(_PEEK, len(prepared))))
    judged = ([one for one in item.completions if not beside(one.role)] for item in items if not isinstance(item, Hole))
    sizes = {len(own) for own in judged}
    return max(sizes, default=1)


def _template(path: str | None) -> str | None:
    if path is None:
        return None
    file = Path(path)
    if not file.is_file():
        raise ConfigError("there is no such chat template file", where=path, mend="give the path of a Jinja file")
    return file.read_text()
