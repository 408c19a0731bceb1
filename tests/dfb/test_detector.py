"""DFB: the vectors of the specification, plain loops, grids, changes after a fit, errors."""

import json
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from background_examples import dense_problem, foreground_problem
from detector_examples import split
from numpy.testing import assert_allclose, assert_array_equal

from ood_helpers.banks import BackgroundBank, FeatureBank, Head, HeadBank
from ood_helpers.detectors import create, variants
from ood_helpers.detectors.energy import Energy
from ood_helpers.detectors.msp import MSP
from ood_helpers.dfb.detector import DFB, DFBBackground
from ood_helpers.dfb.recipe import DenseRecipe
from ood_helpers.errors import InputError
from ood_helpers.networks.background import foreground_head
from ood_helpers.rows import make_row

# Three classes, the background last.
LOGITS = torch.tensor(
    [[6, 1, 0, 3], [1.2, 1, 0.8, 3.5], [1.2, 1, 0.8, -1], [5, 4.5, 0, -2]], dtype=torch.float64
)
THREE = Head(torch.zeros(3, 2), torch.zeros(3))
HOSTS = {
    "msp": ("msp", [0.990867, 0.401760, 0.401760, 0.619860]),
    "msp_t2": ({"detector": "odin", "temperature": 2, "noise": 0}, [0.883492, 0.367165, 0.367165, 0.537378]),
    "msp_t1000": ({"detector": "odin", "noise": 0}, [0.334557, 0.333400, 0.333400, 0.333944]),
    "energy": ("energy", [6.009174, 2.111901, 2.111901, 5.478262]),
}
JOINT = {
    ("msp", 1, 1): [3.990867, 3.901760, -0.598240, -1.380140],
    ("energy", 1, 1): [9.009174, 5.611901, 1.111901, 3.478262],
    ("msp", 1, 3): [1.990867, 1.568426, 0.068426, -0.046807],
    ("energy", 1, 3): [7.009174, 3.278568, 1.778568, 4.811596],
    ("msp", -1, 1): [-2.009133, -3.098240, 1.401760, 2.619860],
    ("energy", -1, 1): [3.009174, -1.388099, 3.111901, 7.478262],
}


def bank_of_logits(logits, head_size=2):
    """A bank whose features say nothing."""
    return FeatureBank(torch.zeros(len(logits), head_size, dtype=logits.dtype), logits)


@pytest.fixture
def sheet():
    return BackgroundBank(bank_of_logits(LOGITS))


@pytest.mark.parametrize("name", HOSTS)
def test_the_foreground_alone(name, sheet):
    host, expected = HOSTS[name]
    detector = DFB(host).fit(sheet, THREE)
    scores = detector.foreground_scores(sheet)
    assert_allclose(scores, expected, atol=1e-6)
    assert float(scores[1] - scores[2]) == pytest.approx(0, abs=1e-12)  # they differ in the background only
    assert_allclose(detector.score_samples(sheet), scores + LOGITS[:, 3], atol=1e-12)


@pytest.mark.parametrize(("name", "sigma", "temperature"), JOINT)
def test_the_joint_score(name, sigma, temperature, sheet):
    detector = DFB(HOSTS[name][0], sigma=sigma, temperature=temperature).fit(sheet, THREE)
    scores = detector.score_samples(sheet)
    assert_allclose(scores, JOINT[name, sigma, temperature], atol=1e-6)
    assert float(scores[1] - scores[2]) == pytest.approx(sigma * 4.5 / temperature, abs=1e-12)


def test_the_naive_use_of_all_outputs_takes_pure_background_for_a_class(sheet):
    """What a classifier of K + 1 classes would say: z2, all background, becomes the second most confident."""
    four, naive = Head(torch.zeros(4, 2), torch.zeros(4)), bank_of_logits(LOGITS)
    confidence = MSP().fit(naive, four).score_samples(naive)
    assert_allclose(confidence, [0.944284, 0.800289, 0.384637, 0.619509], atol=1e-6)
    energies = Energy().fit(naive, four).score_samples(naive)
    assert_allclose(energies, [6.057329, 3.722783, 2.155455, 5.478827], atol=1e-6)
    foreground = DFB("msp").fit(sheet, THREE).foreground_scores(sheet)
    assert confidence.argsort().tolist() != foreground.argsort().tolist()


