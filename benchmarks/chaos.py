"""Kill rank 0, rank 1 or the launcher of a run many times (SIGKILL); compare it with an uninterrupted run (Linux).

    python benchmarks/chaos.py              # 50 kills, about 20 minutes
    python benchmarks/chaos.py --kills 5    # about 3 minutes
    python benchmarks/chaos.py --sharded    # under FSDP2, where both ranks write checkpoints

Two processes train. Most kills are aimed at a step, an evaluation, the writing of a checkpoint, or the rotation after
it; every fourth kill comes at a random moment. After each kill, once all processes are gone, every checkpoint is
verified and the run resumes with --checkpoint.resume auto, every second time from a copy of the run folder in which
links have become folders (cp -rL, as scp and object stores copy). At the end, weights, optimizer state and losses must
equal those of an uninterrupted run, bit for bit. The table counts the phase in which a process died, which its
heartbeat tells. The exit code is 1 if a check fails.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `utils` is not installed
from benchmarks.common import count, dataset_folder
from training.monitoring.watchdog import HEARTBEATS
from utils.checkpoints import find_checkpoint, find_problem, list_checkpoints

ROOT = Path(__file__).resolve().parent.parent
# At most this many steps per launch before its kill, so that the run cannot end before all kills are made: up to DELAY
# before the aim, one period of the targeted phase, and two more steps of the ranks after the launcher's death.
STEPS_PER_KILL, DELAY = 12, 4
OPTIONS = {
    # Dropout, accumulation and evaluations between checkpoints are what a resumed run could get wrong. A checkpoint has
    # 27 MB, so that writing and rotating it take long enough to be hit.
    "model.architecture": "gpt2", "model.dropout": 0.1, "data.sequence_length": 32, "batch.global_batch_size": 8,
    "batch.per_device_batch_size": 2, "checkpoint.every_steps": 5, "checkpoint.keep_last": 2, "evaluation.every_steps": 4,
    "tracking.log_every_steps": 1, "tracking.sample_every_steps": 0, "tracking.trackers": "[]",
    "checkpoint.resume": "auto",
}  # fmt: skip
VICTIMS = ("rank 0", "rank 1", "launcher")
# Phase → longest wait in seconds from its start to the kill. A short phase would end during a longer wait.
PHASES = {"step": 0.1, "evaluation": 0.3, "save": 0.1, "rotation": 0.002}
RANDOM_EVERY, RANDOM_SECONDS = 4, 1.0
# Heartbeat → phase. Writing or rotating a checkpoint takes precedence over what training does meanwhile.
WRITING = {"writing": "save", "rotating": "rotation"}
TRAINING = {"fetching": "step", "training": "step", "evaluating": "evaluation", "saving": "save"}
START_SECONDS, END_SECONDS = 300, 120  # a launch that takes longer to its first step, or to end, hangs


class Launch:
    """One launch: its launcher, its ranks, and the log file of their output."""

    def __init__(self, command: list[str], run: Path, log: Path) -> None:
        self.run, self.log = run, log
        shutil.rmtree(run / HEARTBEATS, ignore_errors=True)  # so that heartbeats of an earlier launch are not read
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
        kept |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("wb") as file:
            self.launcher = psutil.Popen(command, cwd=ROOT, env=kept, stdout=file, stderr=file, start_new_session=True)
        self.ranks: dict[int, psutil.Process] = {}

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *_: object) -> None:
        """Kill what is left, also when this script fails or is interrupted."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.ranks |= {child.pid: child for child in self.launcher.children()}
        for process in (self.launcher, *self.ranks.values()):
            if is_alive(process):
                process.kill()

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def fail(self, reason: str) -> None:
        sys.exit(f"chaos.py: {reason}; the end of {self.log}:\n{self.output()[-6000:]}")

    def position(self, rank: int = 0) -> tuple[int, str] | None:
        """Step and phase of a rank, from its heartbeat; rank 0 writes checkpoints. None: it has made no step."""
        try:
            training = (self.run / HEARTBEATS / f"rank-{rank}").read_text().split()
            writing = (self.run / HEARTBEATS / "rank-0").read_text().split()[-1]
        except (OSError, IndexError):
            return None
        if len(training) < 5 or training[2] not in TRAINING:
            return None
        return int(training[1]), WRITING.get(writing) or TRAINING[training[2]]

    def wait_for_training(self) -> int:
        """The first step of this launch. Finds the ranks as children of the launcher; they have their own sessions."""
        deadline = time.monotonic() + START_SECONDS
        while (position := self.position()) is None or self.position(1) is None:
            self.check(deadline)
            time.sleep(0.01)
        self.ranks = {int(child.environ()["RANK"]): child for child in self.launcher.children()}
        return position[0]

    def check(self, deadline: float) -> None:
        if self.launcher.poll() is not None:
            self.fail(f"a launch that was not killed ended with {self.launcher.returncode}")
        if time.monotonic() > deadline:
            self.fail("a launch makes no progress")

    def wait_until_gone(self) -> None:
        deadline = time.monotonic() + END_SECONDS
        while any(is_alive(process) for process in (self.launcher, *self.ranks.values())):
            if time.monotonic() > deadline:
                self.fail(f"processes are still alive {END_SECONDS} s after a kill")
            time.sleep(0.02)

    def check_survivors(self, victim: str) -> None:
        """Ranks that survive the launcher must save and say so; the launcher may silently end a surviving rank."""
        printed = self.output()
        if victim == "launcher" and "stopped (launcher_gone)" not in printed:
            self.fail("the launcher was killed, and the ranks did not exit cleanly")
        for line in printed.splitlines():
            if 'train.py", line' in line or ("train.py: error:" in line and "another rank has ended" not in line):
                self.fail(f"{victim} was killed, and another process ended with an error of its own: {line.strip()}")


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; an orphan may stay a zombie if process 1 does not collect it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_once(launch: Launch, target: str | None, victim: str, chance: random.Random) -> tuple[int, str]:
    """Kill `victim` in the phase `target` (None: at any moment); returns the step and phase in which it died."""
    first = launch.wait_for_training()
    begin = first if target is None else first + chance.randint(0, DELAY)
    deadline = time.monotonic() + START_SECONDS
    wait_until = time.monotonic() + chance.uniform(0, RANDOM_SECONDS)
    while (step := launch.position()[0]) < first + STEPS_PER_KILL - 3:  # kill here at the latest, if the aim is missed
        if target is None and time.monotonic() > wait_until:
            break
        if step >= begin and launch.position()[1] == target:
            time.sleep(chance.uniform(0, PHASES[target]))
            break
        launch.check(deadline)
        time.sleep(0.0002)
    process = launch.launcher if victim == "launcher" else launch.ranks[int(victim[-1])]
    process.kill()
    # Rank 0's last heartbeat tells where it died. If it outlives the victim, it goes on, so read its heartbeat at once.
    while victim == "rank 0" and is_alive(process):
        pass
    found = launch.position(1 if victim == "rank 1" else 0)
    launch.wait_until_gone()
    launch.check_survivors(victim)
    return found


