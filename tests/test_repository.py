"""What the repository promises: notebooks executed and readable, one environment, no left-overs."""

import ast
import hashlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from gensim.test.utils import datapath
from packaging.requirements import Requirement

from dha_utils.__main__ import DEFAULTS
from dha_utils.parameters import check_parameters
from dha_utils.sources.smollm2 import SMOLLM2_SHA256

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
TUTORIAL = [path for path in NOTEBOOKS if re.match(r"0\d_", path.name)]
PIPELINE = [path for path in NOTEBOOKS if re.match(r"0[1-5]_", path.name)]


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def shows(cell, kind):
    return any(kind in output.get("data", {}) for output in cell.outputs)


def test_there_are_five_notebooks():
    assert [path.name[:2] for path in PIPELINE] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_are_executed_without_errors(path):
    cells = code_cells(path)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run all cells, in order, before committing"
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert not any(output.get("name") == "stderr" for cell in cells for output in cell.outputs)
    assert "...</td>" not in path.read_text(), "a sentence in a table is cut off"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_chart_has_its_table(path):
    charts = [cell for cell in code_cells(path) if shows(cell, "image/png")]
    assert charts, "a notebook shows what it found"
    for cell in charts:
        assert shows(cell, "text/html"), f"a chart without a table:\n{cell.source}"
        kinds = [kind for output in cell.outputs for kind in output.get("data", {}) if kind in ("image/png", "text/html")]
        assert kinds[0] == "image/png", f"a table above its chart:\n{cell.source}"


@pytest.mark.parametrize("path", PIPELINE, ids=lambda path: path.stem)
def test_notebooks_share_their_parameters_and_open_and_close_in_prose(path):
    notebook = nbformat.read(path, as_version=4)
    assert 15 <= len(notebook.cells) <= 45
    assert notebook.cells[0].cell_type == "markdown" and "?" in notebook.cells[0].source
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert not re.search(r"^#( #|$)", prose, re.MULTILINE), "prose with comment signs renders as headings"
    assert shows(notebook.cells[-1], "text/markdown"), "the last cell says what was found, computed"
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(parameters.source).body}
    assert list(values)[:8] == ["model", "text", "budget", "method", "seed", "device", "dtype", "run_dir"]
    assert DEFAULTS.items() <= values.items(), "`make check` says what the notebooks say"
    check_parameters(**values)
    assert {"kernelspec", "language_info"} <= set(notebook.metadata)


@pytest.mark.parametrize("path", TUTORIAL, ids=lambda path: path.stem)
def test_a_notebook_asks_shows_lets_try_and_says_what_it_found(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].source.startswith("# ") and "?" in cells[0].source
    headings = [cell.source.split("\n")[0] for cell in cells if cell.source.startswith("## ")]
    assert headings[-1] == "## What was found" and cells[-2].source == headings[-1]
    [task] = [i for i, cell in enumerate(cells) if "## Try this" in cell.source]
    solution = cells[task + 1]
    assert "assert" in solution.source and solution.outputs is not None

    def is_plumbing(cell):
        return cell in (solution, cells[-1]) or re.match("import |from ", cell.source) or "= open_run(" in cell.source

    for cell in cells:
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            folded = cell.metadata.get("jupyter", {}).get("source_hidden", False)
            assert folded or not is_plumbing(cell), f"to be folded:\n{cell.source}"
            assert folded or len(cell.source.splitlines()) <= 22, f"too long to be read:\n{cell.source}"


def test_conda_installs_what_make_does():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    [pip] = [entry["pip"] for entry in environment if isinstance(entry, dict)]
    assert pip == ["-c constraints.txt", "-e .[dev]"]
    assert f"python{project['requires-python']}" in environment
    assert "-c constraints.txt -e .[dev]" in (ROOT / "Makefile").read_text()


CHAPTERS = ("sources", "model", "measure", "fuse", "plan", "recover", "paper", "compare")  # imports go up this list only


def imported(path):
    """The modules of the package that a file of it imports, as tuples ("measure", "moments")."""
    place = path.relative_to(ROOT / "dha_utils").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield (*place[: len(place) - node.level], *(node.module or node.names[0].name).split("."))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_imports_go_one_way(chapter):
    """`HeadPlan` needs nothing, and lies lower than its chapter; runs.py, below all of them, imports none."""
    assert {path.parent.name for path in (ROOT / "dha_utils").glob("*/*.py")} == set(CHAPTERS)
    allowed = {*CHAPTERS[: CHAPTERS.index(chapter) + 1], "runs"}
    files = list((ROOT / "dha_utils" / chapter).glob("*.py"))
    above = {(path.name, *module) for path in files for module in imported(path) if module[0] not in allowed}
    assert {names[1:] for names in above} <= {("plan", "head_plan")}
    assert not list(imported(ROOT / "dha_utils" / "runs.py"))


def test_the_library_alone_imports_nothing_of_the_notebooks():
    heavy = "peft datasets gensim gguf matplotlib seaborn IPython papermill".split()
    code = f"import sys, dha_utils; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_tests_mirror_the_modules():
    """Each module has tests of its own; what crosses several, or is tested through them, is named here."""
    elsewhere = {
        "fuse/layer",
        "fuse/mean",
        "model/config",
        "__main__",
        "plots",
        "maps",
        "diagrams",
    }
    elsewhere |= {"sources/precision", "measure/stream"}  # test_dtypes.py, and all that walks
    elsewhere |= {"sources/shards", "sources/output", "measure/walk", "compare/card"}  # test_convert.py
    elsewhere |= {"compare/wording"}  # test_report.py
    modules = {path.relative_to(ROOT / "dha_utils").with_suffix("").as_posix() for path in ROOT.glob("dha_utils/**/*.py")}
    modules = {name for name in modules if not name.endswith("__init__")}
    tests = {path.relative_to(ROOT / "tests").as_posix() for path in ROOT.glob("tests/**/test_*.py")}
    tested = {name for name in modules if "/".join([*name.split("/")[:-1], f"test_{name.split('/')[-1]}.py"]) in tests}
    assert modules - tested == elsewhere


def test_modules_hold_one_idea():
    long = {path.name: n for path in ROOT.glob("dha_utils/**/*.py") if (n := len(path.read_text().splitlines())) > 250}
    assert not long


def test_both_ends_of_the_range_of_transformers_are_tested():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    [transformers] = [Requirement(line) for line in dependencies if line.startswith("transformers")]
    ends = dict(re.findall(r"^(OLDEST|NEWEST) := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    oldest, newest = (version.split(".") for version in (ends["OLDEST"], ends["NEWEST"]))
    assert str(transformers.specifier) == f"<{newest[0]}.{int(newest[1]) + 1},>={oldest[0]}.{oldest[1]}"


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()}
    named = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    assert {re.split("[<>=[]", name)[0] for name in named} - {project["name"]} <= pinned


def test_readme_table_is_what_the_benchmark_prints():
    command = [sys.executable, "benchmarks/readme.py"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    shown = re.search(r"readme.py -->\n(.*?)\n<!--", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown[1] == table


def test_data_readme_has_the_checksum_of_every_file():
    readme = (ROOT / "data" / "README.md").read_text()
    for path in [*(ROOT / "data" / "austen-mha").iterdir(), ROOT / "data" / "austen.jsonl.bz2"]:
        assert hashlib.sha256(path.read_bytes()).hexdigest() in readme, path.name
    text = datapath("enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2")
    assert hashlib.sha256(Path(text).read_bytes()).hexdigest() in readme
    assert SMOLLM2_SHA256 in readme
