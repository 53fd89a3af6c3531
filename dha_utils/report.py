"""The charts of notebook 06, and what it says in words; in English, or by `wording` in another language."""

import shlex

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from .compare.decision import GO
from .measure.perplexity import interval
from .plots import COLORS

BEFORE, AFTER = COLORS[7], COLORS[0]  # the source, the converted model


def document_ratios(tables, say):
    """Perplexity over the source's: a dot a document, and the mean over documents with its interval, a row a kind of text.

    `tables`: {kind of text: `by_document`}.
    """
    figure, axis = plt.subplots(figsize=(9, 1.4 + 0.9 * len(tables)), layout="constrained")
    for row, (color, table) in enumerate(zip(COLORS, tables.values())):
        ratios = np.exp(table["increase"])
        axis.scatter(ratios, np.full(len(ratios), row), s=30, alpha=0.5, color=color)
        mean, low, high = np.exp(interval(table["increase"]))
        axis.errorbar(mean, row + 0.25, xerr=[[mean - low], [high - mean]], fmt="D", capsize=4, color=color)
    axis.axvline(1, color="black", linestyle="--")
    axis.set_yticks(range(len(tables)), list(tables))
    axis.set(ylim=(len(tables) - 0.5, -0.5), xlabel=say("perplexity, times the source's"))
    axis.set_title(say("What the conversion costs, document by document (diamonds: mean and 95 % interval)"))
    return figure


def task_scores(table, say):
    """Shares of right answers of source and model with their standard errors, a row a task; `table`: `compare_answers`."""
    figure, axis = plt.subplots(figsize=(9, 1.4 + 0.6 * len(table)), layout="constrained")
    for offset, name, color in ((-0.12, "source", BEFORE), (0.12, "model", AFTER)):
        share = table[name].astype(float)
        error = np.sqrt(share * (1 - share) / table["items"].astype(float))
        label = say("source") if name == "source" else say("converted model")
        axis.errorbar(share, np.arange(len(table)) + offset, xerr=error, fmt="o", capsize=3, color=color, label=label)
    axis.set_yticks(range(len(table)), table.index)
    axis.set(ylim=(len(table) - 0.5, -0.5), xlim=(0, 1), xlabel=say("share of right answers (bars: standard error)"))
    axis.set_title(say("The same questions, before and after"))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def share_map(before, after, say):
    """Change of each head's share in what its layer's attention adds (percentage points), from `head_shares`."""
    change = 100 * (after - before)
    size = (min(3.5 + 0.6 * change.shape[1], 11), min(1.8 + 0.35 * len(change), 9))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    reach = max(abs(change).max(), 1e-9)
    annotations = np.round(change) + 0.0 if change.size <= 100 else False  # no -0
    scale = {"cmap": "vlag", "vmin": -reach, "vmax": reach, "cbar_kws": {"label": say("percentage points")}}
    sns.heatmap(change, ax=axis, annot=annotations, fmt=".0f", **scale)
    axis.tick_params(axis="y", rotation=0)
    axis.set(
        xlabel=say("query head"),
        ylabel=say("layer"),
        title=say("Change of each head's share in what its layer's attention adds"),
    )
    return figure


def serving_chart(served, title, say):
    """Requests that fit, source and converted model side by side: a panel an accelerator, a row a model; from `serving`."""
    accelerators = served.index.unique("accelerator")
    figure, axes = plt.subplots(1, len(accelerators), figsize=(12, 3.6), sharey=True, squeeze=False, layout="constrained")
    for axis, accelerator in zip(axes[0], accelerators):
        requests = served.xs(accelerator, level="accelerator")["requests"].unstack("version", sort=False)
        for offset, share, color in zip((-0.2, 0.2), requests, (BEFORE, AFTER)):
            bars = axis.barh(np.arange(len(requests)) + offset, requests[share], 0.38, color=color, label=share)
            axis.bar_label(bars, [f"{n:,.0f}" for n in requests[share]], padding=2, fontsize=9)
        axis.set_yticks(range(len(requests)), requests.index)
        axis.set(title=accelerator, xlabel=say("requests"), xscale="symlog")
        axis.margins(x=0.25)
    axes[0, 0].invert_yaxis()
    axes[0, -1].legend(loc="lower right")
    figure.suptitle(title)
    return figure


