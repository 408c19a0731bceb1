"""What holds for every detector, and the registry."""

import json
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from detector_examples import (
    AnyNetwork,
    LargestArray,
    cast,
    make_bank,
    random_problem,
    rows_of,
    split,
    spread,
)
from numpy.testing import assert_allclose, assert_array_equal

from ood_helpers.banks import DeviceBank, FeatureBank, Head
from ood_helpers.detectors import DETECTORS, Detector, create, variants
from ood_helpers.detectors.dice import DICE, DICEReAct
from ood_helpers.detectors.energy import Energy
from ood_helpers.detectors.himplos import HIMPLoS
from ood_helpers.detectors.line import LINe
from ood_helpers.detectors.msp import MSP
from ood_helpers.detectors.react import ReAct
from ood_helpers.detectors.vim import ViM
from ood_helpers.errors import InputError
from ood_helpers.rows import make_row

SMALL = {"knn": {"k": 2}}  # hyper-parameters that fit a training bank of three images


def make(name, **hyperparameters):
    """A detector for the small banks of these tests."""
    return create(name, **{**SMALL.get(name, {}), **hyperparameters})


def on_banks(detector):
    """Whether a bank and a flat head are all that it needs: no images, no network beside the backbone."""
    return not (detector.needs_images or detector.needs_validation or detector.default_network)


ON_BANKS = [name for name in DETECTORS if on_banks(make(name))]
every_detector = pytest.mark.parametrize("name", ON_BANKS)


@every_detector
def test_shards_and_the_whole_bank_give_the_same_scores(name):
    train, head, bank = random_problem(7, 30, 41)
    expected = make(name).fit(train, head).score_samples(bank)
    assert expected.shape == (41,)
    scores = make(name).fit(split(train, 1, 20, 14), head).score_samples(split(bank, 1, 30, 10))
    assert_allclose(scores, expected, atol=1e-12)


@every_detector
def test_float32_agrees_with_float64(name):
    train, head, bank = random_problem(10, 342, 200, train=700)
    expected = make(name).fit(train, head).score_samples(bank)
    single = make(name).fit(cast(train, torch.float32), head.to(torch.float32))
    scores = single.score_samples(cast(bank, torch.float32))
    assert scores.dtype == expected.dtype == torch.float64
    assert_allclose(scores, expected, rtol=2e-5, atol=2e-5)


CHANGES = {
    "energy": {"temperature": 2.0},
    "gen": {"gamma": 0.5, "top": 2},
    "gradnorm": {"temperature": 3.0},
    "knn": {"k": 9},
    "vim": {"dimension": 7},
    "react": {"percentile": 60.0},
    "dice": {"percentile": 50.0},
    "dice_react": {"percentile": 50.0, "clip": 0.5},
    "ash": {"variant": "p", "percentile": 50.0},
    "scale": {"percentile": 50.0},
    "himplos": {"percentile": 20.0, "clip": 0.5, "masking": False, "smoothing": False, "temperature": 3.0},
    "line": {"delta": 0.5, "activation_percentile": 30.0, "weight_percentile": 40.0},
}


@pytest.mark.parametrize(
    ("name", "field", "value"), [(n, f, v) for n, c in CHANGES.items() for f, v in c.items()]
)
def test_a_field_changed_after_fit_changes_the_score_at_once(name, field, value):
    train, head, bank = random_problem(7, 30, 20, train=70)
    detector = make(name).fit(train, head)
    before = detector.score_samples(bank)
    original = getattr(detector, field)
    setattr(detector, field, value)
    fresh = make(name, **{field: value}).fit(train, head).score_samples(bank)
    assert_allclose(detector.score_samples(bank), fresh, atol=0)
    assert (fresh - before).abs().max() > 1e-3
    setattr(detector, field, original)
    assert_allclose(detector.score_samples(bank), before, atol=0)


def test_every_hyperparameter_is_in_the_test_above():
    elsewhere = {"react": {"clip"}, "kl_matching": {"templates"}}
    for name in ON_BANKS:
        tested = {*CHANGES.get(name, ()), *elsewhere.get(name, ())}
        assert tested == set(make(name).hyperparameters()), f"CHANGES has to change all of {name}"


