"""`align generate`: sample completions from a model or adapter into a file; the same command resumes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.cli import console
from align.core.errors import ConfigError
from align.core.progress import silent

if TYPE_CHECKING:
    from align.sampling.base import SamplingParams
    from align.sampling.job import Done, Job
    from align.sampling.reading import PromptSet

_DESCRIPTION = """Sample completions with Hugging Face generate.

Each row of the output is one completion: prompt, completion (a list of messages where the prompt is one), finished
(false where it was cut at --max-new-tokens), tokens, logp (mean log-probability of a token), model, row, sample, seed.
Prompts come from any format that align reads; of pairs, lists and demonstrations the prompt is taken.

Work is done in chunks beside the output. A command that was stopped goes on when given again, and does no finished
chunk a second time; given again after the end it does nothing.
"""
_EXAMPLES = """examples:
  align generate runs/my/policy -p "Why is the sky blue?" --chat
  align generate runs/my/policy --prompts held_out.jsonl --output answers.jsonl --n 4
  align generate Qwen/Qwen2.5-0.5B-Instruct --adapter runs/lora/policy --prompts prompts.txt --chat \\
      --system "Answer in one sentence." --temperature 0 --output answers.jsonl
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a model, or folder of an adapter")
    parser.add_argument("--adapter", metavar="DIR", help="adapter over MODEL")
    prompts = parser.add_argument_group("prompts")
    source = prompts.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", metavar="FILE", help="file, folder or hub id; of a .txt file each line")
    source.add_argument("-p", dest="texts", metavar="TEXT", action="append", help="a prompt (may be given again)")
    prompts.add_argument("--split", help="split of the data, where there are several")
    prompts.add_argument("--prompt-column", metavar="NAME", help="column of the prompt, where its name does not tell")
    prompts.add_argument("--max-prompts", type=int, metavar="N", help="the first N prompts only")
    prompts.add_argument("--chat", action="store_true", help="ask plain prompts as a user's message")
    prompts.add_argument("--system", metavar="TEXT", help="system message, in place of a prompt's own; makes a chat")
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="FILE", help="JSONL file to write; without it, -p prints")
    output.add_argument("--restart", action="store_true", help="replace an output, or work, of other settings")
    output.add_argument("--json", action="store_true", help="print for machines")
    draw = parser.add_argument_group("drawing")
    draw.add_argument("--n", type=int, default=1, help="completions of each prompt (default 1)")
    draw.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="tokens at most (default 256)")
    draw.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0: the likeliest token (default 1)")
    draw.add_argument("--top-p", type=float, default=1.0, metavar="X", help="(default 1: all)")
    draw.add_argument("--top-k", type=int, default=0, metavar="N", help="(default 0: all)")
    draw.add_argument("--seed", type=int, default=0, help="(default 0)")
    work = parser.add_argument_group("work")
    work.add_argument("--batch-size", type=int, default=64, metavar="N", help="completions at once (default 64)")
    work.add_argument("--chunk-size", type=int, default=256, metavar="N", help="prompts of a chunk (default 256)")
    work.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of weights and compute")
    work.add_argument("--device", help="cpu, cuda, ... (default: the GPU where there is one)")
    work.add_argument("--trust-remote-code", action="store_true", help="run code that the model brings")


def run(options: argparse.Namespace) -> int:
    _check(options)
    with contextlib.redirect_stdout(sys.stderr):  # libraries that print
        job = _job(options)
        watch = partial(console.progress, label="sampling", unit="completions")
        if options.output is None:
            asked = job.prompts.prompts
            # Answers for a pipe are few: a line of progress every while is for work that fills a file.
            seen = watch(len(asked) * options.n) if sys.stderr.isatty() else contextlib.nullcontext(silent)
            with seen as progress:
                rows = job.rows(asked, 0, progress)
        else:
            done = job.write(Path(options.output).expanduser(), options.chunk_size, watch, options.restart)
    rejected = _rejected(job.prompts)
    if options.output is None:
        console.print_json({"rows": rows, "rejected": rejected}) if options.json else _show(rows)
    elif options.json:
        console.print_json({**dataclasses.asdict(done), "rejected": rejected})
    else:
        _summarise(done)
    return 0