def gate_chart(table, say):
    """Each gate's interval as a share of what it allows: 1 is the limit, left of it is well. `table`: of `decision`."""
    figure, axis = plt.subplots(figsize=(9, 1.4 + 0.5 * len(table)), layout="constrained")
    colors = {"GO": COLORS[2], "NO-GO": COLORS[3], "CANNOT TELL": COLORS[1]}
    for place, row in enumerate(table.to_dict("records")):
        measured, low, high = (used(row[column], row) for column in ("measured", "low", "high"))
        low, high = sorted((low, high))
        axis.plot([low, high], [place, place], color=colors[row["verdict"]], linewidth=3)
        axis.plot(measured, place, "o", color=colors[row["verdict"]])
        axis.text(1.02, place, say(row["verdict"]), transform=axis.get_yaxis_transform(), va="center")
    axis.axvline(1, color="black", linestyle="--")
    signs = {"at most": "≤", "at least": "≥"}
    rows = zip(table.index, table["measured"], table["must be"], table["limit"])
    axis.set_yticks(
        range(len(table)), [f"{name}: {got:.0%} ({signs[must]} {limit:.0%})" for name, got, must, limit in rows]
    )
    axis.set(
        ylim=(len(table) - 0.5, -0.5), xlim=(0, None), xlabel=say("how much of its limit is used up (right of 1: it fails)")
    )
    axis.set_title(say("Gates: measured, with 95 % intervals"))
    return figure


def used(value, row):
    """How much of what its gate allows a value uses up: with `at least`, of the way from 1 down to the limit."""
    if row["must be"] == "at most":
        return value / row["limit"] if row["limit"] else float(value > 0)
    return (1 - value) / (1 - row["limit"]) if row["limit"] < 1 else float(value < 1)


def worst_contexts(tokenizer, blocks, tokens, say, count=5, before=16):
    """Where the two models differ most: the text before, the true token, what each expected; from `token_drift`."""
    rows = []
    for row in tokens.nlargest(count, "kl").itertuples():
        block = blocks[row.block]
        said = tokenizer.decode(block[max(row.position - before, 0) : row.position])
        words = (tokenizer.decode([token]) for token in (block[row.position], row.source_best, row.best))
        names = ("true token", "source expects", "model expects")
        rows.append({"text before": repr(said)} | dict(zip(names, map(repr, words))) | {"KL (nats)": round(row.kl, 2)})
    return say(pd.DataFrame(rows))


def roll_out(say, verdict, baseline, path, name, kept, asked, measured):
    """A checklist (markdown) from this report to all users and back, with the figures that each step has to meet.

    `baseline`, at `path`: of `write_baseline`; `kept`: share of the cache; `asked`: agreement with the source, `measured`:
    {kind of text: the same}.
    """
    loss, rate = baseline["metrics"]["loss"], baseline["false_alarms"]
    steps = {
        "offline": say(
            "This report: {verdict}; {name} at {kept:.0%} of its cache.", verdict=say(verdict), name=name, kept=kept
        ),
        "shadow traffic": say(
            "Answer a copy of real requests, show nobody. "
            "Agreement with the source, both reading the same text (`dha_utils.compare.drift.token_drift`), at least "
            "{agreement:.0%}; here {measured}.",
            agreement=asked,
            measured=", ".join(f"{share:.0%} ({text})" for text, share in measured.items()),
        ),
        "canary": say(
            "A small share of users. LM loss at most {limit:.3f} nats a token on text like {text} (here {mean:.3f}): an "
            "alarm for drift and no limit of quality, since it allows {more:.0%} more perplexity than was accepted. "
            "Memory a request {share:.0%} of the source's.",
            more=np.exp(loss["limit"] - loss["mean"]) - 1,
            text=baseline["text"],
            limit=loss["limit"],
            mean=loss["mean"],
            share=kept,
        ),
        "full": say(
            "`python -m dha_utils monitor --baseline {path} --model … --text …` on fresh text: "
            "exits with 1 on drift; of an unchanged model in one of {checks:,.0f} checks.",
            path=shlex.quote(path),
            checks=1 / rate,
        ),
        "way back": say(
            "The source's weights stay where they are: requests go back to it. "
            "Its cache is {times:.1f} times as large: until this way is given up, the memory saved cannot be given to more "
            "requests.",
            times=1 / kept,
        ),
    }
    ticks = {"offline": "x"} if verdict == GO else {}
    return "\n".join(f"- [{ticks.get(step, ' ')}] **{say(step)}.** {text}" for step, text in steps.items())


