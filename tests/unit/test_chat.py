"""Chat on tiny real checkpoints: piped lines, the commands, the canvas on a terminal, and what cannot be answered."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dare.cli import app
from dare.core.errors import DareError
from dare.model import Model, load
from dare.terminal.chat import Chat

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}={{ m.content }}.{% endfor %}{% if add_generation_prompt %}a={% endif %}"
)
OPTIONS = {"gen_length": 8, "block_length": 4}


@pytest.fixture(scope="module")
def chat_checkpoints(tiny_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny checkpoints, saved with a chat template over letters that they know."""
    found = {}
    for name, path in tiny_checkpoints.items():
        model = load(path)
        model.tokenizer.chat_template = TEMPLATE.replace("m.role[0]", "m.role[0] | upper").replace("a=", "A=")
        found[name] = model.save(tmp_path_factory.mktemp("chat") / name)
    return found


def chat(model: Model, *, is_terminal: bool = False, system: str | None = None, **decode: object) -> Chat:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=100, highlight=False)
    return Chat(model, {**OPTIONS, **decode}, seed=0, system=system, console=console)


def printed(conversation: Chat) -> str:
    file = conversation.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_every_reply_is_the_models_answer_to_the_whole_conversation(
    name: str, chat_checkpoints: dict[str, Path]
) -> None:
    model = load(chat_checkpoints[name])
    conversation = chat(model, temperature=0.8)
    conversation.run(["1+1\n", "\n", "AND 2\n"], is_interactive=False)
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    for end in (1, 3):
        (expected,) = model.generate([conversation.messages[:end]], seed=0, temperature=0.8, **OPTIONS)
        assert expected.text is not None
        assert conversation.messages[end]["content"] == expected.text.strip()
        assert expected.text.strip() in printed(conversation)


def test_reset_forgets_all_but_the_system_message(chat_checkpoints: dict[str, Path]) -> None:
    conversation = chat(load(chat_checkpoints["llada"]), system="SYS")
    conversation.run(["1", "/reset", "2", "/exit", "3"], is_interactive=False)
    contents = [message["content"] for message in conversation.messages if message["role"] != "assistant"]
    assert contents == ["SYS", "2"]


def test_a_terminal_sees_the_reply_grow_and_not_the_prompt(chat_checkpoints: dict[str, Path]) -> None:
    conversation = chat(load(chat_checkpoints["llada"]), is_terminal=True)
    conversation.run(["1+1"], is_interactive=True)
    output = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed(conversation))
    assert {frame.count("░") for frame in re.split("[\r\n]", output)} >= set(range(8))
    assert "1+1" not in output
    assert conversation.messages[-1]["content"] in output


def test_an_interactive_chat_survives_mistakes_and_a_piped_one_ends(chat_checkpoints: dict[str, Path]) -> None:
    model = load(chat_checkpoints["llada"])
    for line, hint in (("/rest", "/reset"), ("a lower case letter", "not in the vocabulary"), ("1" * 200, "longer")):
        conversation = chat(model)
        conversation.run([line, "1"], is_interactive=True)
        assert hint in printed(conversation)
        assert next(message["content"] for message in conversation.messages) == "1"
        with pytest.raises(DareError, match=hint if hint != "/reset" else "unknown command"):
            chat(model).run([line], is_interactive=False)


def test_a_checkpoint_without_a_template_is_refused_at_once(tiny_checkpoints: dict[str, Path]) -> None:
    result = CliRunner().invoke(app, ["chat", str(tiny_checkpoints["llada"])], input="1\n")
    assert result.exit_code == 2
    assert "no chat template" in result.stderr


def test_piped_lines_on_the_command_line(chat_checkpoints: dict[str, Path]) -> None:
    words = [str(chat_checkpoints["sdar"]), "gen_length=8", "temperature=1.0", "--seed", "3", "--system", "BE"]
    run = subprocess.run(
        [sys.executable, "-m", "dare.cli", "chat", *words],
        input="1+1\n2+2\n/exit\n9\n",
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.splitlines()
    assert [line for line in lines if line.startswith("> ")] == ["> 1+1", "> 2+2", "> /exit"]
    again = CliRunner().invoke(app, ["chat", *words], input="1+1\n2+2\n/exit\n9\n")
    assert again.stdout == run.stdout
