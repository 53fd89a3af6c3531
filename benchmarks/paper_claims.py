"""The paper's method and its claims at a scale anyone can rerun: eight ways to the same head budget, on the same tokens.

    python benchmarks/paper_claims.py --learning-rates 5e-4 2e-3      # austen-mha, 25 % and 50 %; two hours on one core
    python benchmarks/paper_claims.py --model smollm2-135m --length 512 --budgets 0.5 --tokens 0 100000

Tokens are counted from the first step of the search; a run at T tokens has its own schedule. A tenth of them goes to
the search (at most its 240 steps), at most half to learning the fusion, the rest to continued pre-training of all
weights on the LM loss, at each of the learning rates: what suits a broken start is too fast for one that is nearly the
source. Where the CSV has fewer tokens already, only at the one that did best there and at faster ones, which longer
runs bear until they have read the text twice, for each method and budget apart. Runs resume, and then have no seconds;
those that the CSV already has are not repeated. Of smollm2-135m, some had one rate only: those on 300,000 tokens the one
that did best on fewer, but for the two mean-pooled DHA; on 100,000, GQA by CKA the better one of GQA, and spectral
fusion with seeds 1 and 2 the better one of seed 0. Its rows with the device cuda: an H200, --device cuda, up to 20 runs
beside one another, which makes their seconds long, in TF32 (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1), but for spectral fusion.
"""

import argparse
import time
from functools import partial
from pathlib import Path

from inputs import add_inputs, parsed, source_and_text
from study_claims import at_best_rate

from dha_utils import (
    HeadPlan,
    fuse,
    head_similarity,
    perplexity,
    plan_heads,
    pretrain,
)
from dha_utils.measure.perplexity import scored_tokens
from dha_utils.paper.linear import learn_fusion
from dha_utils.paper.search import anneal, score_partitions, search_scores
from dha_utils.plan.allocate import heads_for_budget, knapsack, uniform_counts, uniform_plan
from dha_utils.plan.head_plan import neighbours_plan
from dha_utils.plan.partition import pairwise_cost, partition_costs, plan_of_counts
from dha_utils.recover.training import training_log
from dha_utils.runs import ROOT, append_rows, has_row, rows_with
from dha_utils.sources.text import drawn

