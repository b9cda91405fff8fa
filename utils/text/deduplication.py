"""Exact duplicates, and the split that follows from the same hash."""

import hashlib
from collections.abc import Iterable

DIGEST_BYTES = 16


def digest(text: str) -> bytes:
    """128 bits of BLAKE2b of the text: two documents are the same when these are."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def iter_first_seen(digests: Iterable[bytes]) -> Iterable[bool]:
    """For each digest, whether it is the first of its kind; holds about 100 bytes of memory per distinct document."""
    seen: set[bytes] = set()
    for value in digests:
        yield value not in seen
        seen.add(value)


def is_validation(value: bytes, validation_fraction: float) -> bool:
    """Whether the document of this digest is held out: a property of its text alone, so that added documents move
    none of the others across the split."""
    return int.from_bytes(value[:8], "big") < validation_fraction * 2**64
