"""A judge as a small YAML file: what it is asked, how its answer is read, how it is sampled."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment

from align.core.errors import AlignError, ConfigError, raise_all, suggestion
from align.core.hashing import digest
from align.core.options import build, check_all, option
from align.data.groups import Message
from align.data.rollouts import RolloutGroup
from align.data.rows import RowError
from align.feedback.base import Failed, Judged, number

FOLDER = Path(__file__).parent / "judges"
_SLOTS = {"pairwise": {"prompt", "first", "second"}, "pointwise": {"prompt", "answer"}}
_FREE = {"messages", "columns"}
_SPEAKERS = {"user": "User", "assistant": "Assistant", "system": "System", "tool": "Tool"}
_ENVIRONMENT = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False, autoescape=False)


@dataclass(frozen=True)
class Asked:
    """What a judge is asked: the text of the user's turn, and of a system turn where there is one."""

    user: str
    system: str = ""

    @property
    def messages(self) -> list[Message]:
        turns: list[Message] = [{"role": "user", "content": self.user}]
        return [{"role": "system", "content": self.system}, *turns] if self.system else turns

    @property
    def text(self) -> str:
        """For a model that does not chat."""
        return f"{self.system}\n\n{self.user}" if self.system else self.user


@dataclass(frozen=True, kw_only=True)
class JudgeFile:
    """A judge. `prompt` and `system` are Jinja templates over `prompt` (the text asked of the policy), `messages` (its
    turns), `columns` (of the row), and `first` and `second`, or `answer`."""

    name: str = option("judge", doc="how errors call it")
    about: str = option("", doc="what it does, and where it is from")
    mode: Literal["pairwise", "pointwise"] = option("pairwise", doc="compare two answers, or score one")
    read: Literal["labels", "regex", "json"] = option(
        "labels", doc="from the probabilities of label tokens, or from the text by a pattern or a key of a JSON object"
    )
    system: str = option("", doc="template of a system turn")
    prompt: str = option(doc="template of the question")
    labels: Mapping[Any, Any] = option(
        {}, doc="what the judge says -> P(first beats second), or a score; for numbers in the text leave it out"
    )
    pattern: str = option("", doc="regular expression with one group; the last match counts")
    key: str = option("", doc="key of the JSON object")
    low: float | None = option(None, doc="lowest score; a score outside is missing, not clamped")
    high: float | None = option(None, doc="highest score")
    samples: int = option(1, at_least=1, doc="replies that are averaged")
    temperature: float = option(0.0, at_least=0, doc="of the replies")
    top_p: float = option(1.0, above=0, at_most=1, doc="of the replies")
    max_new_tokens: int = option(256, at_least=1, doc="of a reply")

    def __post_init__(self) -> None:
        check_all(self, f"judge `{self.name}`")
        raise_all(self._faults())

    @cached_property
    def digest(self) -> str:
        """Of all that determines what is asked and how it is read."""
        own = {name: value for name, value in asdict(self).items() if name not in ("name", "about")}
        return digest({**own, "labels": dict(self.labels)})

    @property
    def range(self) -> tuple[float, float]:
        if self.mode == "pairwise":
            return 0.0, 1.0
        return (-math.inf if self.low is None else self.low), (math.inf if self.high is None else self.high)

    def render(self, group: RolloutGroup, texts: Sequence[str]) -> Asked:
        """The question about one answer, or two in the order shown.

        Raises:
            RowError: a template needs a column that the row lacks.
        """
        turns = [] if isinstance(group.prompt, str) else [dict(turn) for turn in group.prompt]
        names = ("first", "second") if self.mode == "pairwise" else ("answer",)
        given = {"prompt": said(group.prompt), "messages": turns, "columns": dict(group.columns)}
        given |= dict(zip(names, texts, strict=True))
        try:
            system, user = (template.render(given).strip() for template in self._templates)
        except TemplateError as error:
            raise RowError("judge", f"its prompt cannot be filled: {str(error).splitlines()[0][:80]}") from error
        return Asked(user, system)

    def parse(self, reply: str) -> Judged:
        """The number in a reply; what cannot be read, or is out of range, is missing."""
        if self.read == "json":
            found = _from_json(reply, self.key)
        else:
            matches = re.findall(self.pattern, reply)
            found = matches[-1] if matches else None
        if found is None:
            return Failed("the judge's reply cannot be read")
        if self.labels:
            value = self.labels.get(str(found).strip())
            return Failed("the judge's reply holds no known label") if value is None else float(value)
        try:
            value = float(found)
        except (TypeError, ValueError):
            return Failed("the judge's reply cannot be read")
        return number(value, *self.range)

    @cached_property
    def _templates(self) -> tuple[Any, Any]:
        return _ENVIRONMENT.from_string(self.system), _ENVIRONMENT.from_string(self.prompt)

    def _faults(self) -> list[AlignError]:
        owner = f"judge `{self.name}`"
        errors: list[AlignError] = [*self._slots(owner)]

        def wrong(what: str, mend: str) -> None:
            errors.append(ConfigError(f"{owner}: {what}", mend=mend))

        needed = {"labels": "labels", "regex": "pattern", "json": "key"}[self.read]
        if not getattr(self, needed):
            wrong(f"`read: {self.read}` needs `{needed}`", f"set `{needed}`, or read otherwise")
        for name, reading in (("pattern", "regex"), ("key", "json")):
            if getattr(self, name) and self.read != reading:
                wrong(f"`{name}` is not used under `read: {self.read}`", f"leave it out, or set `read: {reading}`")
        if self.read == "labels" and (self.samples > 1 or self.temperature > 0):
            wrong("`samples` and `temperature` are not used under `read: labels`", "probabilities are not sampled")
        if self.samples > 1 and self.temperature == 0:
            wrong(f"{self.samples} replies at temperature 0 are all the same", "set a temperature, or one sample")
        if self.mode == "pairwise" and (self.low is not None or self.high is not None):
            wrong("`low` and `high` are of scores", "a comparison is a probability: leave them out")
        errors += self._label_faults(owner)
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            wrong(f"`pattern` is no regular expression: {error}", "mend it")
        else:
            if self.pattern and groups != 1:
                wrong(f"`pattern` has {groups} groups", "put round brackets around what is read, once")
        return errors

    def _label_faults(self, owner: str) -> list[AlignError]:
        errors: list[AlignError] = []
        if self.read == "labels" and len(self.labels) == 1:
            errors.append(ConfigError(f"{owner}: one label", mend="give two or more: nothing is chosen among one"))
        for label, value in self.labels.items():
            if type(label) is not str:
                mend = "put it in quotes: YAML takes Yes, No and numbers for other things than text"
                errors.append(ConfigError(f"{owner}: the label {label!r} is no text", mend=mend))
            elif isinstance(number(value, *self.range), Failed):
                errors.append(ConfigError(f"{owner}: the label `{label}` stands for {value!r}", mend="give a number"))
        return errors

    def _slots(self, owner: str) -> list[AlignError]:
        used: set[str] = set()
        for name in ("system", "prompt"):
            try:
                used |= meta.find_undeclared_variables(_ENVIRONMENT.parse(getattr(self, name)))
            except TemplateError as error:
                return [ConfigError(f"{owner}: `{name}` is no Jinja template", why=str(error), mend="mend it")]
        slots = _SLOTS[self.mode]
        errors: list[AlignError] = [
            ConfigError(f"{owner}: the prompt never shows `{slot}`", mend=f"write {{{{ {slot} }}}} where it belongs")
            for slot in sorted(slots - used - ({"prompt"} if "messages" in used else set()))
        ]
        errors += [
            ConfigError(f"{owner}: the prompt asks for `{name}`", mend=suggestion(name, slots | _FREE))
            for name in sorted(used - slots - _FREE)
        ]
        return errors


