"""What a run leaves behind while it trains: metrics.jsonl, and the line on the terminal."""

import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, cat, stack
from tqdm import tqdm


class MetricsFile:
    """metrics.jsonl: one JSON object a step, in order, each step once.

    On resume it is cut back to the checkpoint's step, and so is a line that a kill left half written.
    """

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if len(kept) != len(lines):
            partial = path.with_suffix(".partial")
            partial.write_text("".join(kept))
            partial.replace(path)
        self._file = path.open("a", buffering=1)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


class DeviceScalars:
    """Collects figures where they were computed and reads them back many steps at once, so that no step waits."""

    def __init__(self, window: int) -> None:
        self.window = window
        self._rows: list[Tensor] = []

    def add(self, *figures: Tensor) -> None:
        """Scalars, or vectors that become as many figures of the step's list."""
        self._rows.append(cat([figure.float().flatten() for figure in figures]))

    def full(self) -> bool:
        return len(self._rows) >= self.window

    def read(self) -> list[list[float]]:
        """Waits for the device and returns what was added since the last call, a list per step."""
        rows = stack(self._rows).tolist() if self._rows else []
        self._rows = []
        return rows


class Progress:
    """A bar on a terminal; a line now and then where the output is a file."""

    def __init__(self, total: int, done: int, text: str) -> None:
        live = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=text,
            unit="step",
            dynamic_ncols=live,
            mininterval=0.2 if live else 15.0,
            maxinterval=1.0 if live else 30.0,
            bar_format=None if live else "{desc}: {n_fmt}/{total_fmt} steps, {elapsed}<{remaining}{postfix}\n",
        )

    def update(self, steps: int, loss: float, images_per_s: float, speed: str) -> None:
        self._bar.set_postfix_str(f"loss {loss:.4f}, {images_per_s:.0f} images/s{speed}", refresh=False)
        self._bar.update(steps)

    def close(self) -> None:
        self._bar.close()

    @staticmethod
    def say(text: str) -> None:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
