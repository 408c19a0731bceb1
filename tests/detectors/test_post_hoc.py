"""KL matching, DICE + ReAct, ASH, SCALE, KNN, ViM, GradNorm and GEN: the sheets' vectors, loops, autograd, edges."""

import numpy as np
import pytest
import torch
from detector_examples import cast, make_bank, random_problem, split
from numpy.testing import assert_allclose, assert_array_equal
from torch.nn.functional import log_softmax
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ood_helpers.detectors import (
    ASH,
    DETECTORS,
    DICE,
    GEN,
    KNN,
    DICEReAct,
    GradNorm,
    KLMatching,
    ReAct,
    Scale,
    ViM,
    create,
    create_all,
)
from ood_helpers.detectors import knn as knn_module
from ood_helpers.detectors.ash import kept_count
from ood_helpers.detectors.kl_matching import kl_matching_score
from ood_helpers.errors import InputError
from ood_helpers.features import FeatureBank, Head
from ood_helpers.kernels.largest_entries import largest_entries

VECTORS = {
    "ASH-P": (ASH(variant="p", percentile=50), [2.065090, 1.702140, 2.164326, 1.839056]),
    "ASH-B": (ASH(variant="b", percentile=50), [2.436900, 1.827411, 2.360607, 1.790497]),
    "ASH-S": (ASH(variant="s", percentile=50), [5.784654, 4.641977, 4.641151, 4.210406]),
    "SCALE": (Scale(percentile=50), [5.692653, 4.339756, 5.069124, 4.489468]),
    "GradNorm": (GradNorm(), [1.625312, 1.353203, 0.623934, 1.178858]),
    "GEN": (GEN(top=3), [-2.501937, -2.520770, -2.577520, -2.514106]),
}


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def identity_head(size):
    """Logits that are the features."""
    return Head(torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64))


def bank_of_logits(logits, labels=None, feature_dim=4):
    return FeatureBank(torch.ones(len(logits), feature_dim, dtype=logits.dtype), logits, labels)


def logsumexp(logits):
    return np.logaddexp.reduce(np.asarray(logits, dtype=float), axis=-1)


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name, train_bank, head, bank):
    detector, expected = VECTORS[name]
    assert_allclose(detector.fit(train_bank, head).score_samples(bank), expected, atol=1e-6)


SATURATED = [
    KLMatching(),
    GradNorm(),
    GEN(),
]


@pytest.mark.parametrize("detector", SATURATED, ids=lambda detector: detector.title)
def test_confident_samples_are_kept_apart(detector, train_bank, head):
    """In float32 softmax each of these is exactly 1, so any score of it would be the same for all."""
    logits = torch.tensor([[18.0, 0, 0], [20, 0, 0], [25, 0, 0], [30, 0, 0]])
    assert (logits.softmax(1).amax(1) == 1).all()
    scores = detector.fit(train_bank, head).score_samples(bank_of_logits(logits))
    steps = scores.diff()
    assert scores.dtype == torch.float64
    assert (steps > 0).all() or (steps < 0).all()