def test_the_background_alone(sheet):
    assert_array_equal(DFBBackground().fit(sheet, THREE).score_samples(sheet), LOGITS[:, 3])
    assert_array_equal(DFBBackground(sigma=-1).fit(sheet, THREE).score_samples(sheet), -LOGITS[:, 3])
    scores = DFBBackground(background="log_softmax").fit(sheet, THREE).score_samples(sheet)
    assert_allclose(scores.exp(), [0.047013, 0.800289, 0.042619, 0.000565], atol=1e-6)


@pytest.mark.parametrize("sigma", [1, -1])
def test_log_softmax_equals_a_plain_loop(sigma):
    train, head, bank = foreground_problem()
    detector = DFB("energy", sigma, 0.7, "log_softmax").fit(train, head)
    expected = []
    for row in bank.bank.logits.numpy():
        total = np.log(np.exp(row).sum())
        expected.append(np.log(np.exp(row[:-1]).sum()) + sigma * (row[-1] - total) / 0.7)
    assert_allclose(detector.score_samples(bank), expected, atol=1e-12)


# The learned temperature


@pytest.mark.parametrize("background", ["logit", "log_softmax"])
@pytest.mark.parametrize("host", ["energy", "gradnorm", "vim"])
def test_the_learned_temperature_is_the_ratio_of_the_standard_deviations(host, background):
    train, head, _ = foreground_problem()
    detector = DFB(host, -1, None, background).fit(train, head)
    alone = create(host).fit(train, head).score_samples(train).numpy()
    h = train.bank.logits[:, -1] if background == "logit" else train.bank.logits.log_softmax(1)[:, -1]
    assert detector.temperature_ == pytest.approx(h.numpy().std() / alone.std(), rel=1e-12)
    assert detector.learned["temperature"] == detector.temperature_
    foreground, part = detector.foreground_scores(train), detector.background_scores(train)
    assert float((part / detector.temperature_).std()) == pytest.approx(float(foreground.std()), rel=1e-12)
    assert_allclose(detector.score_samples(train), foreground + part / detector.temperature_, atol=1e-12)
    detector.temperature = 2.5
    assert detector.temperature_ == 2.5 and "temperature" not in detector.learned


def test_the_learned_temperature_follows_the_fields():
    train, head, _ = foreground_problem()
    detector, learned = DFB(temperature=None).fit(train, head), []
    for host, background in product(("msp", "vim", "msp"), ("logit", "log_softmax")):
        detector.host, detector.background = host, background
        learned.append(detector.temperature_)
        fresh = DFB(host, 1, None, background).fit(train, head)
        assert learned[-1] == pytest.approx(fresh.temperature_, rel=1e-12)
    assert len(set(learned)) == 4 and learned[:2] == learned[4:]


def test_the_learned_temperature_makes_the_scale_of_the_background_immaterial():
    train, head, bank = foreground_problem()
    louder = [
        FeatureBank(b.features, b.logits, b.labels, background=100 * b.background)
        for b in (train.load(), bank.load())
    ]
    expected = DFB("msp", temperature=None).fit(train, head).score_samples(bank)
    assert_allclose(
        DFB("msp", temperature=None).fit(louder[0], head).score_samples(louder[1]), expected, atol=1e-10
    )


def test_a_temperature_that_cannot_be_learned():
    flat = BackgroundBank(bank_of_logits(torch.tensor([[1.0, 2, 3, 0], [1, 2, 3, 9]])))
    with pytest.raises(
        InputError, match=r"are 4\.5 and 0, expected both above 0 to learn temperature from; give a num"
    ):
        DFB(temperature=None).fit(flat, THREE)
    still = BackgroundBank(bank_of_logits(torch.tensor([[1.0, 2, 3, 5], [1, 2, 9, 5]])))
    with pytest.raises(InputError, match="are 0 and "):
        DFB(temperature=None).fit(still, THREE)


