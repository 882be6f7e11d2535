"""The tiny models, tokenizer and rows that other tests and users' tests stand on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.testing.tiny import BOS_ID, EOS_ID, FAMILIES, VOCAB, random_pairs, save_tiny, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_seeded_and_depend_on_their_whole_context(family: str) -> None:
    before = torch.random.get_rng_state()
    model = tiny_model(family)
    assert torch.equal(before, torch.random.get_rng_state())
    ids = torch.randint(3, VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = model(input_ids=ids).logits
        again = tiny_model(family)(input_ids=ids).logits
        other = tiny_model(family, seed=1)(input_ids=ids).logits
        moved = ids.clone()
        moved[0, 8] = (moved[0, 8] + 1) % VOCAB
        changed = (model(input_ids=moved).logits - first).abs().amax(-1)[0]
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert changed[:8].max() < 1e-6, "a causal model"
    assert changed[-1] > 1e-4, "attends to its context"


def test_the_window_is_shorter_than_rows() -> None:
    ids = torch.randint(3, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
    moved = ids.clone()
    moved[0, 0] = (moved[0, 0] + 1) % VOCAB
    for family, blind in (("mistral", True), ("gemma2", False), ("llama", False)):
        model = tiny_model(family)
        with torch.no_grad():
            change = (model(input_ids=moved).logits - model(input_ids=ids).logits).abs().max(-1).values[0, -1]
        assert (float(change) < 1e-6) == blind, family


def test_tokenizer_round_trip_and_template() -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == VOCAB
    text = "Why does it matter that the cät — sings?"
    ids = tokenizer(text).input_ids
    assert ids[0] == BOS_ID
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tiny_tokenizer(add_bos=False)(text).input_ids == ids[1:]
    assert tiny_tokenizer(chat_template=False).chat_template is None
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([user, answer], tokenize=False)
    longer = tokenizer.apply_chat_template([user, answer, user, answer], tokenize=False)
    assert whole == prompt + "yes</s>"
    assert longer.startswith(whole)
    encoded = tokenizer(whole, add_special_tokens=False).input_ids
    assert (encoded.count(BOS_ID), encoded.count(EOS_ID)) == (1, 1)


def test_rows() -> None:
    rows = random_pairs(50, seed=3)
    assert rows == random_pairs(50, seed=3)
    assert rows != random_pairs(50, seed=4)
    assert all(row["chosen"] != row["rejected"] and all(row.values()) for row in rows)
    chat = random_pairs(50, seed=3, conversational=True)
    assert [row["prompt"][0]["content"] for row in chat] == [row["prompt"] for row in rows]
    assert chat[0]["chosen"][0]["role"] == "assistant"


def test_saved_folder_loads(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen3", seed=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for ours, theirs in zip(model.parameters(), tiny_model("qwen3", seed=2).parameters(), strict=True):
        assert torch.equal(ours, theirs)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("hello").input_ids == tiny_tokenizer()("hello").input_ids
    assert not list(folder.glob("*.bin"))
