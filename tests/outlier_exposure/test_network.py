"""Networks trained with outliers in an experiment: where they are reported, what detectors see of them, what they need."""

import pytest
from continued_examples import OOD_SETS, small

from ood_helpers import results, studies
from ood_helpers.errors import InputError, MissingDataError
from ood_helpers.experiment import Experiment

NETWORKS = "networks={ntom: {method: outlier_exposure, objective: ntom, sample: ntom, epochs: 2, batch_size: 64, save_every: 1}}"
EXPOSED = [
    "outliers={name: jigsaw, images: {source: embedded, set: jigsaw, count: 60, seed: 1}, related: [chimeras]}",
    NETWORKS,
    "detectors={msp: {}, energy: {}, energy_ntom: {detector: energy, network: ntom}, "
    "own: {detector: dfb_background, network: ntom, sigma: -1, background: log_softmax, label: own}}",
]
REPORTED = set(OOD_SETS) - {"chimeras"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Experiment:
    return small(tmp_path_factory.mktemp("exposed"), *EXPOSED)


def test_a_network_trained_with_outliers_is_not_reported_on_sets_like_them(run):
    table = run.results()
    by_method = table.groupby("method").ood_set.apply(set)
    assert by_method["Energy (ntom)"] == by_method["own"] == REPORTED
    assert by_method["Energy"] == set(OOD_SETS)
    resamples = run.resamples(table, "auroc")
    complete = {"MSP", "Energy"}
    assert set(results.rank_intervals(table, resamples, "auroc")[0].method) == complete
    pairs = results.paired_differences(table, resamples, "auroc")
    assert {*pairs.method_a, *pairs.method_b} == complete and pairs.difference.notna().all()
    assert "Energy (ntom), own: not reported on chimeras." in results.describe_table(table, "auroc")


def test_detectors_see_the_classes_alone_of_a_network_with_an_output_for_outliers(run):
    network = run.network("ntom")
    assert network.model().num_classes == 11 and network.head().num_classes == 10
    assert network.settings()["outliers"] == "jigsaw"
    along = studies.along_training(run, network)
    last = along[(along.epoch == 2) & (along.detector == "Energy")]
    assert last.id_accuracy.iloc[0] == pytest.approx(network.check_accuracy())
    assert set(last.ood_set) == REPORTED
    table = run.results(["energy_ntom"]).set_index("ood_set").auroc
    assert last.set_index("ood_set").auroc.to_dict() == pytest.approx(table.to_dict(), abs=0.02)


def test_outliers_that_are_missing_can_be_done_without(tmp_path):
    missing = f"outliers={{name: gone, images: {{source: npz, path: {tmp_path / 'gone.npz'}}}}}"
    overrides = [missing, NETWORKS, "detectors={msp: {}}"]
    with pytest.raises(MissingDataError, match=r"gone\.npz"):
        small(tmp_path, *overrides).check()
    without = small(tmp_path, *overrides, skip_missing=True)
    without.check()
    assert "outlier_exposure" not in without.training_methods()


def test_a_network_is_not_tuned_on_the_outliers_it_was_trained_with(tmp_path):
    tuning = "tuning={name: same, images: {source: embedded, set: jigsaw, count: 60, seed: 1}, grids: {react_ntom: {percentile: [80, 90]}}}"
    row = "detectors.react_ntom={detector: react, network: ntom}"
    with pytest.raises(InputError, match=r"tunes a network trained with outliers on .* of the same images"):
        small(tmp_path, *EXPOSED, row, tuning).check()
