"""The script as people call it: another folder, spaces in paths, energon's own command as the judge."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.energon import WorkerConfig, get_train_dataset

from megatron_patch.prepare import commands as script
from tests.end_to_end.scripts import processor_seconds
from tests.unit.data.samples import write_annotations, write_photos, write_pretrain

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "toolkits" / "multimodal_data_preprocessing" / "convert_llava_pretrain_to_wds.py"


def run(*arguments, cwd=None):
    # The package need not be installed for this: the tests' own folder is on the path.
    environment = {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_photographs_from_another_folder(tmp_path):
    folder = tmp_path / "LLaVA Pretrain"
    write_photos(folder, 30)
    sizes = [image.stat().st_size / 1000 for image in folder.glob("*/*.jpg")]
    result = run("../LLaVA Pretrain", cwd=(tmp_path / "LLaVA Pretrain" / "00000"))
    assert result.returncode != 0  # relative to where it is called
    result = run("LLaVA Pretrain", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    written = sum(shard.stat().st_size for shard in folder.glob("wds/*.tar")) / 1e6
    assert result.stdout == (
        f"10 shards of VQASample, {written:.1f} MB; "
        f"30 images of {sum(sizes) / 30:.1f} kB, the largest {max(sizes):.1f} kB\n"
        "LLaVA Pretrain/wds: 30 given = 30 written + 0 rejected\n"
    )
    meta = folder / "wds" / ".nv-meta"
    prepared = {name: (meta / name).read_text() for name in ("dataset.yaml", "split.yaml", ".info.json")}

    # What `energon prepare` itself writes from the same shards.
    assert run("--no-prepare", "--overwrite", folder).returncode == 0
    assert not meta.exists()
    field_map = '{"image": "jpg", "context": "json[0][value]", "answers": "json[1][value]"}'
    options = ["--non-interactive", "--split-ratio", "9,1,0", "--sample-type", "VQASample", "--field-map", field_map]
    energon = Path(sys.executable).with_name("energon")
    subprocess.run([energon, "prepare", *options, "./"], cwd=folder / "wds", check=True, capture_output=True)
    assert {name: (meta / name).read_text() for name in prepared} == prepared

    worker_config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_train_dataset(
        folder / "wds",
        worker_config=worker_config,
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        repeat=False,
    )
    assert len(dataset) == 27


def test_rejected_samples_are_counted_and_named(tmp_path):
    entries = write_pretrain(tmp_path, 30)
    entries[7]["image"] = "nowhere.jpg"
    write_annotations(tmp_path, entries)
    result = run(tmp_path)
    assert result.returncode == 1
    assert result.stderr.endswith("the last one: image 'nowhere.jpg': missing\n")
    assert result.stderr.count("\n") == 1
    result = run(tmp_path, "--max-rejected-share", "0.05")
    assert result.returncode == 0, result.stderr
    assert f"30 given = 29 written + 1 rejected ({tmp_path}/wds.rejected.tsv)" in result.stdout
    assert (tmp_path / "wds.rejected.tsv").read_text() == "7\t\"000007\"\timage 'nowhere.jpg': missing\n"


def test_a_name_is_shown_without_control_characters(tmp_path):
    result = run(tmp_path / "no\x1b[31m\u202efolder")
    assert result.returncode == 1
    assert r"no\x1b[31m\u202efolder: no such folder" in result.stderr
    assert result.stderr.strip().isprintable()


def test_parts_and_their_join(tmp_path):
    write_pretrain(tmp_path, 30)
    for part in ("1/12", "12/12"):
        result = run(tmp_path, "--part", part)
        assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0].startswith("0 shards (part 12/12 of 10) of VQASample")
    result = run(tmp_path, "--no-prepare")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("wds: 30 given = 30 written + 0 rejected\n")


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        ((), 2, "DIR"),
        (("a", "b"), 2, "b: no such flag"),
        (("a", "--max-rejected-share", "2"), 2, "--max-rejected-share 2.0: expected a share from 0 to 1"),
        (("a", "--part", "3/2"), 2, "--part 3/2: expected i/n with 1 <= i <= n, such as 2/8"),
        (("a", "--part", "1/2", "--overwrite"), 2, "--part 1/2: does not go with --overwrite"),
        (("a", "--validate", "all"), 2, "--validate 'all': expected one of none, header, full"),
        (("no such folder",), 1, "no such folder: no such folder"),
        ((".",), 1, "blip_laion_cc_sbu_558k.json: missing"),
    ],
)
def test_mistakes_are_one_line_and_fast(arguments, code, why, tmp_path):
    before = processor_seconds()
    result = run(*arguments, cwd=tmp_path)
    assert processor_seconds() - before < 1.8  # half of it on a quiet machine; torch's import alone takes more
    assert (result.returncode, result.stdout) == (code, "")
    assert why in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_order(number, tmp_path, monkeypatch):
    """As Ctrl-C does: what was begun is left in order (tests/unit/prepare/test_output.py)."""

    def interrupted(settings):
        os.kill(os.getpid(), number)
        pytest.fail("it went on")

    before = signal.getsignal(number)
    monkeypatch.setattr(script, "convert", interrupted)
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path)])
    try:
        with pytest.raises(SystemExit) as ended:
            script.main()
    finally:
        for each in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, before if each == number else signal.SIG_DFL)
    assert ended.value.code == 128 + number