@every_detector
def test_fitting_again_forgets_the_first_fit(name):
    train, head, bank = random_problem(7, 30, 20, seed=1)
    other_train, other_head, other_bank = random_problem(5, 12, 9, seed=2)
    detector = make(name).fit(train, head)
    detector.score_samples(bank)
    expected = make(name).fit(other_train, other_head).score_samples(other_bank)
    assert_allclose(detector.fit(other_train, other_head).score_samples(other_bank), expected, atol=0)


@every_detector
def test_nan_and_infinite_input_is_named(name, train_bank, head, bank):
    detector = make(name).fit(spread(train_bank, head), head)
    features = torch.cat([bank.features, bank.features])
    features[5, 1], features[6] = torch.nan, torch.inf
    bad = FeatureBank(features, torch.cat([bank.logits, bank.logits]))
    message = (
        rf"{re.escape(detector.title)}: 2 of samples 3 to 7 have NaN or infinite features \(first: sample 5\)"
    )
    with pytest.raises(InputError, match=message):
        detector.score_samples(split(bad, 3, 5))
    with pytest.raises(
        InputError, match=r"1 of samples 0 to 3 have NaN or infinite logits \(first: sample 3\)"
    ):
        logits = bank.logits.clone()
        logits[3, 0] = torch.nan
        detector.score_samples(FeatureBank(bank.features, logits))


def test_features_whose_sum_overflows_are_finite(head, train_bank):
    """The fast check adds the features up; float32 overflow there must not be taken for infinite features."""
    features = torch.full((4, 4), 2e38)
    bank = FeatureBank(features, torch.zeros(4, 3))
    assert create("max_logit").fit(train_bank, head).score_samples(bank).tolist() == [0, 0, 0, 0]


def test_infinite_scores_are_an_error(train_bank, head, bank):
    class Unbounded(Detector):
        title = "Unbounded"

        def _score(self, shard):
            return shard.logits[:, 0] / 0

    with pytest.raises(InputError, match="Unbounded: 4 of samples 0 to 3 have NaN or infinite scores"):
        Unbounded().fit(train_bank, head).score_samples(bank)


@pytest.mark.parametrize(
    "name", ["react", "dice", "dice_react", "knn", "vim", "himplos", "line", "mahalanobis"]
)
def test_nan_in_the_training_features_is_named(name, train_bank, head):
    train_bank.features[1, 2] = torch.nan
    with pytest.raises(InputError, match=r"NaN or infinite training features \(first: sample 1\)"):
        make(name).fit(train_bank, head)


@every_detector
def test_not_fitted(name, bank):
    detector = make(name)
    with pytest.raises(InputError, match=f"{re.escape(detector.title)} is not fitted"):
        detector.score_samples(bank)
    with pytest.raises(InputError, match="is not fitted"):
        detector.predict(bank, 0.0)


def test_helpers_of_an_unfitted_detector(bank):
    for call in (
        HIMPLoS().mask,
        LINe().activation_mask,
        DICE().mask,
        DICEReAct().mask,
        ViM().alpha,
        ReAct().clip_value,
    ):
        with pytest.raises(InputError, match="is not fitted"):
            call()
    with pytest.raises(InputError, match="is not fitted"):
        LINe().pruned_logits(bank)
    with pytest.raises(InputError, match="is not fitted"):
        ViM().residual_norms(bank)


@every_detector
def test_sizes_that_do_not_match(name, train_bank, head, bank):
    train_bank = spread(train_bank, head)
    narrow = FeatureBank(bank.features[:, :3], bank.logits)
    with pytest.raises(InputError, match="3 features and 3 logits per sample, the head 4 and 3"):
        make(name).fit(train_bank, head).score_samples(narrow)
    with pytest.raises(InputError, match="4 features and 2 logits"):
        make(name).fit(train_bank, head).score_samples(FeatureBank(bank.features, bank.logits[:, :2]))
    with pytest.raises(InputError, match="the head 4 and 2"):
        make(name).fit(train_bank, Head(head.weight[:2], head.bias[:2]))


@pytest.mark.parametrize("name", ["kl_matching", "himplos", "line", "mahalanobis"])
def test_class_means_need_images_of_every_class(name, train_bank, head):
    labels = torch.tensor([0, 0, 2])
    with pytest.raises(
        InputError, match="no training image of class 1, expected at least one of each of the 3 classes"
    ):
        make(name).fit(FeatureBank(train_bank.features, train_bank.logits, labels), head)
    with pytest.raises(InputError, match="no labels"):
        make(name).fit(FeatureBank(train_bank.features, train_bank.logits), head)


