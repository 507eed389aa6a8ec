"""Recall, R-precision and the Fréchet distance on cases with known answers, and beside SciPy."""

import numpy as np
import pytest
from scipy import linalg

from chatpose_jax.evaluation.retrieval import GROUP, compare, frechet_distance, recall_columns


def unit(rng, *shape):
    found = rng.normal(size=shape)
    return (found / np.linalg.norm(found, axis=-1, keepdims=True)).astype(np.float32)


def noisy(rng, features, noise):
    found = features + noise * rng.normal(size=features.shape)
    return (found / np.linalg.norm(found, axis=-1, keepdims=True)).astype(np.float32)


def ranks_in_words(queries, items):
    """The rank of item i for query i, counted from 0, by sorting."""
    return np.array([list(np.argsort(-(items @ query))).index(i) for i, query in enumerate(queries)])


def test_recall_counts_the_rank_among_all_items():
    rng = np.random.default_rng(0)
    poses = unit(rng, 300, 16)
    texts = noisy(rng, poses, 0.35)
    found = compare(texts, poses)
    for places, queries, items in ((found.t2p, texts, poses), (found.p2t, poses, texts)):
        ranks = ranks_in_words(queries, items)
        assert ranks.max() > 20, "some are missed"
        np.testing.assert_array_equal(places.ranks, ranks + 1)
        for k in (1, 5, 10, 20):
            np.testing.assert_array_equal(places.hits(k), ranks < k)
    columns = recall_columns(found)
    assert list(columns)[:6] == [f"R^{way}@{k}" for way in ("P2T", "T2P") for k in (5, 10, 20)]
    np.testing.assert_allclose(columns["R^P2T@10"].mean(), 100 * (ranks_in_words(poses, texts) < 10).mean())
    assert columns["R^P2T@10"].mean() != columns["R^T2P@10"].mean()


def test_a_system_that_always_gives_the_same_pose_gets_what_guessing_gets():
    rng = np.random.default_rng(1)
    texts, poses = unit(rng, 200, 16), np.repeat(unit(rng, 1, 16), 200, 0)
    columns = recall_columns(compare(texts, poses))
    for k in (5, 10, 20):
        np.testing.assert_allclose(columns[f"R^T2P@{k}"], 100 * k / 200)
        np.testing.assert_allclose(columns[f"R^P2T@{k}"].mean(), 100 * k / 200)
    assert columns["R-precision@3 (PoseScript)"].mean() == 0, "the mean rank of ten draws is 15.5"
    np.testing.assert_allclose(np.nanmean(columns["R-precision@3 (UniPose)"]), 100 * 3 / GROUP)


def test_a_pair_without_pose_or_text_is_a_miss_and_in_no_gallery():
    rng = np.random.default_rng(2)
    poses = unit(rng, 64, 8)
    texts = poses.copy()
    here = np.arange(64) % 4 != 0
    poses[~here] = texts[1]  # would be a rival of pose 1 if it were there
    found = compare(texts, poses, with_pose=here)
    np.testing.assert_array_equal(found.t2p.hits(1), here)
    np.testing.assert_array_equal(found.p2t.hits(1), here)
    np.testing.assert_array_equal(np.isnan(found.t2p.ranks), ~here)
    np.testing.assert_array_equal(found.posescript[0], here)
    np.testing.assert_array_equal(found.unipose[0], here)
    other = compare(poses, texts, with_text=here)
    np.testing.assert_array_equal(other.p2t.hits(1), here)
    np.testing.assert_array_equal(other.t2p.hits(1), here)


