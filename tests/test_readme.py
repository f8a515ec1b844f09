"""What the README says to type works: the quick start, every command in order, the targets of make.

It all runs in a folder that holds a tiny checkpoint under the name of the model on the hub: paths go before names.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import converters.cli
import jaxft.cli
from readme import README, code_blocks

MAINS = {"jaxft": jaxft.cli.main, "jaxft-convert": converters.cli.main}
QUICK_START = code_blocks("Quick start", "python")[0]


@pytest.fixture
def folder_with_model(make_tiny_hf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a tiny checkpoint at the quick start's `model_name`."""
    (name,) = re.findall(r'^model_name = "(.*?)"', QUICK_START, re.MULTILINE)
    make_tiny_hf(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_quick_start(folder_with_model: Path, capsys: pytest.CaptureFixture[str]):
    assert len([line for line in QUICK_START.splitlines() if line]) <= 15
    exec(compile(QUICK_START, "README.md, quick start", "exec"), {})
    (answers,) = capsys.readouterr().out.splitlines()
    assert len(ast.literal_eval(answers)) == 1
    written = {path.name for path in (folder_with_model / "outputs").rglob("*")}
    assert written >= {"metrics.jsonl", "loss.png", "adapter_model.safetensors", "model.safetensors", "model.Q8_0.gguf"}


def test_command_line(folder_with_model: Path, capsys: pytest.CaptureFixture[str]):
    """Every command of the block, in order, on the block's own data and YAML file; of the demo only its flags."""
    Path("rows.jsonl").write_text(code_blocks("Command line", "json")[0])
    Path("sft.yaml").write_text(code_blocks("Command line", "yaml")[0])
    commands = [shlex.split(line) for line in code_blocks("Command line", "sh")[0].splitlines()]
    assert {command[0] for command in commands} == set(MAINS)
    for program, subcommand, *arguments in commands:
        if subcommand == "demo":
            arguments.append("--help")
        assert status(program, [subcommand, *arguments]) == 0, (arguments, capsys.readouterr().err)
        if subcommand == "demo":
            shown = capsys.readouterr().out
            assert "usage: jaxft demo" in shown
            assert all(flag in shown for flag in arguments if flag.startswith("--"))
    assert (folder_with_model / "runs/hf/config.json").is_file()


@pytest.mark.parametrize(
    "command",
    [
        "jaxft finetune --prompt x",
        "jaxft generate --model m --prompt x",
        "jaxft-convert to-gguf a b --quant f16",
        "jaxft sft --config gone.yaml",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(command: str):
    """Negative control: a renamed command, a renamed flag of each program, and a file that nothing made."""
    program, *arguments = command.split()
    assert status(program, arguments) == 2


def status(program: str, arguments: list[str]) -> int:
    """The exit status of a command, run in this process."""
    try:
        return MAINS[program](arguments)
    except SystemExit as stop:  # how tyro ends after --help or a wrong flag
        return int(stop.code or 0)


def test_make_targets():
    makefile = (README.parent / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README.read_text(), re.MULTILINE))
    assert named >= {"demo", "test"}
    assert named <= targets
