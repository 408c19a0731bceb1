"""The adapter for pytorch-ood, and our detectors against theirs on the same bank.

Where two definitions agree, scores are equal up to the sign that the adapter turns and a stated factor. Where they do not,
theirs is written as a plain formula here, so that the difference is one that can be read.
"""

import json
import sys

import numpy as np
import pytest
import torch
from detector_examples import LargestArray, cast, make_bank, random_problem, rows_of, split
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import spearmanr
from torch import nn

from ood_helpers.banks import FeatureBank
from ood_helpers.detectors import create, variants
from ood_helpers.detectors.energy import energy_score
from ood_helpers.detectors.pytorch_ood import PyTorchOOD
from ood_helpers.errors import InputError
from ood_helpers.metrics import evaluate

pytest.importorskip("pytorch_ood", reason="pytorch-ood is not installed")

CLASSES, DIMENSION, TRAIN = 10, 60, 900

ARGUMENTS = {
    "ASH": {"variant": "ash-s", "percentile": 0.7},
    "DICE": {"p": 0.7},
    "EnergyBased": {"t": 2.0},
    "Entropy": {},
    "GEN": {"gamma": 0.1, "M": 5},
    "GMM": {"reg": 0.1},
    "KLMatching": {},
    "KNN": {"k": 7},
    "LTS": {},
    "MCM": {"text_embeddings": np.eye(CLASSES, DIMENSION).tolist()},
    "Mahalanobis": {},
    "MaxLogit": {},
    "MaxSoftmax": {},
    "NCI": {"alpha": 0.1},
    "NNGuide": {},
    "OpenMax": {},
    "PNML": {},
    "RMD": {},
    "ReAct": {"percentile": 0.9},
    "SCALE": {},
    "SHE": {},
    "TemperatureScaling": {},
    "VRA": {},
    "ViM": {"d": 20},
    "WeightedEBO": {"weights": [1.0] * CLASSES},
    "fDBD": {},
}

every_class = pytest.mark.parametrize("name", ARGUMENTS)


