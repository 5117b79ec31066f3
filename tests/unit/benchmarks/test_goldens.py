"""A check's figures are kept for a card, and what moved is named. Cards and figures here are made up."""

from __future__ import annotations

import copy
import json

import pytest

CARD = {
    "phase": "card",
    "row": "card",
    "card": "Made-up Card 80GB",
    "driver": "1.2",
    "torch": "0.0",
    "cuda": "0",
    "cudnn": "0",
    "python": "3",
    "packages": {"numpy": "0"},
    "size": "7B",
    "precision": "bf16",
    "steps": 9,
    "date": "2000-01-01",
    "commit": "abc",
}
ROWS = [
    CARD,
    {"phase": "ceilings", "row": "square", "tflops": 700.0, "m": 8192},
    {"phase": "stage1", "row": "ours, 8", "ms": 300.0, "tflops": 400.0, "loss": 6.0, "peak_gb": 40.0},
    {"phase": "audit", "row": "kernels, 1", "bmm": 0, "kernels": 1000},
    {"phase": "stage1", "row": "ours, 16", "problem": "out of memory", "failed": False},
    *({"phase": phase, "row": "done", "seconds": 1.0} for phase in ("card", "ceilings", "stage1", "audit")),
]
PHASES = ("card", "ceilings", "stage1", "audit")


def changed(place: int, **figures) -> list[dict]:
    rows = copy.deepcopy(ROWS)
    rows[place] |= figures
    return rows


def test_keep_writes_figures_tolerances_and_the_machine(tmp_path):
    from goldens import keep

    kept = json.loads(keep(ROWS, PHASES, tmp_path).read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["made-up-card-80gb-7b.json"]
    assert kept["figures"] == {
        "ceilings / square / tflops": {"value": 700.0, "tolerance": 0.1},
        "stage1 / ours, 8 / ms": {"value": 300.0, "tolerance": 0.1},
        "stage1 / ours, 8 / loss": {"value": 6.0, "tolerance": 0.02},
        "stage1 / ours, 8 / peak_gb": {"value": 40.0, "tolerance": 0.1},
        "audit / kernels, 1 / bmm": {"value": 0, "tolerance": 0.1},
        "audit / kernels, 1 / kernels": {"value": 1000, "tolerance": 0.1},
    }
    assert {name: kept[name] for name in ("card", "driver", "torch", "date", "commit", "packages")} == {
        name: CARD[name] for name in ("card", "driver", "torch", "date", "commit", "packages")
    }


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (ROWS, None),
        (changed(2, ms=329.0, loss=6.11), None),
        (changed(2, ms=331.0), "stage1 / ours, 8 / ms: 300 -> 331 (+10.3%, allowed 10%)"),
        (changed(2, ms=269.0), "stage1 / ours, 8 / ms: 300 -> 269 (-10.3%, allowed 10%)"),
        (changed(2, loss=6.13), "stage1 / ours, 8 / loss: 6 -> 6.13 (+2.2%, allowed 2%)"),
        (changed(2, loss=float("nan")), "stage1 / ours, 8 / loss: 6 -> nan"),
        (changed(3, bmm=1), "audit / kernels, 1 / bmm: 0 -> 1 (from 0, allowed 10%)"),
        (changed(1, problem="out of memory"), "ceilings / square / tflops: 700 before, not in this check"),
    ],
)
def test_compare_names_what_moved(tmp_path, rows, named):
    from goldens import compare, keep

    keep(ROWS, PHASES, tmp_path)
    same, report = compare(rows, tmp_path)
    assert same == (named is None)
    assert report.startswith(f"{int(named is not None)} of 6 figures moved since made-up-card-80gb-7b.json")
    assert named is None or named in report


def test_another_card_has_no_golden(tmp_path):
    from goldens import compare, keep

    keep(ROWS, PHASES, tmp_path)
    for other in ({"card": "Other"}, {"size": "100M"}):
        same, report = compare(changed(0, **other), tmp_path)
        assert same
        assert "no golden" in report
        assert "--keep" in report


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (changed(0, driver=""), "goldens are of GPUs"),
        (changed(2, failed=True, problem="losses differ"), "the check failed"),
        (ROWS[1:], "no row of the phase card"),
    ],
)
def test_what_is_not_kept(tmp_path, rows, said):
    from goldens import keep

    with pytest.raises(ValueError, match=said):
        keep(rows, PHASES, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_exits_with_1_when_something_moved(tmp_path, monkeypatch, capsys):
    import gpu_table

    monkeypatch.setattr(gpu_table, "PHASES", PHASES)

    def run(rows: list[dict], *words: str) -> int:
        (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"phase": "cut off')
        monkeypatch.setattr("sys.argv", ["", str(tmp_path), *words, "--goldens", str(tmp_path / "kept")])
        return gpu_table.main()

    assert run(ROWS, "--compare") == 0
    assert run(ROWS, "--keep") == 0
    assert run(ROWS, "--compare") == 0
    assert run(changed(2, ms=400.0), "--compare") == 1
    assert "stage1 / ours, 8 / ms" in capsys.readouterr().out
    assert run(ROWS[1:], "--keep") == 1


def test_a_check_that_was_cut_off_is_not_kept(tmp_path):
    from goldens import keep

    with pytest.raises(ValueError, match=r"did not come to audit; only a whole one is kept"):
        keep(ROWS[:-1], PHASES, tmp_path)
    with pytest.raises(ValueError, match="has no figures"):
        keep([CARD, {"phase": "card", "row": "done"}], ("card",), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_line_that_is_no_row_is_named_but_for_the_last(tmp_path):
    from rows import read

    path = tmp_path / "results.jsonl"
    path.write_text(f'{json.dumps(CARD)}\n{{"phase": "stage1", "ro')
    assert read(path) == [CARD]
    for wrong in ("{", "3", '{"phase": "stage1"}'):
        path.write_text(f"{wrong}\n{json.dumps(CARD)}\n")
        with pytest.raises(ValueError, match=r"results.jsonl: line 1 is no row of a check"):
            read(path)
