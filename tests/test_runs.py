"""Run folders: each holds one run, and knows what it was made from."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from conftest import tiny_llama

from dha_utils.recover import training
from dha_utils.runs import (
    append_rows,
    has_row,
    leave,
    peak_gib,
    read_rows,
    record_metrics,
    require,
    rows_with,
    spending,
    spent_on,
    write_run,
    write_whole,
)


def test_runs_are_named_by_content():
    def name(**changes):
        return training.fingerprint(tiny_llama(**{"num_attention_heads": 4} | changes), torch.arange(6), {"a": 1})

    assert name() == name() != name(seed=1)
    assert (
        len({name(), name(num_attention_heads=2), training.fingerprint(torch.arange(6)), training.fingerprint({"a": 1})})
        == 4
    )
    assert training.fingerprint(torch.arange(6)) != training.fingerprint(torch.arange(6).view(2, 3))


def test_run_folder_keeps_to_one_run(tmp_path):
    run = write_run(tmp_path / "run", {"model": "a", "budget": 0.5})
    assert write_run(tmp_path / "run", {"model": "a", "budget": 0.5}) == run
    with pytest.raises(ValueError, match="holds a run with model 'a', not 'b': choose another run_dir"):
        write_run(tmp_path / "run", {"model": "b", "budget": 0.5})
    with pytest.raises(ValueError, match="run 02_head_clusters first"):
        require(run, "plan.json", "02_head_clusters")
    (tmp_path / "other").mkdir()
    write_whole(tmp_path / "other" / "thesis.txt", "precious")
    with pytest.raises(ValueError, match="something else than a run"):
        write_run(tmp_path / "other", {"model": "a"})
    assert (tmp_path / "other" / "thesis.txt").read_text() == "precious"


def test_metrics_of_a_stage_replace_its_earlier_ones(tmp_path):
    record_metrics(tmp_path, "source", [{"method": "source", "perplexity": 9.0}])
    record_metrics(tmp_path, "trained", [{"method": "x", "perplexity": 8.0}])
    record_metrics(tmp_path, "source", [{"method": "source", "perplexity": 7.0}])
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert sorted(lines) == sorted(["stage,method,perplexity", "trained,x,8.0", "source,source,7.0"])


def test_a_measured_row_is_found_again(tmp_path):
    path, run = tmp_path / "rows.csv", {"method": "mean", "budget": 1 / 3, "seed": 1}
    assert not has_row(path, run)
    append_rows(path, [run | {"perplexity": 23.456789}])
    assert has_row(path, run) and rows_with(path, run)["perplexity"].tolist() == [23.4568]
    assert not has_row(path, run | {"seed": 2}) and not has_row(path, run | {"budget": 0.333})
    assert not has_row(path, run | {"memory_gib": 2.0}), "a column that no row has yet"


def test_rows_without_seconds_leave_those_of_others_as_they_were(tmp_path):
    for seconds in (6, None, None):
        append_rows(tmp_path / "rows.csv", [{"seed": 0, "seconds": seconds}])
    assert (tmp_path / "rows.csv").read_text().split() == ["seed,seconds", "0,6", "0,", "0,"]


def test_what_is_left_of_another_plan_is_not_read(tmp_path):
    """The chain run.json > sensitivities.csv > plan.json > model > recovered, as the notebooks leave it."""
    write_whole(tmp_path / "run.json", "{}")
    chain = ["sensitivities.csv", "plan.json", "model/config.json", "recovered/config.json"]
    for name, source in zip(chain, ([], ["sensitivities.csv"], ["plan.json"], ["model"])):
        write_whole(tmp_path / name, "{}")
        leave(tmp_path, name.split("/")[0], *source)
    for name in ("plan.json", "model", "recovered"):
        assert require(tmp_path, name, "a notebook") == tmp_path / name
    write_whole(tmp_path / "plan.json", json.dumps({"other": 1}))
    leave(tmp_path, "plan.json", "sensitivities.csv")
    require(tmp_path, "plan.json", "02_head_clusters")
    with pytest.raises(ValueError, match="model in .* was made from another plan.json: run 03_head_fusion again"):
        require(tmp_path, "model", "03_head_fusion")
    with pytest.raises(
        ValueError, match="recovered in .* was made from another plan.json: run 04_continued_pretraining again"
    ):
        require(tmp_path, "recovered", "04_continued_pretraining")
    (tmp_path / "model" / ".ipynb_checkpoints").mkdir()
    write_whole(tmp_path / "model" / ".ipynb_checkpoints" / "config.json", "Jupyter's own")
    write_whole(tmp_path / "sent.csv", "by a notebook that was killed before it noted what it was made from")
    with pytest.raises(ValueError, match="sent.csv in .* is not left by a finished notebook: run 02_head_clusters again"):
        require(tmp_path, "sent.csv", "02_head_clusters")
    write_whole(tmp_path / "run.json", json.dumps({"cache_bytes": 3072}))
    with pytest.raises(ValueError, match="plan.json in .* was made from another run.json: run 02_head_clusters again"):
        require(tmp_path, "plan.json", "02_head_clusters")


def test_what_a_step_took_is_noted_once(tmp_path):
    for tokens in (5, 7):
        with spending(tmp_path, "fit", tokens):
            pass
    with spending(tmp_path, "train", 9):
        pass
    with pytest.raises(KeyError), spending(tmp_path, "broken", 1):
        raise KeyError
    table = read_rows(tmp_path / "cost.csv")
    assert dict(zip(table["step"], table["tokens"])) == {"fit": 7, "train": 9}
    assert (table["seconds"] >= 0).all() and (table["peak (GiB)"] > 0.05).all()


def test_what_a_model_took_is_told_from_the_other_trainings(tmp_path):
    assert spent_on(tmp_path, "model").empty
    for step in ("fit", "train: damaged, distilled", "train: repaired, distilled"):
        with spending(tmp_path, step, 9):
            pass
    assert list(spent_on(tmp_path, "model")["step"]) == ["fit"]
    assert list(spent_on(tmp_path, "recovered")["step"]) == ["fit", "train: repaired, distilled"]
    assert spent_on(tmp_path, "a/folder").empty


def test_the_peak_of_a_new_process_is_its_own():
    """Linux hands a parent's ru_maxrss on to its children."""
    held = torch.ones(2**28)  # 1 GiB
    del held
    assert peak_gib() > 1
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        assert 0 < alone.submit(peak_gib).result() < 1
