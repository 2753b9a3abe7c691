"""Between Python and the compiled library: structs and codes, instruction sets, a missing library, what runs where."""

import contextlib
import ctypes
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import maskdiff_kernels as mk
from maskdiff_kernels import dispatch, library, philox
from maskdiff_kernels.ops import structs
from maskdiff_kernels.ops.attention import cpp, explicit, sdpa

HEADER = Path(library.__file__).resolve().parent.parent / "csrc" / "maskdiff_kernels.h"
OPS = ("draw_batch", "noisy_patches", "denoising_loss")


@pytest.fixture
def fresh() -> Iterator[None]:
    """Loads and chooses anew, before and after the test."""
    for cache in (library.cpu, dispatch._choice):
        cache.cache_clear()
    yield
    for cache in (library.cpu, dispatch._choice):
        cache.cache_clear()


def draw(backend: str = "auto") -> mk.Batch:
    return mk.draw_batch(torch.tensor([1]), torch.arange(4), 3, (4, 4), mk.Mask("patch", counts=(5,)), backend=backend)


# ---- the interface ----


STRUCTS = {
    "draw": structs.DrawStruct,
    "samples": structs.SamplesStruct,
    "attention_input": structs.AttentionStruct,
    "layer_norm_input": structs.LayerNormStruct,
    "layer_norm_gradients": structs.LayerNormGradientsStruct,
    "adamw": structs.AdamwStruct,
    "adamw_numbers": structs.AdamwNumbersStruct,
}


@pytest.mark.parametrize(("name", "struct"), STRUCTS.items())
def test_structs_are_those_of_the_header(name, struct):
    text = re.sub(r"//.*", "", HEADER.read_text())
    body = re.search(r"typedef struct \{([^}]*)\} maskdiff_" + name + ";", text)
    declared = re.findall(r"(\w[\w ]*?)(\*?) (\w+);", body[1])
    assert [field for _, _, field in declared] == [field for field, _ in struct._fields_]
    for (kind, star, field), (_, ctype) in zip(declared, struct._fields_, strict=True):
        kinds = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}
        assert ctype is (ctypes.c_void_p if star else kinds[kind]), field


def test_codes_are_those_of_the_header():
    codes = {name: int(value) for name, value in re.findall(r"MASKDIFF_(\w+) = (\d+)", HEADER.read_text())}
    expected = {name: getattr(structs, name) for name in ("OK", "BAD_RANGE", "NO_MEMORY", "BAD_OPTION")}
    for table in (structs.DTYPES, structs.MASKS, structs.TARGETS, structs.PRODUCTS):
        expected |= {str(key).removeprefix("torch.").upper(): code for key, code in table.items()}
    assert {name: codes.get(name) for name in expected} == expected
    assert int(re.search(r"MASKDIFF_ABI (\d+)", HEADER.read_text())[1]) == library.ABI


def test_a_launch_goes_to_the_device_and_its_current_stream(monkeypatch):
    """With stand-ins for the CUDA library and for the streams."""
    calls: list[tuple] = []
    codes = iter((0, structs.BAD_RANGE, 1002))
    known = SimpleNamespace(
        entry=lambda *given: calls.append(given) or next(codes),
        maskdiff_cuda_error_text=lambda code: f"CUDA's error {code - 1000}".encode(),
    )
    monkeypatch.setattr(library, "cuda", lambda: known)
    handles = {torch.device("cuda", 1): 2**40 + 1, torch.device("cuda", 2): 2**40 + 2}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=handles[device]))
    structs.call_cuda("entry", torch.device("cuda", 1), 7, 8)
    with pytest.raises(RuntimeError, match="^entry: error 1$"):
        structs.call_cuda("entry", torch.device("cuda", 2))
    with pytest.raises(RuntimeError, match="^entry: CUDA's error 2$"):
        structs.call_cuda("entry", torch.device("cpu"))  # the emulator's only stream
    assert [given[:-1] for given in calls] == [(7, 8, 1), (2,), (0,)]
    assert all(isinstance(given[-1], ctypes.c_void_p) for given in calls)  # a number would be cut to 32 bits
    assert [given[-1].value for given in calls] == [2**40 + 1, 2**40 + 2, None]


# ---- levels ----


