"""`python -m maskdiff.watch RUN`: shows in a terminal how a run is going, until it ends or Ctrl-C."""

import io
import json
import math
import os
import shutil
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .config import read_values
from .errors import Parser, UserError, run_command
from .runlog import METRICS, is_training

RECENT = 100  # steps over which the loss is smoothed
KEYS = frozenset("step stage loss images_seen step_ms train_s lr grad_norm skipped".split())  # of every line
BARS = "▁▂▃▄▅▆▇█"


def main() -> None:
    parser = Parser("maskdiff watch", description="shows how a run is going, until it ends or Ctrl-C")
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--once", action="store_true", help="show it once and exit")
    options = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no bars
    try:
        watch(Watched(Path(options.run)), options.once)
    except KeyboardInterrupt:
        pass


def watch(run: "Watched", once: bool) -> None:
    """Prints the run; unless `once`, again and again over what stood there, until it ends."""
    live = sys.stdout.isatty() and not once
    shown, above = [""], 0
    while True:
        run.read()
        lines, ended = run.lines(), run.ended
        if live and not ended:  # a line that wraps would not be found again
            columns = shutil.get_terminal_size().columns
            lines = [line[: columns - 1] for line in lines]
        if lines != shown:
            print((f"\x1b[{above}A\x1b[J" if above else "") + "\n".join(lines), flush=True)
            shown, above = lines, len(lines) if live else 0
        if once or ended:
            return
        time.sleep(1 if live else 30)


