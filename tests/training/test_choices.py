"""What people choose is kept under ids of content, line by line, and becomes pairs."""

from __future__ import annotations

import json

import pytest

from diffalign.training.choices import Choices, read_groups
from diffalign.training.data import read_pairs
from tests.training.test_data import write_image


@pytest.fixture
def folder(tmp_path):
    """Two prompts of three images each, and one of a single image."""
    lines = []
    for i in range(7):
        write_image(tmp_path / f"{i}.png", 30 * i, (8, 8))
        lines.append({"prompt": f"prompt {i // 3}", "image": f"{i}.png", "right": True})
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def ids(choices: Choices) -> list[tuple[str, list[str]]]:
    return [(group.id, list(group.images)) for group in choices.groups.values()]


def written(folder) -> list[tuple[str, str]]:
    return [(pair.winner.name, pair.loser.name) for pair in read_pairs(folder)[0]]


def test_choices_become_pairs(folder):
    choices = Choices(folder)
    (first, one), (second, two) = ids(choices)
    choices.choose(first, "ada", one[1])
    choices.choose(second, "ada", two[2], over=[two[0]])
    assert choices.write_pairs() == 3
    assert written(folder) == [("1.png", "0.png"), ("1.png", "2.png"), ("5.png", "3.png")]
    choices.write_pairs({"5.png": "a star"})
    assert [(pair.winner_caption, pair.loser_caption) for pair in read_pairs(folder)[0]][2] == ("a star", None)


def test_the_last_choice_counts_and_people_who_disagree_give_both_pairs(folder):
    choices = Choices(folder)
    first, one = ids(choices)[0]
    choices.choose(first, "ada", one[0])
    choices.choose(first, "ada", one[1], over=[one[0]])
    choices.choose(first, "bob", one[0], over=[one[1]])
    choices.write_pairs()
    assert written(folder) == [("1.png", "0.png"), ("0.png", "1.png")]
    choices.choose(first, "ada", None)
    choices.choose(first, "bob", None)
    assert [group.prompt for group in choices.left("ada")] == ["prompt 1"]
    assert len(choices.left("eve")) == 2
    with pytest.raises(ValueError, match="choose first"):
        choices.write_pairs()
    assert written(folder) == [("1.png", "0.png"), ("0.png", "1.png")]  # as it was


def test_a_choice_means_the_same_images_whatever_is_moved_or_added(folder):
    choices = Choices(folder)
    (first, one), (second, two) = ids(choices)
    choices.choose(second, "ada", two[0], over=[two[1]])
    choices.choose(first, "ada", one[0], over=[one[1]])
    (folder / "3.png").rename(folder / "moved.png")
    lines = (folder / "images.jsonl").read_text().replace("3.png", "moved.png").splitlines()
    write_image(folder / "7.png", 255, (8, 8))
    added = json.dumps({"prompt": "prompt 0", "image": "7.png"})
    (folder / "images.jsonl").write_text("\n".join([*reversed(lines), added]) + "\n")
    again = Choices(folder)
    again.write_pairs()
    assert written(folder) == [("moved.png", "4.png")]  # the other group has another image now: it is another question


def test_a_line_that_was_killed_half_written_loses_nothing_else(folder):
    choices = Choices(folder)
    (first, one), (second, two) = ids(choices)
    choices.choose(first, "ada", one[0])
    with (folder / "choices.jsonl").open("a") as file:
        file.write('{"group": "')
    assert [choice.group for choice in Choices(folder).made()] == [first]
    choices.choose(second, "ada", two[0])
    assert [choice.group for choice in Choices(folder).made()] == [first, second]


def test_what_cannot_be_chosen_is_refused(folder):
    choices = Choices(folder)
    (first, one), (_, two) = ids(choices)
    for arguments in ((first, "ada", two[0]), (first, "ada", one[0], [one[0]]), (first, "ada", None, [one[0]]), (first, "", one[0]),
                      ("nothing", "ada", one[0])):  # fmt: skip
        with pytest.raises(ValueError, match=r"group|annotator"):
            choices.choose(*arguments)
    assert not (folder / "choices.jsonl").exists()
    (folder / "images.jsonl").write_text('{"prompt": 1, "image": "0.png"}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_groups(folder)
