"""The data of recommender.py: ratings from a file or generated, and the hashing of ids to rows of a table."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from zlib import crc32

import numpy as np

FEWEST_RATINGS = 20
COLUMNS = {"user": ("user",), "item": ("item", "movie", "book", "product"), "rating": ("rating", "score", "stars")}
# The generated set: somewhat more than MovieLens 100K. Its ids are large numbers, as in a log, and index no table.
USERS, ITEMS, DRAWS = 6_000, 3_000, 150_000
TASTES = 4
NOISE = 0.6


@dataclass(frozen=True)
class Ratings:
    """Who rated what how: ids as they were written, and numbers."""

    name: str
    users: np.ndarray
    items: np.ndarray
    stars: np.ndarray


def load_ratings(path: Path) -> Ratings:
    """MovieLens u.data (user, item, rating and time, between tabs, no header), or a csv file with a header.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no such file, a line is damaged, or there are fewer than twenty ratings.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8: {error}") from error
    tabs = "\t" in text.partition("\n")[0]
    lines = csv.reader(StringIO(text), delimiter="\t" if tabs else ",")
    places = (0, 1, 2) if tabs else _places(path, next(lines, []))
    try:
        rows = list(_rows(path, lines, places))
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}: {error}") from error
    if len(rows) < FEWEST_RATINGS:
        raise ValueError(f"{path}: {len(rows)} ratings, {FEWEST_RATINGS} are needed")
    users, items, stars = zip(*rows, strict=True)
    return Ratings(str(path), np.array(users), np.array(items), np.array(stars))


def _places(path: Path, header: list[str]) -> tuple[int, ...]:
    """Where in a line user, item and rating stand."""

    def place(column: str, starts: tuple[str, ...]) -> int:
        found = [i for i, name in enumerate(header) if name.strip().lower().startswith(starts)]
        if not found:
            raise ValueError(f"{path}: no column named '{starts[0]}...' in the header: {', '.join(header)[:200]}")
        return found[0]

    return tuple(place(column, starts) for column, starts in COLUMNS.items())


def _rows(path: Path, lines, places: tuple[int, ...]) -> Iterator[tuple[str, str, float]]:
    for line in lines:
        if not line:
            continue
        try:
            user, item, stars = (line[place].strip() for place in places)
            value = float(stars)
        except (IndexError, ValueError) as error:
            raise ValueError(f"{path}, line {lines.line_num}: no user, item and rating: {line}") from error
        if not np.isfinite(value):
            raise ValueError(f"{path}, line {lines.line_num}: the rating is {stars}")
        yield user, item, value


def generate(draws: int = DRAWS) -> Ratings:
    """Ratings of 1 to 5 stars with biases and a few tastes behind them, popular and rare items, and noise."""
    rng = np.random.default_rng(0)
    drawn = np.stack([_pick(rng, USERS, 0.5, draws), _pick(rng, ITEMS, 0.8, draws)])
    user, item = np.unique(drawn, axis=1)  # nobody rates an item twice
    likes, traits = rng.normal(size=(USERS, TASTES)), rng.normal(size=(ITEMS, TASTES))
    stars = 3.5 + 0.4 * rng.normal(size=USERS)[user] + 0.5 * rng.normal(size=ITEMS)[item]
    stars += 0.4 * (likes[user] * traits[item]).sum(axis=1) + NOISE * rng.normal(size=len(user))
    user_ids, item_ids = (rng.choice(2**40, size, replace=False) for size in (USERS, ITEMS))
    stars = np.clip(np.rint(stars), 1, 5)
    return Ratings("generated ratings", user_ids[user].astype(str), item_ids[item].astype(str), stars)


def hashed(kind: str, ids: np.ndarray, rows: int) -> np.ndarray:
    """A row for each id, the same in every run: no dictionary of ids is kept, and new ones need no new table."""
    names, place = np.unique(ids, return_inverse=True)
    numbers = np.array([crc32(f"{kind} {name}".encode()) % rows for name in names], np.int32)
    return numbers[place]


def _pick(rng: np.random.Generator, size: int, steepness: float, draws: int) -> np.ndarray:
    """Draws from 0..size-1 with Zipf's probabilities."""
    weights = 1 / np.arange(1, size + 1) ** steepness
    return rng.choice(size, draws, p=weights / weights.sum())
