"""10,605 film-review snippets, each with the mean score, -4 to 4, that human raters gave it.

From the source distribution of vaderSentiment (Hutto and Gilbert, ICWSM 2014); see fetch.py.
"""

from __future__ import annotations

import html
import io
import random
import re
import tarfile
from pathlib import Path

import fetch
import numpy as np

SDIST = (
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TABLE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def load(cache: Path = fetch.CACHE) -> list[tuple[str, float]]:
    """All snippets as (text, score), in the order of the file."""
    with tarfile.open(fetch.sdist(*SDIST, cache)) as outer:
        inner = outer.extractfile(INNER).read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        table = tar.extractfile(TABLE).read().decode("utf-8")
    rows = [line.split("\t") for line in table.split("\n")]  # id, score, text
    return [(html.unescape(text).strip(), float(score)) for _, score, text in rows]


def splits(rows: list[tuple[str, float]], seed: int = 0, validation: int = 1000, test: int = 2000):
    """(train, validation, test), lists of (text, label): 1 for praise, 0 for blame.

    Scores within 0.5 of zero are left out. The file names neither film nor critic, so snippets can
    be grouped by their text alone: of those with the same words the first is kept, in one split.
    """
    unique = {}
    for text, score in rows:
        if abs(score) >= 0.5:
            words = " ".join(re.findall(r"\w+", text.casefold()))
            unique.setdefault(words, (text, int(score > 0)))
    rows = list(unique.values())
    random.Random(seed).shuffle(rows)
    return rows[validation + test :], rows[test : validation + test], rows[:test]


def batches(ids, mask, labels, size: int, lengths: tuple[int, ...], rng=None):
    """Batches (ids [size, L], mask, labels), each of the least L in `lengths` that holds its texts.

    So there are as many shapes to compile for as lengths. What does not fill a batch of one length
    goes to the next; at most size - 1 texts are left over. `rng`, NumPy's, shuffles.
    """
    shuffle = rng.permutation if rng else np.arange
    tokens, rest, out = mask.sum(1), shuffle(len(ids)), []
    for L in lengths:
        fits = rest[tokens[rest] <= L]
        fits = fits[: len(fits) // size * size]
        rest = rest[~np.isin(rest, fits)]
        out += [(ids[i, :L], mask[i, :L], labels[i]) for i in fits.reshape(-1, size)]
    return [out[i] for i in shuffle(len(out))]
