"""Completions of many prompts into one file, in chunks that are never done twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from align.core.chunks import Chunks
from align.core.errors import ConfigError
from align.core.hashing import digest
from align.core.progress import Progress
from align.core.seeds import derive
from align.reference.weights_hash import module_hash
from align.sampling.base import Rollout, SamplingParams
from align.sampling.hf import HFSampler
from align.sampling.reading import Asked, PromptSet

Row = dict[str, Any]
Watch = Callable[[int], AbstractContextManager[Progress]]
"""Number of completions to draw -> a context that listens to how many are done."""


@dataclass(frozen=True)
class Done:
    """What a job came to.

    Attributes:
        prompts, completions, finished, tokens: of the whole output; `finished` counts completions that ended by
            themselves.
        chunks: in all. before: of these, done by an earlier run.
        sampled: tokens drawn by this run, in `seconds`.
    """

    output: str
    prompts: int
    completions: int
    finished: int
    tokens: int
    chunks: int
    before: int
    sampled: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Job:
    """What to sample.

    Attributes:
        model: the name that rows carry. prompts: with their ids. n: completions of each prompt.
    """

    sampler: HFSampler
    model: str
    prompts: PromptSet
    n: int
    params: SamplingParams

    def rows(self, prompts: Sequence[Asked], chunk: int, progress: Progress) -> list[Row]:
        """Sample some prompts. TRL's columns, and what tells where a completion comes from."""
        # A sampler counts prefixes from 0 in every call, so the draw must depend on the chunk.
        params = replace(self.params, seed=derive(self.params.seed, "chunk", chunk))
        groups = self.sampler.sample([asked.ids for asked in prompts], self.n, params, progress)
        return [
            self._row(asked, number, rollout)
            for asked, group in zip(prompts, groups, strict=True)
            for number, rollout in enumerate(group)
        ]

    def write(self, output: Path, chunk_size: int, watch: Watch, restart: bool = False) -> Done:
        """Sample what is missing of `output` and write it; nothing is done where it is complete.

        Args:
            restart: replace an output, or throw away work, of other settings.

        Raises:
            CheckpointError: work of other settings was begun there, or the disk is full.
            ConfigError: the output is not of this job.
        """
        chunks = Chunks(
            output.with_name(f".{output.name}.chunks"), self.key(), len(self.prompts.prompts), chunk_size, restart
        )
        before = len(chunks)
        started, sampled = time.monotonic(), 0
        if not chunks.assembled(output):
            before = len(chunks.finished)
            if output.exists() and before < len(chunks) and not restart:
                if not before:
                    chunks.remove()
                raise _in_the_way(output)
            sampled = self._sample(chunks, watch)
            chunks.assemble(output)
        seconds = time.monotonic() - started
        return Done(str(output), len(self.prompts.prompts), *_counted(output), len(chunks), before, sampled, seconds)

    def key(self) -> Mapping[str, Any]:
        """All that determines the rows; the batch size and the versions by rounding."""
        weight = next(self.sampler.model.parameters())
        return {
            "command": "generate",
            "model": self.model,
            "weights": module_hash(self.sampler.model),
            "prompts": digest([[str(asked.row), list(asked.ids)] for asked in self.prompts.prompts]),
            "end_ids": sorted(self.sampler.end_ids),
            "n": self.n,
            **asdict(self.params),
            "batch_size": self.sampler.batch_size,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": weight.device.type,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def _sample(self, chunks: Chunks, watch: Watch) -> int:
        """Do the missing chunks; the number of tokens drawn."""
        missing = chunks.missing
        tokens = 0
        with watch(sum(len(chunks.items(chunk)) for chunk in missing) * self.n) as progress:
            for chunk in missing:
                rows = self.rows([self.prompts.prompts[item] for item in chunks.items(chunk)], chunk, progress)
                chunks.write(chunk, rows)
                tokens += sum(row["tokens"] for row in rows)
        return tokens

    def _row(self, asked: Asked, number: int, rollout: Rollout) -> Row:
        row: Row = {"prompt": asked.prompt, "completion": rollout.text}
        if not isinstance(asked.prompt, str):
            row["prompt"] = [dict(message) for message in asked.prompt]
            row["completion"] = [{"role": "assistant", "content": rollout.text}]
        row |= {
            "finished": rollout.finished,
            "tokens": len(rollout),
            "logp": round(float(rollout.logp.mean(dtype="float64")), 6),
            "model": self.model,
            "row": str(asked.row),
            "sample": number,
            "seed": self.params.seed,
        }
        return row if asked.tools is None else {**row, "tools": asked.tools}


def _counted(output: Path) -> tuple[int, int, int]:
    """(completions, finished ones, tokens) of a written output."""
    completions = finished = tokens = 0
    with open(output, encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            completions, finished, tokens = completions + 1, finished + row["finished"], tokens + row["tokens"]
    return completions, finished, tokens


def _in_the_way(output: Path) -> ConfigError:
    return ConfigError(
        "the output is there already, and not of this command",
        where=str(output),
        mend="name another output, or replace it: --restart",
    )
