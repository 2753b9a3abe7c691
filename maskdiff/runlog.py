"""What a run tells while it trains: metrics.jsonl, the loggers of --log, and the line on the terminal."""

import fcntl
import json
import sys
import time
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from torch import Tensor, cat, stack
from tqdm import tqdm

from .config import Config, config_to_dict
from .errors import UserError
from .loggers import Logger, figures, open_loggers

if TYPE_CHECKING:
    from PIL.Image import Image


METRICS = "metrics.jsonl"


class MetricsFile:
    """metrics.jsonl: one JSON object a step, in order, each step once.

    On resume it is cut back to the checkpoint's step, and so is a line that a kill left half written. It is locked as
    long as it is open: a run has one process that trains it. Raises UserError where there is another.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._file = path.open("a", buffering=1)
        _lock(self._file, path.parent)
        lines = path.read_text().splitlines(keepends=True)
        rows = [(len(line), json.loads(line)["step"]) for line in lines if line.endswith("\n")]
        self.written: int = rows[-1][1] if rows else 0  # the last step that the file had when it was opened
        self._file.truncate(sum(length for length, _ in takewhile(lambda row: row[1] <= step, rows)))

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


def _lock(file: TextIO, run: Path) -> None:
    for wait in (0.05, 0.1, 0.2, 0.0):  # maskdiff.watch holds it for a moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(wait)
        except OSError:  # a file system without locks
            return
    file.close()
    raise UserError(f"{run} is being trained by another process; stop that one first, or start a new run with --out")


def is_training(run: Path) -> bool:
    """Whether a process trains this run now (on a file system without locks: no)."""
    with suppress(FileNotFoundError), (run / METRICS).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
    return False


class Logs:
    """All that a run writes about itself: metrics.jsonl has every step, the loggers of `--log` every so many."""

    def __init__(self, config: Config, run: Path, step: int) -> None:
        self._every = config.log_every
        self._metrics = MetricsFile(run / METRICS, step)
        self._pictured = -1
        try:
            written = max(step, self._metrics.written)
            self._loggers: list[Logger] = open_loggers(config.log, run, config_to_dict(config), step, written)
        except BaseException:
            self._metrics.close()
            raise

    def write(self, row: dict[str, Any], mask: str, batch: int) -> None:
        """A step: its line, the mask of its stage, images a step."""
        self._metrics.write(row)
        if row["step"] % self._every == 0 or "heldout_loss" in row:
            for logger in self._loggers:
                logger.figures(row["step"], figures(row, mask, batch))

    def picture(self, step: int, picture: "Image") -> None:
        """A grid of samples."""
        if step != self._pictured:
            for logger in self._loggers:
                logger.picture(step, picture)
        self._pictured = step

    def close(self) -> None:
        self._metrics.close()
        for logger in self._loggers:
            logger.close()


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

    def update(self, steps: int, loss: float, images_per_s: float) -> None:
        self._bar.set_postfix_str(f"loss {loss:.4f}, {images_per_s:.0f} images/s", refresh=False)
        self._bar.update(steps)

    def close(self) -> None:
        self._bar.close()

    @staticmethod
    def say(text: str) -> None:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
