"""Data sets whose columns name the winner."""

from __future__ import annotations

from align.data import transcripts as hh
from align.data.known.base import Choices, Known, Named, text
from align.data.messages import is_message_list, to_messages
from align.data.rows import Row, RowError

_CHOSEN_REJECTED = frozenset({"chosen", "rejected"})
_BY_NAME = "winner = column `chosen`"


def trl_hh(row: Row, choices: Choices) -> Row:
    """Answers that still hold role marks, where the two transcripts part before the last turn, become turns."""
    return {
        "prompt": row.get("prompt"),
        **{column: _turns(row.get(column), column) for column in ("chosen", "rejected")},
    }


def _turns(value: object, column: str) -> object:
    if not is_message_list(value):
        return value
    made: list[object] = []
    for message in to_messages(value, column):
        if message["role"] == "assistant" and hh.has_mark(message["content"]):
            made += hh.to_chat(hh.turns_of(f"{hh.ASSISTANT} {message['content']}", column))
        else:
            made.append(message)
    return made


def orca_distilabel(row: Row, choices: Choices) -> Row:
    made = {part: row.get(column) for part, column in (("system", "system"), ("prompt", "input"))}
    return made | {**{name: row.get(name) for name in _CHOSEN_REJECTED}, "tie": row.get("status") == "tie"}


def carper(row: Row, choices: Choices) -> Row:
    """`TL;DR:` stands at the start of the answers; it is what asks for them."""
    prompt, answers = text(row, "prompt"), {name: text(row, name) for name in ("chosen", "rejected")}
    if all(answer.lstrip().startswith("TL;DR:") for answer in answers.values()):
        prompt = prompt.rstrip() + "\n\nTL;DR:"
        answers = {name: answer.lstrip().removeprefix("TL;DR:") for name, answer in answers.items()}
    return {"prompt": prompt, **{name: " " + answer.lstrip() for name, answer in answers.items()}}


def step_dpo(row: Row, choices: Choices) -> Row:
    """One step of a solution after the steps that both share.

    As text the shared steps belong to the prompt. A chat cannot end a prompt within an assistant's turn, so there both
    answers start with them.
    """
    before, prompt = row.get("initial_reason_steps") or "", text(row, "prompt")
    steps = {name: text(row, name) for name in ("chosen", "rejected")}
    if choices.chat:
        return {"prompt": prompt, **{name: before + step for name, step in steps.items()}}
    return {"prompt": f"{prompt}\n{before}", **steps}


def red_team(row: Row, choices: Choices) -> Row:
    raise RowError("transcript", "a red-team attempt is one transcript, and no pair")


