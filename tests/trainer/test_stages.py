"""The string that describes stages: grammar, exact errors, round trip, and the course of the learning rate."""

import math
from dataclasses import replace

import pytest

from maskdiff.errors import UserError
from maskdiff.masking import group_size
from maskdiff.stages import (
    Stage,
    cut_short,
    fit,
    format_stages,
    learning_rate,
    micro_batch,
    micro_batches,
    minutes_of,
    parse_stages,
    share_time,
    templates,
    tokens_of,
    warmup_too_long,
)
from maskdiff_kernels import Mask


def test_the_grammar():
    text = "block4:0.9 x5000 b256 lr2e-4 w500, patch:0.5-0.9 x1000 b64, dense 10m b64"
    assert parse_stages(text) == (
        Stage("block4:0.9", steps=5000, batch=256, lr=2e-4, warmup=500),
        Stage("patch:0.5-0.9", steps=1000, batch=64),
        Stage("dense", minutes=10.0, batch=64),
    )
    assert parse_stages("crop5 fresh cosine c1.0 t8192 1.5h") == (
        Stage("crop5", minutes=90.0, batch=None, tokens=8192, clip=1.0, decay="cosine", fresh=True),
    )
    assert parse_stages("dense x5 b64/16, dense x5 t99/auto, dense x5 bauto") == (
        Stage("dense", steps=5, batch=64, micro_batch=16),
        Stage("dense", steps=5, batch=None, tokens=99, micro_batch="auto"),
        Stage("dense", steps=5, micro_batch="auto"),
    )
    assert parse_stages("dense .5m cool0.3 c0") == (Stage("dense", minutes=0.5, cool=0.3),)


def test_words_come_in_any_order():
    words = ["x10", "b8", "lr0.1", "w2", "c3", "cosine", "fresh"]
    expected = parse_stages("dense " + " ".join(words))
    assert parse_stages("dense " + " ".join(reversed(words))) == expected
    assert parse_stages("  dense   " + "   ".join(words) + " ") == expected


def test_what_is_left_out_comes_from_the_templates():
    masked = Stage("patch:0.5", steps=7, batch=256, lr=1e-3, warmup=9, clip=1.0, cool=0.3, fresh=True)
    dense = Stage("dense", steps=7, batch=16, lr=1e-4)
    first, second = parse_stages("block2:0.9 x3, dense 5m c2", *templates((masked, dense)))
    assert first == replace(masked, mask="block2:0.9", steps=3, fresh=False)
    assert second == replace(dense, steps=None, minutes=5.0, clip=2.0)
    assert parse_stages("dense x1 const", masked, masked)[0].cool == 0
    assert parse_stages("dense x1 cool0.5", masked, replace(dense, decay="cosine"))[0].decay == "const"
    assert parse_stages("dense x1 c0", masked, masked)[0].clip is None
    assert parse_stages("dense x1 t99", masked, masked)[0].batch is None
    assert parse_stages("dense x1 b9", masked, replace(masked, batch=None, tokens=99))[0].tokens is None
    parts = replace(masked, micro_batch="auto")
    assert parse_stages("dense x1 lr1, dense x1 b9", masked, parts) == (
        replace(parts, mask="dense", steps=1, lr=1.0, fresh=False),
        replace(masked, mask="dense", steps=1, batch=9, fresh=False),
    )
    assert templates((masked,)) == (masked, masked) and templates((dense,)) == (dense, dense)
    assert templates(()) == (Stage(), Stage())


