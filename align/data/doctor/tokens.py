"""What only tokens tell: lengths, what `max_length` does, and rows as the model sees them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.core.errors import AlignError
from align.core.progress import Progress, silent
from align.data.doctor.numbers import evenly, histogram, quantiles, share
from align.data.doctor.rows import Reasons, longer, role_of
from align.data.encode import Encoder, pieces
from align.data.groups import Completion, Group, TokenCompletion, TokenGroup
from align.data.rows import RowError
from align.data.tokenise import Tokeniser

_CHUNK = 256
_HEAD, _TAIL = 300, 100
_TRIES = 50


class BatchedEncoder(Encoder):
    """An encoder that is told beforehand which texts will be asked for, and encodes them at once."""

    def __init__(self, tokenizer: Any) -> None:
        self._known: dict[str, list[int]] = {}
        super().__init__(tokenizer)

    def expect(self, texts: Iterable[str]) -> None:
        """Forget what was known, and encode these."""
        wanted = [text for text in dict.fromkeys(texts) if text]
        if not wanted:
            return
        encoded = self.tokenizer(wanted, add_special_tokens=False, return_attention_mask=False, verbose=False)
        self._known = dict(zip(wanted, encoded["input_ids"], strict=True))

    def ids(self, text: str) -> list[int]:
        found = self._known.get(text)
        return list(found) if found is not None else super().ids(text)


@dataclass
class Lengths:
    """Lengths of the sampled rows in tokens, and what became of them."""

    unit: str
    looked: int = 0
    reasons: Reasons = field(default_factory=Reasons)
    prompt: list[int] = field(default_factory=list)
    total: list[int] = field(default_factory=list)
    roles: dict[str, list[int]] = field(default_factory=dict)
    differences: list[int] = field(default_factory=list)
    too_long: int = 0
    cut_prompts: int = 0
    cut_answers: int = 0
    dropped: int = 0
    shapes: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    """(prompt, answers) of every group that is trained on, after truncation."""

    def count(self, natural: TokenGroup) -> None:
        self.prompt.append(len(natural.prompt))
        self.total.append(len(natural.prompt) + max((len(one) for one in natural.completions), default=0))
        for role, completion in token_roles(natural):
            self.roles.setdefault(role, []).append(len(completion))
        for pair in natural.preferences:
            self.differences.append(len(natural.completions[pair.winner]) - len(natural.completions[pair.loser]))

    def report(self, limit: int | None, of: int) -> dict[str, Any]:
        rows = len(self.prompt)
        return {
            "unit": self.unit,
            "looked": self.looked,
            "of": of,
            "all": self.looked == of,
            "prompt": quantiles(self.prompt),
            **{role: quantiles(values) for role, values in self.roles.items()},
            "prompt_and_longest": quantiles(self.total),
            "histogram": histogram(self.total),
            "length_bias": longer(self.differences, self.unit),
            "reasons": self.reasons.report(),
            "bad": self.reasons.total(False),
            "bad_share": self.reasons.total(False) / self.looked if self.looked else 0.0,
            "max_length": limit,
            "truncation": None
            if limit is None
            else {
                "too_long": share(self.too_long, rows),
                "dropped": self.dropped,
                "cut_prompt": self.cut_prompts,
                "cut_completion": self.cut_answers,
            },
        }


def measure(groups: Sequence[Group], tokenise: Tokeniser, advance: Progress = silent) -> Lengths:
    """Tokenise groups without and, where they are too long, with the limit of `tokenise`."""
    encoder = BatchedEncoder(tokenise.encoder.tokenizer)
    limited = copy.copy(tokenise)
    limited.encoder = encoder
    natural = copy.copy(limited)
    natural.max_length = None
    found = Lengths("tokens")
    for start in range(0, len(groups), _CHUNK):
        chunk = groups[start : start + _CHUNK]
        encoder.expect(text for group in chunk for text in _texts(group, natural))
        for group in chunk:
            _one(found, group, natural, limited)
        advance(len(chunk))
    return found


def _one(found: Lengths, group: Group, natural: Tokeniser, limited: Tokeniser) -> None:
    found.looked += 1
    try:
        made = natural(group)
    except RowError as error:
        found.reasons.add(group.row, error, None)
        return
    found.count(made)
    limit = limited.max_length
    if limit is not None and found.total[-1] > limit:
        found.too_long += 1
        whole = made
        try:
            made = limited(group)
        except RowError as error:
            found.dropped += 1
            found.reasons.add(group.row, error, None)
            return
        found.cut_answers += any(not completion.finished for completion in made.completions)
        found.cut_prompts += len(made.prompt) < len(whole.prompt)
    found.shapes.append((len(made.prompt), tuple(len(completion) for completion in made.completions)))


def _texts(group: Group, tokenise: Tokeniser) -> Iterator[str]:
    """The texts that will be encoded for a group; one that is missing here is encoded by itself later."""
    if isinstance(group.prompt, str):
        yield group.prompt
        for completion in group.completions:
            yield group.prompt + completion.text.removesuffix(tokenise.encoder.eos_text)
        return
    try:
        yield tokenise.chat.render(group.prompt, group.tools, ask=True)
        for completion in group.completions:
            if len(completion.segments) == 1:
                yield tokenise.chat.render(_conversation(group, completion), group.tools)
    except (RowError, AlignError):  # said where the row is tokenised
        return


def _conversation(group: Group, completion: Completion) -> list[Any]:
    return [*group.prompt, *(segment.message or {} for segment in completion.segments)]


def words(groups: Sequence[Group], prompt_text: Any) -> Lengths:
    """Lengths in words between white space, where no tokenizer was named."""
    found = Lengths("words")
    for group in groups:
        found.looked += 1
        prompt = len(prompt_text(group.prompt).split())
        counts = [len(completion.text.split()) for completion in group.completions]
        found.prompt.append(prompt)
        found.total.append(prompt + max(counts, default=0))
        if group.preferences:
            for pair in group.preferences:
                found.roles.setdefault("winner", []).append(counts[pair.winner])
                found.roles.setdefault("loser", []).append(counts[pair.loser])
                found.differences.append(counts[pair.winner] - counts[pair.loser])
        else:
            for completion, count in zip(group.completions, counts, strict=True):
                found.roles.setdefault(role_of(completion.label), []).append(count)
    return found


def token_roles(group: TokenGroup) -> Iterator[tuple[str, TokenCompletion]]:
    """As `roles_of`, of tokens."""
    if group.preferences:
        for pair in group.preferences:
            yield "winner", group.completions[pair.winner]
            yield "loser", group.completions[pair.loser]
        return
    for completion in group.completions:
        yield role_of(completion.label), completion


# -- rows as the model sees them --------------------------------------------------------------------------------------


def rendered(groups: Sequence[Group], tokenise: Tokeniser, count: int) -> list[dict[str, Any]]:
    """Up to `count` of the groups, evenly spaced, token by token as they are trained on: `text` and `scored`."""
    starts = [*evenly(len(groups), min(count, len(groups))), len(groups)]
    found = []
    for start, end in itertools.pairwise(starts):
        made = next(_made(groups[start : min(end, start + _TRIES)], tokenise), None)
        if made is not None:
            found.append(_rendered(made, tokenise.encoder))
    return found


def _made(groups: Sequence[Group], tokenise: Tokeniser) -> Iterator[TokenGroup]:
    for group in groups:
        try:
            yield tokenise(group)
        except RowError:
            continue


def _rendered(group: TokenGroup, encoder: Encoder) -> dict[str, Any]:
    answers = [
        {
            "role": role,
            "tokens": _marked(encoder, one.ids.tolist(), one.mask.tolist()),
            "finished": one.finished,
        }
        for role, one in token_roles(group)
    ]
    prompt = _marked(encoder, group.prompt.tolist(), [False] * len(group.prompt))
    return {"row": str(group.row), "prompt": prompt, "completions": answers}


def _marked(encoder: Encoder, ids: list[int], scored: list[bool]) -> list[dict[str, Any]]:
    """One entry a token; the middle of a long text is one entry that says how many tokens it stands for."""
    entries = [{"text": text, "scored": mark} for text, mark in zip(pieces(encoder, ids), scored, strict=True)]
    left_out = len(entries) - _HEAD - _TAIL
    if left_out <= 0:
        return entries
    gap = {"text": f" [... {left_out} tokens ...] ", "scored": False, "left_out": left_out}
    return [*entries[:_HEAD], gap, *entries[-_TAIL:]]
