"""The early check of rows says what the rows themselves would say."""

from dataclasses import fields

import pytest

from ood_helpers.config import config_names, load_config
from ood_helpers.config.rows import check_rows, hyperparameters
from ood_helpers.detectors import DETECTORS, create
from ood_helpers.errors import InputError


def test_the_source_names_the_hyperparameters_of_every_detector():
    known = {name: sorted(field.name for field in fields(DETECTORS[name])) for name in DETECTORS}
    assert hyperparameters() == known


@pytest.mark.parametrize("name", config_names())
def test_the_rows_of_all_configs_pass(name):
    check_rows(load_config(name))


@pytest.mark.parametrize(
    ("row", "detector", "settings"),
    [("himplos", "himplos", {"percentil": 3}), ("lime", "lime", {}), ("mine", "msp", {"t": 1})],
)
def test_the_message_is_that_of_the_detector(row, detector, settings):
    config = load_config("digits").model_copy(update={"detectors": {row: {"detector": detector, **settings}}})
    with pytest.raises(InputError) as early:
        check_rows(config)
    with pytest.raises(InputError) as late:
        create(detector, **settings)
    assert str(early.value) == f"detectors.{row}: {late.value}"
