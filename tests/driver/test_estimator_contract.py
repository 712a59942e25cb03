"""ImageClusterer as scikit-learn's tools see it: its own checks, clone, Pipeline, search and set_output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import joblib
import numpy as np
import pytest
from driving import TINY_FOLDER, picture
from sklearn.base import BaseEstimator, TransformerMixin, clone, is_clusterer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, make_scorer
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks, get_tags
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import check_is_fitted, validate_data

from scan_fast import ImageClusterer
from scan_fast.runs.config import parse_override

SETTINGS = {
    **dict(parse_override(word) for word in TINY_FOLDER),
    "data.image_size": 8,
    "data.test_fraction": 0.3,
    "clustering.heads": 1,
    "clustering.view.cutout": 2,
    "selflabel": None,
}
N = 36


def clusterer(**changes: Any) -> ImageClusterer:
    return ImageClusterer(2, settings=SETTINGS, **changes)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.stack([np.asarray(picture(number, size=(8, 8))) for number in range(N)])


@pytest.fixture(scope="module")
def classes() -> np.ndarray:
    return np.arange(N) % 3


# -- scikit-learn's checks of an estimator -----------------------------------------------------------------------------

WITHOUT_DATA = (
    "check_estimator_cloneable",
    "check_estimator_tags_renamed",
    "check_valid_tag_types",
    "check_estimator_repr",
    "check_no_attributes_set_in_init",
    "check_mixin_order",
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_parameters_default_constructible",
    "check_get_params_invariance",
    "check_set_params",
    "check_estimators_unfitted",
    "check_transformers_unfitted",
)
"""Checks that hand no data to ``fit``: they apply to the estimator as it is."""


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_checks_without_data(name: str) -> None:
    check: Callable[[str, BaseEstimator], None] = getattr(estimator_checks, name)
    check("ImageClusterer", clusterer())


class ImagesOfRows(TransformerMixin, BaseEstimator):
    """Draws each row of numbers, as scikit-learn's checks make them, as an image (8, 8, 1) of stripes."""

    def fit(self, X: Any, y: Any = None) -> ImagesOfRows:
        validate_data(self, X)
        return self

    def transform(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        rows = validate_data(self, X, reset=False)
        stripes = np.resize(np.arange(rows.shape[1]), 8)
        return np.rint(128 + 120 * np.sin(rows[:, stripes, None, None])).astype(np.uint8).repeat(8, axis=2)


EXPECTED = {
    "check_dont_overwrite_parameters": "Pipeline.fit replaces its own list of steps; test_fit_changes_no_parameter",
    "check_estimators_overwrite_params": "a Pipeline's parameters are its steps; test_fit_changes_no_parameter",
    "check_fit2d_1sample": "one image cannot be grouped; the error speaks of images",
}


CHECKS = parametrize_with_checks(
    [make_pipeline(ImagesOfRows(), clusterer())],
    expected_failed_checks=lambda estimator: EXPECTED,
    xfail_strict=True,
)


def name_of(value: Any) -> str:
    """Name a test by its check alone; the estimator is the same in all."""
    if isinstance(value, Pipeline):
        return "rows"
    return "-".join([value.func.__name__, *(f"{key}={word}" for key, word in value.keywords.items())])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(*CHECKS.args, ids=name_of)
def test_checks_with_data(estimator: Pipeline, check: Callable[[BaseEstimator], None]) -> None:
    """All of scikit-learn's checks, through a Pipeline that draws their rows of numbers as images."""
    check(estimator)


def test_fit_changes_no_parameter(pixels: np.ndarray) -> None:
    model = clusterer()
    before, hashes = dict(vars(model)), {key: joblib.hash(value) for key, value in model.get_params().items()}
    model.fit(pixels)
    assert {key: joblib.hash(value) for key, value in model.get_params().items()} == hashes
    assert all(vars(model)[key] is value for key, value in before.items())
    assert all(key.endswith("_") or key.startswith("_") for key in set(vars(model)) - set(before))


def test_tags() -> None:
    tags = get_tags(clusterer())
    assert is_clusterer(clusterer())
    assert tags.estimator_type == "clusterer"
    assert tags.no_validation and not tags.non_deterministic and tags.requires_fit
    assert tags.input_tags.three_d_array and not tags.input_tags.two_d_array
    assert not tags.target_tags.required


# -- use with scikit-learn's tools -------------------------------------------------------------------------------------


def test_clone_and_parameters(pixels: np.ndarray) -> None:
    fitted = clusterer(random_state=3).fit(pixels)
    other = clone(fitted)
    assert other.get_params() == fitted.get_params()
    assert not hasattr(other, "labels_") and not hasattr(other, "predictor_")
    assert other.set_params(n_clusters=3, random_state=None) is other
    assert (other.n_clusters, other.random_state, other.settings) == (3, None, SETTINGS)
    assert (fitted.n_clusters, fitted.random_state) == (2, 3)
    assert other.fit(pixels).n_clusters_ == 3


def test_in_front_of_a_classifier(pixels: np.ndarray, classes: np.ndarray) -> None:
    model = make_pipeline(clusterer(), LogisticRegression(C=100, max_iter=1000)).fit(pixels, classes)
    # Three textures, seen by a network that has hardly learned: better than the 0.33 of chance.
    assert model.score(pixels, classes) > 0.6
    features = clusterer().fit_transform(pixels, classes)
    np.testing.assert_allclose(model[:-1].transform(pixels), features, atol=1e-6)
    np.testing.assert_array_equal(model.predict(pixels), model[-1].predict(features))


def test_as_the_last_step(pixels: np.ndarray) -> None:
    brighter = FunctionTransformer(lambda images: 255 - images)
    model = make_pipeline(brighter, clusterer())
    labels = model.fit_predict(pixels)
    np.testing.assert_array_equal(labels, clusterer().fit(255 - pixels).labels_)
    np.testing.assert_array_equal(model.predict(pixels), labels)
    assert model.transform(pixels).shape == (N, model[-1].predictor_.model.out_features)


def test_search_over_parameters(pixels: np.ndarray, classes: np.ndarray) -> None:
    scorer = make_scorer(adjusted_rand_score)
    search = GridSearchCV(clusterer(), {"n_clusters": np.arange(2, 4)}, cv=2, scoring=scorer, error_score="raise")
    search.fit(pixels, classes)
    assert search.best_estimator_.n_clusters_ == search.best_params_["n_clusters"]
    np.testing.assert_array_equal(search.predict(pixels), search.best_estimator_.labels_)
    labels = cross_val_predict(clusterer(), [picture(number, size=(8, 8)) for number in range(N)], cv=2)
    assert labels.shape == (N,) and set(labels) <= {0, 1}


def test_names_of_features(pixels: np.ndarray) -> None:
    model = clusterer().fit(pixels)
    names = model.get_feature_names_out()
    assert names[0] == "imageclusterer0" and len(names) == model.transform(pixels).shape[1]
