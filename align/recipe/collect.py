"""The recipe of `align sample`, `align judge` and `align pairs`: prompts, who samples, who judges, which pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from align.core.errors import AlignError, ConfigError, ErrorList, raise_all, suggestion
from align.core.options import option
from align.feedback.spec import FeedbackSpec
from align.loops.stages import SampleSpec
from align.recipe import extends
from align.recipe.document import Item
from align.recipe.schema import _Reader as SectionReader
from align.recipe.sections import Model, Stream
from align.recipe.streams import stream_faults
from align.sampling import spec
from align.sampling.spec import SamplerSpec
from align.shaping import selection
from align.shaping.selection import PairSpec

FOLDERS = {"sample": "samples", "judge": "judged", "pairs": "pairs"}
"""Command -> its artefact, in `output_dir`."""
_OWN = ("model", "data", "sampler", "sample", "feedback", "pairs", "output_dir")
_ELSEWHERE = (
    "method",
    "train",
    "reference",
    "eval",
    "loop",
    "rounds",
    "rollout",
    "shaping",
    "health",
    "provenance",
)
"""Sections that other commands read. A recipe with `method` is theirs too, and may say more of model and data."""
_NEEDED = {"sample": ("model", "data"), "judge": ("feedback",), "pairs": ("pairs",)}
_OF_MODEL = ("name", "revision", "trust_remote_code")
_STREAM = ("weight",)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What is asked."""

    prompts: tuple[Stream, ...] = ()
    chat_template: str = option("model", doc="`model`, or the path of a Jinja file")
    max_bad_fraction: float = option(0.01, at_least=0, at_most=1, doc="share of bad rows above which the command stops")


@dataclass(frozen=True, kw_only=True)
class Collect:
    """A checked recipe of the three commands.

    Attributes:
        elsewhere: sections that are there for other commands.
    """

    output_dir: str
    model: Model | None = None
    data: Prompts = field(default_factory=Prompts)
    sampler: SamplerSpec = field(default_factory=SamplerSpec)
    sample: SampleSpec = field(default_factory=SampleSpec)
    feedback: tuple[FeedbackSpec, ...] = ()
    pairs: PairSpec | None = None
    elsewhere: tuple[str, ...] = ()

    def folder(self, command: str) -> Path:
        """Where the artefact of a command is."""
        return Path(self.output_dir).expanduser() / FOLDERS[command]


def read(path: str | Path, command: str, overrides: Sequence[str] = ()) -> Collect:
    """Read and check a recipe for a command: `sample`, `judge` or `pairs`.

    All its sections are checked, whichever command reads them.

    Raises:
        ConfigError: the recipe cannot be used; several faults come as one `ErrorList`.
    """
    return build(extends.read(path, overrides), command)


def build(root: Item, command: str) -> Collect:
    """A recipe from a parsed document without `extends`.

    Raises:
        ConfigError: as `read`.
    """
    reader = _Collector()
    made = reader.collect(root, command)
    raise_all(reader.errors)
    if made is None:
        raise ConfigError("the recipe is incomplete", where=root.where, mend="add what is missing")
    return made


