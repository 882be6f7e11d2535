"""Feedback as a section of a recipe: what may be written, and what it opens. No torch until it is opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.core.errors import AlignError, ConfigError, raise_all
from align.core.options import check_all, option

if TYPE_CHECKING:
    from align.feedback.base import Comparer, Feedback, Scorer
    from align.feedback.cache import JudgementCache
    from align.feedback.implicit import FrozenPolicy
    from align.feedback.judge import JudgeModel
    from align.feedback.judge_file import JudgeFile
    from align.sampling.base import Sampler

Kind = Literal["function", "pairwise_function", "reward_model", "pairwise", "judge", "implicit"]
_CALLED = {"function", "deadline", "isolate", "batch", "cache"}
_MODEL = {"model", "label", "max_length", "tokens", "dtype", "trust_remote_code", "cache"}
_MATCHES = {"swap", "opponents", "rivals"}
_AS_PREFERENCE = {"preference", "scale"}
_SERVER = {"api", "key_env", "deadline", "retries", "concurrency"}
_REPLIES = {"samples", "temperature", "max_new_tokens"}
USES: Mapping[str, frozenset[str]] = {
    "function": frozenset(_CALLED | _AS_PREFERENCE),
    "pairwise_function": frozenset(_CALLED | _MATCHES),
    "reward_model": frozenset(_MODEL | _AS_PREFERENCE | {"too_long"}),
    "pairwise": frozenset(_MODEL | _MATCHES | {"file"}),
    "judge": frozenset(
        {"file", "model", "url", "dtype", "trust_remote_code", "cache"} | _SERVER | _REPLIES | _MATCHES | _AS_PREFERENCE
    ),
    "implicit": frozenset({"model", "reference", "beta", "length_normalised", "dtype", "trust_remote_code", "cache"})
    | _AS_PREFERENCE,
}
"""Kind -> the options that it reads, besides those that all read."""
_ALWAYS = {"kind", "name", "weight", "held_out"}
_LOADED = {"dtype", "trust_remote_code"}
_FUNCTIONS = ("function", "pairwise_function")
_NEEDS = {"reward_model": "model", "pairwise": "model", "judge": "file"}


@dataclass(frozen=True, kw_only=True)
class FeedbackSpec:
    """One who judges. An option that its kind does not read is an error; None is the kind's own default."""

    kind: Kind = option("function", doc="what judges")
    name: str = option("", doc="under which its numbers are kept; by default what it is found by")
    weight: float = option(1.0, doc="of its rewards in their sum")
    held_out: bool = option(False, doc="asked at evaluations alone")
    function: str | None = option(None, doc="`my_file:my_reward`; by default `name`")
    model: str | None = option(None, doc="folder or hub id; of a judge with `url`, its name there; none: the policy")
    file: str | None = option(None, doc="a judge that ships with align, or the path of its YAML file")
    label: str | None = option(None, doc="the good label of a model with several")
    max_length: int | None = option(None, at_least=1, doc="most tokens a model reads; more are missing, never cut")
    too_long: Literal["missing", "refuse"] | None = option(None, doc="what an answer that is too long is")
    tokens: int | None = option(None, at_least=1, doc="tokens of one pass of a model, with padding")
    dtype: Literal["auto", "float32", "bfloat16"] | None = option(None, doc="of a model; auto: by the device")
    trust_remote_code: bool | None = option(None, doc="run code that a model brings")
    beta: float | None = option(None, above=0, doc="scale of the implicit reward")
    reference: str | None = option(None, doc="folder or hub id of the implicit reward's reference; none: the run's")
    length_normalised: bool | None = option(None, doc="mean log-prob of the answer in place of the log-ratio")
    preference: Literal["sigmoid", "hard"] | None = option(None, doc="turn rewards into P(first beats second)")
    scale: float | None = option(None, above=0, doc="of reward differences, under `preference: sigmoid`")
    swap: bool | None = option(None, doc="show pairs in both orders and take the mean")
    opponents: Literal["all", "first", "random", "tournament"] | None = option(None, doc="whom an answer meets")
    rivals: int | None = option(None, at_least=1, doc="others that each answer meets, under `opponents: random`")
    samples: int | None = option(None, at_least=1, doc="replies of a judge that are averaged; else its file's")
    temperature: float | None = option(None, at_least=0, doc="of a judge's replies; else its file's")
    max_new_tokens: int | None = option(None, at_least=1, doc="of a judge's replies; else its file's")
    url: str | None = option(None, doc="server of a judge, http://HOST:PORT/v1")
    api: Literal["chat", "completions"] | None = option(None, doc="how that server is asked")
    key_env: str | None = option(None, doc="environment variable that holds the server's key")
    deadline: float | None = option(None, above=0, doc="seconds of a call, or of one try of a request")
    retries: int | None = option(None, at_least=0, doc="further tries of a request that may succeed later")
    concurrency: int | None = option(None, at_least=1, doc="requests at once")
    isolate: bool | None = option(None, doc="call the function in a process of its own, ended at the deadline")
    batch: int | None = option(None, at_least=1, doc="most answers, or pairs, of one call of a function")
    cache: str | None = option(None, doc="folder in which judgements are kept, so that none is paid for twice")

    def __post_init__(self) -> None:
        check_all(self, f"feedback `{self.name or self.kind}`")
        raise_all(self._faults())
        found = self.name or self.function or self.file or self.model or self.kind
        object.__setattr__(self, "name", found)
        if self.kind in _FUNCTIONS and self.function is None:
            object.__setattr__(self, "function", self.name)

    def _faults(self) -> list[AlignError]:
        owner = f"feedback `{self.name or self.kind}`"
        errors: list[AlignError] = []
        given = {
            field.name
            for field in dataclasses.fields(self)
            if field.name not in _ALWAYS and getattr(self, field.name) is not None
        }

        def wrong(what: str, mend: str) -> None:
            errors.append(ConfigError(f"{owner}: {what}", mend=mend))

        for name in sorted(given - USES[self.kind]):
            kinds = [kind for kind, used in USES.items() if name in used]
            wrong(f"`{name}` is not used by `kind: {self.kind}`", f"leave it out; it is read by {', '.join(kinds)}")
        for what, mend in (*self._missing(), *self._idle(given)):
            wrong(what, mend)
        return errors

    def _missing(self) -> Iterator[tuple[str, str]]:
        needed = _NEEDS.get(self.kind)
        if needed and getattr(self, needed) is None:
            yield f"`kind: {self.kind}` needs `{needed}`", f"set `{needed}`"
        if self.kind in _FUNCTIONS and not (self.function or self.name):
            yield f"`kind: {self.kind}` needs a function", "write `name: my_file:my_function`"
        if self.url is not None and self.model is None:
            yield "a server needs the name of its `model`", "set `model`"

    def _idle(self, given: Collection[str]) -> Iterator[tuple[str, str]]:
        """Options that nothing reads beside the others that are given."""
        served, loaded = self.url is not None, self.url is None and bool(self.model or self.reference)
        idle = {
            "of a server, and there is no `url`": _SERVER if self.kind == "judge" and not served else (),
            "of a model that is loaded here": _LOADED if self.kind in ("judge", "implicit") and not loaded else (),
            "used under `opponents: random` only": ("rivals",) if self.opponents != "random" else (),
            "used under `preference: sigmoid` only": ("scale",) if self.preference != "sigmoid" else (),
            "not used under `length_normalised`": ("beta", "reference") if self.length_normalised else (),
        }
        for why, names in idle.items():
            yield from ((f"`{name}` is {why}", "leave it out") for name in sorted(given) if name in names)

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the options that are set; the others keep the defaults of what they are passed to."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, eq=False)
class FeedbackContext:
    """What a run has that feedback may need, made when it is asked for.

    Attributes:
        policy, reference: whose log-probs the implicit reward is made of.
        sampler, tokenizer: the policy as its own judge.
        weights: a name of what the sampler samples from; its model's hash is taken where it is in this process.
        folder: where relative paths of judges' files and caches start.
    """

    policy: Callable[[], FrozenPolicy] | None = None
    reference: Callable[[], FrozenPolicy] | None = None
    sampler: Callable[[], Sampler] | None = None
    tokenizer: Callable[[], Any] | None = None
    chat_template: str | None = None
    weights: Callable[[], str] | None = None
    folder: Path | None = None

    def need(self, what: str, owner: str, mend: str) -> Any:
        """What `what` makes.

        Raises:
            ConfigError: this run has none.
        """
        make = getattr(self, what)
        if make is None:
            raise ConfigError(f"{owner} needs the run's {what}, and there is none here", mend=mend)
        return make()

    def place(self, path: str) -> str:
        given = Path(path).expanduser()
        return str(given if self.folder is None or given.is_absolute() else self.folder / given)


