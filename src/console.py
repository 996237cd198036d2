"""What a person sees on the terminal: progress bars, the table of a run's result, one-line errors."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from src.results import claimed_split, specificity_pvalue

alone = True  # whether this process has the terminal to itself


def progress(items: Sequence[Any], description: str) -> Iterable[Any]:
    """The items, with a progress bar on stderr that shows the time left; silent when stderr is no terminal.

    Silent in one of several workers, too: their bars would write over each other.
    """
    if not (alone and sys.stderr.isatty()):
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, description=f"{description:24}", console=Console(stderr=True), transient=True)


def say(message: str) -> None:
    """A line of news on stderr; silent when stderr is no terminal."""
    if sys.stderr.isatty():
        print(message, file=sys.stderr)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def signed(value: float) -> str:
    """A gain with four decimals, or with two digits where those would be zeros."""
    return f"{value:+.4f}" if abs(value) >= 1e-4 or value == 0 else f"{value:+.1e}"


ROWS = (  # key in results.json without the split, what a reader calls it
    ("pair_cosine", "pair cosine"),
    ("margin", "margin over mismatched"),
    ("csls_p_at_1", "retrieval (CSLS P@1)"),
)
PARTS = (("unalike", "  not look-alikes"), ("lookalike", "  look-alikes"))  # of the control words' retrieval
TESTS = (
    ("t_pvalue", "paired t-test p, cosine"),
    ("specificity_pvalue", "specificity p"),
    ("near_pvalue", "p against near words"),
    ("gain_ci", "cosine gain, 95 % interval"),
    ("cohens_dz", "Cohen's d_z"),
)
MAPS = (("centred", "centring"), ("lsar", "LSAR"), ("procrustes", "Procrustes"))
PROBES = (("lm/perplexity_", "perplexity, {}"), ("translation/accuracy", "translation accuracy"))


def result_table(
    results: Mapping[str, Any], eval_layer: str, folder: str, link: str | None, *, in_short: bool = False
) -> str:
    """The result of a run as text, at most 100 columns wide; in short a trained one's verdict and where the rest is."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(width=100, file=None, highlight=False)
    trained = results.get("control/pair_cosine_after") is not None
    in_short = in_short and trained
    gap = "" if in_short else "\n"
    with console.capture() as capture:
        if not in_short:
            _print_measured(console, results, eval_layer, trained)
        if trained:
            verdict = f"[bold]verdict: {results['verdict']}[/bold]  {escape(results['verdict_reason'])}"
            console.print(gap + verdict, soft_wrap=True)
        console.print(f"{gap}results  {escape(folder)}", soft_wrap=True)
        if link:
            console.print(f"in MLflow  {escape(link)}", soft_wrap=True)
    return "\n".join(line.rstrip() for line in capture.get().split("\n"))


def _print_measured(console: Any, results: Mapping[str, Any], eval_layer: str, trained: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    columns = ["before", "after", "gain"] if trained else ["before"]
    words = results["dataset"]
    console.print(
        f"{escape(results['params']['model.name'])}, {escape(words['name'])}: {words['train']} pairs of "
        f"{results['train/n_words']} words to train on, {words['control']} control pairs of "
        f"{results['control/n_words']} words",
        soft_wrap=True,
    )
    table = Table(title=f"at layer {eval_layer}", title_justify="left", box=None, pad_edge=False, padding=(0, 2))
    table.add_column("")
    for split in ("train", "control"):
        for column in columns:
            table.add_column(f"{split} {column}" if column == columns[0] else column, justify="right")
    for key, label in ROWS:
        cells = [_change(results, f"{split}/{key}", columns) for split in ("train", "control")]
        table.add_row(label, *cells[0], *cells[1])
    for part, label in PARTS if trained else ():
        if count := results.get(f"control_{part}/n_words"):
            cells = _change(results, f"control_{part}/csls_p_at_1", columns)
            table.add_row(f"{label} ({count})", *[""] * len(columns), *cells)
    console.print(table)
    for line in [*_baseline_lines(results), *(_test_lines(results) if trained else ()), *_probe_lines(results)]:
        console.print(escape(line))


def _change(results: Mapping[str, Any], key: str, columns: Sequence[str]) -> list[str]:
    before, after = results[f"{key}_before"], results.get(f"{key}_after")
    values = {"before": f"{before:.4f}"}
    if after is not None:
        values |= {"after": f"{after:.4f}", "gain": signed(after - before)}
    return [values[column] for column in columns]


def _baseline_lines(results: Mapping[str, Any]) -> Iterable[str]:
    """What to read the control words' retrieval beside."""
    yield ""
    yield "retrieval of the control words"
    for when, key, label in (("before", "untouched", "untouched model"), ("after", "trained", "trained model")):
        if (score := results.get(f"baseline/best_layer_csls_p_at_1_{when}")) is not None:
            yield f"  {label + ', best layer':28}{score:.4f} (layer {results[f'best_{key}_layer']})"
    maps = (f"{label} {results[f'baseline/{name}_csls_p_at_1']:.4f}" for name, label in MAPS)
    yield f"  {'untouched model, mapped by':28}{', '.join(maps)}"
    if (score := results.get("baseline/spelling_csls_p_at_1")) is not None:
        yield f"  {'spelling alone':28}{score:.4f}"


def _test_lines(results: Mapping[str, Any]) -> Iterable[str]:
    yield ""
    if (claimed := claimed_split(results, "control")) != "control":
        yield f"tests of specificity: control without look-alikes ({results[f'{claimed}/n_words']} words)"
    for key, label in TESTS:
        cells = []
        for split in ("train", "control"):
            if key == "near_pvalue":
                cell = f"{results[f'{claimed_split(results, split)}/{key}']:.3g}"
            elif key == "gain_ci":
                cell = f"{signed(results[f'{split}/gain_ci_low'])} … {signed(results[f'{split}/gain_ci_high'])}"
            else:
                value = specificity_pvalue(results, split) if key == "specificity_pvalue" else results[f"{split}/{key}"]
                cell = f"{value:.3g}"
            cells.append(f"{split} {cell:22}")
        yield f"{label:28}{cells[0]}  {cells[1]}".rstrip()


def _probe_lines(results: Mapping[str, Any]) -> Iterable[str]:
    for prefix, label in PROBES:
        for key in sorted(key for key in results if key.startswith(prefix) and key.endswith("_before")):
            after = results.get(key.removesuffix("_before") + "_after")
            name = label.format(key.removeprefix(prefix).removesuffix("_before"))
            change = "" if after is None else f" → {after:.4g}"
            if (rise := results.get(key.removesuffix("_before") + "_change")) is not None:
                low, high = (results[key.removesuffix("_before") + f"_change_{end}"] for end in ("low", "high"))
                change += f"  {rise:+.1%} [{low:+.1%}, {high:+.1%}]"
            yield f"{name:28}{results[key]:.4g}{change}"
