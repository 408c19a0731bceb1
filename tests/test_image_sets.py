"""The image sets of an experiment: opened on first use, reported where missing, refused where they overlap."""

import numpy as np
import pytest
import yaml

from ood_helpers.config import ExperimentConfig, load_config
from ood_helpers.errors import InputError, MissingDataError
from ood_helpers.image_sets import ImageSets, checkpoints

CLASSES = ("ape", "bee")
SOURCES = ("train", "validation", "test", "tuning", "outliers", "plains", "leaves")  # leaves is the near one
COUNT = 200


def config_on_files() -> dict:
    """An experiment of two classes whose every set is an npz file, and whose network is a checkpoint."""
    files = {name: {"source": "npz", "path": "${data_root}/" + f"{name}.npz"} for name in SOURCES}
    return {
        "name": "animals",
        "id": {"name": "animals", "num_classes": 2, "class_names": list(CLASSES)}
        | {name: files[name] for name in ("train", "validation", "test")},
        "ood": [
            {"name": "plains", "group": "far", "images": files["plains"]},
            {"name": "leaves", "group": "near", "images": files["leaves"]},
        ],
        "transform": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        "backbone": {"architecture": "resnet18_cifar", "checkpoint": "${data_root}/weights.pth"},
        "networks": {"oe": {"method": "outlier_exposure"}},
        "detectors": {"msp": {}, "knn": {}},
        "tuning": {"name": "patches", "images": files["tuning"], "grids": {"knn": {"k": [1, 2]}}},
        "outliers": {"name": "scraps", "images": files["outliers"]},
    }


def save(data, name, images=None, labels=None, class_names=CLASSES):
    """One npz file; by default images that are in no other, and labels for ID sets."""
    if images is None:
        generator = np.random.default_rng(sorted(SOURCES).index(name))
        images = generator.integers(0, 256, (COUNT, 4, 4, 3), dtype=np.uint8)
    arrays = {"images": images}
    if name in ("train", "validation", "test"):
        arrays |= {"labels": np.arange(len(images)) % 2 if labels is None else labels}
        arrays |= {"class_names": np.array(class_names)}
    np.savez(data / f"{name}.npz", **arrays)
    return images


