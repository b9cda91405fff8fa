"""The main text of web pages: prose and its lists stay, navigation goes, and what is left out is counted."""

import json

import pytest
from growth import growth, seconds

from preparation.recipe import SourceConfig
from preparation.report.page import notes_on_pages
from preparation.sources.documents import read_sources
from preparation.sources.html import decode_page, read_page

PROSE = "The harbour lies on the eastern side of the bay, and on clear mornings you can see the ferries from the hill."
LIST = "<ul><li>Two cups of flour, sifted twice.<li>A pinch of salt.</ul>"
LISTED = "  • Two cups of flour, sifted twice.\n  • A pinch of salt."
LINKS = "".join(f"<li><a href='{name}.html'>{name}</a></li>" for name in ("News", "Features", "Releases", "Licence"))

KEPT = {
    LIST: LISTED,
    f"<main><h1>Bread</h1>{LIST}</main>": f"Bread\n\n{LISTED}",
    f"<p>{PROSE}</p>{LIST}": f"{PROSE}\n\n{LISTED}",
    f"<div class=sidebar>{LIST}</div><p>{PROSE}": f"{LISTED}\n\n{PROSE}",
    "<ol><li>Mix.</li><li>The <a href=a>new oven</a> is hot; <a href=b>wait</a> for it to cool down.</li></ol>":
        "  1. Mix.\n  2. The new oven is hot; wait for it to cool down.",
    "<dl><dt>ferry<dd>a ship</dl><table><tr><td>one<td>two</table>": "ferry\na ship\none\t\ttwo",
    "<pre>if x:\n    y\n\n\nz</pre>": "if x:\n    y\n\n\nz",
    "<div><dl><dt>API<dd><a href=a>Application Programming Interface</a><dt>ACL<dd><a href=b>Access Control List</a></dl></div>":
        "API\nApplication Programming Interface\nACL\nAccess Control List",
    f"<div class=header><h1>Bread</h1><a href=x>source</a></div><p>{PROSE}": f"Bread\n\nsource\n\n{PROSE}",
    f"<p>See <a href=x>「<code>control</code>」</a>.</p>{LIST}": f"See 「control」.\n\n{LISTED}",
    # Superscripts are marked if they are exponents; subscripts stay as they are.
    "E = mc<sup>2</sup>, 2<sup>n+1</sup>, <i>e</i><sup>-x</sup>, x<sup>2<i>k</i></sup>, H<sub>2</sub>O":
        "E = mc^2, 2^(n+1), e^-x, x^(2k), H2O",
    "the 4<sup>th</sup> of May<sup>®</sup><sup><a href=#n>1</a></sup><p><sup>1</sup> a note": "the 4th of May®1\n\n1 a note",
    # Elements that close themselves, are never closed, or hold what is not for reading.
    f"<title/><script src=a.js /><style/><textarea/><iframe src='x'/><p>{PROSE}<a id='x'/>{LIST}": f"{PROSE}\n\n{LISTED}",
    f"<p/><i/><div/><p>{PROSE} <a href=/there/>there</a></p>": f"{PROSE} there",
    f"<script>'<!--<ul>'</script><!-- <div class=menu> --><p>{PROSE}</p><title>never closed<p>{PROSE}":
        f"{PROSE}\n\nnever closed\n\n{PROSE}",
    f"<p>{PROSE}</p><script>if (a < b) {{": PROSE,
}  # fmt: skip


@pytest.mark.parametrize("markup", KEPT)
@pytest.mark.parametrize(
    "head", ["<!DOCTYPE html><body>", '<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml">']
)
def test_prose_and_its_lists_stay_wherever_they_stand(head, markup):
    assert read_page(head + markup).text.strip("\n") == KEPT[markup]