def open_feedback(spec: FeedbackSpec, context: FeedbackContext | None = None) -> Feedback:
    """The feedback of a section.

    Raises:
        ConfigError: a function, file or server that cannot be used as written; something that this run lacks.
        ModelError: a model that cannot be loaded or is not what it should be.
    """
    context = context or FeedbackContext()
    cache = _cache(spec, context)
    if spec.kind == "judge":
        return _judged(spec, context, cache)
    if spec.kind in ("pairwise_function", "pairwise"):
        return _compared(spec, _comparer(spec, context), cache)
    return _scored(spec, _scorer(spec, context), cache)


def _scorer(spec: FeedbackSpec, context: FeedbackContext) -> Scorer:
    if spec.kind == "function":
        from align.feedback.functions import reward_function

        return reward_function(str(spec.function), **spec.given("deadline", "isolate", "batch"))
    if spec.kind == "reward_model":
        from align.feedback.reward_model import RewardModel

        return RewardModel.open(str(spec.model), **_loading(spec), **spec.given("label", "max_length", "too_long"))
    return _implicit(spec, context)


def _comparer(spec: FeedbackSpec, context: FeedbackContext) -> Comparer:
    if spec.kind == "pairwise_function":
        from align.feedback.functions import preference_function

        return preference_function(str(spec.function), **spec.given("deadline", "isolate", "batch"))
    from align.feedback.pairwise import PairwiseModel

    file = _file(spec.file or "plain_pair", context)
    return PairwiseModel.open(str(spec.model), file, **_loading(spec), **spec.given("label", "max_length"))


