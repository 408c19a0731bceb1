"""DFB: the sheet's vectors, plain loops, every detector as host, what is kept and what is not, errors."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from detector_examples import make_bank, random_problem, split
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.torch import save_file
from torch import nn

from ood_helpers.backbones import Classifier
from ood_helpers.data import Transform
from ood_helpers.detectors import DETECTORS, DFB, MSP, DFBBackground, Energy, ViM, create, create_all
from ood_helpers.errors import InputError
from ood_helpers.features import (
    FeatureBank,
    Head,
    ImageBank,
    OtherHeadBank,
    PixelNetwork,
    StoredBank,
    shard_path,
)
from ood_helpers.foreground import ForegroundBank, ForegroundShard, foreground_classifier, foreground_head

TRANSFORM = Transform(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))

# D5: three classes, the background last.
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
    return ForegroundBank(bank_of_logits(LOGITS))


def dense_problem(classes=4, dimension=12, samples=23, seed=0):
    """(training bank, head, bank) of a head with K + 1 outputs, the training labels those of K classes."""
    train, head, bank = random_problem(classes + 1, dimension, samples, seed, train=40)
    return FeatureBank(train.features, train.logits, torch.arange(40) % classes), head, bank


def foreground_problem(**settings):
    """The same as a detector sees it."""
    train, head, bank = dense_problem(**settings)
    return ForegroundBank(train), foreground_head(head), ForegroundBank(bank)


def stored(bank, directory, *sizes):
    """The same bank on disk, in shards of the given sizes."""
    directory.mkdir()
    for index, shard in enumerate(split(bank, *sizes).shards()):
        tensors = {"features": shard.features, "logits": shard.logits}
        tensors |= {} if shard.labels is None else {"labels": shard.labels}
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, shard_path(directory, index)
        )
    (directory / "bank.json").write_text(json.dumps({"images": len(bank), "shards": len(sizes)}))
    return StoredBank.open(directory)


# D5


@pytest.mark.parametrize("name", HOSTS)
def test_the_foreground_alone(name, sheet):
    host, expected = HOSTS[name]
    detector = DFB(host).fit(sheet, THREE)
    scores = detector.foreground_scores(sheet)
    assert_allclose(scores, expected, atol=1e-6)
    assert scores[1] == scores[2]  # z2 and z3 differ in the background only
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


# D6


def test_vim_sees_the_rows_of_the_foreground_only():
    """The sheet's ViM, with a third output that must not change origin, alpha or energy."""
    train = torch.tensor(
        [[2, 0, 1], [3, 1, 0], [0, 2, 1], [1, 3, 0], [2, 2, 2], [0, 0, 1]], dtype=torch.float64
    )
    queries = torch.tensor([[2.5, 0.5, 0.5], [-1, -1, 4], [0, 0, 0]], dtype=torch.float64)
    weight = torch.tensor([[1, -0.5, 0.2], [-0.4, 1, 0.1], [7, -2, 3]], dtype=torch.float64)
    head = Head(weight, torch.tensor([0.1, -0.2, 5], dtype=torch.float64))
    train, bank = make_bank(train, head), make_bank(queries, head)
    dfb = DFB({"detector": "vim", "dimension": 1}).fit(
        ForegroundBank(split(train, 2, 4)), foreground_head(head)
    )
    bank = ForegroundBank(bank)
    assert dfb.learned["host"]["alpha"] == pytest.approx(1.328896, abs=1e-6)
    assert_allclose(dfb.host_.origin_, [-0.012247, 0.191182, 0.039189], atol=1e-6)
    assert_allclose(dfb.foreground_scores(bank), [0.631614, -4.877239, 0.449107], atol=1e-6)
    background = queries @ weight[2] + 5
    assert_allclose(dfb.score_samples(bank), dfb.foreground_scores(bank) + background, atol=1e-12)
    naive = ViM(dimension=1).fit(train, head).score_samples(bank.bank)
    assert (naive - dfb.foreground_scores(bank)).abs().min() > 0.1


# Hosts


ON_BANKS = [
    name
    for name, detector in DETECTORS.items()
    if not (detector().needs_images or detector().needs_validation or detector().network)
]


