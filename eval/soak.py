"""A long run of the quick start with random faults beside one without, each in a process of its own: the
resources that they use (memory, processes, files, threads), and their held-out results.

unshare --user --map-root-user --mount python eval/soak.py --steps 1000 --out runs/soak

Without `unshare` (or a root user) there is no small disk to fill, and that fault is left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import random
import subprocess
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

REWARD = '''
import os
import random
import time

from vlm_sapo.rewards.verifiers.table import auto

def faulty(response, example, *, rate, log):
    """The verdict of `auto`, but sometimes too late, and sometimes the process ends."""
    dice = random.SystemRandom().random()
    if dice < 2 * rate:
        with open(log, "a") as file:
            file.write("slow reward\\n" if dice < rate else "dying worker\\n")
        time.sleep(60) if dice < rate else os._exit(1)
    return auto(response, example)
'''
ROWS = '''
from data.shapes import rows as shape_rows

def rows(split, size, bad):
    """The quick start's rows, of which every `bad`th is broken."""
    rows = shape_rows(split=split, size=size)
    broken = {"images": [b"no image"]}
    return [row | broken if number % bad == bad - 1 else row for number, row in enumerate(rows)]
'''


class FullDisk(threading.Thread):
    """Fills the disk of a folder at random times, for `lasting` seconds."""

    def __init__(self, folder: Path, *, every: float, lasting: float):
        super().__init__(daemon=True)
        self.ballast, self.every, self.lasting = folder / "ballast", every, lasting
        self.done, self.count = threading.Event(), 0

    def run(self) -> None:
        dice = random.Random(0)
        while not self.done.wait(dice.uniform(0.5, 1.5) * self.every):
            with suppress(OSError), self.ballast.open("wb", buffering=0) as file:
                while file.write(bytes(2**16)):
                    pass
            self.count += 1
            self.done.wait(self.lasting)
            self.ballast.unlink()


def own_disk(folder: Path, size: str) -> bool:
    """Mounts a small disk at a folder, visible to this process only; returns whether that is allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class ResourceMonitor(threading.Thread):
    """Records the resources of this process and its children."""

    def __init__(self, metrics: Path, every: float):
        super().__init__(daemon=True)
        self.metrics, self.every, self.done = metrics, every, threading.Event()
        self.samples: list[dict[str, int]] = []

    def run(self) -> None:
        while not self.done.wait(self.every):
            self.samples.append(self.measure())

    def measure(self) -> dict[str, int]:
        steps = self.metrics.read_text().count("\n") if self.metrics.is_file() else 0
        return {
            "steps": steps,
            "resident MB": resident(os.getpid()),
            "children's MB": sum(map(resident, children(os.getpid()))),
            "children": len(children(os.getpid())),
            "threads": len(os.listdir("/proc/self/task")),
            "files": len(os.listdir("/proc/self/fd")),
            "semaphores": len([name for name in os.listdir("/dev/shm") if name.startswith("sem.")]),
        }


def resident(pid: int) -> int:
    """Megabytes of a process in memory."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) // 1024


def children(pid: int) -> list[int]:
    """All processes below one."""
    try:
        own = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return []
    return [child for number in map(int, own) for child in (number, *children(number))]


def soak(folder: Path, steps: int, *, rate: float, overrides: list[str]) -> dict:
    """The summary of a run with `seen`, its resources over time, and `struck`, the number of faults by kind.
    A rate of 0 is a run without faults."""
    from vlm_sapo.config.load import load
    from vlm_sapo.config.schema import TrainConfig
    from vlm_sapo.training.checkpoint import FREE_DISK
    from vlm_sapo.training.trainer import train

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reward.py").write_text(REWARD)
    (folder / "rows.py").write_text(ROWS)
    bad = 37 if rate else 10**9
    config = load(
        TrainConfig,
        "quickstart",
        [
            f"run.dir={folder}/run",
            f"train.steps={steps}",
            "train.lr=1e-5",
            f"eval.every={steps // 4}",
            f"checkpoint.every={max(1, steps // 40)}",
            f"data.source={folder}/rows.py:rows",
            f"data.args={{split: train, size: 4096, bad: {bad}}}",
            "data.on_error=skip",
            "reward.timeout=2",
            f"reward.parts=[{{name: {folder}/reward.py:faulty, label: accuracy, "
            f"args: {{rate: {rate}, log: {folder}/faults.log}}}}]",
            *overrides,
        ],
    )
    disk = FullDisk(folder / "run", every=20.0, lasting=3.0)
    (folder / "run").mkdir(exist_ok=True)
    can_fill = rate > 0 and own_disk(folder / "run", "60m")
    monitor = ResourceMonitor(folder / "run/metrics.jsonl", every=2.0)
    monitor.start()
    if can_fill:
        disk.start()
    restarts = 0
    try:
        while True:
            try:
                summary = train(config)
                break
            except ValueError as error:  # a full disk at the very end: a user would start it again
                if FREE_DISK not in str(error):
                    raise
                restarts += 1
                time.sleep(disk.lasting)
    finally:
        disk.done.set(), monitor.done.set()
        if can_fill:
            disk.join()
    monitor.join()
    gc.collect()
    time.sleep(2)
    monitor.samples.append(monitor.measure())
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1)), "a step is missing or twice"
    faults = Counter({"full disk": disk.count, "bad row": summary.get("rows_skipped", 0)})
    faults |= {"started again": restarts, "slow reward": 0, "dying worker": 0}
    faults.update((folder / "faults.log").read_text().splitlines() if rate else ())
    return summary | {"seen": monitor.samples, "struck": faults}


def run(folder: Path, steps: int, rate: float, overrides: list[str]) -> None:
    """Runs in a process of its own, so that the resources are this run's."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    result = soak(folder, steps, rate=rate, overrides=overrides)
    folder.with_suffix(".json").write_text(json.dumps(result, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=1e-3, help="Share of slow and of deadly responses.")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("overrides", nargs="*", help="Fields of the config, as for vlm-sapo train.")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rates = {args.out.resolve() / "without_faults": 0.0, args.out.resolve() / "with_faults": args.rate}
    processes = [
        context.Process(target=run, args=(folder, args.steps, rate, args.overrides))
        for folder, rate in rates.items()
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a run failed; see above")
    for folder in rates:
        show(folder.name, json.loads(folder.with_suffix(".json").read_text()))


def show(name: str, result: dict) -> None:
    """A table of ten rows, and the change from the second tenth to the last."""
    samples = [row for row in result["seen"] if row["steps"]]
    print(
        f"\n{name}: {result['seconds']} s, held-out "
        f"{result['eval_before/held-out']['pass@1']:.3f} before and "
        f"{result['eval_after/held-out']['pass@1']:.3f} after; {result['struck']}"
    )
    print("| " + " | ".join(samples[0]) + " |\n" + "|---" * len(samples[0]) + "|")
    for index in range(10):
        print("| " + " | ".join(map(str, samples[index * (len(samples) - 1) // 9].values())) + " |")
    tenth = max(1, len(samples) // 10)
    first, last = (
        sum(row["resident MB"] + row["children's MB"] for row in rows) / len(rows)
        for rows in (samples[tenth : 2 * tenth], samples[-tenth - 1 : -1])
    )
    print(f"memory: {first:.0f} MB in the second tenth, {last:.0f} MB in the last: {last / first - 1:+.1%}")


if __name__ == "__main__":
    main()
