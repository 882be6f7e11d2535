"""Numbers out of the formulas on the pages: the LaTeX of `Method.formula`, evaluated as it is written.

A formula is a set of definitions, `name = expression`, some of which hold for one choice of an option
(`\\text{soft:}\\quad ...`). Names are looked up in what a test gives first and in the definitions then, so that a
symbol which stands for something outside (a KL, a log-sum over the vocabulary) is given as a number.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

_TOKEN = re.compile(r"\\(?:text|operatorname)\{[^}]*\}|\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|\S")
_IGNORED = {r"\left", r"\right", r"\,", r"\!", r"\;", "&"}
_INDEX = set("ijtv")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    r"\le": lambda a, b: a <= b,
    r"\ne": lambda a, b: a != b,
}
_CLOSING = {"(": ")", "[": "]"}
_STOPS = {")", "]", "}", ",", "+", "-", r"\mid", *_COMPARE}
Node = Callable[["Scope"], Any]


def sigmoid(u: float) -> float:
    return 1 / (1 + math.exp(-u)) if u >= 0 else math.exp(u) / (1 + math.exp(u))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    r"\log": math.log,
    r"\ln": math.log,
    r"\exp": math.exp,
    r"\sigma": sigmoid,
    r"\max": max,
    r"\min": min,
    "sg": lambda u: u,
    "clip": lambda u, low, high: min(max(u, low), high),
    "sign": lambda u: 1.0 if u >= 0 else -1.0,
}
_PREFIX = {r"\log", r"\ln", r"\exp"}
"""Functions whose argument may stand without brackets."""


@dataclass
class Given:
    """What a formula is evaluated on.

    Attributes:
        values: name -> number or answer. lists: name -> values by an index that counts from 1.
        functions: name -> function of its arguments and then its indices. ranges: index, or set, -> its values.
        labels: the choices that hold. outside: names that are given although the formula defines them.
    """

    values: dict[str, Any] = field(default_factory=dict)
    lists: dict[str, Sequence[Any]] = field(default_factory=dict)
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)
    ranges: dict[str, Sequence[int]] = field(default_factory=dict)
    labels: frozenset[str] = frozenset()
    outside: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Definition:
    """A name with the names of its indices and arguments, the sign between the sides, and the right one."""

    name: str
    indices: tuple[str, ...]
    arguments: tuple[str, ...]
    sign: str
    body: list[str]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.indices), len(self.arguments)


@dataclass
class Scope:
    """Where names are looked up: bound indices and arguments, what was given, definitions."""

    given: Given
    definitions: Sequence[Definition]
    bound: Mapping[str, Any] = field(default_factory=dict)

    def inner(self, **more: Any) -> Scope:
        return Scope(self.given, self.definitions, {**self.bound, **more})

    def value(self, name: str, indices: Sequence[Any]) -> Any:
        given = self.given
        if name in self.bound and (not indices or hasattr(self.bound[name], "token")):
            return self.bound[name].token(*indices) if indices else self.bound[name]
        if self.find(name, indices, ()):
            return self.defined(name, indices, ())
        if indices and name in given.lists:
            return given.lists[name][indices[0] - 1]
        if name in given.values:
            return given.values[name].token(*indices) if indices else given.values[name]
        if name == "e" and not indices:
            return math.e
        raise KeyError(f"`{name}` with {len(indices)} indices is neither given nor defined")

    def call(self, name: str, indices: Sequence[Any], arguments: Sequence[Any]) -> Any:
        if self.find(name, indices, arguments):
            return self.defined(name, indices, arguments)
        return {**FUNCTIONS, **self.given.functions}[name](*arguments, *indices)

    def find(self, name: str, indices: Sequence[Any], arguments: Sequence[Any]) -> Definition | None:
        """The definition of a name; of f(y_w) = ... and f(y_l) = ... the one for what is asked for."""
        shape = (len(indices), len(arguments))
        found = [one for one in self.definitions if (one.name, one.shape) == (name, shape)]
        named = [one for one in found if all(self.given.values.get(word) is not None for word in one.arguments)]
        if arguments and named:
            same = [
                one
                for one in named
                if all(self.given.values[word] is given for word, given in zip(one.arguments, arguments, strict=True))
            ]
            found = same or found
        return found[0] if found and name not in self.given.outside else None

    def defined(self, name: str, indices: Sequence[Any], arguments: Sequence[Any]) -> Any:
        one = self.find(name, indices, arguments)
        assert one is not None
        within = dict(zip((*one.indices, *one.arguments), (*indices, *arguments), strict=True))
        body = Parser(one.body, self.functions()).all()
        value = body(Scope(self.given, self.definitions, within))
        if one.sign == r"\propto":
            (index,) = one.indices
            value /= sum(body(Scope(self.given, self.definitions, {index: i})) for i in self.given.ranges[index])
        return value

    def functions(self) -> set[str]:
        return {*FUNCTIONS, *self.given.functions, *(one.name for one in self.definitions if one.arguments)}


def tokens(latex: str) -> list[str]:
    return [token for token in _TOKEN.findall(latex) if token not in _IGNORED]


def definitions(latex: str, labels: frozenset[str] | None = None) -> list[Definition]:
    """The definitions of a formula that hold under these labels (all of them by default)."""
    found = []
    for row in latex.split(r"\\"):
        found += [one for label, one in _row(row) if labels is None or label in ("", *labels)]
    return found


def _row(row: str) -> Iterator[tuple[str, Definition]]:
    """The definitions of a row, each with its label, which is that of the one before where it has none."""
    label = ""
    for piece in row.split(r"\qquad"):
        prefix, _, rest = piece.rpartition(r"\quad")
        named = re.search(r"\\text\{(.*):\}", prefix)
        label = named[1] if named else label
        words = tokens(rest)
        place = next(i for i, word in enumerate(words) if word in ("=", r"\propto", r"\leftarrow"))
        reader = Parser(words[:place], set())
        name, indices = reader.name()
        arguments = []
        while reader.peek() in ("(", ","):
            reader.take()
            arguments.append(reader.spelt())
        yield label, Definition(name, tuple(indices), tuple(arguments), words[place], words[place + 1 :])


def spelling(latex: str) -> str:
    """The name under which a symbol is looked up."""
    return Parser(tokens(latex), set()).name()[0]


def evaluate(latex: str, given: Given) -> float:
    """The loss: `\\mathcal{L}`, or the mean of `\\mathcal{L}_t` over the range of t where it is one of a token."""
    made = definitions(latex, given.labels)
    given = replace(given, values=dict(given.values))
    scope = Scope(given, [one for one in made if one.sign != r"\leftarrow"])
    for one in made:
        if one.sign == r"\leftarrow":
            given.values[one.name] = Parser(one.body, scope.functions()).all()(scope)
    if scope.find(r"\mathcal{L}", (), ()):
        return float(scope.value(r"\mathcal{L}", ()))
    places = given.ranges["t"]
    return sum(float(scope.value(r"\mathcal{L}", (t,))) for t in places) / len(places)


class Parser:
    """A recursive descent over tokens; what it returns are functions of a scope."""

    def __init__(self, words: Sequence[str], functions: set[str]) -> None:
        self.words, self.place, self.functions, self.bars = list(words), 0, functions, 0

    def peek(self) -> str:
        return self.words[self.place] if self.place < len(self.words) else ""

    def take(self, expected: str = "") -> str:
        word = self.peek()
        if not word or (expected and word != expected):
            raise ValueError(f"`{word or 'the end'}` where `{expected or 'more'}` belongs in {' '.join(self.words)}")
        self.place += 1
        return word

    def all(self) -> Node:
        node = self.sum()
        if self.peek():
            raise ValueError(f"`{self.peek()}` is left over in {' '.join(self.words)}")
        return node

    def sum(self) -> Node:
        parts: list[tuple[int, Node]] = []
        while self.peek() in ("+", "-") or not parts:
            sign = -1 if self.peek() == "-" else 1
            if self.peek() in ("+", "-"):
                self.take()
            parts.append((sign, self.product()))
        return lambda scope: (
            sum(sign * part(scope) for sign, part in parts)
            if len(parts) > 1 or parts[0][0] < 0
            else (parts[0][1](scope))
        )

    def product(self) -> Node:
        node = self.power()
        while self.peek() and self.peek() not in _STOPS and not (self.peek() == "|" and self.bars):
            divided = self.peek() == "/"
            if divided:
                self.take()
            node = _times(node, self.power(), divided)
        return node

    def power(self) -> Node:
        base = self.atom()
        if self.peek() != "^":
            return base
        self.take()
        exponent = self.group()
        return lambda scope: base(scope) ** exponent(scope)

    def group(self) -> Node:
        """What stands in braces, or a single sign."""
        words = self.braced()
        return Parser(words, self.functions).all()

    def braced(self) -> list[str]:
        if self.peek() != "{":
            return [self.take()]
        self.take()
        start, depth = self.place, 1
        while depth:
            depth += {"{": 1, "}": -1}.get(self.take(), 0)
        return self.words[start : self.place - 1]

    def atom(self) -> Node:
        word = self.peek()
        if word in _CLOSING:
            return self.bracket()
        if word == "|":
            return self.absolute()
        if word[0].isdigit():
            digits = self.take()
            number = float(digits) if "." in digits else int(digits)
            return lambda scope: number
        if word == r"\frac":
            self.take()
            return _times(self.group(), self.group(), divided=True)
        if word == r"\sum":
            self.take()
            return self.over(sum)
        if word in (r"\operatorname{mean}", r"\operatorname{std}"):
            self.take()
            return self.over(statistics.fmean if word.endswith("{mean}") else statistics.stdev)
        return self.named()

    def bracket(self) -> Node:
        opening = self.take()
        bars, self.bars = self.bars, 0
        node = self.sum()
        self.bars = bars
        self.take(_CLOSING[opening])
        return node

    def absolute(self) -> Node:
        self.take("|")
        self.bars += 1
        node = self.sum()
        self.bars -= 1
        self.take("|")
        return lambda scope: abs(node(scope))

    def over(self, gather: Callable[[list[Any]], Any]) -> Node:
        """A sum or a mean over an index: `_{i=1}^{K}`, `_t`, `_{t \\le n}`, `_{i,j:\\, a > b}`, `_{i \\in B}`."""
        self.take("_")
        words = self.braced()
        last: Node | None = None
        within = ""
        if r"\in" in words:
            words, within = words[:1], words[2]
        if "=" in words:
            words = words[: words.index("=")]
            self.take("^")
            last = self.group()
        names, condition = _split_index(words)
        test = _condition(condition, self.functions)
        body = self.product() if gather is sum else self.bracket()

        def value(scope: Scope) -> Any:
            ranges = [range(1, int(last(scope)) + 1) if last else scope.given.ranges[within or name] for name in names]
            inner = [scope.inner(**dict(zip(names, chosen, strict=True))) for chosen in product(*ranges)]
            return gather([body(one) for one in inner if test(one)])

        return value

    def named(self) -> Node:
        name, indices = self.name()
        where = [Parser(tokens(one), self.functions).all() if one[0] != "(" else one for one in indices]
        if name in _PREFIX and self.peek() not in _CLOSING:
            inner = self.atom()
            return lambda scope: scope.call(name, (), [inner(scope)])
        if name in self.functions and self.peek() in _CLOSING:
            arguments = self.arguments()
            return lambda scope: scope.call(name, [one(scope) for one in where], [one(scope) for one in arguments])
        if where and isinstance(where[0], str):
            return lambda scope: _sorted(scope, name, indices[0].strip("()"))
        return lambda scope: scope.value(name, [one(scope) for one in where])

    def arguments(self) -> list[Node]:
        opening = self.take()
        bars, self.bars = self.bars, 0
        found = [self.sum()]
        while self.peek() in (",", r"\mid"):
            self.take()
            found.append(self.sum())
        self.bars = bars
        self.take(_CLOSING[opening])
        return found

    def name(self) -> tuple[str, list[str]]:
        """A symbol with its primes and fixed subscripts, and the subscripts that are indices."""
        word = self.take()
        if word.startswith(r"\operatorname{"):
            word = word[len(r"\operatorname{") : -1]
        elif word in (r"\mathcal", r"\bar"):
            word = f"{word}{{{''.join(self.braced())}}}"
        while self.peek() == "'":
            word += self.take()
        if self.peek() != "_":
            return word, []
        self.take()
        parts = " ".join(self.braced()).split(" , ")
        fixed = [part.replace(" ", "") for part in parts if not _is_index(part)]
        return "_".join([word, *fixed]), [part.replace(" ", "") for part in parts if _is_index(part)]

    def spelt(self) -> str:
        name, indices = self.name()
        if self.peek() == ")":
            self.take()
        return "_".join([name, *indices])


def _is_index(part: str) -> bool:
    return part.lstrip("( ")[0] in _INDEX and not part.startswith("\\")


def _times(left: Node, right: Node, divided: bool = False) -> Node:
    if divided:
        return lambda scope: left(scope) / right(scope)
    return lambda scope: left(scope) * right(scope)


def _split_index(words: list[str]) -> tuple[list[str], list[str]]:
    """The indices of a sum and its condition: `i , j : a > b`, or `t > n`, where the condition names the index."""
    if ":" in words:
        place = words.index(":")
        return [word for word in words[:place] if word != ","], words[place + 1 :]
    return [words[0]], words if len(words) > 1 else []


def _condition(words: list[str], functions: set[str]) -> Callable[[Scope], bool]:
    if not words:
        return lambda scope: True
    place = next(i for i, word in enumerate(words) if word in _COMPARE)
    left, right = (Parser(part, functions).all() for part in (words[:place], words[place + 1 :]))
    return lambda scope: _COMPARE[words[place]](left(scope), right(scope))


def _sorted(scope: Scope, name: str, index: str) -> Any:
    """u_{(i)}, the ith smallest."""
    values = sorted(scope.value(name, (i,)) for i in scope.given.ranges[index])
    return values[scope.bound[index] - 1]
