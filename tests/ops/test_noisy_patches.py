"""noisy_patches: known answers, fp64 truth, independence of the noise, layouts of the store, errors."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from placing import here

import maskdiff_kernels as mk
from maskdiff_kernels import dispatch, library
from maskdiff_kernels.ops import visible as on_gpus
from maskdiff_kernels.ops.noisy_patches import reference
from maskdiff_kernels.ops.samples import Samples, flatten

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NO_PICTURE = torch.tensor([[0.0, 1.0]])  # alpha 0, sigma 1: the output is the noise

# grid, patch, channels: one element to a patch, sizes that 4 does not divide, patches larger than a window of the C++
SHAPES = [
    ((4, 6), 1, 1),
    ((4, 6), 2, 3),
    ((5, 3), 3, 3),
    ((4, 6), 4, 3),
    ((3, 3), 8, 3),
    ((2, 2), 16, 3),
    ((2, 1), 32, 4),
]
LENGTHS = [1, 2, 15, 16, 17, 25, 33, 49, 63, 64, 65, 66, 77, 100, 127, 128, 129, 130, 144, 196, 255, 256, 257, 258, 417]


def truth(store, batch, alpha_sigma, seed):
    return reference.run(Samples(*flatten(store, batch, alpha_sigma, seed)), torch.float64, torch.float64)


def noise(batch, store, seed, **options):
    still = dataclasses.replace(batch, timestep=torch.zeros_like(batch.timestep))
    return mk.noisy_patches(store, still, NO_PICTURE.to(seed.device), seed, **options)


# ---- values ----


def test_known_noise(implementation, seed, make_store, make_batch):
    """Of sample 2^32 + 5, patches 0 and 5 of 27 elements; computed from design.md 4 with 100-bit arithmetic."""
    store = make_store((2, 3), patch=3)
    batch = make_batch(store, 6, batch=1, first=2**32 + 5)
    z = noise(batch, store, seed, backend=implementation)[0][[0, 5]][:, [0, 1, 2, 3, 4, 25, 26]]
    expected = [
        [-0.4457037637374131, -0.872822971867471, 1.006251327044793, 2.6970155857397713, 1.254066929768942]
        + [1.0761196558544002, 1.6006488744774272],
        [-0.02491174556740039, -0.7538896077340134, -0.7246000441014903, 0.4795850752268278, -0.2864048229500016]
        + [-0.9837024655463035, 1.4422468858352187],
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    assert ((z.double() - expected).abs() <= 4 * 2**-23 * expected.abs().clamp(min=1)).all()


def test_known_picture(implementation, seed):
    """A picture of 1 x 2 patches of 2 x 2 pixels whose bytes count up, whole and mirrored."""
    store = mk.Store(torch.arange(8, dtype=torch.uint8).view(1, 2, 4) * 36, (1, 2), 2)
    batch = mk.Batch(
        n=torch.arange(2),
        image_ids=torch.zeros(2, dtype=torch.int64),
        keep_ids=torch.tensor([[0, 1], [0, 1]], dtype=torch.int32),
        cu_patches=None,
        flip=torch.tensor([False, True]),
        timestep=torch.zeros(2, dtype=torch.int64),
        drop_label=torch.zeros(2, dtype=torch.bool),
    )
    got = mk.noisy_patches(store, batch, None, seed, backend=implementation)
    bytes_seen = ((got + 1) * 255 / 2 / 36).round().int()
    assert bytes_seen.tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7]], [[5, 4, 7, 6], [1, 0, 3, 2]]]
    assert got.min() == -1 and abs(float(got.max()) - (252 * 2 / 255 - 1)) < 3e-7


@pytest.mark.parametrize(("grid", "patch", "channels"), SHAPES)
@pytest.mark.usefixtures("poisoned")
def test_against_float64(implementation, seed, make_store, make_batch, alpha_sigma, grid, patch, channels):
    store = make_store(grid, patch, channels)
    patches = grid[0] * grid[1]
    for visible in ((patches + 1) // 2, patches, [0, 1, patches, 0, patches // 2]):
        batch = make_batch(store, visible)
        expected, x0 = truth(store, batch, alpha_sigma, seed), truth(store, batch, None, seed)
        for dtype in DTYPES:
            got = mk.noisy_patches(store, batch, alpha_sigma, seed, dtype, implementation)
            assert got.dtype == dtype and got.shape == expected.shape and got.is_contiguous()
            # at most 4 x 2^-23 max(1, |z|) of the noise, |z| < 5.8; 3 roundings of sums below 8; that of the result
            allowed = 4 * 2**-23 * 5.8 + 3 * 2**-24 * 8 + torch.finfo(dtype).eps / 2 * expected.abs()
            assert ((got.double() - expected).abs() <= allowed).all(), dtype
            clean = mk.noisy_patches(store, batch, None, seed, dtype, implementation)
            assert ((clean.double() - x0).abs() <= 2**-23 + torch.finfo(dtype).eps / 2 * x0.abs()).all(), dtype


def test_noise_keeps_the_bound(level, seed, make_store, make_batch):
    store = make_store((64, 64), patch=4)
    batch = make_batch(store, 4096, batch=3)
    got, expected = noise(batch, store, seed, backend="cpp"), truth(store, batch, NO_PICTURE.expand(50, 2), seed)
    error = (got.double() - expected).abs() / expected.abs().clamp(min=1) * 2**23
    print(
        f"{got.numel()} normals up to {expected.abs().max():.2f}: largest error {error.max():.2f} x 2^-23 max(1, |z|)"
    )
    assert error.max() <= 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_that_of_pytorch(level, seed, make_store, make_batch, dtype):
    """x = byte times a factor that brings out subnormals, ties and overflow of every dtype."""
    store = make_store((8, 8), patch=4)
    batch = make_batch(store, 64, batch=7)
    factors = torch.tensor([1.0, 2.0**-14, 2.0**-20, 2.0**-23, 2.0**-25, 65504.0, 1e6])
    batch = dataclasses.replace(batch, timestep=torch.arange(7))
    alpha_sigma = torch.stack((factors, torch.zeros(7)), dim=1)
    exact = mk.noisy_patches(store, batch, alpha_sigma, seed, torch.float32, "cpp")
    assert torch.equal(mk.noisy_patches(store, batch, alpha_sigma, seed, dtype, "cpp"), exact.to(dtype))


# ---- the same bits ----


def test_every_level_gives_the_same_bits(seed, make_store, make_batch, alpha_sigma):
    for grid, patch, channels in SHAPES:
        store = make_store(grid, patch, channels)
        batch = make_batch(store, grid[0] * grid[1])
        outputs = []
        for name in library.cpu_levels():
            with library.use_cpu_level(name):
                outputs.append([mk.noisy_patches(store, batch, alpha_sigma, seed, dtype, "cpp") for dtype in DTYPES])
        for output in outputs[1:]:
            assert all(map(torch.equal, output, outputs[0]))


def test_noise_does_not_depend_on_mask(implementation, seed, make_store, make_batch):
    store = make_store((4, 6))
    dense = noise(make_batch(store, 24), store, seed, backend=implementation)
    masked = make_batch(store, 7)
    rows = torch.arange(4)[:, None]
    assert torch.equal(noise(masked, store, seed, backend=implementation), dense[rows, masked.keep_ids.long()])
    ragged = make_batch(store, [3, 24, 1, 10])
    rows = torch.arange(4).repeat_interleave(ragged.cu_patches.diff())
    assert torch.equal(noise(ragged, store, seed, backend=implementation), dense[rows, ragged.keep_ids.long()])


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_do_not_matter(level, seed, make_store, make_batch, alpha_sigma, length):
    store = make_store((21, 20), patch=2)
    batch = make_batch(store, length, batch=2)
    dense = dataclasses.replace(batch, keep_ids=torch.arange(420, dtype=torch.int32).expand(2, 420).contiguous())
    whole = mk.noisy_patches(store, dense, alpha_sigma, seed, backend="cpp")
    part = mk.noisy_patches(store, batch, alpha_sigma, seed, backend="cpp")
    assert torch.equal(part, whole[torch.arange(2)[:, None], batch.keep_ids.long()])


@pytest.mark.usefixtures("threads")
def test_does_not_depend_on_batch_or_threads(implementation, seed, make_store, make_batch, one_sample, alpha_sigma):
    store = make_store((16, 16))
    batch = make_batch(store, [256, 0, 1, 100, 77, 256, 3, 200])
    whole = mk.noisy_patches(store, batch, alpha_sigma, seed, backend=implementation)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(mk.noisy_patches(store, batch, alpha_sigma, seed, backend=implementation), whole)
    for b, (begin, end) in enumerate(zip(batch.cu_patches[:-1], batch.cu_patches[1:], strict=True)):
        got = mk.noisy_patches(store, one_sample(batch, b), alpha_sigma, seed, backend=implementation)
        assert torch.equal(got[0], whole[begin:end])


# ---- stores ----


def test_strided_store(implementation, seed, make_store, make_batch, alpha_sigma):
    packed, padded = make_store(), make_store(pad=64)
    assert padded.patches.stride(0) == packed.patches.stride(0) + 64
    padded.patches.copy_(packed.patches)
    one_image = mk.Store(packed.patches[:1].expand(7, -1, -1), packed.grid, packed.patch)
    batch = make_batch(packed, 9)
    first = dataclasses.replace(batch, image_ids=torch.zeros_like(batch.image_ids))
    for store, same in ((padded, batch), (one_image, first)):
        got = mk.noisy_patches(store, batch, alpha_sigma, seed, backend=implementation)
        assert torch.equal(got, mk.noisy_patches(packed, same, alpha_sigma, seed, backend=implementation))


@pytest.mark.parametrize("visible", [9, [3, 0, 24, 10]])
def test_staging_buffer(implementation, seed, make_store, make_batch, alpha_sigma, visible):
    """The visible patches alone, shuffled: a row of rubbish, then what each sample sees."""
    store = make_store()
    batch = make_batch(store, visible)
    counts = [9] * 4 if batch.cu_patches is None else batch.cu_patches.diff().tolist()
    staged = torch.full((4, 25, 48), 99, dtype=torch.uint8)
    slots = []
    for b, kept in enumerate(batch.keep_ids.flatten().split(counts)):
        source = torch.where(batch.flip[b], kept // 6 * 6 + 5 - kept % 6, kept).long()
        places = here(torch.randperm(24, generator=torch.Generator().manual_seed(b), device="cpu"))[: len(kept)] + 1
        staged[b, places] = store.patches[batch.image_ids[b], source]
        slots.append(places)
    buffer = mk.Store(staged, store.grid, store.patch, torch.cat(slots).int())
    moved = dataclasses.replace(batch, image_ids=torch.arange(4))
    got = mk.noisy_patches(buffer, moved, alpha_sigma, seed, backend=implementation)
    assert torch.equal(got, mk.noisy_patches(store, batch, alpha_sigma, seed, backend=implementation))


# ---- errors ----


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"^image_ids: got values from \d to 7, takes 0 to 6", {"image_ids": torch.tensor([0, 7, 1, 1])}),
        (ValueError, r"^image_ids: got values from -1", {"image_ids": torch.tensor([0, -1, 1, 1])}),
        (ValueError, r"^keep_ids: got values from 0 to 24, takes 0 to 23", {"keep_ids": [[0, 24]] * 4}),
        (ValueError, r"^keep_ids: got values from -1", {"keep_ids": [[0, -1]] * 4}),
        (ValueError, r"^timestep: got values from 0 to 50, takes 0 to 49", {"timestep": torch.tensor([0, 50, 1, 1])}),
        (TypeError, r"^keep_ids: got torch.int64, takes int32 \[B, K\]", {"keep_ids": torch.zeros(4, 2).long()}),
        (ValueError, r"^keep_ids: got shape \[3, 2\]", {"keep_ids": [[0, 1]] * 3}),
        (ValueError, r"^keep_ids: got strides", {"keep_ids": torch.zeros(2, 4, dtype=torch.int32).T}),
        (ValueError, r"^keep_ids: got shape \[8\]", {"keep_ids": [0] * 8}),
        (TypeError, r"^flip: got torch.uint8, takes bool \[B\]", {"flip": torch.zeros(4, dtype=torch.uint8)}),
        (TypeError, r"^timestep: got torch.int32", {"timestep": torch.zeros(4, dtype=torch.int32)}),
        (ValueError, r"^image_ids: got shape \[5\]", {"image_ids": torch.zeros(5).long()}),
        (TypeError, r"^cu_patches: got torch.int64", {"keep_ids": [0] * 8, "cu_patches": torch.arange(5) * 2}),
        (ValueError, r"^cu_patches: got shape \[4\]", {"keep_ids": [0] * 8, "cu_patches": [0, 2, 4, 8]}),
        (ValueError, r"^cu_patches: got 0 to 9, takes", {"keep_ids": [0] * 8, "cu_patches": [0, 2, 4, 6, 9]}),
        (ValueError, r"^cu_patches: got 1 to 8, takes", {"keep_ids": [0] * 8, "cu_patches": [1, 2, 4, 6, 8]}),
        (ValueError, r"^cu_patches: got 0 to 8, takes", {"keep_ids": [0] * 8, "cu_patches": [0, 5, 4, 6, 8]}),
        (TypeError, r"^alpha_sigma: got torch.float64", {"alpha_sigma": torch.zeros(50, 2, dtype=torch.float64)}),
        (ValueError, r"^alpha_sigma: got shape \[50, 3\]", {"alpha_sigma": torch.zeros(50, 3)}),
        (ValueError, r"^seed: got shape \[\]", {"seed": torch.tensor(1)}),
        (TypeError, r"^store.patches: got torch.int8", {"patches": torch.zeros(7, 24, 48, dtype=torch.int8)}),
        (ValueError, r"^store.patches: got 23 patches an image, takes 24", {"patches": torch.zeros(7, 23, 48).byte()}),
        (ValueError, r"^store.patches: got strides \[2304, 96,", {"patches": torch.zeros(7, 24, 96).byte()[..., :48]}),
        (ValueError, r"^store.patch: got 5, takes a P", {"patch": 5}),
        (ValueError, r"^store.grid: got \(24,\)", {"grid": (24,)}),
        (ValueError, r"^store.slots: got shape \[3\]", {"slots": [0, 1, 2]}),
        (ValueError, r"^store.slots: got values from 0 to 24, takes 0 to 23", {"slots": [0] * 7 + [24]}),
        (TypeError, r"^dtype: got torch.float64, takes float32", {"dtype": torch.float64}),
    ],
)  # fmt: skip
def test_errors(make_store, make_batch, alpha_sigma, seed, backend, error, message, change):
    store = make_store()
    change = {
        name: torch.tensor(value, dtype=torch.int32) if isinstance(value, list) else value
        for name, value in change.items()
    }
    store_change = {name: change.pop(name) for name in ("patches", "patch", "grid", "slots") if name in change}
    call = {"alpha_sigma": alpha_sigma, "seed": seed, "dtype": torch.float32, "backend": backend}
    call.update({name: change.pop(name) for name in tuple(call) if name in change})
    batch = dataclasses.replace(make_batch(store, 2), **change)
    with pytest.raises(error, match=message):
        mk.noisy_patches(dataclasses.replace(store, **store_change), batch, **call)


# ---- what CUDA C++ takes ----


def test_can_run_by_capability_and_size():
    assert on_gpus.can_run((8, 0), 2**31 - 1, 4)[0] and on_gpus.can_run((12, 0), 2**31 - 1, 1)[0]
    assert on_gpus.can_run((7, 5), 1, 48) == (False, "needs compute capability 8.0, this is 7.5")
    for patches, size in ((2**31, 4), (2**30, 5)):
        able, reason = on_gpus.can_run((9, 0), patches, size)
        assert not able and reason == f"takes less than 2^33 visible elements, not {patches} patches of {size}"


def test_pinned_memory_is_read_by_cuda_alone(monkeypatch):
    """For a GPU's samples, which are stand-ins here: "auto" means "cuda" where the images stay on the host."""
    monkeypatch.delenv("MASKDIFF_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "choice", lambda op, device, backend: "sure" if backend == "auto" else backend)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    cpu, cuda = (SimpleNamespace(device=torch.device(name), numel=lambda: 8) for name in ("cpu", "cuda"))
    pinned, near = (SimpleNamespace(keep_ids=cuda, patches=patches, size=48) for patches in (cpu, cuda))
    assert on_gpus.choice("noisy_patches", pinned, "auto") == "cuda"
    assert on_gpus.choice("noisy_patches", near, "auto") == "sure"
    assert on_gpus.choice("noisy_patches", near, "cuda") == "cuda"
    message = "^store.patches: got pinned memory of the host, takes a tensor on cuda with 'reference'"
    with pytest.raises(ValueError, match=message):
        on_gpus.choice("noisy_patches", pinned, "reference")
    monkeypatch.setattr(dispatch, "choice", lambda op, device, backend: "cuda")
    assert on_gpus.choice("noisy_patches", near, "auto") == "reference"  # too old a GPU
    with pytest.raises(ValueError, match="^backend: 'cuda' of noisy_patches needs compute capability 8.0, this is 7.5"):
        on_gpus.cuda_struct("noisy_patches", near)
    monkeypatch.setenv("MASKDIFF_KERNELS", "cuda")
    assert on_gpus.choice("noisy_patches", near, "auto") == "cuda"  # asked for
    monkeypatch.setenv("MASKDIFF_KERNELS", "reference")
    monkeypatch.setattr(dispatch, "choice", lambda op, device, backend: "reference" if backend == "auto" else backend)
    with pytest.raises(ValueError, match=message):
        on_gpus.choice("noisy_patches", pinned, "auto")


def test_only_pinned_memory_may_stay_on_the_host(make_store, make_batch, alpha_sigma, seed):
    store = make_store()
    samples = Samples(*flatten(store, make_batch(store, 2), alpha_sigma, seed))
    with pytest.raises(ValueError, match="^store.patches: got a tensor on cpu, takes one on cuda:0"):
        samples._check_store(torch.device("cuda", 0))
