"""What can be said of a text without a model: its normal form, whether it refuses, its language."""

from __future__ import annotations

import re
from collections import Counter

from align.data.groups import Message

REFUSAL_RULE = (
    "an answer counts as a refusal where its first 160 characters hold an apology followed by `but`, a statement that "
    "the speaker cannot or will not help, answer, provide, ..., or `as an AI`; English only"
)
LANGUAGE_RULE = (
    "by script; Latin script by the commonest words of eight languages in the first 400 characters, unclear where "
    "none leads"
)

_OPENING, _PROBE = 160, 400
_ACTS = (
    "help|assist|answer|provide|fulfil|fulfill|comply|create|write|give|share|discuss|support|generate|recommend|"
    "condone|engage|participate|browse|access|offer|do that|tell you"
)
_REFUSAL = re.compile(
    r"\b(?:(?:i'm|i am) (?:very |really |so )?sorry,? but|i apologi[sz]e,? but|sorry,? but i\b|"
    rf"i (?:can'?t|cannot|can not|could not|couldn't|won't|will not) (?:\w+ )?(?:{_ACTS})\b|"
    rf"(?:i'm|i am) (?:unable|not able|not comfortable|not going)\b|i must decline|"
    r"as an? (?:ai|artificial intelligence|language model)\b)"
)
_SCRIPTS = {
    "Japanese": re.compile(r"[\u3040-\u30ff]"),
    "Korean": re.compile(r"[\u1100-\u11ff\uac00-\ud7af]"),
    "Chinese": re.compile(r"[\u4e00-\u9fff]"),
    "Cyrillic script": re.compile(r"[\u0400-\u052f]"),
    "Greek": re.compile(r"[\u0370-\u03ff]"),
    "Arabic script": re.compile(r"[\u0600-\u06ff]"),
    "Hebrew": re.compile(r"[\u0590-\u05ff]"),
    "Devanagari script": re.compile(r"[\u0900-\u097f]"),
    "Thai": re.compile(r"[\u0e00-\u0e7f]"),
}
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
_WORDS = re.compile(r"[^\W\d_]+")
_COMMON = {
    "English": "the and of to is that it for you with this are be have not what can",
    "German": "der die und das ist nicht ein eine mit zu den sie ich es auf für wie",
    "French": "le la les et des est une pas que vous pour dans qui je ce avec sur",
    "Spanish": "el los las y que es una por con para del se lo como más está pero",
    "Italian": "il che di è una per non sono con del della gli questo ma come più",
    "Portuguese": "o os e que é uma não para com do da em um como mais você por",
    "Dutch": "de het een en van is dat niet je met voor op zijn ik aan wat",
    "Polish": "i w nie na się z to że jest do jak co za od przez czy",
}
_LANGUAGES: dict[str, list[str]] = {}
for _language, _words in _COMMON.items():
    for _word in _words.split():
        _LANGUAGES.setdefault(_word, []).append(_language)


def prompt_text(prompt: str | tuple[Message, ...]) -> str:
    """A prompt as one text; turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def question(prompt: tuple[Message, ...]) -> str:
    """The last user turn."""
    asked = [str(message["content"]) for message in prompt if message["role"] == "user"]
    return asked[-1] if asked else ""


def normal(text: str) -> str:
    """Without differences of white space and case: what counts as the same prompt."""
    return " ".join(text.split()).casefold()


def refuses(text: str) -> bool:
    """See `REFUSAL_RULE`."""
    return _REFUSAL.search(text[:_OPENING].replace("\u2019", "'").lower()) is not None


def language(text: str) -> str:
    """A guess; see `LANGUAGE_RULE`."""
    text = text[:_PROBE]
    latin = sum(map(str.isalpha, text)) if text.isascii() else len(_LATIN.findall(text))
    if not text.isascii():
        counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()}
        name, most = max(counts.items(), key=lambda item: item[1])
        if counts["Japanese"] * 5 > most:  # kana among Chinese characters
            name, most = "Japanese", max(most, counts["Japanese"])
        # A character of Chinese or Korean is worth a word of Latin letters.
        if most * (3 if name in ("Japanese", "Korean", "Chinese") else 1) > latin:
            return name
    if latin < 3:
        return "no letters"
    hits = Counter(name for word in _WORDS.findall(text.lower()) for name in _LANGUAGES.get(word, ()))
    leading = [*hits.most_common(2), ("", 0), ("", 0)]
    # A wrong language is worse than none: one word in common, or a narrow lead, says nothing.
    if leading[0][1] < 2 or leading[0][1] < 2 * leading[1][1]:
        return "Latin script, unclear"
    return leading[0][0]
