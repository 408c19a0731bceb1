"""Groups: the layout of a group softmax, its probabilities and predictions, group files, k-means and random groups."""

import itertools
import re

import numpy as np
import pytest
import torch
import yaml

from ood_helpers.config import load_config
from ood_helpers.errors import InputError
from ood_helpers.mos.groups import (
    GroupHead,
    Groups,
    kmeans_groups,
    make_groups,
    random_groups,
    read_groups,
)
from ood_helpers.mos.recipe import GROUP_DIRECTORY, KMeansGroups, RandomGroups, TaxonomyGroups

SMALL = Groups(("first", "second"), ((0, 1, 2), (3, 4)))
LOGITS = [
    [-2, 4, 1, 0, 3, -1, 0],
    [3, 0.5, 0, -0.5, 2, 0, -1],
    [2, 0, 0, 0, -1, 0.5, 3],
]
IMAGENET_SIZES = (398, 521, 9, 7, 52, 8, 3, 2)
# Superclass of each class of CIFAR-100, both in the sorted order of their names (but vehicles 1 before vehicles 2).
CIFAR100_SUPERCLASSES = [
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7),
    *(6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10),
    *(16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16),
    *(12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
]


def test_small_example():
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    others = torch.tensor(
        [[0.002315, 0.936240], [0.860534, 0.843795], [0.711235, 0.016645]], dtype=torch.float64
    )
    log_odds = torch.tensor(
        [[6.065884, -2.686738], [-1.819730, -1.686738], [-0.901388, 4.078890]], dtype=torch.float64
    )
    best = torch.tensor(
        [[0.934072, 0.046613], [0.070637, 0.114195], [0.096255, 0.908760]], dtype=torch.float64
    )
    close = {"rtol": 0, "atol": 6e-7}
    torch.testing.assert_close(SMALL.others_probability(logits), others, **close)
    torch.testing.assert_close(SMALL.log_odds(logits), log_odds, **close)
    probabilities = SMALL.log_softmax(logits).exp()
    torch.testing.assert_close(probabilities[:, SMALL.others], others, **close)
    found = torch.stack([probabilities[:, 1:4].amax(dim=1), probabilities[:, 5:].amax(dim=1)], dim=1)
    torch.testing.assert_close(found, best, **close)
    assert SMALL.classify(logits).tolist() == [0, 3, 4]
    assert SMALL.targets(torch.tensor([0, 2, 4])).tolist() == [[1, 0], [3, 0], [0, 2]]


