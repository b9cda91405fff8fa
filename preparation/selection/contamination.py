"""Training documents that contain evaluation text.

They share 13-grams of words with it, the length that GPT-3's authors chose (Brown et al. 2020, arXiv 2005.14165,
appendix C). The measure is the share of an *evaluation* document's 13-grams that one training document contains: a long
page that quotes a whole test item is contaminated, however small a part of the page the item is. A licence header or a
quotation that both documents contain is only a part of the item, and drops no document.

Evaluation documents of fewer than 13 words have no 13-gram and are not checked: such a sentence occurs in unrelated
texts, and a training document equal to it is an exact duplicate.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from preparation.selection.shingles import hash_ngrams, hash_words

NGRAM = 13
SKETCH_SIZE = 64
OVERLAP = 0.5


@dataclass
class ContaminationIndex:
    """The 13-grams of E evaluation documents, P in all. Each takes 12 bytes, and 2 to 4 in the bitmap: at most 1 KB per
    document, and three times that while the index is built."""

    hashes: np.ndarray
    """(P,) uint64, sorted; a 13-gram of several documents occurs several times."""
    owners: np.ndarray
    """(P,) uint32: the number of the evaluation document, counted from 0."""
    sizes: np.ndarray
    """(E,) number of 13-grams of each document; 0 for one that is too short to check."""
    bitmap: np.ndarray
    """(2^b,) uint8: 16 to 32 bits per 13-gram, one of them set. For nearly every 13-gram of clean text the bit is
    unset, which saves a search in `hashes` with about twenty cache misses."""


def build_index(batches: Iterable[list[str]]) -> ContaminationIndex:
    """Index the 64 13-grams with the smallest hashes of each evaluation document: a random sample (bottom-k sketch,
    Cohen and Kaplan 2007) that estimates the share another document contains with a standard error of at most 0.06.
    Documents of up to 76 words have no more 13-grams than that."""
    hashes, owners, sizes = [np.empty(0, np.uint64)], [np.empty(0, np.uint32)], [np.empty(0, np.int64)]
    documents = 0
    for texts in batches:
        grams, counts = hash_ngrams(*hash_words(texts), NGRAM)
        owner = np.repeat(np.arange(len(texts)), counts)
        order = np.lexsort((grams, owner))
        grams, owner = grams[order], owner[order]
        distinct = np.ones(len(grams), bool)
        distinct[1:] = (grams[1:] != grams[:-1]) | (owner[1:] != owner[:-1])
        grams, owner = grams[distinct], owner[distinct]
        found = np.bincount(owner, minlength=len(texts))
        rank = np.arange(len(grams)) - np.repeat(np.cumsum(found) - found, found)
        smallest = rank < SKETCH_SIZE
        hashes.append(grams[smallest])
        owners.append((owner[smallest] + documents).astype(np.uint32))
        sizes.append(np.minimum(found, SKETCH_SIZE))
        documents += len(texts)
    flat = np.concatenate(hashes)
    hashes.clear()  # there may be a lot of evaluation text
    order = np.argsort(flat, kind="stable")
    owner_of = np.concatenate(owners)[order]
    flat = flat[order]
    del order, owners
    bitmap = np.zeros(2 ** (len(flat).bit_length() + 1), np.uint8)
    np.bitwise_or.at(bitmap, *_place_and_bit(flat, bitmap))
    return ContaminationIndex(flat, owner_of, np.concatenate(sizes), bitmap)


def find_contaminated(texts: list[str], index: ContaminationIndex, overlap: float = OVERLAP) -> list[int]:
    """For each training document, the number of the evaluation document whose 13-grams it contains the largest share
    of, if that share is at least `overlap`; else -1."""
    grams, counts = hash_ngrams(*hash_words(texts), NGRAM)
    found = [-1] * len(texts)
    place, bit = _place_and_bit(grams, index.bitmap)
    positions = np.flatnonzero(index.bitmap[place] & bit)
    grams = grams[positions]
    starts = np.searchsorted(index.hashes, grams, side="left")
    stops = np.searchsorted(index.hashes, grams, side="right")
    documents = np.searchsorted(np.cumsum(counts), positions, side="right")
    # Sorted by document, each 13-gram once, however often the document repeats it.
    hits = np.unique(np.stack([documents, starts, stops])[:, starts < stops], axis=1)
    for rows in np.split(hits, np.flatnonzero(np.diff(hits[0], prepend=-1)), axis=1)[1:]:
        owning = [index.owners[start:stop] for _, start, stop in rows.T.tolist()]
        owners, shared = np.unique(np.concatenate(owning), return_counts=True)
        shares = shared / index.sizes[owners]
        best = int(np.argmax(shares))  # the first of equals
        if shares[best] >= overlap:
            found[rows[0, 0]] = int(owners[best])
    return found


def _place_and_bit(hashes: np.ndarray, bitmap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place of each hash in the bitmap: the byte from its highest bits, the bit from its lowest three."""
    place = hashes >> np.uint64(65 - len(bitmap).bit_length())
    return place, np.uint8(1) << (hashes & np.uint64(7)).astype(np.uint8)
