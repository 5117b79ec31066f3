"""The quickstart's own parts: images, tokenizer, the watching of a command, the report. Not the whole run."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples" / "llava_mcore"
QUICKSTART = EXAMPLES / "quickstart.sh"


@pytest.fixture(autouse=True)
def _examples_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_pictures_lie_as_in_llava_pretrain_and_depend_on_the_seed_alone(tmp_path):
    import quickstart_make as make

    for folder in ("one", "same", "other"):
        make.save_pictures(tmp_path / folder, 5, seed=2 if folder == "other" else 1)
    names = ["blip_laion_cc_sbu_558k.json", *(f"00000/{index:09d}.jpg" for index in range(5))]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
        assert (tmp_path / "one" / name).read_bytes() != (tmp_path / "other" / name).read_bytes()
    for entry in json.loads((tmp_path / "one" / names[0]).read_text()):
        assert Image.open(tmp_path / "one" / entry["image"]).size == (make.PICTURE_SIZE, make.PICTURE_SIZE)
        human, gpt = entry["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].count("<image>") == 1
        assert gpt["value"] in set(make.all_captions())


def test_a_caption_is_true_of_its_picture():
    import quickstart_make as make

    rng = random.Random(1)
    for relation, (dx, dy) in make.RELATIONS.items():
        for _ in range(5):
            scene = make.Scene(("red", "circle"), relation, ("blue", "square"))
            assert scene.caption == f"a large red circle {relation} a small blue square"
            red, blue = (_place(make.draw(scene, rng), colour) for colour in ((214, 40, 40), (40, 80, 210)))
            assert red[2] > 1.3 * blue[2], "the large one has more pixels"
            assert (red[0] - blue[0]) * dx + (red[1] - blue[1]) * dy > 10, "it lies where the caption says"


def _place(image: Image.Image, colour: tuple[int, int, int]) -> tuple[float, float, int]:
    """Middle and number of the pixels that are near `colour`."""
    pixels = image.load()
    near = [
        (x, y)
        for x in range(image.width)
        for y in range(image.height)
        if sum(abs(part - other) for part, other in zip(pixels[x, y], colour, strict=True)) < 90
    ]
    return sum(x for x, _ in near) / len(near), sum(y for _, y in near) / len(near), len(near)


def test_captions_survive_the_tokenizer(tmp_path):
    import quickstart_make as make
    from transformers import AutoTokenizer

    size = make.save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == size
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    for text in [*list(make.all_captions())[::97], *make.QUESTIONS, "seen never before: é\n"]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    prompt = tokenizer("<s>[INST] What do you see?[/INST] a large", add_special_tokens=False)
    assert prompt.tokens()[:2] == ["<s>", "[INST]"]
    assert prompt.tokens()[-3:] == ["[/INST]", "▁a", "▁large"]


def test_the_small_models_can_be_cut_in_two(tmp_path):
    import quickstart_make as make

    from megatron_patch.config.train import Parallel
    from megatron_patch.families.hf_config import describe_language_model, describe_vision_model
    from megatron_patch.families.sizes import Llava

    make.save_language_model(tmp_path / "llm", seed=1)
    make.save_vision_tower(tmp_path / "clip", seed=1)
    llava = Llava(
        language=describe_language_model(json.loads((tmp_path / "llm" / "config.json").read_text())),
        vision=describe_vision_model(json.loads((tmp_path / "clip" / "config.json").read_text())),
        image_token_id=0,
    )
    Parallel(tensor_model_parallel_size=2, pipeline_model_parallel_size=2).check(llava)
    assert llava.language.num_query_groups < llava.language.num_attention_heads
    assert llava.vision.num_image_tokens == 16


TRAINING = """
import subprocess, sys, time
if "worker" in sys.argv:
    time.sleep(60)
worker = subprocess.Popen([sys.executable, "pretrain_llava.py", "worker"], cwd=sys.argv[1])
for iteration in range(1, 100):
    if iteration == 3:
        print("[now] saved out/checkpoint/iter_0000002", flush=True)
    print(f"[now] iteration {iteration:8d}/      99 | lm loss: 0.5 | time left: 0:00:09", flush=True)
    time.sleep(0.05)
    if worker.poll() is not None:
        sys.exit(1)
worker.terminate()
"""


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "left alone"])
def test_watch_kills_a_worker_after_a_checkpoint(tmp_path, kill):
    (tmp_path / "pretrain_llava.py").write_text(TRAINING)
    command = [sys.executable, str(EXAMPLES / "quickstart_watch.py"), str(tmp_path / "log")]
    command += ["--kill-at", "6"] if kill else []
    script = [sys.executable, str(tmp_path / "pretrain_llava.py"), str(tmp_path)]
    ended = subprocess.run([*command, "--", *script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "saved a checkpoint at iteration 2" in ended.stdout
    assert ("SIGKILL to worker" in ended.stdout) == kill
    assert ("iteration       99/" in (tmp_path / "log").read_text()) == (not kill)


def test_watch_shows_why_a_command_failed(tmp_path):
    command = [sys.executable, str(EXAMPLES / "quickstart_watch.py"), str(tmp_path / "log"), "--"]
    command += [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "no such thing" in ended.stderr


@pytest.fixture
def finished_run(tmp_path):
    """A folder as a run of 20 iterations leaves it: killed after 14, resumed at 10."""
    from torch.utils.tensorboard import SummaryWriter

    line = "iteration {:8d}/      20 | lm loss: 0.5 | time left: 0:00:09\n"
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "train-killed.log").write_text("".join(map(line.format, range(1, 15))))
    (tmp_path / "log" / "train-resumed.log").write_text(
        "resumed from x at iteration 10\n" + "".join(map(line.format, range(11, 21)))
    )
    (tmp_path / "log" / "stages").write_text("100 1 make models\n107 2 train\n200 end\n")
    for first, last in ((1, 14), (11, 20)):
        with SummaryWriter(tmp_path / "output" / "tensorboard", purge_step=first) as board:
            for iteration in range(first, last + 1):
                board.add_scalar("lm loss", 5 / iteration, iteration)
                board.add_scalar("iteration-time", 0.5, iteration)
                board.add_scalar("batch-generator-time", 0.01, iteration)
    return tmp_path


def _report(folder: Path, num_exact: int) -> subprocess.CompletedProcess:
    rows = [
        {"image": "a.jpg", "expected": "x", "said": "x" if i < num_exact else "y", "shuffled": "z"} for i in range(20)
    ]
    (folder / "captions.json").write_text(json.dumps(rows))
    command = [sys.executable, str(EXAMPLES / "quickstart_report.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


def test_report(finished_run):
    ended = _report(finished_run, num_exact=19)
    assert ended.returncode == 0, ended.stderr
    text = " ".join(ended.stdout.split())
    for said in (
        "make models 7 s",
        "train 93 s",
        "iterations 20",
        "after 14, at 10",
        "waited for data 2.0% of the training time",
        "first and last 5.0000, 0.2500",
        "pictures 95.0% of 20",
        "shuffled 0.0%",
    ):
        assert said in text
    assert Image.open(finished_run / "loss_curve.png").size[0] > 500


def test_report_fails_when_too_few_captions_are_exact(finished_run):
    ended = _report(finished_run, num_exact=18)
    assert ended.returncode == 1
    assert "did not learn" in ended.stderr


def test_nothing_but_a_quickstart_is_removed(tmp_path):
    (tmp_path / "mine").write_text("keep")
    ended = subprocess.run(["sh", str(QUICKSTART), str(tmp_path)], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "is not a quickstart's folder" in ended.stderr
    assert (tmp_path / "mine").read_text() == "keep"