@pytest.mark.parametrize("name", [*ON_BANKS, "pytorch_ood.KNN"])
def test_every_detector_can_be_host(name):
    """Its score is the detector's own on K logits that were never more, in shards as in memory."""
    train, head, bank = dense_problem()
    settings = {"k": 3} if name.endswith(("knn", "KNN")) else {}
    small = foreground_head(head)
    host = create(name, **settings).fit(make_bank(train.features, small, train.labels), small)
    expected = host.score_samples(make_bank(bank.features, small)) - bank.logits[:, -1] / 2
    detector = DFB({"detector": name, **settings}, sigma=-1, temperature=2)
    detector.fit(ForegroundBank(split(train, 15, 25)), small)
    scores = detector.score_samples(ForegroundBank(split(bank, 1, 20, 2)))
    assert scores.dtype == torch.float64
    assert_allclose(scores, expected, atol=1e-6 if "pytorch" in name else 1e-9)
    assert (detector.fit_set, detector.needs_images, detector.extra_passes) == ("train", False, 0)
    fitted_on_memory = DFB({"detector": name, **settings}, -1, 2).fit(ForegroundBank(train).load(), small)
    assert_allclose(fitted_on_memory.score_samples(ForegroundBank(bank).load()), scores, atol=1e-6)


class SmallNetwork(Classifier):
    """A convolution and a head of K + 1 = 4 outputs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def feature_map(self, images):
        return nn.functional.gelu(self.stem(images))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return SmallNetwork()


def image_bank(network, count, seed, network_of_images=None):
    """An ImageBank around the foreground of a bank; the images are all of one batch or several."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 6, 6), generator=generator).to(torch.uint8)
    dense = PixelNetwork(network, TRANSFORM)
    with torch.no_grad():
        features = dense.pooled(images / 255, ("features",))["features"]
        bank = FeatureBank(features, network.head(features), torch.arange(count) % 3)
    view = PixelNetwork(network_of_images or foreground_classifier(network), TRANSFORM)
    return ImageBank(
        ForegroundBank(bank), view, lambda start, stop: iter(images[start:stop].split(7)), "made"
    )


@pytest.mark.parametrize("temperature", [3.0, None])
def test_odin_with_noise_as_host_equals_a_plain_loop(temperature, network):
    bank = image_bank(network, 17, seed=1)
    head = foreground_head(Head.of(network))
    host = {"detector": "odin", "temperature": 5, "noise": 0.01}
    detector = DFB(host, -1, temperature)
    assert detector.needs_images and detector.extra_passes == 3
    detector.fit(bank if temperature is None else bank.bank, head)
    mean, std = (torch.tensor(values)[:, None, None] for values in (TRANSFORM.mean, TRANSFORM.std))
    foreground, background = [], []
    for image in torch.cat(list(bank.batches(0, 17))):
        pixels = (image[None] / 255).requires_grad_()
        logits = network((pixels - mean) / std)[:, :3]
        nn.functional.cross_entropy(logits / 5, logits.argmax(1)).backward()
        moved = pixels.detach() - 0.01 * pixels.grad.sign()
        foreground.append(float((network((moved - mean) / std)[:, :3].double() / 5).softmax(1).max()))
        background.append(-float(network((pixels.detach() - mean) / std)[0, 3]))
    used = np.std(background) / np.std(foreground) if temperature is None else temperature
    assert detector.temperature_ == pytest.approx(used, rel=1e-4)
    assert_allclose(detector.foreground_scores(bank), foreground, atol=1e-6)
    assert_allclose(detector.background_scores(bank), background, atol=1e-6)
    scores = np.array(foreground) + np.array(background) / used
    assert_allclose(detector.score_samples(bank), scores, atol=1e-5)


def test_a_host_that_tunes_itself_gets_the_validation_bank(network):
    train, validation, bank = (image_bank(network, count, seed) for count, seed in ((30, 1), (24, 2), (9, 3)))
    head = foreground_head(Head.of(network))
    host = {"detector": "mahalanobis_ensemble", "layers": ["features"], "noise": 0.01, "outlier_step": 0.1}
    detector = DFB(host)
    assert detector.needs_validation
    with pytest.raises(InputError, match="DFB: found no validation bank"):
        detector.fit(train, head)
    detector.fit(train, head, validation)
    alone = create(**{"name" if key == "detector" else key: value for key, value in host.items()})
    expected = alone.fit(train, head, validation).score_samples(bank)
    assert_allclose(detector.foreground_scores(bank), expected, atol=1e-12)
    assert detector.tuned_on == alone.tuned_on != ""
    assert detector.learned == {"host": alone.learned} and detector.extra_passes == 3


def test_the_network_of_the_images_must_have_lost_the_background(network):
    head = foreground_head(Head.of(network))
    whole = image_bank(network, 24, 1, network_of_images=network)
    host = {"detector": "odin", "noise": 0.01}
    with pytest.raises(InputError, match="has 4 outputs, expected the 3 of the foreground classes"):
        DFB(host).fit(whole.bank, head).score_samples(whole)
    with pytest.raises(InputError, match="pass its foreground_classifier"):
        DFB({"detector": "mahalanobis_ensemble"}).fit(whole.bank, head, whole)


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
        assert learned[-1] == DFB(host, 1, None, background).fit(train, head).temperature_
    assert len(set(learned)) == 4 and learned[:2] == learned[4:]


