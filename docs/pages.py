"""Lay out the pages of the site for mkdocs: README, executed notebooks, the API.

make site       # runs this, and mkdocs on docs/mkdocs.yml
"""

import argparse
import shutil
from importlib.metadata import distribution
from pathlib import Path

import nbformat
from report import without_widgets

import dha_utils

ROOT = Path(__file__).resolve().parents[1]
CSS = """
.md-grid { max-width: 82rem; }
.jp-RenderedHTMLCommon table { font-size: 0.7rem; }
"""
MATHJAX = 'window.MathJax = { tex: { inlineMath: [["$", "$"], ["\\\\(", "\\\\)"]] } };\n'


def add_notebook(source, target):
    """A copy of an executed notebook; what is folded in JupyterLab is left out, with its output kept."""
    notebook = without_widgets(nbformat.read(source, as_version=4))
    for cell in notebook.cells:
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "folded"]
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder on the larger model, as `make run` leaves it")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.out.exists():
        shutil.rmtree(arguments.out)
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        add_notebook(path, arguments.out / path.relative_to(ROOT))
    for path in sorted(arguments.run.glob("0*.ipynb")):
        add_notebook(path, arguments.out / "larger" / path.name)
    shutil.copytree(ROOT / "benchmarks" / "results", arguments.out / "benchmarks" / "results")
    (arguments.out / "benchmarks" / "tasks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "tasks" / "README.md", arguments.out / "benchmarks" / "tasks")
    shutil.copytree(ROOT / "docs" / "examples", arguments.out / "docs" / "examples")
    shutil.copy(ROOT / "README.md", arguments.out / "index.md")
    (arguments.out / "site.css").write_text(CSS)
    # Formulas without the network: MathJax as a package of the registry has it
    package = distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax")
    (arguments.out / "mathjax").mkdir()
    (arguments.out / "mathjax" / "settings.js").write_text(MATHJAX)
    shutil.copy(package / "tex-chtml.js", arguments.out / "mathjax")
    shutil.copytree(package / "output", arguments.out / "mathjax" / "output")
    names = "\n".join(f"::: dha_utils.{name}\n" for name in dha_utils.__all__)
    (arguments.out / "api.md").write_text(f"# What `from dha_utils import …` has\n\n{names}")


if __name__ == "__main__":
    main()
