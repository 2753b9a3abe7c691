"""The step's prediction: counted work against counts by hand, and the page against the script."""

import functools

import predict
import pytest
import torch
from predict import Work

import maskdiff_kernels as mk
from maskdiff import flops, presets
from maskdiff.bench import Bench

META = torch.device("meta")


@pytest.fixture(scope="module")
def celeba():
    return Bench(presets.get("celeba64"), 256, META, torch.bfloat16)


@pytest.fixture(scope="module")
def recorded(celeba):
    """A step's work at a mask, recorded once."""
    return functools.cache(lambda mask: predict.recorded(celeba, mask))


@pytest.fixture(scope="module")
def dense(recorded):
    return recorded("dense")


def of(work, *names):
    return [item for item in work if item.name in names]


def test_the_page_holds_what_the_script_prints():
    """`python benchmarks/predict.py --write` where the step changed."""
    assert predict.on_page(predict.PAGE.read_text()) == predict.text().strip()


def test_products_are_those_that_are_counted(celeba, dense):
    """All but the gradient of the noisy patches, which nobody needs."""
    config = celeba.model_config
    parts = flops.forward_parts(config, 256)
    expected = 256 * (3 * (sum(parts.values()) - parts["attention"]) - parts["embed"])
    assert sum(item.flops for item in dense if item.kind == "products") == expected
    assert {item.kind for item in dense} == set(predict.KINDS)


@pytest.mark.parametrize(
    ("mask", "length", "rows", "loads"), [("dense", 257, 272, True), ("patch:0.5", 129, 144, False)]
)
def test_attention_is_its_entry_on_the_page(recorded, mask, length, rows, loads):
    work = recorded(mask)
    (forward, backward) = (of(work, name)[0] for name in ("attention", "attention_backward"))
    assert len(of(work, "attention")) == len(of(work, "attention_backward")) == 13
    pairs = 256 * 8
    assert forward.bytes == 516 * length * pairs and backward.bytes == 1028 * length * pairs
    assert forward.flops == 4 * rows**2 * 64 * pairs and backward.flops == 14 * rows**2 * 64 * pairs
    assert forward.loads == loads * 384 * length * pairs and backward.loads == loads * 512 * length * pairs


def test_long_sequences_have_tiles_of_64():
    qkv = torch.empty(2, 411, 3, 12, 64, device=META)
    assert predict.attention_flops(qkv, 4) == 4 * 448**2 * 64 * 24


@pytest.mark.parametrize(
    ("mask", "noisy", "loss"), [("dense", 12.5e6, 14.1e6), ("patch:0.5", 7.4e6, 7.6e6), ("patch:0.9", 1.8e6, 2.4e6)]
)
def test_instructions_are_those_of_the_entries(recorded, mask, noisy, loss):
    work = recorded(mask)
    for name, expected in (("noisy_patches", noisy), ("denoising_loss", loss)):
        assert of(work, name)[0].instructions == pytest.approx(expected, abs=0.06e6)
    visible = {"dense": 256, "patch:0.5": 128, "patch:0.9": 26}[mask] * 256 * 48
    small = of(work, "noisy_patches")[0].bytes - 3 * visible
    assert 0 < small < 4 * 256 * 256 + 20000  # ids and tables


def test_the_optimizer_is_its_entry(celeba, dense):
    (work,) = of(dense, "adamw_ema")
    size, low = celeba.state.master.numel(), celeba.state.low.numel()
    gradients = sum(p.numel() * p.element_size() for p in celeba.state.params)
    assert work.bytes == 32 * size + 2 * low + 2 * gradients
    assert 1e3 * work.seconds(3.0e12) == pytest.approx(0.67, abs=0.005)


def test_averages_cross_memory_where_they_change():
    """In the mean over updates."""
    flats, counts = [torch.empty(1000, device=META) for _ in range(5)], [torch.empty((), device=META) for _ in range(2)]
    low, grad = (torch.empty(1000, dtype=torch.bfloat16, device=META) for _ in range(2))
    layout = {"offsets": [0], "sizes": [1000], "decays": [True]}
    for ema2, averages in ((None, 1), (flats[4], 2)):
        state = mk.AdamState(*flats[:4], *counts, **layout, low=low, ema2=ema2)
        with predict.Recorder() as recorder:
            mk.adamw_ema(state, [grad], torch.empty(2, device=META), (0.9, 0.99), 1e-8, 0.0, 0.9, ema_every=10)
        (work,) = of(recorder.work, "adamw_ema")
        assert work.bytes == 8 * (3000 + 100 * averages) + low.nbytes + 2 * grad.nbytes


def test_views_and_allocations_launch_nothing():
    x = torch.empty(8, 4, device=META)
    with predict.Recorder() as recorder:
        y = x.t()[1:].view(3, 2, 4).detach()
        torch.empty(3, device=META)
        x.add_(1)
        y + 1
        x.expand(5, 8, 4).clone()
    names = [(item.name, sum(item.reads.values()), sum(item.writes.values())) for item in recorder.work]
    assert names == [("add_", 128, 128), ("add", 96, 96), ("clone", 128, 5 * 128)]


def test_fusing_drops_what_stays_inside():
    def elementwise(name, reads, writes):
        return Work(name, "elementwise", 1, dict.fromkeys(reads, 10), dict.fromkeys(writes, 10))

    product, last = (Work("mm", "products", 1, {read: 10}, {write: 10}) for read, write in ((3, 4), (7, 8)))
    found = predict.fused(
        [elementwise("add", (1,), (2,)), elementwise("mul", (1, 2), (3,)), product, elementwise("sum", (4,), (5,)),
         elementwise("cat", (4, 5), (6,)), elementwise("gelu", (6, 3), (7,)), last]
    )  # fmt: skip
    assert [item.name for item in found] == ["fused", "mm", "sum", "fused", "mm"]
    first, _, _, second, _ = found
    assert first.reads == {1: 10} and first.writes == {3: 10} and first.launches == 1
    assert set(second.reads) == {3, 4, 5} and second.writes == {7: 10}


def test_times_follow_from_the_stated_rates():
    def seconds(kind, **more):
        return Work("x", kind, more.pop("launches", 1), {1: 1_000_000_000}, {2: 500_000_000}, **more).seconds(3e12)

    assert seconds("elementwise", launches=3) == pytest.approx(1.5e9 / (0.85 * 3e12) + 6e-6)
    assert seconds("products", flops=1e12) == pytest.approx(1e12 / (0.75 * 790e12) + 2e-6)
    assert seconds("products", flops=1e9) == pytest.approx(1.5e9 / (0.85 * 3e12) + 2e-6)
    assert seconds("attention", flops=1e12) == pytest.approx(1e12 / 250e12 + 3e-6)
    assert seconds("attention", flops=1e12, loads=10**9) == pytest.approx(1e12 / 250e12 + 1e9 / 3e12 + 3e-6)
    assert seconds("loss") == pytest.approx(1.5e9 / (0.65 * 3e12) + 3e-6)
    assert seconds("gather and noise", instructions=12.5e6) == pytest.approx(26.2e-6, abs=1e-7)