class Watched:
    """What the folder of a run tells of it. Raises UserError where it is no run."""

    def __init__(self, path: Path) -> None:
        if not (path / "config.json").is_file():
            why = "it has no config.json" if path.is_dir() else "there is no such folder"
            raise UserError(f"{path} is no run, {why}; give the folder that --out named")
        self.path = path
        config = read_values(path / "config.json")
        self.stages: list[dict[str, Any]] = config.get("stages") or []
        self.max_steps: int | None = config.get("max_steps")
        if not all(isinstance(stage, dict) and "mask" in stage for stage in self.stages):
            raise UserError(f"{path} is no run: its config.json has no stages")
        self.running = False
        self._forget()

    def _forget(self) -> None:
        self._read, self._rest = 0, b""
        self.row: dict[str, Any] = {}  # the newest
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)  # of its stage
        self.losses: dict[int, list[float]] = defaultdict(list)  # of each stage
        self.heldout: list[tuple[int, float]] = []
        self.skipped = 0

    def read(self) -> None:
        """Takes in what was written since the last call."""
        self.running = is_training(self.path)
        self.lengths: list[int | None] = [stage.get("steps") for stage in self.stages]
        try:
            plans = json.loads((self.path / "plans.json").read_text())
        except FileNotFoundError:
            plans = {}
        for number, plan in plans.items():
            self.lengths[int(number)] = plan["steps"]
        try:
            for row in self._new_rows():
                if row["step"] <= self.row.get("step", 0):
                    raise _Changed
                self._add(row)
        except _Changed:  # a resumed run has cut the file back: from its start again
            self._forget()
            for row in self._new_rows():
                self._add(row)

    def _new_rows(self) -> Iterator[dict[str, Any]]:
        """What a run is just writing, or a kill left half written, is no row yet."""
        file = self.path / METRICS
        if not file.exists():
            return
        with file.open("rb") as stream:
            if stream.seek(0, os.SEEK_END) < self._read:
                raise _Changed
            stream.seek(self._read)
            new = stream.read()
        self._read += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            row = _row(line)
            if row is None and self._read > len(new):
                raise _Changed
            if row is None:
                raise UserError(f"{file} is damaged: {line[:40].decode(errors='replace')!r} is no line of it")
            yield row

    def _add(self, row: dict[str, Any]) -> None:
        if self.row and row["stage"] != self.row["stage"]:
            self.recent.clear()
        self.row = row
        self.recent.append(row)
        self.losses[row["stage"]].append(row["loss"])
        self.skipped += row["skipped"]
        if "heldout_loss" in row:
            self.heldout.append((row["step"], row["heldout_loss"]))

    @property
    def step(self) -> int:
        return self.row.get("step", 0)

    @property
    def steps(self) -> int | None:
        """Of the whole run; None while the length of a stage is not known in steps."""
        known = [length for length in self.lengths if length is not None]
        whole = sum(known) if len(known) == len(self.lengths) else None
        if self.max_steps is None or self.step > self.max_steps:  # a resumed run may have another
            return whole
        return self.max_steps if whole is None else min(whole, self.max_steps)

    @property
    def ended(self) -> bool:
        """Trained to the end, or stopped on the way."""
        return self.step > 0 and not self.running

    # ---- what is shown

    def lines(self) -> list[str]:
        """What is shown of it."""
        if not self.row:
            state = "preparing its first step" if self.running else "has not made a step yet"
            return [f"{self.path}   {state}", *(f"  to do  {self._stage(i)}" for i in range(len(self.stages)))]
        row, recent, number = self.row, self.recent, self.row["stage"]
        losses, speed, step_ms = self.losses[number], images_per_s(recent), mean([row["step_ms"] for row in recent])
        lines = {
            "stage": f"{self._stage(number)}, {number + 1} of {len(self.stages)}",
            "progress": _progress(len(losses), self.lengths[number]),
            "loss": f"{mean([row['loss'] for row in recent]):.4f}  {sparkline(losses)}  mean of {_last(len(recent))}",
        }
        if rates := row.get("loss_by_rate"):
            lines["by rate"] = "  ".join(
                f"{rate} {mean([r['loss_by_rate'][rate] for r in recent]):.4f}" for rate in rates
            )
        if self.heldout:
            at, loss = self.heldout[-1]
            lines["held out"] = f"{loss:.4f}  {sparkline([loss for _, loss in self.heldout])}  at step {at}"
        lines["lr"] = f"{row['lr']:.3g}   gradient norm {row['grad_norm']:.3g}"
        lines["speed"] = f"{step_ms:.3g} ms a step" + (f", {speed:.0f} images/s" if speed else "")
        if "retained" in row:
            retained = mean([row["retained"] for row in recent if "retained" in row])
            lines["speed"] += f", {retained:.0%} of the ideal speed-up over the dense steps timed before the stage"
        lines["skipped"] = f"{self.skipped} steps"
        if self.running:
            lines["time left"] = self._time_left(number, len(losses), step_ms)
        return [f"{self.path}   {self._state()}", *(f"  {name:9}  {text}" for name, text in lines.items())]

    def _state(self) -> str:
        of = "" if self.steps is None else f" of {self.steps}"
        if self.running:
            return f"running, step {self.step}{of}"
        if self.steps is not None and self.step >= self.steps:
            return f"finished, {self.step} steps"
        return f"stopped at step {self.step}{of}; go on with: python -m maskdiff.train --resume {self.path}"

    def _stage(self, number: int) -> str:
        length, minutes = self.lengths[number], self.stages[number].get("minutes")
        return f"{self.stages[number]['mask']}, " + (f"{minutes:g} min" if length is None else f"{length} steps")

    def _time_left(self, number: int, done: int, step_ms: float) -> str:
        length = self.lengths[number]
        if length is None:
            return "not known yet"
        left = length - done
        if self.max_steps is not None and self.max_steps > self.step:
            left = min(left, self.max_steps - self.step)
        after = [self._stage(later) for later in range(number + 1, len(self.stages))]
        return duration(left * step_ms / 1e3) + (f" of this stage; then {'; '.join(after)}" if after else "")


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and row.keys() >= KEYS else None


def _last(steps: int) -> str:
    return f"the last {steps} steps" if steps > 1 else "one step"


class _Changed(Exception):
    """metrics.jsonl is not a longer form of what was read of it."""


def mean(values: Sequence[float]) -> float:
    """The mean of the finite ones; NaN where there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def images_per_s(rows: Sequence[dict[str, Any]]) -> float | None:
    """Over the time from the first of these steps to the last; None for a single one."""
    seconds = rows[-1]["train_s"] - rows[0]["train_s"]
    return (rows[-1]["images_seen"] - rows[0]["images_seen"]) / seconds if seconds > 0 else None


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Means of equal parts as bars, from the lowest to the highest; a blank where no value is finite."""
    parts = min(width, len(values))
    means = [mean(values[part * len(values) // parts : (part + 1) * len(values) // parts]) for part in range(parts)]
    finite = [value for value in means if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] if math.isfinite(value) else " " for value in means)


def duration(seconds: float) -> str:
    """As "1 h 5 min", "2 min 10 s", "7 s"."""
    whole = round(max(0.0, seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _progress(done: int, length: int | None, width: int = 40) -> str:
    if not length:
        return f"step {done}"
    full = min(width, done * width // length)
    return f"{'█' * full}{'·' * (width - full)}  step {done} of {length}, {done / length:.0%}"


if __name__ == "__main__":
    run_command(main)
