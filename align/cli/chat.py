"""`align chat`: talk to a model, or to two side by side."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from align.cli import console
from align.core.errors import AlignError, ConfigError, suggestion

if TYPE_CHECKING:
    from align.sampling.base import SamplingParams
    from align.sampling.conversation import Answer, Conversation

_DESCRIPTION = """Talk to a model; with --against to two, before and after, side by side where the terminal is wide.

Each model keeps its own history. Lines from a pipe are asked one after another and the answers printed; --json prints
one document of all turns. A model without a chat template continues each text as it is.
"""
_COMMANDS = {
    "/reset": "forget what was said",
    "/system": "TEXT: begin anew with this system message",
    "/temperature": "NUMBER: how freely to draw; 0 takes the likeliest token",
    "/help": "these commands",
    "/quit": "end",
}
_EPILOG = (
    "commands:\n"
    + "".join(f"  {name:<14}{says}\n" for name, says in _COMMANDS.items())
    + """
examples:
  align chat runs/my/policy --against Qwen/Qwen2.5-0.5B-Instruct
  align chat Qwen/Qwen2.5-0.5B-Instruct --adapter runs/lora/policy --against Qwen/Qwen2.5-0.5B-Instruct
  echo "Why is the sky blue?" | align chat runs/my/policy --temperature 0 --json
"""
)
_WIDE = 100
"""Columns of a terminal from which two answers stand side by side."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a model, or folder of an adapter")
    parser.add_argument("--adapter", metavar="DIR", help="adapter over MODEL")
    parser.add_argument("--against", metavar="MODEL", help="a second model, shown first: what MODEL was before")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="X", help="0: the likeliest (default 0.7)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="(default 1: all)")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="(default 0: all)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (default 256)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of weights")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU where there is one)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model brings")
    parser.add_argument("--json", action="store_true", help="print for machines, at the end")


def run(options: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):  # libraries that print
        console.set_up_logging(quiet=True)
        params, sides = _sides(options)
    chat = _Chat(sides, params, options.json)
    for line in _lines(options.json):
        try:
            if not chat.take(line.strip()):
                break
        except AlignError as error:
            if not sys.stdin.isatty():
                raise
            console.note(f"error: {error}")
    if options.json:
        console.print_json({"models": [side.name for side in sides], "turns": chat.turns})
    return 0


def _sides(options: argparse.Namespace) -> tuple[SamplingParams, list[Conversation]]:
    """The model's side of the chat, behind that of the one it is compared with."""
    from align.sampling.base import SamplingParams
    from align.sampling.conversation import Conversation
    from align.sampling.loading import load

    params = SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )
    rest = (options.dtype, options.device, options.trust_remote_code)
    loaded = load(options.model, options.adapter, *rest)
    sides = [Conversation(loaded, options.system)]
    if options.against is not None:
        if options.adapter is not None and options.against == options.model:
            # The model beneath the adapter is in memory already.
            before = Conversation(dataclasses.replace(loaded, name=options.against), options.system, adapter=False)
        else:
            before = Conversation(load(options.against, None, *rest), options.system)
        sides.insert(0, before)
    for side in sides:
        side.check(params)
        if not side.templated:
            if options.system is not None:
                raise ConfigError("no system message without a chat template", where=side.name, mend="leave it out")
            console.note(f"{side.name} has no chat template: each text is continued as it is, without history")
    return params, sides


def _lines(quiet: bool) -> Iterator[str]:
    """What the user types, or what comes down the pipe."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip() and not quiet:
                print(f"> {line.strip()}", flush=True)
            yield line
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - editing and history of the line
    console.note("/help tells the commands, /quit ends")
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


class _Chat:
    """The turns of a chat with one model or two."""

    def __init__(self, sides: list[Conversation], params: SamplingParams, quiet: bool) -> None:
        self.sides, self.params, self.quiet = sides, params, quiet
        self.turns: list[dict[str, Any]] = []

    def take(self, line: str) -> bool:
        """Do what a line asks for; false where it ends the chat."""
        if line.startswith("/"):
            return self._command(*line.partition(" ")[::2])
        if line:
            self._ask(line)
        return True

    def _ask(self, text: str) -> None:
        before = [side.history for side in self.sides]
        try:
            with self._waiting(), contextlib.redirect_stdout(sys.stderr):
                answers = [side.ask(text, self.params) for side in self.sides]
        except BaseException as error:
            for side, history in zip(self.sides, before, strict=True):  # one side may have answered
                side.history = history
            if not isinstance(error, KeyboardInterrupt) or not sys.stdin.isatty():
                raise
            console.note("stopped")
            return
        for side, answer in zip(self.sides, answers, strict=True):
            if answer.forgotten:
                console.note(f"{side.name}: the first turns no longer fit, {answer.forgotten} are forgotten")
        said = [
            {"model": side.name, **dataclasses.asdict(answer)} for side, answer in zip(self.sides, answers, strict=True)
        ]
        self.turns.append({"user": text, "answers": said})
        if not self.quiet:
            _show([side.name for side in self.sides], answers)

    def _waiting(self) -> contextlib.AbstractContextManager[Any]:
        if self.quiet or not sys.stderr.isatty():
            return contextlib.nullcontext()
        return console.console(stderr=True).status("...")

    def _command(self, name: str, value: str) -> bool:
        actions: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/system": self._system,
            "/temperature": self._temperature,
            "/help": self._help,
        }
        if name in ("/quit", "/exit"):
            return False
        if name not in actions:
            raise ConfigError(f"there is no command `{name}`", mend=suggestion(name, _COMMANDS))
        actions[name](value.strip())
        return True

    def _reset(self, value: str) -> None:
        for side in self.sides:
            side.reset()

    def _system(self, value: str) -> None:
        plain = [side.name for side in self.sides if not side.templated]
        if plain:
            raise ConfigError("no system message without a chat template", where=plain[0])
        for side in self.sides:
            side.reset(value)

    def _temperature(self, value: str) -> None:
        try:
            number = float(value)
        except ValueError:
            raise ConfigError(f"the temperature is {value!r}", mend="give a number: /temperature 0.7") from None
        self.params = dataclasses.replace(self.params, temperature=number)

    def _help(self, value: str) -> None:
        console.note("\n".join(f"{name:<14}{says}" for name, says in _COMMANDS.items()))


def _show(names: list[str], answers: list[Answer]) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console.console()
    texts = [Text(answer.text.strip("\n") + ("" if answer.finished else " [cut]")) for answer in answers]
    if len(names) == 1:
        out.print(texts[0])
    elif out.is_terminal and out.width >= _WIDE:
        table = Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0))
        for name in names:
            table.add_column(Text(name, style="bold"), ratio=1, overflow="fold")
        table.add_row(*texts)
        out.print(table)
    else:
        for name, text in zip(names, texts, strict=True):
            out.print(Text(f"[{name}]", style="bold"))
            out.print(text)