@pytest.mark.parametrize(
    "stage",
    [
        Stage("patch:0.75", steps=1),
        Stage("dense", minutes=1 / 3, batch=None, tokens=99, lr=1 / 3, warmup=7, clip=0.1, decay="cosine", fresh=True),
        Stage("crop5", steps=10**9, lr=1e-9, cool=0.3),
        Stage("block4:0.5-0.9", minutes=90.0, lr=5.0, clip=1e-3, micro_batch=16),
        Stage("dense", steps=5, batch=None, tokens=99, micro_batch="auto"),
    ],
)
def test_round_trip(stage):
    foreign = Stage("dense", batch=None, tokens=5, lr=9.0, warmup=9, clip=9.0, cool=0.9)
    text = format_stages((stage, stage))
    assert parse_stages(text) == (stage, stage)
    assert parse_stages(text, foreign, foreign) == (stage, stage)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["the text is empty", "first KIND:RATE"]),
        ("dense x5,", ["stage 2 (--stages.1) is empty"]),
        ("dense x5, , dense x5", ["stage 2 (--stages.1) is empty"]),
        ("dense b64", ["stage 1 (--stages.0) 'dense b64' has no length", "x5000", "10m"]),
        ("dense", ["has no length"]),
        ("x500 dense", ["stage 1 (--stages.0)", "'x500' (character 1)", "start with dense"]),
        ("dense x5, pach:0.5 x5", ["stage 2 (--stages.1), character 11", "'pach'", "'patch'"]),
        ("patch x5", ["stage 1 (--stages.0)", "the rate is missing", "patch:0.75"]),
        ("patch:0.75 x5 b64 cosin", ["stage 1 (--stages.0)", "'cosin' (character 19)", "did you mean 'cosine'"]),
        ("dense x5, dense x5 constt", ["stage 2 (--stages.1)", "(character 20)", "'const'"]),
        ("dense x5 l2e-4", ["'l2e-4'", "'lr2e-4'"]),
        ("dense x5 batch64", ["'batch64'", "'b64'"]),
        ("dense x5 warmup500", ["'w500'"]),
        ("dense x5 frsh", ["'fresh'"]),
        ("dense 500steps", ["'x5000'"]),
        ("dense x5 bx", ["'bx'", "no such word", "a stage is first KIND:RATE"]),
        ("dense x5 b", ["'b'", "not of the form 'b64'"]),
        ("dense x5.5", ["'x5.5'", "not of the form 'x5000'"]),
        ("dense x5 b-4", ["'b-4'", "not of the form 'b64'"]),
        ("dense x5 b64/x", ["not of the form 'b64/16' or 'b64/auto'"]),
        ("dense x5 t99/0", ["takes more than 0 at a time, such as 't99/16'"]),
        ("dense x5 b64/16 bauto", ["batch again, after 'b64/16'"]),
        ("dense x5 lr", ["not of the form 'lr2e-4'"]),
        ("dense x0", ["'x0' (character 7)", "more than 0"]),
        ("dense x5 b0", ["more than 0"]),
        ("dense x5 lr0", ["more than 0"]),
        ("dense 0m", ["more than 0"]),
        ("dense x5 lr1e999", ["too large"]),
        ("dense x5 cool1.5", ["'cool1.5'", "up to 1"]),
        ("dense x5 10m", ["'10m' (character 10)", "length again", "after 'x5'"]),
        ("dense x5 b64 t99", ["batch again", "after 'b64'"]),
        ("dense x5 lr1 lr2", ["learning rate again"]),
        ("dense x5 const cosine", ["decay again", "after 'const'"]),
        ("dense x5 fresh fresh", ["fresh again"]),
        ("patch:0.75 x5 dense x5", ["'dense' (character 15)", "put a comma before it"]),
        ("dense x5; dense x5", ["'x5;'"]),
    ],
)
def test_errors_say_where_and_what(text, words):
    with pytest.raises(UserError) as error:
        parse_stages(text)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


GRID = (8, 8)


def test_a_token_budget_is_filled_with_whole_images():
    assert fit(Stage("dense", batch=48), GRID, 2) == (48, Mask("dense", 0, (64,)))
    assert fit(Stage("dense", batch=None, tokens=1000), GRID, 1)[0] == 15
    assert fit(Stage("patch:0.75", batch=None, tokens=1000), GRID, 2) == (55, Mask("patch", 0, (16,)))
    assert fit(Stage("dense", batch=None, tokens=65), GRID, 1)[0] == 1
    with pytest.raises(UserError, match="64 tokens .* an image of 65 tokens; give t65 or more"):
        fit(Stage("dense", batch=None, tokens=64), GRID, 1)


@pytest.mark.parametrize("mask", ["patch:0.5-0.9", "block2:0.1-0.9", "crop:0.3-0.97"])
def test_a_range_takes_whole_groups_and_keeps_to_its_token_budget(mask):
    for tokens in range(150, 3000, 37):
        batch, fitted = fit(Stage(mask, batch=None, tokens=tokens), GRID, 2)
        assert len(fitted.counts) == group_size(batch) > 1 and batch % len(fitted.counts) == 0
        assert fit(Stage(mask, batch=batch), GRID, 2) == (batch, fitted)
        used = tokens_of(fitted, batch, 2)
        assert used == sum(fitted.counts[i % len(fitted.counts)] + 2 for i in range(batch))
        assert 0.9 * tokens - 66 < used <= tokens  # an image has at most 66
    with pytest.raises(UserError, match="an image of .* tokens; give t"):
        fit(Stage(mask, batch=None, tokens=10), GRID, 2)