def test_the_learned_temperature_makes_the_scale_of_the_background_immaterial():
    train, head, bank = foreground_problem()
    louder = [ForegroundShard(b.features, b.logits, b.labels, background=100 * b.background) for b in
              (train.load(), bank.load())]  # fmt: skip
    expected = DFB("msp", temperature=None).fit(train, head).score_samples(bank)
    assert_allclose(
        DFB("msp", temperature=None).fit(louder[0], head).score_samples(louder[1]), expected, atol=1e-10
    )


def test_a_temperature_that_cannot_be_learned(network, sheet):
    flat = ForegroundBank(bank_of_logits(torch.tensor([[1.0, 2, 3, 0], [1, 2, 3, 9]])))
    with pytest.raises(
        InputError, match=r"are 4\.5 and 0, expected both above 0 to learn temperature from; give a num"
    ):
        DFB(temperature=None).fit(flat, THREE)
    still = ForegroundBank(bank_of_logits(torch.tensor([[1.0, 2, 3, 5], [1, 2, 9, 5]])))
    with pytest.raises(InputError, match="are 0 and "):
        DFB(temperature=None).fit(still, THREE)
    images, head = image_bank(network, 8, 0), foreground_head(Head.of(network))
    with pytest.raises(
        InputError, match="temperature is None and the host ODIN needs images, expected an ImageBank"
    ):
        DFB("odin", temperature=None).fit(images.bank, head)


# What is kept


@pytest.fixture
def passes(monkeypatch):
    """The number of times that MSP and KNN were computed for a shard."""
    counts = dict.fromkeys(("msp", "knn"), 0)
    for name in counts:

        def counted(self, shard, name=name, score=DETECTORS[name]._score):
            counts[name] += 1
            return score(self, shard)

        monkeypatch.setattr(DETECTORS[name], "_score", counted)
    return counts


def test_a_grid_costs_one_pass_of_the_host(tmp_path, passes):
    train, head, bank = dense_problem()
    on_disk, other = stored(bank, tmp_path / "bank", 3, 20), stored(train, tmp_path / "train", 40)
    detector = DFB(temperature=None).fit(ForegroundBank(other), foreground_head(head))
    assert passes["msp"] == 1  # for the temperature
    grid = {"sigma": [1, -1], "temperature": [0.5, 2.0, None], "background": ["logit", "log_softmax"]}
    confidence = bank.logits[:, :-1].softmax(1).amax(1)
    for settings, variant in detector.variants(grid):
        scores = variant.score_samples(ForegroundBank(on_disk))
        h = bank.logits if settings["background"] == "logit" else bank.logits.log_softmax(1)
        part = settings["sigma"] * h[:, -1] / variant.temperature_
        assert_allclose(scores, confidence + part, atol=1e-12)
    assert passes["msp"] == 1 + 2  # the two shards
    assert (detector.sigma, detector.temperature) == (1, None)
    # the same folder behind an ImageBank is the same bank, and what is given away cannot spoil what is kept
    network = PixelNetwork(SmallNetwork(), TRANSFORM)  # whose 4 outputs are those of 4 classes here
    images = ImageBank(ForegroundBank(on_disk), network, lambda start, stop: iter(()))
    detector.foreground_scores(images).zero_()
    assert_allclose(detector.foreground_scores(images), confidence, atol=1e-12)
    assert passes["msp"] == 3
    detector.fit(ForegroundBank(other), foreground_head(head)).score_samples(ForegroundBank(on_disk))
    assert passes["msp"] == 3 + 3


def test_a_bank_in_memory_is_scored_anew(passes):
    train, head, bank = foreground_problem()
    detector = DFB().fit(train, head)
    before = detector.score_samples(bank)
    bank.bank.logits[:, 0] += 1
    assert (detector.score_samples(bank) - before).abs().max() > 0.01
    assert passes["msp"] == 2


def test_another_head_on_the_same_folder_is_another_bank(tmp_path):
    train, head, bank = dense_problem()
    on_disk = stored(bank, tmp_path / "bank", 23)
    detector = DFB("energy").fit(ForegroundBank(train), foreground_head(head))
    other = Head(2 * head.weight, head.bias)
    banks = [ForegroundBank(OtherHeadBank(on_disk, which)) for which in (head, other)]
    for _ in range(2):
        for given, which in zip(banks, (head, other), strict=True):
            logits = which.logits(bank.features)
            expected = logits[:, :-1].logsumexp(1) + logits[:, -1]
            assert_allclose(detector.score_samples(given), expected, atol=1e-9)