def load_judge(name: str) -> JudgeFile:
    """A judge that ships with this package, by its name, or the YAML file of a path.

    Raises:
        ConfigError: no such judge, no YAML, or everything that is wrong in it at once.
    """
    path = Path(name).expanduser()
    if not path.suffix:
        path = FOLDER / f"{name}.yaml"
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = [file.stem for file in FOLDER.glob("*.yaml")]
        raise ConfigError(
            f"there is no judge `{name}`", mend=f"{suggestion(name, known)} Or give the path of a .yaml file".strip()
        ) from None
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError("the judge's file cannot be read", where=str(path), why=str(error)) from error
    if not isinstance(given, dict):
        raise ConfigError("the judge's file holds no mapping", where=str(path), mend="write `prompt: ...` and so on")
    if "prompt" not in given:
        raise ConfigError("the judge's file has no `prompt`", where=str(path), mend="write what the judge is asked")
    try:
        made, errors = build(JudgeFile, f"judge `{path.stem}`", {"name": path.stem, **given}, str(path))
    except ConfigError as error:
        raise ConfigError(str(error), where=str(path)) from error
    raise_all(errors)
    return made  # type: ignore[no-any-return]


def said(prompt: str | Sequence[Message]) -> str:
    """A prompt as a judge reads it: one user turn is its text, more are a transcript."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{_SPEAKERS.get(turn['role'], turn['role'])}: {turn['content']}" for turn in prompt)


def _from_json(reply: str, key: str) -> Any:
    """The key's value in the last JSON object of a reply that has it."""
    decoder = json.JSONDecoder()
    found = None
    for start in (place for place, letter in enumerate(reply) if letter == "{"):
        try:
            value, _ = decoder.raw_decode(reply, start)
        except ValueError:
            continue
        if isinstance(value, dict) and key in value:
            found = value[key]
    return None if isinstance(found, (dict, list)) else found
