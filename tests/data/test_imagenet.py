"""ImageNet's two numberings and its eight groups: what is known of them from the lists of MOS."""

import csv
import hashlib

import numpy as np
import pytest

from ood_helpers.data.imagenet import CLASSES_PATH, devkit_to_sorted
from ood_helpers.mos.groups import read_groups

# Runs of class numbers in each group: by sorted WordNet ids, and by devkit id - 1. The second group is the rest.
RUNS = {
    "animal": ("0-397", "0-217 223-225 382-500 600-657"),
    "artifact": ("398-414 416-918 921", None),
    "geological formation": ("970 972-976 978-980", "358-362 364-367"),
    "fungus": ("991-997", "811 877 885 892 912 955 980"),
    "misc": (
        "415 919-920 922-947 949-969 971 999",
        "228 318-325 703 733-745 753 767 770 792 797 802 805 812 815 822 829 843 858 860 863 872 884 888 899 931 946-947 "
        "952 967 973-974 991-992 998",
    ),
    "natural object": ("948 977 984 987-990 998", "317 326-331 363"),
    "person": ("981-983", "847 953 981"),
    "plant": ("985-986", "356-357"),
}
# wnid: class number, devkit id - 1, group, place in the group, column of the head
CHECKS = {
    "n01440764": (0, 448, 0, 287, 288),
    "n01751748": (65, 489, 0, 328, 329),
    "n02119789": (278, 0, 0, 0, 1),
    "n02321529": (329, 657, 0, 397, 398),
    "n02776631": (415, 703, 4, 9, 949),
    "n04263257": (809, 821, 1, 371, 771),
    "n09193705": (970, 360, 2, 2, 924),
    "n10565667": (983, 981, 6, 2, 1004),
    "n12057211": (986, 357, 7, 1, 1007),
    "n13133613": (998, 328, 5, 3, 996),
    "n15075141": (999, 888, 4, 40, 980),
}


def numbers(runs: str) -> list[int]:
    ends = [run.partition("-")[::2] for run in runs.split()]
    return [number for first, last in ends for number in range(int(first), int(last or first) + 1)]


def wordnet_ids() -> list[str]:
    with open(CLASSES_PATH, encoding="utf-8", newline="") as file:
        return [row["wnid"] for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def groups():
    return read_groups("imagenet", None, 1000)


def test_both_numberings_have_every_class_once():
    assert wordnet_ids() == sorted(set(wordnet_ids())) and len(wordnet_ids()) == 1000
    place = devkit_to_sorted()
    assert place.dtype == np.int64 and sorted(place) == list(range(1000))
    assert not (place == np.arange(1000)).any()


def test_wordnet_ids_are_those_of_timm():
    from timm.data import ImageNetInfo

    assert wordnet_ids() == ImageNetInfo().label_names()


@pytest.mark.parametrize("wnid", CHECKS)
def test_check_values(groups, wnid):
    number, devkit, group, place, column = CHECKS[wnid]
    assert wordnet_ids()[number] == wnid and devkit_to_sorted()[devkit] == number
    assert groups.group_of_class[number] == group and groups.place_in_group[number] == place
    assert groups.columns[number] == column and groups.members[group][place] == number


def test_groups_in_both_numberings(groups):
    assert groups.names == tuple(RUNS) and groups.sizes == (398, 521, 9, 7, 52, 8, 3, 2)
    devkit = np.argsort(devkit_to_sorted())
    for members, (by_wnid, by_devkit) in zip(groups.members, RUNS.values()):
        assert sorted(members) == numbers(by_wnid)
        in_devkit_order = devkit[list(members)].tolist()
        assert in_devkit_order == sorted(in_devkit_order), "the order of the columns"
        if by_devkit is not None:
            assert in_devkit_order == numbers(by_devkit)
    assert 1 + np.count_nonzero(np.diff(devkit[list(groups.members[1])]) > 1) == 41


def test_hash_of_the_group_of_each_class(groups):
    found = hashlib.sha256(groups.group_of_class.numpy().astype(np.uint8).tobytes()).hexdigest()
    assert found == "bea934dab7cfb87258aca6f826e910fe2c9843bb2fa17d5d5ca0aca8adfeb64d"
