"""What the HTML pages of `prepare_data.py` and `train.py` share: their look, and how foreign text gets onto a page.

A page is one file without scripts and network access. It extends `base.html`; `elements.html` has macros for tables and
tiles. Works without torch.
"""

from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

FOLDER = Path(__file__).parent
NAME, LINE = 60, 200  # characters shown of a name and of other text from files, to keep a page small
# HTML forbids control characters, so symbols for them (␀, ␛) replace them.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


def page_templates(folder: Path) -> jinja2.Environment:
    """The templates in `folder` and those that they share. Every expression is escaped, unless a macro returned it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, FOLDER]),
        autoescape=True,
        finalize=_printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cut": cut, "percent": percent}
    environment.globals |= {"NAME": NAME, "LINE": LINE}
    return environment


def _printable(value: object) -> object:
    """An expression of a template, before it is escaped."""
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    # A file name may contain surrogates, for bytes that are not UTF-8, which cannot be written.
    return value.encode(errors="replace").decode().translate(CONTROLS)


def cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[:characters] + "…"


def percent(part: float, total: float) -> str:
    share = part / max(total, 1)
    if 0 < share < 0.01:
        return f"{share:.2%}" if share >= 0.0001 else "< 0.01%"
    return f"{share:.1%}"
