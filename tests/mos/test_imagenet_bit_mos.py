"""The config imagenet_bit_mos as it is shipped, on a data root with a small image of every class and a BiT of one unit a
block: the devkit's order in lists and heads, the authors' checkpoints, the published values beside the results."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from ood_helpers.backbones import BiT
from ood_helpers.backbones.bit import UNITS
from ood_helpers.banks import HeadBank, StoredBank
from ood_helpers.data.imagenet import devkit_to_sorted
from ood_helpers.errors import InputError
from ood_helpers.experiment import Experiment
from ood_helpers.mos.groups import read_groups

SIDE = 32
OVERRIDES = [
    f"transform.resize=[{SIDE}, {SIDE}]",
    "features.workers=0",
    "features.batch_size=250",
    "metrics.bootstrap_resamples=20",
]
OOD_FOLDERS = ("iNaturalist/images", "SUN/images", "Places/images", "Textures/images/banded")
OTHERS = [0, 399, 921, 931, 939, 992, 1001, 1005]  # columns of the authors' group head
FLAT, GROUP = (f"checkpoints/BiT-S-R101x1-{kind}-finetune.pth.tar" for kind in ("flat", "group"))


@pytest.fixture(scope="module", autouse=True)
def one_unit_a_block():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(UNITS, 101, (1, 1, 1, 1))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_unit_a_block):
    """A data root as the config describes it, whose heads are right on three of four test images."""
    folder = tmp_path_factory.mktemp("imagenet_bit_mos")
    write_images(folder)
    (folder / "checkpoints").mkdir()
    torch.manual_seed(0)
    state = BiT(1000).state_dict()
    arrays = {name: value.permute(2, 3, 1, 0) if value.ndim == 4 else value for name, value in state.items()}
    np.savez(folder / "checkpoints/BiT-S-R101x1.npz", **arrays)
    backbone = open_on(folder, "networks={}", "detectors={msp: {}}")
    # As the list's lines, its rows are in the devkit's order.
    weight, bias = nearest_image_head(backbone.bank("train").load().features)
    save_authors(folder / FLAT, state | {"head.weight": weight, "head.bias": bias})
    columns = group_columns()
    group = {
        "head.weight": torch.zeros(1008, weight.shape[1]).index_copy(0, columns, weight),
        "head.bias": torch.zeros(1008).index_copy(0, columns, bias),
    }
    save_authors(folder / GROUP, state | group)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return open_on(folder)


def open_on(folder, *overrides):
    places = {"run_dir": str(folder / "runs"), "figures_dir": str(folder / "figures")}
    return Experiment.open(
        "imagenet_bit_mos", data_root=str(folder), **places, overrides=[*OVERRIDES, *overrides], device="cpu"
    )


def write_images(folder):
    """A random pattern a class, in the lists by devkit number; every fourth test image shows the next class."""
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 256, (1000, 8, 8, 3))
    images, ood = folder / "dataset/id_data/ILSVRC-2012", folder / "dataset/ood_data"
    lines = {}
    for split in ("train", "val"):
        (images / split).mkdir(parents=True)
        lines[split] = "".join(f"{split}/{number}.png {number}\n" for number in range(1000))
        for number in range(1000):
            shown = number + 1 if split == "val" and number % 4 == 0 else number
            noise = generator.integers(-3, 4, (8, 8, 3))
            write_image(images / f"{split}/{number}.png", patterns[shown] + noise)
    lists = folder / "data_lists"
    lists.mkdir()
    (lists / "imagenet2012_train_list.txt").write_text(lines["train"])
    # The first 1,000 are validation images, here those of training: no method below looks at them.
    (lists / "imagenet2012_val_list.txt").write_text(lines["train"] + lines["val"])
    for place in OOD_FOLDERS:
        (ood / place).mkdir(parents=True)
        for number in range(8):
            write_image(ood / place / f"{number}.png", generator.integers(0, 256, (8, 8, 3)))
    (ood / "Textures/images/banded/.directory").write_text("in DTD's archive, not an image")


def write_image(path, pattern):
    pixels = np.clip(pattern, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST).save(path)


def nearest_image_head(features):
    """Weight and bias with a logit of 10 for the image a row was made of and less than 0 for images far from it."""
    mean, std = features.mean(dim=0), features.std(dim=0)
    standard = (features - mean) / std
    squared = standard.square().sum(dim=1, keepdim=True)
    weight = 20 * standard / squared / std
    return weight, -10 - weight @ mean


def group_columns():
    """Column [1000] in the authors' group head of each class of the devkit: in a group, they are in its order."""
    place = devkit_to_sorted()
    groups = read_groups("imagenet", None, 1000)
    columns = torch.empty(1000, dtype=torch.int64)
    for others, members in zip(OTHERS, groups.members):
        numbers = np.flatnonzero(np.isin(place, members))
        columns[numbers] = others + 1 + torch.arange(len(numbers))
    return columns


