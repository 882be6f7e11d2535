"""Prompts are asked with the ids that training scores after, and answers come back as text that joins to them."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from align.core.errors import DataError, ModelError
from align.data.groups import RowId
from align.data.readers import reader_for
from align.data.tokenise import Tokeniser
from align.sampling import SamplingParams
from align.sampling.hf import HFSampler
from align.sampling.prompts import PromptEncoder, prompt_ids
from align.testing.tiny import BOS_ID, EOS_ID, random_pairs, tiny_model, tiny_tokenizer


def prepending():
    """Llama-2-like: a blank before every text, which decoding takes off again."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    corpus = [text for row in random_pairs(100, seed=2) for text in row.values()]
    tokenizer.train_from_iterator((word for text in corpus for word in text.split()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "bos": tiny_tokenizer,
    "no_bos": lambda: tiny_tokenizer(add_bos=False),
    "no_template": lambda: tiny_tokenizer(chat_template=False),
    "prepending": prepending,
}


@pytest.mark.parametrize("name", list(TOKENIZERS))
@pytest.mark.parametrize("conversational", [False, True])
def test_ids_are_those_that_training_scores_after(name, conversational):
    tokenizer = TOKENIZERS[name]()
    if conversational and not tokenizer.chat_template:
        with pytest.raises(ModelError, match="no chat template"):
            prompt_ids(tokenizer, [{"role": "user", "content": "a"}])
        return
    encode, tokenise = PromptEncoder(tokenizer), Tokeniser(tokenizer, "pairs", None)
    rng = random.Random(3)
    for number, row in enumerate(random_pairs(40, seed=5, conversational=conversational)):
        if conversational and number % 2:
            turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
            row["prompt"] = [*turns, {"role": "assistant", "content": "Yes?"}, *row["prompt"]]
        elif not conversational:
            row["prompt"] = rng.choice(["", "<s>", " ", "\n"]) + row["prompt"] + rng.choice(["", " ", "\n", "</s>"])
        group = reader_for([row])(row, RowId("rows", number))
        wanted = tokenise(group).prompt.tolist()
        assert encode(row["prompt"]) == wanted
        assert prompt_ids(tokenizer, row["prompt"]) == wanted
        assert wanted.count(BOS_ID) == (name in ("bos", "no_template") or conversational or row["prompt"][:3] == "<s>")


def test_an_empty_text_starts_from_bos_or_is_refused():
    assert prompt_ids(tiny_tokenizer(), "") == [BOS_ID]
    with pytest.raises(DataError, match="no BOS to start from"):
        prompt_ids(tiny_tokenizer(add_bos=False), "")


def test_a_template_of_one_s_own_and_its_end_of_turn():
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|tool|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer = tiny_tokenizer()
    encode = PromptEncoder(tokenizer, template)
    assert tokenizer.decode(encode([{"role": "user", "content": "a"}])) == "<|user|>a<|tool|>\n<|assistant|>"
    assert encode.end_of_turn == {tokenizer.convert_tokens_to_ids("<|tool|>")}
    assert PromptEncoder(tokenizer).end_of_turn == {EOS_ID}
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    bare += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert PromptEncoder(tokenizer, bare).end_of_turn == frozenset()


@pytest.mark.parametrize("name", ["bos", "prepending"])
def test_texts_join_to_the_decoded_whole(name):
    tokenizer = TOKENIZERS[name]()
    prompts = [row["prompt"] for row in random_pairs(6, seed=8)]
    encode = PromptEncoder(tokenizer)
    prefixes = [encode(prompt) for prompt in prompts]
    model = tiny_model(vocab=len(tokenizer))
    rollouts = HFSampler(model, tokenizer).sample(prefixes, 8, SamplingParams(max_new_tokens=6, seed=1))
    blanks = 0
    for prefix, group in zip(prefixes, rollouts, strict=True):
        start = tokenizer.decode(prefix, clean_up_tokenization_spaces=False)
        for rollout in group:
            body = rollout.ids[:-1] if rollout.finished else rollout.ids
            whole = tokenizer.decode(np.concatenate([prefix, body]).tolist(), clean_up_tokenization_spaces=False)
            assert start + rollout.text == whole
            blanks += rollout.text.startswith(" ")
    assert blanks, "no answer began with a blank, so nothing was tested"
