"""An experiment as a whole: its parts fit each other, and its ablations are recipes."""

import pytest

from ood_helpers.config import load_config
from ood_helpers.errors import InputError

OUTLIERS = "outliers={name: jigsaw, images: {source: embedded, set: jigsaw}, related: [chimeras]}"
ALONE = ["networks={}", "outliers=null", "ablations={}", "detectors={msp: {}}", "tuning=null"]
UM = "networks.um={method: unleashing_mask, "


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["ood.noise.name=letters"], "the OOD set name 'letters' is taken"),
        (["ood.noise.name=tuning"], "the OOD set name 'tuning' is taken"),
        (["ood=[]"], "ood: Tuple should have at least 1 item"),
        (["id.class_names=[zero]"], "id: 1 class_names for num_classes=10"),
        (["detectors.msp.network=uum"], "detectors.msp.network names 'uum'; did you mean 'um'"),
        (["networks=null"], "detectors.msp_um.network names 'um'; valid names: dfb, flat, group"),
        ([OUTLIERS.replace("chimeras", "chimera")], "outliers.related names 'chimera'; did you mean 'chimeras'"),
        (["outliers=null"], "networks.oe.method needs auxiliary outliers, but there are none; add outliers"),
        (["published={id_set: a, architecture: b, note: c, ood_sets: {leters: x}}"], "published.ood_sets names 'leters'; did you mean 'letters'"),
        (["watched.from_scratch={architecture: resnet18_cifar, checkpoint: a.pth}"], "watched: from_scratch is a network to be trained"),
        (["id.validation=null"], "tuning needs ID images of its own; add id.validation"),
        (["tuning.grids.mps={k: [1]}"], "tuning.grids names 'mps'; did you mean 'msp'"),
        (["detectors=null"], "tuning.grids names 'gen'; valid names: none"),
        (["tuning.grids.gen={}"], "tuning.grids.gen has no values"),
        (["tuning.grids.gen={gamma: []}"], "tuning.grids.gen has no values"),
        (["tuning.related=[chimera]"], "tuning.related names 'chimera'; did you mean 'chimeras'"),
        (["tuning.related=[letters, chimeras, photographs, textures, noise]"], "tuning.related names every OOD set"),
        (["id.validation=null", *ALONE, UM + "scored_epoch: best}"], "networks.um.scored_epoch: best needs ID images of its own"),
        (["id.validation=null", *ALONE, UM + "start: best}"], "networks.um.start: best needs ID images of its own"),
        ([*ALONE, "backbone.training=null", "backbone.checkpoint=w.pth", UM + "start: best}"], "networks.um.start is best, but the backbone is not trained here"),
        (["ablations.masks.network=dbf"], "ablations.masks: network names 'dbf'; did you mean 'dfb'"),
        (["ablations.masks.vary=masks.treshold"], "ablations.masks: masks: unknown key 'treshold'; did you mean 'threshold'"),
        (["ablations.masks.values=[0.5, 2]"], "ablations.masks: masks.threshold: found 2, expected"),
        (["ablations.masks.values=[]"], "ablations.masks.values: Tuple should have at least 1 item"),
        (["ablations.masks.changes={epoch: 3}"], "ablations.masks: unknown key 'epoch'"),
        (["ablations.masks.chnges={}"], "ablations.masks: unknown key 'chnges'; did you mean 'changes'"),
        (["ablations.mine={network: um}"], "ablations.mine.vary: Field required"),
        (["ablations.number_of_groups.values=[11]"], "ablations.number_of_groups: groups.number is 11, expected at most the 10"),
        ([UM + "id_loss: cross_entropy}"], "ablations.loss_constraint: id_loss: unknown key 'constraint'"),
        ([UM + "checkpoint: um.pth}"], "ablations.loss_constraint: network names 'um', a checkpoint; name one that is trained here"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused_by_name(overrides, sentence):
    with pytest.raises(InputError, match=rf"digits\.yaml: {sentence}") as caught:
        load_config("digits", overrides=overrides)
    assert "\n" not in str(caught.value)


def test_the_best_epoch_is_possible_with_validation_images():
    assert load_config("digits", overrides=[UM + "scored_epoch: best}"]).networks["um"].scored_epoch == "best"
    assert load_config("digits", overrides=[UM + "start: best}"]).networks["um"].start == "best"
    assert load_config("digits", overrides=[UM + "start: 6}"]).networks["um"].start == 6


def test_networks_that_a_config_does_not_name_have_defaults():
    known = load_config("digits", overrides=[*ALONE, "networks.flat.mixup=0.2"]).all_networks()
    assert set(known) == {"group", "flat", "dfb"}
    assert (known["group"].groups.strategy, known["group"].groups.number) == ("kmeans", 3)  # about sqrt(10)
    assert (known["flat"].mixup, known["dfb"].method) == (0.2, "dense")
    hundred = load_config("cifar100_densenet", overrides=ALONE).all_networks()
    assert hundred["group"].groups.number == 10


def test_the_image_sets_are_those_that_are_needed():
    ood = ["letters", "chimeras", "photographs", "textures", "noise"]
    whole = load_config("digits")
    assert list(whole.sources()) == ["train", "validation", "test", "tuning", "outliers", *ood]
    assert whole.sources()["outliers"] == whole.outliers.images
    assert list(load_config("digits", overrides=ALONE).sources()) == ["train", "validation", "test", *ood]
    # outliers without a network that learns from them are not fetched
    unused = load_config("digits", overrides=[*ALONE, OUTLIERS]).sources()
    assert "outliers" not in unused


def test_nothing_means_none_or_the_defaults():
    config = load_config("digits", overrides=["ablations=null", "detectors={msp: null}", "tuning=null"])
    assert (config.ablations, config.detectors) == ({}, {"msp": {}})
    assert load_config("digits", overrides=[*ALONE[1:], "networks=null"]).networks == {}
    assert config.metrics.bootstrap_resamples == 1000


# ---- ablations --------------------------------------------------------------------------------------------


def recipes(name: str, *overrides: str):
    config = load_config("digits", overrides=overrides)
    return config.ablations[name].recipes(config.all_networks()), config.networks


def test_an_ablation_varies_one_setting_of_a_recipe():
    found, networks = recipes("keep_rate", "networks.umap.expected_accuracy=95")
    assert list(found) == [0.95, 0.9, 0.8, 0.6]
    for keep_rate, recipe in found.items():
        assert recipe.masks.keep_rate == keep_rate and recipe.expected_accuracy is None
        assert (recipe.epochs, recipe.save_every) == (5, None)  # `changes` of the ablation
        assert recipe.learning_rate == networks["umap"].learning_rate
    assert networks["umap"].masks.keep_rate == 0.8 and networks["umap"].expected_accuracy == 95


def test_an_ablation_may_change_what_it_varies():
    """Below a mapping of its changes, and into a part that the network does not have."""
    by_number, networks = recipes("number_of_groups")
    assert networks["group"].groups.strategy == "taxonomy"
    assert [(recipe.groups.strategy, recipe.groups.number) for recipe in by_number.values()] == [
        ("kmeans", number) for number in (2, 3, 5, 10)
    ]
    by_depth, networks = recipes("depth")
    assert networks["group"].images is None
    assert [recipe.depth for recipe in by_depth.values()] == list(by_depth) == [0, 1, -1]


def test_an_ablation_takes_any_kind_of_value_in_a_part_of_a_part():
    ablation = "ablations.mine={network: um, vary: id_loss, values: [um, cross_entropy]}"
    assert [recipe.id_loss.kind for recipe in recipes("mine", ablation)[0].values()] == ["um", "cross_entropy"]  # fmt: skip
    by_factor, _ = recipes("loss_constraint")
    assert [recipe.id_loss.constraint.factor for recipe in by_factor.values()] == list(by_factor)


def test_an_ablation_may_be_of_a_network_that_the_config_does_not_name():
    ablation = "ablations.mine={network: flat, vary: mixup, values: [0, 0.1]}"
    assert [recipe.mixup for recipe in recipes("mine", *ALONE, ablation)[0].values()] == [0, 0.1]


def test_an_ablation_of_lists_names_its_recipes_by_their_text():
    schedules = "[[1, 2, 3, 4, 5], [2, 4, 6, 8, 10]]"
    ablation = f"ablations.mine={{network: flat, vary: schedule, values: {schedules}}}"
    found, _ = recipes("mine", ablation)
    assert {name: recipe.schedule for name, recipe in found.items()} == {
        "[1, 2, 3, 4, 5]": (1, 2, 3, 4, 5),
        "[2, 4, 6, 8, 10]": (2, 4, 6, 8, 10),
    }


def test_an_ablation_that_no_longer_fits_can_be_left_out():
    fixed = "networks.um.id_loss.constraint=0.3"
    with pytest.raises(InputError, match=r"leave this ablation out: ablations\.loss_constraint=null"):
        load_config("digits", overrides=[fixed])
    others = [f"ablations.{name}=null" for name in ("loss_constraint", "estimate")]
    config = load_config("digits", overrides=[fixed, *others])
    assert config.networks["um"].id_loss.constraint == 0.3 and "loss_constraint" not in config.ablations
