"""benchmarks/choices.py: which implementation measured rows make the choice for a device."""

import json
import math

import choices
import pytest
import records

from maskdiff_kernels import dispatch


def measured(implementation: str, longest: int, ms: float | None, case: str = "x", **more) -> records.Row:
    shape = {"longest": longest, "backward": True}
    row = {"op": "attention", "case": f"{case}{longest}", "shape": shape, "dtype": "bf16", "device": "cuda:9.0"}
    row |= {"implementation": implementation, "ms": ms and {"p50": ms}, "error": None if ms else "cannot"}
    return {"card": "a card", "commit": "one", **row, **more}


def test_choice_by_length():
    times = {"cuda": 1.0, "sdpa": 2.0, "torch_flash": 0.1, "xformers": 0.1}
    rows = [measured(name, n, ms) for n in (27, 65) for name, ms in times.items()]
    rows += [measured("torch", 0, 0.1) | {"op": "sum"}]  # no op of ours
    assert choices.chosen(rows) == {"cuda:9.0": {"attention": "cuda"}}  # a peer is no choice, nor an optional package
    rows += [measured("cuda", 257, None), measured("sdpa", 257, 3.0), measured("explicit", 257, 4.0)]
    assert choices.chosen(rows) == {"cuda:9.0": {"attention": [[65, "cuda"], [None, "sdpa"]]}}
    rows += [measured("sdpa", 288, 1.02), measured("explicit", 288, 1.0)]  # not faster by enough
    assert choices.chosen(rows)["cuda:9.0"]["attention"] == [[65, "cuda"], [None, "sdpa"]]
    rows += [measured("sdpa", 512, 1.1), measured("explicit", 512, 1.0)]
    assert choices.chosen(rows)["cuda:9.0"]["attention"] == [[65, "cuda"], [288, "sdpa"], [None, "explicit"]]
    forward = [measured("explicit", 27, 0.1)]
    forward[0]["shape"]["backward"] = False
    assert choices.chosen(rows + forward) == choices.chosen(rows)


def test_what_ran_fewer_cases_is_no_choice():
    rows = [measured("cuda", 27, 1.0), measured("sdpa", 27, 2.0), measured("sdpa", 27, 0.01, "y")]
    assert choices.fastest(rows) == "sdpa"
    rows += [measured("cuda", 27, 0.001, "y"), measured("cuda", 27, None, "z"), measured("explicit", 27, 0.1, "z")]
    assert choices.fastest(rows) == "cuda"  # nor does what ran another case alone keep the rest from a choice
    assert choices.fastest([measured("cuda", 27, 1.0), measured("sdpa", 27, 1.0, "y")]) is None
    assert choices.fastest([measured("cuda", 27, None)]) is None


def test_what_was_wrong_once_is_no_choice():
    right = [measured("cuda", 27, 1.0), measured("sdpa", 27, 2.0), measured("sdpa", 65, 2.0)]
    wrong = {**measured("cuda", 65, None), "wrong": True}
    assert choices.chosen([*right, wrong]) == {"cuda:9.0": {"attention": "sdpa"}}
    other = {**wrong, "device": "cuda:8.0"}
    assert choices.chosen([*right, other])["cuda:9.0"] == {"attention": [[27, "cuda"], [None, "sdpa"]]}


def test_rows_of_several_cards_or_revisions_do_not_mix():
    row = measured("cuda", 27, 1.0)
    for key, said in (("card", "cuda:9.0: got rows of a card and other"), ("commit", "revisions one/None, other/None")):
        with pytest.raises(ValueError, match=said):
            choices.chosen([row, measured("sdpa", 27, 2.0, **{key: "other"})])
    with pytest.raises(ValueError, match="cuda:9.0 attention: got rows of revisions one/None, one/x, takes one's"):
        choices.chosen([row, measured("sdpa", 27, 2.0, sources="x")])
    peer = measured("torch_flash", 27, 1.0, commit="other")
    draws = {**measured("reference", 27, 1.0, commit="other"), "op": "draw_batch"}
    assert choices.chosen([row, peer, draws]) == {"cuda:9.0": {"attention": "cuda", "draw_batch": "reference"}}


def test_the_table_is_rewritten_on_request_alone(tmp_path, capsys):
    table, rows = tmp_path / "choices.json", tmp_path / "rows.json"
    table.write_text(choices.TABLE.read_text())
    measured_rows = [measured("cuda", 65, 1.0), measured("cuda", 288, None), measured("sdpa", 288, 1.0)]
    measured_rows += [
        {**measured(name, 1, ms), "op": "draw_batch", "shape": {}, "device": "cpu:avx2"}
        for name, ms in (("cpp", 1.0), ("reference", 2.0), ("torch", 0.1))
    ]
    rows.write_text(json.dumps(measured_rows))
    before = table.read_text()
    assert choices.main([str(rows)], table) == 0 and table.read_text() == before
    assert 'cuda:9.0 attention: null -> [[65, "cuda"], [null, "sdpa"]]' in capsys.readouterr().out
    assert choices.main([str(rows), "--write"], table) == 0
    found = dispatch.read_table(table.read_text())
    assert found["cuda:9.0"] == {"attention": ((65, "cuda"), (math.inf, "sdpa"))}
    assert found["cpu:avx2"] == {"draw_batch": "cpp"}
    assert {name: found[name] for name in ("cpu", "cuda")} == dispatch.read_table(before)
    assert choices.text(json.loads(before)) == before
    rows.write_text("[1]")
    assert choices.main([str(rows), "--write"], table) == 1 and "no file of measured" in capsys.readouterr().err