def test_levels():
    levels = library.cpu_levels()
    assert levels == library.LEVELS[: len(levels)] and mk.cpu_level() == levels[-1] or os.environ["MASKDIFF_CPU_ISA"]
    before = mk.cpu_level()
    for name in levels:
        with library.use_cpu_level(name):
            assert mk.cpu_level() == name
    assert mk.cpu_level() == before
    with pytest.raises(ValueError, match="^name: got 'sse9', takes one of baseline"), library.use_cpu_level("sse9"):
        pass
    assert library.cpu().maskdiff_cpu_set_level(len(library.LEVELS)) == structs.BAD_OPTION


@pytest.mark.usefixtures("fresh")
def test_unknown_level_in_the_environment(monkeypatch):
    monkeypatch.setenv("MASKDIFF_CPU_ISA", "avx1024")
    with pytest.raises(ValueError, match="^MASKDIFF_CPU_ISA: got 'avx1024', takes one of baseline"):
        draw("cpp")


PROGRAM = """
import hashlib, json, sys, torch
import maskdiff_kernels as mk
heavy = {"triton", "torchmetrics", "diffusers", "sklearn", "tyro", "matplotlib", "scipy", "maskdiff"} & set(sys.modules)
seed, store = torch.tensor([3]), mk.Store(torch.arange(7 * 256 * 48).view(7, 256, 48).byte(), (16, 16), 4)
digests = []
for counts in ((100,), (1, 256, 30, 9)):
    batch = mk.draw_batch(seed, torch.arange(8), 7, (16, 16), mk.Mask("patch", counts=counts), 50, flip=0.5)
    table = torch.linspace(0, 1, 100).view(50, 2)
    x = mk.noisy_patches(store, batch, table, seed, torch.bfloat16).requires_grad_()
    mean, per_sample = mk.denoising_loss(x, store, batch, table, seed, "v")
    mean.backward()
    for value in (batch.keep_ids, batch.image_ids, x.detach(), per_sample.detach(), x.grad):
        digests.append(hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest())
digest = hashlib.sha256("".join(digests).encode()).hexdigest()
result = {"level": mk.cpu_level(), "heavy": sorted(heavy), "digest": digest}
"""


def test_another_process_gives_the_same_bits():
    """At the lowest instruction set, in one thread, with memory that malloc has filled with rubbish."""
    here: dict = {}
    exec(PROGRAM, here)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MASKDIFF_CPU_ISA": "baseline",
        "MALLOC_PERTURB_": "165",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", PROGRAM + "print(json.dumps(result))"]
    there = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert there == {"level": "baseline", "heavy": [], "digest": here["result"]["digest"]}


# ---- missing or stale ----


@pytest.mark.usefixtures("fresh")
def test_missing_library_is_an_error_and_no_reason_to_fall_back(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "LIBRARIES", tmp_path)
    monkeypatch.delenv("MASKDIFF_KERNELS", raising=False)
    for call in (draw, lambda: draw("cpp"), mk.cpu_level, mk.source_version):
        with pytest.raises(mk.LibraryError, match=r"missing .*: run `pip install -e \.` .*MASKDIFF_KERNELS=reference"):
            call()
    able, reason = mk.backends("draw_batch")["cpp"]
    assert not able and "missing" in reason
    monkeypatch.setenv("MASKDIFF_KERNELS", "reference")
    assert draw().keep_ids.shape == (4, 5)


@pytest.mark.usefixtures("fresh")
def test_stale_library(monkeypatch):
    built = mk.source_version()
    library.cpu.cache_clear()
    monkeypatch.setattr(library, "expected_version", lambda: "0123456789abcdef")
    with pytest.raises(mk.LibraryError, match=rf"stale .*{built}.*0123456789abcdef.*run `pip install -e \.`"):
        draw("cpp")


@pytest.mark.usefixtures("fresh")
def test_library_of_another_interface(monkeypatch):
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    with pytest.raises(mk.LibraryError, match=r"stale .*run `pip install -e \.`"):
        draw("cpp")


@pytest.mark.usefixtures("fresh")
def test_broken_library(monkeypatch, tmp_path):
    (tmp_path / "libmaskdiff_cpu.so").write_bytes(b"no library at all")
    monkeypatch.setattr(library, "LIBRARIES", tmp_path)
    with pytest.raises(mk.LibraryError, match=r"does not load .*run `pip install -e \.`"):
        draw("cpp")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
