"""The report and the slides of a decision: self-contained pages of an executed notebook 06, without its code.

python docs/report.py runs/NAME/06_decision_report.ipynb     # leaves report.html and slides.html beside it

The language is that which the notebook was executed with (`language`). In the report the decision comes first. The slides
load reveal.js from the network, or from `--reveal`.
"""

import argparse
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter, SlidesExporter

from dha_utils.runs import write_whole

PLAIN = {"exclude_input": True, "exclude_input_prompt": True, "exclude_output_prompt": True}
# No formulas, widgets or diagrams: nothing is fetched from elsewhere
PLAIN |= dict.fromkeys(("mathjax_url", "require_js_url", "mermaid_js_url", "mermaid_layout_elk_js_url"), "")


def language_of(notebook):
    """`en`, or what papermill was told."""
    return notebook.metadata.get("papermill", {}).get("parameters", {}).get("language", "en")


def in_language(notebook, language):
    """A notebook whose prose is in `language`: markdown cells carry their translations in their metadata."""
    notebook = nbformat.from_dict(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and language != "en":
            cell.source = cell.metadata[language]
    return notebook


def report_of(notebook):
    """The decision, its cells tagged `decision`, right behind the title; what a reader tries out is left out."""
    first = [cell for cell in notebook.cells if "decision" in cell.metadata.get("tags", [])]
    rest = [cell for cell in notebook.cells[1:] if cell not in first and "try" not in cell.metadata.get("tags", [])]
    notebook.cells = [notebook.cells[0], *first, *rest]
    return notebook


def slides_of(notebook):
    """The cells that are on a slide."""
    notebook.cells = [cell for cell in notebook.cells if "slideshow" in cell.metadata]
    return notebook


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument(
        "--reveal", default="https://unpkg.com/reveal.js@5", help="where reveal.js lies (default: %(default)s)"
    )
    arguments = parser.parse_args()
    executed = nbformat.read(arguments.notebook, as_version=4)
    language = language_of(executed)
    pages = {
        "report": (HTMLExporter(**PLAIN, language_code=language), report_of),
        "slides": (
            SlidesExporter(**PLAIN, reveal_url_prefix=arguments.reveal, reveal_scroll=True),
            slides_of,
        ),
    }
    for name, (exporter, chosen) in pages.items():
        body, _ = exporter.from_notebook_node(chosen(in_language(executed, language)))
        write_whole(arguments.notebook.with_name(f"{name}.html"), body)


if __name__ == "__main__":
    main()
