"""How long each notebook took in a run folder made by `make run` without interruption: minutes, and the cores it had.

make run MODEL=austen-mha BUDGET=0.25 && python benchmarks/notebook_minutes.py runs/austen-mha-0.25
"""

import argparse
import os
from pathlib import Path

import nbformat
import pandas as pd

from dha_utils.runs import write_whole

OUT = Path(__file__).parent / "results" / "notebook_minutes.csv"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    rows = []
    for path in sorted(parser.parse_args().folder.glob("0*.ipynb")):
        told = nbformat.read(path, as_version=4).metadata.papermill
        row = {"model": told["parameters"]["model"], "notebook": path.stem, "minutes": round(told["duration"] / 60, 2)}
        rows.append(row | {"cores": os.cpu_count()})
    new = pd.DataFrame(rows)
    old = pd.read_csv(OUT) if OUT.exists() else new[:0]
    write_whole(OUT, pd.concat([old[~old["model"].isin(new["model"])], new]).to_csv(index=False))


if __name__ == "__main__":
    main()
