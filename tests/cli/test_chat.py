"""`align chat` in process: piped, as JSON, and on a real (pseudo) terminal, wide and narrow."""

from __future__ import annotations

import fcntl
import io
import json
import os
import struct
import termios

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from align.cli.main import main
from align.sampling.prompts import prompt_ids
from align.testing.tiny import save_tiny, tiny_tokenizer

QUICK = ("--max-new-tokens", "5", "--temperature", "0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    save_tiny(root / "one")
    save_tiny(root / "two", seed=4)
    save_tiny(root / "bare")
    tiny_tokenizer(chat_template=False).save_pretrained(root / "bare")
    (root / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    base = AutoModelForCausalLM.from_pretrained(root / "one")
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(root / "adapter")
    return root


def piped(monkeypatch, capsys, text, *words):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    code = main(["chat", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def greedy(folder, messages):
    """The answer by a plain loop over forwards."""
    tokenizer, model = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(folder)
    ids = prompt_ids(tokenizer, messages)
    out = []
    with torch.no_grad():
        for _ in range(5):
            out.append(int(model(torch.tensor([[*ids, *out]])).logits[0, -1].argmax()))
            if out[-1] == tokenizer.eos_token_id:
                return tokenizer.decode(out[:-1])
    return tokenizer.decode(out)


def test_each_model_keeps_its_own_history(folders, monkeypatch, capsys):
    words = (folders / "one", "--against", folders / "two", "--system", "Be brief.", "--json", *QUICK)
    code, out, err = piped(monkeypatch, capsys, "hello\n\nthe river\n/reset\nthe river\n/quit\nnever\n", *words)
    assert code == 0, err
    said = json.loads(out)
    assert said["models"] == [str(folders / "two"), str(folders / "one")]
    assert [turn["user"] for turn in said["turns"]] == ["hello", "the river", "the river"]
    for side, name in enumerate(("two", "one")):
        answers = [turn["answers"][side]["text"] for turn in said["turns"]]
        start = [{"role": "system", "content": "Be brief."}]
        asked = [*start, {"role": "user", "content": "hello"}]
        assert answers[0] == greedy(folders / name, asked)
        asked += [{"role": "assistant", "content": answers[0]}, {"role": "user", "content": "the river"}]
        assert answers[1] == greedy(folders / name, asked)
        assert answers[2] == greedy(folders / name, [*start, {"role": "user", "content": "the river"}])
        assert answers[2] != answers[1]


def test_a_pipe_prints_questions_and_answers_stacked(folders, monkeypatch, capsys):
    words = (folders / "one", "--against", folders / "two", *QUICK)
    code, out, _ = piped(monkeypatch, capsys, "[bold]hello\n", *words)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "> [bold]hello"
    assert lines[1] == f"[{folders / 'two'}]"
    assert f"[{folders / 'one'}]" in lines
    assert "\x1b" not in out


def test_system_and_temperature_commands(folders, monkeypatch, capsys):
    text = "/system Be rude.\nhello\n/system\nhello\n/temperature 1.5\nhello\n/reset\n/temperature 0\nhello\n"
    code, out, err = piped(monkeypatch, capsys, text, folders / "one", "--json", *QUICK)
    assert code == 0, err
    answers = [turn["answers"][0]["text"] for turn in json.loads(out)["turns"]]
    user = {"role": "user", "content": "hello"}
    assert answers[0] == greedy(folders / "one", [{"role": "system", "content": "Be rude."}, user])
    assert answers[1] == answers[3] == greedy(folders / "one", [user])
    after = [user, {"role": "assistant", "content": answers[1]}, user]
    assert answers[2] != greedy(folders / "one", after), "temperature 1.5 drew the likeliest five tokens"


def test_before_and_after_an_adapter_share_one_model(folders, monkeypatch, capsys):
    one, adapter = folders / "one", folders / "adapter"
    _, out, _ = piped(monkeypatch, capsys, "hello\n", one, "--adapter", adapter, "--against", one, "--json", *QUICK)
    said = json.loads(out)
    texts = [answer["text"] for answer in said["turns"][0]["answers"]]
    assert said["models"] == [str(one), f"{one} + {adapter}"]
    _, out, _ = piped(monkeypatch, capsys, "hello\n", adapter, "--json", *QUICK)
    alone = json.loads(out)["turns"][0]["answers"][0]["text"]
    assert texts == [greedy(one, [{"role": "user", "content": "hello"}]), alone]
    assert texts[0] != texts[1]


def test_without_a_template_texts_are_continued(folders, monkeypatch, capsys):
    code, out, err = piped(monkeypatch, capsys, "the cat\nthe cat\n", folders / "bare", "--json", *QUICK)
    assert code == 0
    assert "has no chat template" in err
    answers = [turn["answers"][0]["text"] for turn in json.loads(out)["turns"]]
    assert answers[0] == answers[1] == greedy(folders / "bare", "the cat")


def test_old_turns_are_forgotten_when_the_model_is_full(folders, monkeypatch, capsys):
    words = (folders / "one", "--system", "Be brief.", "--max-new-tokens", "60", "--temperature", "0", "--json")
    code, out, err = piped(monkeypatch, capsys, "hello there\n" * 8, *words)
    assert code == 0, err
    forgotten = [turn["answers"][0]["forgotten"] for turn in json.loads(out)["turns"]]
    assert forgotten[0] == 0
    assert 2 in forgotten
    assert set(forgotten) <= {0, 2, 4}
    assert "2 are forgotten" in err


MISTAKES = [
    ("/resett\n", (), "did you mean `/reset`"),
    ("/temperature warm\n", (), "the temperature is 'warm'"),
    ("/temperature -1\n", (), "outside its range"),
    ("hello " * 400 + "\n", (), "say less"),
    ("hello\n", ("--max-new-tokens", "512"), "the model has 512 positions"),
    ("hello\n", ("--against", "/no/such/model"), "there is no such model folder"),
]


@pytest.mark.parametrize(("text", "words", "says"), MISTAKES)
def test_mistakes(text, words, says, folders, monkeypatch, capsys):
    code, _, err = piped(monkeypatch, capsys, text, folders / "one", *words)
    assert code == 2
    assert says in err
    assert "Traceback" not in err


def test_no_system_message_without_a_template(folders, monkeypatch, capsys):
    for text, words in (("hello\n", ("--system", "x")), ("/system x\n", ())):
        code, _, err = piped(monkeypatch, capsys, text, folders / "bare", *words)
        assert code == 2
        assert "no system message without a chat template" in err


def on_terminal(monkeypatch, width, text, *words):
    """Everything that a terminal of `width` columns shows when `text` is typed."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    with os.fdopen(slave, "r", closefd=False) as stdin, os.fdopen(slave, "w", closefd=False) as stdout:
        for name, stream in (("stdin", stdin), ("stdout", stdout)):
            monkeypatch.setattr(f"sys.{name}", stream)
        os.write(master, text.encode())
        code = main(["chat", *map(str, words)])
        stdout.flush()
    os.set_blocking(master, False)
    shown = b""
    try:
        while chunk := os.read(master, 1 << 16):
            shown += chunk
    except BlockingIOError:
        pass
    monkeypatch.undo()
    os.close(slave)
    os.close(master)
    return code, shown.decode()


def test_a_wide_terminal_shows_two_answers_side_by_side_a_narrow_one_stacked(folders, monkeypatch):
    monkeypatch.chdir(folders)
    for width, beside in ((120, True), (60, False)):
        monkeypatch.chdir(folders)
        text = "hello\n/wrong\nhello\n/quit\n"
        code, shown = on_terminal(monkeypatch, width, text, "one", "--against", "two", *QUICK)
        assert code == 0
        both = [line for line in shown.splitlines() if "one" in line and "two" in line]
        assert len(both) == (2 if beside else 0), shown
        assert shown.count("two") == 2, "a wrong command does not end an interactive chat"
