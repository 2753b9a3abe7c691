"""The structs and codes of csrc/maskdiff_kernels.h, and the calls' common ground: pointers, threads, errors."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from maskdiff_kernels import library
from maskdiff_kernels.ops.adamw_ema.state import Update
from maskdiff_kernels.ops.samples import Samples

OK, BAD_RANGE, NO_MEMORY, BAD_OPTION = range(4)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TARGETS = {"eps": 0, "x0": 1, "v": 2}
PRODUCTS = {"best": 0, "widened": 1, "pairs": 2, "tiles": 3}
MASKS = {"dense": 0, "patch": 1, "block": 2, "crop": 3}


def _fields(pointers: str, numbers: str, outputs: str = "") -> list[tuple[str, type]]:
    return [
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *((name, ctypes.c_int64) for name in numbers.split()),
        *((name, ctypes.c_void_p) for name in outputs.split()),
    ]


class DrawStruct(ctypes.Structure):
    """maskdiff_draw."""

    _fields_ = _fields(
        "seed n ids counts",
        "batch images grid_down grid_across kind size group timesteps flip label_dropout",
        "image_ids keep_ids cu_patches mirrored timestep drop_label",
    )


class SamplesStruct(ctypes.Structure):
    """maskdiff_samples."""

    _fields_ = _fields(
        "patches slots n image_ids keep_ids cu_patches flip timestep alpha_sigma seed",
        "images rows stride grid_down grid_across patch channels batch visible total timesteps",
    )


class AttentionStruct(ctypes.Structure):
    """maskdiff_attention_input."""

    _fields_ = _fields(
        "qkv cu_seqlens",
        "sequences length tokens heads width sequence_stride token_stride part_stride head_stride dtype products",
    )


class AdamwStruct(ctypes.Structure):
    """maskdiff_adamw."""

    _fields_ = _fields(
        "master exp_avg exp_avg_sq ema ema2 low adam_step ema_step hyper grads grad_dtypes offsets sizes decays",
        "segments low_size low_dtype",
    )


ADAMW_NUMBERS = "beta1 beta2 eps weight_decay ema_decay ema2_decay ema_gamma ema2_gamma ema_every".split()


class AdamwNumbersStruct(ctypes.Structure):
    """maskdiff_adamw_numbers."""

    _fields_ = [(name, ctypes.c_double) for name in ADAMW_NUMBERS[:-1]] + [(ADAMW_NUMBERS[-1], ctypes.c_int64)]


class LayerNormStruct(ctypes.Structure):
    """maskdiff_layer_norm_input."""

    _fields_ = _fields("x weight bias shift", "rows width stride dtype")


class LayerNormGradientsStruct(ctypes.Structure):
    """maskdiff_layer_norm_gradients."""

    _fields_ = _fields(
        "statistics grad_out grad_sum grad_x grad_weight grad_bias grad_shift", "grad_out_stride grad_sum_stride"
    )


class ProductStruct(ctypes.Structure):
    """maskdiff_product."""

    _fields_ = _fields(
        "left right out", "rows columns depth left_stride right_stride out_stride left_transposed right_transposed add"
    )


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor starts, as an argument; NULL for none."""
    return ctypes.c_void_p(pointer(tensor))


def samples_struct(samples: Samples) -> SamplesStruct:
    """Samples as the C functions take them. It borrows the tensors: keep them alive."""
    patches, keep_ids, ragged = samples.patches, samples.keep_ids, samples.cu_patches is not None
    return SamplesStruct(
        patches.data_ptr(),
        pointer(samples.slots),
        samples.n.data_ptr(),
        samples.image_ids.data_ptr(),
        keep_ids.data_ptr(),
        pointer(samples.cu_patches),
        samples.flip.data_ptr(),
        samples.timestep.data_ptr(),
        pointer(samples.alpha_sigma),
        samples.seed.data_ptr(),
        patches.shape[0],
        patches.shape[1],
        patches.stride(0),
        *samples.grid,
        samples.patch,
        samples.size // samples.patch**2,
        samples.n.shape[0],
        0 if ragged else keep_ids.shape[1],
        keep_ids.numel(),
        0 if samples.alpha_sigma is None else samples.alpha_sigma.shape[0],
    )


def attention_struct(
    qkv: Tensor,  # [B, L, 3, H, d] or [T, 3, H, d]
    cu_seqlens: Tensor | None,  # [S + 1] int32
    max_seqlen: int | None,
    products: str = "best",
) -> AttentionStruct:
    """Attention's input as the C functions take it. It borrows the tensors: keep them alive."""
    if cu_seqlens is None:
        sequences, length = qkv.shape[:2]
        tokens, strides = sequences * length, qkv.stride()[:4]
    else:
        sequences, length = cu_seqlens.shape[0] - 1, max_seqlen or 0
        tokens, strides = qkv.shape[0], (0, *qkv.stride()[:3])
    numbers = (sequences, length, tokens, *qkv.shape[-2:], *strides, DTYPES[qkv.dtype], PRODUCTS[products])
    return AttentionStruct(qkv.data_ptr(), pointer(cu_seqlens), *numbers)


def adamw_structs(u: Update) -> tuple[AdamwStruct, AdamwNumbersStruct]:
    """An update as the C functions take it. It borrows the tensors: keep them alive."""
    grads = (ctypes.c_void_p * len(u.grads))(*(grad.data_ptr() for grad in u.grads))
    tables = (grads, *map(_table, ([DTYPES[grad.dtype] for grad in u.grads], u.offsets, u.sizes, u.decays)))
    update = AdamwStruct(
        *(pointer(tensor) for tensor in (u.master, u.exp_avg, u.exp_avg_sq, u.ema, u.ema2, u.low)),
        *(tensor.data_ptr() for tensor in (u.adam_step, u.ema_step, u.hyper)),
        *(ctypes.cast(table, ctypes.c_void_p) for table in tables),
        len(u.grads),
        0 if u.low is None else u.low.shape[0],
        DTYPES[torch.bfloat16 if u.low is None else u.low.dtype],
    )
    return update, AdamwNumbersStruct(*(getattr(u, name) for name in ADAMW_NUMBERS))


def _table(numbers: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def call(function: str, *arguments: object) -> int:
    """Calls an exported function, on as many threads as PyTorch uses; returns its error code but for memory errors."""
    code = getattr(library.cpu(), function)(*arguments, torch.get_num_threads())
    if code == NO_MEMORY:
        raise MemoryError(f"{function}: no scratch memory")
    if code == BAD_OPTION:
        raise ValueError(f"{function}: got an option that the compiled library does not know")
    return code


def current_stream(device: torch.device) -> int | None:
    """The handle of the stream that CUDA work on `device` is queued on; None for other devices, as in the emulator."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def call_cuda(function: str, device: torch.device, *arguments: object) -> None:
    """Queues an exported function of the CUDA library on the current stream of `device`; raises RuntimeError."""
    stream = ctypes.c_void_p(current_stream(device))
    code = getattr(library.cuda(), function)(*arguments, device.index or 0, stream)
    if code:
        said = library.cuda().maskdiff_cuda_error_text(code).decode() if code >= 1000 else f"error {code}"
        raise RuntimeError(f"{function}: {said}")
