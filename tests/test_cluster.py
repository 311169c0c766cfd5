"""A run survives what a cluster does to it: kills, full disks, damage, signals, many processes."""

import csv
import gc
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SMALL, TINY
from test_train import metrics, same

import train as script
from dataset import batch_indices
from train import train
from utils import distributed
from utils.checkpoint import find_model, newest_checkpoint, read_checkpoint
from utils.cli import UserError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--", ROOT / "train.py"]  # without the two dashes, it takes --run for its --run-path
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def command(data, tmp_path, monkeypatch):
    """command(*options): train.py in this process, in tmp_path, on the twelve slices."""
    monkeypatch.chdir(tmp_path)

    def run(*options):
        monkeypatch.setattr(sys, "argv", arguments(data, *options))
        script.main()
    return run


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Two slices of two steps instead of sixteen of fifty."""
    real = script.Run.sample
    monkeypatch.setattr(script.Run, "sample", lambda run: real(
        run, 2, replace(script.QUALITY["default"], steps=2)))


def arguments(data, *options) -> list[str]:
    return [str(word) for word in ("train.py", "--data", data, "--run", "r", *SMALL, "--log-every",
                                   1, "--num-train-timesteps", 20, *options)]


# Several processes ------------------------------------------------------------------------------


def difference(a: dict, b: dict) -> float:
    """The largest between two state dicts. A key's bias is left out: the softmax takes it away
    again, so that its gradient is rounding noise, which AdamW brings to full length."""
    return max((a[name] - b[name]).abs().max().item() for name in a if "to_k.bias" not in name)


@pytest.mark.long
def test_two_processes_are_one_and_a_run_moves_between_them(data, tmp_path, command):
    """20 steps on two processes, to 24 on one, to 28 on two: as 28 on one, to 1e-6."""
    steady = ["--lr-schedule", "constant", "--save-every", 10, "--keep", 9, "--augment", 0.5,
              "--dropout", 0,  # the one thing that differs between processes
              "--block-out-channels", 64, 64]
    command(*steady, "--steps", 28, "--run", "one")
    together = [*TORCHRUN, *arguments(data, *steady)[1:]]
    for steps in (20, 24, 28):
        if steps == 24:
            command(*steady, "--steps", 24, "--accumulate", 2)
        else:
            result = subprocess.run([*together, "--steps", str(steps)], env=ONE_THREAD,
                                    cwd=tmp_path, capture_output=True, text=True, timeout=200)
            assert result.returncode == 0, result.stderr
            assert result.stdout.count(f"step {steps}/{steps} ") == 1 and "1 more" in result.stdout
    for name in ("checkpoint-00000020.pt", "checkpoint-00000028.pt"):
        ours, theirs = (read_checkpoint(tmp_path / run / name) for run in ("r", "one"))
        for part in ("net", "ema"):
            assert difference(ours[part], theirs[part]) < 1e-6
    rows = [list(csv.DictReader((tmp_path / run / "metrics.csv").open())) for run in ("r", "one")]
    assert [row["step"] for row in rows[0]] == [str(step) for step in range(1, 29)]
    for ours, theirs in zip(*rows):
        for key in ("loss", "validation_loss", "learning_rate", "gradient_norm"):
            if theirs[key]:
                assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=2e-5)
    assert len(list((tmp_path / "r" / "samples").glob("*.png"))) == 4


def wait_for(process, text: str) -> list[str]:
    """The lines of a process up to the one with the text; it is killed after two minutes."""
    alarm = threading.Timer(120, process.kill)
    alarm.start()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            break
    alarm.cancel()
    return lines


@pytest.mark.long
def test_sigterm_to_torchrun_stops_all_processes_at_one_step(data, tmp_path):
    process = subprocess.Popen(
        [*TORCHRUN, *arguments(data, "--steps", 100000)[1:]], cwd=tmp_path,
        env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(process, "step 3/")
    process.send_signal(signal.SIGTERM)
    rest, errors = process.communicate(timeout=60)
    step = newest_checkpoint(tmp_path / "r")["step"]
    assert f"stopped by SIGTERM after step {step};" in rest, rest + errors
    assert "SIGKILL" not in errors and "RuntimeError" not in errors
    assert step > 3 and f"step {step}/" in rest and f"step {step + 1}/" not in rest


def test_the_run_is_gone_before_its_process_group(command, tmp_path, monkeypatch):
    """The other way round, one run of two processes in four hung at its end (torch 2.11)."""
    script.dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0,
                                   world_size=1)
    real, left = script.dist.destroy_process_group, []

    def destroy():
        left.extend(thing for thing in gc.get_objects() if type(thing) is script.Run)
        real()
    monkeypatch.setattr(script.dist, "destroy_process_group", destroy)
    command("--steps", 1)
    assert not script.dist.is_initialized() and not left


SRUN = """#!/bin/bash
# What srun does: a process per task, signals handed on to all, the largest exit code.
while [[ $1 == -* ]]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@" & pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
code=0
for pid in "${pids[@]}"; do
    while wait $pid; status=$?; [ $status -gt 128 ] && kill -0 $pid 2>/dev/null; do :; done
    [ $status -gt $code ] && code=$status
