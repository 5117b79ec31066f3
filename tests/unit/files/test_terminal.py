"""A closed pipe ends no work; what is imported is not looked through for garbage."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from megatron_patch.files.terminal import loading

CODE = """
import sys
from megatron_patch.files.terminal import outlive_readers
outlive_readers()
for number in range(30000):
    print("line", number)
    print("remark", number, file=sys.stderr)
    if number % 100 == 0:
        sys.stdout.flush()
open(sys.argv[1], "w").write("through")
"""


@pytest.mark.parametrize("lines", [0, 1])
def test_a_reader_that_is_gone(lines, tmp_path):
    command = [sys.executable, "-c", CODE, str(tmp_path / "end")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 0
    assert (tmp_path / "end").read_text() == "through"


def test_what_is_read_is_whole(tmp_path):
    result = subprocess.run([sys.executable, "-c", CODE, str(tmp_path / "end")], capture_output=True, text=True)
    assert len(result.stdout.splitlines()) == len(result.stderr.splitlines()) == 30000


def test_the_collector_rests_while_modules_are_loaded():
    kept, before = [[] for _ in range(1000)], gc.get_freeze_count()

    def load():
        with loading():
            assert not gc.isenabled()
            raise ImportError

    with pytest.raises(ImportError):
        load()
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)