def train_to_the_end(command: list[str], run: Path, log: Path) -> str:
    """Run without a kill; returns the output."""
    with Launch(command, run, log) as launch:
        if launch.launcher.wait():
            launch.fail(f"a launch that was not killed ended with {launch.launcher.returncode}")
        return launch.output()


def train_with_kills(command: list[str], run: Path, kills: int, seed: int) -> tuple[Counter[tuple[str, str]], int, int]:
    """Returns how often each victim died in each phase, the number of resumes, and that of invalid checkpoints."""
    chance = random.Random(seed)
    hits: Counter[tuple[str, str]] = Counter()
    resumes = invalid = 0
    newest: Path | None = None
    for number in range(1, kills + 2):
        log = run.with_name(f"launch-{number:03d}.log")
        if number > kills:
            printed = train_to_the_end(command, run, log)
        else:
            # Aim at what was hit least so far.
            target, victim = min(
                ((phase, victim) for phase in PHASES for victim in VICTIMS),
                key=lambda pair: (sum(hits[pair[0], victim] for victim in VICTIMS), hits[pair], chance.random()),
            )
            if number % RANDOM_EVERY == 0:
                target, victim = None, chance.choice(VICTIMS)
            with Launch(command, run, log) as launch:
                step, phase = kill_once(launch, target, victim, chance)
                printed = launch.output()
            hits[phase, victim] += 1
            if number % 2 == 0:
                copy_over(run)
        if newest is not None:
            resumes += 1
            if f"resumed from {newest} " not in printed:
                sys.exit(f"chaos.py: a launch did not resume from {newest}:\n{printed[-6000:]}")
        problems = {path: find_problem(path) for path in list_checkpoints(run / "checkpoints")}
        invalid += sum(problem is not None for problem in problems.values())
        newest = max((path for path, problem in problems.items() if problem is None), default=None)
        if number <= kills:
            print(f"{number:4}  {victim:8} in {phase:10}, step {step:4}; aimed at {target or 'any moment'}; newest: "
                  f"{newest and newest.name}", *filter(None, problems.values()), flush=True)  # fmt: skip
    return hits, resumes, invalid