# Grids, and changes after a fit


def test_the_score_is_joined_from_its_parts():
    train, head, bank = foreground_problem()
    detector = DFB("vim", -1, 2.5, "log_softmax").fit(train, head)
    scores = {name: part.fit(train, head).score_samples(bank) for name, part in detector.parts.items()}
    assert set(scores) == {"foreground", "background"}
    assert_allclose(scores["foreground"], detector.foreground_scores(bank), atol=1e-12)
    assert_allclose(scores["background"], detector.background_scores(bank), atol=1e-12)
    assert_allclose(detector.join(scores), detector.score_samples(bank), atol=1e-12)


def test_a_grid_is_joined_from_the_scores_of_one_host():
    train, head, bank = foreground_problem()
    detector = DFB(temperature=None).fit(train, head)
    grid = {"sigma": [1, -1], "temperature": [0.5, 2.0, None], "background": ["logit", "log_softmax"]}
    whole = bank.bank.logits
    confidence = whole[:, :-1].softmax(1).amax(1)
    assert len(variants(detector, grid)) == 12
    for settings, variant in variants(detector, grid):
        h = whole if settings["background"] == "logit" else whole.log_softmax(1)
        part = settings["sigma"] * h[:, -1]
        expected = confidence + part / variant.temperature_
        assert_allclose(variant.score_samples(bank), expected, atol=1e-12)
        assert_allclose(variant.join({"foreground": confidence, "background": part}), expected, atol=1e-12)
    assert (detector.sigma, detector.temperature) == (1, None)


def test_a_bank_whose_logits_change_is_scored_again():
    train, head, bank = foreground_problem()
    detector = DFB().fit(train, head)
    before = detector.score_samples(bank)
    bank.bank.logits[:, 0] += 1
    assert (detector.score_samples(bank) - before).abs().max() > 0.01


def test_another_head_on_the_same_features_is_another_bank():
    train, head, bank = dense_problem()
    detector = DFB("energy").fit(BackgroundBank(train), foreground_head(head))
    other = Head(2 * head.weight, head.bias)
    for which, key in ((head, "a"), (other, "b"), (head, "a")):
        logits = which.logits(bank.features)
        expected = logits[:, :-1].logsumexp(1) + logits[:, -1]
        scores = detector.score_samples(BackgroundBank(HeadBank(bank, which, key)))
        assert_allclose(scores, expected, atol=1e-9)


def test_a_host_set_after_fit_is_fitted_to_the_same_bank():
    train, head, bank = foreground_problem()
    detector = DFB({"detector": "knn", "k": 3}).fit(train, head)
    hosts = [{"detector": "knn", "k": 3}, {"detector": "knn", "k": 9}, "msp", "vim"]
    scores = {}
    for settings, variant in variants(detector, {"host": hosts, "sigma": [1, -1]}):
        fresh = DFB(**settings).fit(train, head)
        scores[str(settings)] = variant.score_samples(bank)
        assert_allclose(scores[str(settings)], fresh.score_samples(bank), atol=1e-12)
    assert min(float((a - b).abs().max()) for a, b in product(scores.values(), repeat=2) if a is not b) > 1e-3
    detector.host["k"] = 9
    assert_array_equal(detector.score_samples(bank), scores[str({"host": hosts[1], "sigma": 1})])
    detector.host = {"detector": "kl_matching", "templates": "test_leak"}
    assert detector.fit_set == "test"
    with pytest.raises(
        InputError, match=r"learns from the test set after a fit to the train set.*call fit again"
    ):
        detector.score_samples(bank)


@pytest.mark.parametrize(
    ("field", "value"), [("sigma", -1), ("temperature", None), ("background", "log_softmax"), ("host", "vim")]
)
def test_a_field_changed_after_fit_changes_the_score_at_once(field, value):
    train, head, bank = foreground_problem()
    detector = DFB().fit(train, head)
    before = detector.score_samples(bank)
    setattr(detector, field, value)
    fresh = DFB(**{field: value}).fit(train, head).score_samples(bank)
    assert_allclose(detector.score_samples(bank), fresh, atol=0)
    assert (fresh - before).abs().max() > 1e-3
    setattr(detector, field, getattr(DFB(), field))
    assert_allclose(detector.score_samples(bank), before, atol=0)


