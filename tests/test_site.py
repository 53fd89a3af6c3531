"""The pages of the site: what is folded in JupyterLab is folded there."""

import runpy
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

pages = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "pages.py"))


def test_a_folded_cell_keeps_its_output_only(tmp_path):
    cells = [
        new_code_cell("method"),
        new_code_cell("plumbing", metadata={"jupyter": {"source_hidden": True}, "tags": ["x"]}),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "a.ipynb")
    pages["add_notebook"](tmp_path / "a.ipynb", tmp_path / "site" / "a.ipynb")
    shown = nbformat.read(tmp_path / "site" / "a.ipynb", as_version=4)
    assert [cell.metadata.get("tags", []) for cell in shown.cells] == [[], ["x", "folded"]]
    assert "remove_input_tags: [folded]" in (Path(__file__).parents[1] / "docs" / "mkdocs.yml").read_text()
