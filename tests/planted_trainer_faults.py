"""The faults that `make mutants` plants in maskdiff/, and the tests that must notice each: see planted_faults.py."""

CAPTURE = ("tests/trainer/test_capture.py", "-k", "not runs_are_the_same and not planted")


def trainer(*modules: str) -> tuple[str, ...]:
    return tuple(f"tests/trainer/test_{module}.py" for module in modules)


# File, tests that must notice, faults (old text, new text).
TRAINER: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, str], ...]], ...] = (
    (
        "maskdiff/masking.py",
        trainer("masking"),
        (
            ("return n - int(rate * n)\n", "return int(n - rate * n)\n"),
            ("// area * area", "// plan.size * plan.size"),
            ("(i + 0.5) / group", "i / group"),
        ),
    ),
    ("maskdiff/masking.py", trainer("step"), (("10 * (n - visible) // n", "(10 * (n - visible) - 1) // n"),)),
    (
        "maskdiff/diffusion.py",
        trainer("diffusion"),
        (
            ("kept[1:] / kept[:-1]", "kept[1:] / kept[0]"),
            ("return alpha * eps - sigma * x0", "return alpha * eps + sigma * x0"),
            ('"v": on_x0 / (snr + 1)', '"v": on_x0 / snr'),
        ),
    ),
    (
        "maskdiff/model.py",
        trainer("model", "pretrained"),
        (
            ("skip=index > half", "skip=index >= half"),
            ("[time + extra_rows[-1]]", "[time + extra_rows[0]]"),
            ("F.embedding(keep_ids, patch_rows)", "patch_rows[: keep_ids.shape[1]]"),
            ("cut.permute(0, 2, 4, 3, 5, 1)", "cut.permute(0, 2, 4, 5, 3, 1)"),
            ("there.any(1, keepdim=True)", "there.all(1, keepdim=True)"),
            ('config.patches if config.position == "learned" else 0', "config.patches"),
            ("column[(column < -1) | (column >= values)]", "column[(column < -1) | (column > values)]"),
        ),
    ),
    (
        "maskdiff/optim.py",
        trainer("optim"),
        (
            ("math.inf if hyper.clip is None else hyper.clip", "math.inf"),
            ("low=self.low[start:end] if start < self.low.numel() else None", "low=None"),
            ("decays=[segment.decay for", "decays=[segment.low for"),
            ("ema2_decay=state.averages[-1]", "ema2_decay=state.averages[0]"),
            ("ema_every=config.ema_every", "ema_every=1"),
            ("for average in (self.ema, self.ema2):", "for average in (self.ema,):"),
        ),
    ),
    (
        "maskdiff/precision.py",
        trainer("precision"),
        (
            ("for _ in range(6):", "for _ in range(1):"),
            ("return GAIN * best", "return 1.0 * best"),
            ('or (name == "auto" and before == "float32")', ""),
            ("and before is None and", "and"),
            ("        torch.set_num_threads(threads)\n", "        pass\n"),
        ),
    ),
    (
        "maskdiff/study/asked.py",
        trainer("precision"),
        (('if config.precision == "auto" and saved is not None:', "if False:"),),
    ),
    ("maskdiff/sample.py", trainer("precision"), (('"auto", device, trained)', '"auto", device)'),)),
    (
        "maskdiff/config.py",
        trainer("config"),
        (
            ("since = (0 if stage.fresh else since) +", "since = since +"),
            ("or config.stages[number + 1].fresh", ""),
        ),
    ),
    (
        "maskdiff/optim.py",
        trainer("overlap"),
        (
            ("        for hook in self.hooks:\n            hook.remove()\n", ""),
            ("        state.level_counts()\n        for part", "        for part"),
            ("        if not missing:\n", "        if len(missing) < 2:\n"),
            ("                self.read += grads\n", ""),
            ("if self.read and self.state.beside is not None", "if self.state.beside is not None"),
            ("current_stream(self.state.beside.device).wait_stream(self.state.beside)", "current_stream(0)"),
            ("beside.wait_stream(torch.cuda.current_stream(beside.device))", "pass"),
            ("return torch.linalg.vector_norm(norms), skipped.amax()", "return norms.sum(), skipped.amax()"),
            ("skipped.amax()", "skipped[-1]"),
        ),
    ),
    (
        "maskdiff/step.py",
        trainer("step", "training"),
        (
            ("state.next_sample.add_(batch)", "state.next_sample.add_(1)"),
            (".masked_fill(batch.drop_label[:, None], -1)", ""),
            ("0.0).sum(0) / inside.sum(0)", "0.0).sum(0) / len(per_sample)"),
        ),
    ),
    (
        "maskdiff/step.py",
        CAPTURE,
        (
            ("n = state.next_sample +", "n = state.sample +"),
            ("torch.zeros_like(drawn_ids)", "drawn_ids"),
            ("if source.store.slots is not None:", "if source.store.slots is not None and bool(drawn_ids[0] >= 0):"),
        ),
    ),
    (
        "maskdiff/optim.py",
        CAPTURE,
        (
            ("self.next_sample.fill_(number)", "self.next_sample = torch.tensor(number)"),
            ("                param.grad = None  # of", "                pass  # of"),
        ),
    ),
    (
        "maskdiff/capture.py",
        CAPTURE,
        (
            ("with self.state.kept():", "if True:"),
            ("key = mask, batch, micro\n", "key = mask, 0, micro\n"),
            ("        self.state.made_step(batch)\n", ""),
            ("range(first, first + batch, micro)", "range(first, first + 1, micro)"),
        ),
    ),
    (
        "maskdiff/capture.py",
        trainer("reading"),
        (("shape.staging.settle()", "pass"),),
    ),
    (
        "maskdiff/reading.py",
        trainer("reading"),
        (
            ("or self.coming[0][0] != first:", "or False:"),
            ("(1 + len(self.coming)) * self.batch", "len(self.coming) * self.batch"),
            ("for _ in range(AHEAD)]", "for _ in range(1)]"),
            ("None if plain else stay_on_one_thread", "None"),
            ("if size <= fitting else", "if size < fitting else"),
        ),
    ),
    (
        "maskdiff/ragged.py",
        trainer("ragged", "model"),
        (
            ("extras * (sample + 1)", "extras * sample + 1"),
            ("cu_patches + extras * torch.arange(batch + 1", "cu_patches + 0 * torch.arange(batch + 1"),
        ),
    ),
    (
        "maskdiff/stages.py",
        trainer("stages"),
        (
            ("(step + 1) / stage.warmup", "step / stage.warmup"),
            ("            batch -= 1", "            break"),
            (" if batch % size == 0]", "]"),
            ("(stage.warmup + 1) / length", "stage.warmup / length"),
        ),
    ),
    (
        "maskdiff/step.py",
        trainer("micro_batches"),
        (
            ("state.gradients(), alpha=1 / parts)", "state.gradients(), alpha=1)"),
            ("by_tenth]), alpha=1 / parts)", "by_tenth]))"),
            ("    state.sums.zero()\n", ""),
        ),
    ),
    (
        "maskdiff/optim.py",
        trainer("micro_batches"),
        (('            if "sums" in vars(self):\n                self.sums.zero()\n', ""),),
    ),
    ("maskdiff/model.py", trainer("micro_batches"), (("if self.recompute and ", "if False and "),)),
    (
        "maskdiff/memory.py",
        trainer("micro_batches"),
        (
            ("+ slope * (size - other[0])", "+ slope"),
            ("for size in reversed(sizes):", "for size in sizes:"),
            ("peak is None or peak > room", "peak is None"),
        ),
    ),
    ("maskdiff/training.py", trainer("micro_batches"), (("if plan.asked != asked:", "if False:"),)),
    ("maskdiff/packing/sources.py", (*trainer("sources"), "-k", "list"), (("if row[-1] == value and", "if"),)),
    ("maskdiff/data.py", (*trainer("data"), "-k", "subset"), (("ids[torch.from_numpy(chosen)]", "ids"),)),
    ("maskdiff/study/cells.py", trainer("transfer"), ((' | cell.get("before", {})', ""),)),
    (
        "maskdiff/transfer.py",
        trainer("transfer"),
        (
            ("needed and not (judged and trained):", "needed and not judged:"),
            ("    if share != 1:", "    if share < 0:"),
            ('config, init=weights, init_weights=cell["weights"])', "config, init=weights)"),
        ),
    ),
    ("maskdiff/pretrained.py", trainer("pretrained"), (("model = model.resized(config.image_size)", "pass"),)),
    (
        "maskdiff/training.py",
        (*trainer("training"), "-k", "budget"),
        (("(now.steps, now.minutes) != (before.steps, before.minutes)", "now != before"),),
    ),
    ("maskdiff/presets.py", trainer("presets"), (("lr1e-5 w5000", "lr1e-4 w5000"),)),
    (
        "maskdiff/flops.py",
        trainer("flops"),
        (("for count in counts) / len(counts)", "for count in [sum(counts) / len(counts)])"),),
    ),
    (
        "maskdiff/packing/decode.py",
        trainer("decode"),
        (
            ("if turn not in (_TURNS[2]", "if turn in (_TURNS[2]"),
            ("return Image.fromarray(((gray * 255 + 32767) // 65535)", "return Image.fromarray((gray // 257)"),
        ),
    ),
    (
        "maskdiff/packing/look.py",
        (*trainer("sources"), "-k", "recipes"),
        (("(25, 57, 128)", "(57, 25, 128)"),),
    ),
    (
        "maskdiff/packing/sources.py",
        (*trainer("sources"), "-k", "nested"),
        (("return np.sort(np.argsort(", "return (np.argsort("),),
    ),
    (
        "maskdiff/packing/archives.py",
        (*trainer("hostile"), "-k", "lead_out or no_files"),
        (('{"..", "\\0"} & set', '{"\\0"} & set'), ("if not member.isreg() or", "if")),
    ),
    (
        "maskdiff/packing/tables.py",
        (*trainer("sources"), "-k", "every_kind or interruptions"),
        (("at < first + rows", "at <= first + rows"),),
    ),
    (
        "maskdiff/packing/labels.py",
        (*trainer("sources"), "-k", "labels"),
        (("of.get(_key(attribute, value), -1)", "of.get(_key(attribute, value), 0)"),),
    ),
    (
        "maskdiff/packing/journal.py",
        (*trainer("pack"), "-k", "crash"),
        (("if padded or not np.array_equal(keys_of(shape.images(rows)), entry.keys):", "if padded:"),),
    ),
    (
        "maskdiff/packing/writer.py",
        (*trainer("pack"), "-k", "crash or copies"),
        (("            self._names.setdefault(key, name)\n", "            pass\n"),),
    ),
    (
        "maskdiff/packing/check.py",
        (*trainer("data"), "-k", "altered_pixel or wrong_arrays"),
        (("if running.hexdigest() != expected:", "if number and running.hexdigest() != expected:"),),
    ),
    (
        "maskdiff/bench.py",
        trainer("bench"),
        (
            ('if name != "published"), default', "if name), default"),
            (
                'clock.mark) -> None:\n                prediction.register_hook(lambda grad: mark("loss backward"))',
                'clock.mark) -> None:\n                prediction.register_hook(lambda grad: mark("backward"))',
            ),
        ),
    ),
    ("maskdiff/bench_kernels.py", trainer("bench"), (("excess = ms - dense_ms / ideal", "excess = ms - dense_ms"),)),
    (
        "maskdiff/sampling.py",
        trainer("sampling", "samplers"),
        (
            ("scheduler.timesteps = scheduler.timesteps[: sampler.steps]", "pass"),
            ("2 * (t - following) + 1)", "2 * (t - following) + 3)"),
            ("levels[0] ** (1 / RHO)", "levels[10] ** (1 / RHO)"),
            ("torch.sin(weights * angle) / torch.sin(angle)", "weights"),
            ("return unconditional + guidance", "return conditional + guidance"),
        ),
    ),
    (
        "maskdiff/diffusion.py",
        trainer("samplers"),
        (("t.double() - below)", "t.double() * 0)"),),
    ),
    (
        "maskdiff/folder.py",
        trainer("samplers"),
        (("if not _complete(_file(folder, number))", "if not _file(folder, number).exists()"),),
    ),
    (
        "maskdiff/training.py",
        (*trainer("training"), "-k", "retained or plan"),
        (("self.dense_ms / step_ms / self.ideal", "self.dense_ms / step_ms"),),
    ),
    (
        "maskdiff/training.py",
        (*trainer("training"), "-k", "finished or last_images"),
        (
            ("if self._was_over():", "if False:"),
            ("or self._sheet().exists()", "or True"),
            ("self.state.step, stopped_by)", "self.state.step, self.stopped_by)"),
        ),
    ),
    ("maskdiff/stages.py", trainer("stages"), (("if left < length:", "if left <= length:"),)),
    (
        "maskdiff/options.py",
        (*trainer("config"), "-k", "hints"),
        (("if begun is None or _is_free", "if True or _is_free"),),
    ),
    (
        "maskdiff/loggers.py",
        trainer("loggers"),
        (
            ("step + 1 if folder.exists() else None", "None"),
            ("if step > self._written:", "if True:"),
            ("id=known or None", "id=None"),
        ),
    ),
    (
        "maskdiff/runlog.py",
        trainer("loggers"),
        (('or "heldout_loss" in row', ""), ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB")),
    ),
    (
        "maskdiff/watch.py",
        trainer("watch"),
        (
            ('if row["step"] <= self.row.get("step", 0):', "if False:"),
            ("if stream.seek(0, os.SEEK_END) < self._read:", "if False:"),
            ("self.recent.clear()", "pass"),
            ("means = [mean(", "means = [sum("),
        ),
    ),
    (
        "maskdiff/study/verdict.py",
        trainer("verdict"),
        (
            ("1 - LEVEL ** (1 / max(1, count))", "1 - LEVEL"),
            ("squares / freedom", "squares / (freedom + 1)"),
            ("if gap.told_apart and gap.mean < 0}", "if gap.mean < 0}"),
            ("gap.low is not None and gap.low > 0 for gap in gaps", "gap.mean > 0 for gap in gaps"),
            ("- block + whole) ** 2", ") ** 2"),
            ("one.variance * one.freedom", "one.variance"),
        ),
    ),
    (
        "maskdiff/study/results.py",
        trainer("report"),
        (
            ("min(gains) >= 0 and max(gains) > 0", "max(gains) > 0"),
            ("(above - target) / (above - value)", "(above - target) / above"),
            ('/ (row["flops"] / row["batch"])', '/ row["flops"]'),
        ),
    ),
    (
        "maskdiff/study/page.py",
        trainer("report"),
        (
            (r'.replace("<", "\\u003c")', ""),
            ("main{overflow-wrap:anywhere;", "main{"),
            ("<dd>{escape(value)}</dd>", "<dd>{value}</dd>"),
        ),
    ),
    (
        "maskdiff/study/transfer_report.py",
        trainer("report"),
        (
            ("study.title, pair.scratch()) for pair", "study.title, pair.short()) for pair"),
            ("_tuned(pair, key), measure, SCRATCH, beside)", "_tuned(pair, key), measure, SCRATCH)"),
            ("LOSS, pair.scratch())", "LOSS, pair.short())"),
        ),
    ),
    (
        "maskdiff/packing/labels.py",
        (*trainer("sources"), "-k", "folders_above"),
        (("len(os.path.commonprefix(parts)) if parts else 0", "0"),),
    ),
    (
        "maskdiff/study/plan.py",
        trainer("sweep"),
        (
            ("Part(mask, 1 - finetune)", "Part(mask, finetune)"),
            ("fresh = not first and dense.fresh", "fresh = dense.fresh"),
            ("min(pattern.warmup, steps // 5)", "pattern.warmup"),
        ),
    ),
    (
        "maskdiff/study/clock.py",
        trainer("sweep"),
        (('old.step_ms("dense") / new.step_ms("dense")', 'new.step_ms("dense") / old.step_ms("dense")'),),
    ),
    (
        "maskdiff/study/cells.py",
        trainer("sweep"),
        (
            ('_after(before, stages[stage], stages[stage]["steps"])', "before"),
            ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
        ),
    ),
    ("maskdiff/study/study.py", trainer("sweep"), (('len(plan["points"]) * each', "each"),)),
    (
        "maskdiff/metrics.py",
        trainer("metrics"),
        (
            ("products / (count - 1)", "products / count"),
            ("n_neighbors=max(NEIGHBOURS)", "n_neighbors=max(NEIGHBOURS) + 1, metric='manhattan'"),
            ("recalled |= (distances <= own[:, None])", "recalled |= (distances <= near)"),
            ("dense / (NEIGHBOURS[1] * count)", "dense / (NEIGHBOURS[0] * count)"),
            ("torch.manual_seed(KID_SEED)", "pass"),
            ("-{extractor.digest}-{numbers}", "-{numbers}"),
            ("-{numbers}-", "-"),
            ("not all(tensor.isfinite()", "any(tensor.isnan()"),
        ),
    ),
    (
        "maskdiff/features.py",
        trainer("features"),
        (
            ("if sha256 == INCEPTION_SHA256:", 'if name.startswith("inception"):'),
            ("str(path), INCEPTION_SHA256)", "str(path))"),
            ("gain = 2 ** (LEVELS - 1 - level)", "gain = 2 ** level"),
        ),
    ),
    (
        "maskdiff/nearest.py",
        trainer("evaluate"),
        (("places + start", "places"), ("best / points.shape[1] ** 0.5", "best")),
    ),
    (
        "maskdiff/evaluate.py",
        trainer("evaluate"),
        (
            ("ids = torch.arange(len(packed))", "ids = packed.train_ids"),
            ("sampling.seeded(model.config, options.seed)", "sampling.seeded(model.config, 0)"),
        ),
    ),
)
