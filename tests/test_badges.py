"""Badges for Colab and Binder: the addresses, and what the first cell does in either."""

import shutil
import sys

import nbformat
import papermill
import pytest
import test_repository
from badges import NAMES, ROOT, main
from IPython.core.inputtransformer2 import TransformerManager


@pytest.fixture
def copy(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name in ("README.md", *(f"notebooks/{name}.ipynb" for name in NAMES)):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_both_notebooks_and_the_readme_have_them_once(copy):
    main(copy, "somebody/else")
    main(copy, "owner/name")
    for name in NAMES:
        path = copy / "notebooks" / f"{name}.ipynb"
        for text in (nbformat.read(path, as_version=4).cells[0].source, (copy / "README.md").read_text()):
            assert text.count(f"https://colab.research.google.com/github/owner/name/blob/main/notebooks/{name}.ipynb") == 1
            assert text.count(f"https://mybinder.org/v2/gh/owner/name/main?urlpath=lab/tree/notebooks/{name}.ipynb") == 1
        assert "somebody" not in path.read_text() + (copy / "README.md").read_text()
        test_repository.test_committed_notebooks_are_executed_without_errors(path)
        test_repository.test_a_notebook_asks_shows_lets_try_and_says_what_it_found(path)
    assert [line for line in (copy / "README.md").read_text().splitlines() if "[![Open" not in line and line] == [
        line for line in (ROOT / "README.md").read_text().splitlines() if "[![Open" not in line and line
    ]


def commands(path, monkeypatch):
    """What the install cell asks of IPython and papermill."""
    asked = []
    monkeypatch.setattr(papermill, "execute_notebook", lambda source, target: asked.append(source))

    class Shell:
        def system(self, line):
            asked.append(line)

        def run_line_magic(self, name, line):
            asked.append(f"%{name} {line}")

    [cell] = [c for c in nbformat.read(path, as_version=4).cells if "install" in c.metadata.get("tags", [])]
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(TransformerManager().transform_cell(cell.source), {"get_ipython": Shell})
    return asked


def test_the_cell_installs_in_colab_and_walks_the_earlier_notebooks(copy, monkeypatch):
    main(copy, "owner/name")
    monkeypatch.chdir(copy)  # where no run is
    first, last = (copy / "notebooks" / f"{name}.ipynb" for name in NAMES)
    assert commands(first, monkeypatch) == commands(last, monkeypatch) == []
    monkeypatch.setenv("BINDER_REPO_URL", "https://github.com/owner/name")
    assert not commands(first, monkeypatch) and len(commands(last, monkeypatch)) == 4
    monkeypatch.delenv("BINDER_REPO_URL")
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    install = [
        "git clone -q https://github.com/owner/name /content/dha",
        "%pip install -q -c /content/dha/constraints.txt -e /content/dha[notebooks]",
    ]
    assert commands(first, monkeypatch) == [*install, "%cd -q /content/dha/notebooks"]
    assert commands(last, monkeypatch)[:2] == install and commands(last, monkeypatch)[3] == "01_head_redundancy.ipynb"
    monkeypatch.setattr("os.path.isdir", lambda path: True)  # after a restart all is there, but for the folder to be in
    assert commands(last, monkeypatch) == ["%cd -q /content/dha/notebooks"]


def test_a_wrong_address_changes_nothing(copy):
    with pytest.raises(SystemExit, match="owner/name on GitHub, not 'https://"):
        main(copy, "https://github.com/owner/name")
    assert (copy / "README.md").read_text() == (ROOT / "README.md").read_text()
