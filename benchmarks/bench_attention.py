"""attention, forward and backward on packed qkv: GFLOP/s, beside PyTorch's SDPA and explicit products. See conftest.py.

64 (sequence, head) pairs of width 64; 14 L^2 d FLOPs a pair: the products of a forward and of a five-product backward.
`ragged` gives the same tokens in sequences of 1/4 to 7/4 of the length. The peers get the same packed tensor, PyTorch's
own autograd, and the same malloc settings. `beside_peers` runs all three in turns: its last column is the time of the
faster peer over ours, the median over rounds, with the 20 % and 80 % quantiles.
"""

import statistics
import time

import pytest
import torch
import torch.nn.functional as F

import maskdiff_kernels as mk
from maskdiff.precision import keep_freed_memory

PAIRS, HEADS, WIDTH = 64, 8, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LENGTHS = (27, 33, 65, 129, 257, 512)
PEERS = ("sdpa", "explicit")
CASES = [f"{length}-{dtype}-{how}" for length in LENGTHS for dtype in DTYPES for how in ("cpp", *PEERS)]
CASES += [f"{length}-{dtype}-ragged-cpp" for length in LENGTHS for dtype in DTYPES]
ROUNDS, ROUND = 15, 0.02  # rounds in turns; seconds of each


def sdpa(qkv):
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def explicit(qkv):
    batch, length, _, heads, width = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, batch * heads, length, width).unbind(0)
    scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=width**-0.5)
    out = torch.bmm(torch.softmax(scores, -1), v)
    return out.view(batch, heads, length, width).transpose(1, 2).reshape(batch, length, heads * width)


def build(case: str):
    keep_freed_memory()
    length, name, *mix, how = case.split("-")
    batch, tokens = PAIRS // HEADS, int(length)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, tokens, 3, HEADS, WIDTH, generator=generator).to(DTYPES[name])
    grad = torch.randn(batch, tokens, HEADS * WIDTH, generator=generator).to(DTYPES[name])
    lengths, packing = [tokens] * batch, {}
    if mix:
        lengths = [tokens * share // 4 for share in (1, 2, 3, 4, 4, 5, 6)]
        lengths.append(batch * tokens - sum(lengths))
        qkv, grad = qkv.flatten(0, 1), grad.flatten(0, 1)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        packing = {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths)}
    qkv.requires_grad_()

    def ours(x):
        return mk.attention(x, **packing, backend=how)

    attend = {"sdpa": sdpa, "explicit": explicit}.get(how, ours)
    work = sum(14 * n * n * WIDTH for n in lengths) * HEADS / 1e9
    return lambda: torch.autograd.grad(attend(qkv), qkv, grad), work, "GFLOP"


@pytest.mark.benchmark(max_time=0.5, min_rounds=5)
@pytest.mark.parametrize("case", CASES)
def test_attention(measure, case):
    measure(build, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_beside_peers(benchmark, table, length, dtype):
    runs = {how: build(f"{length}-{dtype}-{how}")[0] for how in ("cpp", *PEERS)}
    repeats = {}
    for how, run in runs.items():
        run()
        repeats[how] = max(1, round(ROUND / seconds(run, 1)))
    rounds = [{how: seconds(run, repeats[how]) for how, run in runs.items()} for _ in range(ROUNDS)]
    medians = {how: statistics.median(times[how] for times in rounds) for how in runs}
    best = min(PEERS, key=lambda how: medians[how])
    ratios = sorted(times[best] / times["cpp"] for times in rounds)
    low, middle, high = (ratios[int(share * (ROUNDS - 1))] for share in (0.2, 0.5, 0.8))
    benchmark.extra_info["medians"] = medians
    benchmark.extra_info["faster_than_best_peer"] = {"peer": best, "p20": low, "p50": middle, "p80": high}
    benchmark.pedantic(runs["cpp"], rounds=1)
    shown = ", ".join(f"{how} {median * 1e3:.2f}" for how, median in medians.items())
    ratio = f"{middle:.2f}x as fast as {best} ({low:.2f} to {high:.2f})"
    table.rows.append((f"attention beside_peers {length}-{dtype}", f"ms: {shown}", ratio))


def seconds(run, repeats: int) -> float:
    """The time of one run, on average."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats
