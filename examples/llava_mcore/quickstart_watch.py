"""Run a training command, show its progress, keep its whole output in a file, and kill it on request.

    python quickstart_watch.py LOG [--kill-at ITERATION] -- sh run_mcore_llava.sh ...

With --kill-at, one worker process gets SIGKILL at that iteration, as if the machine had taken it: the command is then
expected to fail.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

ITERATION = re.compile(r"iteration +(\d+)/ *(\d+) \| lm loss: (\S+) .*time left: (\S+)")
SAVED = re.compile(r"saved .*iter_0*(\d+)")
RESUMED = re.compile(r"resumed from .* at iteration (\d+)")
BAR_WIDTH = 30


class Progress:
    """A bar that moves on a terminal; a line every tenth of the way where the output is not one."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()
        self.tenth = -1
        self.is_drawn = False

    def show(self, done: int, total: int, loss: str, left: str) -> None:
        """Draw the state after `done` of `total` iterations."""
        filled = BAR_WIDTH * done // total
        bar = "#" * filled + "." * (BAR_WIDTH - filled)
        line = f"  [{bar}] {done}/{total} iterations, lm loss {loss}, time left {left}"
        if self.is_terminal:
            print(f"\r{line}\033[K", end="", flush=True)
            self.is_drawn = True
        elif 10 * done // total != self.tenth:
            print(line, flush=True)
        self.tenth = 10 * done // total

    def say(self, text: str) -> None:
        """Write a line that stays, in the bar's place; the bar is drawn below it next time."""
        self.is_drawn = False
        print(f"\r\033[K  {text}" if self.is_terminal else f"  {text}", flush=True)

    def end(self) -> None:
        """Leave the bar as it stands."""
        if self.is_drawn:
            print(flush=True)
            self.is_drawn = False


def watch(command: list[str], log: Path, kill_at: int | None) -> int:
    """Run `command`; returns its exit code, or 0 when it ended because a worker was killed as asked."""
    progress, killed, saved = Progress(), False, 0
    # A file, not a pipe: a process that outlives the command would keep a pipe open, and the reader waiting.
    with log.open("w") as output, log.open(errors="replace") as lines:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        for line in follow(lines, process):
            if match := ITERATION.search(line):
                done, total = int(match[1]), int(match[2])
                progress.show(done, total, match[3], match[4])
                if kill_at and saved and done >= kill_at and not killed:
                    killed = True
                    worker = kill_worker(process.pid)
                    progress.end()
                    progress.say(f"SIGKILL to worker {worker} after iteration {done}; last checkpoint: {saved}")
            elif match := SAVED.search(line):
                saved = int(match[1])
                progress.say(f"saved a checkpoint at iteration {saved}")
            elif match := RESUMED.search(line):
                progress.say(f"resumed at iteration {match[1]}")
    progress.end()
    if killed and process.returncode:
        return 0
    if kill_at and not killed:
        print(f"error: no worker was killed: iteration {kill_at} never came after a checkpoint", file=sys.stderr)
        return process.returncode or 1
    return 1 if killed else process.returncode


def follow(lines: TextIO, process: subprocess.Popen) -> Iterator[str]:
    """The lines of a file that `process` writes, as they come, until it has ended."""
    part = ""
    while True:
        has_ended = process.poll() is not None
        part += lines.readline()
        if part.endswith("\n"):
            yield part
            part = ""
        elif has_ended:
            return
        else:
            time.sleep(0.1)


def kill_worker(launcher: int) -> int:
    """SIGKILL for the last of the processes that `launcher` started; returns its id."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in table.splitlines()]
    workers = [int(row[0]) for row in rows if int(row[1]) == launcher and "pretrain_llava.py" in row[-1]]
    if not workers:
        raise RuntimeError(f"process {launcher} has no worker to kill")
    os.kill(max(workers), signal.SIGKILL)
    return max(workers)


def main() -> int:
    """Exit code of the command, 0 when it was killed as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="file for the command's output")
    parser.add_argument("--kill-at", type=int, help="iteration after which a worker is killed")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    start = time.monotonic()
    code = watch(args.command, args.log, args.kill_at)
    if code:
        print(
            f"error: exit code {code} after {time.monotonic() - start:.0f} s; the end of {args.log}:", file=sys.stderr
        )
        print("".join(args.log.read_text(errors="replace").splitlines(keepends=True)[-20:]), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