@pytest.fixture(scope="module")
def problem():
    """(training bank, head, bank) in float32, as banks on disk are; most training images are classified correctly."""
    train, head, bank = random_problem(CLASSES, DIMENSION, 200, train=TRAIN)
    labels = train.logits.argmax(1)
    labels[::5] = (torch.arange(TRAIN) // 5 % CLASSES)[::5]
    train = FeatureBank(train.features, train.logits, labels)
    return cast(train, torch.float32), head.to(torch.float32), cast(bank, torch.float32)


def scores(problem, name, **arguments):
    train, head, bank = problem
    return create(name, **arguments).fit(train, head).score_samples(bank).double()


# ---- the adapter ----------------------------------------------------------------------------------------


@every_class
def test_every_class_on_logits_or_features_is_a_row(name, problem):
    row = f"pytorch_ood.{name}"
    detector = rows_of({row: ARGUMENTS[name]})[row].detector
    train, head, bank = problem
    found = detector.fit(train, head).score_samples(bank)
    assert detector.label == f"{name} (pytorch-ood)"
    assert found.shape == (200,) and found.isfinite().all() and len(found.unique()) > 150
    assert not found.requires_grad


def test_the_classes_above_are_all_that_can_be_used():
    with pytest.raises(InputError) as error:
        create("pytorch_ood.Gram")
    assert str(error.value).split("banks hold: ")[1] == ", ".join(sorted(ARGUMENTS)) + "."


@every_class
def test_shards_and_the_whole_bank_give_the_same_scores(name, problem, monkeypatch):
    """Also in chunks of one sample."""
    train, head, bank = problem
    expected = scores(problem, f"pytorch_ood.{name}", **ARGUMENTS[name])
    detector = create(f"pytorch_ood.{name}", **ARGUMENTS[name])
    detector.fit(split(train, 1, 500, 399), head)
    monkeypatch.setattr("ood_helpers.detectors.pytorch_ood.CHUNK", 1)
    assert_allclose(detector.score_samples(split(bank, 1, 150, 49)), expected, rtol=1e-4, atol=2e-5)


def test_chunks_bound_the_memory(problem, monkeypatch):
    """Their DICE makes an array [chunk, C, D]; ours is the choice of how many samples it gets at once."""
    train, head, bank = problem
    detector = create("pytorch_ood.DICE", p=0.5).fit(train, head)
    with LargestArray() as unbounded:
        expected = detector.score_samples(bank)
    assert unbounded.elements == len(bank) * CLASSES * DIMENSION
    monkeypatch.setattr("ood_helpers.detectors.pytorch_ood.CHUNK", 64 * CLASSES * DIMENSION)
    with LargestArray() as bounded:
        assert_allclose(detector.score_samples(bank), expected, rtol=1e-5, atol=1e-5)
    assert bounded.elements == 64 * CLASSES * DIMENSION


def test_another_row_name(problem):
    rows = rows_of(
        {
            "pytorch_ood.KNN": {"k": 50},
            "knn_small": {"detector": "pytorch_ood.KNN", "k": 5, "label": "KNN, k = 5 (pytorch-ood)"},
        }
    )
    assert [row.label for row in rows.values()] == ["KNN (pytorch-ood)", "KNN, k = 5 (pytorch-ood)"]
    assert rows["knn_small"].detector == PyTorchOOD("KNN", {"k": 5})


def test_hyperparameters_tell_class_version_and_arguments():
    """Two classes with the same arguments and label must not share stored scores, nor two versions."""
    import pytorch_ood

    found = create("pytorch_ood.ViM", d=20).hyperparameters()
    assert found == {"detector": "pytorch_ood.ViM", "version": pytorch_ood.__version__, "d": 20}
    assert json.loads(json.dumps(found)) == found


def test_the_source_is_their_citation():
    assert create("pytorch_ood.ViM", d=2).source.endswith("Virtual-logit Matching, CVPR 2022")
    assert create("pytorch_ood.GMM").source == ""


def test_an_argument_changed_after_fit_changes_the_score_at_once(problem):
    train, head, bank = problem
    detector = create("pytorch_ood.KNN", k=5).fit(train, head)
    before = detector.score_samples(bank)
    for settings, variant in variants(detector, {"k": [20, 40]}):
        assert_allclose(
            variant.score_samples(bank), scores(problem, "pytorch_ood.KNN", **settings), rtol=1e-5
        )
    assert_allclose(detector.score_samples(bank), before, rtol=1e-5)
    detector.class_name, detector.arguments = "Mahalanobis", {}
    assert_allclose(detector.score_samples(bank), scores(problem, "pytorch_ood.Mahalanobis"), rtol=1e-5)
    with pytest.raises(InputError, match="no argument 'k'"):
        variants(detector, {"k": [5]})


def test_temperature_scaling_can_be_fitted_again_while_scoring(problem):
    """Scoring is without gradients, which its fit needs."""
    train, head, bank = problem
    detector = create("pytorch_ood.MaxLogit").fit(train, head)
    detector.class_name = "TemperatureScaling"
    assert_allclose(
        detector.score_samples(bank), scores(problem, "pytorch_ood.TemperatureScaling"), rtol=1e-5
    )


def test_a_given_react_threshold_is_not_replaced_by_the_fit(problem):
    found = scores(problem, "pytorch_ood.ReAct", threshold=0.5)
    assert_allclose(found, scores(problem, "react", clip=0.5), rtol=2e-5, atol=2e-5)
    assert (found - scores(problem, "pytorch_ood.ReAct")).abs().max() > 0.1


def test_the_random_state_and_the_bank_stay_as_they_were(problem):
    train, head, bank = problem
    state, copies = torch.get_rng_state(), [t.clone() for t in (train.features, bank.features, head.weight)]
    for name in ("NCI", "ReAct", "TemperatureScaling"):
        create(f"pytorch_ood.{name}").fit(train, head).score_samples(bank)
    assert_array_equal(torch.get_rng_state(), state)
    for tensor, copy in zip((train.features, bank.features, head.weight), copies, strict=True):
        assert_array_equal(tensor, copy)


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("KN", {}, "There is no detector 'KN' in pytorch-ood; did you mean 'KNN'?"),
        ("gen", {}, "did you mean 'GEN'?"),
        ("odin_preprocessing", {}, "There is no detector 'odin_preprocessing'"),
        ("ODIN", {}, "needs images, feature maps or gradients of the network"),
        ("GradNorm", {}, "needs images, feature maps or gradients"),
        ("RankFeat", {}, "needs images, feature maps or gradients"),
        ("GEN", {"gama": 0.1}, "GEN (pytorch-ood) has no argument 'gama'; did you mean 'gamma'?"),
        ("Mahalanobis", {"k": 1}, "has no argument 'k'; it has none."),
        (
            "KNN",
            {"neighbours": 5},
            "'neighbours') with arguments {'neighbours': 5}; its own arguments are: k, normalize.",
        ),
        ("KNN", {"encoder": None}, "has no argument 'encoder'"),
        ("ViM", {"d": 3, "w": [[1.0]]}, "has no argument 'w'"),
        ("ViM", {}, "ViM (pytorch-ood): d not given"),
        ("DICE", {"p": 70}, "p must be a fraction in [0, 1], got 70"),
        ("ASH", {"variant": "ash-x"}, "construction failed in pytorch-ood (AssertionError)"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(name, arguments, sentence):
    with pytest.raises(InputError) as error:
        rows_of({"row": {"detector": f"pytorch_ood.{name}", **arguments}})
    assert str(error.value).startswith("detectors.row: ") and sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_function_cannot_be_an_argument():
    with pytest.raises(InputError, match="has no argument 'detector'"):
        create("pytorch_ood.ReAct", detector=energy_score)


def test_without_pytorch_ood_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_ood", None)
    with pytest.raises(InputError, match=r"needs the library pytorch-ood.*pip install 'pytorch-ood>=0\.4'"):
        create("pytorch_ood.KNN")


def test_errors_inside_theirs_name_the_method(problem):
    train, head, bank = problem
    with pytest.raises(
        InputError, match=r"KNN \(pytorch-ood\): fitting failed .*k=901 exceeds.*\{'k': 901\}"
    ):
        create("pytorch_ood.KNN", k=901).fit(train, head)
    with pytest.raises(InputError, match=r"KNN \(pytorch-ood\): scoring failed .*n_neighbors"):
        create("pytorch_ood.KNN", k=0).fit(train, head).score_samples(bank)


def test_training_labels_are_needed_only_to_fit(problem):
    train, head, bank = problem
    unlabelled = FeatureBank(train.features, train.logits)
    with pytest.raises(InputError, match=r"KNN \(pytorch-ood\): the training bank has no labels"):
        create("pytorch_ood.KNN").fit(unlabelled, head)
    found = create("pytorch_ood.MaxLogit").fit(unlabelled, head).score_samples(bank)
    assert_array_equal(found, bank.logits.amax(1))


def test_nan_and_not_fitted_are_named(problem):
    train, head, bank = problem
    with pytest.raises(InputError, match=r"KNN \(pytorch-ood\) is not fitted"):
        create("pytorch_ood.KNN").score_samples(bank)
    features = train.features.clone()
    features[3, 1] = torch.nan
    with pytest.raises(InputError, match=r"NaN or infinite training features \(first: sample 3\)"):
        create("pytorch_ood.KNN").fit(FeatureBank(features, train.logits, train.labels), head)


def test_openmax_alone_scores_as_in_company(problem):
    """Theirs does not: the distance to a class that nothing in the batch is predicted as counts as 0 there."""
    from pytorch_ood.detector import OpenMax

    train, head, bank = problem
    detector = create("pytorch_ood.OpenMax").fit(train, head)
    first = FeatureBank(bank.features[:1], bank.logits[:1])
    assert_allclose(detector.score_samples(first), detector.score_samples(bank)[:1], rtol=1e-5)
    theirs = OpenMax(None).fit_logits(train.logits, train.labels)
    together, alone = theirs.predict_logits(bank.logits)[:1], theirs.predict_logits(bank.logits[:1])
    assert_allclose(-together, detector.score_samples(first), rtol=1e-5)
    assert (alone - together).abs() > 0.01


# ---- ours and theirs: the same definition ---------------------------------------------------------------

EQUAL = [
    ("energy", {}, "EnergyBased", {}),
    ("energy", {"temperature": 2.5}, "EnergyBased", {"t": 2.5}),
    ("msp", {}, "MaxSoftmax", {}),
    ("max_logit", {}, "MaxLogit", {}),
    ("react", {"percentile": 80}, "ReAct", {"percentile": 0.8}),
    ("dice", {"percentile": 70}, "DICE", {"p": 0.7}),
    ("knn", {"k": 7}, "KNN", {"k": 7}),
    ("vim", {"dimension": 20}, "ViM", {"d": 20}),
    ("ash", {"variant": "s", "percentile": 65}, "ASH", {"variant": "ash-s", "percentile": 0.65}),
    ("ash", {"variant": "p", "percentile": 80}, "ASH", {"variant": "ash-p", "percentile": 0.8}),
    ("ash", {"variant": "b", "percentile": 80}, "ASH", {"variant": "ash-b", "percentile": 0.8}),
    ("scale", {"percentile": 85}, "SCALE", {"percentile": 0.85}),
]


@pytest.mark.parametrize(("ours", "settings", "theirs", "arguments"), EQUAL)
def test_equal_definitions_give_equal_scores(ours, settings, theirs, arguments, problem):
    expected = scores(problem, ours, **settings)
    assert_allclose(scores(problem, f"pytorch_ood.{theirs}", **arguments), expected, rtol=2e-5, atol=2e-5)


# ---- ours and theirs: what differs ----------------------------------------------------------------------


def test_msp_theirs_ties_confident_samples(problem):
    """Their float32 softmax is 1, but for rounding, from a margin of about 17 on; ours is float64."""
    train, head, _ = problem
    logits = torch.zeros(4, CLASSES)
    logits[:, 0] = torch.tensor([20.0, 22, 25, 30])
    bank = FeatureBank(torch.zeros(4, DIMENSION), logits)
    ours = create("msp").fit(train, head).score_samples(bank)
    theirs = create("pytorch_ood.MaxSoftmax").fit(train, head).score_samples(bank)
    assert (ours.diff() > 0).all()
    assert_allclose(theirs, 1, rtol=0, atol=2 * torch.finfo(torch.float32).eps)


def test_mahalanobis_theirs_is_ours_over_the_number_of_training_images(problem):
    """They sum the outer products where we average; the ranking is the same."""
    assert_allclose(
        TRAIN * scores(problem, "pytorch_ood.Mahalanobis"), scores(problem, "mahalanobis"), rtol=1e-3
    )


def test_mahalanobis_a_direction_without_variance_counts_only_in_theirs(problem):
    """A feature that is 0 on all training images: their 1e-6 on the diagonal of the scatter matrix, written out here,
    makes it weigh 10^6; the pseudo-inverse of ours leaves it out."""
    train, head, bank = (cast(problem[0], torch.float64), problem[1].to(torch.float64), problem[2])
    train.features[:, 0] = 0
    means = torch.stack([train.features[train.labels == c].mean(0) for c in range(CLASSES)])
    residuals = train.features - means[train.labels]
    precision = torch.linalg.inv(residuals.T @ residuals + 1e-6 * torch.eye(DIMENSION, dtype=torch.float64))
    off = bank.features.double()[:, None] - means
    expected = -0.5 * torch.einsum("ncd,de,nce->nc", off, precision, off).amin(1)
    train = make_bank(train.features, head, train.labels)
    theirs = create("pytorch_ood.Mahalanobis").fit(train, head).score_samples(bank)
    assert_allclose(theirs, expected, rtol=1e-3)
    assert_allclose(theirs, -0.5e6 * bank.features[:, 0].square(), rtol=1e-3, atol=1)
    ours = create("mahalanobis").fit(train, head).score_samples(bank)
    assert abs(spearmanr(ours, theirs).statistic) < 0.3


def kl_to_nearest(p, templates):
    """min_k sum_c p_c log(p_c / d_kc) of p [N, C] and d [K, C]."""
    return torch.stack([(p * (p / d).log()).sum(1) for d in templates]).amin(0)


def test_kl_matching_theirs_has_templates_of_predicted_classes(problem):
    """Ours has those of labelled ones. The images that are classified wrongly, a fifth here, make the difference."""
    train, head, bank = problem
    p, train_p = bank.logits.double().softmax(1), train.logits.double().softmax(1)
    predicted = train.logits.argmax(1)
    assert 0.7 < (predicted == train.labels).double().mean() < 0.9
    theirs, ours = scores(problem, "pytorch_ood.KLMatching"), scores(problem, "kl_matching")
    for found, classes in ((theirs, predicted), (ours, train.labels)):
        templates = [train_p[classes == k].mean(0) for k in range(CLASSES)]
        assert_allclose(-found, kl_to_nearest(p, templates), rtol=1e-4, atol=1e-6)
    assert (theirs - ours).abs().max() > 0.01
    as_predicted = (FeatureBank(train.features, train.logits, predicted), head, bank)
    assert_allclose(scores(as_predicted, "kl_matching"), theirs, rtol=1e-4, atol=1e-6)


def test_kl_matching_theirs_goes_without_a_class_that_is_never_predicted(problem):
    """Ours wants images of every class, and asks for no prediction."""
    train, head, bank = problem
    rare = train.logits.argmax(1) != 3
    smaller = FeatureBank(train.features[rare], train.logits[rare], train.labels[rare])
    train_p, predicted = smaller.logits.double().softmax(1), smaller.logits.argmax(1)
    templates = [train_p[predicted == k].mean(0) for k in range(CLASSES) if k != 3]
    theirs = create("pytorch_ood.KLMatching").fit(smaller, head).score_samples(bank)
    assert_allclose(-theirs, kl_to_nearest(bank.logits.double().softmax(1), templates), rtol=1e-4, atol=1e-6)
    assert (smaller.labels == 3).any()
    assert create("kl_matching").fit(smaller, head).templates_.shape == (CLASSES, CLASSES)


@pytest.mark.parametrize("top", [4, CLASSES])
def test_gen_theirs_averages_where_ours_sums(top, problem):
    """Ours is M times theirs: the same ranking, as long as no probability is below 1e-7."""
    assert problem[2].logits.softmax(1).amin() > 1e-7
    theirs = scores(problem, "pytorch_ood.GEN", gamma=0.1, M=top)
    assert_allclose(top * theirs, scores(problem, "gen", gamma=0.1, top=top), rtol=1e-5)


def test_gen_theirs_ties_confident_samples(problem):
    """They clamp probabilities to [1e-7, 1 - 1e-7]; ours tells the samples apart."""
    train, head, _ = problem
    logits = torch.zeros(3, CLASSES)
    logits[:, 0] = torch.tensor([20.0, 25, 30])
    bank = FeatureBank(torch.zeros(3, DIMENSION), logits)
    theirs = create("pytorch_ood.GEN").fit(train, head).score_samples(bank)
    p = logits.softmax(1).clamp(1e-7, 1 - 1e-7)
    assert_allclose(theirs, -(p * (1 - p)).pow(0.1).mean(1), rtol=1e-6)
    assert theirs.max() - theirs.min() < 1e-5  # the same but for the last digits
    assert (create("gen").fit(train, head).score_samples(bank).diff() > 0.01).all()


@pytest.mark.parametrize("dimension", [DIMENSION, DIMENSION + 1])
def test_vim_theirs_has_other_rules_for_a_space_without_residual(dimension, problem):
    """For d = D they divide by a residual of 0, and for d > D they quietly take D // 2; ours refuses both."""
    if dimension > DIMENSION:
        found = scores(problem, "pytorch_ood.ViM", d=dimension)
        assert_allclose(found, scores(problem, "vim", dimension=DIMENSION // 2), rtol=1e-3, atol=1e-3)
    else:
        with pytest.raises(InputError, match=r"ViM \(pytorch-ood\): 200 of .* NaN or infinite scores"):
            scores(problem, "pytorch_ood.ViM", d=dimension)
    with pytest.raises(InputError, match=f"dimension is {dimension}, expected less than the 60 features"):
        scores(problem, "vim", dimension=dimension)


@pytest.mark.parametrize(("ours", "theirs"), [("ash", "ASH"), ("scale", "SCALE")])
def test_ash_and_scale_theirs_divide_by_zero_for_a_feature_of_zeros(ours, theirs, problem):
    """Ours leaves it zero, so that its logits are the biases."""
    train, head, _ = problem
    bank = make_bank(torch.zeros(1, DIMENSION), head)
    with pytest.raises(InputError, match="NaN or infinite scores"):
        create(f"pytorch_ood.{theirs}").fit(train, head).score_samples(bank)
    found = create(ours).fit(train, head).score_samples(bank)
    assert_allclose(found, energy_score(head.bias[None].double()), rtol=1e-6)


def test_ash_theirs_keeps_nothing_at_percentile_100(problem):
    """Ours keeps at least one entry."""
    _, head, bank = problem
    theirs = scores(problem, "pytorch_ood.ASH", variant="ash-p", percentile=1.0)
    assert_allclose(theirs, float(energy_score(head.bias[None].double())), rtol=1e-5)
    largest = torch.where(bank.features == bank.features.amax(1, keepdim=True), bank.features, 0)
    expected = energy_score(head.logits(largest))
    assert_allclose(scores(problem, "ash", variant="p", percentile=100), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradnorm_theirs_needs_the_network_where_ours_is_a_formula(temperature, problem):
    """Theirs takes no features. With the head alone as their network, of which only the weight counts, it is ours."""
    from pytorch_ood.detector import GradNorm

    _, head, bank = problem
    linear = nn.Linear(DIMENSION, CLASSES)
    linear.weight, linear.bias = nn.Parameter(head.weight), nn.Parameter(head.bias)
    theirs = GradNorm(linear, param_filter=lambda name: name == "weight", temperature=temperature)
    ours = scores(problem, "gradnorm", temperature=temperature)
    assert_allclose(-theirs.predict(bank.features), ours, rtol=1e-5)


def test_gradnorm_theirs_counts_every_parameter_by_default(problem):
    """With the head alone as the network that adds the gradient by the bias, sum_c |p_c - 1 / C|."""
    from pytorch_ood.detector import GradNorm

    _, head, bank = problem
    linear = nn.Linear(DIMENSION, CLASSES)
    linear.weight, linear.bias = nn.Parameter(head.weight), nn.Parameter(head.bias)
    of_the_bias = (bank.logits.double().softmax(1) - 1 / CLASSES).abs().sum(1)
    ours = scores(problem, "gradnorm")
    assert_allclose(-GradNorm(linear).predict(bank.features), ours + of_the_bias, rtol=1e-5)


def test_fpr_theirs_takes_ood_as_the_positive_class():
    """Theirs: ID samples rejected when 95 % of the OOD ones are found. Ours: OOD samples accepted when 95 % of the ID
    ones are. `fpr95_ood_positive` is theirs; AUROC is the same either way."""
    from pytorch_ood.metrics import functional

    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(400, generator=generator) + 1
    outside = 3 * torch.randn(300, generator=generator) - 1
    outlier_scores, labels = -torch.cat([inside, outside]), torch.cat([torch.zeros(400), -torch.ones(300)])
    theirs, ours = functional.fpr_at_tpr(outlier_scores, labels), evaluate(inside, outside)
    accepted_at_most = outside.sort().values[284]  # 285 of 300 are at or below
    assert float(theirs) == pytest.approx(float((inside <= accepted_at_most).double().mean()))
    assert 100 * float(theirs) == pytest.approx(ours["fpr95_ood_positive"])
    assert 100 * float(functional.auroc(outlier_scores, labels)) == pytest.approx(ours["auroc"])
    assert abs(ours["fpr95"] - ours["fpr95_ood_positive"]) > 5
