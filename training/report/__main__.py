"""The page of one run, or several runs on one page.

python -m training.report runs/demo                      writes runs/demo/report.html again
python -m training.report runs/small runs/large          writes comparison.html
python -m training.report runs/small runs/large --output pages/sizes.html
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from training.report.comparison import html_comparison
from training.report.folder import read_run
from training.report.report import PAGE, html_report
from utils.cli import UserError, run_script
from utils.files import replace_text

OWN = b'content="Plainloop: run '  # at the head of a page that may be written again


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; usage: python -m training.report RUN... [--output FILE]")


def main(arguments: list[str]) -> None:
    parser = Parser("python -m training.report", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder")
    parser.add_argument("--output", metavar="FILE", type=Path,
                        help="page to write; default: RUN/report.html, for several runs comparison.html")  # fmt: skip
    options = parser.parse_args(arguments)
    paths = list({path.resolve(): path for path in options.runs}.values())
    for path in paths:
        if not (path / "config.yaml").is_file():
            raise UserError(
                f"{path} is no run folder" + (" (it has no config.yaml)" if path.exists() else ": it does not exist")
            )
    output = options.output or (paths[0] / PAGE if len(paths) == 1 else Path("comparison.html"))
    if output.exists() and not (output.is_file() and OWN in output.read_bytes()[:1000]):
        raise UserError(f"{output} exists and is no page of a run; choose another file with --output")
    if not output.resolve().parent.is_dir():
        raise UserError(f"{output} cannot be written: its folder does not exist; make it, or choose another --output")
    runs = [read_run(path) for path in paths]
    replace_text(output, html_report(runs[0]) if len(runs) == 1 else html_comparison(runs))
    print(f"wrote {output}")


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