def test_counted_words_on_cuda():
    """The CUDA library's smallest kernel gives the words of the reference."""
    seed, n, blocks = torch.tensor([-(2**61) - 5]), torch.tensor([0, 1, 2**33 + 7]), 300
    words = torch.empty(3, blocks, 4, dtype=torch.int32, device="cuda")
    sums = torch.empty(3, dtype=torch.int32, device="cuda")
    on_card = seed.cuda(), n.cuda()
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*on_card, words, sums)]
    code = library.cuda().maskdiff_cuda_count_words(
        *pointers[:2], ctypes.c_int64(3), philox.NOISE, ctypes.c_int64(blocks), *pointers[2:], 0, None
    )
    assert code == 0
    expected = philox.words(seed, n[:, None], philox.NOISE, torch.arange(blocks))
    assert torch.equal(words.cpu().long() & 0xFFFFFFFF, expected)
    assert torch.equal(sums.cpu().long() & 0xFFFFFFFF, expected.sum((1, 2)) & 0xFFFFFFFF)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80", (8, 0), True),
        ("80,90", (8, 6), True),  # machine code of an earlier minor number
        ("89,90", (8, 6), False),
        ("90", (8, 0), False),
        ("80,120", (9, 0), False),  # that for 8.0 comes without PTX
        ("80,90", (10, 0), True),  # the last comes with it
        ("80,100", (12, 1), True),
        ("100,80", (9, 0), True),
        ("120", (10, 3), False),
        ("90a", (9, 0), True),
        ("80,90a", (10, 0), False),
        ("100a", (10, 3), False),
        ("100f", (10, 3), True),
        ("100f", (12, 0), False),
    ],
)
def test_what_was_built_for_other_gpus_cannot_run(monkeypatch, archs, capability, runs):
    """Said when it is chosen, and not by the first launch. The GPU is a stand-in."""
    monkeypatch.setattr(library, "cuda_archs", lambda: archs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    able, reason = mk.backends("noisy_patches")["cuda"]
    assert able == runs
    if able:
        assert dispatch.choice("noisy_patches", "cuda", "cuda") == "cuda"
    else:
        words = "the CUDA kernels were built for {}, this GPU is {}.{}: run `MASKDIFF_CUDA_ARCHS={}{} pip install -e .`"
        assert reason.startswith(words.format(archs, *capability, *capability))
        with pytest.raises(mk.LibraryError, match="MASKDIFF_CUDA_ARCHS"):
            dispatch.choice("noisy_patches", "cuda", "cuda")


# ---- choice of implementation ----


@pytest.mark.usefixtures("fresh")
def test_choice(monkeypatch):
    monkeypatch.delenv("MASKDIFF_KERNELS", raising=False)
    for op in OPS:
        assert dispatch.choice(op, "cpu") == "cpp"
        assert dispatch.choice(op, "cpu", "reference") == "reference"
        assert dispatch.choice(op, "meta") == "reference"  # no table, and cpp takes CPU tensors alone
        with pytest.raises(ValueError, match=rf"^backend: 'cpp' of {op} takes cpu tensors, not meta"):
            dispatch.choice(op, "meta", "cpp")
        backends = mk.backends(op)
        if "cuda" in backends:
            able, reason = backends.pop("cuda")
            assert able or re.search("the CUDA kernels were not built|is stale|sees no CUDA device", reason)
        able, reason = backends.pop("triton")
        assert able or re.search("triton is not there|sees no CUDA device", reason)
        assert backends == {
            "cpp": (True, f"C++, {mk.cpu_level()}"),
            "reference": (True, "plain PyTorch, any device"),
        }
    monkeypatch.setenv("MASKDIFF_KERNELS", "reference")
    assert dispatch.choice("draw_batch", "cpu") == "reference"
    assert dispatch.choice("draw_batch", "cpu", "cpp") == "cpp"
    monkeypatch.setenv("MASKDIFF_KERNELS", "fast")
    with pytest.raises(ValueError, match="^MASKDIFF_KERNELS: got 'fast', draw_batch takes auto or one of cpp, ref"):
        draw()
    with pytest.raises(ValueError, match="^op: got 'sum', takes one of adamw_ema, attention, draw_batch"):
        mk.backends("sum")


@pytest.mark.usefixtures("fresh")
def test_choice_by_op(monkeypatch):
    """MASKDIFF_KERNELS may name ops; `using` comes before it, an argument before both."""
    monkeypatch.setenv("MASKDIFF_KERNELS", "attention=sdpa, adamw_ema=torch")
    found = {"adamw_ema": "torch", "attention": "sdpa", **dict.fromkeys((*OPS, "gelu", "layer_norm"), "cpp")}
    assert mk.chosen("cpu") == found
    with mk.using(attention="explicit", draw_batch="reference"):
        assert mk.chosen("cpu") == {**found, "attention": "explicit", "draw_batch": "reference"}
        assert dispatch.choice("attention", "cpu", "cpp") == "cpp"
        with mk.using(attention="auto"):
            assert mk.chosen("cpu") == {**found, "attention": "cpp", "draw_batch": "reference"}
        with pytest.raises(KeyError), mk.using(attention="cpp"):
            raise KeyError
        assert dispatch.choice("attention", "cpu") == "explicit"
    assert mk.chosen("cpu") == found
    for text, op in (("atention=sdpa", "atention"), ("attention=sdpa,cpp", "cpp"), ("attention=sdpa,", "")):
        monkeypatch.setenv("MASKDIFF_KERNELS", text)
        with pytest.raises(ValueError, match=f"^MASKDIFF_KERNELS: got '{op}' in '{text}', takes a name, or OP=NAME"):
            draw()
    monkeypatch.setenv("MASKDIFF_KERNELS", "attention=fast")
    assert len(draw().n) == 4
    with pytest.raises(ValueError, match="^MASKDIFF_KERNELS: got 'fast', attention takes auto or one of cuda, cpp"):
        dispatch.choice("attention", "cpu")
    with pytest.raises(ValueError, match="^using: got 'cp', draw_batch takes auto"), mk.using(draw_batch="cp"):
        pass
    with pytest.raises(ValueError, match="^op: got 'draw', takes one of"), mk.using(draw="cpp"):
        pass
    with mk.using(attention="cuda"), pytest.raises(ValueError, match="^using: 'cuda' of attention takes cuda tensors"):
        dispatch.choice("attention", "cpu")


@pytest.mark.usefixtures("fresh")
def test_using_holds_where_the_backward_runs(monkeypatch):
    monkeypatch.delenv("MASKDIFF_KERNELS", raising=False)
    ran = []
    run = explicit.run_backward
    monkeypatch.setattr(explicit, "run_backward", lambda *arguments: (ran.append("explicit"), run(*arguments))[1])
    qkv = torch.randn(2, 5, 3, 1, 32, requires_grad=True)
    with mk.using(attention="explicit"):
        thread = threading.Thread(target=lambda: mk.attention(qkv).sum().backward())
        thread.start()
        thread.join()
    assert ran == ["explicit"]


def test_the_committed_table_is_sound():
    table = dispatch.read_table((Path(dispatch.__file__).parent / "choices.json").read_text())
    assert set(table["cpu"]) == set(table["cuda"]) == {"adamw_ema", "attention", "gelu", "layer_norm", *OPS}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"gpu": {}}, r"got 'gpu', takes devices such as .*cuda:9\.0"),
        ({"cpu:sse9": {}}, "got 'cpu:sse9', takes devices"),
        ({"cpu": {"sum": "cpp"}}, "cpu: got op 'sum', takes one of adamw_ema, attention, draw_batch"),
        ({"cuda:9.0": {"draw_batch": "cpp"}}, "cuda:9.0: draw_batch: got 'cpp', takes one of reference"),
        ({"cpu": {"draw_batch": [[None, "cpp"]]}}, r'draw_batch: got \[\[null, "cpp"\]\], takes a name$'),
        ({"cpu": {"attention": [[16, "cpp"], [None, "flash"]]}}, "attention: got 'flash', takes one of cpp, sdpa"),
        *(
            ({"cpu": {"attention": entry}}, "attention: got .*, takes a name, or .* pairs that rise and end with null")
            for entry in (
                None, 5, [], [[16, "cpp"]], [["16", "cpp"], [None, "sdpa"]], [[16.5, "cpp"], [None, "sdpa"]],
                [[16, "cpp"], [16, "sdpa"], [None, "cpp"]], [[0, "cpp"], [None, "sdpa"]], [[None, "cpp", 1]],
                [[None, "cpp"], [None, "cpp"]], ["cpp"], [[None, None]],
            )
        ),
    ],
)  # fmt: skip
def test_tables_of_another_form(table, message):
    with pytest.raises(ValueError, match=f"^choices.json: {message}" if "cpu" not in table else message):
        dispatch.read_table(json.dumps(table))


