"""The faults that `make mutants` plants, and the tests that must notice each: see mutants.py."""

from dataclasses import dataclass

from planted_trainer_faults import CAPTURE, TRAINER, trainer

ATTENTION = ("tests/ops/test_attention.py", "-k", "float64 or log_sum or scale or ragged or pairs")
TRITON, IMAGES = (("tests/ops/test_" + op + "_triton.py", "-k", "interpreter") for op in ("attention", "images"))
ADAMW = ("tests/ops/test_adamw_ema.py", "-k", "not compile and not opcheck")
AVERAGES = ("tests/ops/test_adamw_ema.py", "tests/ops/test_adamw_averages.py", "-k", "power or averages")
DRAW, NOISY, LOSS = (f"tests/ops/test_{op}.py" for op in ("draw_batch", "noisy_patches", "denoising_loss"))
TILES = ("tests/ops/test_attention.py", "-k", "products_of_bfloat16 or sixteen")
PRODUCT = ("tests/ops/test_product.py",)
NORM = ("tests/ops/test_layer_norm.py", "-k", "not compile and not opcheck")
EMULATED_FAULTS = "test_planted_fault or test_plain_build or test_sanitized_build"
PLAIN_FAULTS = ("tests/emulation/test_faults.py", "-k", "plain")


@dataclass(frozen=True)
class Mutant:
    """One planted fault."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # arguments of pytest


# File, tests that must notice, faults (old text, new text).
PLANTED: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, str], ...]], ...] = (
    ("csrc/common/philox.h", (DRAW,), (("round < 10", "round < 9"),)),
    (
        "csrc/common/normals.h",
        (NOISY,),
        (
            ("y_sign = (quadrant >> 1) << 31", "y_sign = (quadrant & 1) << 31"),
            ("minus_log_fraction((a >> 8) + 1)", "minus_log_fraction((a >> 8) | 1)"),
        ),
    ),
    ("csrc/common/floats.h", (NOISY,), (("bits + 0x7FFFu + (bits >> 16 & 1)", "bits + 0x8000u"),)),
    (
        "csrc/common/patches.h",
        (NOISY,),
        (
            ("(row - channels) - 2 * at->column", "(row - channels) - at->column"),
            ("(elements + 3) / 4", "elements / 4"),
            ("2.0 / 255.0", "2.0 / 256.0"),
        ),
    ),
    (
        "csrc/common/adamw.h",
        ADAMW,
        (
            ("(int64_t)adam_step + 1;", "(int64_t)adam_step;"),
            ("norm > bound ?", "bound > 0.0f ?"),
            ("const float single = (float)sum;", "const float single = (float)__builtin_sqrt(sum);"),
            ("young < decay ? young : decay", "decay"),
            ("k = seen - every + 1.0", "k = seen"),
            ("kept *= young", "kept = young"),
            ("* f.root + f.eps", "+ f.eps"),
            ("x.master = keep * x.master", "x.master = f.keep[1] * x.master"),
        ),
    ),
    (
        "csrc/cpu/adamw_ema.cpp",
        ADAMW,
        (
            ("sums[v] += y * y;", "sums[v] = y * y;"),
            ("left >= 8;", "left > 8;"),
            ("at - offset, count, buffer", "0, count, buffer"),
            ("low < count ? low : count", "count"),
            ("c >= chunks * part / parts", "c > chunks * part / parts"),
            ("  *a->ema_step += 1.0f;\n", ""),
            ("factors.to_ema[0] != 0.0f ? update<true> : update<false>", "update<true>"),
            ("if (DUE && a->ema2)", "if (a->ema2)"),
            ("if (DUE) ema[i]", "ema[i]"),
        ),
    ),
    (
        "csrc/cpu/gelu.cpp",
        ("tests/ops/test_gelu.py", "-k", "not compile and not opcheck"),
        (
            ("- 0x1p-126f, y * t}", ", y * t}"),
            ("0.39894228f * n.a - n.tail", "0.39894228f * n.a + n.tail"),
            (" & ~negative)", ")"),
            ("part < parts; part++) sum +=", "part + 1 < parts; part++) sum +="),
            ("row = rows * part / parts;", "row = rows * part / parts + (part > 0);"),
            (
                "backward_vectors<DTYPE, 1>(part, gradients, part, sums ? sums + i : nullptr);",
                "backward_vectors<DTYPE, 1>(part, gradients, part, nullptr);",
            ),
        ),
    ),
    (
        "kernels/ops/gelu/op.py",
        ("tests/ops/test_gelu.py", "-k", "implementation_of_the_forward"),
        (('dispatch.choice("gelu", x.device, backend)', "backend"),),
    ),
    (
        "maskdiff/whole_block.py",
        trainer("whole_block"),
        (
            ("(wanted.proj, grad_mid,", "(wanted.proj, grad,"),
            ("grad_inner, normed2, fc1)", "grad_inner, normed1, fc1)"),
            ("split(x.shape[1], dim=1)", "split(x.shape[1], dim=1)[::-1]"),
            ("    if not wanted:\n        return None\n    return product", "    return product"),
            ("idle(len(grad), *reversed(weight.shape))", "idle(len(grad), *weight.shape)"),
            ("for op in OPS)", "for op in OPS[1:])"),
            ("type(part) is kind and", "isinstance(part, kind) and"),
            ("is kind and not hooks", "is kind"),
            ("except (AttributeError, RuntimeError)", "except AttributeError"),
        ),
    ),
    (
        "csrc/cuda/adamw_ema.cu",
        ("tests/emulation/test_adamw_ema.py", "-k", "float64 or same_bits or address"),
        (
            ("first ? sum : workspace->sums[block] + sum", "sum"),
            ("float adam_step = workspace->adam_step,", "float adam_step = *update.adam_step,"),
            ("at + N <= update.low_size", "at < update.low_size"),
        ),
    ),
    (
        "csrc/cuda/numbers.cuh",
        ("tests/emulation/test_adamw_ema.py", "-k", "float64 or same_bits or address"),
        (("sums[thread + other];\n    ptx::sync_block();", "sums[thread + other];"),),
    ),
    (
        "csrc/cuda/adamw_ema.cu",
        ("tests/emulation/test_adamw_ema.py", "-k", "address"),
        (
            ("least(kSums, over(size, kLeastOfASum))", "over(size, kLeastOfASum)"),
            ("segment.offset % 4 == 0 && ", ""),
            ("aligned(segment.grad, whole ? 16 : 8)", "aligned(segment.grad, 8)"),
            (" | 2 * reinterpret_cast<uintptr_t>(a.low);", ";"),
            ("return all % 16 == 0;", "return all % 8 == 0;"),
            ("due ? load<N>(update.ema + at) : Floats<N>{}", "load<N>(update.ema + at)"),
            ("if (due) store", "store"),
            ("due && update.ema2", "update.ema2"),
        ),
    ),
    (
        "csrc/cpu/layer_norm.cpp",
        NORM,
        (
            (
                "totals[stream] += part.keep(part.template load<Of>(x + i) - first);",
                "totals[stream] += part.template load<Of>(x + i) - first;",
            ),
            ("const Vector mean = first + splat", "const Vector mean = splat"),
            ("      gradient += beside;\n", ""),
            ("(normal * slope + constant)", "normal * slope"),
            ("kind ? g->grad_bias : g->grad_weight", "kind ? g->grad_weight : g->grad_bias"),
        ),
    ),
    (
        "kernels/ops/layer_norm/op.py",
        NORM,
        (("x.dtype == torch.float32 and x.numel() < FEW", "x.numel() < FEW"),),
    ),
    ("kernels/ops/layer_norm/cpp.py", NORM, (("x.stride(1) == 1:", "x.stride(0) > 0:"),)),
    ("csrc/cpu/numbers.h", NORM, (("lanes() < count", "lanes() <= count"),)),
    (
        "csrc/cpu/amx.h",
        PRODUCT,
        (
            ("left += word % PANEL == 0 ? TILE : left_height * PANEL - TILE;", "left += TILE;"),
            ("  if (add) {\n", "  if (false) {\n"),
        ),
    ),
    ("csrc/cpu/amx.h", TILES, (("  if (row < rows) multiply_rows<1>", "  if (false) multiply_rows<1>"),)),
    (
        "csrc/cpu/attention.cpp",
        ("tests/ops/test_attention.py", "-k", "want_more_memory"),
        (("length == 0 || (s > 0 && length == sequences[s - 1].length)", "s > 0"),),
    ),
    (
        "csrc/cpu/attention_amx.h",
        TILES,
        (
            ("(load(slopes) - delta[0])", "load(slopes)"),
            ("  if (keys % 2) store_interleaved(p + pair++ * PANEL, halves(keys - 1), WideHalves{});\n", ""),
            (
                "s.p, keys.tall, s.grad_down + right, queries.pairs, start > 0",
                "s.p, keys.tall, s.grad_down + right, queries.pairs, false",
            ),
            ("LN2 * top[half] + log(total[half])", "top[half] + log(total[half])"),
            ("* factor - top[half])", "* factor)"),
            ("larger(load(scores + key * PANEL) * factor, top[0])", "larger(load(scores + key * PANEL), top[0])"),
        ),
    ),
    (
        "csrc/cpu/product.cpp",
        PRODUCT,
        (
            ("  write(done, call.add);\n  finish", "  finish"),
            ("turn++ % 2 * PANEL : place", "0 : place"),
            ("right + column * words, words, at > 0);", "right + column * words, words, false);"),
            ("at + words == depth ? smaller(rows - i, PANEL) : 0", "smaller(rows - i, PANEL)"),
            ("round_up(rows, PANEL), from, rows, 2 * words", "rows, from, rows, 2 * words"),
        ),
    ),
    (
        "kernels/ops/product.py",
        PRODUCT,
        (
            ("torch.get_num_threads() == 2 and ", ""),
            (" and x.stride(0) % 2 == 0", ""),
            ("        and unseen(x)\n", ""),
            (' == "amx_bf16"', ' != "baseline"'),
            ("weight.shape[0] % SIDE == ", ""),
        ),
    ),
    (
        "kernels/ops/adamw_ema/fused.py",
        ADAMW,
        (
            ("(1 - decay) * due", "1 - decay"),
            (" & (skipped == 0)", ""),
            ("u.weight_decay if decays else 0.0", "u.weight_decay"),
            ("torch.where(skipped > 0, u.low,", "torch.where(skipped > 1, u.low,"),
        ),
    ),
    (
        "kernels/ops/adamw_ema/apex.py",
        ("tests/ops/test_adamw_ema.py", "tests/ops/test_apex.py", "-k", "apex"),
        (("flag.copy_(skipped)", "flag.zero_()"), ("any(low is None for low in lows)", "False")),
    ),
    (
        "csrc/common/adamw.h",
        AVERAGES,
        (
            ("if (k < 2.0) return 1.0;", ""),
            ("i < 7; i++) share", "i < 6; i++) share"),
            ("power_share(seen / every, gamma + 1.0)", "power_share(seen / every, gamma)"),
            ("seen / every", "seen"),
            ("(int64_t)seen % n", "(int64_t)adam_step % n"),
        ),
    ),
    ("csrc/cpu/adamw_ema.cpp", AVERAGES, ((" || numbers->ema_every < 1", ""),)),
    (
        "kernels/ops/adamw_ema/averages.py",
        AVERAGES,
        (
            ("(seen / every).clamp(min=1)", "(seen / every)"),
            ("(seen / every)", "seen"),
            (".clamp(min=0)", ""),
            ("max=final).prod()", "max=final)[0]"),
            ("math.sqrt((gamma + 1)", "math.sqrt((gamma + 2)"),
        ),
    ),
    (
        "csrc/cpu/draw_batch.cpp",
        (DRAW,),
        (
            ("round < 8", "round < 6"),
            ("equal = wanted - below;", "equal = wanted - below - 1;"),
            ("d->grid_across - side + 1", "d->grid_across - side"),
            ("words[j] < words[i] ||", "words[j] > words[i] ||"),
            ("element(seed, n, LABEL_DROPOUT, 0)", "element(seed, n, FLIP, 0)"),
            ("const uint64_t epoch = n / images", "const uint64_t epoch = 0 * n"),
            ("(uint32_t)(first + i)", "(uint32_t)i"),
        ),
    ),
    (
        "csrc/cpu/gather_patches.cpp",
        ("tests/ops/test_gather.py",),
        (
            ("image + row * elements, (size_t)elements", "image + row * elements, (size_t)elements - 1"),
            ("pixel_row(s, j, s->keep_ids[j], s->flip[b] != 0);\n      memcpy", "s->keep_ids[j];\n      memcpy"),
            ("if (!in_range(s)) return MASKDIFF_BAD_RANGE;\n  const uintptr_t", "const uintptr_t"),
        ),
    ),
    (
        "csrc/common/samples.h",
        (NOISY,),
        (
            ("alpha * x0 + sigma * eps", "alpha * x0 - sigma * eps"),
            ("(uint32_t)s->grid_across, flip)", "(uint32_t)s->grid_across, false)"),
        ),
    ),
    ("csrc/common/samples.h", (LOSS,), (("alpha * eps - sigma * x0", "alpha * eps + sigma * x0"),)),
    (
        "csrc/cpu/visible.h",
        (NOISY,),
        (
            ("per_patch + block)", "per_patch)"),
            ("s->image_ids[b] * s->stride", "s->image_ids[b] * s->rows * elements"),
            ("offsets[b + 1] < offsets[b]", "offsets[b + 1] <= offsets[b]"),
        ),
    ),
    (
        "csrc/cpu/denoising_loss.cpp",
        (LOSS,),
        (
            ("sum /= (double)count", "sum /= (double)elements"),
            ("if (weight) sum *=", "if (weight) sum +="),
            ("squares[i] = 0.0f;", "squares[i] = 1e3f;"),
            ("*= factor[b]", "*= factor[0]"),
            ("all / (double)s->batch", "all"),
        ),
    ),
    (
        "kernels/ops/attention/triton_kernel.py",
        TRITON,
        (
            (
                'return tl.where(there, _dot(a, tl.trans(b)) * factor, float("-inf"))',
                "return _dot(a, tl.trans(b)) * factor",
            ),
            ("factor, (key + keys < length)[None, :])", "factor, (keys < length)[None, :])"),
            ("most * UNIT + tl.log2(total) * LN_2", "(most + tl.log2(total)) * LN_2"),
            ("total = total * shrink + tl.sum(p, 1)", "total = total + tl.sum(p, 1)"),
            (
                "for key in range(0, length, STEP):\n            keys =",
                "for key in range(STEP, length, STEP):\n            keys =",
            ),
            ("grad_k * scale", "grad_k"),
            ("begin + tl.arange(0, BLOCK) < length)[:, None]", "begin + tl.arange(0, BLOCK) <= length)[:, None]"),
            (
                "tl.store(at, x.to(start.dtype.element_ty), mask=(rows < length)[:, None])",
                "tl.store(at, x.to(start.dtype.element_ty))",
            ),
            ("lse + head.to(tl.int64) * tokens + first\n", "lse + head.to(tl.int64) * length + first\n"),
            ("tl.sum(p * grad_p, 0) if ONE", "tl.sum(p * grad_p, 0) * 0.99 if ONE"),
            (
                "    at = start + rows.to(tl.int64)[:, None] * token_stride + columns[None, :]\n    return",
                "    at = start + rows[:, None] * token_stride + columns[None, :]\n    return",
            ),
        ),
    ),
    (
        "kernels/ops/attention/triton_host.py",
        TRITON,
        (
            ("(0, grad_out.stride(0))", "(0, qkv.shape[-1] * qkv.shape[-2])"),
            ("if length <= most)", "if length < most + 2)"),
        ),
    ),
    (
        "kernels/ops/triton_kernel.py",
        IMAGES,
        (
            ("PATCH - 1 - 2 * (", "PATCH - 1 - ("),
            ("(bits - 0x3F3504F3) >> 23", "(bits - 0x3F000000) >> 23"),
            ("(place >= 0) & (place < places)", "(place >= 0)"),
            ("exists = exists & (element < ELEMENTS)", "exists = exists & (element <= ELEMENTS)"),
            ("tl.where(flip, place - column", "tl.where(place < 0, place - column"),
        ),
    ),
    (
        "kernels/ops/noisy_patches/triton_kernel.py",
        IMAGES,
        (("count * PER_PATCH, parts * Q)", "count * PER_PATCH, parts * parts * Q)"),),
    ),
    (
        "kernels/ops/denoising_loss/triton_kernel.py",
        IMAGES,
        (
            ("tl.store(counter, 0)", "tl.store(counter, 1)"),
            ("prediction -= first * patch_stride", "prediction -= 0 * patch_stride"),
            ("x - target, 0.0)", "x - target, 1.0)"),
            ("loss *= tl.load(weight + t,", "loss *= tl.load(weight + t * 0,"),
        ),
    ),
    (
        "kernels/ops/draw_batch/triton_kernel.py",
        IMAGES,
        (
            ("tl.where(below < wanted,", "tl.where(below <= wanted,"),
            ("(index <= most) & (left > 0)", "(index <= most)"),
            ("index <= most", "index < most"),
            ("while x >= images:", "while x > images:"),
            ("tl.load(n + sample - member)", "tl.load(n + sample)"),
        ),
    ),
    (
        "kernels/ops/triton_visible.py",
        ("tests/ops/test_images_triton.py", "-k", "parts or spilling"),
        (
            ("return -(-each // (turns * step)) if", "return -(-each // step) if"),
            ('"enable_fp_fusion": False', '"enable_fp_fusion": True'),
        ),
    ),
    (
        "csrc/cpu/entry.cpp",
        ("tests/test_library.py", "-k", "libgomp"),
        (("return MASKDIFF_SOURCE_VERSION;", 'return "0";'),),
    ),
    ("kernels/philox.py", ("tests/ops/test_philox.py",), (("n >> 32 & _LOW", "n & _LOW"),)),
    (
        "kernels/ops/attention/op.py",
        ("tests/ops/test_attention.py", "-k", "by_the_implementation_of_the_forward"),
        (("ctx.options = max_seqlen, scale, backend", 'ctx.options = max_seqlen, scale, "auto"'),),
    ),
    (
        "kernels/ops/structs.py",
        ("tests/ops/test_interface.py", "-k", "a_launch"),
        (("device.index or 0, stream", "0, stream"), ("torch.cuda.current_stream(device).cuda_stream", "None")),
    ),
    (
        "kernels/ops/denoising_loss/cuda.py",
        ("tests/emulation/test_visible.py", "-k", "side_by_side"),
        (("torch.cuda.is_current_stream_capturing()", "False"),),
    ),
    (
        "kernels/ops/attention/op.py",
        ("tests/ops/test_attention.py", "-k", "where_cuda_cannot"),
        (('dispatch.asked("attention", backend)[0]', "backend"),),
    ),
    (
        "kernels/ops/visible.py",
        (NOISY, "-k", "can_run or pinned"),
        (
            ("-(-size // 4)", "(size // 4)"),
            ("and not elsewhere and", "and"),
            ("> MOST_QUADS", ">= MOST_QUADS"),
            ("dispatch.asked(op, backend)[0]", "backend"),
        ),
    ),
    (
        "kernels/ops/denoising_loss/op.py",
        (LOSS, "-k", "by_the_implementation_of_the_forward"),
        (("ctx.backend = backend if compiled else", 'ctx.backend = "auto" or'),),
    ),
    ("kernels/ops/denoising_loss/reference.py", (LOSS,), (("shape[0] + grad_per_sample)", "shape[0])"),)),
    ("kernels/library.py", ("tests/test_install.py", "-k", "foreign or stale"), (("built != expected", "not built"),)),
    (
        "kernels/library.py",
        ("tests/ops/test_interface.py", "-k", "other_gpus"),
        (("minor < capability[1]", "minor <= 9"), ("built[-1][:2] < capability", "built[0][:2] < capability")),
    ),
    (
        "kernels/ops/draw_batch/reference.py",
        CAPTURE,
        (
            ("if n.is_cpu and bool(", "if bool("),
            ("-math.log2(outside / base**2)", "-math.log(outside / base**2)"),
            ("if read or outside == 0:", "if True:"),
        ),
    ),
    ("kernels/ops/denoising_loss/reference.py", CAPTURE, (("else cu.diff().long()", "else torch.bincount(sample)"),)),
    ("kernels/ops/samples.py", CAPTURE, (("place + across - 1 - 2 * (place % across), place)", "place, place)"),)),
    (
        "tests/emulation/instructions.h",
        ("tests/emulation/test_wrappers.py", "-k", "products or matrices"),
        (
            ("a[g + 8 * (i % 2)][c + h + 8 * (i / 2)]", "a[g + 8 * (i / 2)][c + h + 8 * (i % 2)]"),
            ("transposed ? l / 4 :", "!transposed ? l / 4 :"),
        ),
    ),
    (
        "kernels/dispatch.py",
        ("tests/ops/test_interface.py", "-k", "table or length or choice"),
        (
            ("if length <= most)", "if length < most)"),
            ("if any(a >= b for a, b in zip([0, *most]", "if any(a > b for a, b in zip([0, *most]"),
            ("for name in (key, kind)", "for name in (kind,)"),
            ('device_key(device) if name == "auto" else ""', "device.type"),
        ),
    ),
    (
        "kernels/dispatch.py",
        ("tests/ops/test_interface.py", "-k", "choice_by_op or using"),
        (
            ("        _using = before\n", "        pass\n"),
            ('.get(op, "auto"), "MASKDIFF_KERNELS"', '.get(op, "reference"), "MASKDIFF_KERNELS"'),
        ),
    ),
    (
        "benchmarks/records.py",
        ("tests/test_gpu_kernels.py",),
        (
            ("there / here for there, here", "here / there for there, here"),
            ("[old for old in self.rows if _place(old) != _place(row)]", "self.rows"),
            ('CODE = ("commit", "sources")', 'CODE = ("commit",)'),
        ),
    ),
    (
        "benchmarks/gpu_kernels.py",
        ("tests/test_gpu_kernels.py",),
        (
            ("if said := judge(found.result):", "if said := judge(call()):"),
            ("return 1 if runner.wrong else 0", "return 0"),
            ('getattr(call, "fresh", lambda: None)()', "pass"),
            ('or not rows[name]["error"]]', "]"),
        ),
    ),
    (
        "benchmarks/gpu_step.py",
        ("tests/test_gpu_step.py", "-k", "waits or skipped or own_kernels"),
        (
            ('        torch.cuda.set_sync_debug_mode("error")\n', ""),
            ("return case.name not in self.kept.of(", "return case.name in self.kept.of("),
            ("own_kernels(stand, case.mask) if case.name not in (OURS, *bench.BASELINES) else {}", "{}"),
        ),
    ),
    (
        "benchmarks/predict.py",
        ("tests/test_predict.py", "-k", "not holds"),
        (
            ("if key in needed}", "if key}"),
            ("1: 2 * gradients}", "1: gradients}"),
            (' / named["ema_every"]', ""),
        ),
    ),
    (
        "benchmarks/choices.py",
        ("tests/test_choices.py",),
        (
            ("if len(cases) == most}", "}"),
            ('if row.get("wrong")}', "if False}"),
            ('if row["card"] != card:', "if False:"),
            ("if len(revisions) > 1:", "if False:"),
            ('if row["shape"]["backward"]:', "if True:"),
            ("    if options.write:\n", "    if True:\n"),
        ),
    ),
    (
        "tests/emulation/instructions.h",
        PLAIN_FAULTS,
        (
            ("copy.group + open_groups >= f.group", "copy.group + open_groups > f.group"),
            ("__builtin_memcpy(to, nan, 16);", "(void)nan;"),
        ),
    ),
    (
        "tests/emulation/emulator.h",
        PLAIN_FAULTS,
        (("if (m.arrived && (m.line != line || m.what != what))", "if (m.arrived && m.what != what)"),),
    ),
)

MUTANTS = tuple(Mutant(file, old, new, tests) for file, tests, faults in PLANTED + TRAINER for old, new in faults)
