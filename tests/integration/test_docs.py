"""Documentation runs as it stands; tests/pages.py says what of it."""

import contextlib
import doctest
import importlib
import inspect
import io
import itertools
import os
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import manifold_opt
from manifold_opt import compare, rotations

from ..pages import PAGES, ROOT, about_the_checkout, blocks, requires

# What torch's gloo says when, about once in forty times, it aborts a process that has ended already.
GLOO = "terminate called without an active exception"
ELSEWHERE = {"extending.md"}  # by test_extending.py
SLOW = {  # .ci/run runs them
    *("tutorial.md", "several_gpus.md", "new_optimizer.md", "compile.md", "geoopt.md", "pogo.md"),
}
TO_RUN = {"python", "pycon", "file", "bash"}
REFERENCE = [page.read_text() for page in PAGES if page.parent.name == "reference"]
NAMES = {str(page.relative_to(ROOT)): page for page in PAGES}


def to_run(page):
    """The blocks of a page that this file runs, and what the page says that each prints, if it does.

    The commands of the checkout are .ci/commands'.
    """
    if page.name in ELSEWHERE:
        return []
    text = page.read_text().splitlines()
    every = list(blocks(page))
    return [
        (block, after.text if after and after.kind == "text" and follows(text, block, after) else None)
        for block, after in itertools.zip_longest(every, every[1:])
        if block.kind in TO_RUN and (block.kind != "bash" or not all(map(about_the_checkout, block.commands())))
    ]


def follows(lines, block, after):
    """Whether there is nothing between two blocks."""
    end = block.line + block.text.count("\n")  # of the closing fence
    return not any(line.strip() for line in lines[end : after.line - 2])


def but_for_numbers(text):
    """What is left of a printed text: runs of digits may differ in value, not in being there."""
    return [re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", line.rstrip()) for line in text.strip().splitlines()]


@pytest.fixture
def torch_as_it_was():
    """What a page sets for the process does not outlast it."""
    dtype, threads, precision = (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
    )
    deterministic, grad = torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_grad_enabled(grad)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a page reads and writes, imports from, and finds the interpreter of the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    here = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *([here] if here else [])]))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


class Page:
    """Runs blocks one after another.

    Args:
        path: of the page; a traceback shows its lines.
        folder: where its files are written and its commands run.
    """

    def __init__(self, path, folder):
        self.path, self.folder = path, folder
        # A module, so that what is defined on the page can be pickled, and a dataclass finds its annotations.
        self.module = ModuleType("page_" + re.sub(r"\W", "_", path.stem))

    def run(self, block, shown):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            getattr(self, block.kind)(block)
        if shown is not None and block.kind != "pycon":
            assert but_for_numbers(printed.getvalue()) == but_for_numbers(shown), f"{self.path.name}, line {block.line}"

    def python(self, block):
        code = "\n" * (block.line - 1) + textwrap.dedent(block.text)
        exec(compile(code, str(self.path), "exec"), vars(self.module))

    def pycon(self, block):
        test = doctest.DocTestParser().get_doctest(
            block.text.rstrip() + "\n", vars(self.module), self.path.name, str(self.path), block.line - 1
        )
        test.globs = vars(self.module)  # not a copy of it
        said = []
        done = doctest.DocTestRunner(verbose=False).run(test, out=said.append, clear_globs=False)
        assert done.attempted, f"{self.path.name}, line {block.line}: no example"
        assert not done.failed, "".join(said)

    def file(self, block):
        path = self.folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")

    def bash(self, block):
        for command in block.commands():
            if about_the_checkout(command):
                continue
            for _ in range(3):
                done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
                if GLOO not in done.stderr:
                    break
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            print(done.stdout, end="")


def pages_to_run():
    """Their names, and marks on those that want what the tests do not, or take long."""
    for name, page in NAMES.items():
        if to_run(page):
            marks = [pytest.mark.requires] * bool(requires(page)) + [pytest.mark.slow] * (page.name in SLOW)
            yield pytest.param(name, marks=marks)


@pytest.mark.usefixtures("torch_as_it_was")
@pytest.mark.parametrize("name", list(pages_to_run()))
def test_a_page_runs_in_order(name, folder, monkeypatch):
    for module in requires(NAMES[name]):
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):  # theirs
            warnings.simplefilter("ignore", category)
        if module in os.environ.get("MAY_LACK", module).split():
            pytest.importorskip(module, exc_type=ImportError)
        importlib.import_module(module)
    page = Page(NAMES[name], folder)
    monkeypatch.setitem(sys.modules, page.module.__name__, page.module)
    for block, shown in to_run(page.path):
        page.run(block, shown)


@pytest.mark.parametrize("name", NAMES)
def test_every_prompt_is_in_a_block_that_runs(name):
    """Not in an indented or otherwise marked one, where nobody would notice."""
    text = NAMES[name].read_text()
    run = "".join(block.text for block in blocks(NAMES[name]) if block.kind == "pycon")
    assert text.count(">>> ") == run.count(">>> ")


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_lead_somewhere(name):
    """On GitHub; that they do on the site is what the build sees to."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", NAMES[name].read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        page = NAMES[name].parent / path if path else NAMES[name]
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), target


def anchors(page):
    """What GitHub makes of the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(("module", "name"), [(m, n) for m in (manifold_opt, compare, rotations) for n in m.__all__])
def test_every_public_name_is_in_the_reference(module, name):
    """With an example that runs: in its docstring, or on its page."""
    page = next((page for page in REFERENCE if re.search(entry(module, name), page)), None)
    assert page is not None
    docstring = inspect.getdoc(getattr(module, name)) or ""
    if module is not compare or name == "compare":
        assert ">>> " in docstring or re.search(rf"^>>> .*\b{name}\b", page, re.M)
    if inspect.isfunction(getattr(module, name)):
        assert "Args:" in docstring
        assert "Returns:" in docstring


def test_init_and_the_command_line_are_in_the_reference():
    for asked in (".. autofunction:: manifold_opt.init.orthogonal_", ".. argparse::"):
        assert any(asked in page for page in REFERENCE)


def entry(module, name):
    """What documents a name on a page of the reference."""
    whole = rf"{module.__name__}\.{name}"
    return (
        rf"(?m)^\.\. (autofunction|autoclass|automodule|py:data):: {whole}$"
        rf"|^\.\. currentmodule:: {module.__name__}\n(?:(?!^```$|^\.\. currentmodule)[\s\S])*?"
        rf"^\.\. (autofunction|autoclass|py:data):: {name}$"
    )


def test_the_citation_is_of_this_version():
    assert f"\nversion: {manifold_opt.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_tests_that_are_named_are_there(name):
    """Every ``test_file.py::test_name``, and every name after it in the same row."""
    text = NAMES[name].read_text()
    tests = {path.name: path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py")}
    for file in re.findall(r"test_\w+\.py", text):
        assert file in tests, file
    for called in re.findall(r"`(?:test_\w+\.py::)?(test_[a-z]\w+)`", text):
        assert any(f"def {called}(" in source for source in tests.values()), called
    for word in re.findall(r"pytest\b.* -k (\w+)$", text, re.M):
        assert any(word in source for source in tests.values()), word
