"""`python -m maskdiff.train ...`: trains a model, or goes on with a run. --help says how."""

import signal
import sys
from typing import TYPE_CHECKING

from .errors import run_command

if TYPE_CHECKING:
    from .config import Config


def main() -> None:
    """Parses the command line, trains, prints where the run lies. Exit status 128 + signal where one stopped it."""
    from .options import parse

    command = parse(sys.argv[1:])
    if command.text is not None:
        print(command.text.rstrip())
        return
    from . import training

    run = training.run(command.config, resume=command.resume)
    if run.was_over:
        print(
            f"{run.path} is finished already, at step {run.step}: nothing left to do; "
            f"it goes on with {more(command.config, run.step)}"
        )
        return
    if run.stopped_by is not None:
        name = signal.Signals(run.stopped_by).name
        print(f"stopped by {name} at step {run.step}; go on with: python -m maskdiff.train --resume {run.path}")
        sys.exit(128 + run.stopped_by)
    print(f"trained {run.step} steps into {run.path}; draw images with: python -m maskdiff.sample {run.path}")


def more(config: "Config", step: int) -> str:
    """What makes a run that was over at this step go on."""
    if config.max_steps is not None and step >= config.max_steps:
        return "a larger --max-steps (or none)"
    last = len(config.stages) - 1
    length = "steps" if config.stages[last].steps is not None else "minutes"
    return f"a longer last stage (--stages.{last}.{length}) or further ones (--stages 'S, S, ...')"


if __name__ == "__main__":
    run_command(main)
