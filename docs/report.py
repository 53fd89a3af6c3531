"""The report and the slides of a decision: pages of an executed notebook 06, without its code.

python docs/report.py runs/NAME/06_decision_report.ipynb     # leaves report.html and slides.html beside it

The language is that which the notebook was executed with (`language`). In the report the decision comes first, and
nothing is loaded from elsewhere; the slides load reveal.js from the network.
"""

import argparse
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter, SlidesExporter

from dha_utils.runs import write_whole

PLAIN = {"exclude_input": True, "exclude_input_prompt": True, "exclude_output_prompt": True}
# The report has no formulas, widgets or diagrams: nothing is fetched from elsewhere
ALONE = dict.fromkeys(("mathjax_url", "require_js_url", "mermaid_js_url", "mermaid_layout_elk_js_url"), "")
TITLE = "Decoupled-Head Attention: a decision"


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


def without_widgets(notebook):
    """Bars and sliders need a kernel, and a page would fetch their script from elsewhere."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
    return notebook


def report_of(notebook):
    """What is tagged `decision` right behind the title, without what is tagged `not-in-report`."""
    title, *cells = notebook.cells
    decision, left_out = (
        [cell for cell in cells if tag in cell.metadata.get("tags", [])] for tag in ("decision", "not-in-report")
    )
    notebook.cells = [title, *decision, *(cell for cell in cells if cell not in decision + left_out)]
    return notebook


def slides_of(notebook):
    """The cells that are on a slide; of a chart with its table, the chart."""
    notebook.cells = [cell for cell in notebook.cells if "slideshow" in cell.metadata]
    for cell in notebook.cells:
        charts = [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        if charts:
            cell.outputs = charts
    return notebook


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    path = parser.parse_args().notebook
    executed = without_widgets(nbformat.read(path, as_version=4))
    language = language_of(executed)
    pages = {
        "report": (HTMLExporter(**PLAIN, **ALONE, language_code=language), report_of),
        "slides": (SlidesExporter(**PLAIN, reveal_scroll=True), slides_of),
    }
    for name, (exporter, chosen) in pages.items():
        body, _ = exporter.from_notebook_node(chosen(in_language(executed, language)), {"metadata": {"name": TITLE}})
        write_whole(path.with_name(f"{name}.html"), body)


if __name__ == "__main__":
    main()