@pytest.mark.parametrize("size", [{"batch": 1}, {"batch": None, "tokens": 30}])
def test_a_range_takes_more_than_one_image(size):
    with pytest.raises(UserError, match="spread over the images .* give b16 or more, or one rate such as patch:0.7$"):
        fit(Stage("patch:0.5-0.9", **size), GRID, 1)


def test_micro_batches_are_equal_parts_of_whole_groups():
    dense, ranged = fit(Stage(batch=60), GRID, 1), fit(Stage("patch:0.5-0.9", batch=64), GRID, 1)
    assert micro_batches(*dense) == [1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60]
    assert micro_batches(*ranged) == [16, 32, 64]
    asked = {None: 60, "auto": None, 1: 1, 16: 15, 59: 30, 61: 60}
    assert {words: micro_batch(Stage(micro_batch=words), *dense) for words in asked} == asked
    assert micro_batch(Stage(micro_batch=63), *ranged) == 32


def test_a_time_budget_is_shared_as_the_stages_say():
    assert [minutes_of(time) for time in ("90s", "30m", "1h30m", 7.5)] == [1.5, 30, 90, 7.5]
    stages, step_ms = parse_stages("patch:0.75 x600 w50, dense x300, block2:0.5 0.5m"), [50.0, 200.0, 7.0]
    lengths = share_time(stages, step_ms, 4.0)  # 30, 60 and 30 s by themselves: twice that
    assert lengths == [1200, 600, int(60e3 / 7)]
    assert sum(steps * ms for steps, ms in zip(lengths, step_ms, strict=True)) <= 4 * 60e3
    assert share_time(stages, step_ms, 0.171)[0] == 51
    with pytest.raises(
        UserError, match=r"42 steps .*stages.0. 'patch:0.75', of 50.0 ms, .* has 50; give 0.17m or more"
    ):
        share_time(stages, step_ms, 0.141)
    with pytest.raises(UserError, match="0 steps would be left to stage 1 .--stages.0. 'dense'.* give 0.02m or more"):
        share_time(parse_stages("dense x2"), [1000.0], 0.9 / 60)


def test_learning_rate():
    constant = Stage(lr=2.0)
    assert [learning_rate(constant, i, 4) for i in range(4)] == [2.0] * 4
    warm = Stage(lr=2.0, warmup=4)
    assert [learning_rate(warm, i, 10) for i in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    cosine = [learning_rate(Stage(lr=2.0, warmup=10, decay="cosine"), i, 110) for i in range(110)]
    assert cosine[10] == 2.0 and cosine[60] == pytest.approx(1.0) and 0 < cosine[109] < 0.001
    assert all(a > b for a, b in zip(cosine[10:], cosine[11:], strict=False))
    assert cosine[35] == pytest.approx(2 * math.cos(math.pi / 8) ** 2)
    cool = [learning_rate(Stage(lr=2.0, cool=0.3), i, 100) for i in range(100)]
    assert cool[:71] == [2.0] * 71 and cool[85] == pytest.approx(1.0) and cool[99] == pytest.approx(2 / 30)
    assert learning_rate(Stage(lr=2.0, warmup=50, decay="cosine"), 5, 10) == pytest.approx(
        0.24
    )  # warm-up beyond the end


@pytest.mark.parametrize(
    ("most", "words"),
    [
        (3, "after 3 of the 5 steps of stage 1 (--stages.0), dense; 2 stages after it will not begin"),
        (5, "before stage 2 (--stages.1), patch:0.5; 1 stage after it will not begin"),
        (8, "after 3 of the 4 steps of stage 2 (--stages.1), patch:0.5; 1 stage after it will not begin"),
        (10, "after 10 steps, or with its last stage: stage 3 (--stages.2) is given by time"),
    ],
)
def test_what_a_bound_on_the_steps_cuts(most, words):
    stages = parse_stages("dense x5, patch:0.5 x4, dense 1m")
    assert cut_short(stages, [5, 4, None], most) == f"the run ends {words}"
    assert cut_short(stages, [5, 4, 6], 15) is None


def test_a_warm_up_longer_than_its_stage():
    (stage,) = parse_stages("dense x10 lr1e-3 w20")
    told = warmup_too_long(1, stage, 10)
    assert told is not None and told.startswith("stage 2 (--stages.1) has 10 steps and a warm-up of 20: ")
    assert "ends at 0.0005 and never is 0.001" in told
    assert warmup_too_long(1, stage, 20) is None
