"""Duplicates and contamination planted in real text, against plain Python sets and union-find."""

import json
import os
import random
import re
import string
import sys
import threading
import time
import unicodedata
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT, run
from growth import growth

from preparation.selection import duplicates
from preparation.selection.duplicates import (
    build_index,
    digest,
    digest_documents,
    digest_exact,
    find_contaminated,
    find_near_duplicates,
    first_of_each,
    hash_ngrams,
    hash_words,
    normalize,
    sketch_documents,
    split_words,
)

TEXTS = [json.loads(line)["text"] for line in (ROOT / "sample_data/dictionaries.jsonl").read_text("utf-8").splitlines()]
LONG = [text for text in TEXTS if len(text.split()) >= 40]
LETTERS_ONLY = [word for text in TEXTS for word in text.split() if word.isalpha()]
VOCABULARY = [word for text in TEXTS for word in text.split()]


def edit(words: list[str], share: float, rng: random.Random, vocabulary: list[str] = VOCABULARY) -> list[str]:
    """Replace, delete or insert a word at a `share` of the positions, at least one."""
    words = list(words)
    for place in sorted(rng.sample(range(len(words)), max(1, round(share * len(words)))), reverse=True):
        operation = rng.choice(["replace", "delete", "insert"])
        words[place : place + (operation != "insert")] = [] if operation == "delete" else [rng.choice(vocabulary)]
    return words