def test_fitting_again_forgets_the_first_fit():
    first, second = foreground_problem(), foreground_problem(classes=3, dimension=8, seed=4)
    detector = DFB("vim", temperature=None).fit(*first[:2])
    detector.score_samples(first[2])
    expected = DFB("vim", temperature=None).fit(*second[:2]).score_samples(second[2])
    assert_allclose(detector.fit(*second[:2]).score_samples(second[2]), expected, atol=0)


# Names, settings, errors


def a_network(name):
    """What a row needs of a network with a background."""
    return SimpleNamespace(recipe=DenseRecipe(), name=name)


@pytest.mark.parametrize(
    ("name", "settings", "label", "network"),
    [
        ("dfb", {}, "MSP + DFB", "dfb"),
        ("energy_dfb", {"detector": "dfb", "host": "energy", "sigma": -1}, "Energy + DFB", "dfb"),
        (
            "t2",
            {
                "detector": "dfb",
                "host": {"detector": "odin", "temperature": 2, "noise": 0, "label": "MSP (T = 2)"},
            },
            "MSP (T = 2) + DFB",
            "dfb",
        ),
        (
            "other",
            {"detector": "dfb", "host": "vim", "network": "dfb_frozen"},
            "ViM + DFB (dfb_frozen)",
            "dfb_frozen",
        ),
        ("dfb_background", {}, "DFB background", "dfb"),
        ("mine", {"detector": "dfb", "label": "Mine", "host": "knn"}, "Mine", "dfb"),
    ],
)
def test_rows_of_a_config(name, settings, label, network):
    row = make_row(name, settings, a_network)
    assert (row.name, row.label, row.network.name) == (name, label, network)


def test_a_row_with_an_unknown_host():
    with pytest.raises(
        InputError, match=r"detectors\.a: DFB: host: There is no detector 'enrgy'; did you mean 'energy'"
    ):
        make_row("a", {"detector": "dfb", "host": "enrgy"}, a_network)


@pytest.mark.parametrize(
    "host", ["gen", {"detector": "odin", "temperature": 2, "noise": 0, "label": "MSP (T = 2)"}]
)
def test_hyperparameters_name_those_of_the_host_and_survive_json(host):
    train, head, bank = foreground_problem()
    detector = DFB(host, -1, None, "log_softmax")
    settings = json.loads(json.dumps(detector.hyperparameters()))
    name = settings["host"].pop("detector")
    assert name == ("gen" if host == "gen" else "odin")
    assert settings["host"] == detector.make_host().hyperparameters() != {}
    settings["host"]["detector"] = name
    again = create("dfb", **settings).fit(train, head).score_samples(bank)
    assert_allclose(again, detector.fit(train, head).score_samples(bank), atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "mos"}, "DFB: host is 'mos', which scores a group softmax"),
        ({"host": "dfb"}, "DFB: host is 'dfb', which scores the background itself"),
        ({"host": "dfb_background"}, "host is 'dfb_background', which scores the background itself"),
        ({"host": "vimm"}, "DFB: host: There is no detector 'vimm'; did you mean 'vim'"),
        (
            {"host": {"detector": "knn", "neighbours": 3}},
            "DFB: host: The detector 'knn' has no hyper-parameter 'neigh",
        ),
        ({"host": {"detector": "knn", "k": 0}}, "DFB: host: KNN: k is 0, expected a whole number from 1"),
        (
            {"host": {"k": 3}},
            r"host is {'k': 3}, expected the name of a detector, or a mapping with its name under",
        ),
        ({"host": {"detector": None}}, "expected the name of a detector"),
        ({"host": None}, "host is None, expected the name of a detector"),
        ({"sigma": 2}, "DFB: sigma is 2, expected 1 or -1"),
        ({"sigma": True}, "DFB: sigma is True, expected 1 or -1"),
        ({"temperature": 0}, "DFB: temperature is 0, expected a number above 0"),
        ({"temperature": "1"}, "DFB: temperature is '1', expected a number above 0"),
        ({"background": "softmax"}, "DFB: background is 'softmax'; did you mean 'log_softmax'"),
    ],
)
def test_hyperparameters_out_of_range(settings, message, sheet):
    with pytest.raises(InputError, match=message):
        DFB(**settings)
    detector = DFB().fit(sheet, THREE)
    for name, value in settings.items():
        setattr(detector, name, value)
    with pytest.raises(InputError, match=message):
        detector.score_samples(sheet)