done
exit $code
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> requeued
"""


@pytest.mark.long
def test_the_batch_script(data, tmp_path):
    """USR1 to the batch shell alone, as --signal=B:USR1@120 sends it: saved and queued again;
    the job that finishes is not."""
    text = (ROOT / "docs" / "train.slurm").read_text()
    (tmp_path / "bin").mkdir()
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL),
                          ("python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')):
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    env = {**ONE_THREAD, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
           "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node"}

    def submit(steps: int) -> subprocess.Popen:
        job = text.replace("runs/oasis-128", "r").replace(
            "train.py --data ROOT --preset 128",
            f"{ROOT}/{' '.join(arguments(data, '--steps', steps))}")
        return subprocess.Popen(["bash", "-c", job], cwd=tmp_path, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    job = submit(100000)
    wait_for(job, "step 3/")
    job.send_signal(signal.SIGUSR1)
    rest, errors = job.communicate(timeout=60)
    step = newest_checkpoint(tmp_path / "r")["step"]
    assert job.returncode == 0 and f"stopped by SIGUSR1 after step {step};" in rest, rest + errors
    requeued = tmp_path / "requeued"
    assert requeued.read_text() == f"requeue {os.getpid()}\n"
    requeued.unlink()
    job = submit(step + 2)
    rest, errors = job.communicate(timeout=120)
    assert job.returncode == 0 and "done:" in rest, rest + errors
    assert f"step {step} of {step + 2}" in rest and not requeued.exists()


def test_what_several_processes_reject(make_run, rejected, data, monkeypatch):
    for module in (script, distributed):
        monkeypatch.setattr(module, "world_size", lambda: 3)
    with pytest.raises(UserError, match="--device cuda:1: for several processes"):
        distributed.local_device("cuda:1")
    args = script.parse_args(arguments(data)[1:])
    with pytest.raises(UserError, match="--accumulate 1 times 3 processes does not divide .* 4"):
        script.make_configs(args, (16, 16), torch.device("cpu"), 0)
    monkeypatch.undo()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    rejected("train.py", [], "WORLD_SIZE is 2", "RANK", "torchrun")
    monkeypatch.setenv("WORLD_SIZE", "")
    distributed.join_processes()  # alone
    assert distributed.world_size() == 1


@pytest.mark.long
def test_one_line_for_all_processes(data, tmp_path):
    """The data are read by one process, inside what all do together."""
    bad = next((data / "train").glob("*.png"))
    bad.write_bytes(bad.read_bytes()[:60])
    result = subprocess.run([*TORCHRUN, *arguments(data, "--steps", 2)[1:]], env=ONE_THREAD,
                            cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode != 0 and "SIGKILL" not in result.stderr
    assert len(re.findall("^error: ", result.stderr, re.M)) == 1, result.stderr
    assert f"{bad}: cannot be read" in result.stderr and "closed by peer" not in result.stderr


@pytest.mark.parametrize("name", ["cuda", "cpu:0", "mps:0"])
def test_a_device_that_is_no_numbered_gpu(monkeypatch, name):
    """torch.cuda.set_device takes no plain "cuda", which is what "auto" means on one GPU, and
    nothing but GPUs."""
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    assert distributed.local_device(name) == torch.device(name)


@pytest.mark.parametrize("device, compiler", [("cpu", "g[+][+]"), ("cuda", "gcc")])
def test_compile_says_what_is_missing(monkeypatch, device, compiler):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(script, "local_device", torch.device)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=f"--compile: no compiler .{compiler}. found"):
        script.prepare(script.parse_args(["--compile", "--device", device]))


# Kills and damage -------------------------------------------------------------------------------


def test_killed_at_every_step_of_a_save(make_run, monkeypatch):
    """kill -9 before each call that changes the disk: the old checkpoint or the new one is whole,
    and the one before is there too."""
    run = make_run()
    run.step = 1
    run.save()
    run.step = 2
    run.save()
    run.step, calls = 3, 0
    names = ("fsync", "unlink", "replace", "open")
    while True:
        child = os.fork()
        if child == 0:
            left = calls
            for name in names:
                def dying(*args, real=getattr(os, name), **more):
                    nonlocal left
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **more)
                setattr(os, name, dying)
            run.save()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        found = newest_checkpoint(run.folder)
        new = run.folder / "checkpoint-00000003.pt"
        assert found["step"] == (3 if new.exists() else 2)
        assert all(read_checkpoint(path) for path in run.folder.glob("*.pt"))
        assert len(list(run.folder.glob("*.pt"))) >= 2
        if not os.WIFSIGNALED(status):
            break
        calls += 1
    assert found["step"] == 3 and calls >= 6 and os.waitstatus_to_exitcode(status) == 0


@pytest.mark.long
def test_a_damaged_byte_is_found_or_harmless(make_run):
    run = make_run()
    train(run, log_every=4, save_every=8)
    good, content = run.checkpoint.read_bytes(), read_checkpoint(run.checkpoint)
    chance = random.Random(0)
    places = [chance.randrange(len(good)) for _ in range(100)] + list(range(-100, 0))
    found = 0
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << chance.randrange(8)
        run.checkpoint.write_bytes(bad)
        try:
            assert same(read_checkpoint(run.checkpoint), content)
        except UserError as error:
            assert f"{run.checkpoint}: is damaged" in str(error)
            found += 1
    for length in [0, 1, 72, 73, len(good) - 1, *(chance.randrange(len(good)) for _ in range(20))]:
        run.checkpoint.write_bytes(good[:length])
        with pytest.raises(UserError, match="is damaged"):
            read_checkpoint(run.checkpoint)
    assert found > 150  # the rest are gaps between the records, and what stands twice


def test_a_damaged_checkpoint_falls_back_to_the_one_before(make_run, capsys):
    whole, run = make_run("whole"), make_run()
    for each in (whole, run):
        train(each, log_every=2, save_every=4)
    bad = bytearray(run.checkpoint.read_bytes())
    bad[len(bad) // 2] ^= 1
    newest = run.checkpoint
    newest.write_bytes(bad)
    with (run.folder / "metrics.csv").open("a") as file:
        file.write("10,0.5")  # a row that was being written when the process was killed
    again = make_run()
    again.resume()
    warning = capsys.readouterr().err
    assert "checkpoint-00000008.pt is damaged" in warning and "step 4" in warning
    assert again.step == 4
    assert (run.folder / f"{newest.name}.damaged").read_bytes() == bad
    assert read_checkpoint(run.checkpoint)["step"] == 4
    train(again, log_every=2, save_every=4)
    ours, theirs = read_checkpoint(run.checkpoint), read_checkpoint(whole.checkpoint)
    assert all(same(ours[k], theirs[k]) for k in ("net", "ema", "optimizer", "step"))
    assert metrics(again) == metrics(whole)

    for path in run.folder.glob("*.pt"):
        path.write_bytes(b"nothing")
    for _ in range(2):  # and not from the start, at the second attempt
        with pytest.raises(UserError, match="checkpoint-00000008.pt: is damaged"):
            make_run().resume()


def test_a_disk_that_cannot_be_read_now_is_no_damage(make_run, monkeypatch):
    """As on a network's disk: the newest checkpoint is neither set aside nor passed over."""
    run = make_run()
    train(run, log_every=4, save_every=4)

    def stale(path):
        raise OSError(116, "Stale file handle")
    monkeypatch.setattr("pathlib.Path.read_bytes", stale)
    with pytest.raises(UserError, match="00000008.pt: cannot be read .Stale file handle."):
        make_run().resume()
    monkeypatch.undo()
    assert read_checkpoint(run.checkpoint)["step"] == 8
    assert not list(run.folder.glob("*.damaged"))