def save_authors(path, state):
    """A checkpoint of the code of MOS, with its names."""
    names = {
        r"^(block\d)\.blocks\.0\.": r"body.\1.unit01.",
        r"\.norm(\d)": r".gn\1",
        r"downsample\.conv": "downsample",
        r"^norm": "before_head.gn",
        r"^head": "head.conv",
    }
    model = {}
    for name, tensor in state.items():
        new = name
        for ours, theirs in names.items():
            new = re.sub(ours, theirs, new)
        model[f"module.{new}"] = tensor[:, :, None, None] if name == "head.weight" else tensor
    torch.save({"step": 20_000, "model": model, "optim": {}}, path)


def test_sets_are_those_of_the_lists_in_torchvisions_order(run):
    run.check()
    assert {name: len(run.image_set(name)) for name in run.context.image_sets.id_names()} == dict.fromkeys(
        run.context.image_sets.id_names(), 1000
    )
    assert run.image_set("test").files[0] == "val/0.png"
    assert run.image_set("test").labels[[0, 448]].tolist() == [278, 0]  # n02119789, n01440764
    assert [len(run.image_set(name)) for name in run.ood_sets()] == [8, 8, 8, 8]


@pytest.mark.parametrize("name", ["flat", "group"])
def test_checkpoints_share_the_banks_and_are_as_accurate_as_expected(run, name):
    network = run.network(name)
    assert network.shares_features() and isinstance(network.bank("test"), HeadBank)
    assert network.bank("SUN").bank is run.bank("SUN")
    assert network.check_accuracy() == 75 == run.config.networks[name].expected_accuracy


@pytest.mark.parametrize(
    ("override", "row", "network"),
    [
        ("networks.flat.class_numbering=as_is", "msp", "flat"),
        ("id.test.class_numbering=as_is", "msp", "flat"),
        ("id.test.class_numbering=as_is", "mos", "group"),
    ],
)
def test_the_guard_catches_the_wrong_class_numbering(folder, override, row, network):
    wrong = open_on(folder, override, "id.test.subset={after: 1900}")
    message = rf"network {network} of imagenet_bit_mos is 0\.\d\d %, expected 75\.00 ± 3\.00 %: check the label order"
    with pytest.raises(InputError, match=message):
        wrong.results([row])


def test_a_checkpoint_with_other_backbone_weights_has_banks_of_its_own(folder, run):
    path = folder / "checkpoints/other.pth.tar"
    state = run.network("flat").model().state_dict()
    save_authors(path, state | {"norm.weight": 2 * state["norm.weight"], "norm.bias": 2 * state["norm.bias"]})
    network = open_on(folder, f"networks.flat.checkpoint={path}").network("flat")
    assert not network.shares_features()
    own, shared = network.bank("SUN"), run.bank("SUN")
    assert isinstance(own, StoredBank) and own.key != shared.key
    torch.testing.assert_close(own.load().features, 2 * shared.load().features)


def test_group_head_has_the_authors_layout(run):
    network = run.network("group")
    assert network.groups().others.tolist() == OTHERS and network.head().num_logits == 1008
    assert network.groups().names[0] == "animal" and network.groups().names[7] == "plant"
    logits = network.bank("test").load().logits.double()
    ends = [*OTHERS[1:], 1008]
    others = [logits[:, start:end].softmax(dim=1)[:, 0] for start, end in zip(OTHERS, ends)]
    # Orders as the paper's score does.
    expected = -torch.stack(others, dim=1).amin(dim=1)
    scores = torch.from_numpy(run.scores("mos")[0])
    torch.testing.assert_close(-1 / (1 + scores.exp()), expected)


def test_rows_stand_beside_the_published_ones(run):
    # The ensemble passes all images again, many times.
    rows = [row for row in run.rows() if row != "mahalanobis_ensemble"]
    table = run.results(rows)
    assert table.id_accuracy.eq(75).all() and table.n_id.eq(1000).all() and table.n_ood.eq(8).all()
    table = table.set_index(["method", "ood_set"])
    published = table.published_fpr95.unstack()[["iNaturalist", "SUN", "Places", "Textures"]]
    assert published.loc["MOS"].tolist() == [9.28, 40.63, 49.54, 60.43]
    assert published.loc["MSP"].tolist() == [63.69, 79.98, 81.44, 82.73]
    assert published.loc["KL matching"].tolist() == [27.36, 67.52, 72.61, 49.70]
    assert published.loc["KL matching (train)"].isna().all()
    assert table.published_auroc["MOS", "iNaturalist"] == 98.15
    leaks = table.tuned_on.fillna("").str.contains("leak").groupby("method").all()
    assert leaks[leaks].index.tolist() == ["KL matching"]
    assert "labelled ID test set" in table.tuned_on["KL matching", "SUN"]
