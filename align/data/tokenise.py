"""`Group` -> `TokenGroup`: one tokenizer, one view, one policy of truncation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from align.core.errors import ConfigError
from align.core.hashing import digest
from align.data.chat import WithChat
from align.data.encode import scored_tokens
from align.data.groups import CONTRASTS, Completion, Group, Preference, Segment, TokenCompletion, TokenGroup
from align.data.layout import ANSWER_REWARDS, PAIR_FEEDBACK
from align.data.marks import mark_differences
from align.data.rows import RowError
from align.data.views import VIEWS, PairRule, Selection, select

Score = Literal["last", "all"]
Truncation = Literal["drop", "cut_prompt", "cut_completion"]
_ALLOWED = {
    "score": ("last", "all", None),
    "truncation": ("drop", "cut_prompt", "cut_completion"),
    "pairs": ("best_worst", "all", "adjacent"),
    "view": VIEWS,
}


@dataclass(frozen=True)
class _Prompt:
    """What is made once for a prompt: plain ids for joining, and the ids that the model gets."""

    text: str
    joining: list[int]
    ids: np.ndarray


class Tokeniser(WithChat):
    """Turns groups into token ids.

    Args:
        tokenizer: a Hugging Face tokenizer.
        view: the method's view.
        max_length: most tokens of a prompt with one completion; None for no limit.
        score: which assistant turns of an answer are scored; by default `all` for demonstrations, else `last`.
        truncation: `drop` a row that is too long; `cut_prompt` from the left, conversations by whole turns (a system
            turn stays), plain text by tokens (BOS stays); or `cut_completion` (`finished` is then false and no end is
            scored).
        chat_template: see `Chat`.
        pairs: how pairs are made of more than two answers.
        needs: columns that the method reads; `reward` and `ties` change what is made of a row.
        contexts: name -> text of another prompt, `{prompt}` for the last user turn; see `TokenGroup.contexts`.
    """

    def __init__(
        self,
        tokenizer: Any,
        view: str,
        max_length: int | None = 2048,
        score: Score | None = None,
        truncation: Truncation = "drop",
        chat_template: str | None = None,
        pairs: PairRule = "best_worst",
        needs: Collection[str] = frozenset(),
        contexts: Mapping[str, str] | None = None,
    ) -> None:
        given = {"score": score, "truncation": truncation, "pairs": pairs, "view": view}
        for name, value in given.items():
            if value not in _ALLOWED[name]:
                raise ConfigError(f"`{name}` is {value!r}", mend="use one of " + ", ".join(map(str, _ALLOWED[name])))
        if max_length is not None and max_length < 2:
            raise ConfigError(f"`max_length` is {max_length}", mend="use 2 or more tokens, or null for no limit")
        self.view, self.max_length, self.truncation, self.pairs = view, max_length, truncation, pairs
        self.score: Score = score or ("all" if view == "demonstrations" else "last")
        self.needs = frozenset(needs)
        self.contexts = dict(contexts or {})
        super().__init__(tokenizer, chat_template)

    @property
    def fingerprint(self) -> str:
        """A digest of all that determines ids: vocabulary, template, options."""
        tokenizer = self.encoder.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
        template = str(getattr(tokenizer, "chat_template", None))
        options = [self.view, self.max_length, self.score, self.truncation, self.pairs, sorted(self.needs)]
        if self.contexts:
            options.append(str(sorted(self.contexts.items())))
        return digest([vocabulary, template, self._template, options, self.encoder.start, self.encoder.eos])

    def __call__(self, group: Group) -> TokenGroup:
        """Tokens of the part of the group that the view reads.

        Raises:
            RowError: nothing in it for this view, an empty completion, too long, tied once tokenised.
            ModelError: the tokenizer lacks an EOS token or a chat template that these rows need.
        """
        ties = "ties" in self.needs and group.meta.get("ties") != "drop"
        chosen = select(group, self.view, self.pairs, ties, "reward" in self.needs)
        preferences = tuple(_with_feedback(pair, self.needs) for pair in chosen.preferences)
        if "reward" in self.needs:
            _check_rewards(chosen)
        group = replace(group, completions=chosen.completions, preferences=preferences)
        made = self._fitted(group)
        _refuse_equal(made)
        return mark_differences(made) if "marked" in self.needs else made

    def _fitted(self, group: Group) -> TokenGroup:
        made = self._made(group)
        limit = self.max_length
        if limit is None or _longest(made) <= limit:
            return made
        if any(completion.prompt is not None for completion in group.completions):
            raise RowError("", "too long for `max_length`, and answers after several prompts are not cut", dropped=True)
        if self.truncation == "cut_prompt":
            return self._cut_prompt(group, made, limit)
        if self.truncation == "cut_completion":
            return _cut_completions(made, limit)
        raise RowError("", "too long for `max_length`", dropped=True)

    def _made(self, group: Group) -> TokenGroup:
        prompt = self._prompt(group)
        completions = tuple(self._completion(group, prompt, completion) for completion in group.completions)
        if any(completion.prompt is not None for completion in group.completions):
            return self._after_several_prompts(group, completions)
        ids = prompt.ids
        if not len(ids) and completions:
            # Without a BOS the first token of a text has no context: it becomes the prompt, and is not scored.
            ids = completions[0].ids[:1]
            if any(completion.ids[0] != ids[0] for completion in completions):
                raise RowError("prompt", "empty, and without a BOS the answers have no common first token")
            completions = tuple(_without_first(completion) for completion in completions)
        return TokenGroup(
            row=group.row,
            prompt=ids,
            completions=completions,
            preferences=group.preferences,
            contexts={name: self._context(group, text) for name, text in self.contexts.items()},
        )

    def _context(self, group: Group, text: str) -> np.ndarray:
        """Ids of the group's prompt with its last user turn inside `text`."""
        if isinstance(group.prompt, str):
            return self._prompt(replace(group, prompt=text.replace("{prompt}", group.prompt))).ids
        place = max((i for i, message in enumerate(group.prompt) if message["role"] == "user"), default=-1)
        if place < 0 or not isinstance(group.prompt[place]["content"], str):
            raise RowError("prompt", "no user turn of plain text to ask again about")
        asked = {**group.prompt[place], "content": text.replace("{prompt}", group.prompt[place]["content"])}
        return self._prompt(replace(group, prompt=(*group.prompt[:place], asked, *group.prompt[place + 1 :]))).ids

    def _prompt(self, group: Group) -> _Prompt:
        if isinstance(group.prompt, str):
            joining = self.encoder.ids(group.prompt)
            return _Prompt(group.prompt, joining, _array(self.encoder.with_start(joining)))
        text = self.chat.render(group.prompt, group.tools, ask=True)
        joining = self.encoder.ids(text)
        return _Prompt(text, joining, _array(joining))

    def _after_several_prompts(self, group: Group, completions: tuple[TokenCompletion, ...]) -> TokenGroup:
        """A group whose completions answer prompts of their own: these begin alike, and what follows is scored in
        contrasts alone, where the method needs `scored_prompts` (what they share cancels in a contrast)."""
        prompts = [self._prompt(_asked(group, completion)).ids for completion in group.completions]
        shared = min(len(ids) for ids in prompts)
        while shared and any(not np.array_equal(ids[:shared], prompts[0][:shared]) for ids in prompts):
            shared -= 1
        if not shared:
            raise RowError("contrasts", "the prompts of one row share no token")
        return TokenGroup(
            row=group.row,
            prompt=prompts[0][:shared],
            completions=tuple(
                _after(ids[shared:], completion, "scored_prompts" in self.needs and _contrasted(completion))
                for ids, completion in zip(prompts, completions, strict=True)
            ),
            preferences=group.preferences,
        )

    def _completion(self, group: Group, prompt: _Prompt, completion: Completion) -> TokenCompletion:
        if completion.prompt is not None:
            group = _asked(group, completion)
            prompt = self._prompt(group)
        segments = self._scored(completion.segments)
        if isinstance(group.prompt, str):
            tokens = self._plain(prompt, segments)
        else:
            tokens = self.chat.completion(group.prompt, prompt.text, prompt.joining, segments, group.tools)
        if not tokens.mask.any():
            raise RowError("completion", "no token is scored")
        if "token_reward" in self.needs:
            _check_step_rewards(completion)
        return replace(
            tokens,
            label=completion.label,
            reward=completion.reward,
            rewards=completion.rewards,
            rank=completion.rank,
            weight=completion.weight,
            role=completion.role,
            step_rewards=completion.step_rewards,
        )

    def _scored(self, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        if self.score == "all":
            return segments
        last = max((place for place, segment in enumerate(segments) if segment.scored), default=-1)
        return tuple(
            replace(segment, scored=segment.scored and place == last) for place, segment in enumerate(segments)
        )

    def _plain(self, prompt: _Prompt, segments: tuple[Segment, ...]) -> TokenCompletion:
        text = "".join(segment.text for segment in segments)
        eos = self.encoder.need_eos()
        text = text.removesuffix(self.encoder.eos_text)  # appended once below, as an id
        if not text.strip():
            raise RowError("completion", "empty")
        ids = self.encoder.continuation(prompt.text, prompt.joining, text)
        mask, step = np.ones(len(ids), dtype=bool), np.zeros(len(ids), dtype=np.int64)
        if len(segments) > 1:
            mask, step = self._plain_turns(prompt, text, segments, ids)
        return TokenCompletion(
            ids=_array([*ids, eos]), mask=np.append(mask, True), step=np.append(step, step[-1:].max(initial=0))
        )

    def _plain_turns(
        self, prompt: _Prompt, text: str, segments: tuple[Segment, ...], ids: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mask and step of a completion of several turns; a token over the edge of a turn is not scored."""
        joined, spans = self.encoder.ids_and_spans(prompt.text + text)
        if joined[len(prompt.joining) :] != ids:
            raise RowError("completion", "tokens merge across the end of the prompt")
        spans = spans[len(prompt.joining) :]
        mask, step = np.zeros(len(ids), dtype=bool), np.zeros(len(ids), dtype=np.int64)
        low = len(prompt.text)
        for segment in segments:
            inside = scored_tokens(spans, [(low, low + len(segment.text))])
            step[inside] = segment.step
            if segment.scored:
                mask |= inside
            low += len(segment.text)
        return mask, step

    def _cut_prompt(self, group: Group, made: TokenGroup, limit: int) -> TokenGroup:
        longest = max((len(completion) for completion in made.completions), default=0)
        room = limit - longest
        if isinstance(group.prompt, str) and made.contexts:
            raise RowError("", "too long for `max_length`, and a prompt in other words is not cut", dropped=True)
        if isinstance(group.prompt, str):
            start = list(self.encoder.start)
            if room <= len(start):
                raise RowError("", "the completion alone is too long for `max_length`", dropped=True)
            kept = made.prompt[len(made.prompt) - (room - len(start)) :]
            return replace(made, prompt=_array([*start, *kept]))
        opening = tuple(message for message in group.prompt if message["role"] in ("system", "developer"))
        turns = group.prompt[len(opening) :]
        for place in range(1, len(turns)):
            if turns[place]["role"] != "user":
                continue
            shorter = self._made(replace(group, prompt=(*opening, *turns[place:])))
            if _longest(shorter) <= limit:
                return shorter
        raise RowError("", "too long for `max_length` with the last turn of the prompt alone", dropped=True)


def _with_feedback(pair: Preference, needs: Collection[str]) -> Preference:
    """The pair with the numbers that the method is about; a tie's are known, and no other number stands in for one."""
    if pair.tie and pair.margin is None:
        pair = replace(pair, margin=0.0)
    for part in PAIR_FEEDBACK:
        if part in needs and getattr(pair, part) is None:
            raise RowError(part, "missing")
    return pair


def _check_rewards(chosen: Selection) -> None:
    """Both answers of a pair have a reward, where the method is about it."""
    for pair in chosen.preferences:
        for part, index in zip(ANSWER_REWARDS, (pair.winner, pair.loser), strict=True):
            if chosen.completions[index].reward is None:
                raise RowError(part, "missing")


def _check_step_rewards(completion: Completion) -> None:
    turns = 1 + max(segment.step for segment in completion.segments)
    if completion.step_rewards is None:
        raise RowError("step_rewards", "missing: a list with a number for each of the assistant's turns")
    if len(completion.step_rewards) != turns:
        raise RowError("step_rewards", f"{len(completion.step_rewards)} numbers for {turns} turns of the assistant")


def _cut_completions(made: TokenGroup, limit: int) -> TokenGroup:
    room = limit - _longest_prompt(made)
    if room < 1:
        raise RowError("", "the prompt alone is too long for `max_length`", dropped=True)
    cut = []
    for completion in made.completions:
        if len(completion) > room:
            completion = replace(
                completion,
                ids=completion.ids[:room],
                mask=completion.mask[:room],
                step=completion.step[:room],
                finished=False,
            )
            if not completion.mask.any():
                raise RowError("", "no scored token is left within `max_length`", dropped=True)
        cut.append(completion)
    return replace(made, completions=tuple(cut))


def _asked(group: Group, completion: Completion) -> Group:
    """The group with the prompt that this completion answers."""
    return group if completion.prompt is None else replace(group, prompt=completion.prompt)


def _contrasted(completion: TokenCompletion) -> bool:
    return completion.role.partition(":")[0] in CONTRASTS


def _after(prompt: np.ndarray, completion: TokenCompletion, scored: bool) -> TokenCompletion:
    """The completion with tokens of its prompt in front, scored or not."""
    blank = np.zeros(len(prompt), dtype=np.int64)
    return replace(
        completion,
        ids=np.concatenate([prompt, completion.ids]),
        mask=np.concatenate([np.full(len(prompt), scored), completion.mask]),
        step=np.concatenate([blank, completion.step]),
    )


def _without_first(completion: TokenCompletion) -> TokenCompletion:
    if len(completion) < 2:
        raise RowError("completion", "one token only, and nothing before it to predict it from")
    return replace(completion, ids=completion.ids[1:], mask=completion.mask[1:], step=completion.step[1:])


def _refuse_equal(made: TokenGroup) -> None:
    """A preference between equal tokens (mostly made so by a cut) teaches nothing."""
    pairs = [(pair.winner, pair.loser) for pair in made.preferences if not pair.tie]
    if len(made.completions) == 2 and not pairs:
        one, other = made.completions
        if (one.label, one.reward) != (other.label, other.reward):
            pairs = [(0, 1)]
    if any(np.array_equal(made.completions[a].ids, made.completions[b].ids) for a, b in pairs):
        raise RowError("", "the two answers are the same tokens")


def _longest_prompt(made: TokenGroup) -> int:
    return max(len(prompt) for prompt in (made.prompt, *made.contexts.values()))


def _longest(made: TokenGroup) -> int:
    return _longest_prompt(made) + max((len(completion) for completion in made.completions), default=0)


def _array(ids: list[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int64)
