"""The console script: `maskdiff train ...` is `python -m maskdiff.train ...`."""

import difflib
import runpy
import sys

COMMANDS = {
    "train": "train a model: masked pre-training, then fine-tuning on whole images",
    "watch": "show in a terminal how a run is going",
    "sample": "draw images with a trained model",
    "evaluate": "judge a run's samples, or any images, against real images",
    "pack": "pack pictures of any kind for training, check and show packed sets",
    "sweep": "train at several mask rates in equal time, and report what masking buys",
    "transfer": "train with and without pre-training on other images in equal time, and report what it buys",
    "bench": "measure a training step at several mask rates against plain PyTorch",
    "doctor": "show what is installed here and which kernels run",
}


def main() -> None:
    """Runs the command that the first word names; the rest of the command line is the command's own."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: maskdiff COMMAND ...    (maskdiff COMMAND --help says more)\n")
        print("\n".join(f"  {name:8} {what}" for name, what in COMMANDS.items()))
        return
    name = sys.argv[1]
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(COMMANDS)}"
        print(f"error: no command {name!r}: {hint}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"maskdiff {name}", *sys.argv[2:]]
    runpy.run_module(f"maskdiff.{name}", run_name="__main__")


if __name__ == "__main__":
    main()
