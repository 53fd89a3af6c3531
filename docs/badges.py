"""Badges that open notebooks 00 and 05 in Colab and Binder, once the repository has a public address.

python docs/badges.py owner/name     # into README.md and the two notebooks; again to change the address
"""

import argparse
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("00_start_here", "05_compression_vs_perplexity")
# The first code cell: Colab has the notebook alone, Binder the repository and its environment.yml
INSTALL = """\
import os
import sys

if "google.colab" in sys.modules:
    if not os.path.isdir("/content/dha"):
        !git clone -q https://github.com/{address} /content/dha
        %pip install -q -c /content/dha/constraints.txt -e /content/dha[notebooks]
    sys.path.insert(0, "/content/dha")
    %cd -q /content/dha/notebooks"""
# Notebook 05 reads what 01 to 04 leave
EARLIER = """

if ("google.colab" in sys.modules or "BINDER_REPO_URL" in os.environ) and not os.path.isdir("../runs/tutorial/recovered"):
    import papermill

    for name in ("01_head_redundancy", "02_head_clusters", "03_head_fusion", "04_continued_pretraining"):
        papermill.execute_notebook(f"{name}.ipynb", None)  # the run folder is what counts"""


def badges(address, name):
    """The line of markdown with both badges of a notebook."""
    path = f"notebooks/{name}.ipynb"
    colab = f"https://colab.research.google.com/github/{address}/blob/main/{path}"
    binder = f"https://mybinder.org/v2/gh/{address}/main?urlpath=lab/tree/{path}"
    return (
        f"[![Open {name} in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Open {name} in Binder](https://mybinder.org/badge_logo.svg)]({binder})"
    )


def under_the_title(text, line):
    """Markdown with this line below its first, in place of the badges that were there."""
    title, rest = text.split("\n", 1)
    return f"{title}\n\n{line}\n\n" + re.sub(r"\A\s*(\[!\[Open .*\n\s*)*", "", rest)


def renumber(notebook):
    """Count the executions as if the new cell had been run as well: outside of Colab it does nothing."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count


def main(root, address):
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", address):
        raise SystemExit(f"the address of the repository is its owner/name on GitHub, not {address!r}")
    for name in NAMES:
        path = root / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        question, cells = notebook.cells[0], notebook.cells[1:]
        question.source = under_the_title(question.source, badges(address, name))
        install = INSTALL.format(address=address) + (EARLIER if name.startswith("05") else "")
        metadata = {"jupyter": {"source_hidden": True}, "tags": ["install"]}
        cells = [cell for cell in cells if "install" not in cell.metadata.get("tags", [])]
        notebook.cells = [question, nbformat.v4.new_code_cell(install, metadata=metadata), *cells]
        renumber(notebook)
        nbformat.write(notebook, path)
    readme = root / "README.md"
    readme.write_text(under_the_title(readme.read_text(), "\n".join(badges(address, name) for name in NAMES)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="owner/name of the repository on GitHub")
    main(ROOT, parser.parse_args().address)
