"""What a machine lacks is found in the requirements of what is carried."""

from __future__ import annotations

import zipfile

import pytest


@pytest.mark.parametrize(
    ("requirement", "carried", "there", "problem"),
    [
        ("other", {"other": "1.0"}, {}, None),
        ("Some.Other>=2", {}, {"some-other": "2.1"}, None),
        ("other>=2", {}, {"other": ""}, None),
        ("other", {}, {}, "neither carried nor there"),
        ("other>=2", {"other": "1.0"}, {"other": "3.0"}, "1.0 is what there will be"),
        ('other; python_version < "3.11"', {}, {}, None),
        ('other; python_version >= "3.12"', {}, {}, "neither carried nor there"),
        ('other; extra == "dev"', {}, {}, None),
        ('other; sys_platform == "win32"', {}, {}, None),
    ],
)
def test_requirements(requirement, carried, there, problem):
    from wheels import missing

    found = missing(carried, {"package": [requirement]}, there)
    assert (problem is None and found == []) or problem in found[0]


def test_the_lists_name_what_this_environment_has():
    from importlib.metadata import version

    from wheels import listed, there

    names = listed("gpu_wheels.txt")
    assert all(version(name) for name in names)
    assert not set(names) & set(there(listed("gpu_wheels_there.txt")))


def test_a_folder_is_weighed(tmp_path, monkeypatch, capsys):
    import wheels

    with zipfile.ZipFile(tmp_path / "package-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("package-1.0.dist-info/METADATA", "Name: package\nVersion: 1.0\nRequires-Dist: torch>=2\n")
    monkeypatch.setattr(wheels.importlib.metadata, "requires", lambda name: [])
    assert wheels.check(tmp_path) == 0
    monkeypatch.setattr(wheels, "LARGEST", 100)
    assert wheels.check(tmp_path) == 1
    captured = capsys.readouterr()
    assert "package-1.0-py3-none-any.whl" in captured.out
    assert "more than" in captured.err
