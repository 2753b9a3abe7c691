"""attention, forward and backward on packed qkv: GFLOP/s, beside PyTorch's SDPA and explicit products. See conftest.py.

64 (sequence, head) pairs of width 64; 14 L^2 d FLOPs a pair: the products of a forward and of a five-product backward.
`ragged` is lengths of 1/4 to 7/4 of L. The peers (attention_peers.py) get the same packed tensor, PyTorch's own
autograd, and the same malloc settings; `sdpa` and `explicit` are the op's backends, which run their forward again.
"""

from collections.abc import Callable

import pytest
from attention_peers import DTYPES, Problem, compiled, ours, peers

from maskdiff.precision import keep_freed_memory

PAIRS, HEADS, WIDTH = 64, 8, 64
LENGTHS = (27, 33, 65, 129, 257, 417, 512)
OURS = ("cpp", "sdpa", "explicit")
CASES = [f"{length}-{dtype}" for length in LENGTHS for dtype in ("fp32", "bf16")]
CASES += [f"{length}-{dtype}-ragged" for length in LENGTHS[:4] for dtype in ("fp32", "bf16")]


def problem(case: str) -> Problem:
    length, dtype, *mix = case.split("-")
    batch, mean = PAIRS // HEADS, int(length)
    lengths = [mean] * batch
    if mix:
        lengths = [mean * share // 4 for share in (1, 2, 3, 4, 4, 5, 6)]
        lengths.append(batch * mean - sum(lengths))
    return Problem(tuple(lengths), HEADS, WIDTH, DTYPES[dtype], ragged=bool(mix))


def contenders(given: Problem) -> dict[str, Callable]:
    return peers(given.device, given.ragged) | {"torch_compiled": compiled}


def build(case: str):
    keep_freed_memory()
    case, how = case.rsplit("-", 1)
    given = problem(case)
    run = given.run(ours(given, how) if how in OURS else contenders(given)[how](given))
    return run, given.flops(), "flops"


@pytest.mark.parametrize("case", CASES)
def test_attention(in_turns, case):
    given = problem(case)
    judge = given.judge()
    in_turns(build, case, (*OURS, *contenders(given)), given.fixed(), lambda name, result: judge(result))