class LargestArray(TorchDispatchMode):
    """Notes the number of elements of the largest array that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize(
    "name",
    [n for n, d in DETECTORS.items() if not (d().needs_images or d().needs_validation or d().network)],
)
def test_no_array_of_samples_by_classes_by_features(name):
    samples, classes, features, train_samples = 300, 30, 50, 150
    train, head, bank = random_problem(classes, features, samples, train=train_samples)
    with LargestArray() as largest:
        create(name).fit(train, head).score_samples(bank)
    assert 0 < largest.elements <= samples * train_samples
    assert samples * train_samples * 10 <= samples * classes * features


# ---- KL matching ----------------------------------------------------------------------------------------

KL_ROWS = tensor(
    [[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8], [0, 0.25, 0.75]]
)
KL_LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
KL_TEMPLATES = tensor([[0.75, 0.15, 0.1], [0.15, 0.7, 0.15], [0.05, 0.175, 0.775]])
KL_QUERIES = torch.cat([KL_ROWS, tensor([[1 / 3, 1 / 3, 1 / 3], [0.45, 0.45, 0.1]])])
KL_SCORES = [-0.011084, -0.009241, -0.025732, -0.022582, -0.038752, -0.064576, -0.285026, -0.255004]


def test_kl_matching_vectors():
    assert_allclose(kl_matching_score(KL_QUERIES, KL_TEMPLATES), KL_SCORES, atol=1e-6)


@pytest.mark.parametrize("templates", ["train", "test_leak"])
def test_kl_matching_fits_the_templates_by_label(templates, head):
    """A probability of 0 stands in the logits as one that is far below the others."""
    train = bank_of_logits(KL_ROWS.clamp(min=1e-300).log(), KL_LABELS)
    detector = KLMatching(templates=templates).fit(split(train, 1, 3, 2), head)
    assert_allclose(detector.templates_, KL_TEMPLATES, atol=1e-12)
    queries = bank_of_logits(KL_QUERIES.clamp(min=1e-300).log())
    assert_allclose(detector.score_samples(queries), KL_SCORES, atol=1e-6)


def test_kl_matching_goes_by_the_label_not_by_the_prediction(head):
    """Every image is predicted as class 2, but each class has its own."""
    logits = tensor([[0.0, 1, 5], [1, 0, 5], [0, 0, 5]])
    detector = KLMatching().fit(bank_of_logits(logits, torch.tensor([0, 1, 2])), head)
    assert_allclose(detector.templates_, logits.softmax(1), atol=1e-12)


def test_kl_matching_is_the_smallest_divergence():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(9, 6, generator=generator, dtype=torch.float64).softmax(1)
    d = torch.randn(4, 6, generator=generator, dtype=torch.float64).softmax(1)
    expected = [-min(sum(a * np.log(a / b) for a, b in zip(x, y)) for y in d.numpy()) for x in p.numpy()]
    assert_allclose(kl_matching_score(p, d), expected, atol=1e-12)


def test_kl_matching_with_zeros_in_a_template():
    """KL is infinite there: the score is finite, far below all others, and ordered by the mass on the zero."""
    templates = tensor([[1, 0, 0], [0, 1, 0]])
    scores = kl_matching_score(tensor([[1, 0, 0], [0.9, 0, 0.1], [0, 0, 1]]), templates)
    assert scores[0] == 0
    assert scores.isfinite().all()
    assert scores[2] < 5 * scores[1] < -300


def test_kl_matching_says_when_it_leaks():
    rows = create_all({"kl_matching": {}, "kl_leak": {"detector": "kl_matching", "templates": "test_leak"}})
    assert [row.label for row in rows.values()] == ["KL matching", "KL matching (test leak)"]
    assert [row.fit_set for row in rows.values()] == ["train", "test"]


def test_kl_matching_does_not_use_the_templates_of_another_set(train_bank, head, bank):
    detector = KLMatching().fit(train_bank, head)
    before = detector.score_samples(bank)
    detector.templates = "test_leak"
    with pytest.raises(InputError, match=r"'test_leak' after a fit with 'train'.*fit again"):
        detector.score_samples(bank)
    detector.templates = "train"
    assert_array_equal(detector.score_samples(bank), before)
    detector.templates = "test_leak"
    assert detector.fit(train_bank, head).score_samples(bank).shape == (4,)


@pytest.mark.parametrize(("name", "field"), [("kl_matching", "templates"), ("ash", "variant")])
def test_choices(name, field):
    for value in ("x", "", None, "P"):
        with pytest.raises(InputError, match=f"{field} is {value!r}"):
            create(name, **{field: value})


# ---- DICE and DICE + ReAct ------------------------------------------------------------------------------


@pytest.fixture
def sparse_example():
    """Head and mean feature of the vectors of DICE, and a sample with a negative entry."""
    weight = tensor([[0.5, -1, 2, 0.1], [1.5, 0.3, -0.7, 0.2], [-0.4, 0.8, 0.6, -1.2]])
    head = Head(weight, tensor([0.1, 0, -0.1]))
    train = make_bank(tensor([[0.5, 1, 0.2, 0.8]]), head, torch.tensor([0]))
    return train, head, make_bank(tensor([[1, 2, -1, 0.5]]), head)


def test_dice_of_the_second_sheet(sparse_example):
    train, head, bank = sparse_example
    detector = DICE(percentile=90).fit(train, head)
    assert detector.mask().nonzero().tolist() == [[1, 0], [2, 1]]
    detector.percentile = 50
    assert detector.mask().int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 1], [0, 1, 0, 0]]
    assert_allclose(detector.score_samples(bank), logsumexp([[-1.4, 2.2, 1.5]]), atol=1e-12)


def test_dice_react_clips_the_scored_features_only():
    train, head, bank = random_problem(5, 20, 30)
    detector = DICEReAct(percentile=40, clip=0.7).fit(train, head)
    contributions = head.weight.numpy() * train.features.numpy().mean(0)
    kept = contributions > np.percentile(contributions, 40)
    assert_array_equal(detector.mask(), kept)
    clipped = np.minimum(bank.features.numpy(), 0.7)
    expected = logsumexp(clipped @ (head.weight.numpy() * kept).T + head.bias.numpy())
    assert_allclose(detector.score_samples(bank), expected, atol=1e-12)
    assert (detector.score_samples(bank) - DICE(percentile=40).fit(train, head).score_samples(bank)).any()


def test_dice_react_has_the_settings_of_imagenet():
    assert DICEReAct().hyperparameters() == {"percentile": 10.0, "clip": 1.0}


# ---- ASH and SCALE --------------------------------------------------------------------------------------

SHAPED = tensor([[0.2, 1.5, 0, 0.9, 3, 0.4, 0.7, 1.1]])


def score_of(detector, features):
    """The score with a head that leaves the features alone, which is the logsumexp of what they become."""
    bank = FeatureBank(features, features)
    return detector.fit(bank, identity_head(features.shape[1])).score_samples(bank)


@pytest.mark.parametrize(
    ("variant", "percentile", "shaped"),
    [
        ("p", 65, [0, 1.5, 0, 0, 3, 0, 0, 1.1]),
        ("b", 65, [0, 2.6, 0, 0, 2.6, 0, 0, 2.6]),
        ("s", 65, [0, 6.039506, 0, 0, 12.079012, 0, 0, 4.428971]),
        ("s", 50, [0, 4.980175, 0, 2.988105, 9.960351, 0, 0, 3.652129]),
        ("p", 0, SHAPED[0]),
        ("p", 100, [0, 0, 0, 0, 3, 0, 0, 0]),
    ],
)
def test_ash_shapes(variant, percentile, shaped):
    detector = ASH(variant=variant, percentile=percentile)
    assert_allclose(score_of(detector, SHAPED), logsumexp([shaped]), atol=1e-6)


def test_scale_has_the_factor_of_ash_s_on_every_entry():
    for percentile, ratio in ((65, 7.8 / 5.6), (50, 7.8 / 6.5)):
        expected = logsumexp(SHAPED * np.exp(ratio))
        assert_allclose(score_of(Scale(percentile=percentile), SHAPED), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "percentile", "count"),
    [
        (342, 90, 34),  # 307.8 removed
        (342, 75, 86),  # 256.5: a half goes to the even number
        (10, 35, 6),  # 3.5
        (10, 45, 6),  # 4.5
        (500, 65.1, 174),  # 325.5, but 325.49999999999994 in floating point
        (7, 0, 7),
        (7, 99.9, 1),
        (7, 100, 1),
    ],
)
def test_number_of_entries_kept(size, percentile, count):
    features = torch.rand(3, size, generator=torch.Generator().manual_seed(0))
    assert kept_count(size, percentile) == count
    kept = features[largest_entries(features, count).mask(features)].reshape(3, count)
    assert_array_equal(kept.sort(1).values, features.sort(1).values[:, size - count :])


def test_ties_at_the_border_keep_exactly_k():
    features = tensor([[1, 1, 1, 1, 0, 0, 0, 0]])
    pruned, binarised, scaled = (score_of(ASH(variant=variant, percentile=75), features) for variant in "pbs")
    assert_allclose(pruned, np.log(2 * np.exp(1) + 6), atol=1e-12)
    assert_allclose(binarised, np.log(2 * np.exp(2) + 6), atol=1e-12)
    assert_allclose(scaled, np.log(2 * np.exp(np.exp(2)) + 6), atol=1e-12)
    assert_allclose(score_of(Scale(percentile=75), features), np.log(4 * np.exp(np.exp(2)) + 4), atol=1e-12)


@pytest.mark.parametrize("detector", [*(ASH(variant=v) for v in "pbs"), Scale()], ids=lambda d: d.label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_feature_of_zeros_scores_as_the_bias(detector, dtype, train_bank, head):
    bank = cast(make_bank(torch.zeros(2, 4, dtype=torch.float64), head), dtype)
    scores = detector.fit(train_bank, head).score_samples(bank)
    assert_allclose(scores, [logsumexp(head.bias)] * 2, rtol=1e-6)


@pytest.mark.parametrize("detector", [ASH(percentile=100), Scale(percentile=100)], ids=lambda d: d.label)
def test_a_factor_beyond_float32_is_finite(detector):
    """exp(200), of a float32 bank; beyond exp(709) float64 ends, too, and that is an error."""
    assert score_of(detector, torch.ones(1, 200)).isfinite().all()
    with pytest.raises(InputError, match="1 of samples 0 to 0 have NaN or infinite scores"):
        score_of(detector, torch.ones(1, 800))


def test_ash_is_labelled_by_its_variant():
    assert [ASH(variant=variant).label for variant in "pbs"] == ["ASH-P", "ASH-B", "ASH-S"]
    assert ASH().label == "ASH-S"


# ---- KNN ------------------------------------------------------------------------------------------------


def distances(train, bank):
    """All distances of the normalised features, sorted [N, N_train]."""
    a, b = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank.features.numpy(), train.features.numpy())
    )
    return np.sort(np.stack([np.linalg.norm(b - row, axis=1) for row in a]), axis=1)


@pytest.mark.parametrize("k", [1, 2, 5, 12, 40])
def test_knn_is_the_kth_distance_whatever_the_pieces(k, monkeypatch):
    """Blocks smaller and larger than k, shards smaller than a block, and pieces that leave a rest."""
    monkeypatch.setattr(knn_module, "CHUNK", 7)
    monkeypatch.setattr(knn_module, "BLOCK", 11)
    train, head, bank = random_problem(4, 9, 25, train=40)
    expected = -distances(train, bank)[:, k - 1]
    detector = KNN(k=k).fit(split(train, 30, 1, 9), head)
    assert_allclose(detector.score_samples(split(bank, 20, 5)), expected, atol=1e-9)


def test_knn_compares_a_chunk_with_a_block_at_a_time(monkeypatch):
    monkeypatch.setattr(knn_module, "CHUNK", 10)
    monkeypatch.setattr(knn_module, "BLOCK", 20)
    train, head, bank = random_problem(3, 5, 200, train=400)
    with LargestArray() as largest:
        KNN(k=3).fit(train, head).score_samples(bank)
    assert largest.elements <= 400 * 5  # the features themselves, far below 200 * 400 distances


def test_knn_needs_k_training_images(head, train_bank, bank):
    with pytest.raises(InputError, match="k is 4, expected at most the number of training images, 3"):
        KNN(k=4).fit(train_bank, head).score_samples(bank)
    detector = KNN(k=3).fit(train_bank, head)
    assert_allclose(detector.score_samples(bank), -distances(train_bank, bank)[:, 2], atol=1e-9)
    detector.k = 4
    with pytest.raises(InputError, match="k is 4"):
        detector.score_samples(bank)


def test_knn_of_a_training_image_and_of_its_opposite(head):
    train = make_bank(tensor([[1, 2, 3, 4], [1, 0, 0, 0]]), head)
    bank = make_bank(tensor([[2, 4, 6, 8], [-1, 0, 0, 0]]), head)
    scores = KNN(k=1).fit(train, head).score_samples(bank)
    assert scores[0] == pytest.approx(0, abs=1e-7)
    scores = KNN(k=2).fit(train, head).score_samples(bank)
    assert scores[1] == pytest.approx(-2, abs=1e-12)


def test_knn_keeps_near_duplicates_apart():
    """In float32 the cosine of the two is 1 up to 1e-6 of distance, and noise below 1e-3."""
    head = Head(torch.eye(3), torch.zeros(3))
    train = make_bank(torch.eye(3), head, torch.arange(3))
    gaps = torch.tensor([1e-3, 1e-4, 1e-5, 1e-6])
    near = torch.stack([torch.ones(4), gaps, torch.zeros(4)], dim=1)
    scores = KNN(k=1).fit(train, head).score_samples(make_bank(near, head))
    assert_allclose(scores, -gaps.double(), rtol=1e-3)


def test_knn_of_features_of_zeros_is_finite(head, train_bank):
    zeros = make_bank(torch.zeros(2, 4, dtype=torch.float64), head)
    assert KNN(k=1).fit(train_bank, head).score_samples(zeros).isfinite().all()
    assert KNN(k=1).fit(zeros, head).score_samples(train_bank).isfinite().all()


# ---- ViM ------------------------------------------------------------------------------------------------


@pytest.fixture
def vim_example():
    features = tensor([[2, 0, 1], [3, 1, 0], [0, 2, 1], [1, 3, 0], [2, 2, 2], [0, 0, 1]])
    head = Head(tensor([[1, -0.5, 0.2], [-0.4, 1, 0.1]]), tensor([0.1, -0.2]))
    queries = tensor([[2.5, 0.5, 0.5], [-1, -1, 4], [0, 0, 0]])
    return make_bank(features, head), head, make_bank(queries, head)


def test_vim_vectors(vim_example):
    train, head, bank = vim_example
    detector = ViM(dimension=1).fit(split(train, 2, 4), head)
    assert_allclose(detector.origin_, [-0.012247, 0.191182, 0.039189], atol=1e-6)
    assert_allclose(head.logits(detector.origin_), [0, 0], atol=1e-12)
    assert_allclose(sorted(detector.eigenvalues_.tolist()), [0.667437, 1.331778, 4.663210], atol=1e-6)
    moment = detector.eigenvectors_ @ detector.eigenvalues_.diag() @ detector.eigenvectors_.T
    expected = [
        [3.032807, 1.425744, 0.957474],
        [1.425744, 2.526731, 0.795922],
        [0.957474, 0.795922, 1.102887],
    ]
    assert_allclose(moment, expected, atol=1e-6)
    assert detector.alpha() == pytest.approx(1.328896, abs=1e-6)
    assert_allclose(detector.residual_norms(bank), [1.401501, 4.250400, 0.154450], atol=1e-6)
    assert_allclose(detector.score_samples(bank), [0.631614, -4.877239, 0.449107], atol=1e-6)


def test_vim_virtual_logit_has_the_mean_of_the_largest_logits(vim_example):
    train, head, _ = vim_example
    for dimension in (1, 2):
        detector = ViM(dimension=dimension).fit(train, head)
        virtual = detector.alpha() * detector.residual_norms(train)
        assert virtual.mean() == pytest.approx(float(train.logits.amax(1).mean()), abs=1e-12)


def test_vim_with_more_classes_than_features():
    """No origin has zero logits then; the least-squares one is taken."""
    train, head, bank = random_problem(12, 5, 20)
    detector = ViM().fit(train, head)
    origin = np.linalg.lstsq(head.weight.numpy(), -head.bias.numpy(), rcond=None)[0]
    assert_allclose(detector.origin_, origin, atol=1e-12)
    shifted = bank.features.numpy() - origin
    centred = train.features.numpy() - origin
    axes = np.linalg.svd(centred)[2][2:]  # beyond the 5 // 2 leading right singular vectors
    assert_allclose(detector.residual_norms(bank), np.linalg.norm(shifted @ axes.T, axis=1), atol=1e-10)


@pytest.mark.parametrize(
    ("size", "dimension"), [(342, 171), (767, 383), (768, 512), (2047, 512), (2048, 1000), (7, 3)]
)
def test_vim_default_dimension(size, dimension):
    detector = ViM()
    detector.head_ = Head(torch.zeros(2, size), torch.zeros(2))
    assert detector.dimension_ == dimension


def test_vim_needs_a_residual(vim_example):
    train, head, bank = vim_example
    detector = ViM(dimension=3).fit(train, head)
    with pytest.raises(InputError, match="dimension is 3, expected less than the 3 features"):
        detector.score_samples(bank)
    at_origin = make_bank(torch.zeros(3, 3, dtype=torch.float64), Head(head.weight, torch.zeros(2).double()))
    with pytest.raises(InputError, match="span 0 dimensions, expected more than the 1"):
        ViM(dimension=1).fit(at_origin, Head(head.weight, torch.zeros(2).double())).alpha()


def test_vim_refuses_fewer_training_images_than_its_principal_space_has_dimensions():
    """What is left over is rounding, by which alpha would be divided."""
    train, head, _ = random_problem(5, 60, 1, train=25)
    assert ViM(dimension=20).fit(train, head).alpha() > 0
    with pytest.raises(InputError, match="span 25 dimensions, expected more than the 30"):
        ViM(dimension=30).fit(train, head).alpha()


# ---- GradNorm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_gradnorm_is_the_norm_of_the_gradient(temperature):
    """Features of both signs, and the gradient of each sample by autograd."""
    train, head, bank = random_problem(6, 11, 8)
    bank = make_bank(bank.features - 0.5, head)
    expected = []
    for feature in bank.features:
        weight = head.weight.clone().requires_grad_()
        logits = weight @ feature + head.bias
        loss = -log_softmax(logits / temperature, dim=0).mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        expected.append(float(gradient.abs().sum()))
    detector = GradNorm(temperature=temperature).fit(train, head)
    assert_allclose(detector.score_samples(bank), expected, rtol=1e-12)


# ---- GEN ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "top"), [(0.1, 1), (0.1, 3), (0.5, 7), (1.0, None)])
def test_gen_by_loops(gamma, top):
    train, head, bank = random_problem(7, 9, 12)
    expected = [
        -sum((p * (1 - p)) ** gamma for p in sorted(row, reverse=True)[:top])
        for row in bank.logits.softmax(1).tolist()
    ]
    assert_allclose(GEN(gamma=gamma, top=top).fit(train, head).score_samples(bank), expected, atol=1e-12)


def test_gen_takes_a_hundred_classes_unless_told():
    train, head, bank = random_problem(130, 4, 6)
    default = GEN().fit(train, head).score_samples(bank)
    assert_array_equal(GEN(top=100).fit(train, head).score_samples(bank), default)
    assert (GEN(top=101).fit(train, head).score_samples(bank) < default).all()
    everything = GEN(top=130).fit(train, head).score_samples(bank)
    assert_array_equal(GEN(top=500).fit(train, head).score_samples(bank), everything)


def test_gen_of_predictions_that_float64_rounds_to_certain(train_bank, head):
    """Here 1 - p is 0 even in float64; only the sum of the others tells the samples apart."""
    logits = tensor([[40.0, 0, 0], [60, 0, 0], [100, 0, 0], [300, 0, 0]])
    assert (logits.softmax(1).amax(1) == 1).all()
    scores = GEN(top=1).fit(train_bank, head).score_samples(bank_of_logits(logits))
    assert (scores.diff() > 0).all()
    assert_allclose(scores, -((2 * np.exp(-logits[:, 0].numpy())) ** 0.1), rtol=1e-9)


# ---- what the data decide -------------------------------------------------------------------------------


def test_learned_values_are_those_in_use():
    train, head, _ = random_problem(5, 20, 1, train=60)
    react = ReAct(percentile=70).fit(train, head)
    assert react.learned == {"clip": react.clip_value()}
    vim = ViM().fit(train, head)
    assert vim.learned == {"dimension": 10, "alpha": vim.alpha()}
    assert KNN().fit(train, head).learned == {}
