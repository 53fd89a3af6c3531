"""Pack the text `austen`, six novels by Jane Austen, into `data/austen.jsonl.bz2`: a chapter a line.

    apt-get install r-cran-janeaustenr        # or install.packages("janeaustenr") in R
    python data/pack_austen.py

The R package has the texts of Project Gutenberg; they are in the public domain.
"""

import argparse
import bz2
import json
import os
import re
import subprocess
from pathlib import Path

OUT = Path(__file__).parent / "austen.jsonl.bz2"
EXPORT = 'books <- janeaustenr::austen_books(); writeLines(paste(books$book, books$text, sep = "\\t"))'


def chapters(lines):
    """Lines "novel<TAB>text" -> [{"novel", "text"}], a chapter each, one paragraph a line; titles and ends are left out."""
    found = []
    for line in lines:
        novel, text = line.split("\t", 1)
        if re.fullmatch(r"chapter\s+[\divxlc]+\.?", text.strip(), re.IGNORECASE):
            found.append({"novel": novel, "lines": []})
        elif re.fullmatch(r"volume\s+[ivx]+|finis|the end", text.strip(), re.IGNORECASE):
            continue
        elif found and found[-1]["novel"] == novel:
            found[-1]["lines"].append(text)
    for chapter in found:
        paragraphs = re.split(r"\n\s*\n", "\n".join(chapter.pop("lines")))
        chapter["text"] = "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())
    return found


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lines = subprocess.run(["Rscript", "-e", EXPORT], capture_output=True, text=True, check=True).stdout.splitlines()
    packed = "".join(json.dumps(chapter) + "\n" for chapter in chapters(lines))
    partial = OUT.with_name(f".{OUT.name}.partial")
    partial.write_bytes(bz2.compress(packed.encode()))
    os.replace(partial, OUT)


if __name__ == "__main__":
    main()