@pytest.mark.parametrize("link", [False, True], ids=["renamed", "second name"])
def test_a_run_of_an_older_version_continues(make_run, link):
    """Its newest checkpoint is checkpoint.pt, which may also have the name of its step."""
    run = make_run()
    for run.step in (2, 4):
        run.save()
    newest, former = run.checkpoint, run.folder / "checkpoint.pt"
    content = read_checkpoint(newest)
    content["scheduler"]["clip_sample"] = True  # as older versions sampled
    torch.save(content, newest)
    (os.link if link else os.replace)(newest, former)
    assert find_model(run.folder) == former
    again = make_run()
    again.resume()
    assert again.step == 4 and sorted(path.name for path in run.folder.glob("*.pt")) == [
        "checkpoint-00000002.pt", "checkpoint-00000004.pt"]


def test_how_many_checkpoints_stay(make_run):
    run = make_run()
    run.keep = 3
    run.folder.mkdir()
    (run.folder / "checkpoint-best.pt").write_text("the user's own copy")
    train(run, log_every=8, save_every=1)
    assert sorted(path.name for path in run.folder.glob("*.pt")) == [
        "checkpoint-00000005.pt", "checkpoint-00000006.pt", "checkpoint-00000007.pt",
        "checkpoint-00000008.pt", "checkpoint-best.pt"]
    assert read_checkpoint(run.folder / "checkpoint-00000006.pt")["step"] == 6


