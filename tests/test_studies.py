"""Studies: sweeps, sample sizes, comparisons of networks, and the means over OOD sets."""

import numpy as np
import pytest
from small_experiments import small

from ood_helpers import studies
from ood_helpers.detectors.energy import Energy
from ood_helpers.detectors.max_logit import MaxLogit
from ood_helpers.detectors.msp import MSP
from ood_helpers.errors import InputError


def test_a_sweep_scores_each_setting_and_leaves_the_detector_alone(finished):
    folder, table = finished
    run = small(folder)
    swept = studies.sweep(run, "line", {"delta": [1.0, None], "weight_percentile": [90.0]})
    assert swept.delta.tolist() == [1.0] * 5 + [None] * 5
    expected = table[table.method == "LINe"]
    assert swept.fpr95[:5].tolist() == expected.fpr95.tolist()
    assert swept.auroc[5:].tolist() != swept.auroc[:5].tolist()
    assert run.detector("line").delta == 1.0
    with pytest.raises(InputError, match="LINe has no hyper-parameter 'delte'; did you mean 'delta'"):
        studies.sweep(run, "line", {"delte": [1.0]})


def test_a_sweep_over_one_rule_switches_the_other_off(finished):
    run = small(finished[0], "react.clip=1.0", "react.percentile=null")
    assert studies.sweep(run, "react", {"percentile": [90.0]}).percentile.tolist() == [90.0] * 5


def test_a_comparison_is_the_result_of_the_detector(finished):
    folder, table = finished
    compared = studies.compare(small(folder), Energy()).set_index("ood_set")
    expected = table[table.method == "Energy"].set_index("ood_set")
    assert compared.auroc.to_dict() == expected.auroc.to_dict()


def test_sample_sizes_end_in_the_result_of_all_training_images(finished):
    folder, table = finished
    samples = studies.sample_size(small(folder), ["himplos", "energy"], [2, 1000], draws=2)
    assert len(samples) == 8 and samples.groupby(["method", "images_per_class"]).draw.nunique().eq(2).all()
    for method in ("HIMPLoS", "Energy"):
        expected = table[table.method == method].fpr95.mean()
        found = samples[samples.method == method]
        assert found[found.images_per_class == 1000].fpr95.tolist() == pytest.approx([expected] * 2, abs=0.3)
    few = samples[(samples.method == "HIMPLoS") & (samples.images_per_class == 2)]
    assert few.auroc.nunique() == 2  # two draws, two sets of prototypes
    refused = studies.sample_size(small(folder), ["vim"], [1], draws=1)  # vim refuses 10 images
    assert refused.fpr95.isna().all() and "ViM" in refused.refused[0]


def test_parts_of_a_method_learn_from_the_subset_too(finished):
    host = "detectors.dfb_knn={detector: dfb, host: {detector: knn, k: 1}}"
    samples = studies.sample_size(small(finished[0], host), ["dfb_knn"], [2, 30], draws=2)
    assert samples.auroc.nunique() == 4


def test_each_label_along_a_training_is_of_its_own_detector(finished):
    run = small(finished[0], "networks.um.save_every=1")
    network, kinds = run.network("um"), {"msp": MSP(), "max": MaxLogit()}
    first = studies.along_training(run, network, 20, kinds)
    swapped = studies.along_training(run, network, 20, {"msp": kinds["max"], "max": kinds["msp"]})
    of_msp = first[first.detector == "msp"].auroc.tolist()
    assert of_msp == swapped[swapped.detector == "max"].auroc.tolist()
    assert of_msp != swapped[swapped.detector == "msp"].auroc.tolist()


def test_means_are_over_the_sets_that_a_row_is_reported_on(finished):
    folder, table = finished
    run = small(folder)
    means = studies.collect_means(run, table).set_index(["method", "ood_sets"])
    of_line = table[table.method == "LINe"]
    all_sets = "; ".join(of_line.ood_set)
    tuned_sets = "; ".join(name for name in of_line.ood_set if name != "chimeras")
    assert means.loc[("LINe", all_sets), "auroc"] == pytest.approx(of_line.auroc.mean(), abs=1e-3)
    expected = of_line[of_line.ood_set != "chimeras"].auroc.mean()
    assert means.loc[("LINe", tuned_sets), "auroc"] == pytest.approx(expected, abs=1e-3)
    assert ("LINe (tuned)", tuned_sets) in means.index and ("LINe (tuned)", all_sets) not in means.index


def test_networks_are_compared_by_the_same_detector(finished):
    run = small(finished[0])
    recipe = run.network("flat").recipe
    recipes = {"as configured": recipe, "once as long": recipe.changed({"schedule": [20, 40, 60, 80, 100]})}
    table, means = studies.compare_networks(run, recipes)
    own = run.results(["msp_flat"])
    assert table[table.method == "as configured"].auroc.tolist() == own.auroc.tolist()
    assert set(means.method) == set(recipes) and np.isfinite(means.auroc).all()


def test_banks_are_described(finished):
    table = studies.describe_banks(small(finished[0])).set_index("set")
    assert table.images["letters"] == 80 and table.features.nunique() == 1
    assert "jigsaw digits" in table.index
