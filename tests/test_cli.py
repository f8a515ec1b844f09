"""The command line on a tiny checkpoint; YAML; help for every flag; errors in one line with status 2."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxft.cli import AdapterConfig, ModelConfig, config_flags, expand_config, main
from jaxft.errors import EXIT_STATUS, JaxftError
from jaxft.generation.sampling import GenerationConfig
from jaxft.train.dpo import DPOConfig
from jaxft.train.evaluation import file_questions, task_questions
from jaxft.train.grpo import GRPOConfig
from jaxft.train.sft import SFTConfig, SFTTrainer
from language_models import loaded, logits_of, sums


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sums(4)))
    return path


@pytest.fixture(scope="module")
def out(tiny_hf_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run of `jaxft sft` wrote, its settings half from a YAML file and half from flags that win over it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(4)))
    (folder / "sft.yaml").write_text(
        f"model_name: {tiny_hf_dir}\nload_in_4bit: false\ndata: {folder / 'rows.jsonl'}\nmax_seq_length: 64\n"
        "r: 3\ntarget_modules: [q_proj, down_proj]\nuse_gradient_checkpointing: none\nlearning_rate: 1e-3\n"
        "max_steps: 9\nsave: [merged, merged_16bit]\ngguf: q8_0\nmax_grad_norm:\n"
    )
    flags = ("--output-dir", folder / "out", "--max-steps", 2, "--gguf", "f32", "f16")
    assert run("sft", "--config", folder / "sft.yaml", *flags) == 0
    return folder / "out"


def test_sft_writes_everything(out: Path, tiny_hf_dir: Path):
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files >= {
        *("metrics.jsonl", "loss.png", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
        *("merged/model.safetensors", "merged_16bit/model.safetensors", "gguf/model.F32.gguf", "gguf/model.F16.gguf"),
    }
    assert "gguf/model.Q8_0.gguf" not in files
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2]
    assert steps[0]["learning_rate"] == pytest.approx(1e-3)
    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], sorted(adapter["target_modules"])) == (3, ["down_proj", "q_proj"])
    assert adapter["base_model_name_or_path"] == str(tiny_hf_dir)


def test_generate_prints_answers_only(out: Path, capfd: pytest.CaptureFixture[str]):
    prompts = ("What is 2 plus 3?", "The answer")
    status = run("generate", "--model-name", out / "adapter", "--load-in-4bit", "False", "--max-new-tokens", 6,
                 "--chat", "False", "--prompt", *prompts)  # fmt: skip
    output = capfd.readouterr()
    assert status == 0
    answers = loaded(out / "adapter").answer(prompts, chat=False, max_new_tokens=6)
    assert output.out == "".join(f"{answer}\n" for answer in answers)
    assert any(answers)
    assert "loading weights" in output.err


def test_generate_streams_one_answer(out: Path, capfd: pytest.CaptureFixture[str]):
    arguments = ("generate", "--model-name", out / "adapter", "--load-in-4bit", "False", "--max-new-tokens", 40,
                 "--chat", "False", "--stream", "True", "--stop-strings", "zzz", "--prompt", "The answer")  # fmt: skip
    assert run(*arguments) == 0
    answer = loaded(out / "adapter").answer(["The answer"], chat=False, max_new_tokens=40)[0]
    assert answer
    assert capfd.readouterr().out.strip() == answer.rstrip("\ufffd").strip()
    assert run(*arguments, "another") == EXIT_STATUS
    assert "error: stream: prints one answer while it is made" in capfd.readouterr().err


def evaluated(capfd: pytest.CaptureFixture[str], *arguments: object) -> dict[str, float]:
    capfd.readouterr()
    assert run("eval", "--load-in-4bit", "False", "--json", "True", *arguments) == 0
    return json.loads(capfd.readouterr().out)


def test_eval_of_rows_and_answers(out: Path, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """The loss of the rows is the trainer's."""
    (tmp_path / "answers.jsonl").write_text('{"question": "2+3?", "answer": "because #### 5"}\n')
    found = evaluated(
        capfd, "--model-name", out / "adapter", "--data", rows, "--max-seq-length", 64,
        "--answers", tmp_path / "answers.jsonl", "--max-new-tokens", 3,
    )  # fmt: skip
    trained = SFTTrainer(loaded(out / "adapter"), args=SFTConfig(max_seq_length=64)).evaluate(rows)
    assert found["loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert (found["questions"], found["accuracy"]) == (1, 0)


@pytest.mark.slow
def test_eval_of_a_text(out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Against log-probabilities of each window's logits in numpy; every token but the first counts once."""
    text = tmp_path / "text.txt"
    text.write_text("The answer is the sum of the numbers, and the sum is the answer.")
    language_model = loaded(out / "adapter")
    ids = np.array(language_model.tokenizer(text.read_text())["input_ids"])

    def log_p(start: int, stop: int) -> np.ndarray:
        logits = logits_of(language_model, ids[None, start:stop])[0, :-1].astype(np.float64)
        return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[
            np.arange(stop - start - 1), ids[start + 1 : stop]
        ]

    model = ("--model-name", out / "adapter", "--data", text)
    whole = evaluated(capfd, *model, "--max-seq-length", 64)
    assert (whole["tokens"], whole["loss"]) == (len(ids) - 1, pytest.approx(-log_p(0, len(ids)).mean(), rel=1e-5))
    windows = evaluated(capfd, *model, "--max-seq-length", 8, "--stride", 5)
    parts, counted = [], 1
    for start in range(0, len(ids), 5):
        stop = min(start + 8, len(ids))
        if stop > counted:
            parts.append(log_p(start, stop)[counted - stop :])
            counted = stop
    assert (windows["tokens"], windows["loss"]) == (
        len(ids) - 1,
        pytest.approx(-np.concatenate(parts).mean(), rel=1e-5),
    )
    assert windows["loss"] != pytest.approx(whole["loss"], rel=1e-4)


def test_eval_of_nothing(out: Path, capfd: pytest.CaptureFixture[str]):
    assert run("eval", "--model-name", out / "adapter") == EXIT_STATUS
    assert "jaxft eval: has nothing to evaluate. Give --data, --task or --answers" in capfd.readouterr().err


def test_right_answers_are_counted():
    gsm = [{"question": "2+3?", "answer": "2 + 3 = 5\n#### 5"}]
    (question,) = file_questions(gsm)
    assert (question.score(" 5\n"), question.score("6")) == (1, 0)
    with pytest.raises(JaxftError, match="data row 1: has no text 'answer' or 'output'"):
        file_questions([{"question": "2+3?"}])
    (item,) = task_questions("chain_sum", 1, seed=0)
    assert item.score("no number") < 1
    with pytest.raises(JaxftError, match="task: reasoning-gym has no 'chain_some'"):
        task_questions("chain_some", 1, 0)


@pytest.mark.slow
def test_eval_of_a_base_an_adapter_and_a_merged_model(
    smollm2_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """SmolLM2: what merging changes is rounding; the adapter, trained on the rows, is better at them than the base."""
    data, text, answers = tmp_path / "rows.jsonl", tmp_path / "text.txt", tmp_path / "answers.jsonl"
    trained = sums(40)
    data.write_text("".join(json.dumps(row) + "\n" for row in trained))
    text.write_text(
        "A model that predicts the next word of a text is judged by how little that word surprises it. " * 3
    )
    turns = [[turn["content"] for turn in row["messages"]] for row in trained[::4]]
    answers.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in turns))
    common = ("--model-name", smollm2_gguf, "--load-in-4bit", "False")
    run("sft", *common, "--data", data, "--output-dir", tmp_path / "run", "--max-seq-length", 128, "--max-steps", 15,
        "--learning-rate", 1e-3, "--save", "merged")  # fmt: skip
    found = {}
    for name in (smollm2_gguf, tmp_path / "run" / "adapter", tmp_path / "run" / "merged"):
        model = ("--model-name", name, "--max-seq-length", 128)
        found[name.name] = (
            evaluated(capfd, *model, "--data", data),
            evaluated(capfd, *model, "--data", text),
            evaluated(capfd, *model, "--answers", answers, "--max-new-tokens", 8),
        )
    for name, scores in found.items():
        print(name, *scores)
    base, adapter, merged = found.values()
    assert adapter[0]["perplexity"] < 0.8 * base[0]["perplexity"]
    for ours, theirs in zip(adapter[:2], merged[:2], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
    assert [scores[2]["questions"] for scores in found.values()] == [10, 10, 10]
    assert base[2]["accuracy"] == 0, "it does not know the form of the answers"
    assert adapter[2]["accuracy"] >= 0.3
    assert merged[2]["accuracy"] == pytest.approx(adapter[2]["accuracy"], abs=0.1)


@pytest.mark.slow
def test_dpo_and_grpo(out: Path, tiny_hf_dir: Path, tmp_path: Path):
    """Both train an adapter of the right shape; an answer that is always drawn wrong gives no reward, and no error."""
    pairs, answers = tmp_path / "pairs.jsonl", tmp_path / "answers.jsonl"
    pairs.write_text(4 * (json.dumps({"prompt": "What is 2", "chosen": " plus 3?", "rejected": " of it"}) + "\n"))
    answers.write_text(2 * (json.dumps({"question": "What is 2 plus 3?", "answer": "5"}) + "\n"))
    common = ("--model-name", tiny_hf_dir, "--load-in-4bit", "False", "--r", 3, "--max-length", 128, "--max-steps", 2)
    assert run("dpo", *common, "--data", pairs, "--output-dir", tmp_path / "dpo", "--learning-rate", 1e-3) == 0
    steps = [json.loads(line) for line in (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert steps[1]["loss"] != steps[0]["loss"]
    assert run("grpo", *common, "--answers", answers, "--task", "chain_sum", "--task-size", 2, "--output-dir",
               tmp_path / "grpo", "--num-generations", 2, "--per-device-train-batch-size", 4,
               "--max-completion-length", 8) == 0  # fmt: skip
    assert len((tmp_path / "grpo" / "rollouts.jsonl").read_text().splitlines()) == 2
    for name in ("dpo", "grpo"):
        adapter = json.loads((tmp_path / name / "adapter" / "adapter_config.json").read_text())
        assert adapter["r"] == 3


def test_overwriting_a_run(out: Path, rows: Path, tiny_hf_dir: Path, capfd: pytest.CaptureFixture[str]):
    arguments = ("sft", "--model-name", tiny_hf_dir, "--load-in-4bit", "False", "--data", rows, "--output-dir", out)
    assert run(*arguments) == EXIT_STATUS
    assert f"error: {out}: is not empty" in capfd.readouterr().err


# YAML.


@pytest.mark.parametrize(
    "line", ["sft --config {} --r 2", "sft --config={} --r 2", "--config {} sft --r 2", "sft --r 2 --config {}"]
)
def test_the_file_stands_before_the_flags(line: str, tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("max_steps: -1\nsave: []\nchat: true\nprompt: [a b, c]\nseed: null\n")
    expected = ["sft", "--max-steps", "-1", "--save", "--chat", "True", "--prompt", "a b", "c", "--r", "2"]
    assert expand_config(line.format(path).split()) == expected
    assert expand_config(["sft", "--r", "2"]) == ["sft", "--r", "2"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b", "must be a mapping of setting names to values"),
        ("", "must be a mapping"),
        ("a: [", "is not valid YAML: while parsing"),
        ("lora:\n  r: 3", "lora: is a mapping; settings are flat"),
        ("name: \x00", "is not valid YAML"),
    ],
)
def test_bad_yaml(text: str, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(JaxftError, match=words):
        config_flags(path)
    assert run("sft", "--config", path) == EXIT_STATUS
    assert capfd.readouterr().err.startswith(f"error: {path}")


def test_missing_yaml(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert run("sft", "--config", tmp_path / "none.yaml") == EXIT_STATUS
    assert "none.yaml: cannot be read (No such file or directory)" in capfd.readouterr().err
    assert run("sft", "--config") == EXIT_STATUS
    assert "--config: needs a file" in capfd.readouterr().err


def test_unknown_yaml_key(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    path = tmp_path / "c.yaml"
    path.write_text("model_name: a\ndata: b\nlearning_rte: 1e-3\n")
    with pytest.raises(SystemExit) as caught:
        run("sft", "--config", path)
    assert caught.value.code == EXIT_STATUS
    output = capfd.readouterr()
    assert "--learning-rte" in output.err
    assert output.out == ""


# Errors.

BAD = {
    "no model": (["--model-name", "{tmp}/none"], "{tmp}/none: does not exist"),
    "no data": (["--data", "{tmp}/none.jsonl"], "{tmp}/none.jsonl: does not exist"),
    "bad row": (["--data", "{tmp}/bad.jsonl"], "{tmp}/bad.jsonl row 1: has the keys ['question']"),
    "target": (["--target-modules", "query"], "target_modules: 'query' matches no linear"),
    "remat": (["--use-gradient-checkpointing", "some"], "use_gradient_checkpointing: 'some' is not known"),
    "gguf": (["--gguf", "q9_9"], "GGUF quantization 'q9_9': is not known"),
    "output": (["--output-dir", "{tmp}/bad.jsonl"], "{tmp}/bad.jsonl: is a file, not a folder"),
    "too long": (["--max-seq-length", "16"], "rows.jsonl row 1: has"),
    "rank": (["--r", "0"], "r: the rank must be at least 1"),
    "logging": (["--logging-steps", "0"], "logging_steps: must be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_are_one_line(
    case: str, rows: Path, tiny_hf_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    flags, words = BAD[case]
    (tmp_path / "bad.jsonl").write_text('{"question": "2?"}\n')
    before = {"--model-name": tiny_hf_dir, "--data": rows, "--output-dir": tmp_path / "out"}
    defaults = [str(part) for pair in before.items() if pair[0] != flags[0] for part in pair]
    try:
        status: object = run("sft", *defaults, *(flag.format(tmp=tmp_path) for flag in flags))
    except SystemExit as stop:
        status = stop.code
    output = capfd.readouterr()
    assert status == EXIT_STATUS
    assert output.out == ""
    assert "Traceback" not in output.err
    (line,) = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {words.format(tmp=tmp_path)}") or words in line
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("arguments", [[], ["nonesuch"], ["sft"], ["sft", "--model-name"], ["generate", "--chat"]])
def test_wrong_arguments(arguments: list[str], capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == EXIT_STATUS
    output = capfd.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err


def test_an_error_in_a_process(tmp_path: Path):
    """The whole of standard error is that one line, however narrow the terminal."""
    command = [sys.executable, "-c", "import sys; from jaxft.cli import main; sys.exit(main())"]
    found = subprocess.run(
        [*command, "generate", "--model-name", tmp_path / "none", "--prompt", "a"],
        capture_output=True, text=True, check=False, env={"COLUMNS": "40", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert (found.returncode, found.stdout, found.stderr) == (2, "", f"error: {tmp_path / 'none'}: does not exist\n")


# Help.

DATACLASSES = {
    "sft": (ModelConfig, AdapterConfig, SFTConfig),
    "dpo": (ModelConfig, AdapterConfig, DPOConfig),
    "grpo": (ModelConfig, AdapterConfig, GRPOConfig),
    "eval": (ModelConfig,),
    "generate": (ModelConfig, GenerationConfig),
    "demo": (),
}


def help_of(command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """The text as one line, without the frames."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        run(*command.split(), "--help")
    assert caught.value.code == 0
    return re.sub(r"[\s│╭╮╰╯─]+", " ", capfd.readouterr().out)


@pytest.mark.parametrize("command", DATACLASSES)
def test_every_flag_is_explained(command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    text = help_of(command, monkeypatch, capfd)
    for cls in DATACLASSES[command]:
        for field in dataclasses.fields(cls):
            assert described(cls, field.name) in text, field.name
    flags = dict(re.findall(r" --([a-z0-9-]+) (.*?)(?= --[a-z]|$)", text))
    assert flags
    for flag, rest in flags.items():
        words = re.sub(r"\((default|required).*|\{.*?\}|\[.*?\]|[A-Z]{3,}", "", rest)
        assert re.search(r"[a-z]{2,}", words), f"--{flag} is not explained: {rest}"


def described(cls: Callable[..., object], name: str) -> str:
    """What the `Attributes:` of the class, or of one that it extends, say of a name."""
    line = re.compile(rf"^ +{name}: (.*?)$(?=\n +\w+: |\n+\s*\Z|\n\s*\n)", re.DOTALL | re.MULTILINE)
    matches = (line.search(each.__doc__ or "") for each in getattr(cls, "__mro__", (cls,)))
    found = next((match for match in matches if match), None)
    assert found, f"{name} has no line of its own"
    return " ".join(found[1].split())


def test_the_command_is_explained(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    text = help_of("", monkeypatch, capfd)
    assert "--config FILE" in text
    for command in DATACLASSES:
        assert f" {command} " in text