def plain_words(text: str) -> list[str]:
    """The words of European text, computed independently of `split_words`."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text.replace("\u00ad", "")).casefold())


def plain_shingles(text: str, n: int) -> set[tuple[str, ...]]:
    words = plain_words(text)
    return {tuple(words[start : start + n]) for start in range(len(words) - n + 1)} or {tuple(words)}


def jaccard(left: set, right: set) -> float:
    return len(left & right) / len(left | right)


def digests_of(texts: list[str]) -> np.ndarray:
    return np.frombuffer(b"".join(map(digest, texts)), np.uint8).reshape(-1, 16)


def sketch_all(texts: list[str], batch: int = 1000) -> list[np.ndarray]:
    return [sketch_documents(texts[start : start + batch])[1] for start in range(0, len(texts), batch)]


def cluster_texts(texts: list[str], **options: float) -> np.ndarray:
    lengths = np.array([len(text) for text in texts])
    return find_near_duplicates(sketch_all(texts), lengths, np.ones(len(texts), bool), **options)


# ---- Words and the normal form.


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Hello, World!", "hello world"),
        ("Hello\n\n   World", "HELLO\tWORLD."),
        ("Ｆｕｌｌ ｗｉｄｔｈ", "full width"),
        ("eﬃcient", "EFFICIENT"),
        ("Straße", "STRASSE"),
        ("cafe\u0301", "café"),
        ("don’t", "don't"),
        ("snake_case", "snake case"),
        ("´quoted´ ¨n", "'quoted' n"),
        ("soft\u00adhyphen", "softhyphen"),
        ("good\u2014very good", "good - very good"),
        ("大規模な言語\nモデル。", "大規模な言語モデル"),
        ("ｶﾀｶﾅ", "カタカナ"),
        ("I ❤\ufe0f it", "I ❤ it"),
        ("x = f(a);", "x=f( a )"),
    ],
)
def test_texts_that_say_the_same_are_equal(left, right):
    assert normalize(left) == normalize(right) and digest(left) == digest(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("a b", "b a"),
        ("ab c", "a bc"),
        ("été", "ete"),
        ("हिन्दी", "हन्दा"),
        ("言語モデル", "言語データ"),
        ("2 + 2 = 4", "2 - 2 = 4"),
        ("!!!", "???"),
        ("🙂", "🙁"),
        ("*" * 9, ""),
        ("lone \ud800", "lone \ud801x"),
    ],
)
def test_texts_that_differ_stay_apart(left, right):
    assert normalize(left) != normalize(right) and digest(left) != digest(right)


def test_words_of_european_text_are_those_of_a_regular_expression():
    for text in TEXTS:
        assert split_words(text) == plain_words(text)
        assert split_words(normalize(text)) == split_words(text)


def test_each_character_is_a_word_where_no_spaces_are_written():
    assert split_words("PyTorchで学習する。") == ["pytorch", "で", "学", "習", "す", "る"]
    assert split_words("ภาษาไทย") == list("ภาษาไทย")
    assert split_words("한국어 문서") == ["한국어", "문서"]


def test_ngrams_are_those_of_plain_python():
    texts = [*TEXTS[:200], "", "one", "one two", "one two three", "..."]
    for n in (1, 3, 13):
        hashes, counts = hash_ngrams(*hash_words(texts), n)
        seen: dict[tuple[str, ...], int] = {}
        start = 0
        for text, count in zip(texts, counts.tolist(), strict=True):
            words = split_words(text)
            grams = [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]
            assert count == len(grams)
            for gram, value in zip(grams, hashes[start : start + count].tolist(), strict=True):
                assert seen.setdefault(gram, value) == value
            start += count
        assert len(set(seen.values())) == len(seen)


# ---- Exact duplicates.

APART = [
    *("The language C is old", "The language C++ is old", "The language C# is old"), *("C", "C++", "C#", "c"),
    *("if a && b then c", "if a || b then c", "if a & b then c"), *("it is -5 degrees", "it is 5 degrees"),
    *("I love it \U0001f600", "I love it \U0001f621"), *("2 * x = 4", "2 + x = 4", "2 / x = 4"), *("Polish", "polish"),
    *("it costs $5 in all", "it costs €5 in all", "it costs 5 in all"), *("!x", "x"),
]  # fmt: skip


def test_texts_that_differ_in_symbols_are_no_duplicates():
    spaced = [text.replace(" ", " \n\t\u3000") for text in APART]
    first = first_of_each(digest_documents([*APART, *spaced], digest_exact))
    assert first.tolist() == [True] * len(APART) + [False] * len(APART)
    assert (cluster_texts(APART) == np.arange(len(APART))).all()
    assert len(np.unique(digests_of(APART), axis=0)) < len(APART) / 2  # their words, which decide about the split


def test_markup_counts_as_nothing():
    plain = [" ".join(text.split()[:60]) for text in LONG[:100]]
    rule = "=" * 30
    for spoil in (
        lambda text: f"{rule}\n# {text}\n{rule}", lambda text: re.sub(r"((?:\S+ ){6})", r"\1\n * ", text), str.title,
        lambda text: f"| {text.replace(' ', ' | ', 3)} |", lambda text: text.replace(" ", " **", 1).replace(" ", "** ", 2),
        lambda text: text.replace("'", "’").replace('"', "“").replace("-", "–"),
    ):  # fmt: skip
        copies = list(map(spoil, plain))
        cluster = cluster_texts([*plain, *copies])
        assert (cluster[:100] == cluster[100:]).mean() >= 0.98, copies[0]


def test_exercises_with_other_numbers_are_kept_and_pages_with_another_date_are_found():
    rng = random.Random(0)
    train = (
        "A train travels at {} km per hour for {} hours and stops at a station for {} minutes before it goes back to "
        "where it came from at the same speed. How long is the whole journey? First compute {} and then add {}."
    )
    square = "Compute the square of {}. Multiply it by itself and write down the result without more words: {}."
    numbers = [rng.choices(range(2, 1000), k=5) for _ in range(1000)]
    exercises = [*(train.format(*five) for five in numbers), *(square.format(n, n * n) for n in range(2, 502))]
    assert np.mean(cluster_texts(exercises) != np.arange(1500)) <= 0.01
    bodies = [" ".join(rng.choices(LETTERS_ONLY, k=150)) for _ in range(200)]
    for form in ("Posted on {} March 20{}. {}", "{2} Page {0} of {1}", "{2} Updated: 2024-{0}-{1}"):
        pages = [form.format(rng.randint(10, 19), rng.randint(20, 29), body) for body in bodies for _ in range(2)]
        cluster = cluster_texts(pages)
        assert np.mean(cluster[::2] == cluster[1::2]) >= 0.98, form


def test_every_exact_duplicate_is_found_and_nothing_else():
    rng = random.Random(0)
    spoil = [
        str.upper, str.title, lambda text: re.sub(r"\s+", "\n", text), lambda text: f"  {text.replace(' ', '   ')}\n",
        lambda text: re.sub(r"[.,;:!?]+(?=\s|$)", "", text), lambda text: re.sub(r"(?<=\w) (?=\w)", " - ", text),
        lambda text: unicodedata.normalize("NFD", text),
        lambda text: "".join(rng.choice(string.punctuation) if character in string.punctuation else character
                             for character in text),
    ]  # fmt: skip
    groups: dict[str, int] = {}  # texts of the sample that are equal according to the independent word splitter
    origin = [groups.setdefault(" ".join(plain_words(text)), number) for number, text in enumerate(TEXTS)]
    planted = rng.sample(range(len(TEXTS)), 1000)
    documents = [*enumerate(TEXTS), *((number, rng.choice(spoil)(TEXTS[number])) for number in planted)]
    rng.shuffle(documents)
    first = first_of_each(digests_of([text for _, text in documents]))
    seen: set[int] = set()
    for (number, text), kept in zip(documents, first.tolist(), strict=True):
        assert kept == (origin[number] not in seen), text
        seen.add(origin[number])
    assert 1000 <= (~first).sum() < 1010


@pytest.mark.parametrize("count", [0, 1, 2, 5000])
def test_first_of_each_is_what_a_set_finds(count):
    digests = np.random.default_rng(count).integers(0, 2, (count, 16), np.uint8)
    digests[:, :8] = 0  # 256 different ones
    seen: set[bytes] = set()
    for row, first in zip(digests, first_of_each(digests), strict=True):
        assert first == (row.tobytes() not in seen)
        seen.add(row.tobytes())


# ---- Near duplicates.


def planted_copies(share: float) -> tuple[list[str], np.ndarray]:
    """The long texts followed by an edited copy of each, and the number of long texts."""
    rng = random.Random(int(share * 100))
    copies = [" ".join(edit(text.split(), share, rng)) for text in LONG]
    return [*LONG, *copies], np.arange(len(LONG))


def test_five_percent_of_the_words_edited_are_found():
    texts, numbers = planted_copies(0.05)
    cluster = cluster_texts(texts)
    recall = np.mean(cluster[numbers] == cluster[numbers + len(LONG)])
    shingles = [plain_shingles(text, 3) for text in texts]
    dropped = np.flatnonzero(cluster != np.arange(len(texts)))
    right = [jaccard(shingles[number], shingles[cluster[number]]) >= 0.4 for number in dropped]
    assert recall >= 0.99
    assert np.mean(right) >= 0.99
    lengths = np.array([len(text) for text in texts])
    assert (lengths[cluster] >= lengths).all()


def test_thirty_percent_of_the_words_edited_are_kept():
    texts, numbers = planted_copies(0.3)
    cluster = cluster_texts(texts)
    kept = np.mean(cluster[numbers] != cluster[numbers + len(LONG)])
    assert kept >= 0.99


def test_what_is_less_alike_than_the_threshold_is_kept():
    """Pairs of similarity 0.45, two standard errors below the threshold of 0.55, most of which agree in a band."""
    rng = random.Random(4)
    common = [rng.choices(VOCABULARY, k=188) for _ in range(200)]
    texts = [" ".join(words + rng.choices(VOCABULARY, k=112)) for words in common for _ in range(2)]
    shingles = [plain_shingles(text, 3) for text in texts]
    similarity = [jaccard(left, right) for left, right in zip(shingles[::2], shingles[1::2], strict=True)]
    assert min(similarity) > 0.42 and max(similarity) < 0.48
    cluster = cluster_texts(texts)
    assert np.mean(cluster[::2] != cluster[1::2]) >= 0.9


def test_unrelated_documents_are_kept():
    texts = [text for text, first in zip(TEXTS, first_of_each(digests_of(TEXTS)), strict=True) if first]
    cluster = cluster_texts(texts)
    dropped = np.flatnonzero(cluster != np.arange(len(texts)))
    similarity = [jaccard(plain_shingles(texts[left], 3), plain_shingles(texts[cluster[left]], 3)) for left in dropped]
    assert len(dropped) <= 12 and min(similarity) >= 0.4, [(texts[left], texts[cluster[left]]) for left in dropped]


def test_clusters_and_estimates_agree_with_exact_sets():
    """All pairs of 400 documents by brute force: 100 texts, three copies of each with 2 to 40 % of the words edited."""
    rng = random.Random(7)
    texts = [
        " ".join(edit(text.split(), share, rng))
        for text in LONG[:100]
        for share in (0, *rng.choices((0.02, 0.1, 0.4), k=3))
    ]
    signatures = sketch_documents(texts)[1]
    cluster = find_near_duplicates([signatures], np.full(400, 1), np.ones(400, bool))
    shingles = [plain_shingles(text, 3) for text in texts]
    parent = list(range(len(texts)))

    def find(document: int) -> int:
        while parent[document] != document:
            document = parent[document]
        return document

    errors, missed, similar = [], 0, 0
    for left, right in combinations(range(len(texts)), 2):
        exact = jaccard(shingles[left], shingles[right])
        equal = signatures[left] == signatures[right]
        errors.append(np.mean(equal[: duplicates.NUM_HASHES]) - exact)
        if exact >= duplicates.THRESHOLD - 0.12:  # three standard errors
            parent[max(find(left), find(right))] = min(find(left), find(right))
        if exact >= duplicates.THRESHOLD + 0.12:
            similar += 1
            missed += cluster[left] != cluster[right]
    within = [error for error in errors if error]
    assert abs(np.mean(within)) < 0.01 and np.std(within) < 0.045 and np.max(np.abs(errors)) < 0.2
    assert similar > 80 and missed <= 0.02 * similar  # among them edits of symbols, which weigh more
    assert all(find(document) == find(int(cluster[document])) for document in range(len(texts)))


def test_a_shared_header_neither_drops_nor_hides():
    """3,000 documents that share a header of half their length: buckets of hundreds, an edited copy is still found."""
    rng = random.Random(1)
    header = " ".join(LONG[0].split()[:40])
    own = [" ".join(rng.choices(VOCABULARY, k=40)) for _ in range(3000)]
    texts = [f"{header} {text}" for text in own]
    copies = [" ".join(edit(text.split(), 0.05, rng)) for text in texts[:200]]
    cluster = cluster_texts([*texts, *copies])
    found = cluster[:200] == cluster[3000:]
    assert found.mean() >= 0.99
    assert (cluster[200:3000] == np.arange(200, 3000)).all()


def test_a_chain_does_not_drop_what_is_unlike_the_document_kept():
    """Sliding windows over one long text: neighbours are similar, the ends have nothing in common."""
    words = [word for text in LONG[:60] for word in text.split()]
    texts = [" ".join(words[start : start + 200]) for start in range(0, 3000, 30)]
    cluster = cluster_texts(texts)
    shingles = [plain_shingles(text, 3) for text in texts]
    similarity = [jaccard(shingles[left], shingles[right]) for left, right in enumerate(cluster)]
    assert min(similarity) >= duplicates.THRESHOLD - duplicates.DRIFT - 0.12
    assert (cluster != np.arange(len(texts))).any()


def test_the_longest_stands_for_the_cluster_and_the_first_of_equals():
    texts = [LONG[1], LONG[0], f"{LONG[0]} and more", LONG[0], f"{LONG[0]} and more", LONG[2], LONG[1].upper()]
    assert cluster_texts(texts).tolist() == [0, 2, 2, 2, 2, 5, 0]


def test_only_candidates_take_part():
    texts = [f"{LONG[0]} and more", LONG[0], LONG[0], f"{LONG[0]} and"]
    lengths = np.array([len(text) for text in texts])
    cluster = find_near_duplicates([sketch_documents(texts)[1]], lengths, np.array([False, True, False, True]))
    assert cluster.tolist() == [0, 3, 2, 3]
    assert find_near_duplicates([sketch_documents(texts)[1]], lengths, np.zeros(4, bool)).tolist() == [0, 1, 2, 3]
    assert find_near_duplicates([], np.empty(0, int), np.empty(0, bool)).tolist() == []


@pytest.mark.parametrize("alphabet", ["一二三四", "ぁ゚ァヺ"], ids=["Chinese", "Japanese"])
def test_languages_without_spaces(alphabet):
    characters = (
        [chr(code) for code in range(0x4E00, 0x5800)] if alphabet[0] == "一" else list(map(chr, range(0x3041, 0x3097)))
    )
    rng = random.Random(3)
    documents = [rng.choices(characters, k=rng.randint(80, 300)) for _ in range(300)]
    slightly = ["".join(edit(document, 0.05, rng, characters)) for document in documents]
    strongly = ["".join(edit(document, 0.3, rng, characters)) for document in documents]
    texts = ["".join(document) for document in documents]
    cluster = cluster_texts([*texts, *slightly])
    assert np.mean(cluster[:300] == cluster[300:]) >= 0.99
    cluster = cluster_texts([*texts, *strongly])
    assert np.mean(cluster == np.arange(600)) >= 0.99


def test_a_sentence_of_each_language_and_its_copy():
    japanese = "学習データに同じ文書が何度も現れると、モデルはそれを丸ごと覚えてしまい、評価の結果も実際より良く見えることがある。"
    chinese = (
        "如果训练数据中多次出现相同的文档，模型就会把它整个背下来，评测结果也会比实际情况显得更好，因此需要去除重复。"
    )
    texts = [japanese, chinese, japanese.replace("何度も", "何回も"), chinese.replace("因此", "所以"), japanese[::-1]]
    assert cluster_texts(texts).tolist() == [0, 1, 0, 1, 4]


# ---- Contamination.


def test_a_text_that_holds_a_whole_evaluation_document_is_found():
    rng = random.Random(2)
    evaluation, training = LONG[:100], LONG[100:1500]
    index = build_index([evaluation[:33], [], evaluation[33:]])
    pages = []
    for number, text in enumerate(evaluation):
        before, after = rng.sample(training, 20), rng.sample(training, 20)
        item = rng.choice([str.upper, str.title, lambda item: re.sub(r"\s+", "  ", item)])(text)
        pages.append((number, "\n".join([*before, item, *after])))
    found = find_contaminated([page for _, page in pages], index)
    assert found == [number for number, _ in pages]
    clean = find_contaminated(training, index)
    grams = [plain_shingles(text, 13) for text in evaluation]
    for text, number in zip(training, clean, strict=True):
        assert number == -1 or len(grams[number] & plain_shingles(text, 13)) / len(grams[number]) > 0.3, text
    assert sum(number >= 0 for number in clean) <= 0.01 * len(training)


def test_the_share_of_the_evaluation_document_decides():
    rng = random.Random(4)
    filler = rng.choices(VOCABULARY, k=3000)
    evaluation = [" ".join(rng.choices(VOCABULARY, k=300)) for _ in range(50)]
    index = build_index([evaluation])
    rates = {}
    for share in (0.25, 0.8):
        pages = [" ".join([*filler, *text.split()[: int(share * 300)], *filler]) for text in evaluation]
        rates[share] = np.mean(np.array(find_contaminated(pages, index)) == np.arange(50))
    assert rates == {0.25: 0, 0.8: 1}
    # An edit breaks 13 of the 13-grams. A copy with a few edits is found because half of them are enough.
    edited = [" ".join([*filler, *edit(text.split(), 0.02, rng)]) for text in evaluation]
    assert np.mean(np.array(find_contaminated(edited, index)) == np.arange(50)) >= 0.95


def test_a_header_that_both_carry_costs_no_document():
    header = " ".join(LONG[3].split()[:40])
    evaluation = [f"{header} {' '.join(text.split()[:80])}" for text in LONG[10:40] if len(text.split()) >= 80]
    training = [f"{header} {text}" for text in LONG[100:300]]
    assert find_contaminated(training, build_index([evaluation])) == [-1] * 200
    assert find_contaminated(training, build_index([evaluation]), overlap=0.1) != [-1] * 200  # it is found, and counts


def test_contamination_is_what_plain_sets_find():
    """The index holds all 13-grams of evaluation documents of up to 76 words: the answer is exact, including ties."""
    rng = random.Random(5)
    evaluation = [text for text in TEXTS if 5 <= len(plain_words(text)) <= 76][:300]
    training = []
    for _ in range(400):
        pieces = [plain_words(rng.choice(evaluation)) for _ in range(3)]
        training.append(
            " ".join(" ".join(piece[rng.randrange(len(piece)) // 2 :] * rng.randint(1, 2)) for piece in pieces)
        )
    grams = [plain_shingles(text, 13) if len(plain_words(text)) >= 13 else set() for text in evaluation]
    expected = []
    for text in training:
        own = plain_shingles(text, 13)
        shares = [len(own & gram) / len(gram) if gram else 0.0 for gram in grams]
        expected.append(int(np.argmax(shares)) if max(shares) >= 0.5 else -1)
    index = build_index([evaluation])
    assert find_contaminated(training, index) == expected
    assert 50 < sum(number >= 0 for number in expected) < 400
    assert find_contaminated(training, build_index([[text] for text in evaluation])) == expected
    assert [find_contaminated([text], index)[0] for text in training] == expected


def test_short_and_absent_evaluation_documents_contaminate_nothing():
    short = "one two three four five six seven eight nine ten eleven twelve"
    for evaluation in ([], [[]], [[short, "", "..."]]):
        assert find_contaminated([short, f"{short} {short}", ""], build_index(evaluation)) == [-1, -1, -1]
    assert find_contaminated([f"{short} thirteen fourteen"], build_index([[f"{short} thirteen"]])) == [0]
    assert find_contaminated([], build_index([[short]])) == []


def test_contamination_in_a_language_without_spaces():
    item = "以下の文章を読み、筆者が最も強く主張している内容として正しいものを、四つの選択肢の中から一つ選びなさい。"
    page = f"過去問題集です。{item}正解は三番です。"
    assert find_contaminated([page, page[:20]], build_index([[item]])) == [0, -1]


def test_the_index_is_bounded():
    index = build_index([[" ".join(VOCABULARY)] * 2])
    assert index.sizes.tolist() == [duplicates.SKETCH_SIZE] * 2 and len(index.hashes) == 2 * duplicates.SKETCH_SIZE


# ---- Reproducible, and at any size.

FINGERPRINT = """
import hashlib, sys
from test_deduplication import *
batch = int(sys.argv[1])
texts, _ = planted_copies(0.05)
texts = texts[:600] + texts[-600:]
chunks = sketch_all(texts, batch)
cluster = find_near_duplicates(chunks, np.array([len(text) for text in texts]), np.ones(len(texts), bool))
index = build_index(LONG[:200][start : start + batch] for start in range(0, 200, batch))
found = [item for start in range(0, 1200, batch) for item in find_contaminated(texts[start : start + batch], index)]
parts = [np.concatenate(chunks), cluster, np.array(found), index.hashes, index.owners, digests_of(texts)]
print(*(hashlib.sha256(np.ascontiguousarray(part).tobytes()).hexdigest() for part in parts))
"""


def test_results_depend_on_no_hash_seed_batch_size_or_process():
    outputs = {
        run(
            sys.executable,
            "-c",
            FINGERPRINT,
            str(batch),
            PYTHONHASHSEED=seed,
            PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        ).stdout
        for batch, seed in ((1000, "1"), (7, "2"))
    }
    assert len(outputs) == 1 and len(outputs.pop().split()) == 6


def test_the_cache_of_words_is_bounded_and_changes_nothing(monkeypatch):
    whole = hash_words(TEXTS[:300])[0]
    assert duplicates.hash_word.cache_info().maxsize == 2**17
    small = lru_cache(maxsize=100)(duplicates.hash_word.__wrapped__)
    monkeypatch.setattr(duplicates, "hash_word", small)
    assert (hash_words(TEXTS[:300])[0] == whole).all() and small.cache_info().currsize == 100


def test_a_forked_worker_sketches_after_its_parent_did():
    code = (
        "import multiprocessing; from test_deduplication import *;"
        "parent = sketch_documents(TEXTS)[1];"
        "pool = multiprocessing.get_context('fork').Pool(1);"
        "assert (pool.map_async(sketch_documents, [TEXTS]).get(30)[0][1] == parent).all()"
    )
    run(sys.executable, "-c", code, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")


def test_signatures_mapped_from_arrow_give_what_arrays_give(tmp_path):
    texts, _ = planted_copies(0.05)
    signatures = sketch_all(texts)
    batches = [
        pa.record_batch({"signature": pa.FixedSizeListArray.from_arrays(part.ravel(), duplicates.SIGNATURE)})
        for part in signatures
    ]
    with pa.OSFile(str(tmp_path / "s.arrow"), "wb") as file, pa.ipc.new_file(file, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    column = pa.ipc.open_file(pa.memory_map(str(tmp_path / "s.arrow"))).read_all()["signature"]
    mapped = [
        chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, duplicates.SIGNATURE) for chunk in column.chunks
    ]
    lengths, candidates = np.array([len(text) for text in texts]), np.ones(len(texts), bool)
    expected = find_near_duplicates([np.concatenate(signatures)], lengths, candidates)
    assert len(mapped) > 1 and (find_near_duplicates(mapped, lengths, candidates) == expected).all()


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024


class PeakMemory:
    """The peak of anonymous memory within the block, above that at its beginning."""

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = anonymous_bytes()
        self.running = True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while self.running:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()

    @property
    def bytes(self) -> int:
        return self.peak - self.start


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_million_equal_documents_of_one_word():
    """Takes some 10 s, mostly for the sketches: fetching them from the library alone takes 6 µs per document."""
    count = 10**6
    texts = ["word"] * count
    digests = digests_of(texts)
    with PeakMemory() as memory:
        first = first_of_each(digests)
    assert first.sum() == 1 and memory.bytes < 60 * count
    chunks = sketch_all(texts)
    with PeakMemory() as memory:
        cluster = find_near_duplicates(chunks, np.full(count, 5), np.ones(count, bool))
    assert (cluster == 0).all()
    assert memory.bytes < 60 * count + 25_000_000


def test_a_hundred_thousand_equal_or_distinct_signatures():
    """The clusters are right, and four times the documents take about four times as long, not sixteen."""
    block = np.broadcast_to(sketch_documents(["word"])[1], (1000, duplicates.SIGNATURE))
    distinct = np.random.default_rng(0).integers(0, 2**32, (100_000, duplicates.SIGNATURE), np.uint32)

    def cluster_equal(count: int) -> None:
        assert (find_near_duplicates([block] * (count // 1000), np.full(count, 4), np.ones(count, bool)) == 0).all()

    def cluster_distinct(count: int) -> None:
        found = find_near_duplicates([distinct[:count]], np.full(count, 4), np.ones(count, bool))
        assert (found == np.arange(count)).all()

    assert growth(cluster_equal, 25_000) < 9
    assert growth(cluster_distinct, 25_000) < 9