def findings(say, means, scores, unjudged, circles, speed, limits, **named):
    """What notebook 06 found (markdown), the verdict first and what it does not cover last.

    `means`: {kind of text: `summary`}, the first two are told; `scores`: of `compare_answers`; `unjudged`: tasks without a
    gate; `circles`: {model: share repeated}; `limits`: {parameter of a gate: value}.
    """
    (text, here), (other, there) = list(means.items())[:2]
    before, elsewhere = (np.exp(table.loc["source_loss", "mean"]) for table in (here, there))
    turned = (scores["lost"] + scores["won"]).sum() / scores["items"].sum()
    lines = [
        say("**{verdict}** for {model} ({size:.3g} million weights), `{checkpoint}`: {because}", **named),
        say(
            "Perplexity on {text} rises from {before:.1f} by {mean:.1%} (95 % interval {low:.1%} to {high:.1%}), on "
            "{other} from {elsewhere:.1f} by {more:.1%}.",
            text=text,
            before=before,
            **(np.exp(here.loc["increase"]) - 1).round(6),
            other=other,
            elsewhere=elsewhere,
            more=np.exp(there.loc["increase", "mean"]) - 1,
        ),
        say(
            "Both models expect the same token in {agreement:.0%} of places on {text}, in {elsewhere:.0%} on {other}; "
            "{turned:.0%} of {count} answers turned right or wrong.",
            agreement=here.loc["agree", "mean"],
            text=text,
            elsewhere=there.loc["agree", "mean"],
            other=other,
            turned=turned,
            count=int(scores["items"].sum()),
        ),
        say(
            "The cache is {kept:.0%} of the source's; on this machine {fast:.2f} times as many tokens a second "
            "({predicted:.2f} predicted from bytes), {batch} users with {context:,} tokens each.",
            fast=speed["times as fast, measured"],
            predicted=speed["times as fast, predicted from bytes"],
            **named,
        ),
        say(
            "Always taking the likeliest token, it repeats {after:.0%} of what it writes, the source {before:.0%} "
            "({prompts} prompts; no gate).",
            after=circles["converted model"],
            before=circles["source"],
            **named,
        ),
    ]
    if len(unjudged):
        rights = (f"{task} ({scores.loc[task, 'source']:.0%} → {scores.loc[task, 'model']:.0%})" for task in unjudged)
        lines.append(
            say(
                "Not judged, since the source has at most {largest_task_drop:.0%} right: {tasks}.",
                tasks=", ".join(rights),
                **limits,
            )
        )
    lines += [
        say(
            "The limits are parameters, examples unless you set them: perplexity at most {largest_increase:.0%} more, "
            "agreement at least {smallest_agreement:.0%}, right answers at most {largest_task_drop:.0%} fewer, answers "
            "turned at most {most_flips:.0%}, cache at least {smallest_saving:.0%} smaller.",
            **limits,
        ),
        say(
            "Not measured here: quality beyond {length} tokens of context, how well a passage that was read before is "
            "copied (where fewer heads lose most), how instructions are followed, speed on an accelerator. One "
            "conversion, one seed: the intervals are over texts and questions only. "
            "Other sizes, and other ways to the same size: notebook 5.",
            **named,
        ),
    ]
    return "\n".join(f"- {line}" for line in lines)
