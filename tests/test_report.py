"""The report, the slides and the words of notebook 06."""

import ast
import re
import string
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from report import in_language, main, report_of, slides_of

from dha_utils.compare.decision import gate
from dha_utils.compare.wording import JAPANESE, wording
from dha_utils.report import findings, roll_out, used, worst_contexts

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "06_decision_report.ipynb"


def fields(text):
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


@pytest.mark.parametrize("english", JAPANESE)
def test_a_translation_has_the_figures_of_its_sentence(english):
    assert fields(english) == fields(JAPANESE[english])


def said(source):
    """The texts that a piece of code says: `say("…")`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "say" and isinstance(node.args[0], ast.Constant):
            yield node.args[0].value


def test_everything_that_is_said_is_translated():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    sources += [(ROOT / "dha_utils" / name).read_text() for name in ("report.py", "diagrams.py")]
    texts = {text for source in sources for text in said(source)}
    assert len(texts) > 20 and not texts - JAPANESE.keys()
    assert all(cell.metadata["ja"].strip() for cell in cells if cell.cell_type == "markdown")


def test_five_slides_and_the_decision_first():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    slides = slides_of(in_language(notebook, "en")).cells
    headings = [cell.source.split("\n")[0] for cell in slides if cell.metadata["slideshow"]["slide_type"] == "slide"]
    assert len(headings) == 5 and "Decision" in headings[-1]
    cells = report_of(in_language(notebook, "en")).cells
    assert cells[0].source.startswith("# ") and cells[1].source == "## Decision"
    assert shows_figures(cells[2]) and not any("## Try this" in cell.source for cell in cells)


def shows_figures(cell):
    return any("%" in output.get("data", {}).get("text/markdown", "") for output in cell.get("outputs", []))


def test_a_slide_has_the_chart_not_the_table_below_it():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    outputs = [[list(o["data"])[0] for o in cell.get("outputs", [])] for cell in slides_of(notebook).cells]
    assert sum(kinds == ["image/png"] for kinds in outputs) == 3 and shows_figures(notebook.cells[-1])


def test_the_pages_are_made_in_the_language_of_the_run(tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.metadata["papermill"] = {"parameters": {"language": "ja"}}
    nbformat.write(notebook, tmp_path / "06_decision_report.ipynb")
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path / "06_decision_report.ipynb")])
    main()
    page = (tmp_path / "report.html").read_text()
    assert "判定" in page and "open_run(" not in page
    assert not re.findall(r'(?:src|href)="https?:|import\("http', page), "fetched from elsewhere"
    assert "unpkg.com" not in page, "a widget is fetched from elsewhere"
    assert "reveal" in (tmp_path / "slides.html").read_text()


@pytest.mark.parametrize("verdict, tick", [("GO", "x"), ("NO-GO", " "), ("CANNOT TELL", " ")])
def test_only_a_go_is_a_step_done(verdict, tick):
    baseline = {"text": "austen", "metrics": {"loss": {"mean": 2.0, "limit": 2.1}}, "false_alarms": 0.0004}
    steps = roll_out(wording(), verdict, baseline, "a run/baseline.json", "m", 0.25, 0.6, {"austen": 0.7, "wikipedia": 0.5})
    assert steps.startswith(f"- [{tick}] **offline") and steps.count("[x]") == (tick == "x")
    assert "--baseline 'a run/baseline.json'" in steps and "in one of 2,500 checks" in steps
    assert "here 70% (austen), 50% (wikipedia)" in steps
    assert "allows 11% more perplexity" in steps, "e to the 0.1 nats between mean and limit"


def test_a_sentence_needs_its_translation_a_name_does_not():
    say = wording("ja")
    assert say("all {count} gates hold.", count=3) == "3 個のゲートすべてを満たしています。"
    with pytest.raises(KeyError):
        say("never translated")
    table = say(pd.DataFrame({"must be": ["at most"], "x": [1]}, index=pd.Index(["sciq"], name="task")))
    assert table.columns.tolist() == ["条件", "x"] and table.iloc[0, 0] == "以下"
    assert table.index.name == "課題" and table.index.tolist() == ["sciq"]
    assert wording("en")("all {count} gates hold.", count=3) == "all 3 gates hold."


@pytest.mark.parametrize("most", [True, False])
def test_at_its_limit_a_gate_is_used_up(most):
    assert used(0.25, gate(0.25, 0.25, 0.25, 0.25, most)) == pytest.approx(1)
    better, worse = (0.2, 0.3) if most else (0.3, 0.2)
    assert used(better, gate(0, 0, 0, 0.25, most)) < 1 < used(worse, gate(0, 0, 0, 0.25, most))


@pytest.mark.parametrize("language", ["en", "ja"])
def test_what_is_not_judged_is_said(language):
    one = pd.DataFrame({"mean": [3.0, 0.1, 0.8], "low": 0.05, "high": 0.15}, index=["source_loss", "increase", "agree"])
    scores = pd.DataFrame({"source": [0.5, 0.05], "model": [0.4, 0.02], "items": 100, "lost": 12, "won": 3}, ["a", "b"])
    limits = {"largest_increase": 0.15, "smallest_agreement": 0.6, "largest_task_drop": 0.1, "most_flips": 0.25}
    speed = {"times as fast, measured": 1.5, "times as fast, predicted from bytes": 2.5}
    named = {"verdict": "GO", "because": "", "model": "m", "checkpoint": "c", "size": 1.0, "kept": 0.25, "batch": 8}
    named |= {"context": 1000, "prompts": 3, "length": 256}
    means, circles = {"austen": one, "wikipedia": 2 * one}, {"source": 0.125, "converted model": 0.375}
    told = findings(
        wording(language), means, scores, ["b"], circles, speed, limits | {"smallest_saving": 0.125}, **named
    ).split("\n")
    assert len(told) == 8 and all(line.startswith("- ") for line in told)
    assert "20.1" in told[1] and "10.5%" in told[1] and "22.1%" in told[1]
    assert "15%" in told[2] and "200" in told[2]
    assert "38%" in told[4] and "12%" in told[4] and "b (5% → 2%)" in told[5] and "60%" in told[6]


class Letters:
    def decode(self, tokens):
        return "".join(chr(97 + int(token)) for token in tokens)


def test_the_worst_context_comes_first():
    blocks = torch.arange(8).view(2, 4)
    tokens = pd.DataFrame({"block": [0, 1], "position": [2, 3], "kl": [0.5, 3.0], "source_best": [1, 0], "best": [2, 5]})
    table = worst_contexts(Letters(), blocks, tokens, wording(), count=1)
    assert table.iloc[0].tolist() == ["'efg'", "'h'", "'a'", "'f'", 3.0]