@pytest.mark.usefixtures("fresh")
def test_the_choice_may_depend_on_the_length(monkeypatch):
    monkeypatch.delenv("MASKDIFF_KERNELS", raising=False)
    by_length = ((16, "cpp"), (65, "explicit"), (math.inf, "sdpa"))
    monkeypatch.setattr(dispatch, "_table", lambda: {"cpu": {"attention": by_length, "draw_batch": "cpp"}})
    ran = []

    def spied(name: str, run):
        return lambda *arguments: (ran.append(name), run(*arguments))[1]

    for name, module in (("cpp", cpp), ("explicit", explicit), ("sdpa", sdpa)):
        for function in ("run", "run_backward"):
            monkeypatch.setattr(module, function, spied(name, getattr(module, function)))
    for length, expected in ((1, "cpp"), (16, "cpp"), (17, "explicit"), (65, "explicit"), (66, "sdpa"), (999, "sdpa")):
        assert dispatch.choice("attention", "cpu", length=length) == expected
    for lengths, expected in (((16,), "cpp"), ((3, 17), "explicit"), ((66,), "sdpa")):
        ran.clear()
        qkv = torch.randn(sum(lengths), 3, 1, 32, requires_grad=True)
        mk.attention(qkv, torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)).sum().backward()
        assert ran == [expected] * 2, lengths
    assert mk.chosen("cpu")["attention"] == "cpp to 16 tokens, explicit to 65 tokens, sdpa beyond"
    assert dispatch.choice("attention", "cpu", "explicit", 500) == "explicit"
    monkeypatch.setattr(dispatch, "_table", lambda: {"cpu": {"attention": ((16, "cpp"), (math.inf, "cuda"))}})
    dispatch._choice.cache_clear()
    with pytest.raises(ValueError, match="^choices.json: 'cuda' of attention takes cuda tensors, not cpu"):
        dispatch.choice("attention", "cpu")


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_the_default_device_changes_nothing(backend):
    """Outputs stand where the inputs do: a pointer to memory of another device would end the process."""
    here: dict = {}
    exec(PROGRAM.replace("result =", "unused ="), here)
    table, store, n = here["table"], here["store"], torch.arange(8)
    qkv = torch.randn(6, 3, 1, 32)
    with torch.device("meta"):
        for mask in (mk.Mask("patch", counts=(100,)), mk.Mask("patch", counts=(1, 256, 30, 9))):
            batch = mk.draw_batch(here["seed"], n, 7, (16, 16), mask, 50, backend=backend)
            x = mk.noisy_patches(store, batch, table, here["seed"], backend=backend).requires_grad_()
            mk.denoising_loss(x, store, batch, table, here["seed"], backend=backend)[0].backward()
            assert {value.device.type for value in (batch.keep_ids, batch.flip, x, x.grad)} == {"cpu"}
        assert mk.attention(qkv[None], backend=backend).device.type == "cpu"


@pytest.mark.usefixtures("fresh")
def test_the_level_may_have_its_own_choice(monkeypatch):
    """Whatever was chosen at another level before."""
    monkeypatch.delenv("MASKDIFF_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_table", lambda: {"cpu:baseline": {"draw_batch": "reference"}, "cpu": {}})
    *_, best = library.cpu_levels()
    for level in (best, "baseline", best):
        with library.use_cpu_level(level):
            assert dispatch.choice("draw_batch", "cpu") == ("reference" if level == "baseline" else "cpp")
            assert dispatch.choice("noisy_patches", "cpu") == "cpp"