BOTH = pytest.mark.parametrize("make", [DFB, DFBBackground])


@BOTH
def test_not_fitted(make, sheet):
    for call in (make().score_samples, make().background_scores, lambda bank: make().predict(bank, 0.0)):
        with pytest.raises(InputError, match=f"{make.title} is not fitted"):
            call(sheet)
    with pytest.raises(InputError, match="DFB is not fitted"):
        DFB().foreground_scores(sheet)
    with pytest.raises(InputError, match="DFB is not fitted"):
        _ = DFB(temperature=None).learned


@BOTH
def test_a_bank_without_a_background(make, sheet):
    plain = bank_of_logits(LOGITS[:, :3])
    message = f"{make.title}: found a bank without the logit of a background, expected one with it; .* method: dense"
    with pytest.raises(InputError, match=message):
        make().fit(plain, THREE)
    with pytest.raises(InputError, match=message):
        make().fit(sheet, THREE).score_samples(plain)


@BOTH
def test_bad_numbers_and_sizes_are_named(make, sheet):
    detector = make().fit(sheet, THREE)
    for column, what in ((0, "logits"), (3, "background scores" if make is DFB else "scores")):
        logits = LOGITS.clone()
        logits[2, column] = torch.nan
        bad = split(bank_of_logits(logits), 1, 3)
        message = rf"{make.title}: 1 of samples 1 to 3 have NaN or infinite {what} \(first: sample 2\)"
        with pytest.raises(InputError, match=message):
            detector.score_samples(BackgroundBank(bad))
    with pytest.raises(
        InputError, match=f"{make.title}: the bank has 5 features and 3 logits per sample, the head 2 and 3"
    ):
        detector.score_samples(BackgroundBank(bank_of_logits(LOGITS, 5)))
    with pytest.raises(InputError, match="2 features and 3 logits per sample, the head 2 and 4"):
        make().fit(sheet, Head(torch.zeros(4, 2), torch.zeros(4)))
    with pytest.raises(InputError, match="has no samples"):
        detector.score_samples(BackgroundBank(split(bank_of_logits(LOGITS[:0]))))


def test_a_sum_that_overflows_is_an_error(sheet):
    with pytest.raises(InputError, match="DFB: 4 of samples 0 to 3 have NaN or infinite scores"):
        DFB(temperature=1e-320).fit(sheet, THREE).score_samples(sheet)


@BOTH
def test_float32_agrees_with_float64_and_nothing_is_changed(make):
    train, head, bank = foreground_problem()
    expected = make().fit(train, head).score_samples(bank)
    before = bank.bank.logits.clone()
    single = [
        BackgroundBank(FeatureBank(b.bank.features.float(), b.bank.logits.float())) for b in (train, bank)
    ]
    scores = make().fit(single[0], head.to(torch.float32)).score_samples(single[1])
    assert scores.dtype == torch.float64
    assert_allclose(scores, expected, rtol=2e-5, atol=2e-5)
    assert_array_equal(bank.bank.logits, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("host", ["msp", "vim", "knn"])
def test_cuda_agrees_with_the_cpu(host):
    train, head, bank = foreground_problem(samples=60)
    settings = {"host": {"detector": host, **({"k": 3} if host == "knn" else {})}, "temperature": None}
    expected = DFB(**settings).fit(train, head).score_samples(bank)
    on_gpu = BackgroundBank(FeatureBank(bank.bank.features.cuda(), bank.bank.logits.cuda()))
    scores = DFB(**settings).fit(train, head).score_samples(on_gpu)
    assert scores.is_cuda
    assert_allclose(scores.cpu(), expected, atol=1e-10)
