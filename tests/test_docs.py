"""What the pages say is so: their examples run, their links lead somewhere, their output is what the commands print."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion

import nnscaler_ring
from nnscaler_ring import cleanup_distributed
from nnscaler_ring.cli import main
from nnscaler_ring.integrations import families

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONAL = ("matplotlib", "nnscaler", "transformers")
"""Libraries that a page may use and that need not be there."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[tuple[int, str, str]]:
    """The line on which each block of the languages starts, its language, and the block."""
    text = page.read_text()
    found = [match for match in FENCE.finditer(text) if match[1] in languages]
    return [(text.count("\n", 0, match.start(2)) + 1, match[1], match[2]) for match in found]


def example(page: Path) -> str:
    """The first Python block of a page."""
    return blocks(page, "python")[0][2]


def missing(code: str) -> list[str]:
    """The optional libraries that a block imports and that are not there."""
    nodes = list(ast.walk(ast.parse(code)))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return [library for library in OPTIONAL if any(m.split(".")[0] == library for m in modules) and not find_spec(library)]


# -- examples --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, and no process group that stays."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        yield
    cleanup_distributed()
    if dist.is_initialized():
        dist.destroy_process_group()
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # transformers 5.24 calls it cache
@pytest.mark.parametrize("page", [pytest.param(page, id=name(page)) for page in PAGES if blocks(page, "python")])
def test_blocks_run(page: Path, alone: None, capsys: pytest.CaptureFixture) -> None:
    """All Python blocks of a page, in one namespace, a world of one; a block of text is what those before it print."""
    if page.name == "compile.md" and TorchVersion(torch.__version__) < "2.7":
        pytest.skip("needs a torch newer than 2.6, as the page says")
    if page.name == "transformers.md" and find_spec("transformers") and TorchVersion(version("transformers")) < "5":
        pytest.skip("needs transformers 5, as the page says")
    namespace = {"__name__": "__main__"}
    for line, language, block in blocks(page, "python", "text"):
        if language == "text":
            assert capsys.readouterr().out == block
            continue
        if lacking := missing(block):
            pytest.skip(f"needs {', '.join(lacking)}")
        exec(compile("\n" * (line - 1) + block, str(page), "exec"), namespace)


def run(*command: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def on_two(path: Path) -> str:
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path))


EXAMPLES = {
    README: re.compile(r"rank (\d+): (\d+) of \d+ tokens, (\|out\| = \d+\.\d{6})"),
    ROOT / "docs/index.md": re.compile(r"rank (\d+): (\d+) of \d+ tokens, (loss \d+\.\d{5}, gradient norm \d+\.\d{5})"),
}
"""The first example of a page, and what it prints: rank, tokens, and numbers that are those of one device."""


@pytest.mark.parametrize("page", [pytest.param(page, id=name(page)) for page in EXAMPLES])
def test_example_on_one_and_on_two_processes(page: Path, tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(example(page))
    (one,), two = (EXAMPLES[page].findall(told) for told in (run(str(path)), on_two(path)))
    assert one[:2] == ("0", "1000") and sorted(each[:2] for each in two) == [("0", "500"), ("1", "500")]
    assert {each[2] for each in two} == {one[2]}


def test_pages_on_two_processes(tmp_path: Path) -> None:
    path = tmp_path / "pages.py"
    pages = [ROOT / f"docs/{page}.md" for page in ("dtensor", "groups", "serving", "bidirectional")]
    path.write_text("\n".join(block for page in pages for _, _, block in blocks(page, "python")))
    on_two(path)


def test_first_example_has_fifteen_lines() -> None:
    lines = [line for line in example(README).splitlines() if line.strip()]
    assert len(lines) <= 15, len(lines)


COMMANDS = [
    pytest.param(block, id=f"{name(page)}:{line}") for page in PAGES for line, _, block in blocks(page, "") if block[:2] == "$ "
]


@pytest.mark.parametrize("block", COMMANDS)
def test_output_is_what_the_command_prints(block: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(ROOT)
    command, _, printed = block.removeprefix("$ ").partition("\n")
    program, *arguments = shlex.split(command)
    assert program == "nnscaler-ring" and main(arguments) == 0
    assert capsys.readouterr().out == printed


# -- links and names -------------------------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """A page without its blocks."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", [pytest.param(page, id=name(page)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    assert not [link for link in links if link.startswith("/")]
    for link in links:
        if not re.match(r"\w+:", link):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            included = [ROOT / name for name in re.findall(r'^--8<-- "(.+)"$', prose(target), re.MULTILINE)] if anchor else []
            assert not anchor or any(anchor in anchors(each) for each in (target, *included)), link


def test_every_family_is_on_the_page() -> None:
    section = (ROOT / "docs/transformers.md").read_text().partition("## Families\n")[2].partition("\n\nWith 4.48")[0]
    assert set(re.findall(r"`([\w-]+)`", section)) == families.FAMILIES


def test_every_benchmark_is_on_the_page() -> None:
    included = re.findall(r'^--8<-- "benchmarks/results/(.+)"$', (ROOT / "docs/performance.md").read_text(), re.MULTILINE)
    assert set(included) == {path.name for path in (ROOT / "benchmarks/results").glob("*.md")}


def documented() -> list[tuple[str, str]]:
    """The names on the API pages, each with its module."""
    found = []
    for page in (ROOT / "docs/api").glob("*.md"):
        for module, rest in re.findall(r"^::: ([\w.]+)\n((?:    .*\n|\n)*)", page.read_text(), re.MULTILINE):
            found += [(module, member) for member in re.findall(r"^ {8}- (\w+)$", rest, re.MULTILINE)]
    return found


def test_every_public_name_is_on_an_api_page() -> None:
    assert {member for _, member in documented()} >= set(nnscaler_ring.__all__)


@pytest.mark.parametrize(("module", "member"), documented())
def test_every_name_on_an_api_page_is_there(module: str, member: str) -> None:
    assert getattr(importlib.import_module(module), member).__doc__