def copy_over(run: Path) -> None:
    """Put a copy of the run folder, with folders for links, in its place."""
    copy = run.with_name("copy")
    subprocess.run(["cp", "-rL", run, copy], check=True)
    shutil.rmtree(run)
    copy.rename(run)


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two files hold the same tensors, bit for bit; their order may differ."""
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


def losses(run: Path) -> list[tuple[int, str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(record["step"], name, record[name]) for record in records for name in ("train/loss", "eval/loss")
            if name in record]  # fmt: skip


def main(options: argparse.Namespace, folder: Path) -> int:
    started = time.monotonic()
    dataset, steps = options.dataset and options.dataset.resolve(), STEPS_PER_KILL * (options.kills + 1)
    folder.mkdir(parents=True, exist_ok=True)
    if dataset is None:
        dataset = folder / "dataset"
        # A small validation split, so that an evaluation takes as long as a few steps.
        prepare = ["prepare_data.py", "--output", str(dataset), "--validation_fraction", "0.005"]
        subprocess.run([sys.executable, *prepare], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    file, script = ROOT / "accelerate_configs" / "cpu_2_processes.yaml", "train.py"
    if options.sharded:  # on CPUs, where accelerate does not allow FSDP
        file, script = folder / "fsdp2.yaml", "tests/unlocked_train.py"
        values = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text())
        file.write_text(yaml.safe_dump(values | {"use_cpu": True, "mixed_precision": "no", "dynamo_config": {}}))

    def command(output: Path) -> list[str]:
        settings = OPTIONS | {"schedule.max_steps": steps, "data.dataset": dataset, "output": output}
        return [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file),
            "--main_process_port", "0",  # any free port, because other launches may be running
            script, *(text for name, value in settings.items() for text in (f"--{name}", str(value))),
        ]  # fmt: skip

    whole, broken = folder / "whole", folder / "broken"
    train_to_the_end(command(whole), whole, folder / "whole.log")
    print(f"uninterrupted: {steps} steps, {time.monotonic() - started:.0f} s", flush=True)
    hits, resumes, invalid = train_with_kills(command(broken), broken, options.kills, options.seed)
    losses_equal = losses(broken) == losses(whole)
    last, expected = find_checkpoint(broken, "last"), find_checkpoint(whole, "last")
    names = sorted(path.relative_to(expected) for path in expected.rglob("*.safetensors"))
    bit_equal = all(same_tensors(last / name, expected / name) for name in names)

    print(f"\n{'died in':12}" + "".join(f"{victim:>10}" for victim in VICTIMS))
    for phase in PHASES:
        print(f"{phase:12}" + "".join(f"{hits[phase, victim]:10}" for victim in VICTIMS))
    # A few kills must hit every phase, and many must hit every victim in every phase; up to four need not hit anything.
    missed = [phase for phase in PHASES if options.kills > len(PHASES) and not any(hits[phase, one] for one in VICTIMS)]
    if options.kills >= 3 * len(PHASES) * len(VICTIMS):
        missed = [f"{phase} ({victim})" for phase in PHASES for victim in VICTIMS if not hits[phase, victim]]
    if missed:
        print(f"never hit: {', '.join(missed)}")
    print(json.dumps({
        "kills": hits.total(), "resumes": resumes, "invalid_checkpoints": invalid, "bit_equal": bit_equal,
        "losses_equal": losses_equal, "hits": {phase: {victim: hits[phase, victim] for victim in VICTIMS} for phase in PHASES},
        "steps": steps, "seconds": round(time.monotonic() - started, 1),
    }))  # fmt: skip
    return int(bool(missed) or invalid > 0 or not bit_equal or not losses_equal)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=count, default=50, help="number of launches to kill")
    parser.add_argument("--sharded", action="store_true", help="shard the parameters over the two processes (FSDP2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the targets and times of the kills")
    parser.add_argument(
        "--dataset", type=dataset_folder, help="folder written by prepare_data.py (default: made from the sample)"
    )
    parser.add_argument("--folder", type=Path, help="new folder to keep runs and logs in (default: deleted at the end)")
    arguments = parser.parse_args()
    if arguments.folder and arguments.folder.exists() and not arguments.folder.is_dir():
        parser.error(f"--folder {arguments.folder} is a file")
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(arguments, (arguments.folder or Path(temporary)).resolve()))