def test_r_precision_of_posescript_averages_the_rank_over_ten_draws():
    """Texts that are each less like their own pose than a known share of the others: the mean rank follows the hypergeometric distribution."""
    count, better = 400, 27  # of 399 others, 27 have a higher score: in 31 draws 2.1 of them are expected
    angles = np.linspace(0, np.pi / 2, count)
    poses = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    texts = np.repeat(poses[:1], count, 0)  # text i likes pose 0 most, then 1, 2 …
    found = compare(texts, poses)
    np.testing.assert_array_equal(found.t2p.before, np.arange(count))
    assert found.posescript[0, 0] == 1, "no other is better"
    draws = np.stack([compare(texts, poses, seed=seed).posescript for seed in range(100)])
    rng = np.random.default_rng(7)
    mean_ranks = rng.hypergeometric(better, count - 1 - better, GROUP - 1, (20_000, 10)).mean(-1)
    for k in (1, 2, 3):
        expected = (mean_ranks < k).mean()
        assert abs(draws[:, k - 1, better].mean() - expected) < 4 * np.sqrt(max(expected * (1 - expected), 0.002) / 100)
    assert 0.2 < draws[:, 1, better].mean() < 0.8, "a mean rank near 2 is sometimes below 2"
    assert draws[:, :, 300].max() == 0, "a mean rank near 23 never is"


def test_r_precision_of_unipose_is_recall_in_groups_of_32_and_drops_the_rest():
    rng = np.random.default_rng(3)
    poses = unit(rng, 3 * GROUP + 5, 16)
    texts = noisy(rng, poses, 0.5)
    found = compare(texts, poses, seed=4).unipose
    assert np.isfinite(found).all(0).sum() == 3 * GROUP
    order = np.random.default_rng(4).permutation(len(poses))
    assert np.isnan(found[:, order[3 * GROUP :]]).all()
    for group in order[: 3 * GROUP].reshape(3, GROUP):
        ranks = ranks_in_words(texts[group], poses[group])
        assert 0 < (ranks < 1).mean() < 1
        np.testing.assert_array_equal(found[:, group], np.stack([ranks < k for k in (1, 2, 3)]))


def test_fewer_than_32_pairs_have_recall_and_no_r_precision():
    poses = unit(np.random.default_rng(5), GROUP - 1, 8)
    found = compare(poses, poses)
    assert found.t2p.hits(1).all()
    assert np.isnan(found.posescript).all()
    assert np.isnan(found.unipose).all()
    assert compare(poses[:1], poses[:1]).t2p.hits(1).tolist() == [1]


def scipy_distance(first, second):
    """As everybody writes it."""
    cov1, cov2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = linalg.sqrtm(cov1 @ cov2)
    return ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(cov1 + cov2 - 2 * np.real(root))


def test_frechet_distance_beside_scipy():
    rng = np.random.default_rng(6)
    mix = rng.normal(size=(24, 24)) / 5
    first, second = rng.normal(size=(400, 24)) @ mix + 0.3, rng.normal(size=(300, 24)) @ mix.T
    np.testing.assert_allclose(frechet_distance(first, second), scipy_distance(first, second), rtol=1e-9)
    shifted = first + 0.5
    np.testing.assert_allclose(frechet_distance(first, shifted), 24 * 0.25, rtol=1e-9)


@pytest.mark.parametrize("count", [2, 5, 20])
def test_frechet_distance_of_fewer_samples_than_features(count):
    """The covariances are singular. Gaussians that live in planes of their own have the distance that these planes give."""
    rng = np.random.default_rng(count)
    first, second = rng.normal(size=(count, 64)).astype(np.float32), rng.normal(size=(count, 64)).astype(np.float32)
    one, two = (np.asarray(each, np.float64) for each in (first, second))
    centred = [(each - each.mean(0)) / np.sqrt(count - 1) for each in (one, two)]
    shared = np.sqrt(np.maximum(np.linalg.eigvals(centred[0] @ centred[1].T @ centred[1] @ centred[0].T).real, 0)).sum()
    expected = ((one.mean(0) - two.mean(0)) ** 2).sum() + sum((each**2).sum() for each in centred) - 2 * shared
    np.testing.assert_allclose(frechet_distance(first, second), expected, rtol=1e-6)
    assert frechet_distance(first, first) < 1e-6
    assert np.isnan(frechet_distance(first[:1], second[:1]))