def test_a_host_set_after_fit_is_fitted_to_the_same_bank(tmp_path, passes):
    train, head, bank = dense_problem()
    on_disk = ForegroundBank(stored(bank, tmp_path / "bank", 23))
    detector = DFB({"detector": "knn", "k": 3}).fit(ForegroundBank(train), foreground_head(head))
    hosts = [{"detector": "knn", "k": 3}, {"detector": "knn", "k": 9}, "msp", "vim"]
    scores = {}
    for settings, variant in detector.variants({"host": hosts, "sigma": [1, -1]}):
        fresh = DFB(**settings).fit(ForegroundBank(train), foreground_head(head))
        scores[str(settings)] = variant.score_samples(on_disk)
        assert_allclose(scores[str(settings)], fresh.score_samples(ForegroundBank(bank)), atol=1e-12)
    assert min(float((a - b).abs().max()) for a, b in product(scores.values(), repeat=2) if a is not b) > 1e-3
    assert passes["knn"] == 2 + 4  # once for each k, and for each of the fresh ones
    detector.host["k"] = 9
    assert_allclose(detector.score_samples(on_disk), scores[str({"host": hosts[1], "sigma": 1})], atol=0)
    detector.host = {"detector": "kl_matching", "templates": "test_leak"}
    assert detector.fit_set == "test"
    with pytest.raises(
        InputError, match=r"learns from the test set after a fit to the train set.*call fit again"
    ):
        detector.score_samples(on_disk)


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


def test_rows_of_a_config():
    rows = create_all(
        {
            "dfb": {},
            "energy_dfb": {"detector": "dfb", "host": "energy", "sigma": -1},
            "t2": {
                "detector": "dfb",
                "host": {"detector": "odin", "temperature": 2, "noise": 0, "label": "MSP (T = 2)"},
            },
            "other": {"detector": "dfb", "host": "vim", "network": "dfb_frozen"},
            "dfb_background": {},
            "mine": {"detector": "dfb", "label": "Mine", "host": "knn"},
        }
    )
    labels = [
        "MSP + DFB",
        "Energy + DFB",
        "MSP (T = 2) + DFB",
        "ViM + DFB (dfb_frozen)",
        "DFB background",
        "Mine",
    ]
    assert [detector.label for detector in rows.values()] == labels
    networks = ["dfb", "dfb", "dfb", "dfb_frozen", "dfb", "dfb"]
    assert [detector.network for detector in rows.values()] == networks
    with pytest.raises(
        InputError, match=r"detectors\.a: DFB: host: There is no detector 'enrgy'; did you mean 'energy'"
    ):
        create_all({"a": {"detector": "dfb", "host": "enrgy"}})


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
    message = f"{make.title}: found a bank without the logit of a background, expected a ForegroundBank; .* method: dense"
    with pytest.raises(InputError, match=message):
        make().fit(plain, THREE)
    with pytest.raises(InputError, match=message):
        make().fit(sheet, THREE).score_samples(plain)


@BOTH
def test_bad_numbers_and_sizes_are_named(make, sheet):
    detector = make().fit(sheet, THREE)
    for column, what in ((0, "logits"), (3, "background scores")):
        logits = LOGITS.clone()
        logits[2, column] = torch.nan
        bad = split(bank_of_logits(logits), 1, 3)
        message = rf"{make.title}: 1 of samples 1 to 3 have NaN or infinite {what} \(first: sample 2\)"
        with pytest.raises(InputError, match=message):
            detector.score_samples(ForegroundBank(bad))
    with pytest.raises(
        InputError, match=f"{make.title}: the bank has 5 features and 3 logits a sample, the head 2 and 3"
    ):
        detector.score_samples(ForegroundBank(bank_of_logits(LOGITS, 5)))
    with pytest.raises(InputError, match="2 features and 3 logits a sample, the head 2 and 4"):
        make().fit(sheet, Head(torch.zeros(4, 2), torch.zeros(4)))
    with pytest.raises(InputError, match="has no samples"):
        detector.score_samples(ForegroundBank(split(bank_of_logits(LOGITS[:0]))))


def test_a_sum_that_overflows_is_an_error(sheet):
    with pytest.raises(InputError, match="DFB: 4 of samples 0 to 3 have NaN or infinite scores"):
        DFB(temperature=1e-320).fit(sheet, THREE).score_samples(sheet)


@BOTH
def test_float32_agrees_with_float64_and_nothing_is_changed(make):
    train, head, bank = foreground_problem()
    expected = make().fit(train, head).score_samples(bank)
    before = bank.bank.logits.clone()
    single = [
        ForegroundBank(FeatureBank(b.bank.features.float(), b.bank.logits.float())) for b in (train, bank)
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
    on_gpu = ForegroundBank(FeatureBank(bank.bank.features.cuda(), bank.bank.logits.cuda()))
    scores = DFB(**settings).fit(train, head).score_samples(on_gpu)
    assert scores.is_cuda
    assert_allclose(scores.cpu(), expected, atol=1e-10)