SEARCH_STEPS = 240
SEARCH_SHARE, FUSION_SHARE = 0.1, 0.5
TOKENS_PER_STEP = 2048


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inputs(parser, "austen-mha", "paper_claims")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--tokens", type=int, nargs="+", default=[0, 100_000, 300_000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[2e-4, 5e-4], help="of the pre-training")
    parser.add_argument("--length", type=int, default=256, help="tokens a block")
    parser.add_argument("--calibration-blocks", type=int, default=16, help="for CKA on text and for spectral fusion")
    parser.add_argument("--validation-blocks", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    return parsed(parser)


class Study:
    """What the runs of one model share: its text, and how many tokens each stage of a run has used."""

    def __init__(self, arguments):
        self.name, self.length = Path(arguments.model).name, arguments.length
        self.source, _, self.training, self.validation = source_and_text(arguments, arguments.device)
        self.calibration_blocks = arguments.calibration_blocks


def gqa(study, budget, tokens, seed, folder):
    """(a) GQA: neighbours, mean-pooled."""
    plan = uniform_plan(study.source.config, heads_for_budget(study.source.config, budget))
    return fuse(study.source, plan, method="mean"), 0


def gqa_by_cka(study, budget, tokens, seed, folder):
    """(b) GQA whose groups, (nearly) equal in size and as many in every layer, are annealed on the CKA of the weights."""
    config = study.source.config
    similarity = head_similarity(study.source)
    counts = uniform_counts(config, heads_for_budget(config, budget))
    distances = (2 - similarity["key"] - similarity["value"]).tolist()
    groups = [
        [anneal(pairwise_cost(layer), config.num_key_value_heads, kept, seed)[1] for kept in count]
        for layer, count in zip(distances, counts)
    ]
    return fuse(study.source, HeadPlan(*map(list, zip(*groups))), method="mean"), 0


def dha(study, budget, tokens, seed, folder, groups="search", allocation="knapsack", fusion="linear"):
    """The paper's method: search, fusion; with parts of it left out on demand."""
    config = study.source.config
    heads = heads_for_budget(config, budget)
    steps = min(SEARCH_STEPS, int(SEARCH_SHARE * tokens / study.length))
    scores = search_scores(
        study.source, study.training, steps, study.length, seed=seed, snapshots=1, output_dir=folder / "search"
    )
    partitions = score_partitions(scores[steps], config.num_key_value_heads, seed=seed)
    counts = knapsack(partition_costs(partitions), heads) if allocation == "knapsack" else uniform_counts(config, heads)
    plan = plan_of_counts(partitions, counts)
    used = steps * study.length
    if groups == "neighbours":
        plan = neighbours_plan(config, counts)
    if fusion == "mean":
        return fuse(study.source, plan, method="mean"), used
    step = fusion_step(tokens, study.length)
    fused = learn_fusion(
        study.source,
        plan,
        study.training,
        int(FUSION_SHARE * tokens) // step * step,
        tokens_per_step=step,
        seed=seed,
        output_dir=folder / "fusion",
    )
    log = training_log(folder / "fusion")
    return fused, used + int(log["tokens"].iloc[-1])


def fusion_step(tokens, length):
    """`TOKENS_PER_STEP`, fewer where that would leave the fusion less than 200 steps."""
    return max(length, min(TOKENS_PER_STEP, int(FUSION_SHARE * tokens / 200) // length * length))


def spectral(study, budget, tokens, seed, folder):
    """(g) ours: spectral fusion, heads allocated by measured loss, on calibration blocks drawn by the seed."""
    calibration = drawn(study.training, study.calibration_blocks, seed)
    return fuse(study.source, plan_heads(study.source, calibration, budget, allocation="loss"), calibration), 0


METHODS = {
    "GQA": gqa,
    "GQA, groups by CKA": gqa_by_cka,
    "DHA layout, mean-pooled neighbours": partial(dha, groups="neighbours", fusion="mean"),
    "DHA without adaptive allocation": partial(dha, allocation="uniform"),
    "DHA without learned fusion": partial(dha, fusion="mean"),
    "DHA": dha,
    "spectral": spectral,
    "source": lambda study, *_: (study.source, 0),
}
SEARCHED = [name for name in METHODS if name.startswith("DHA")]


def planned_runs(arguments):
    """The runs asked for, cheapest first; the source has one budget, and without tokens there is no search."""
    for tokens in sorted(arguments.tokens):
        for seed in arguments.seeds:
            for budget in arguments.budgets:
                for method in arguments.methods:
                    if (tokens == 0 and method in SEARCHED) or (method == "source" and budget != arguments.budgets[0]):
                        continue
                    share = 1.0 if method == "source" else budget
                    yield {"method": method, "budget": share, "tokens": tokens, "seed": seed, "text": arguments.text}


def rates_to_try(out, run, rates, text_tokens):
    """Of the learning rates, the one that did best with the most tokens below this run's and faster ones.

    All of them where the CSV has no fewer tokens, and where the text is read more than twice: a fast rate overfits it.
    """
    if run["tokens"] > 2 * text_tokens:
        return rates
    rows = rows_with(out, {name: run[name] for name in ("method", "budget", "text")})
    if len(rows):
        rows = rows[(rows["tokens"] < run["tokens"]) & rows["learning_rate"].isin(rates)]
    if not len(rows):
        return rates
    best = at_best_rate(rows[rows["tokens"] == rows["tokens"].max()])["learning_rate"].min()
    return [rate for rate in rates if rate >= best]


def measure(study, run, learning_rates):
    """The rows of one run, one for each learning rate of the pre-training; without tokens to train on they are one."""
    folder = ROOT / "runs" / "paper_claims" / study.name / "-".join(str(part).replace(" ", "_") for part in run.values())
    resumed, begin = folder.exists(), time.perf_counter()
    start, used = METHODS[run["method"]](study, run["budget"], run["tokens"], run["seed"], folder)
    left = (run["tokens"] - used) // TOKENS_PER_STEP * TOKENS_PER_STEP
    counts = start.config.head_counts() if run["method"] != "source" else []
    heads = study.source.config.num_key_value_heads * study.source.config.num_hidden_layers
    log = folder / "fusion" / "log.csv"
    row = run | {
        "model": study.name,
        "perplexity_before_pretraining": perplexity(start, study.validation),
        "tokens_before_pretraining": used,
        "fusion_loss": training_log(log.parent)["fusion_loss"].iloc[-1] if log.exists() else None,
        "key_heads": sum(keys for keys, _ in counts) or heads,
        "value_heads": sum(values for _, values in counts) or heads,
        "heads_by_layer": " ".join(f"{keys}+{values}" for keys, values in counts),
        "text_tokens": study.training.numel(),
        "device": study.source.device.type,
    }
    before = time.perf_counter() - begin
    for rate in learning_rates:
        begin = time.perf_counter()
        model = start
        if left:
            model = pretrain(
                start,
                study.training,
                left,
                trainable="all",
                learning_rate=rate,
                tokens_per_step=TOKENS_PER_STEP,
                seed=run["seed"],
                evaluations=1,
                output_dir=folder / f"pretraining-{rate:g}",
            )
        result = {"learning_rate": rate, "perplexity": perplexity(model, study.validation)}
        yield row | result | {"seconds": None if resumed else round(before + time.perf_counter() - begin)}


def main():
    arguments = parse_arguments()
    study = Study(arguments)
    scored = {"validation_tokens": scored_tokens(study.validation)}
    for run in planned_runs(arguments):
        rates = (
            rates_to_try(arguments.out, run, arguments.learning_rates, study.training.numel()) if run["tokens"] else [0.0]
        )
        rates = [rate for rate in rates if not has_row(arguments.out, run | scored | {"learning_rate": rate})]
        if not rates:
            continue
        append_rows(arguments.out, [row | scored for row in measure(study, run, rates)])
        print(f"{run['method']}, budget {run['budget']:.0%}, {run['tokens']:,} tokens, seed {run['seed']}", flush=True)


if __name__ == "__main__":
    main()
