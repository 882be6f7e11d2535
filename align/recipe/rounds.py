"""The `rounds` of a recipe: a recipe of its own for each, and between two of them the data that the next trains on.

`output_dir/round-N` is a run like any other. From round 2 on `output_dir/round-N-data` is made before it: the margins
of all offline pairs under the last policy by row id (the next round's ensemble reads them), the ids of the rows kept of
each stream, pairs of the policy's own samples, and a report. It is there whole or not at all, and never made twice.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.core.errors import ConfigError, DataError
from align.core.files import atomic_directory, atomic_write
from align.core.progress import Progress, silent
from align.core.registry import METHODS
from align.core.seeds import derive
from align.data.groups import Group, TokenGroup
from align.data.prepare import open_sources
from align.data.rows import BadRow, RowError
from align.data.tokenise import Tokeniser
from align.evaluate.sides import Side, load_side
from align.loops import sera
from align.recipe import provenance, rules
from align.recipe.run import arguments, model_path, streams
from align.recipe.sections import Recipe, Rounds, Stream
from align.sampling.base import SamplingParams

DONE = "done.json"
MARGINS, OWN, REPORT = "margins.json", "own.jsonl", "report.json"
_CHUNK = 256


def recipes_of(recipe: Recipe, say: Callable[[str], None], progress: Progress = silent) -> Iterator[Recipe]:
    """Yield the recipe of every round that is not done yet, its data made. To ask for the next is to say that it is
    trained; a run that was stopped goes on with the round it was in.

    Args:
        recipe: with `rounds`.
        say: told in a line what a round trains on. progress: told of samples drawn.

    Raises:
        ConfigError: several processes, or an output folder with another run.
        DataError: no pair is left to choose from.
    """
    if recipe.rounds is None:
        raise ConfigError("the recipe has no `rounds`", mend="train it as it is")
    _refuse_several_processes()
    uses = rules.Uses.of(rules.build_method(METHODS.get(recipe.method.name), recipe.method.options))
    provenance.check_output(recipe, uses)
    provenance.save(recipe, uses)
    output = Path(recipe.train.output_dir).expanduser()
    for number in range(1, recipe.rounds.count + 1):
        folder = output / f"round-{number}"
        if (folder / DONE).is_file():
            continue
        say(f"round {number} of {recipe.rounds.count}" + ("" if number > 1 else ": all pairs"))
        yield _first(recipe, folder) if number == 1 else _later(recipe, uses, output, number, say, progress)
        atomic_write(folder / DONE, json.dumps({"round": number}) + "\n")
    _link(output / "policy", Path(f"round-{recipe.rounds.count}") / "policy")


def _refuse_several_processes() -> None:
    import torch

    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if max(devices, launched) > 1:
        raise ConfigError(
            f"`rounds` on {max(devices, launched)} devices",
            why="what a round trains on is chosen by one process",
            mend="run it on one: CUDA_VISIBLE_DEVICES=0 align train ...",
        )


def _first(recipe: Recipe, folder: Path) -> Recipe:
    return dataclasses.replace(recipe, rounds=None, train=dataclasses.replace(recipe.train, output_dir=str(folder)))


def _later(
    recipe: Recipe, uses: rules.Uses, output: Path, number: int, say: Callable[[str], None], progress: Progress
) -> Recipe:
    """Round `number`: from the last policy, against the initial reference, on the pairs chosen and made for it."""
    initial = recipe.reference.model or model_path(recipe)
    policy = output / f"round-{number - 1}" / "policy"
    data = output / f"round-{number}-data"
    if not data.is_dir():
        _make(recipe, policy, initial, number, data, progress)
    report = json.loads((data / REPORT).read_text())
    say(f"{report['kept']} of {report['offline']} pairs kept, {report['own']} of the policy's own samples")
    reference = dataclasses.replace(recipe.reference, model=initial) if uses.reference else recipe.reference
    return dataclasses.replace(
        _first(recipe, output / f"round-{number}"),
        model=dataclasses.replace(recipe.model, name=str(policy), revision=None),
        data=dataclasses.replace(recipe.data, train=_streams(recipe.data.train, data)),
        reference=reference,
    )


def _streams(train: Sequence[Stream], data: Path) -> tuple[Stream, ...]:
    kept = [(stream, data / f"only-{place}.json") for place, stream in enumerate(train)]
    chosen = [dataclasses.replace(stream, only=str(file)) for stream, file in kept if file.is_file()]
    own = [Stream(name=str(data / OWN))] if (data / OWN).is_file() else []
    return (*chosen, *own)


@dataclasses.dataclass
class _Offline:
    """The offline pairs: of every usable row its id, stream, margin and scored tokens of both answers; the prompts."""

    stream: dict[str, int] = dataclasses.field(default_factory=dict)
    margins: dict[str, float] = dataclasses.field(default_factory=dict)
    tokens: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    prompts: dict[str, Group] = dataclasses.field(default_factory=dict)


def _make(recipe: Recipe, policy: Path, initial: str, number: int, data: Path, progress: Progress) -> None:
    """Choose and make what round `number` trains on."""
    from align.trainers.data import tokeniser_for

    given = recipe.rounds or Rounds()
    names = {field.name for field in dataclasses.fields(sera.Sera)}
    options = sera.Sera(**{name: getattr(given, name) for name in names})
    ours, theirs = (
        load_side(str(name), recipe.model.dtype, trust_remote_code=recipe.model.trust_remote_code)
        for name in (policy, initial)
    )
    if recipe.data.chat_template != "model":
        ours.tokenizer.chat_template = Path(recipe.data.chat_template).expanduser().read_text()
    method = rules.build_method(METHODS.get(recipe.method.name), recipe.method.options)
    tokenise = tokeniser_for(ours.tokenizer, method, arguments(_first(recipe, data)))
    offline = _scored(recipe, tokenise, ours, theirs, options.per_token)
    earlier = data.parent / f"round-{number - 1}-data" / MARGINS
    before = json.loads(earlier.read_text()) if earlier.is_file() else None
    kept = set(sera.kept_rows(offline.margins, before, options))
    seed = derive(recipe.train.seed, "rounds", number) >> 11
    params = SamplingParams(max_new_tokens=given.max_new_tokens, seed=seed)
    prompts = list(offline.prompts.values()) if options.bootstrap else []
    drawn = sera.bootstrap(prompts, ours, theirs, options, params, progress) if prompts else []
    own = sera.strongest(drawn, len(kept), options)
    with atomic_directory(data) as folder:
        _write(folder / MARGINS, offline.margins)
        for place in sorted(set(offline.stream.values())):
            ids = [row for row, stream in offline.stream.items() if stream == place and row in kept]
            if ids:
                _write(folder / f"only-{place}.json", ids)
        if own:
            (folder / OWN).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own))
        _write(folder / REPORT, _report(recipe, offline, kept, own, number))


def _scored(recipe: Recipe, tokenise: Tokeniser, ours: Side, theirs: Side, per_token: bool) -> _Offline:
    found, waiting = _Offline(), list[TokenGroup]()

    def score() -> None:
        for group, h in zip(waiting, sera.log_ratios(ours, theirs, waiting, per_token), strict=True):
            pair = group.preferences[0]
            found.margins[str(group.row)] = float(h[pair.winner] - h[pair.loser])
        waiting.clear()

    for place, group, tokens in _usable(recipe, tokenise):
        pair = tokens.preferences[0]
        sides = (tokens.completions[pair.winner], tokens.completions[pair.loser])
        found.stream[str(group.row)] = place
        found.tokens[str(group.row)] = (int(sides[0].mask.sum()), int(sides[1].mask.sum()))
        found.prompts.setdefault(repr(group.prompt), group)
        waiting.append(tokens)
        if len(waiting) == _CHUNK:
            score()
    score()
    if not found.margins:
        raise DataError(
            "no pair is left to choose from",
            where=", ".join(stream.name for stream in recipe.data.train),
            mend="rejected.jsonl of the first round says why rows were left out",
        )
    return found


def _usable(recipe: Recipe, tokenise: Tokeniser) -> Iterator[tuple[int, Group, TokenGroup]]:
    """(number of the stream, row, its tokens) of every row that can be trained on, in file order."""
    for place, one in enumerate(open_sources(streams(recipe.data.train), tokenise.view, tokenise.needs)):
        for start in range(0, len(one.source), _CHUNK):
            numbers = range(start, min(start + _CHUNK, len(one.source)))
            for number, row in zip(numbers, one.source.read(numbers), strict=True):
                if isinstance(row, BadRow):
                    continue
                try:
                    group = one.reader(row, one.source.row_id(number))
                    tokens = tokenise(group)
                except RowError:  # the first round has counted and named it
                    continue
                yield place, group, tokens


def _report(
    recipe: Recipe, offline: _Offline, kept: set[str], own: Sequence[Mapping[str, Any]], number: int
) -> dict[str, Any]:
    """What moved: selection keeps what the policy believes already, so lengths and sources are worth a look."""
    margins = np.array(list(offline.margins.values()))
    tokens = {name: [offline.tokens[row] for row in rows] for name, rows in (("all", offline.tokens), ("kept", kept))}
    of = [[row for row, stream in offline.stream.items() if stream == i] for i in range(len(recipe.data.train))]
    return {
        "round": number,
        "offline": len(offline.margins),
        "kept": len(kept),
        "own": len(own),
        "margin": {
            "mean": float(margins.mean()),
            "mean_kept": float(np.mean([offline.margins[row] for row in kept])),
            "below_0": float((margins < 0).mean()),
        },
        "tokens_chosen_rejected": {name: np.mean(pairs, axis=0).tolist() for name, pairs in tokens.items()},
        "streams": [
            {"name": stream.name, "rows": len(rows), "kept": len(kept & set(rows))}
            for stream, rows in zip(recipe.data.train, of, strict=True)
        ],
    }


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _link(link: Path, target: Path) -> None:
    """`policy` of the whole run is the last round's, without a second copy of the weights."""
    fresh = link.with_name(".policy.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    os.replace(fresh, link)
