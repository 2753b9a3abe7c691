"""The benchmarks of options in whole steps, on a small model: they run, and their ratios follow from their times."""

import json

import attention_in_step
import pytest
import update_in_step


def run(module, monkeypatch, path, *options):
    argv = [module.__name__, "--preset=digits", "--batch=2", "--rounds=2", "--precision=fp32", f"--json={path}"]
    monkeypatch.setattr("sys.argv", [*argv, *options])
    module.main()
    return json.loads(path.read_text())


def test_update_in_step(monkeypatch, tmp_path, capsys):
    stood = []
    stand = update_in_step.bench.Bench

    def watched(*arguments):
        stood.append(stand(*arguments).state)
        return stand(*arguments)

    monkeypatch.setattr(update_in_step.bench, "Bench", watched)
    result = run(update_in_step, monkeypatch, tmp_path / "rows.json", "--rates=0,0.5")
    assert [(len(state.adams) > 1, state.config.ema_every) for state in stood] == [
        (False, 1), (True, 1), (False, 10), (True, 10),
    ]  # fmt: skip
    rows = result["rows"]
    assert [(row["rate"], row["form"]) for row in rows] == [(r, f) for r in (0, 0.5) for f in update_in_step.FORMS]
    assert all(row["ratio"] == 1 for row in rows if row["form"] == "default") and result["steps_a_reading"] == 10
    assert all(row["step_ms"] > 0 and row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"] for row in rows)
    assert capsys.readouterr().out.count("\n") == 2 + len(rows)


def test_attention_in_step(monkeypatch, tmp_path):
    (row,) = run(attention_in_step, monkeypatch, tmp_path / "rows.json", "--rates=0.5")["rows"]
    assert row["gain"] == pytest.approx(min(row["step_ms"]["sdpa"], row["step_ms"]["explicit"]) / row["step_ms"]["op"])
