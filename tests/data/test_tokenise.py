"""Tokenisation: equal to TRL where TRL is right, lossless where tokens merge, every end scored once, cuts explicit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.core.errors import ConfigError, DataError, ModelError
from align.data.encode import Encoder
from align.data.groups import RowId, TokenGroup
from align.data.readers import reader_for
from align.data.rows import RowError
from align.data.tokenise import Tokeniser
from align.data.views import check_view
from align.testing.tiny import random_pairs, tiny_tokenizer

ROW = RowId("rows.jsonl", 0)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def tokens(row: dict[str, Any], tokenizer: Any, view: str = "pairs", **options: Any) -> TokenGroup:
    return Tokeniser(tokenizer, view, **options)(reader_for([row])(row, ROW))


def trl_rows(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, list[int]]]:
    """What `trl.DPOTrainer` 1.16 trains on."""
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = SimpleNamespace(_tokenizer=tokenizer)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    prepared = DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "train")
    return [{key: row[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in prepared]


@pytest.mark.parametrize("name", ["byte_level", "with_bos", "dummy_prefix", "prepending"])
def test_plain_pairs_are_trls_token_for_token(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    rows = random_pairs(30, seed=3)
    for row, theirs in zip(rows, trl_rows(rows, tokenizer), strict=True):
        ours = tokens(row, tokenizer)
        assert ours.prompt.tolist() == theirs["prompt_ids"]
        assert [c.ids.tolist() for c in ours.completions] == [theirs["chosen_ids"], theirs["rejected_ids"]]
        assert all(c.mask.all() and c.finished for c in ours.completions)


@pytest.mark.parametrize("name", ["byte_level", "with_bos"])
def test_conversations_are_trls_token_for_token(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    rows = random_pairs(10, seed=4, conversational=True)
    for row, theirs in zip(rows, trl_rows(rows, tokenizer), strict=True):
        ours = tokens(row, tokenizer)
        assert ours.prompt.tolist() == theirs["prompt_ids"]
        assert [c.ids.tolist() for c in ours.completions] == [theirs["chosen_ids"], theirs["rejected_ids"]]


def test_an_implicit_plain_prompt_is_trls() -> None:
    tokenizer = tiny_tokenizer()
    row = {"chosen": "Why the river? Because it rains.", "rejected": "Why the river? No."}
    (theirs,) = trl_rows([row], tokenizer)
    ours = tokens(row, tokenizer)
    assert ours.prompt.tolist() == theirs["prompt_ids"]
    assert [c.ids.tolist() for c in ours.completions] == [theirs["chosen_ids"], theirs["rejected_ids"]]


# Where tokens merge across the boundary TRL cuts the prompt short; ours keeps the prompt that inference sees.
MERGING = [("Hello wor", "ld, hello"), ("The sky is ", "blue"), ("The river", "s are"), ("a\n", "\nb"), ("é", "è x")]


@pytest.mark.parametrize("name", ["byte_level", "with_bos", "dummy_prefix", "prepending"])
@pytest.mark.parametrize(("prompt", "answer"), MERGING)
def test_tokens_that_merge_across_the_boundary(
    name: str, prompt: str, answer: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    made = tokens({"prompt": prompt, "chosen": answer, "rejected": "other"}, tokenizer)
    assert made.prompt.tolist() == tokenizer(prompt)["input_ids"]
    start = len(Encoder(tokenizer).start)
    whole = [*made.prompt.tolist()[start:], *made.completions[0].ids.tolist()[:-1]]
    assert tokenizer.decode(whole) == prompt + answer


def test_some_of_these_do_merge(byte_level: Any, dummy_prefix: Any, prepending: Any) -> None:
    for tokenizer in (byte_level, dummy_prefix, prepending):
        encoder = Encoder(tokenizer)
        merging = [
            (prompt, answer)
            for prompt, answer in MERGING
            if encoder.ids(prompt + answer)[: len(encoder.ids(prompt))] != encoder.ids(prompt)
        ]
        assert merging


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.text(st.sampled_from("ab Thesky\n.é日"), min_size=1, max_size=12).filter(lambda text: text.strip() != ""),
    answer=st.text(st.sampled_from("ab Thesky\n.é日"), min_size=1, max_size=12).filter(lambda text: text.strip() != ""),
    name=st.sampled_from(["byte_level", "with_bos", "dummy_prefix", "prepending"]),
)
def test_joined_tokens_decode_to_the_joined_text(
    prompt: str, answer: str, name: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    encoder = Encoder(tokenizer)
    prompt_ids = encoder.ids(prompt)
    ids = encoder.continuation(prompt, prompt_ids, answer)
    assert encoder.decode([*prompt_ids, *ids]) == encoder.decode(encoder.ids(prompt + answer))
    if name in ("byte_level", "with_bos"):  # lossless
        assert encoder.decode([*prompt_ids, *ids]) == prompt + answer


@pytest.mark.parametrize("prompt", ["The sky", "<s>The sky"])
def test_exactly_one_bos(prompt: str, with_bos: Any, byte_level: Any) -> None:
    row = {"prompt": prompt, "chosen": " is blue", "rejected": " is not"}
    made = tokens(row, with_bos)
    assert made.prompt.tolist().count(1) == 1
    assert made.prompt[0] == 1
    assert all(1 not in c.ids for c in made.completions)
    chat = tokens({"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, with_bos)
    assert [chat.prompt.tolist().count(1), chat.prompt[0]] == [1, 1]
    assert tokens({**row, "prompt": "The sky"}, byte_level).prompt.tolist().count(1) == 0


@pytest.mark.parametrize("answer", [" is blue", " is blue</s>"])
def test_eos_is_there_and_scored_exactly_once(answer: str, with_bos: Any) -> None:
    for row in (
        {"prompt": "The sky", "chosen": answer, "rejected": " no"},
        {"prompt": [user("The sky")], "chosen": [assistant(" is blue")], "rejected": [assistant(" no")]},
    ):
        for completion in tokens(row, with_bos).completions:
            assert completion.ids.tolist().count(2) == 1
            assert completion.ids[-1] == 2
            assert completion.mask[-1]


def test_a_tokenizer_that_appends_eos_itself(with_bos: Any) -> None:
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    row = {"prompt": "The sky", "chosen": " is blue", "rejected": " no"}
    ours, plain = tokens(row, tokenizer), tokens(row, with_bos)
    assert ours.prompt.tolist() == plain.prompt.tolist()
    assert ours.completions[0].ids.tolist() == plain.completions[0].ids.tolist()


MARKUP = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize(("score", "scored"), [("last", "again</s>"), ("all", "blue</s>again</s>")])
@pytest.mark.parametrize("template", [None, MARKUP])
def test_only_assistant_turns_are_scored_with_their_end(
    score: str, scored: str, template: str | None, with_bos: Any
) -> None:
    row = {"messages": [user("sky?"), assistant("blue"), user("sure?"), assistant("again")]}
    (made,) = tokens(row, with_bos, "demonstrations", score=score, chat_template=template).completions
    assert with_bos.decode(made.ids[made.mask]) == scored
    assert made.ids[-1] == 2  # what a template puts behind the last end token is cut
    assert sorted(set(made.step[made.mask].tolist())) == ([1] if score == "last" else [0, 1])


def test_score_defaults() -> None:
    tokenizer = tiny_tokenizer()
    assert [Tokeniser(tokenizer, view).score for view in ("pairs", "singles", "demonstrations")] == [
        "last",
        "last",
        "all",
    ]


def test_an_end_is_appended_where_the_template_renders_none(with_bos: Any) -> None:
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    bare += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    row = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    made = tokens(row, with_bos, chat_template=bare)
    assert [c.ids.tolist().count(2) for c in made.completions] == [1, 1]
    assert [int(c.ids[-1]) for c in made.completions] == [2, 2]


def test_plain_turns_of_a_transcript(with_bos: Any) -> None:
    row = {
        "chosen": "\n\nHuman: q\n\nAssistant: blue\n\nHuman: r\n\nAssistant: again",
        "rejected": "\n\nHuman: q\n\nAssistant: no",
    }
    for score, scored in (("last", " again</s>"), ("all", " blue again</s>")):
        completion = tokens(row, with_bos, score=score).completions[0]
        assert with_bos.decode(completion.ids[completion.mask]) == scored
        assert with_bos.decode(completion.ids) == " blue\n\nHuman: r\n\nAssistant: again</s>"


def test_text_without_bos_gives_its_first_token_as_prompt(byte_level: Any, with_bos: Any) -> None:
    made = tokens({"text": "The sky is blue"}, byte_level, "demonstrations")
    whole = byte_level("The sky is blue")["input_ids"]
    assert [*made.prompt.tolist(), *made.completions[0].ids.tolist()] == [*whole, 2]
    assert len(made.prompt) == 1
    assert tokens({"text": "The sky"}, with_bos, "demonstrations").prompt.tolist() == [1]


# --- what cannot be tokenised


def test_what_a_tokenizer_lacks_is_said(with_bos: Any) -> None:
    plain = {"prompt": "The sky", "chosen": " is blue", "rejected": " no"}
    chat = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    without_end = tiny_tokenizer()
    without_end.eos_token = None
    with pytest.raises(ModelError, match=r"no EOS token(.|\n)*mend: set `tokenizer.eos_token`"):
        tokens(plain, without_end)
    with pytest.raises(ModelError, match=r"no chat template(.|\n)*mend: set `data.chat_template`"):
        tokens(chat, tiny_tokenizer(chat_template=False))
    last_only = "{% for m in messages %}{{ m['content'] if loop.last else '-' }}{% endfor %}"
    with pytest.raises(ModelError, match="renders earlier turns otherwise"):
        tokens(chat, with_bos, chat_template=last_only)
    with pytest.raises(ModelError, match=r"no chat template file `missing\.jinja`"):
        tokens(chat, with_bos, chat_template="missing.jinja")
    with pytest.raises(ModelError, match="cannot render a conversation"):
        tokens(chat, with_bos, chat_template="{{ raise_exception('only one turn') }}")


@pytest.mark.parametrize(
    "options",
    [{"score": "first"}, {"truncation": "left"}, {"pairs": "some"}, {"max_length": 1}, {"max_length": 0}],
)
def test_options_are_checked(options: dict[str, Any], with_bos: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Tokeniser(with_bos, "pairs", **options)
    with pytest.raises(ConfigError, match="view"):
        Tokeniser(with_bos, "pear")


def test_a_template_that_refuses_a_row_is_a_bad_row(with_bos: Any) -> None:
    strict = MARKUP.replace(
        "{{ bos_token }}", "{% if messages[0].content == 'no' %}{{ raise_exception('no!') }}{% endif %}"
    )
    row = {"prompt": [user("no")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    with pytest.raises(RowError, match="the chat template refuses: no!"):
        tokens(row, with_bos, chat_template=strict)


# --- truncation


LONG = {"prompt": "The river is cold. " * 10, "chosen": " yes", "rejected": " no, it is not"}


def test_drop_is_the_default_and_is_no_bad_row(with_bos: Any) -> None:
    full = tokens(LONG, with_bos)
    size = len(full.prompt) + max(map(len, full.completions))
    assert len(tokens(LONG, with_bos, max_length=size).prompt) == len(full.prompt)
    with pytest.raises(RowError, match="too long for `max_length`") as caught:
        tokens(LONG, with_bos, max_length=size - 1)
    assert caught.value.dropped


def test_a_plain_prompt_is_cut_from_the_left_behind_bos(with_bos: Any) -> None:
    full = tokens(LONG, with_bos)
    cut = tokens(LONG, with_bos, max_length=40, truncation="cut_prompt")
    kept = 40 - max(map(len, full.completions))
    assert cut.prompt.tolist() == [1, *full.prompt[-(kept - 1) :].tolist()]
    assert [c.ids.tolist() for c in cut.completions] == [c.ids.tolist() for c in full.completions]
    with pytest.raises(RowError, match="the completion alone"):
        tokens(LONG, with_bos, max_length=5, truncation="cut_prompt")


def test_a_conversation_is_cut_by_whole_turns_and_keeps_its_system_turn(with_bos: Any) -> None:
    prompt = [
        {"role": "system", "content": "s"},
        user("first " * 5),
        assistant("one " * 5),
        user("second"),
        assistant("two"),
        user("third"),
    ]
    row = {"prompt": prompt, "chosen": [assistant("a")], "rejected": [assistant("b")]}
    full = len(tokens(row, with_bos).prompt)
    shorter = tokens({**row, "prompt": [prompt[0], *prompt[3:]]}, with_bos)
    size = len(shorter.prompt) + 2
    assert size < full
    cut = tokens(row, with_bos, max_length=size, truncation="cut_prompt")
    assert cut.prompt.tolist() == shorter.prompt.tolist()
    last = tokens({**row, "prompt": [prompt[0], prompt[5]]}, with_bos)
    cut = tokens(row, with_bos, max_length=size - 1, truncation="cut_prompt")
    assert cut.prompt.tolist() == last.prompt.tolist()
    with pytest.raises(RowError, match="with the last turn") as caught:
        tokens(row, with_bos, max_length=len(last.prompt) + 1, truncation="cut_prompt")
    assert caught.value.dropped


def test_a_cut_completion_has_no_end_and_says_so(with_bos: Any) -> None:
    full = tokens(LONG, with_bos)
    room = len(full.completions[0]) + 1
    cut = tokens(LONG, with_bos, max_length=len(full.prompt) + room, truncation="cut_completion")
    assert [c.finished for c in cut.completions] == [True, False]
    assert cut.completions[1].ids.tolist() == full.completions[1].ids[:room].tolist()
    assert 2 not in cut.completions[1].ids
    with pytest.raises(RowError, match="the prompt alone is too long"):
        tokens(LONG, with_bos, max_length=len(full.prompt), truncation="cut_completion")


@pytest.mark.parametrize("view", ["pairs", "singles", "lists"])
def test_answers_made_equal_by_a_cut_are_refused(view: str, with_bos: Any) -> None:
    row = {"prompt": "q", "chosen": "same start, then this", "rejected": "same start, then that"}
    with pytest.raises(RowError, match="the two answers are the same tokens"):
        tokens(row, with_bos, view, max_length=6, truncation="cut_completion")


# --- views


SCORED = {"prompt": "q", "completions": ["w", "x", "y", "z"], "scores": [2.0, 5.0, 2.0, 1.0]}


def pairs_of(made: TokenGroup, tokenizer: Any) -> list[tuple[str, str, float, float | None]]:
    texts = [tokenizer.decode(c.ids[:-1]) for c in made.completions]
    return [(texts[p.winner], texts[p.loser], round(p.weight, 6), p.margin) for p in made.preferences]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("best_worst", [("x", "z", 1.0, 4.0)]),
        ("adjacent", [("x", "w", 0.5, 3.0), ("y", "z", 0.5, 1.0)]),
        (
            "all",
            [
                ("x", "w", 0.2, 3.0),
                ("x", "y", 0.2, 3.0),
                ("x", "z", 0.2, 4.0),
                ("w", "z", 0.2, 1.0),
                ("y", "z", 0.2, 1.0),
            ],
        ),
    ],
)
def test_pairs_of_a_list_share_weight_one_and_skip_ties(rule: str, expected: Any, with_bos: Any) -> None:
    made = tokens(SCORED, with_bos, pairs=rule)
    assert pairs_of(made, with_bos) == expected
    assert len(made.completions) == len({text for pair in expected for text in pair[:2]})


def test_pairs_of_ranks(with_bos: Any) -> None:
    made = tokens({"prompt": "q", "completions": ["w", "x", "y"], "ranks": [3, 1, 2]}, with_bos)
    assert pairs_of(made, with_bos) == [("x", "w", 1.0, None)]


def test_ties_are_dropped_and_counted_unless_accepted(with_bos: Any) -> None:
    tied = {"prompt": "q", "chosen": "a", "rejected": "b", "tie": True}
    flat = {**SCORED, "scores": [1, 1, 1, 1]}
    for row in (tied, flat):
        for view in ("pairs", "lists"):
            with pytest.raises(RowError, match="a tie") as caught:
                tokens(row, with_bos, view)
            assert caught.value.dropped
        (pair,) = tokens(row, with_bos, needs={"ties"}).preferences
        assert (pair.tie, pair.probability) == (True, 0.5)


def test_singles_of_pairs_labels_and_rewards(with_bos: Any) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "weight": 2}
    assert [(c.label, c.reward, c.weight) for c in tokens(pair, with_bos, "singles").completions] == [
        (True, None, 2.0),
        (False, None, 2.0),
    ]
    rewarded = tokens(pair, with_bos, "singles", needs={"reward"})
    assert [c.reward for c in rewarded.completions] == [1.0, 0.0]
    label = {"prompt": "q", "completion": "a", "label": True}
    assert [c.reward for c in tokens(label, with_bos, "singles", needs={"reward"}).completions] == [1.0]
    rated = {"prompt": "q", "completion": "a", "reward": 0.3}
    assert [c.reward for c in tokens(rated, with_bos, "singles", needs={"reward"}).completions] == [0.3]
    assert [c.reward for c in tokens(SCORED, with_bos, "singles", needs={"reward"}).completions] == [2, 5, 2, 1]


def test_lists_and_demonstrations(with_bos: Any) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert [c.reward for c in tokens(pair, with_bos, "lists").completions] == [1.0, 0.0]
    assert [c.reward for c in tokens(SCORED, with_bos, "lists").completions] == [2, 5, 2, 1]
    for row, text in ((pair, "a"), (SCORED, "x"), ({"prompt": "q", "completion": "c"}, "c")):
        (only,) = tokens(row, with_bos, "demonstrations").completions
        assert with_bos.decode(only.ids) == text + "</s>"
    with pytest.raises(RowError, match="undesirable"):
        tokens({"prompt": "q", "completion": "c", "label": False}, with_bos, "demonstrations")
    assert tokens(pair, with_bos, "prompts").completions == ()


@pytest.mark.parametrize(
    ("row", "view", "needs", "words"),
    [
        ({"prompt": "q", "completion": "a", "label": True}, "pairs", (), "which of two answers is better"),
        ({"prompt": "q"}, "pairs", (), "the rows give prompts only"),
        ({"prompt": "q", "completion": "a", "reward": 1}, "singles", (), "a `label`"),
        ({"prompt": "q", "completion": "a"}, "singles", ("reward",), "a numeric `reward` or a `label`"),
        ({"prompt": "q", "completion": "a", "label": True}, "lists", (), "several answers a prompt"),
        ({"prompt": "q", "completion": "a", "reward": 1}, "demonstrations", (), "answers to imitate"),
    ],
)
def test_a_view_that_the_data_cannot_give(row: dict[str, Any], view: str, needs: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        check_view(view, needs, reader_for([row]).gives, "rows.jsonl")


def test_fingerprint_tells_options_and_tokenizers_apart(with_bos: Any, byte_level: Any) -> None:
    def mark(tokenizer: Any = with_bos, **options: Any) -> str:
        return Tokeniser(tokenizer, "pairs", **options).fingerprint

    marks = [mark(), mark(byte_level), mark(max_length=9), mark(score="all"), mark(chat_template=MARKUP)]
    assert len(set(marks)) == len(marks)
    used = Tokeniser(with_bos, "pairs")
    _ = used.chat
    assert used.fingerprint == mark()


def test_types_of_the_arrays(with_bos: Any) -> None:
    made = tokens({"prompt": "q", "chosen": "a", "rejected": "b"}, with_bos)
    (one, _) = made.completions
    assert [a.dtype for a in (made.prompt, one.ids, one.mask, one.step)] == [np.int64, np.int64, np.bool_, np.int64]
    assert len(one.ids) == len(one.mask) == len(one.step)