NAMED = (
    Known(
        "ultrafeedback_binarized",
        ("HuggingFaceH4/ultrafeedback_binarized",),
        frozenset({"prompt_id", "chosen", "rejected", "messages", "score_chosen", "score_rejected"}),
        Named(scores=("score_chosen", "score_rejected")),
        _BY_NAME,
        train=("train_prefs",),
        eval=("test_prefs",),
        trap="made from the faulty `overall_score`; `prompt` repeats the first message; equal scores are ties; "
        "`train_prefs` and `test_prefs`, never both",
    ),
    Known(
        "ultrafeedback_binarized_trl",
        ("trl-lib/ultrafeedback_binarized",),
        frozenset({"chosen", "rejected", "score_chosen", "score_rejected"}),
        Named(scores=("score_chosen", "score_rejected")),
        _BY_NAME,
        trap="the prompt is within both conversations; equal scores are ties",
    ),
    Known(
        "argilla_ultrafeedback",
        ("argilla/ultrafeedback-binarized-preferences",),
        frozenset({"instruction", "chosen_response", "rejected_response"}),
        Named(
            "instruction",
            "chosen_response",
            "rejected_response",
            scores=("chosen_avg_rating", "rejected_avg_rating"),
        ),
        "winner = column `chosen_response`",
        chat=True,
        trap="plain strings, read as a chat",
        checked="card",
    ),
    Known(
        "argilla_ultrafeedback_cleaned",
        ("argilla/ultrafeedback-binarized-preferences-cleaned",),
        frozenset({"prompt", "chosen", "rejected", "chosen-rating", "rejected-rating"}),
        Named(scores=("chosen-rating", "rejected-rating")),
        _BY_NAME,
        trap="names with hyphens; equal ratings are ties",
        checked="card",
    ),
    Known(
        "hh_red_team",
        ("Anthropic/hh-rlhf",),
        frozenset({"transcript", "task_description", "rating", "min_harmlessness_score_transcript"}),
        red_team,
        "none: no pairs",
        refused=dict.fromkeys(
            ("train", "eval"), "`red-team-attempts` holds single transcripts and a red teamer's rating, no pairs"
        ),
        trap="another schema under the id of HH",
    ),
    Known(
        "hh_rlhf",
        ("Anthropic/hh-rlhf",),
        _CHOSEN_REJECTED,
        Named(),
        _BY_NAME,
        unmistakable=False,
        trap="split at `\\n\\nHuman:` and `\\n\\nAssistant:` only; transcripts that part early keep their later turns, "
        "or are dropped with `diverging: drop`; choose a part with `data_dir`",
        checked="code",
    ),
    Known(
        "hh_rlhf_trl",
        ("trl-lib/hh-rlhf-helpful-base",),
        frozenset({"prompt", "chosen", "rejected"}),
        trl_hh,
        _BY_NAME,
        unmistakable=False,
        trap="answers may hold `\\n\\nHuman:`; they are split into turns",
    ),
    Known(
        "skywork",
        (
            "Skywork/Skywork-Reward-Preference-80K-v0.2",
            "Skywork/Skywork-Reward-Preference-80K-v0.1",
        ),
        frozenset({"chosen", "rejected", "source"}),
        Named(),
        _BY_NAME,
        unmistakable=False,
        warnings={
            "Skywork/Skywork-Reward-Preference-80K-v0.1": "4,957 of its pairs overlap with RewardBench; v0.2 is "
            "without them"
        },
        trap="v0.1 overlaps with RewardBench: warned",
        checked="card",
    ),
    Known(
        "orca_distilabel",
        ("argilla/distilabel-intel-orca-dpo-pairs",),
        frozenset({"system", "input", "chosen", "rejected", "status", "chosen_score"}),
        orca_distilabel,
        "winner = column `chosen`, as rated anew; `status: tie` is a tie",
        chat=True,
        filters={"status": "!= tie", "chosen_score": ">= 8", "in_gsm8k_train": False},
        trap="the prompt is `input`; the card advises three filters: `filters: recommended`",
    ),
    Known(
        "orca",
        ("Intel/orca_dpo_pairs",),
        frozenset({"system", "question", "chosen", "rejected"}),
        Named("question", system="system"),
        _BY_NAME,
        chat=True,
        trap="`system` may be empty; the winner is always GPT-4, and wins by style",
    ),
    Known(
        "orca_h4",
        ("HuggingFaceH4/orca_dpo_pairs",),
        _CHOSEN_REJECTED,
        Named(),
        _BY_NAME,
        unmistakable=False,
        train=("train_prefs",),
        eval=("test_prefs",),
        trap="splits are named `*_prefs`",
        checked="code",
    ),
    Known(
        "stack_exchange_paired",
        ("lvwerra/stack-exchange-paired",),
        frozenset({"question", "response_j", "response_k"}),
        Named("question", "response_j", "response_k"),
        "winner = column `response_j`",
        chat=True,
        trap="nothing in the names tells that j is better; choose a part with `data_dir` (data/rl, data/reward)",
    ),
    Known(
        "dpo_mix_7k",
        ("argilla/dpo-mix-7k",),
        frozenset({"dataset", "chosen", "rejected", "chosen_rating", "rejected_rating"}),
        Named(scores=("chosen_rating", "rejected_rating")),
        _BY_NAME,
        trap="some conversations have several turns; equal ratings are ties",
    ),
    Known(
        "capybara",
        ("argilla/distilabel-capybara-dpo-7k-binarized",),
        frozenset({"prompt", "chosen", "rejected", "rating_chosen", "rating_rejected"}),
        Named(scores=("rating_chosen", "rating_rejected")),
        _BY_NAME,
        trap="long conversations; the prompt is all that both share",
    ),
    Known(
        "orpo_dpo_mix",
        ("mlabonne/orpo-dpo-mix-40k",),
        frozenset({"source", "chosen", "rejected", "prompt", "question"}),
        Named(),
        _BY_NAME,
        filters={"source": "!= toxic-dpo-v0.2"},
        trap="holds a part that rewards toxic answers: `filters: recommended` leaves it out",
    ),
    Known(
        "tulu3",
        (
            "allenai/llama-3.1-tulu-3-8b-preference-mixture",
            "allenai/llama-3.1-tulu-3-70b-preference-mixture",
        ),
        frozenset({"id", "source", "prompt", "chosen", "rejected"}),
        Named(),
        _BY_NAME,
        unmistakable=False,
        trap="conversations of several turns: never message 1",
    ),
    Known(
        "snorkel",
        ("snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset",),
        frozenset({"prompt", "chosen", "rejected"}),
        Named(),
        _BY_NAME,
        unmistakable=False,
        trap="three splits `train_iteration_1..3`, one an iteration: state `split`",
    ),
    Known(
        "summarize_carper",
        ("CarperAI/openai_summarize_comparisons",),
        frozenset({"prompt", "chosen", "rejected"}),
        carper,
        _BY_NAME,
        unmistakable=False,
        trap="answers start with `TL;DR:`, which is moved to the prompt; text to be continued, no chat",
    ),
    Known(
        "tldr_preference",
        ("trl-lib/tldr-preference",),
        frozenset({"prompt", "chosen", "rejected"}),
        Named(),
        _BY_NAME,
        unmistakable=False,
        trap="text to be continued: prompts end in `TL;DR:`, answers start with a blank",
    ),
    Known(
        "truthy_dpo",
        ("jondurbin/truthy-dpo-v0.1", "jondurbin/truthy-dpo"),
        frozenset({"system", "prompt", "chosen", "rejected"}),
        Named(system="system"),
        _BY_NAME,
        unmistakable=False,
        chat=True,
        trap="`system` may be empty",
    ),
    Known(
        "gutenberg_dpo",
        ("jondurbin/gutenberg-dpo-v0.1", "jondurbin/gutenberg-dpo"),
        frozenset({"prompt", "chosen", "rejected"}),
        Named(),
        _BY_NAME,
        unmistakable=False,
        chat=True,
        trap="long answers: look at `max_length`",
    ),
    Known(
        "code_preference_pairs",
        ("Vezora/Code-Preference-Pairs",),
        frozenset({"input", "accepted", "rejected"}),
        Named("input", "accepted"),
        "winner = column `accepted`",
        unmistakable=False,
        chat=True,
        trap="the loser has a bug put in: pairs differ in few tokens",
        checked="code",
    ),
    Known(
        "step_dpo",
        ("xinlai/Math-Step-DPO-10K",),
        frozenset({"prompt", "initial_reason_steps", "chosen", "rejected"}),
        step_dpo,
        _BY_NAME,
        trap="the answers are one step each: `initial_reason_steps` belongs before them (text); with `chat: true` both "
        "answers start with the shared steps",
    ),
)
