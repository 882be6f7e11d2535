"""`RolloutGroup` <-> a row of Parquet, exactly: every token, every float32, and null where feedback is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from align.data.groups import RowId
from align.data.rollouts import Answer, RolloutGroup

REWARDS = pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))
_ANSWER = pa.struct(
    [
        ("text", pa.string()),
        ("ids", pa.list_(pa.int64())),
        ("finished", pa.bool_()),
        ("logp", pa.list_(pa.float32())),
        ("origin", pa.string()),
        ("model", pa.string()),
        ("temperature", pa.float64()),
        ("rewards", REWARDS),
    ]
)
SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("row", pa.int64()),
        ("line", pa.int64()),
        ("file", pa.string()),
        ("iteration", pa.int64()),
        ("prompt", pa.string()),
        ("conversational", pa.bool_()),
        ("prompt_ids", pa.list_(pa.int64())),
        ("tools", pa.string()),
        ("columns", pa.string()),
        ("answers", pa.list_(_ANSWER)),
        ("wins", pa.list_(pa.list_(pa.float64()))),
    ]
)
"""One row a prompt. `prompt` is text, or where `conversational` JSON of messages; `tools` and `columns` are JSON.
`rewards` and `wins` hold null where the feedback is missing; `wins` itself is null where nobody compared."""


def to_row(group: RolloutGroup) -> dict[str, Any]:
    """A row of `SCHEMA`.

    Raises:
        TypeError: a column, or tools, that JSON cannot hold.
    """
    conversational = not isinstance(group.prompt, str)
    return {
        "source": group.row.source,
        "row": group.row.row,
        "line": group.row.line,
        "file": group.row.file,
        "iteration": group.iteration,
        "prompt": _json([dict(turn) for turn in group.prompt]) if conversational else group.prompt,  # type: ignore[arg-type]
        "conversational": conversational,
        "prompt_ids": group.prompt_ids.tolist(),
        "tools": None if group.tools is None else _json(group.tools),
        "columns": _json(dict(group.columns)),
        "answers": [_answer_row(answer) for answer in group.answers],
        "wins": None if group.wins is None else [[_null(value) for value in row] for row in group.wins.tolist()],
    }


def from_row(row: Mapping[str, Any]) -> RolloutGroup:
    """The group of a row."""
    return RolloutGroup(
        row=RowId(row["source"], row["row"], row["line"], row["file"]),
        prompt=tuple(json.loads(row["prompt"])) if row["conversational"] else row["prompt"],
        prompt_ids=np.array(row["prompt_ids"], dtype=np.int64),
        answers=tuple(_answer(answer) for answer in row["answers"]),
        wins=None if row["wins"] is None else _matrix(row["wins"]),
        columns=json.loads(row["columns"]),
        tools=None if row["tools"] is None else json.loads(row["tools"]),
        iteration=row["iteration"],
    )


def reward_rows(rewards: Mapping[str, float]) -> list[dict[str, Any]]:
    """Raw rewards by name as a value of `REWARDS`."""
    return [{"name": name, "value": _null(float(value))} for name, value in rewards.items()]


def _answer_row(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "ids": answer.ids.tolist(),
        "finished": answer.finished,
        "logp": None if answer.logp is None else np.asarray(answer.logp, dtype=np.float32),
        "origin": answer.origin,
        "model": answer.model,
        "temperature": answer.temperature,
        "rewards": reward_rows(answer.rewards),
    }


def _answer(row: Mapping[str, Any]) -> Answer:
    return Answer(
        ids=np.array(row["ids"], dtype=np.int64),
        text=row["text"],
        finished=row["finished"],
        logp=None if row["logp"] is None else np.array(row["logp"], dtype=np.float32),
        origin=row["origin"],
        model=row["model"],
        temperature=row["temperature"],
        rewards={one["name"]: _nan(one["value"]) for one in row["rewards"]},
    )


def _matrix(rows: list[list[float | None]]) -> np.ndarray:
    return np.array([[_nan(value) for value in row] for row in rows], dtype=np.float64).reshape(len(rows), len(rows))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True)


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
