"""Marks of differing tokens, and prompts in other words."""

from __future__ import annotations

import numpy as np
import pytest

from align.data.groups import Completion, Group, Preference, RowId, Segment, TokenCompletion, TokenGroup
from align.data.marks import mark_differences
from align.data.rows import RowError
from align.data.tokenise import Tokeniser
from align.testing.tiny import tiny_tokenizer


def completion(*ids: int, unscored: int = 0) -> TokenCompletion:
    mask = np.arange(len(ids)) >= unscored
    return TokenCompletion(np.array(ids), mask, np.zeros(len(ids), dtype=np.int64))


@pytest.mark.parametrize(
    ("first", "second", "marks"),
    [
        ((5, 6, 7, 8, 2), (5, 9, 9, 8, 2), ("01100", "01100")),
        ((5, 6, 7, 2), (5, 7, 2), ("0100", "000")),
        ((5, 6, 2), (7, 8, 9, 2), ("110", "1110")),
        ((4, 4, 4, 2), (4, 4, 2), ("1000", "000")),
        ((5, 1, 6, 2, 7, 3), (5, 6, 7), ("010101", "000")),
    ],
)
def test_what_differs_is_marked(first: tuple[int, ...], second: tuple[int, ...], marks: tuple[str, str]) -> None:
    group = TokenGroup(RowId("a", 0), np.array([3]), (completion(*first), completion(*second)), (Preference(0, 1),))
    (pair,) = mark_differences(group).preferences
    assert pair.marks is not None
    assert tuple("".join(str(int(mark)) for mark in own) for own in pair.marks) == marks


def test_marks_belong_to_the_pair_and_to_scored_tokens() -> None:
    answers = (completion(5, 6, 7), completion(5, 6, 8), completion(4, 6, 7, unscored=1))
    group = TokenGroup(RowId("a", 0), np.array([3]), answers, (Preference(0, 1), Preference(2, 0)))
    first, second = (pair.marks for pair in mark_differences(group).preferences)
    assert first is not None and second is not None
    assert [own.tolist() for own in first] == [[False, False, True]] * 2
    assert [own.tolist() for own in second] == [[False] * 3, [True, False, False]]


def pair_of(prompt: object) -> Group:
    answers = tuple(Completion((Segment("assistant", text),)) for text in (" It is blue.", " It is green."))
    if not isinstance(prompt, str):
        message = [{"role": "assistant", "content": text} for text in ("It is blue.", "It is green.")]
        answers = tuple(Completion((Segment("assistant", str(m["content"]), message=m),)) for m in message)
    return Group(RowId("a", 0), prompt, answers, (Preference(0, 1),))  # type: ignore[arg-type]


def test_the_tokeniser_marks_only_where_it_is_asked() -> None:
    plain, marking = (Tokeniser(tiny_tokenizer(), "pairs", needs=needs) for needs in ((), ("marked",)))
    assert plain(pair_of("The sky?")).preferences[0].marks is None
    marks = marking(pair_of("The sky?")).preferences[0].marks
    assert marks is not None and all(0 < own.sum() < len(own) for own in marks)


def test_a_prompt_in_other_words() -> None:
    contexts = {"better": "Do well.\n{prompt}", "worse": "Do badly.\n{prompt}"}
    tokenizer = tiny_tokenizer()
    made = Tokeniser(tokenizer, "pairs", contexts=contexts)(pair_of("The sky?"))
    plain = Tokeniser(tokenizer, "pairs")(pair_of("The sky?"))
    assert {name: tokenizer.decode(ids) for name, ids in made.contexts.items()} == {
        "better": "<s>Do well.\nThe sky?",
        "worse": "<s>Do badly.\nThe sky?",
    }
    assert not plain.contexts
    for ours, theirs in zip(made.completions, plain.completions, strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist()


def test_of_a_conversation_the_last_user_turn_is_asked_again() -> None:
    turns = [("system", "Be brief."), ("user", "Hello."), ("assistant", "Hi."), ("user", "The sky?")]
    prompt = tuple({"role": role, "content": content} for role, content in turns)
    tokenizer = tiny_tokenizer()
    made = Tokeniser(tokenizer, "pairs", contexts={"better": "Well: {prompt}"})(pair_of(prompt))
    plain, asked = tokenizer.decode(made.prompt), tokenizer.decode(made.contexts["better"])
    assert asked == plain.replace("<|user|>The sky?", "<|user|>Well: The sky?") != plain


def test_a_long_context_counts_against_the_limit() -> None:
    contexts = {"better": "word " * 40 + "{prompt}"}
    Tokeniser(tiny_tokenizer(), "pairs", 60)(pair_of("The sky?"))
    for truncation in ("drop", "cut_prompt", "cut_completion"):
        with pytest.raises(RowError, match="too long"):
            Tokeniser(tiny_tokenizer(), "pairs", 60, contexts=contexts, truncation=truncation)(pair_of("The sky?"))


def test_contexts_change_the_fingerprint() -> None:
    prints = {
        Tokeniser(tiny_tokenizer(), "pairs", contexts=c).fingerprint for c in (None, {"a": "{prompt}"}, {"a": "b"})
    }
    assert len(prints) == 3