def _job(options: argparse.Namespace) -> Job:
    from align.sampling.hf import HFSampler
    from align.sampling.job import Job
    from align.sampling.loading import load
    from align.sampling.prompts import PromptEncoder

    console.set_up_logging(quiet=True)
    params = _params(options)
    found = _prompts(options)
    loaded = load(options.model, options.adapter, options.dtype, options.device, options.trust_remote_code)
    encoder = PromptEncoder(loaded.tokenizer)
    chats = any(not isinstance(asked.prompt, str) for asked in found.prompts)
    ends = encoder.end_of_turn if chats else ()
    sampler = HFSampler(loaded.model, loaded.tokenizer, options.batch_size, end_ids=ends)
    room = None if sampler.positions is None else sampler.positions - params.max_new_tokens
    found = found.encode(encoder, room)
    _tell(options, found, loaded.tokenizer)
    return Job(sampler, loaded.name, found, options.n, params)


def _params(options: argparse.Namespace) -> SamplingParams:
    from align.sampling.base import SamplingParams

    return SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )


def _check(options: argparse.Namespace) -> None:
    for name in ("n", "batch_size", "chunk_size", "max_prompts"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"`--{name.replace('_', '-')}` is {value}", mend="use 1 or more")
    if options.texts is None and options.output is None:
        raise ConfigError("no output is named", mend="add --output FILE.jsonl")
    if options.texts is not None:
        unused = [name for name in ("split", "prompt_column", "max_prompts") if getattr(options, name) is not None]
        if unused:
            raise ConfigError(f"`--{unused[0].replace('_', '-')}` does nothing with -p", mend="leave it out")
    if options.output is not None and Path(options.output).is_dir():
        raise ConfigError("the output is a folder", where=options.output, mend="name a file in it")


def _prompts(options: argparse.Namespace) -> PromptSet:
    from align.sampling.reading import as_chat, given_prompts, read_prompts

    if options.texts is not None:
        found = given_prompts(options.texts)
    else:
        found = read_prompts(options.prompts, options.split, options.max_prompts, options.prompt_column)
    return as_chat(found, options.system) if options.chat or options.system is not None else found


def _tell(options: argparse.Namespace, found: PromptSet, tokenizer: Any) -> None:
    """What a user should know before waiting: rows left out, and prompts that are not asked as a chat."""
    if options.prompts is not None:
        console.note(f"{options.prompts}: {len(found.prompts)} prompts, {found.read_as}")
    for reason, told in found.rejected.report()["reasons"].items():
        console.note(f"left out: {told['count']} x {reason} ({', '.join(told['rows'])})")
    plain = any(isinstance(asked.prompt, str) for asked in found.prompts)
    if plain and getattr(tokenizer, "chat_template", None):
        console.note("plain prompts are continued as they are; --chat asks them as messages")


def _rejected(found: PromptSet) -> dict[str, Any]:
    report = found.rejected.report()
    return {"count": report["bad"] + report["dropped"], "reasons": report["reasons"]}


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Answers on stdout, with a head each where there are several."""
    for row in rows:
        answer = row["completion"]
        text = answer if isinstance(answer, str) else answer[-1]["content"]
        if len(rows) > 1:
            print(f"--- {row['row']}, {row['sample'] + 1}")
        print(text if row["finished"] else f"{text} [cut]")


def _summarise(done: Done) -> None:
    if done.before == done.chunks:
        print(f"{done.output} is complete; nothing was left to do")
    elif done.before:
        print(f"{done.before} of {done.chunks} chunks were done before")
    rate = f", {console.duration(done.seconds)}, {done.sampled / done.seconds:,.0f} tokens/s" if done.sampled else ""
    print(
        f"{done.output}: {done.completions} completions of {done.prompts} prompts, "
        f"{done.finished / done.completions:.0%} finished, {done.tokens / done.completions:.1f} tokens each{rate}"
    )
