"""`python -m src.report`: a sweep as one page that explains itself, or as a table: from its folder, without MLflow."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from src import console
from src.errors import UserError
from src.files import write_text, written_atomically

if TYPE_CHECKING:
    from src.report_data import Job, Sweep

Format = Literal["html", "csv", "parquet", "md"]
BEST_LAYERS = ("best_untouched_layer", "best_trained_layer")
ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report and prints its path. Exit status 2 where nothing can be shown."""
    parser = argparse.ArgumentParser(prog="python -m src.report", description=__doc__)
    parser.add_argument(
        "sweep", nargs="?", metavar="SWEEP", help="<date>/<time> or a folder; default: the latest sweep"
    )
    parser.add_argument("--format", choices=("html", "csv", "parquet", "md"), default="html", help="default: html")
    parser.add_argument("--out", type=Path, help="a file or a folder; default: report.<format> in the sweep's folder")
    arguments = parser.parse_args(argv)
    from src.report_data import find, read_sweep

    root = Path("multirun") if Path("multirun").is_dir() else ROOT / "multirun"
    try:
        sweep = read_sweep(find(arguments.sweep, root))
        path = arguments.out or sweep.folder
        path = path / f"report.{arguments.format}" if path.is_dir() else path
        write(sweep, path, arguments.format)
    except UserError as error:
        console.fail(str(error))
        return 2
    except OSError as error:
        console.fail(f"{error.filename or arguments.out}: {error.strerror or error}; choose another place with --out")
        return 2
    for note in sweep.notes:
        console.warn(note)
    print(path)
    return 0


def write(sweep: Sweep, path: Path, form: Format) -> None:
    """Writes the report, atomically. Raises OSError where `path` can't be written."""
    match form:
        case "html":
            from src.report_page import page

            write_text(path, page(sweep))
        case "md":
            write_text(path, markdown(sweep))
        case "csv":
            from src.results import write_table

            rows = flat(sweep)
            write_table(path, list(rows[0]), [list(row.values()) for row in rows])
        case "parquet":
            import pyarrow as pa
            from pyarrow import parquet

            rows = flat(sweep)
            columns = {name: pa.array([row[name] for row in rows]) for name in rows[0]}
            with written_atomically(path) as temporary:
                parquet.write_table(pa.table(columns), temporary)


def markdown(sweep: Sweep) -> str:
    """The finding, the leaderboard, and the best run's details and command."""
    from src.report_best import details
    from src.report_board import caveats, columns, command, finding, leaderboard

    board = _markdown_table(columns(sweep), leaderboard(sweep), words=3)
    parts = [f"# {_plain(sweep.id)}", _plain(finding(sweep)), board, *map(_plain, caveats(sweep))]
    for detail in details(sweep.ranked[0]):
        table = _markdown_table(detail.columns, detail.rows, detail.words)
        parts += [f"## {detail.heading}, {_plain(sweep.ranked[0].label)}", _plain(detail.about), table]
    # A code block's fence must be longer than any row of backticks in it, so the block is indented instead.
    parts += ["## Settings to copy", f"    {command(sweep.ranked[0])}"]
    lost = [*sweep.notes, *(f"job {job.number} ({job.status}): {job.problem}" for job in sweep.others)]
    parts += ["## Left out", "\n".join(f"- {_plain(line)}" for line in dict.fromkeys(lost))] if lost else []
    return "\n\n".join(parts) + "\n"


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: int) -> str:
    """A table of escaped cells; the first `words` columns are text."""
    heading, *lines = (f"| {' | '.join(map(_plain, row))} |" for row in (columns, *rows))
    rule = "|".join("---" if place < words else "---:" for place in range(len(columns)))
    return "\n".join([heading, f"|{rule}|", *lines])


def _plain(text: str) -> str:
    """Text as Markdown shows it letter by letter, in one line."""
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def flat(sweep: Sweep) -> list[dict[str, Any]]:
    """One row for each job, best first, with every parameter and scalar; None where a job has none."""
    from src.report_data import MEASURES

    jobs = [*sweep.ranked, *sweep.others]
    scalars = sorted({key for job in jobs for key in job.results if "/" in key})
    params = sorted({key for job in jobs for key in job.results.get("params") or {}} | set(sweep.swept))

    def row(place: int, job: Job) -> dict[str, Any]:
        known = job.results.get("params") or {}
        return {
            "place": place if job.results else None,
            "job": job.number,
            "setting": job.label,
            "status": job.status,
            "verdict": job.verdict or None,
            "pvalue": job.pvalue,
            "pvalue_holm": job.holm,
            "pvalue_aligned_holm": job.aligned_holm,
            "holds": job.holds,
            "holds_as": job.holds_as or None,
            "claimed_on": job.claimed if job.results else None,
            "counted_by": ("pair" if job.by_pair else "word") if job.results else None,
            **{key: str(job.results[key]) if key in job.results else None for key in BEST_LAYERS},
            "config_hash": job.results.get("config_hash"),
            "folder": str(job.folder),
            "problem": job.problem or None,
            **{f"control/{measure}_gain": job.gain(measure) for measure in MEASURES},
            **{key: known.get(key, job.levels.get(key)) for key in params},
            **{key: job.number_at(key) for key in scalars},
        }

    return [row(place, job) for place, job in enumerate(jobs, start=1)]


if __name__ == "__main__":
    sys.exit(main())