def test_untrained_head_of_imagenet():
    starts = np.cumsum((0, *IMAGENET_SIZES))
    members = tuple(tuple(range(start, end)) for start, end in itertools.pairwise(starts))
    groups = Groups(tuple("abcdefgh"), members)
    assert (groups.num_classes, groups.num_groups, groups.num_logits) == (1000, 8, 1008)
    assert groups.slices == [
        *((0, 399), (399, 921), (921, 931), (931, 939)),
        *((939, 992), (992, 1001), (1001, 1005), (1005, 1008)),
    ]
    logits = torch.zeros(1, 1008)
    expected = [0.002506, 0.001916, 0.1, 0.125, 0.018868, 0.111111, 0.25, 0.333333]
    torch.testing.assert_close(groups.others_probability(logits), torch.tensor([expected]), rtol=0, atol=6e-7)
    assert groups.classify(logits).item() == members[7][0]
    others = groups.log_softmax(logits)[0, groups.others]
    assert float(-others.sum()) == pytest.approx(25.281079, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_columns_and_targets_one_by_one(seed):
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(23).tolist()
    members = tuple(tuple(shuffled[a:b]) for a, b in ((0, 1), (1, 12), (12, 17), (17, 23)))
    groups = Groups(("a", "b", "c", "d"), members)
    column = 0
    for group, classes in enumerate(members):
        start, end = groups.slices[group]
        assert start == column == groups.others[group] and end - start == len(classes) + 1
        for place, number in enumerate(classes):
            assert groups.columns[number] == column + 1 + place
            assert groups.group_of_class[number] == group and groups.place_in_group[number] == place
            targets = [0, 0, 0, 0]
            targets[group] = place + 1
            assert groups.targets(torch.tensor([number])).tolist() == [targets]
        column += len(classes) + 1
    assert column == groups.num_logits and groups.sizes == tuple(map(len, members))
    for tensor in (groups.others, groups.columns, groups.group_of_class, groups.place_in_group):
        assert tensor.dtype == torch.int64


@pytest.mark.parametrize("seed", range(3))
def test_against_a_softmax_of_each_slice(seed):
    groups = random_groups(23, 4, seed)
    logits = 5 * torch.randn(50, 27, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    slices = [torch.softmax(logits[:, start:end], dim=1) for start, end in groups.slices]
    torch.testing.assert_close(groups.log_softmax(logits).exp(), torch.cat(slices, dim=1))
    others = torch.stack([part[:, 0] for part in slices], dim=1)
    torch.testing.assert_close(groups.others_probability(logits), others)
    torch.testing.assert_close(1 / (1 + groups.log_odds(logits).exp()), others)
    for row, prediction in enumerate(groups.classify(logits).tolist()):
        of_class = {
            number: float(slices[group][row, 1 + place])
            for group, members in enumerate(groups.members)
            for place, number in enumerate(members)
        }
        assert of_class[prediction] == max(of_class.values())


def test_predictions_are_not_renormalised():
    # "others" has 0.6 of the first group, whose only class would get 1 without it.
    groups = Groups(("a", "b"), ((0,), (1, 2)))
    probabilities = torch.tensor([[0.6, 0.4, 0.1, 0.45, 0.45]])
    assert groups.classify(probabilities.log()).item() == 1


def test_ties_go_to_the_first_column():
    assert Groups(("a", "b"), ((3, 0), (2, 1))).classify(torch.zeros(1, 6)).item() == 3


def test_gradient_is_that_of_a_softmax_of_each_slice():
    groups = random_groups(9, 3, 0)
    logits = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (groups.log_softmax(ours) * weights).sum().backward()
    parts = [torch.log_softmax(theirs[:, start:end], dim=1) for start, end in groups.slices]
    (torch.cat(parts, dim=1) * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradient_after_a_first_use_without_gradients():
    groups = random_groups(9, 3, 0)
    logits = torch.zeros(1, 12, requires_grad=True)
    with torch.inference_mode():
        groups.classify(logits)
        groups.targets(torch.tensor([0]))
    (groups.log_softmax(logits)[:, groups.columns].sum() + groups.log_odds(logits).sum()).backward()
    assert logits.grad.isfinite().all()


def test_confident_float32_logits_do_not_tie():
    groups = Groups(("a",), ((0, 1, 2),))
    logits = torch.tensor([[-20.0, 0, 0, 0], [-24.0, 0, 0, 0], [20.0, 0, 0, 0], [24.0, 0, 0, 0]])
    log_odds = groups.log_odds(logits)
    assert log_odds.dtype == torch.float32 and len(log_odds.unique()) == 4
    torch.testing.assert_close(log_odds[:, 0], torch.tensor([20, 24, -20, -24]) + np.log(3))
    assert groups.others_probability(logits)[2:].eq(1).all(), "where the probabilities themselves tie"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_logits(dtype):
    logits = torch.tensor(LOGITS, dtype=dtype).sign() * 1e4
    assert SMALL.log_odds(logits).isfinite().all() and SMALL.log_softmax(logits).isfinite().all()
    found = SMALL.log_softmax(logits).exp()
    torch.testing.assert_close(found[0], torch.tensor([0, 0.5, 0.5, 0, 1, 0, 0], dtype=dtype))
    assert SMALL.classify(logits)[0] == 0 and found.dtype == dtype


def test_the_largest_probability_is_found_where_float32_rounds_to_one():
    logits = torch.tensor([[0, 30, 0, 0, 0, 31, 0], [0, 31, 0, 0, 0, 30, 0]], dtype=torch.float32)
    assert SMALL.log_softmax(logits)[:, [1, 5]].exp().eq(1).all()
    assert SMALL.classify(logits).tolist() == [3, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu():
    groups = random_groups(1000, 8, 0)
    logits = 5 * torch.randn(64, 1008, generator=torch.Generator().manual_seed(0))
    for method in (groups.log_softmax, groups.log_odds):
        on_cuda = method(logits.cuda())
        assert on_cuda.is_cuda
        torch.testing.assert_close(on_cuda.cpu(), method(logits), rtol=1e-5, atol=1e-5)
    labels = torch.arange(64)
    assert torch.equal(groups.targets(labels.cuda()).cpu(), groups.targets(labels))
    assert torch.equal(groups.classify(logits.cuda()).cpu(), groups.classify(logits))


@pytest.mark.parametrize(
    ("names", "members", "message"),
    [
        (("a", "b"), ((0, 1), (1, 2)), "Class 1 is listed twice .*'a' and 'b'.* remove one"),
        (("a", "b"), ((0, 0), (1,)), "Class 0 is listed twice .*'a'"),
        (("a", "b"), ((0,), ()), "group 'b' has no class"),
        (("a", "b"), ((0,), (2,)), "have 2 classes, numbered 0 to 2, expected 0, 1, ... without a gap"),
        (("a",), ((-1, 0),), "numbered -1 to 0"),
        (("a", "a"), ((0,), (1,)), "2 groups are named a, a; give each a name of its own"),
        (("a",), ((0,), (1,)), "2 groups are named a;"),
    ],
)
def test_every_class_is_in_one_group(names, members, message):
    with pytest.raises(InputError, match=message):
        Groups(names, members)


def test_head_and_groups_fit():
    groups = Groups(("one", "two"), ((0,), (1, 2)))
    with pytest.raises(InputError, match="3 logits, expected 5 for 3 classes in 2 groups"):
        GroupHead(torch.zeros(3, 2), torch.zeros(3), groups)
    head = GroupHead(torch.zeros(5, 2), torch.zeros(5), groups).to(torch.float64)
    assert (head.num_logits, head.num_classes, head.groups) == (5, 3, groups)
    assert head.classify(torch.tensor([[0, 1.0, 0, 0, 3]])).tolist() == [2]


# ---- group files ----------------------------------------------------------------------------------------


def write(tmp_path, text):
    (tmp_path / "some.yaml").write_text(text, encoding="utf-8")
    return tmp_path / "some.yaml"


def test_classes_by_name_or_number_in_the_listed_order(tmp_path):
    path = write(tmp_path, "source: here\ngroups:\n  b: [frog, 0]\n  a: ['2']\n")
    groups = read_groups(path, ["cat", "frog", "2"], 3)
    assert groups == Groups(("b", "a"), ((1, 0), (2,)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("groups: {a: [cat, frgo], b: [dog]}", r"some\.yaml names the class 'frgo'; did you mean 'frog'\?"),
        ("groups: {a: [cat, 3], b: [dog]}", "has the class number 3, expected 0 to 2; correct it"),
        ("groups: {a: [cat, -1], b: [dog]}", "has the class number -1"),
        ("groups: {a: [cat], b: [dog]}", "leaves out 1 of the 3 classes, the first is 'frog'; add them"),
        ("groups: {a: [cat, dog], b: [frog, 1]}", r"some\.yaml: Class 1 is listed twice"),
        ("groups: {a: [cat, frog, dog], b: []}", r"some\.yaml: The group 'b' has no class"),
        ("groups: {a: cat, b: [frog, dog]}", "holds no groups; expected a mapping `groups`"),
        ("source: here", "holds no groups"),
        ("groups: [a, b]", "holds no groups"),
        ("- a", "holds no groups"),
        ("groups: {a: [[cat]]}", r"names the class \['cat'\]"),
        ("groups: {a: [cat", "is not valid YAML"),
    ],
)
def test_errors_of_group_files(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_groups(write(tmp_path, text), ["cat", "dog", "frog"], 3)


def test_classes_without_names_are_given_by_number(tmp_path):
    path = write(tmp_path, "groups: {a: [1], b: [0]}")
    assert read_groups(path, None, 2).members == ((1,), (0,))
    with pytest.raises(InputError, match="leaves out 1 of the 3 classes, the first is 2;"):
        read_groups(path, None, 3)
    with pytest.raises(InputError, match="'cat'; the ID set has no class names, so give its number"):
        read_groups(write(tmp_path, "groups: {a: [cat], b: [0]}"), None, 2)


def test_unknown_group_files(tmp_path):
    with pytest.raises(
        InputError, match=r"No group file 'cifar' in configs/groups/; did you mean 'cifar100?'\?"
    ):
        read_groups("cifar", None, 10)
    with pytest.raises(InputError, match=re.escape(f"No group file {tmp_path / 'none.yaml'}; give a path")):
        read_groups(tmp_path / "none.yaml", None, 10)


@pytest.mark.parametrize(
    ("name", "config", "members"),
    [
        ("digits", "digits", ((0, 6, 8, 9), (1, 4, 7), (2, 3, 5))),
        ("cifar10", "cifar10_npz", ((2, 3, 4, 5, 6, 7), (0, 1, 8, 9))),
    ],
)
def test_shipped_groups_with_the_class_names_of_their_configs(name, config, members):
    names = load_config(config).id.class_names
    assert read_groups(name, names, 10).members == members


def test_superclasses_of_cifar100():
    listed = yaml.safe_load((GROUP_DIRECTORY / "cifar100.yaml").read_text())["groups"]
    names = sorted(name for classes in listed.values() for name in classes)
    groups = read_groups("cifar100", names, 100)
    assert groups.sizes == (5,) * 20 and groups.group_of_class.tolist() == CIFAR100_SUPERCLASSES


def test_superclasses_of_the_real_cifar100(shared):
    with np.load(shared / "data" / "ood" / "cifar100_test.npz") as data:
        names, fine, coarse = (data[key] for key in ("class_names", "labels", "coarse_labels"))
    groups = read_groups("cifar100", names.tolist(), 100)
    assert np.array_equal(groups.group_of_class[fine], coarse)


def test_shipped_group_files_name_their_source():
    names = sorted(path.stem for path in GROUP_DIRECTORY.glob("*.yaml"))
    assert names == ["cifar10", "cifar100", "digits", "imagenet"]
    for name in names:
        content = yaml.safe_load((GROUP_DIRECTORY / f"{name}.yaml").read_text())
        assert list(content) == ["source", "groups"] and content["source"]


# ---- k-means and random groups --------------------------------------------------------------------------


def test_kmeans_finds_planted_clusters():
    planted = torch.tensor([2, 0, 1, 0, 2, 1, 1, 0])
    centres = torch.tensor([[10.0, 0, 0], [0, 10, 0], [0, 0, 10]])
    means = centres[planted] + torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    groups = kmeans_groups(means, 3, seed=0)
    assert groups.names == ("cluster 1", "cluster 2", "cluster 3")
    assert groups.members == ((0, 4), (1, 3, 7), (2, 5, 6)), "by their smallest class"
    assert kmeans_groups(means, 3, seed=5) == groups


def test_kmeans_is_the_same_for_the_same_seed():
    means = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
    assert kmeans_groups(means, 7, seed=3) == kmeans_groups(means, 7, seed=3)


def test_kmeans_refuses_empty_clusters():
    with pytest.raises(InputError, match="5 groups of 4 classes would leave some empty"):
        kmeans_groups(torch.rand(4, 2), 5, seed=0)
    with pytest.raises(InputError, match="3 clusters of 2 different class means"):
        kmeans_groups(torch.tensor([[0.0, 0], [1, 1], [0, 0], [1, 1]]), 3, seed=0)


@pytest.mark.parametrize(("number", "sizes"), [(1, {10}), (3, {3, 4}), (5, {2}), (10, {1})])
def test_random_groups_are_even(number, sizes):
    groups = random_groups(10, number, seed=0)
    assert groups.num_groups == number and set(groups.sizes) == sizes and groups.num_classes == 10
    assert groups.names[0] == "random 1" and all(list(group) == sorted(group) for group in groups.members)


def test_random_groups_depend_on_the_seed_only():
    assert random_groups(100, 8, 0) == random_groups(100, 8, 0) != random_groups(100, 8, 1)
    with pytest.raises(InputError, match=r"11 groups of 10 classes.* lower number"):
        random_groups(10, 11, 0)


def test_strategies_of_a_config():
    means = torch.rand(10, 4, generator=torch.Generator().manual_seed(0))
    names = load_config("cifar10_npz").id.class_names

    def never():
        raise AssertionError("only k-means needs the features")

    taxonomy = make_groups(TaxonomyGroups(strategy="taxonomy", file="cifar10"), names, 10, never)
    assert taxonomy.names == ("animals", "vehicles")
    random = make_groups(RandomGroups(strategy="random", number=3, seed=4), names, 10, never)
    assert random == random_groups(10, 3, 4)
    kmeans = make_groups(KMeansGroups(strategy="kmeans", number=3, seed=4), names, 10, lambda: means)
    assert kmeans == kmeans_groups(means, 3, 4)
