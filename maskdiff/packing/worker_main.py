"""What a worker process runs: it reads jobs from its standard input and writes results to its standard output."""

import os
import pickle
import sys
import traceback


def serve() -> None:
    """Answers jobs (function, argument) with (True, result) or (False, traceback) until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up among the answers
    while True:
        try:
            function, job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = (True, function(job))
        except Exception:
            answer = (False, traceback.format_exc())
        pickle.dump(answer, answers, protocol=5)
        answers.flush()
