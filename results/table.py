"""Compare finished runs: a Markdown table for each data set, and a JSON line for programs.

    python results/table.py RUN_DIR ..

A value is the mean over seeds at the last epoch. R@1 and MAP@R have their standard error after ±. A gain is the mean
difference from the baseline of the same seed. A row is a loss, a mode and a mix weight. Rows may also differ in the
settings of RECIPE, and all runs in those of IGNORED. Any other difference is an error.
"""

import itertools
import json
import statistics
import sys
from operator import itemgetter

LOSSES, MODES = ("contrastive", "multisimilarity", "proxyanchor"), ("baseline", "input", "feature", "embed")
PUBLISHED = {  # the paper's Recall@1, %: for each of LOSSES, its MODES in order
    "cub": (64.7, 66.3, 67.4, 66.4, 67.8, 69.0, 71.4, 70.2, 69.5, 70.5, 71.0, 70.4),
    "cars": (81.6, 82.9, 85.1, 83.9, 87.8, 89.0, 89.6, 88.8, 87.6, 88.2, 89.1, 88.9),
    "sop": (74.9, 75.8, 77.5, 76.7, 76.9, 77.9, 81.0, 78.5, 79.1, 79.8, 81.3, 80.6),
    "inshop": (86.4, 87.7, 89.1, 88.4, 90.1, 91.8, 92.2, 91.9, 90.0, 90.9, 91.9, 91.6),
}
METRICS = ("recall_at_1", "map_at_r", "alignment", "uniformity", "utilization")
TITLES = ("loss", "mode", "seeds", "R@1, %", "gain", "MAP@R, %", "gain", *METRICS[2:], "published R@1, %")
RECIPE = ("epochs", "lr", "lr_step", "lr_gamma", "warmup_epochs", "bn", "images_per_class", "mix_weight")
SETUP = ("data_root", "validation", "net", "weights", "embedding_size", "image_size", "batch_size", "precision")
IGNORED = {"loss", "mode", "seed", "out", "resume", "num_workers", "device", "kernels", "checkpoint", "directory"}
IGNORED |= {"data_root", *METRICS}  # images_checksum identifies the images


def read_run(directory):
    """The settings of a finished run, its directory and its metrics at the last epoch, in one dict."""
    try:
        with open(f"{directory}/config.json") as config, open(f"{directory}/log.jsonl") as log:
            run, last = json.load(config), json.loads(log.readlines()[-1])
        if last["epoch"] != run["epochs"]:
            raise ValueError(f"epoch {last['epoch']} of {run['epochs']}; the command that started it continues it")
        last["recall_at_1"] = last["recall"]["1"]
        return run | {name: float(last[name]) for name in METRICS} | dict(directory=directory)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{directory}: not a finished run ({error})") from None


def row_of(run):
    """What the runs of a row have in common."""
    return run["loss"], run["mode"], run.get("mix_weight") if run["mode"] != "baseline" else None


def check(runs):
    """ValueError if two runs of a data set do not belong in one table."""
    for a, b in itertools.combinations(runs, 2):
        both = f"{a['directory']} and {b['directory']}"
        same_row = row_of(a) == row_of(b)
        names = (a.keys() | b.keys()) - IGNORED - set(() if same_row else RECIPE)
        for name in sorted(names):
            if a.get(name) != b.get(name):
                raise ValueError(f"{both} cannot be compared: {name} is {a.get(name)} and {b.get(name)}")
        if same_row and a["seed"] == b["seed"]:
            raise ValueError(f"{both} have the same settings and the same seed; leave one out")


def print_table(runs):
    """Print a data set's table, and the settings that differ between rows. Returns the rows, with lists over seeds."""
    dataset, rows, recipes = runs[0]["dataset"], [], {}
    shared = [name for name in SETUP + RECIPE if len({run.get(name) for run in runs}) == 1]
    differing = [name for name in RECIPE if name not in shared]
    settings = lambda run, names: ", ".join(f"{name} {run[name]}" for name in names if name in run)
    published = dict(zip(itertools.product(LOSSES, MODES), PUBLISHED.get(dataset, ())))
    titles = TITLES if published and not runs[0].get("validation") else TITLES[:-1]
    print(f"**{dataset}**, last epoch:", settings(runs[0], shared))
    print("", "| " + " | ".join(titles) + " |", "|---|---" + "|---:" * (len(titles) - 2) + "|", sep="\n")

    baselines = {(run["loss"], run["seed"]): run for run in runs if run["mode"] == "baseline"}
    for (loss, mode, weight), group in itertools.groupby(runs, row_of):
        group = list(group)
        title = f"{mode} at {weight}" if mode != "baseline" and "mix_weight" in differing else mode
        seeds = [run["seed"] for run in group]
        values = {name: [run[name] for run in group] for name in METRICS}
        pairs = [(run, baselines.get((loss, run["seed"]))) for run in group if mode != "baseline"]
        gains = {name: [run[name] - base[name] for run, base in pairs if base] for name in METRICS[:2]}
        row = dict(dataset=dataset, loss=loss, mode=mode, mix_weight=weight, seeds=seeds, values=values, gains=gains)
        rows.append(row)
        recipes.setdefault(settings(group[0], differing), []).append(f"{loss} {title}")

        texts = [loss, title, str(len(seeds))]
        for name in gains:
            texts += [percent(values[name]), percent(gains[name], "+")]
        texts += [f"{statistics.mean(values[name]):.3f}" for name in METRICS[2:]]
        texts += [str(published.get((loss, mode), ""))]
        print("| " + " | ".join(texts[: len(titles)]) + " |")
    if differing:
        lines = [f"- {recipe}: {', '.join(names)}" for recipe, names in recipes.items()]
        print("", f"Rows differ in {', '.join(differing)}:", "", *lines, sep="\n")
    print()
    return rows


def percent(shares, sign=""):
    """Mean ± standard error in %, or nothing without values."""
    error = f" ± {100 * statistics.stdev(shares) / len(shares) ** 0.5:.1f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):{sign}.1f}{error}" if shares else ""


def main(directories):
    if not directories:
        raise ValueError("usage: python results/table.py RUN_DIR ..")
    mode = lambda run: (*MODES, run["mode"]).index(run["mode"])
    order = lambda run: (run["dataset"], run["loss"], mode(run), -run.get("mix_weight", 0), run["seed"])
    runs = sorted(map(read_run, directories), key=order)
    tables = [list(runs) for _, runs in itertools.groupby(runs, itemgetter("dataset"))]
    for runs in tables:
        check(runs)
    print(json.dumps(dict(rows=[row for runs in tables for row in print_table(runs)])))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"table: {error}", file=sys.stderr)
        sys.exit(2)
