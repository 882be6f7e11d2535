"""Text -> token ids, so that a prompt and its completion join to the ids of the joined text."""

from __future__ import annotations

from typing import Any

import numpy as np

from align.core.errors import ModelError
from align.data.rows import RowError

_SENTINELS = ("\n", ".", "=", "a", "1")
_WINDOW = 5
_LONGEST = 8


class Encoder:
    """A tokenizer reduced to what training needs.

    Attributes:
        start: ids that stand before every plain text (one BOS, or none).
        eos: the end token's id, or None.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        bare = self.ids("a")
        dressed = [int(token) for token in tokenizer("a", verbose=False)["input_ids"]]
        place = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
        # What a tokenizer puts behind a text (an EOS, a SEP) is left out: the end is appended once, where it is.
        self.start: tuple[int, ...] = tuple(dressed[:place])
        self.eos: int | None = tokenizer.eos_token_id
        self.eos_text: str = tokenizer.eos_token or ""
        self.special = set(tokenizer.all_special_ids) | {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    def ids(self, text: str) -> list[int]:
        """Ids of the text alone, no special token added."""
        if not text:
            return []
        encoded = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])

    def ids_and_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters [start, end) that each covers. Needs a fast tokenizer."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise ModelError(
                "this tokenizer tells no character offsets, which answers of several turns need",
                mend="use the fast version of the tokenizer (a tokenizer.json)",
            )
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
        )
        return list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def with_start(self, ids: list[int]) -> list[int]:
        """The ids behind `start`, which is not doubled where the text brings its own."""
        return ids if ids[: len(self.start)] == list(self.start) else [*self.start, *ids]

    def need_eos(self) -> int:
        if self.eos is None:
            raise ModelError(
                "the tokenizer has no EOS token, and a plain completion must end in one",
                where=str(getattr(self.tokenizer, "name_or_path", "")),
                why="without it the model is never trained to stop",
                mend="set `tokenizer.eos_token` to a token of the vocabulary and save the tokenizer",
            )
        return self.eos

    def continuation(self, prompt: str, prompt_ids: list[int], completion: str) -> list[int]:
        """Ids of `completion` such that decode(prompt_ids + ids) is the joined text.

        Where the ids of the joined text start with the prompt's, they are the rest of it, token for token what TRL
        trains on. Where tokens merge across the boundary (TRL then cuts the prompt short), the completion is encoded
        behind a sentinel that it does not merge with. `prompt_ids` are `ids(prompt)`, without `start`.
        """
        joined = self.ids(prompt + completion)
        if joined[: len(prompt_ids)] == prompt_ids:
            return joined[len(prompt_ids) :]
        target = self.decode(joined)
        for sentinel in (*_SENTINELS, self.eos_text):
            if not sentinel:
                continue
            before = self.ids(sentinel)
            both = self.ids(sentinel + completion)
            candidate = both[len(before) :]
            if both[: len(before)] == before and self.decode([*prompt_ids, *candidate]) == target:
                return candidate
        candidate = self.ids(completion)
        if self.decode([*prompt_ids, *candidate]) == target:
            return candidate
        raise RowError("completion", "cannot be encoded apart from its prompt")


def scored_tokens(spans: list[tuple[int, int]], ranges: list[tuple[int, int]]) -> np.ndarray:
    """bool [T]: tokens that lie wholly within one of the character ranges."""
    mask = np.zeros(len(spans), dtype=bool)
    for place, (start, end) in enumerate(spans):
        mask[place] = any(low <= start and end <= high for low, high in ranges) and end > start
    return mask


def pieces(encoder: Encoder, ids: list[int]) -> list[str]:
    """The text of each token where it stands; they join to the decoded whole.

    A token is decoded behind a few of its neighbours, for some decoders drop the space of a first token. One that ends
    within a character gives nothing, and the token that completes it gives the character.
    """
    found: list[str] = []
    ends = [0]  # places where a character ends; a window begins at one, or bytes would be taken for broken ones
    for place in range(len(ids)):
        start, done = ends[max(0, len(ends) - _WINDOW)], ends[-1]
        before = encoder.decode(ids[start:done])
        now = encoder.decode(ids[start : place + 1])
        if now.endswith("\ufffd") and place + 1 < len(ids) and place - done < _LONGEST:
            found.append("")
            continue
        found.append(now[len(before) :])
        ends.append(place + 1)
    return found
