"""What only a process of its own can show: kills, signals, pipes, memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_tools import TINY, finish, start

from newllm import checkpoint
from newllm.run import Run

LONG = [*TINY, "--steps", 60, "--checkpoint-every", 7, "--log-every", 3]


def curve(run):
    timings = ("tokens_per_s", "elapsed_s")
    return [{key: value for key, value in record.items() if key not in timings} for record in run.metrics()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, text):
    """The run that the interrupted ones must end as."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    result = finish(start("train", "--data", text, *LONG, "--out", folder))
    assert result.code == 0, result.err
    assert result.err == ""
    return Run(folder)


def wait_for(process, true):
    """Until something has happened, or the process has ended without it."""
    deadline = time.monotonic() + 60
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def assert_same_end(run, uninterrupted):
    assert curve(run) == curve(uninterrupted)
    got, want = (checkpoint.load(of.last_file)[0] for of in (run, uninterrupted))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert not list(run.path.glob(".*"))  # no litter of half-written files


def test_killed_at_any_moment_it_resumes_to_the_same_end(newllm, text, tmp_path, uninterrupted):
    """kill -9 in the first session and in the second; then to the end."""
    run = Run(tmp_path / "run")
    process = start("train", "--data", text, *LONG, "--out", run.path)
    wait_for(process, lambda: len(run.metrics()) >= 3)  # after step 9, beyond the checkpoint of step 7
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    killed_at = checkpoint.load(run.last_file)[1]["step"]
    assert killed_at % 7 == 0
    (run.path / f".last.safetensors.{process.pid}.tmp").write_bytes(b"half a checkpoint")  # where the kill may strike

    if killed_at < 42:
        process = start("train", "--resume", run.path)
        wait_for(process, lambda: checkpoint.load(run.last_file)[1]["step"] > killed_at)
        process.kill()
        finish(process)
    assert newllm("generate", "The", "--run", run.path, "--max-tokens", 2).code == 0  # usable all along
    assert newllm("train", "--resume", run.path).code == 0
    assert_same_end(run, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_all_and_say_how_to_go_on(newllm, text, tmp_path, uninterrupted, number):
    run = Run(tmp_path / "run")
    process = start("train", "--data", text, *LONG, "--out", run.path)
    wait_for(process, lambda: len(run.metrics()) >= 1)
    process.send_signal(number)
    code, out, err = finish(process)
    assert (code, err) == (128 + number, "")
    assert f"newllm train --resume {os.path.relpath(run.path)}" in out
    step = checkpoint.load(run.last_file)[1]["step"]
    assert f"stopped at step {step} of 60" in out
    assert newllm("train", "--resume", run.path).code == 0
    assert_same_end(run, uninterrupted)


def test_generate_streams_and_stops_quietly_when_its_reader_leaves(trained):
    process = start("generate", "The", "--max-tokens", 10**9, "--run", trained, "--seed", 0)
    assert process.stdout.read(200).startswith("The")  # long before the end
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""


def test_generate_interrupted_ends_its_line(trained):
    process = start("generate", "The", "--max-tokens", 10**9, "--run", trained, "--seed", 0)
    process.stdout.read(50)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130
    assert out.endswith("\n")
    assert err == "newllm: interrupted\n"


def test_output_that_cannot_be_written_is_one_line(trained):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        process = start("generate", "The", "--max-tokens", 3, "--run", trained, stdout=full)
        code, _, err = finish(process)
    assert code == 2
    assert err == "newllm: error: No space left on device\n"


def test_a_terminal_that_knows_no_utf8_gets_question_marks(trained, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    code, out, err = finish(start("generate", "naïve €", "--max-tokens", 3, "--run", trained, "--seed", 0))
    assert (code, err) == (0, "")
    assert out.startswith("na?ve ?")


def resident_kib(process):
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("the process has no resident memory: it has ended")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_text(trained):
    """8,000 characters, about as many tokens of this small vocabulary, after the first 2,000 add less than 1 MiB.

    Were only the logits kept, a token would cost some 280 floats, over 1 KiB, so 8 MiB in all. What is left are the
    allocator's habits: the growth was 0 KiB in each of the three runs that this bound was set from.
    """
    process = start("generate", "The", "--max-tokens", 10**9, "--run", trained, "--seed", 0)
    stream = process.stdout.buffer
    try:
        read = 0
        while read < 2_000:
            read += len(stream.read1(512))
        before = resident_kib(process)
        while read < 10_000:
            read += len(stream.read1(512))
        after = resident_kib(process)
    finally:
        process.kill()
        process.communicate()
    assert after - before < 1024


def test_help_answers_without_loading_pytorch():
    script = "import sys, newllm.cli; newllm.cli.main(['train', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_waiting_threads_yield_the_core_unless_the_user_says_otherwise():
    """The variable has to be set before PyTorch is imported, so by the command itself."""
    script = "import sys, newllm.cli, os; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    for given, want in [({}, "1000 False\n"), ({"GOMP_SPINCOUNT": "7"}, "7 False\n")]:
        environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"} | given
        run = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
        )
        assert run.stdout == want


def test_a_terminal_sees_a_bar_with_tokens_per_second_and_time_left(text, tmp_path):
    pty, termios = (pytest.importorskip(name, reason="needs a pseudo-terminal") for name in ("pty", "termios"))
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    process = start("train", "--data", text, *TINY, "--out", tmp_path / "run", stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux reports the end of a terminal as an error
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert finish(process).code == 0
    assert re.search(rb"20/20 \[\d\d:\d\d<\d\d:\d\d, .*loss \d\.\d+, [\d,]+ tokens/s", shown), shown


def test_json_of_eval_is_all_that_is_printed(trained):
    code, out, err = finish(start("eval", "--json", trained))
    assert (code, err) == (0, "")
    assert json.loads(out)["splits"]["valid"]["perplexity"] > 1
