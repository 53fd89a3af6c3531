"""The pages of the site: what is folded in JupyterLab is folded there."""

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook, new_output
from pages import add_notebook


def test_a_folded_cell_keeps_its_output_only(tmp_path):
    cells = [
        new_code_cell("method", outputs=[new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}})]),
        new_code_cell("plumbing", metadata={"jupyter": {"source_hidden": True}, "tags": ["x"]}),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "a.ipynb")
    add_notebook(tmp_path / "a.ipynb", tmp_path / "site" / "a.ipynb")
    shown = nbformat.read(tmp_path / "site" / "a.ipynb", as_version=4)
    assert [cell.metadata.get("tags", []) for cell in shown.cells] == [[], ["x", "folded"]]
    assert not shown.cells[0].outputs, "a bar that stands still"
    assert "remove_input_tags: [folded]" in (Path(__file__).parents[1] / "docs" / "mkdocs.yml").read_text()