class _Collector(SectionReader):
    def collect(self, root: Item, command: str) -> Collect | None:
        known = (*_OWN, *_ELSEWHERE)
        for key, item in root.value.items():
            if key not in known:
                self.fault(f"unknown section `{key}`", item, suggestion(key, known))
        items = {key: item for key, item in root.value.items() if key in _OWN and item.value is not None}
        for key in ("output_dir", *_NEEDED[command]):
            if key not in items:
                self.fault(f"`{key}` is missing", root, f"add `{key}:`; `align {command}` reads it")
        shared = "method" in root.value
        parts: dict[str, Any] = {"elsewhere": tuple(key for key in root.value if key in _ELSEWHERE)}
        for key, item in items.items():
            self.given.setdefault(key, item.where)
            parts[key] = self._part(key, item, shared)
        if any(value is None for value in parts.values()) or "output_dir" not in parts:
            return None
        made = Collect(**parts)
        self.errors += _faults(made, self.given, command, shared)
        return made

    def _part(self, key: str, item: Item, shared: bool) -> Any:
        if key == "output_dir":
            if not isinstance(item.value, str) or not item.value:
                self.fault(f"`output_dir` is {item.plain()!r}", item, "give the path of a folder")
                return None
            return item.value
        if key == "model":
            return self.model(item)
        if key == "data":
            return self.prompts(item, shared)
        if key == "feedback":
            return self.judges(item)
        kinds: dict[str, type] = {"sampler": SamplerSpec, "sample": SampleSpec, "pairs": PairSpec}
        return self.together(kinds[key], key, item)

    def judges(self, item: Item) -> tuple[FeedbackSpec, ...] | None:
        """The section `feedback`: a list of judges, or one."""
        found = self.feedback(item)
        names = [one.name for one in found or ()]
        for name in sorted({name for name in names if names.count(name) > 1}):
            self.fault(f"two entries of `feedback` are named `{name}`", item, "give each a `name` of its own")
        return found

    def together(self, cls: type, owner: str, item: Item) -> Any:
        """A section whose options are checked against each other too."""
        try:
            return self.section(cls, owner, item)
        except ErrorList as errors:
            several: Sequence[AlignError] = errors.errors
        except ConfigError as error:
            several = [error]
        self.errors += [ConfigError(one.what, where=item.where, why=one.why, mend=one.mend) for one in several]
        return None

    def prompts(self, item: Item, shared: bool) -> Prompts | None:
        """The section `data`; of a shared recipe what concerns prompts."""
        if not isinstance(item.value, dict):
            self.fault(f"`data` is {item.plain()!r}, not a mapping", item, "write {prompts: FILE}")
            return None
        streams = item.value.get("prompts")
        extra: dict[str, Any] = {}
        if streams is None or streams.value is None:
            self.fault("`data.prompts` is missing", item, "name a file, a folder or a hub id of prompts")
        else:
            self.given["data.prompts"] = streams.where
            extra["prompts"] = self.streams(streams, "data.prompts")
        if shared:
            own = ("prompts", *(one.name for one in fields(Prompts)))
            item = Item({key: value for key, value in item.value.items() if key in own}, item.where)
        return self.section(Prompts, "data", item, extra, also=("prompts",)) if extra else None


def _faults(made: Collect, given: Mapping[str, str], command: str, shared: bool) -> Iterator[AlignError]:
    for name, why in spec.unused(made.sampler).items():
        if f"sampler.{name}" in given:
            yield _unused(f"sampler.{name}", given, why)
    if made.sampler.kind == "server" and not _addresses(made.sampler.urls):
        yield ConfigError(
            f"`sampler.urls` is {made.sampler.urls!r}",
            where=given.get("sampler.urls", given.get("sampler.kind", "")),
            mend="list the addresses of running servers: urls: [http://127.0.0.1:8000]",
        )
    if made.model is not None and not shared:
        extra = [name for name in given if name.startswith("model.") and name.split(".")[1] not in _OF_MODEL]
        for name in extra:
            if name.count(".") == 1:
                why = "`sampler.dtype` is what is sampled in" if name == "model.dtype" else "nothing is trained here"
                yield _unused(name, given, why)
    yield from _stream_faults(made.data.prompts, given)
    template = made.data.chat_template
    if template != "model" and not Path(template).expanduser().is_file():
        yield ConfigError(
            f"there is no chat template `{template}`",
            where=given.get("data.chat_template", ""),
            mend="write `model`, or the path of a Jinja file",
        )
    if made.pairs is not None:
        own = {key.removeprefix("pairs."): where for key, where in given.items() if key.startswith("pairs.")}
        yield from selection.faults(made.pairs, own)
    if command == "pairs" and made.pairs is not None and made.pairs.rule != "by_origin" and not made.feedback:
        yield ConfigError(
            f"`pairs.rule: {made.pairs.rule}` needs feedback, and the recipe has none",
            where=given.get("pairs.rule", given.get("pairs", "")),
            mend="add `feedback:`, and run `align judge` first",
        )


def _stream_faults(streams: Sequence[Stream], given: Mapping[str, str]) -> Iterator[AlignError]:
    for number, stream in enumerate(streams):
        owner = f"data.prompts.{number}"
        yield from stream_faults(stream, owner, given, given.get(f"{owner}.name", given.get("data.prompts", "")))
        for name in _STREAM:
            if f"{owner}.{name}" in given:
                yield _unused(f"{owner}.{name}", given, "every prompt is asked once; `max_rows` limits a stream")


def _unused(name: str, given: Mapping[str, str], why: str) -> ConfigError:
    return ConfigError(f"`{name}` is unused", where=given.get(name, ""), why=why, mend="remove it")


def _addresses(urls: Any) -> bool:
    return isinstance(urls, list) and bool(urls) and all(isinstance(url, str) and "://" in url for url in urls)
