"""The package as others get it: an sdist from a clean checkout, a wheel from the sdist, and what works where only the wheel is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
VERSION = "7.8.9"
"""The tag of the checkout that is built."""


class Failed(AssertionError):
    """A command failed."""


def run(*command: object, cwd: Path, **variables: str) -> str:
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    text = [str(word) for word in command]
    done = subprocess.run(text, cwd=cwd, env={**environ, **variables}, capture_output=True, text=True, timeout=280, check=False)
    if done.returncode:
        raise Failed(f"{text}\n{done.stdout}\n{done.stderr}".rstrip())
    return done.stdout


class Built(NamedTuple):
    """What was built, and the interpreter of the venv that has it installed."""

    sdist: Path
    wheel: Path
    python: Path


def checkout(folder: Path) -> Path:
    """A fresh repository of the files that git knows here or would take, with a tag."""
    try:
        listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT)
    except (FileNotFoundError, Failed):
        pytest.skip("needs git, and a checkout")
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    who = ("-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false")
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "All"), ("tag", f"v{VERSION}")):
        run("git", *who, *words, cwd=folder)
    return folder


def builder(folder: Path) -> Path:
    """The interpreter of a venv with what `pyproject.toml` needs to build, or a skip where no index has it."""
    listed = re.search(r"^\[build-system\]\nrequires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert listed
    requirements = re.findall(r'"([^"]+)"', listed[1])
    run(sys.executable, "-m", "venv", folder, cwd=ROOT)
    python = folder / "bin/python"
    try:
        run(python, "-m", "pip", "install", "--quiet", *requirements, cwd=ROOT)
    except Failed as error:
        pytest.skip(f"needs an index with {', '.join(requirements)}: {str(error).splitlines()[-1]}")
    return python


def environment(folder: Path) -> Path:
    """The interpreter of an empty venv; `see_torch` shows it the libraries that are here."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=ROOT)
    return folder / "bin/python"


def see_torch(python: Path) -> None:
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site,) = python.parent.parent.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text("\n".join(here) + "\n")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("package")
    source, build, dist = checkout(folder / "checkout"), builder(folder / "builder"), folder / "dist"
    hook = "from setuptools import build_meta; print(build_meta.build_sdist({!r}))"
    run(build, "-c", hook.format(str(dist)), cwd=source)
    (sdist,) = dist.iterdir()
    pip = (build, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", dist, sdist, cwd=folder)
    (wheel,) = dist.glob("*.whl")
    python = environment(folder / "environment")
    run(*pip, "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=folder)
    see_torch(python)
    return Built(sdist, wheel, python)


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_version_is_the_tag(built: Built) -> None:
    assert built.sdist.name == f"nnscaler_ring-{VERSION}.tar.gz"
    assert built.wheel.name == f"nnscaler_ring-{VERSION}-py3-none-any.whl"
    assert metadata(built.wheel)["Version"] == VERSION


def test_requirements_are_torch_and_numpy(built: Built) -> None:
    required = [line for line in metadata(built.wheel).get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line)[0] for line in required} == {"numpy", "torch"}  # type: ignore[index]


def test_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith(f"nnscaler_ring-{VERSION}.dist-info/")}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nnscaler_ring").rglob("*.py")}
    assert names == sources | {"nnscaler_ring/py.typed"}


def test_sdist_holds_what_it_is_made_of(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "setup.cfg", "pyproject.toml", "mkdocs.yml", "conftest.py"} <= names
    assert {"nnscaler_ring/py.typed", "docs/index.md", "tests/test_package.py"} <= names
    assert not [name for name in names if name.startswith((".venv", "out/")) or name.endswith(".pyc")]


def test_command_line_works(built: Built, tmp_path: Path) -> None:
    command = built.python.parent / "nnscaler-ring"
    assert run(command, "--version", cwd=tmp_path) == f"nnscaler-ring {VERSION}\n"
    told = run(command, "plan", "--seq-len", "64k", "--world-size", "4", "--network", "400g", cwd=tmp_path)
    assert re.search(r"^ *4  zigzag ", told, re.MULTILINE)


def test_pasted_example_works(built: Built, tmp_path: Path) -> None:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example
    where = "import nnscaler_ring; print(nnscaler_ring.__file__)\n"
    (tmp_path / "example.py").write_text(where + example[1])
    first, told = run(built.python, "example.py", cwd=tmp_path, OMP_NUM_THREADS="1").splitlines()
    assert first.startswith(str(built.python.parent.parent))
    assert told.startswith("rank 0: 1000 of 1000 tokens")
