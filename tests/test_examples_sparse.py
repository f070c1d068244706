"""The examples of row-sparse gradients, run as a user runs them."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import recommender
import word_vectors
from mlx_adagrad import RowSparse
from recommender_data import Ratings, generate, hashed, load_ratings
from side_by_side import EMBEDDINGS, Batches, Run, ratio
from test_examples import assert_picture, run
from word_vectors_data import WINDOW, cooccurrences, load_manual, load_text
from word_vectors_report import content_words, neighbours_table, project

FRUIT = ["apple", "pear", "plum", "cherry", "grape", "lemon"]
METAL = ["iron", "copper", "zinc", "lead", "silver", "gold"]


def write_text(path: Path) -> Path:
    """Long sentences, half of them of fruit alone and half of metals alone."""
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice((FRUIT, METAL)[i % 2], 60)) for i in range(60)]
    path.write_text("\n".join(sentences), encoding="utf-8")
    return path


def small_ratings(size: int = 3000) -> Ratings:
    """Whole stars, of few enough users and items that some hundred steps learn them."""
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 60, size), rng.integers(0, 40, size)
    stars = np.clip(np.rint(3 + rng.normal(size=60)[user] + rng.normal(size=40)[item]), 1, 5)
    return Ratings("small", np.char.add("u", user.astype(str)), np.char.add("i", item.astype(str)), stars)


def write_u_data(path: Path, ratings: Ratings) -> Path:
    rows = zip(ratings.users, ratings.items, ratings.stars, strict=True)
    path.write_text("".join(f"{user}\t{item}\t{stars:g}\t881250949\n" for user, item, stars in rows))
    return path


def write_csv(path: Path, ratings: Ratings) -> Path:
    """With quotes, a time and the columns in another order."""
    rows = zip(ratings.users, ratings.items, ratings.stars, strict=True)
    lines = [f'{stars},881250949,"{item}",{user}\r\n' for user, item, stars in rows]
    path.write_bytes("\ufeffrating,timestamp,movieId,userId\r\n".encode() + "".join(lines).encode())
    return path


def results(output: str) -> dict[str, list[float]]:
    """The numbers of the table of both runs."""
    rows = re.findall(r"^(dense|sparse) +([\d. ]+)$", output, re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in rows}


def assert_alike(output: str, falls_to: float) -> None:
    """Both losses fall, and sparse gradients lead where dense ones do."""
    rows = results(output)
    assert set(rows) == {"dense", "sparse"}
    assert rows["dense"][:2] == pytest.approx(rows["sparse"][:2], rel=2e-3)  # printed to a thousandth
    for first, last, *_ in rows.values():
        assert 0 < last < falls_to * first, output


def neighbours(output: str, word: str) -> list[str]:
    line = re.findall(rf"^  {word} +(.*)$", output, re.MULTILINE)[0]
    return re.findall(r"(\S+) -?[\d.]+", line)


def test_word_vectors_of_the_manual_make_sense(tmp_path):
    output = run("word_vectors.py", "--quick", "--epochs", 8, "--out", tmp_path)
    assert output.startswith("Python's manual: ")
    assert_alike(output, falls_to=0.4)
    assert neighbours(output, "left")[0] == "right" and neighbours(output, "true")[0] == "false"
    assert neighbours(output, "try")[0] == "finally"
    assert_picture(tmp_path / "word_vectors.png")


def test_word_vectors_tell_the_ratio_of_the_times(tmp_path):
    output = run("word_vectors.py", "--quick", "--epochs", 1, "--out", tmp_path)
    rows = results(output)
    told = re.findall(r"words (dense|sparse) is ([\d.]+)x faster than (dense|sparse)", output)[0]
    assert float(told[1]) == pytest.approx(rows[told[2]][2] / rows[told[0]][2], rel=0.02, abs=0.06)
    assert ("too small for sparse to win" in output) == (told[0] == "dense")
    grown = re.findall(r"^ +([\d,]+) +([\d.]+) +([\d.]+) +([\d.]+)$", output, re.MULTILINE)
    assert [int(rows.replace(",", "")) for rows, *_ in grown] == [len(load_manual(5).words), 10_000]
    for _, dense, sparse, times in grown:
        assert float(times) == pytest.approx(float(dense) / float(sparse), abs=0.02)


def test_word_vectors_of_a_text_file(tmp_path):
    text = write_text(tmp_path / "text.txt")
    chosen = ["--words", "pear", "zinc", "bronze"]
    output = run("word_vectors.py", text, "--quick", "--epochs", 150, "--out", tmp_path / "out", *chosen)
    assert output.startswith(f"{text}: 3,600 words, 12 different ones, ")
    assert_alike(output, falls_to=0.4)
    assert set(neighbours(output, "pear")[:5]) == set(FRUIT) - {"pear"}
    assert set(neighbours(output, "zinc")[:5]) == set(METAL) - {"zinc"}
    assert "\nnot in the vocabulary: bronze\n" in output
    assert_picture(tmp_path / "out" / "word_vectors.png")


def test_cooccurrences_are_those_of_a_plain_count():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 5, size) for size in (30, 1, 0, 12)]
    expected = np.zeros((5, 5))
    for document in documents:
        for i, left in enumerate(document):
            for j in range(i + 1, min(i + WINDOW + 1, len(document))):
                expected[left, document[j]] += 1 / (j - i)
                expected[document[j], left] += 1 / (j - i)
    rows, columns, values = cooccurrences(documents, 5)
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == len(rows) == (expected > 0).sum()
    np.testing.assert_allclose(values, expected[rows, columns], rtol=1e-12)


def test_words_are_lower_case_names_without_numbers(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\ufeffThe the __init__ élan 12 x3 don't! " * 2 + "once a b c d", encoding="utf-8")
    corpus = load_text(path, 1)
    counts = dict(zip(corpus.words, corpus.counts.tolist(), strict=True))
    twice = {"__init__": 2, "élan": 2, "x3": 2, "don": 2, "t": 2}
    assert counts == {"the": 4, **twice, "once": 1, "a": 1, "b": 1, "c": 1, "d": 1}


def test_weights_and_targets_are_those_of_glove():
    corpus = load_manual(5)
    i, j, log_x, weight = (np.array(part) for part in word_vectors.make_data(corpus))
    x = corpus.cooccurrences
    assert x.max() > 100 > 1 > x.min()
    np.testing.assert_allclose(log_x, np.log(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weight, np.where(x < 100, (x / 100) ** 0.75, 1), rtol=1e-5)
    np.testing.assert_array_equal((i, j), (corpus.rows, corpus.columns))


def test_glove_and_its_loss_are_the_formula():
    model = word_vectors.GloVe("sparse", 20)
    i, j = mx.array([3, 3, 7]), mx.array([5, 3, 19])
    w, c = np.array(model.words.weight)[np.array(i)], np.array(model.contexts.weight)[np.array(j)]
    expected = (w[:, :-1] * c[:, :-1]).sum(1) + w[:, -1] + c[:, -1]
    np.testing.assert_allclose(model(i, j), expected, atol=1e-6)
    log_x, weight = np.array([0.5, -1, 2], np.float32), np.array([1, 0.5, 0.1], np.float32)
    loss = word_vectors.loss_fn(model, i, j, mx.array(log_x), mx.array(weight))
    assert loss.item() == pytest.approx((weight * (expected - log_x) ** 2).mean(), rel=1e-5)


def test_factors_are_the_formula():
    model = recommender.Factors("dense", 30, 3.5)
    ids = np.array([[1, 2], [7, 29], [1, 1]])
    model.table.weight = mx.random.normal(model.table.weight.shape)
    user, item = (np.array(model.table.weight)[ids[:, side]] for side in (0, 1))
    expected = 3.5 + user[:, -1] + item[:, -1] + (user[:, :-1] * item[:, :-1]).sum(1)
    np.testing.assert_allclose(model(mx.array(ids)), expected, atol=1e-4)
    stars = np.array([1, 5, 3], np.float32)
    penalty = recommender.PENALTY * ((user**2).sum(1) + (item**2).sum(1)).mean()
    loss = recommender.loss_fn(model, mx.array(ids), mx.array(stars)).item()
    assert loss == pytest.approx(((expected - stars) ** 2).mean() + penalty, rel=1e-4)


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_each_run_has_the_gradients_it_is_named_after(kind):
    glove = word_vectors.make_run(kind, 50)
    ids, ones = mx.array([4, 9, 4]), mx.ones(3)
    _, grads = glove.loss_and_grad(glove.model, ids, ids, ones, ones)
    wanted = RowSparse if kind == "sparse" else mx.array
    assert all(isinstance(grads[table]["weight"], wanted) for table in ("words", "contexts"))


def test_both_runs_start_from_the_same_weights():
    for table in ("words", "contexts"):
        dense, sparse = (word_vectors.GloVe(kind, 40)[table].weight for kind in EMBEDDINGS)
        assert mx.array_equal(dense, sparse)
    dense, sparse = (recommender.Factors(kind, 40, 3.0).table.weight for kind in EMBEDDINGS)
    assert mx.array_equal(dense, sparse) and not dense[:, -1].any()


def test_an_epoch_sees_everything_once_and_is_the_same_for_both_runs():
    batches = Batches((mx.arange(10), mx.arange(10) * 2), size=4)
    first, again, second = (list(batches.epoch(number)) for number in (0, 0, 1))
    assert [len(x) for x, _ in first] == [4, 4, 2] and len(batches) == 3
    orders = [np.concatenate([np.array(x) for x, _ in epoch]).tolist() for epoch in (first, again, second)]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert all(mx.array_equal(2 * x, y) for x, y in first)


def test_the_ratio_names_the_faster():
    runs = {name: Run(name, word_vectors.GloVe(name, 10), None, word_vectors.loss_fn) for name in EMBEDDINGS}  # type: ignore[arg-type]
    for dense, sparse, told in (
        ([9.0, 2.0, 2.0], [9.0, 1.0, 1.0], "sparse is 2.0x faster than dense"),
        ([1.0], [3.0], "dense is 3.0x faster than sparse"),
    ):
        runs["dense"].seconds, runs["sparse"].seconds = dense, sparse
        assert ratio(runs["dense"], runs["sparse"]) == told


def test_the_map_shows_content_words_in_the_plane_of_most_variance():
    corpus = load_manual(5)
    words = [corpus.words[i] for i in content_words(corpus, 30)]
    assert len(words) == 30 and "the" not in words and "object" in words
    points = np.random.default_rng(0).normal(size=(50, 6)) * [1, 9, 1, 1, 5, 1] + 3
    spread = project(points).var(axis=0)
    expected = np.sort(np.linalg.eigvalsh(np.cov(points.T, bias=True)))[::-1][:2]
    np.testing.assert_allclose(spread, expected)


def test_neighbours_are_sorted_by_cosine(tmp_path):
    corpus = load_text(write_text(tmp_path / "text.txt"), 1)
    vectors = np.random.default_rng(0).normal(size=(12, 4))
    vectors[3] = 7 * vectors[0]
    vectors[5] = -vectors[0]
    line = neighbours_table(corpus, vectors, [corpus.words[0]]).splitlines()[1]
    assert re.match(rf"  {corpus.words[0]} +{corpus.words[3]} 1\.00  ", line) and corpus.words[5] not in line
    cosines = [float(number) for number in re.findall(r"-?\d\.\d\d", line)]
    assert len(cosines) == 6 and cosines == sorted(cosines, reverse=True)


def test_the_recommender_learns_the_generated_ratings(tmp_path):
    output = run("recommender.py", "--epochs", 5, "--rows", 2**16, "--out", tmp_path)
    assert "These ratings are made up" in output
    assert_alike(output, falls_to=0.9)
    mean = float(re.findall(r"always the mean: RMSE ([\d.]+)", output)[0])
    assert all(row[-1] < 0.85 * mean for row in results(output).values()), output
    assert re.search(r"(dense|sparse) is [\d.]+x faster than", output)
    assert_picture(tmp_path / "recommender.png")


def test_a_quick_recommender_does_less(tmp_path):
    output = run("recommender.py", "--quick", "--rows", 4096, "--out", tmp_path)
    assert re.match(r"generated ratings: 19,\d{3} ratings", output)
    assert_alike(output, falls_to=0.9)


def test_the_generated_ratings_have_large_ids_and_no_pair_twice():
    ratings = generate(2000)
    pairs = set(zip(ratings.users, ratings.items, strict=True))
    assert len(pairs) == len(ratings.stars) > 1800
    assert set(ratings.stars) == {1, 2, 3, 4, 5}
    assert max(map(int, ratings.users)) > 2**32
    assert np.array_equal(generate(2000).stars, ratings.stars)


def test_u_data_and_csv_give_the_same_run(tmp_path):
    ratings = small_ratings()
    files = write_u_data(tmp_path / "u.data", ratings), write_csv(tmp_path / "ratings.csv", ratings)
    seen = []
    for path in files:
        output = run("recommender.py", path, "--rows", 4096, "--epochs", 60, "--out", tmp_path / path.stem)
        assert output.startswith(f"{path}: 3,000 ratings by 60 users of 40 items\n") and "made up" not in output
        assert_alike(output, falls_to=0.7)
        mean = float(re.findall(r"always the mean: RMSE ([\d.]+)", output)[0])
        assert all(row[-1] < 0.7 * mean for row in results(output).values()), output
        assert_picture(tmp_path / path.stem / "recommender.png")
        seen.append([row[:2] + row[-1:] for row in results(output).values()])
    np.testing.assert_allclose(seen[0], seen[1], rtol=2e-3)


@pytest.mark.parametrize("write", [write_u_data, write_csv])
def test_ratings_are_read_as_they_were_written(tmp_path, write):
    ratings = small_ratings(100)
    read = load_ratings(write(tmp_path / "ratings", ratings))
    for column in ("users", "items", "stars"):
        np.testing.assert_array_equal(getattr(read, column), getattr(ratings, column))


def test_ids_are_hashed_alike_in_every_process_and_apart_by_kind():
    ids = np.array(["17", "4", "17", "anna"])
    rows = hashed("user", ids, 2**20)
    assert rows.tolist() == [207850, 183510, 207850, 1017184]
    assert rows[0] != hashed("item", ids, 2**20)[0]
    many = hashed("user", np.arange(5000).astype(str), 1000)
    assert 0 <= many.min() and many.max() < 1000 and len(np.unique(many)) > 950


def test_one_rating_in_ten_is_held_out_and_none_twice():
    ratings = small_ratings(1000)
    ratings = Ratings("numbered", ratings.users, ratings.items, np.arange(1000.0))
    (ids, stars), (ids_out, stars_out) = recommender.split(ratings, 4096)
    assert len(stars_out) == len(ids_out) == 100 and len(ids) == 900
    assert sorted(np.array(stars).tolist() + np.array(stars_out).tolist()) == list(range(1000))
    users = hashed("user", ratings.users, 4096)
    np.testing.assert_array_equal(np.array(ids)[:, 0], users[np.array(stars).astype(int)])


RATING = "1\t2\t3\t4\n"
HEADER = "user_id,item_id,rating\n"


@pytest.mark.parametrize(
    "script, content, message",
    [
        ("word_vectors.py", None, "No such file or directory"),
        ("word_vectors.py", b"", "0 words occur 5 times or more, 10 are needed"),
        ("word_vectors.py", b"to be or not to be " * 9, "4 words occur 5 times or more, 10 are needed"),
        ("word_vectors.py", b"\xff\xfe\x00a", "not a text in UTF-8"),
        ("recommender.py", None, "No such file or directory"),
        ("recommender.py", b"", "no column named 'user...' in the header"),
        ("recommender.py", b"user,book,when\n", "no column named 'rating...' in the header: user, book, when"),
        ("recommender.py", b"1::1193::5::978300760\n" * 30, "no column named 'user...' in the header: 1::1193"),
        ("recommender.py", RATING * 19, "19 ratings, 20 are needed"),
        ("recommender.py", RATING * 30 + "1\t2\n", "line 31: no user, item and rating: ['1', '2']"),
        ("recommender.py", HEADER + "1,2,3\n" * 30 + "1,2,good\n", "line 32: no user, item and rating"),
        ("recommender.py", HEADER + "1,2,3\n" * 30 + "1,2,nan\n", "line 32: the rating is nan"),
        ("recommender.py", b"\xff\xfe\x00a", "not a text in UTF-8"),
    ],
)
def test_bad_files_end_with_one_clear_line(tmp_path, script, content, message):
    path = tmp_path / "data"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = run(script, path, "--out", tmp_path, code=1)
    assert error.startswith(f"{script}: ") and str(path) in error and message in error
    assert error.count("\n") == 1 and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("script", ["word_vectors.py", "recommender.py"])
def test_senseless_options_are_refused(tmp_path, script):
    error = run(script, "--epochs", 0, "--out", tmp_path, code=2)
    assert "argument --epochs: 0 is not positive" in error