class Mischief:
    """A pickle that would create a file when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_files_that_are_no_checkpoints(tmp_path):
    for content in [b"", *(bytes([first]) + b"ext of some kind" for first in range(256))]:
        (tmp_path / "text.pt").write_bytes(content)  # a pickle may start with nearly any letter
        with pytest.raises(UserError, match="text.pt: is (damaged|a checkpoint of something)"):
            read_checkpoint(tmp_path / "text.pt")
    torch.save({"state_dict": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt: is a checkpoint of something else"):
        read_checkpoint(tmp_path / "other.pt")
    torch.save(Mischief(tmp_path / "touched"), tmp_path / "hostile.pt")
    with pytest.raises(UserError, match="hostile.pt: is damaged, or no checkpoint"):
        read_checkpoint(tmp_path / "hostile.pt")
    assert not (tmp_path / "touched").exists()


def test_a_checkpoint_that_lies_is_refused(make_run, tmp_path):
    run = make_run()
    train(run, log_every=4, save_every=8)
    content = read_checkpoint(run.checkpoint)
    content["train"]["data"] = str(tmp_path / "elsewhere")  # a path in a file is never written to
    for part, name in (("net", "conv_in.bias"), ("ema", "conv_out.bias")):
        lie = {**content, part: {**content[part], name: torch.zeros(2)}}
        torch.save(lie, run.checkpoint)
        with pytest.raises(RuntimeError, match="size mismatch"):
            make_run().resume()
    for part in ("step", "seconds", "ema_updates", "loss_sum", "loss_count"):
        for value in ("text", [1]):
            torch.save({**content, part: value}, run.checkpoint)
            with pytest.raises((ValueError, TypeError)):  # which `prepare` puts into one line
                make_run().resume()
    torch.save(content, run.checkpoint)
    make_run().resume()
    assert not (tmp_path / "elsewhere").exists()


# Disks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["full disk", "no folder to write to", "vanished folder"])
def test_a_save_that_fails_is_tried_again(make_run, capsys, trouble):
    whole, run = make_run("whole"), make_run()
    train(whole, log_every=1, save_every=2)
    real, limit = run.train_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def hindered():
        if run.step == 3 and trouble == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
        if run.step == 3 and trouble != "full disk":
            shutil.rmtree(run.folder)
            if trouble == "no folder to write to":
                run.folder.write_text("a file in its place")
        if run.step == 5:
            assert trouble != "full disk" or read_checkpoint(run.checkpoint)["step"] == 2
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            if run.folder.is_file():
                run.folder.unlink()
        return real()
    run.train_step = hindered
    try:
        assert train(run, log_every=1, save_every=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    warnings = capsys.readouterr().err.splitlines()
    assert bool(warnings) == (trouble != "vanished folder")
    assert all(line.startswith("warning: ") and "cannot be written" in line for line in warnings)
    assert same(read_checkpoint(run.checkpoint)["net"], read_checkpoint(whole.checkpoint)["net"])
    rows = metrics(whole)  # those before the fourth are lost with the folder
    assert metrics(run) == (rows if trouble == "full disk" else rows[3:])
    assert not list(run.folder.glob(".*.tmp")) and run.saved_step == 8


def test_a_last_save_that_fails_is_exit_code_2(data, tmp_path, rejected, monkeypatch, capsys):
    options = arguments(data, "--steps", 4, "--save-every", 2)[1:]
    real = script.Run.save

    def full(self):
        if self.step == 4:
            raise UserError(f"{self.checkpoint}: cannot be written (No space left on device)")
        real(self)
    monkeypatch.setattr(script.Run, "save", full)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    with pytest.raises(UserError, match="last save failed.* of step 2, and this was 4"):
        script.main()
    assert "warning: r/checkpoint-00000002.pt: cannot be written" in capsys.readouterr().err
    monkeypatch.setattr(script.Run, "save", real)
    script.main()  # not finished, though the results were written
    assert "step 2 of 4" in capsys.readouterr().out
    assert newest_checkpoint(tmp_path / "r")["step"] == 4


# Numbers that go bad ----------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "gradient", "loss, then SIGTERM"])
def test_bad_numbers_stop_the_run_and_are_never_saved(make_run, what):
    """They are noticed at the next log line, or when the run is stopped before it."""
    run = make_run(batch_size=12, steps=20)
    real, weights = run.loss, {}

    def poisoned(step, *share):
        loss = real(step, *share)
        if step == 4:
            weights.update({k: v.clone() for k, v in run.net.state_dict().items()})
            if "SIGTERM" in what:
                signal.raise_signal(signal.SIGTERM)
            if "loss" in what:
                return loss * float("nan")
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss
    run.loss = poisoned
    with pytest.raises(UserError) as stopped:
        train(run, log_every=4, save_every=4)
    text = str(stopped.value)
    names = [run.data["train"].names[i] for i in batch_indices(32, 12, 0, 4)]
    assert text.startswith("step 5: loss nan" if "loss" in what else "step 5: loss 0.")
    assert f"12 slices: {', '.join(names[:10])}, ...;" in text and names[10] not in text
    assert "gradient norm" in text and "checkpoint is of step 4" in text
    assert read_checkpoint(run.checkpoint)["step"] == 4
    assert same(read_checkpoint(run.checkpoint)["net"], weights)


def test_float16_skips_overflows_and_continues_exactly(make_run):
    how = dict(dtype="float16", lr_schedule="constant", batch_size=2, augment=0.0)
    whole, parts = make_run("whole", steps=8, **how), make_run("parts", steps=4, **how)
    for run in (whole, parts):
        torch.nn.init.constant_(run.net.conv_out.weight, 0.1)  # zeros pass no gradient on
        run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 2.0**19})
    before = {k: v.clone() for k, v in whole.net.state_dict().items()}
    whole.train_step()
    assert same(before, whole.net.state_dict()) and whole.scaler.get_scale() == 2.0**18
    train(whole, log_every=8, save_every=8)
    assert whole.scaler.get_scale() < 2.0**18 and not same(before, whole.net.state_dict())
    train(parts, log_every=4, save_every=4)
    again = make_run("parts", steps=8, **how)
    again.resume()
    train(again, log_every=4, save_every=4)
    ours, theirs = read_checkpoint(again.checkpoint), read_checkpoint(whole.checkpoint)
    assert all(same(ours[k], theirs[k]) for k in ("net", "ema", "optimizer", "scaler"))


def test_float16_stops_if_no_scale_helps(make_run):
    run = make_run(dtype="float16", steps=40, batch_size=1)
    real = run.loss

    def broken(step, *share):
        loss = real(step, *share)
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss
    run.loss = broken
    with pytest.raises(UserError, match="step 20: gradients overflow .* checkpoint is of step 0"):
        train(run, log_every=20, save_every=20)
    assert not list(run.folder.glob("*.pt"))


# Stopping, watching -----------------------------------------------------------------------------


def test_max_hours_saves_and_the_same_command_continues(command, tmp_path, capsys):
    for step in (1, 2):
        command("--steps", 5, "--max-hours", 1e-6 if step == 1 else 1e-5)
        assert f"stopped by --max-hours after step {step};" in capsys.readouterr().out
        assert newest_checkpoint(tmp_path / "r")["step"] == step


def test_a_signal_before_the_first_step(command, tmp_path, monkeypatch, capsys):
    real = script.Stop.agreed

    def at_once(stop, room):
        signal.raise_signal(signal.SIGTERM)
        return real(stop, room)
    monkeypatch.setattr(script.Stop, "agreed", at_once)
    command("--steps", 5)
    assert "stopped by SIGTERM after step 0;" in capsys.readouterr().out


def test_a_second_ctrl_c_stops_at_once(make_run):
    run = make_run()
    real = run.train_step

    def twice():
        if run.step == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return real()
    run.train_step = twice
    with pytest.raises(KeyboardInterrupt):
        train(run, log_every=1, save_every=1)
    assert read_checkpoint(run.checkpoint)["step"] == 2


def test_micro_batches_may_change_when_continuing(make_run):
    """A smaller GPU takes the same run in more pieces."""
    still = replace(TINY, dropout=0.0, block_out_channels=(64, 64))
    whole, parts = (make_run(name, still, learning_rate=1e-4) for name in ("whole", "parts"))
    train(whole, log_every=1, save_every=8)
    parts.config = replace(parts.config, accumulate=2)
    for _ in range(4):
        parts.train_step()
    parts.save()
    again = make_run("parts", still, learning_rate=1e-4, accumulate=4)
    again.resume()
    train(again, log_every=1, save_every=8)
    assert difference(again.net.state_dict(), whole.net.state_dict()) < 1e-6


def test_tensorboard(command, tmp_path, rejected, data, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    rejected("train.py", arguments(data, "--tensorboard")[1:], "--tensorboard", "pip install")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    command("--steps", 3, "--tensorboard")
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    events.Reload()
    rows = list(csv.DictReader((tmp_path / "r" / "metrics.csv").open()))
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (int(row["step"]), pytest.approx(float(row["loss"]))) for row in rows]


@pytest.mark.long
def test_soak(tmp_path):
    """Three kills; README has the command for fifty."""
    result = subprocess.run([sys.executable, ROOT / "tests" / "soak.py", "--kills", "3"],
                            env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("yes") == 4 and "| files lost or unreadable | 0 |" in result.stdout
