"""A kernel machine over pairs of user and ad that scores every ad with one matrix product.

The Gaussian kernel of (user, ad) pairs is approximated by cosines and sines of s projections w'u + v'a. By the
addition theorems those are products of a part of the user and a part of the ad: a logistic regression on 2s features
of the pair is, for one user, a dot product of 2s numbers that were computed once for each ad. So it can sit where a
dot product sits, in the early stage, and see interactions that a linear model of the same columns cannot.

python examples/kernel_early_stage.py [IMPRESSIONS]
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
from sklearn.metrics import roc_auc_score

from fullrank.data.simulate import simulate_dataset
from fullrank.randomized import QMCFeatures, SubsampledNewtonClassifier

impressions = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
USER, ITEM = ["age_group", "gender"], ["category", "price", "click_rate"]

with tempfile.TemporaryDirectory() as folder:
    dataset = simulate_dataset(Path(folder) / "log", impressions, seed=1)
    train, test = (
        dataset.scan(part).select("item_id", *USER, "category", "price", "click").collect()
        for part in ("train", "test")
    )

# An ad's click rate in the training log, drawn towards the mean where it was shown rarely.
base = float(train["click"].mean() or 0.0)
rates = train.group_by("item_id").agg(((pl.col("click").sum() + 20 * base) / (pl.len() + 20)).alias("click_rate"))
train, test = (
    part.join(rates, "item_id", how="left").with_columns(pl.col("click_rate").fill_null(base)) for part in (train, test)
)


def columns(frame: pl.DataFrame, names: list[str]) -> np.ndarray:
    """Numbers as deviations from the training mean, ids as indicators."""
    parts = []
    for name in names:
        values = frame[name].to_numpy()
        if name in ("price", "click_rate"):
            known = train[name].to_numpy()
            parts.append(((values - known.mean()) / known.std())[:, None])
        else:
            parts.append((values[:, None] == np.sort(train[name].unique().to_numpy())).astype(float))
    return np.hstack(parts)


pairs, test_pairs = (np.hstack([columns(part, USER), columns(part, ITEM)]) for part in (train, test))
labels, test_labels = train["click"].to_numpy(), test["click"].to_numpy()
linear = SubsampledNewtonClassifier(C=1.0, random_state=0).fit(pairs, labels)
features = QMCFeatures(gamma=0.25, n_components=512, random_state=0).fit(pairs)
kernel = SubsampledNewtonClassifier(C=1.0, random_state=0).fit(features.transform(pairs), labels)
logits = kernel.decision_function(features.transform(test_pairs))

# Once for each ad: its features. Once for each request: the weights, turned by the user's phases.
ads = train.select("item_id", *ITEM).unique("item_id")
width = columns(train[:1], USER).shape[1]
of_user, of_ad = features.frequencies_[:width], features.frequencies_[width:]
s = of_ad.shape[1]
ad_phases = columns(ads, ITEM) @ of_ad
ad_vectors = np.hstack([np.cos(ad_phases), np.sin(ad_phases)])


def user_vector(user_columns: np.ndarray) -> np.ndarray:
    phase = user_columns @ of_user
    cosine, sine = np.split(kernel.coef_[0], 2)
    return (
        np.hstack([cosine * np.cos(phase) + sine * np.sin(phase), sine * np.cos(phase) - cosine * np.sin(phase)])
        / s**0.5
    )


user = columns(test[:1], USER)[0]
begin = time.perf_counter()
scores = ad_vectors @ user_vector(user) + kernel.intercept_
seconds = time.perf_counter() - begin
by_pairs = kernel.decision_function(features.transform(np.hstack([np.tile(user, (len(ads), 1)), columns(ads, ITEM)])))

auc = roc_auc_score(test_labels, logits)
linear_auc = roc_auc_score(test_labels, linear.decision_function(test_pairs))
print(f"test AUC {auc:.4f} with kernel features, {linear_auc:.4f} linear in the same columns")
print(f"{len(ads)} ads scored in {1e3 * seconds:.2f} ms, as pair by pair to {abs(scores - by_pairs).max():.0e}")