@pytest.mark.parametrize(
    "navigation",
    [
        f"<nav><p>{PROSE}</p></nav>",
        f"<ul>{LINKS}</ul>",
        f"<div id=site-nav><ul><li>About us<ul>{LINKS}</ul></li></ul></div>",
        "<div class='navheader'><table><tr><th>The whole book</th></tr><tr><td><a href=a><img alt=Prev></a></table></div>",
        "<table><tr><td><a href=a>Next</a> | <a href=b>Previous</a></table>",
        "<p><a href=a>Next</a>, <a href=b>Previous</a></p>",
        f"<div class=related><h3>Navigation</h3><ul>{LINKS}</ul></div>",
        "<footer>Copyright 2020, the authors. Made with <a href=x>a generator</a>.</footer>",
        "<div class='footer'>Copyright 2020, the authors.</div>",
        "<header><a href=/>The Harbour Times</a></header>",
        "<a class=headerlink href=#bread>¶</a>",
    ],
)
def test_navigation_goes(navigation):
    for before, after in (("", f"<h1>Bread</h1><p>{PROSE}</p>{LIST}"), (f"<h1>Bread</h1><p>{PROSE}</p>{LIST}", "")):
        page = read_page(f"<body><div>{before}{navigation}{after}</div></body>")
        assert page.text.strip("\n") == f"Bread\n\n{PROSE}\n\n{LISTED}"
        assert page.kept == len("".join(page.text.split())) <= page.characters


def test_the_main_element_is_the_page_if_it_has_most_of_the_prose():
    page = f"<body><div>Skip this.</div><div role='main'><div><h1>Bread</h1><p>{PROSE}</p></div></div><p>And this.</p>"
    assert read_page(page).text.strip("\n") == f"Bread\n\n{PROSE}"
    assert PROSE in read_page(f"<main><h1>Bread</h1></main><p>{PROSE}</p>").text


def test_utf_8_comes_before_a_guess_and_what_a_page_declares_before_that():
    assert decode_page("\ufeff§ 1¶".encode()) == "§ 1¶"
    korean = "<META http-equiv='Content-Type' content='text/html; charset=EUC-KR'><p>기타 아파치 문서"
    assert decode_page(korean.encode("euc-kr")) == korean
    japanese = "<meta charset=iso-2022-jp><p>港は湾の東側にあり"
    assert decode_page(japanese.encode("iso-2022-jp")) == japanese


@pytest.mark.parametrize(
    "fragment",
    ["<div>", "<ul><li>", "<a href=x>", "<p>", "<table><td>", "<script>", "<title>", "<!--", "<a =/>", "<a =", "</div>", "<svg/>",
     "<td><div>", "<sup>x</sup>", "<nav>", "</ul><div>", "<td class=toc>", "<", "&amp;", "<b/>", "<span></ul>", "<b><p>", "<font x=1><div>", "<i><p></b>", "<li><b>", "<a href=x><p>"],
)  # fmt: skip
def test_time_grows_with_the_page_whatever_it_repeats(fragment):
    def read(size: int) -> None:
        read_page("<body>" + fragment * (size // len(fragment)) + f"<p>{PROSE}")

    read(100)  # imports
    if seconds(read, 80_000) > 0.1:
        assert growth(read, 80_000) < 9


def test_text_stays_in_elements_however_deep():
    page = "<ul><li>one" * 2000 + f"<b>{PROSE}</b>" + "</ul>" * 2000 + f"<p>{PROSE}</p>{LIST}"
    text = read_page(page).text
    assert text.count("one") == 2000 and text.count(PROSE) == 2 and text.endswith(f"{PROSE}\n\n{LISTED}")


def test_the_share_of_text_is_counted_by_page_and_source(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.html").write_text(f"<ul>{LINKS * 9}</ul>" + f"<p>{PROSE * 9}</p>" * (number < 6))
    read_sources([SourceConfig(path=str(tmp_path), name="site", include="*.html")], tmp_path)
    counts = json.loads((tmp_path / "read.json").read_text())
    figures = counts["sources"]["site"]
    assert (figures["pages"], figures["small_pages"]) == (8, 2)
    links = 9 * len("NewsFeaturesReleasesLicence")
    prose = 9 * len(PROSE.replace(" ", ""))
    assert (figures["kept_characters"], figures["page_characters"]) == (6 * prose, 6 * prose + 8 * links)
    assert [item["file"][-6:] for item in counts["small_pages"]] == ["6.html", "7.html"]
    assert counts["small_pages"][0] | {"file": ""} == {"source": "site", "file": "", "kept": 0, "characters": links}
    assert len(notes_on_pages(counts)) == 1 and "2 of 8 pages" in notes_on_pages(counts)[0]
    figures["small_pages"] = 1
    assert notes_on_pages(counts) == []
    figures["kept_characters"] = figures["page_characters"] * 0.49
    assert "only 49%" in notes_on_pages(counts)[0]