@pytest.fixture
def data(tmp_path):
    """A folder with every file of the experiment."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in SOURCES:
        save(folder, name)
    (folder / "weights.pth").write_bytes(b"weights")
    return folder


def read(data, changes=()) -> ExperimentConfig:
    path = data.parent / "animals.yaml"
    path.write_text(yaml.safe_dump(config_on_files()))
    return load_config(path, data, changes)


def open_sets(data, *changes, **options) -> ImageSets:
    return ImageSets(read(data, changes), data.parent / "cache", **options)


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text


def test_sets_are_opened_on_first_use(data):
    sets = open_sets(data)
    assert set(sets) == set(SOURCES) and len(sets) == 7 and sets.opened == {}
    train = sets["train"]
    assert sets["train"] is train and len(train) == COUNT and list(sets.opened) == ["train"]
    assert [sets[name].name for name in ("test", "tuning", "outliers", "plains")] == [
        "animals test",
        "patches",
        "scraps",
        "plains",
    ]
    assert sets.id_names() == ["train", "validation", "test"]


def test_a_config_names_the_sets_that_it_has(data):
    sets = open_sets(data, "id.validation=null", "tuning=null", "networks={}", "outliers=null")
    assert list(sets) == ["train", "test", "plains", "leaves"]
    assert sets.id_names() == ["train", "test"]
    assert not sets.has("tuning") and not sets.has("outliers")


def test_an_unknown_set_names_the_nearest(data):
    with pytest.raises(InputError, match="No image set 'leavs' in animals; did you mean 'leaves'"):
        open_sets(data)["leavs"]


def test_a_complete_experiment_passes(data):
    sets = open_sets(data)
    sets.check()
    assert set(sets.opened) == set(SOURCES) and sets.missing == {} and sets.missing_ood() == []
    assert sets.ood_sets() == {"leaves": "near", "plains": "far"}
    assert list(sets.ood_sets()) == ["leaves", "plains"], "near sets first"
    assert sets.has("tuning") and sets.has("outliers")


def test_every_set_has_a_line_in_the_table(data):
    table = open_sets(data).describe().set_index("set")
    assert table.group.to_dict() == {
        "animals train": "ID",
        "animals validation": "ID",
        "animals test": "ID",
        "leaves": "near",
        "plains": "far",
        "patches": "to tune on",
        "scraps": "to train with",
    }
    assert table.images.eq(COUNT).all() and table["size"].eq("4 x 4").all() and table.status.eq("ready").all()
    assert table.sha256.str.len().eq(12).all() and table.sha256.is_unique
    assert str(data / "leaves.npz") in table.source["leaves"]


# what is missing


def test_a_missing_set_is_reported_first_and_can_be_skipped(data):
    (data / "plains.npz").unlink()
    with pytest.raises(MissingDataError) as error:
        open_sets(data).check()
    text = str(error.value)
    assert str(data / "plains.npz") in text and "--skip-missing" in text and "--data-root" in text
    sets = open_sets(data, skip_missing=True)
    assert sets.ood_sets() == {"leaves": "near"}
    assert list(sets.missing) == sets.missing_ood() == ["plains"]
    line = sets.describe().set_index("set").loc["plains"]
    assert line.status == "missing, skipped" and line.images == 0 and "plains.npz" in line.source


def test_all_that_is_missing_is_named_at_once(data):
    for name in ("plains.npz", "train.npz", "tuning.npz", "weights.pth"):
        (data / name).unlink()
    with pytest.raises(MissingDataError) as error:
        open_sets(data).check()
    for name in ("plains.npz", "train.npz", "tuning.npz", "weights.pth"):
        assert str(error.value).count(str(data / name)) == 1


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_a_missing_id_set_cannot_be_skipped(data, name):
    (data / f"{name}.npz").unlink()
    with pytest.raises(MissingDataError, match=rf"{name}\.npz"):
        open_sets(data, skip_missing=True).check()


@pytest.mark.parametrize(("name", "title"), [("tuning", "patches"), ("outliers", "scraps")])
def test_outliers_can_be_skipped(data, name, title):
    (data / f"{name}.npz").unlink()
    with pytest.raises(MissingDataError, match=rf"{name}\.npz"):
        open_sets(data).check()
    sets = open_sets(data, skip_missing=True)
    assert not sets.has(name) and list(sets.missing) == [name] and sets.missing_ood() == []
    assert sets.describe().set_index("set").status[title] == "missing, skipped"


def test_one_ood_set_is_needed(data):
    for name in ("plains", "leaves"):
        (data / f"{name}.npz").unlink()
    with pytest.raises(MissingDataError, match=r"All OOD sets are missing") as error:
        open_sets(data, skip_missing=True).check()
    assert "plains.npz" in str(error.value) and "leaves.npz" in str(error.value)


def test_a_missing_checkpoint_is_reported_before_the_pass(data):
    (data / "weights.pth").unlink()
    with pytest.raises(MissingDataError, match=r"No checkpoint .*weights\.pth"):
        open_sets(data).check()
    network = "networks.oe={method: outlier_exposure, checkpoint: '${data_root}/exposed.pth'}"
    assert checkpoints(read(data, [network])) == [f"{data}/weights.pth", f"{data}/exposed.pth"]
    with pytest.raises(MissingDataError, match=r"No checkpoint .*exposed\.pth"):
        open_sets(data, network).check()


def test_nothing_is_fetched_for_a_run_that_cannot_start(tmp_path, monkeypatch):
    monkeypatch.setattr("requests.get", lambda *_, **__: pytest.fail("a download"))
    config = load_config("cifar10_densenet", tmp_path, ["backbone.checkpoint=${data_root}/mine.pth"])
    with pytest.raises(MissingDataError, match=r"No checkpoint .*mine\.pth"):
        ImageSets(config, tmp_path / "cache").check()


def test_a_checkpoint_can_be_a_download(data, monkeypatch):
    download = "backbone.checkpoint={path: '${data_root}/fetched.pth', url: 'http://127.0.0.1:9/net.pth'}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(MissingDataError, match=r"fetched\.pth is missing and could not be downloaded"):
        open_sets(data, download).check()
    (data / "weights.pth").rename(data / "fetched.pth")
    open_sets(data, download).check()


# what is wrong


def test_a_truncated_npz_is_named(data):
    content = (data / "leaves.npz").read_bytes()
    (data / "leaves.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError) as error:
        open_sets(data).check()
    assert "leaves.npz" in one_sentence(error)


def test_class_names_in_another_order_are_named(data):
    save(data, "train", class_names=("ape", "cat"))
    with pytest.raises(InputError) as error:
        open_sets(data)["train"]
    assert "has 2 classes with ('cat',) at label 1, expected 2 with ('bee',)" in one_sentence(error)
    save(data, "test", class_names=("ape", "bee", "cat"))
    with pytest.raises(InputError, match=r"has 3 classes with \('cat',\) at label 2, expected 2 with \(\)"):
        open_sets(data)["test"]


def test_labels_of_id_images_are_checked(data):
    save(data, "test", labels=np.full(COUNT, 2), class_names=("ape", "bee", "cat"))
    with pytest.raises(InputError, match="animals test has labels 2 to 2, expected 0 to 1"):
        open_sets(data)["test"]
    np.savez(data / "train.npz", images=np.zeros((3, 4, 4, 3), dtype=np.uint8))
    with pytest.raises(InputError, match="animals train has no labels"):
        open_sets(data)["train"]


@pytest.mark.parametrize(
    ("chosen_on", "reported", "sentence"),
    [
        ("tuning", "plains", r"200 of the 200 images of patches \(tuning\)"),
        ("outliers", "leaves", r"200 of the 200 images of scraps \(outliers\)"),
        ("validation", "test", r"200 of the 200 images of animals validation \(validation\)"),
        ("tuning", "test", r"200 of the 200 images of patches \(tuning\)"),
    ],
)
def test_what_is_reported_is_not_chosen_on(data, chosen_on, reported, sentence):
    save(data, chosen_on, images=save(data, reported))
    with pytest.raises(InputError, match=rf"{sentence}.*which is reported") as error:
        open_sets(data).check()
    one_sentence(error)


@pytest.mark.parametrize(("shared", "refused"), [(2, False), (3, True)])
def test_a_few_equal_images_are_overlooked(data, shared, refused):
    """One in a hundred, as public sets have some."""
    tuned_on, reported = save(data, "tuning"), save(data, "plains")
    reported[:shared] = tuned_on[:shared]
    save(data, "plains", images=reported)
    if refused:
        with pytest.raises(InputError, match="3 of the 200 images of patches"):
            open_sets(data).check()
    else:
        open_sets(data).check()


def test_a_skipped_set_overlaps_with_nothing(data):
    (data / "tuning.npz").unlink()
    open_sets(data, skip_missing=True).check()


def test_the_embedded_sets_are_apart(tmp_path):
    sets = ImageSets(load_config("digits"), tmp_path)
    assert list(sets.ood_sets()) == ["letters", "chimeras", "photographs", "textures", "noise"]
