"""`python -m maskdiff.train ...`: trains a model, or goes on with a run. --help says how."""

import signal
import sys

from .errors import run_command


def main() -> None:
    """Parses the command line, trains, prints where the run lies. Exit status 128 + signal where one stopped it."""
    from .options import parse

    command = parse(sys.argv[1:])
    if command.text is not None:
        print(command.text.rstrip())
        return
    from . import training

    run = training.run(command.config, resume=command.resume)
    if run.stopped_by is not None:
        name = signal.Signals(run.stopped_by).name
        print(f"stopped by {name} at step {run.step}; go on with: python -m maskdiff.train --resume {run.path}")
        sys.exit(128 + run.stopped_by)
    print(f"trained {run.step} steps into {run.path}; draw images with: python -m maskdiff.sample {run.path}")


if __name__ == "__main__":
    run_command(main)
