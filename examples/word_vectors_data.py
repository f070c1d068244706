"""The data of word_vectors.py: text, its vocabulary, and how often words stand near each other."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WINDOW = 10
WORD = re.compile(r"[^\W\d]\w*")  # a letter or an underscore first: words and names, no numbers
FEWEST_WORDS = 10
OUTSIDE = -1  # stands between documents, so that no window reaches across


@dataclass(frozen=True)
class Corpus:
    """A vocabulary, commonest first, with counts, and the non-zero co-occurrences of its words."""

    name: str
    tokens: int
    words: list[str]
    counts: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    cooccurrences: np.ndarray


def load_manual(min_count: int) -> Corpus:
    """Python's own manual, as ``help()`` shows it; every CPython carries it.

    Raises:
        ValueError: This Python has none.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(f"this Python carries no manual ({error}): name a text file") from error
    return make_corpus("Python's manual", list(topics.values()), min_count)


def load_text(path: Path, min_count: int) -> Corpus:
    """A text file in UTF-8, read as one document.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not UTF-8, or has too few words that occur ``min_count`` times.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8: {error}") from error
    return make_corpus(str(path), [text], min_count)


def make_corpus(name: str, documents: list[str], min_count: int) -> Corpus:
    """Count words, keep those that occur ``min_count`` times or more, and count what stands near what.

    Raises:
        ValueError: Fewer than ten words are left.
    """
    texts = [WORD.findall(document.lower()) for document in documents]
    counted = Counter(word for text in texts for word in text)
    words = [word for word, count in counted.most_common() if count >= min_count]
    if len(words) < FEWEST_WORDS:
        few = f"{len(words)} words occur {min_count} times or more, {FEWEST_WORDS} are needed"
        raise ValueError(f"{name}: {few}; take a longer text or a smaller --min-count")
    number = {word: i for i, word in enumerate(words)}
    numbers = [np.array([number[word] for word in text if word in number], np.int64) for text in texts]
    counts = np.array([counted[word] for word in words])
    return Corpus(name, sum(map(len, numbers)), words, counts, *cooccurrences(numbers, len(words)))


def cooccurrences(documents: list[np.ndarray], vocabulary: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum 1/distance over all pairs of words at most ``WINDOW`` apart, to either side.

    Returns rows, columns and values of the non-zero entries of the matrix, which is symmetric.
    """
    gap = np.full(WINDOW, OUTSIDE)
    stream = np.concatenate([part for document in documents for part in (document, gap)])
    keys, sums = np.empty(0, np.int64), np.empty(0)
    for distance in range(1, WINDOW + 1):
        left, right = stream[:-distance], stream[distance:]
        inside = (left != OUTSIDE) & (right != OUTSIDE)
        pairs = left[inside] * vocabulary + right[inside], right[inside] * vocabulary + left[inside]
        near = np.full(2 * inside.sum(), 1 / distance)
        keys, place = np.unique(np.concatenate([keys, *pairs]), return_inverse=True)
        sums = np.bincount(place, np.concatenate([sums, near]), len(keys))
    return keys // vocabulary, keys % vocabulary, sums
