"""Whether a folder of wheels is all that a machine lacks: for benchmarks/gpu_wheels.sh.

python benchmarks/wheels.py wanted                  NAME==VERSION of each, as this environment has them
python benchmarks/wheels.py check FOLDER            names, versions, sizes; 1 when a requirement is not met
python benchmarks/wheels.py stub FOLDER             a package `torch` that lets pip describe Transformer Engine's

"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
PROJECT = "megatron-patch-llava"
ENVIRONMENT = {
    "python_version": "3.12",
    "python_full_version": "3.12.0",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "sys_platform": "linux",
    "os_name": "posix",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "extra": "",
}
LARGEST = 64 * 2**20
"""Bytes that may be carried."""
STUB = {
    "__init__.py": 'class version:\n    cuda = "13.0"\n',
    "utils/__init__.py": "",
    "utils/cpp_extension.py": (
        "from setuptools import Extension\n"
        "from setuptools.command.build_ext import build_ext as BuildExtension\n\n\n"
        "def CppExtension(name, sources, **settings):\n"
        "    return Extension(name, sources)\n"
    ),
}


def main() -> int:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["wanted", "check", "stub"])
    parser.add_argument("folder", nargs="?", type=Path)
    options = parser.parse_args()
    if options.what == "wanted":
        print("\n".join(f"{name}=={importlib.metadata.version(name)}" for name in listed("gpu_wheels.txt")))
        return 0
    if options.folder is None:
        parser.error(f"{options.what}: needs a folder")
    if options.what == "stub":
        for name, text in STUB.items():
            path = options.folder / "torch" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return 0
    return check(options.folder)


def listed(name: str) -> list[str]:
    """The lines of a list beside this file, without comments."""
    return [line for line in (HERE / name).read_text().splitlines() if line and not line.startswith("#")]


def check(folder: Path) -> int:
    """Print each file's size and the requirements that nothing meets; 1 when there is one, or all is too large."""
    wheels = {path: describe(path) for path in sorted(folder.glob("**/*.whl"))}
    total = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total += path.stat().st_size
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}")
    print(f"{total / 2**20:8.2f} MiB of {LARGEST / 2**20:.0f}, {len(wheels)} wheels")
    problems = missing(
        {canonicalize_name(about["Name"]): about["Version"] for about in wheels.values()},
        {about["Name"]: about.get_all("Requires-Dist") or [] for about in wheels.values()}
        | {PROJECT: importlib.metadata.requires(PROJECT) or []},
        there(listed("gpu_wheels_there.txt")),
    )
    if total > LARGEST:
        problems.append(f"{total / 2**20:.1f} MiB: more than {LARGEST / 2**20:.0f}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


def describe(path: Path):
    """A wheel's METADATA."""
    with zipfile.ZipFile(path) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        return HeaderParser().parsestr(wheel.read(name).decode())


def there(lines: list[str]) -> dict[str, str]:
    """Name -> version of what the machine has; "" where it is not known."""
    parsed = [line.partition("==") for line in lines]
    return {canonicalize_name(name): version for name, _, version in parsed}


def missing(carried: dict[str, str], requires: dict[str, list[str]], there: dict[str, str]) -> list[str]:
    """What Python 3.12 on Linux would lack.

    `carried`: name -> version of the wheels. `requires`: each package's requirements. `there`: what `there` gives.
    """
    problems = []
    for package, lines in requires.items():
        for requirement in map(Requirement, lines):
            if requirement.marker is not None and not requirement.marker.evaluate(ENVIRONMENT):
                continue
            name = canonicalize_name(requirement.name)
            version = carried.get(name, there.get(name))
            if version is None:
                problems.append(f"{package} needs {requirement}, which is neither carried nor there")
            elif version and not requirement.specifier.contains(version, prereleases=True):
                problems.append(f"{package} needs {requirement}, and {version} is what there will be")
    return problems


if __name__ == "__main__":
    sys.exit(main())
