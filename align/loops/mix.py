"""What a round trains on where that is not its own pairs alone: pairs of earlier rounds, and trust in its labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from align.core.errors import DataError
from align.core.seeds import generator
from align.data.artefacts import Artefact
from align.data.rollout_rows import from_row
from align.feedback.consistency import Consistency, consistency
from align.loops.rounds import Round

POLICY, BEFORE = "policy", "before"
"""Names of the two rewards whose rankings are compared (CREAM)."""
_CHUNK = 4096
_MEND = "run the loop again: it goes on with the stage before"


def make_data(one: Round, seed: int, trust: Literal["avg", "dyn"] | None = None) -> dict[str, Any]:
    """Write `data` of a round; return what is told of it.

    Args:
        seed: of which earlier pairs are taken.
        trust: `avg` gives every pair the mean consistency of the round as its `probability`, `dyn` each its prompt's
            own; a prompt without one (all answers tied, or too few) has no pair then, and is counted.

    Raises:
        CheckpointError: a stage before is not finished.
        DataError: earlier pairs of other columns, or no consistency at all.
    """
    pairs = Artefact.open(one.place("pairs"), _MEND)
    rows: list[Mapping[str, Any]] = list(pairs.rows())
    told = {"own": 0, "earlier": 0, "without consistency": 0}
    schema = _schema(pairs)
    key: dict[str, Any] = {"command": "data", "pairs": pairs.content, "seed": seed, "trust": trust, "earlier": []}
    info: dict[str, Any] = {}
    if trust is not None:
        judged = Artefact.open(one.place("judge"), _MEND)
        whole = len(rows)
        rows, info["consistency"] = _trusted(rows, judged, trust)
        told["without consistency"] = whole - len(rows)
        if "probability" not in schema.names:
            schema = schema.insert(schema.get_field_index("rejected") + 1, pa.field("probability", pa.float64()))
    told["own"] = len(rows)
    for back, (folder, share) in enumerate(one.earlier, 1):
        earlier = Artefact.open(folder, _MEND)
        _same_columns(schema, _schema(earlier), folder)
        taken = _share(list(earlier.rows()), share, seed, one.number, back)
        key["earlier"].append([earlier.content, share])
        rows += taken
        told["earlier"] += len(taken)
    made = Artefact(one.place("data"), key, len(rows), _CHUNK, schema)
    for chunk in made.missing:
        made.write(chunk, [rows[item] for item in made.items(chunk)])
    return {**info, "rows": told} if made.done else made.finish({**info, "rows": told})


def _trusted(
    rows: Sequence[Mapping[str, Any]], judged: Artefact, trust: Literal["avg", "dyn"]
) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    """Rows with C as `probability`. By the row's id, never by place: prompts without a pair are no rows."""
    groups = [from_row(row) for row in judged.rows()]
    ours, theirs = (
        [[answer.rewards.get(name, np.nan) for answer in group.answers] for group in groups]
        for name in (POLICY, BEFORE)
    )
    found: Consistency = consistency(ours, theirs)
    if np.isnan(found.mean):
        raise DataError(
            "no prompt has a consistency",
            where=str(judged.folder),
            why="two rankings of its answers are needed, and in each prompt one of them ties all answers",
            mend="draw more answers (`sample.n`), or a longer `sample.max_new_tokens`",
        )
    each = {(group.row.source, group.row.row): value for group, value in zip(groups, found.each.tolist(), strict=True)}
    kept: list[Mapping[str, Any]] = []
    for row in rows:
        own = each[row["provenance"]["source"], row["provenance"]["row"]]
        value = found.mean if trust == "avg" else own
        if not np.isnan(value):
            kept.append({**row, "probability": value})
    return kept, {"mean": found.mean, "undefined": found.undefined, "prompts": len(groups)}


def _share(rows: list[dict[str, Any]], share: float, seed: int, number: int, back: int) -> list[dict[str, Any]]:
    """A share of earlier rows, in their order."""
    count = round(share * len(rows))
    chosen = generator(seed, "earlier", number, back).permutation(len(rows))[:count]
    return [rows[place] for place in sorted(chosen.tolist())]


def _schema(made: Artefact) -> pa.Schema:
    return pq.read_schema(made.folder / "part-000000.parquet").remove_metadata()


def _same_columns(ours: pa.Schema, theirs: pa.Schema, folder: Path) -> None:
    if set(theirs.names) != set(ours.names):
        raise DataError(
            "pairs of an earlier round have other columns than this round's",
            where=str(folder),
            why=f"{', '.join(theirs.names)} there, {', '.join(ours.names)} here",
            mend="leave `loop.earlier` out, or keep to one rule and one label",
        )
