"""Where figures of a run go beside metrics.jsonl: TensorBoard, Weights & Biases. `--log` names them."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import UserError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image


class Logger(Protocol):
    """Shows a run as it goes. Steps only rise; a resumed run tells again what came after its checkpoint."""

    def figures(self, step: int, figures: dict[str, float]) -> None: ...

    def picture(self, step: int, picture: "Image") -> None: ...

    def close(self) -> None: ...


def figures(row: dict[str, Any], mask: str, batch: int) -> dict[str, float]:
    """The figures of a line of metrics.jsonl, by the names that loggers show; each stage's loss is a curve of its own.

    Args:
        row: the line.
        mask: the stage's, as "patch:0.75".
        batch: images a step.
    """
    stage = re.sub(r"[^\w.-]", "_", f"{row['stage'] + 1}_{mask}")
    found = {
        f"loss/{stage}": row["loss"],
        "train/grad_norm": row["grad_norm"],
        "train/lr": row["lr"],
        "train/images_seen": row["images_seen"],
        "train/skipped_steps": row["skipped_steps"],
        "speed/images_per_s": batch / (row["step_ms"] / 1e3),
    }
    found |= {name: row[key] for key, name in _SOMETIMES.items() if key in row}
    return found | {f"loss_by_rate/{rate}": loss for rate, loss in row.get("loss_by_rate", {}).items()}


_SOMETIMES = {"heldout_loss": "loss/heldout", "retained": "speed/retained"}


class TensorBoard:
    """Event files in RUN/tensorboard. What a broken run wrote after its checkpoint is purged when it goes on."""

    def __init__(self, path: Path, config: dict[str, Any], step: int, written: int) -> None:
        self.check()
        from torch.utils.tensorboard import SummaryWriter

        folder = path / "tensorboard"
        self._writer: Any = SummaryWriter(folder, purge_step=step + 1 if folder.exists() else None, flush_secs=10)

    @staticmethod
    def check() -> None:
        """Raises UserError where a package is missing."""
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise _missing("tensorboard", "tensorboard", error) from None

    def figures(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, picture: "Image") -> None:
        import numpy as np

        pixels = np.asarray(picture)
        self._writer.add_image("samples", pixels, step, dataformats="HWC" if pixels.ndim == 3 else "HW")

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases. RUN/wandb.id names it, and so a resumed run goes on with it.

    What it was told is not taken back: a resumed run tells only what comes after. WANDB_MODE=offline, WANDB_PROJECT and
    the package's other variables work as usual.
    """

    def __init__(self, path: Path, config: dict[str, Any], step: int, written: int) -> None:
        self.check()
        import wandb

        name = path / "wandb.id"
        known = name.read_text().strip() if name.exists() else ""
        self._image, self._written = wandb.Image, written if known else 0
        try:
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "maskdiff"),
                name=path.name,
                id=known or None,
                resume="allow" if known else None,
                dir=str(path),
                config=config,
            )
        except wandb.Error as error:
            raise UserError(f"--log wandb: {first_line(error)}; or set WANDB_MODE=offline") from None
        name.write_text(self._run.id + "\n")

    @staticmethod
    def check() -> None:
        """Raises UserError where the package is missing."""
        try:
            import wandb

            wandb.init  # noqa: B018 - a folder called wandb imports too, and is empty
        except (ImportError, AttributeError) as error:
            raise _missing("wandb", "wandb", error) from None

    def figures(self, step: int, figures: dict[str, float]) -> None:
        if step > self._written:
            self._run.log(figures, step=step)

    def picture(self, step: int, picture: "Image") -> None:
        if step >= self._written:
            self._run.log({"samples": self._image(picture)}, step=step)

    def close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


def check(names: Sequence[str]) -> None:
    """Raises UserError, with what to install, where the package of one of these loggers is missing."""
    for name in names:
        LOGGERS[name].check()


def open_loggers(
    names: Sequence[str],
    path: Path,  # the run's folder
    config: dict[str, Any],
    step: int,  # steps made, those of the checkpoint that a run goes on from
    written: int,  # the last step that loggers may have been told of before, at least `step` then
) -> list[Logger]:
    """Opens the loggers of a run, for what comes after `step`. Raises UserError where one cannot be."""
    return [LOGGERS[name](path, config, step, written) for name in names]


def _missing(logger: str, package: str, error: Exception) -> UserError:
    return UserError(
        f"--log {logger} needs the package {package} ({first_line(error)}); run: pip install {package} "
        f"(or 'maskdiff[{logger}]')"
    )
