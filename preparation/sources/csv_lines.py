"""The rows of CSV files as they are found: other delimiters, escapes, and quotes where none belong."""

import csv
import re
from collections.abc import Iterable, Iterator
from typing import Any

CELL_CHARACTERS = 1 << 27  # a longer cell of a CSV file is lost; the file is held up to there
# A row of CSV is only in doubt if it has this many lines, divided by its fields: prose has the commas of two fields
# line after line now and then. After a broken row, the end of its cell is searched for in so many lines.
LINES_IN_DOUBT, LINES_AHEAD = 40, 1000


def sniff_csv(head: str, name: str, columns: list[str]) -> tuple[str, bool, bool]:
    """Of a file that begins with `head` and should have `columns`: the delimiter, whether a first line states it, and
    whether a backslash stands before a quote in a cell."""
    first, _, rest = head.partition("\n")
    stated = re.fullmatch(r'"?sep=(.)"?\r?', first)
    if stated:
        delimiter = stated[1]
    else:
        usual = "\t" if re.search(r"\.tsv(\.\w+)?$", name.lower()) else ","
        headers = {mark: next(csv.reader([first.rstrip("\r")], delimiter=mark)) for mark in (usual, *",;\t|")}
        fits = [mark for mark, header in headers.items() if set(columns) <= set(header)]
        delimiter = fits[0] if fits else max(headers, key=lambda mark: len(headers[mark]))
    escapes = False
    if '\\"' in rest:
        lines = rest.splitlines(keepends=True)[:-1] or [rest]
        faults = [_count_faults(map(change, lines), delimiter) for change in (str, _plain_quotes)]
        escapes = faults[1] < faults[0]
    return delimiter, stated is not None, escapes


def _plain_quotes(line: str) -> str:
    r"""A line with `\"` as CSV itself writes it, `""`."""
    return re.sub(r'\\([\\"])', lambda found: '""' if found[1] == '"' else "\\", line) if "\\" in line else line


def _count_faults(lines: Iterable[str], delimiter: str) -> int:
    rows, faults = csv.reader(lines, delimiter=delimiter, strict=True), 0
    while True:
        try:
            if next(rows, None) is None:
                return faults
        except csv.Error:
            faults += 1


class CsvLines:
    """The rows of a CSV file, with the lines of the last one in `pending`, so that `drop` can give back those that a
    stray quote took in."""

    def __init__(self, lines: Iterator[str], delimiter: str, is_stated: bool, escapes: bool) -> None:
        self.lines, self.delimiter = map(_plain_quotes, lines) if escapes else lines, delimiter
        self.again: list[str] = []  # lines to read again, the next one last
        self.pending: list[str] = []
        self.columns: list[str] = []
        self.before = len(self._take(1)) if is_stated else 0  # lines before those pending
        self.opener = re.compile(rf'(?:^|{re.escape(delimiter)})"(?!"[^{re.escape(delimiter)}\r\n])')

    def _take(self, count: int) -> list[str]:
        taken: list[str] = []
        while len(taken) < count and (line := self.again.pop() if self.again else next(self.lines, "")):
            taken.append(line)
        return taken

    def _feed(self) -> Iterator[str]:
        append, again = self.pending.append, self.again
        while again:  # `drop` starts another reader when it adds some
            line = again.pop()
            append(line)
            yield line
        for line in self.lines:
            append(line)
            yield line

    def rows(self) -> Iterator[tuple[int, list[str], str | None]]:
        """(number of its first line, its fields, what is wrong with it or None) of each row that is not blank."""
        csv.field_size_limit(CELL_CHARACTERS)
        self._reader = self._start()
        while True:
            self.before += len(self.pending)
            self.pending.clear()
            self._fault = None
            row: list[str] | None = []
            try:
                row = next(self._reader, None)
            except csv.Error as error:
                self._fault = f"not a CSV record ({error})"
            if row is None:
                return
            in_doubt = self._fault is None and len(self.pending) > LINES_IN_DOUBT / max(len(self.columns), 1)
            if in_doubt and self._are_rows(self.pending[1:-1], 0.9):
                self._fault = "a stray quote, which would take in the rows after it"
            if row or self._fault:
                yield self.before + 1, row, self._fault

    def _start(self) -> Any:
        return csv.reader(self._feed(), delimiter=self.delimiter, strict=True)

    def drop(self) -> list[str]:
        """The lines that are lost with the last row; the others that it took in are read again."""
        if self._are_rows(self.pending[1:], 0.5):
            self.again += reversed(self.pending[1:])
            del self.pending[1:]
            self._reader = self._start()
        elif self._fault:  # the cell may go on
            ahead: list[str] = []
            while (line := self._take(1)) and len(ahead) < LINES_AHEAD:
                ahead += line
                if line[0].count('"') % 2 or self.opener.search(line[0]):
                    break
            is_end = bool(ahead) and ahead[-1].count('"') % 2 and not self.opener.search(ahead[-1])
            if is_end and not (len(ahead) > LINES_IN_DOUBT / len(self.columns) and self._are_rows(ahead[:-1], 0.5)):
                self.pending += ahead
            else:
                self.again += reversed(ahead)
            self._reader = self._start()
        return list(self.pending)

    def _are_rows(self, lines: list[str], least: float) -> bool:
        """Whether lines look like rows of their own rather than like the inside of a cell: nearly all of them have the
        right number of fields; of a single column, many have neither delimiter nor quote."""
        width = len(self.columns)
        if not lines or not width or (width == 1 and len(lines) < LINES_IN_DOUBT // 4):
            return False
        lines = lines[:LINES_AHEAD]
        if width == 1:
            return sum(
                bool(line.strip()) and self.delimiter not in line and '"' not in line for line in lines
            ) >= 0.9 * len(lines)
        return sum(self._fields(line) == width for line in lines) >= least * len(lines)

    def _fields(self, line: str) -> int:
        if line.count(self.delimiter) < len(self.columns) - 1:
            return 0
        try:
            return len(next(csv.reader([line], delimiter=self.delimiter, strict=True), []))
        except csv.Error:
            return 0