def _implicit(spec: FeedbackSpec, context: FeedbackContext) -> Scorer:
    from align.feedback.implicit import ImplicitReward

    owner = f"feedback `{spec.name}`"

    def policy(name: str | None, what: str) -> FrozenPolicy:
        if name is None:
            found: FrozenPolicy = context.need(what, owner, "name a folder or hub id of a model")
            return found
        return _frozen(spec, name)

    own = policy(spec.model, "policy")
    if spec.length_normalised:
        return ImplicitReward(own, rule="mean_logp")
    return ImplicitReward(own, policy(spec.reference, "reference"), **spec.given("beta"))


def _judged(spec: FeedbackSpec, context: FeedbackContext, cache: JudgementCache | None) -> Feedback:
    from align.feedback.judge import PairJudge, PointJudge

    file = _file(str(spec.file), context)
    file = replace(file, **spec.given("samples", "temperature", "max_new_tokens"))
    unused = spec.given(*sorted(_MATCHES if file.mode == "pointwise" else _AS_PREFERENCE))
    if unused:
        raise ConfigError(
            f"feedback `{spec.name}`: `{next(iter(unused))}` is not used by the {file.mode} judge `{file.name}`",
            mend="leave it out, or use a judge of the other mode",
        )
    model = _judge_model(spec, context)
    # Its replies are kept by the judge itself: another way to read them costs nothing.
    if file.mode == "pairwise":
        return _compared(spec, PairJudge(file, model, cache), None)
    return _scored(spec, PointJudge(file, model, cache), None)


def _judge_model(spec: FeedbackSpec, context: FeedbackContext) -> JudgeModel:
    if spec.url is not None:
        from align.feedback.endpoint import Endpoint
        from align.feedback.judge_endpoint import EndpointJudge

        given = spec.given("api", "key_env", "deadline", "retries", "concurrency")
        return EndpointJudge(Endpoint(url=spec.url, model=str(spec.model), **given))
    from align.feedback.judge_local import SamplerJudge

    if spec.model is None:
        owner, mend = f"feedback `{spec.name}`", "give it a `model`, or a server's `url`"
        sampler, tokenizer = context.need("sampler", owner, mend), context.need("tokenizer", owner, mend)
        weights = context.weights() if context.weights is not None else ""
        return SamplerJudge(sampler, tokenizer, weights, context.chat_template)
    from align.sampling.hf import HFSampler
    from align.sampling.loading import load
    from align.sampling.prompts import PromptEncoder

    loaded = load(spec.model, dtype=spec.dtype or "auto", trust_remote_code=bool(spec.trust_remote_code))
    chats = bool(getattr(loaded.tokenizer, "chat_template", None))
    ends = PromptEncoder(loaded.tokenizer).end_of_turn if chats else frozenset()
    return SamplerJudge(HFSampler(loaded.model, loaded.tokenizer, end_ids=ends), loaded.tokenizer)


def _scored(spec: FeedbackSpec, scorer: Scorer, cache: JudgementCache | None) -> Feedback:
    from align.feedback.pairwise import FromRewards
    from align.feedback.scored import Scored

    scored = Scored(spec.name, scorer, cache)
    if spec.preference is None:
        return scored
    return FromRewards(scored, spec.preference, **spec.given("scale"))


def _compared(spec: FeedbackSpec, comparer: Comparer, cache: JudgementCache | None) -> Feedback:
    from align.feedback.scored import Compared

    # A function states a probability; models and judges favour a place.
    swap = spec.kind != "pairwise_function" if spec.swap is None else spec.swap
    return Compared(spec.name, comparer, swap=swap, cache=cache, **spec.given("opponents", "rivals"))


def _frozen(spec: FeedbackSpec, name: str) -> FrozenPolicy:
    from align.feedback.implicit import FrozenPolicy
    from align.sampling.loading import load

    return FrozenPolicy.of(load(name, dtype=spec.dtype or "auto", trust_remote_code=bool(spec.trust_remote_code)).model)


def _file(name: str, context: FeedbackContext) -> JudgeFile:
    from align.feedback.judge_file import load_judge

    return load_judge(context.place(name) if Path(name).suffix else name)


def _cache(spec: FeedbackSpec, context: FeedbackContext) -> JudgementCache | None:
    if spec.cache is None:
        return None
    from align.feedback.cache import JudgementCache

    return JudgementCache(context.place(spec.cache))


def _loading(spec: FeedbackSpec) -> dict[str, Any]:
    given = spec.given("dtype", "trust_remote_code")
    return given if spec.tokens is None else {**given, "budget": spec.tokens}