def test_an_empty_training_bank(head):
    empty = FeatureBank(torch.zeros(0, 4), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(InputError, match="training bank has no samples"):
        DICE().fit(empty, head)


@pytest.mark.parametrize(
    ("name", "field", "value", "expected"),
    [
        ("energy", "temperature", 0, "a number above 0"),
        ("energy", "temperature", float("nan"), "a number above 0"),
        ("react", "percentile", 101, "a number from 0 to 100 or None"),
        ("react", "clip", -1.0, "a number above 0 or None"),
        ("dice", "percentile", "90", "a number from 0 to 100"),
        ("dice", "percentile", None, "a number from 0 to 100"),
        ("dice_react", "percentile", -1, "a number from 0 to 100"),
        ("dice_react", "clip", 0.0, "a number above 0"),
        ("ash", "percentile", 100.5, "a number from 0 to 100"),
        ("scale", "percentile", -5, "a number from 0 to 100"),
        ("gradnorm", "temperature", 0, "a number above 0"),
        ("gen", "gamma", 0, "a number above 0"),
        ("gen", "top", 0, "a whole number from 1 or None"),
        ("knn", "k", 0, "a whole number from 1"),
        ("knn", "k", 2.0, "a whole number from 1"),
        ("knn", "k", True, "a whole number from 1"),
        ("vim", "dimension", 0, "a whole number from 1 or None"),
        ("himplos", "percentile", -0.1, "a number from 0 to 100"),
        ("himplos", "clip", 0, "a number above 0 or None"),
        ("himplos", "masking", "yes", "True or False"),
        ("himplos", "smoothing", 1, "True or False"),
        ("himplos", "temperature", True, "a number above 0"),
        ("line", "delta", 0, "a number above 0 or None"),
        ("line", "activation_percentile", 100.5, "a number from 0 to 100 or None"),
        ("line", "weight_percentile", float("inf"), "a number from 0 to 100 or None"),
    ],
)
def test_hyperparameters_out_of_range(name, field, value, expected, train_bank, head, bank):
    settings = {field: value}
    with pytest.raises(InputError) as error:
        make(name, **settings)
    assert str(error.value).startswith(f"{DETECTORS[name].title}: {field} is {value!r}, expected {expected}")
    detector = make(name, **({"clip": 1.0} if field == "clip" else {})).fit(train_bank, head)
    setattr(detector, field, value)
    with pytest.raises(InputError):
        detector.score_samples(bank)


@every_detector
def test_scoring_leaves_everything_as_it_was(name):
    train, head, bank = random_problem(4, 20, 15)
    before = [
        tensor.clone() for tensor in (train.features, head.weight, head.bias, bank.features, bank.logits)
    ]
    make(name).fit(train, head).score_samples(bank)
    for tensor, copy in zip(
        (train.features, head.weight, head.bias, bank.features, bank.logits), before, strict=True
    ):
        assert_array_equal(tensor, copy)


@every_detector
def test_a_head_that_requires_gradients(name):
    train, head, bank = random_problem(4, 20, 15)
    tracked = Head(head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_())
    scores = make(name).fit(train, tracked).score_samples(bank)
    assert not scores.requires_grad
    assert_allclose(scores, make(name).fit(train, head).score_samples(bank), atol=0)


def test_threshold_and_predict():
    train, head, bank = random_problem(4, 20, 40)
    detector = Energy().fit(train, head)
    scores = detector.score_samples(bank)
    threshold = detector.threshold(scores, tpr=0.75)
    assert threshold == float(scores.sort(descending=True).values[29])
    predicted = detector.predict(bank, threshold)
    assert_array_equal(predicted, np.where(scores.numpy() >= threshold, 1, -1))
    assert (predicted == 1).sum() == 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sample_at_the_threshold_is_accepted(dtype):
    train, head, bank = random_problem(4, 20, 40)
    bank, detector = cast(bank, dtype), LINe().fit(train, head)
    threshold = detector.threshold(detector.score_samples(bank), tpr=0.5)
    assert (detector.predict(bank, threshold) == 1).sum() == 20


@every_detector
def test_hyperparameters_survive_json(name):
    detector = make(name)
    stored = json.loads(json.dumps(detector.hyperparameters()))
    assert make(name, **stored) == detector
    assert detector.title and detector.source


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(InputError, match="no detector 'himpls'; did you mean 'himplos'"):
        create("himpls")
    with pytest.raises(InputError, match=r"valid names: .*dfb_background, .*dice"):
        create("x")
    with pytest.raises(
        InputError, match="'line' has no hyper-parameter 'weight_percentil'; did you mean 'weight_percentile'"
    ):
        create("line", weight_percentil=10)
    with pytest.raises(InputError, match="'msp' has no hyper-parameter 'temperature'; it has none"):
        create("msp", temperature=2)


@pytest.mark.parametrize("name", ["pytorch_ood", "pytorch_ood.", "msp.5"])
def test_a_family_and_a_name_beyond_one_are_no_detectors(name):
    with pytest.raises(InputError, match=f"There is no detector '{name}'"):
        create(name)


def test_rows_of_a_config():
    rows = rows_of(
        {
            "msp": {},
            "himplos": {"percentile": 50},
            "him_only": {"detector": "himplos", "smoothing": False, "label": "HIM only"},
            "line_two": {"detector": "line", "network": "two"},
            "leak_two": {"detector": "kl_matching", "templates": "test_leak", "network": "two"},
        }
    )
    labels = ["MSP", "HIMPLoS", "HIM only", "LINe (two)", "KL matching (test leak, two)"]
    assert [row.label for row in rows.values()] == labels
    assert rows["himplos"].detector == HIMPLoS(percentile=50)
    assert rows["him_only"].detector == HIMPLoS(smoothing=False)
    assert [row.network.name for row in rows.values()] == ["", "", "", "two", "two"]


def test_the_error_of_a_row_names_it():
    with pytest.raises(InputError, match=r"detectors\.him_only: There is no detector 'him_only'"):
        rows_of({"him_only": {"smoothing": False}})
    with pytest.raises(InputError, match=r"detectors\.dice: DICE: percentile is 900"):
        rows_of({"dice": {"percentile": 900}})
    with pytest.raises(InputError, match="'line' and 'line_10' have the same label 'LINe'"):
        rows_of({"line": {}, "line_10": {"detector": "line", "weight_percentile": 10}})


@pytest.fixture
def norm():
    """A method of one's own, registered as long as the test runs."""

    @DETECTORS.register("norm")
    @dataclass
    class Norm(Detector):
        """L_p norm of the feature."""

        order: float = 2.0
        title: ClassVar[str] = "Norm"

        def _check(self):
            self._check_number("order", 1, 10)

        def _score(self, shard):
            return shard.features.norm(p=self.order, dim=1)

    yield Norm
    del DETECTORS._classes["norm"]


def test_a_method_of_ones_own(norm, train_bank, head, bank):
    detector = make_row("norm", {"order": 1}, AnyNetwork).detector.fit(train_bank, head)
    assert_allclose(detector.score_samples(bank), bank.features.sum(1), atol=1e-12)
    assert detector.label == "Norm" and detector.hyperparameters() == {"order": 1}
    with pytest.raises(InputError, match="Norm: order is 0, expected a number from 1 to 10"):
        create("norm", order=0)


def test_a_class_that_tables_could_not_show_is_not_registered():
    class NoDataclass(Detector):
        title: ClassVar[str] = "Norm"
        order = 2.0

    @dataclass
    class NoTitle(Detector):
        order: float = 2.0

    @dataclass
    class TitleAsField(Detector):
        title: str = "Norm"

    @dataclass
    class Reserved(Detector):
        network: str = ""
        title: ClassVar[str] = "Norm"

    for cls, message in {
        NoDataclass: "is not a dataclass",
        NoTitle: "has no title",
        TitleAsField: "has no title",
        Reserved: "has a hyper-parameter 'network', a key of every row",
    }.items():
        with pytest.raises(InputError, match=f"'own'.*{cls.__name__} {message}"):
            DETECTORS.register("own")(cls)
    assert "own" not in DETECTORS


def test_a_name_has_one_class_which_may_be_registered_again(norm):
    assert DETECTORS.register("norm")(norm) is norm
    with pytest.raises(InputError, match=r"msp\.MSP is to be registered as 'norm', .*Norm has this one"):
        DETECTORS.register("norm")(MSP)


@pytest.mark.parametrize("scores", [lambda shard: shard.logits, lambda shard: shard.features.sum()])
def test_other_than_one_score_per_sample_is_refused(norm, scores, train_bank, head, bank):
    detector = norm().fit(train_bank, head)
    detector._score = scores
    with pytest.raises(
        InputError, match=r"Norm: _score gave a tensor of shape .* expected one score per sample"
    ):
        detector.score_samples(bank)


def test_what_a_detector_says_of_itself():
    assert MSP().label == "MSP"
    assert not MSP().learns and ViM().learns
    assert (MSP().softmax, MSP().default_network, MSP().fit_set) == ("flat", "", "train")
    assert MSP().parts == {} and MSP().learned == {} and MSP().extra_passes == 0


def test_a_grid_is_every_combination_of_its_values(train_bank, head, bank):
    detector = HIMPLoS().fit(train_bank, head)
    found = variants(detector, {"clip": [1.0, None], "percentile": [50, 0]})
    assert [tuple(settings.values()) for settings, _ in found] == [(1.0, 50), (1.0, 0), (None, 50), (None, 0)]
    for settings, variant in found:
        fresh = HIMPLoS(**settings).fit(train_bank, head).score_samples(bank)
        assert_allclose(variant.score_samples(bank), fresh, atol=1e-12)
    assert detector == HIMPLoS()
    with pytest.raises(InputError, match="HIMPLoS has no hyper-parameter 'clp'; did you mean 'clip'"):
        variants(detector, {"clp": [1.0]})
    with pytest.raises(InputError, match="HIMPLoS: clip is 0, expected a number above 0"):
        variants(detector, {"clip": [1.0, 0]})
    with pytest.raises(InputError, match="MSP has no hyper-parameter 'temperature'; it has none"):
        variants(MSP(), {"temperature": [1]})


def test_a_sample_alone_scores_as_in_company():
    train, head, bank = random_problem(7, 342, 8, train=700)
    for name in ON_BANKS:
        detector = make(name).fit(train, head)
        alone = torch.cat(
            [detector.score_samples(make_bank(bank.features[i : i + 1], head)) for i in range(8)]
        )
        assert_allclose(alone, detector.score_samples(bank), atol=1e-12)


def test_scores_are_computed_in_float64_whatever_the_bank_has():
    class Looks(Energy):
        def _score(self, shard):
            found.append((shard.features.dtype, shard.logits.dtype))
            return super()._score(shard).float()

    found, (train, head, bank) = [], random_problem(3, 5, 4)
    scores = Looks().fit(train, head).score_samples(cast(bank, torch.float32))
    assert found == [(torch.float64, torch.float64)] and scores.dtype == torch.float64


@every_detector
def test_no_array_of_samples_by_classes_by_features(name):
    samples, classes, features, train_samples = 300, 30, 50, 150
    train, head, bank = random_problem(classes, features, samples, train=train_samples)
    with LargestArray() as largest:
        make(name).fit(train, head).score_samples(bank)
    assert 0 < largest.elements <= samples * train_samples
    assert samples * train_samples * 10 <= samples * classes * features


@pytest.mark.parametrize(("name", "field"), [("kl_matching", "templates"), ("ash", "variant")])
def test_choices(name, field):
    for value in ("x", "", None, "P"):
        with pytest.raises(InputError, match=f"{field} is {value!r}"):
            create(name, **{field: value})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_detector
def test_a_bank_is_scored_on_the_gpu_where_it_is_moved_there(name):
    train, head, bank = random_problem(10, 342, 200, train=400)
    train, head, bank = cast(train, torch.float32), head.to(torch.float32), cast(bank, torch.float32)
    detector = make(name).fit(train, head)
    expected = detector.score_samples(bank)
    found = detector.score_samples(DeviceBank(bank, torch.device("cuda")))
    assert found.is_cuda
    assert_allclose(found.cpu(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_detector
def test_cuda_agrees_with_the_cpu(name, dtype):
    """A bank on the GPU with a detector fitted from the CPU, and one fitted from the GPU."""
    train, head, bank = random_problem(10, 342, 200, train=400)
    train, head, bank = cast(train, dtype), head.to(dtype), cast(bank, dtype)
    expected = make(name).fit(train, head).score_samples(bank)
    cuda = FeatureBank(bank.features.cuda(), bank.logits.cuda())
    cuda_train = FeatureBank(train.features.cuda(), train.logits.cuda(), train.labels.cuda())
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    for detector in (make(name).fit(train, head), make(name).fit(cuda_train, head.to("cuda"))):
        scores = detector.score_samples(cuda)
        assert scores.is_cuda
        assert_allclose(scores.cpu(), expected, rtol=tolerance, atol=tolerance)
        assert (detector.predict(cuda, detector.threshold(scores)) == 1).sum() == 190
