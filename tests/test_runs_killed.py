"""Runs in processes of their own that are killed, terminated, or find the disk full (slow)."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # each process takes ten seconds to come to its first step

STEPS = 60
RUN = f"""
import sys
import numpy as np
from jaxft import FastLanguageModel, SFTConfig, SFTTrainer, lora

folder, output_dir = sys.argv[1:]
model, _ = FastLanguageModel.from_pretrained(folder, load_in_4bit=False)
FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.1, use_gradient_checkpointing=False)
rows = [{{"prompt": f"What is {{i}} plus", "completion": f" {{i + 3}}?"}} for i in range(37)]
args = SFTConfig(
    output_dir=output_dir, max_seq_length=32, max_steps={STEPS}, save_steps=1, save_total_limit=3, learning_rate=1e-3,
    resume_from_checkpoint="true",
)
SFTTrainer(model, train_dataset=rows, args=args).train()
np.savez(output_dir + "/adapter.npz", **lora.adapter_tensors(model.decoder))
"""


def start(tiny: Path, out: Path, cache: Path, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAXFT_CACHE": str(cache)}
    command = [*prefix, sys.executable, "-c", RUN, str(tiny), str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> str:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return err


def lines(out: Path) -> int:
    log = out / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def wait_for(process: subprocess.Popen[str], condition, seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_twenty_kills(tiny_hf_dir: Path, tmp_path: Path):
    """kill -9 at random moments, every second one while a checkpoint is being written."""
    cache = tmp_path / "cache"
    finish(start(tiny_hf_dir, tmp_path / "undisturbed", cache))
    out, rng, inside = tmp_path / "killed", random.Random(0), 0
    for kill in range(20):
        process = start(tiny_hf_dir, out, cache)
        before = lines(out)
        if kill % 2:
            wait_for(process, lambda before=before: lines(out) > before and any(out.glob("*.orbax-checkpoint-tmp*")))
        else:
            wait_for(process, lambda before=before: lines(out) > before)
            time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            break  # it came to its end before it was killed
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        inside += any(out.glob("*.orbax-checkpoint-tmp*"))
    print(f"killed {kill + 1} times, {inside} inside a checkpoint's writing")
    assert kill == 19, "the run was too short for twenty kills"
    assert inside >= 5
    finish(start(tiny_hf_dir, out, cache))
    expected, found = (dict(np.load(folder / "adapter.npz")) for folder in (tmp_path / "undisturbed", out))
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert lines(out) == STEPS


def test_sigterm_in_a_process(tiny_hf_dir: Path, tmp_path: Path):
    process = start(tiny_hf_dir, tmp_path / "out", tmp_path / "cache")
    wait_for(process, lambda: lines(tmp_path / "out") > 3)
    process.terminate()
    err = finish(process)
    assert "resume_from_checkpoint=True goes on from there" in err.replace("\n", " ")
    assert not (tmp_path / "out" / "adapter.npz").exists()
    finish(start(tiny_hf_dir, tmp_path / "out", tmp_path / "cache"))
    assert lines(tmp_path / "out") == STEPS


def test_a_file_system_that_is_full(tiny_hf_dir: Path, tmp_path: Path):
    """A file system of 3 MiB in memory that something else fills in the middle of the run, again whenever it has room:
    all but 160 KiB, too little for a checkpoint and enough for what is written at the end."""
    probe = (
        subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
        if shutil.which("unshare")
        else None
    )
    if probe is None or probe.returncode:
        pytest.skip("no file system can be mounted here")
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f'mount -t tmpfs -o size=3m tmpfs "{disk}" && '
        f'( while [ ! -d "{disk}/out/checkpoint-5" ] ; do sleep 0.02; done; '
        f'while sleep 0.02; do more=$(( $(df --output=avail -B1 "{disk}" | tail -n 1) - 163840 )); '
        f'[ $more -le 0 ] || head -c $more /dev/zero >> "{disk}/filler" 2>/dev/null; done ) & filler=$!; '
        '"$@"; status=$?; '
        f'ls "{disk}/out" >&2; kill $filler; rm "{disk}/filler"; '
        f'"$@" && cp "{disk}/out/adapter.npz" "{tmp_path}"; exit $status'
    )
    mount_first = script.split(" && ", 1)
    prefix = ("unshare", "-rm", "bash", "-c", f"{mount_first[0]} || exit 9; {mount_first[1]}", "bash")
    err = finish(start(tiny_hf_dir, disk / "out", tmp_path / "cache", prefix)).replace("\n", " ")
    assert "was not written (No space left on device" in err
    assert "is whole. The run goes on" in err
    finish(start(tiny_hf_dir, tmp_path / "undisturbed", tmp_path / "cache"))
    expected, found = (
        dict(np.load(path)) for path in (tmp_path / "undisturbed" / "adapter.npz", tmp_path / "adapter.npz")
    )
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
