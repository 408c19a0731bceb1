"""Models that refuse unknown keys, dotted paths into their settings, and the paths of files."""

import pytest

from ood_helpers.config import PROJECT_ROOT, Model, resolve_path
from ood_helpers.config.base import set_path, yaml_path
from ood_helpers.errors import InputError


class Part(Model):
    share: float = 0.5
    values: tuple[int, ...] = ()


class Whole(Model):
    name: str = "one"
    part: Part | None = None


def test_a_changed_model_is_another_one_and_validated():
    before = Whole(part=Part(share=0.2))
    after = before.changed({"part.values": [3], "name": "two"})
    assert after == Whole(name="two", part=Part(share=0.2, values=(3,)))
    assert before == Whole(part=Part(share=0.2))
    assert Whole().changed({"part.share": 1}) == Whole(part=Part(share=1))
    assert before.changed({"part": None}).part is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"nmae": "two"}, "unknown key 'nmae'; did you mean 'name'?"),
        ({"part.shaer": 1}, "part: unknown key 'shaer'; did you mean 'share'?"),
        ({"part.share": "all"}, r"part\.share: found 'all', expected: .*"),
        ({"part.values": [1, "x"]}, r"part\.values\.1: found 'x', expected: .*"),
        ({"name.first": "x"}, "goes below name, which is the plain value"),
    ],
)
def test_a_wrong_change_is_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}") as caught:
        Whole().changed(changes)
    assert "\n" not in str(caught.value)


def test_a_change_is_not_shared_with_the_values_it_was_given():
    """What varies one setting of a mapping must not change the mapping of the next one."""
    given = {"share": 0.1}
    changed = Whole().changed({"part": given, "part.share": 0.2})
    assert changed.part.share == 0.2 and given == {"share": 0.1}


def test_a_path_enters_lists_by_name_and_prefers_the_longest_key():
    data = {"rows": {"knn": {}, "lib.knn": {"k": 1}}, "sets": [{"name": "noise"}, {"name": "letters"}]}
    set_path(data, "rows.lib.knn.k", 3)
    set_path(data, "sets.letters.group", "far")
    set_path(data, "rows.vim.part.dimension", 5)
    assert data["rows"] == {"knn": {}, "lib.knn": {"k": 3}, "vim": {"part": {"dimension": 5}}}
    assert data["sets"] == [{"name": "noise"}, {"name": "letters", "group": "far"}]
    with pytest.raises(ValueError, match="names 'noisy'; did you mean 'noise'"):
        set_path(data, "sets.noisy.group", "far")
    with pytest.raises(ValueError, match="ends in a list"):
        set_path(data, "sets.noise", 3)


def test_relative_paths_mean_the_same_from_the_project_and_from_notebooks(monkeypatch, tmp_path):
    monkeypatch.chdir(PROJECT_ROOT / "notebooks")
    assert resolve_path("configs") == PROJECT_ROOT / "configs"
    assert resolve_path("data_that_is_not_there") == PROJECT_ROOT / "data_that_is_not_there"
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_path("configs") == tmp_path / "configs"


def test_a_yaml_file_is_found_by_its_name_or_its_path(tmp_path):
    folder = PROJECT_ROOT / "configs" / "groups"
    assert yaml_path("digits", folder, "group file") == folder / "digits.yaml"
    (tmp_path / "mine.yml").touch()
    assert yaml_path(tmp_path / "mine.yml", folder, "group file") == tmp_path / "mine.yml"
    with pytest.raises(InputError, match="No group file 'digit' in configs/groups/; did you mean 'digits'"):
        yaml_path("digit", folder, "group file")
    with pytest.raises(InputError, match=r"No group file .*other\.yml; give a path .* a name: cifar10, "):
        yaml_path(tmp_path / "other.yml", folder, "group file")
