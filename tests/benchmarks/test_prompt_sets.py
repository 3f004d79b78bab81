"""Prompt lists in the layouts of their releases, then the released ones where they are at hand."""

import json
from collections import Counter

import pytest

from diffalign.benchmarks.lists import READERS, read_prompt_set
from tests.benchmarks import recorded
from tests.benchmarks.prompt_files import DPG_PROMPTS, DRAWBENCH, GENEVAL2, write_prompt_files


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_prompt_files(tmp_path_factory.mktemp("prompts"))


def prompts(name, source):
    return [(row.prompt, row.task) for row in read_prompt_set(name, source).rows]


def test_parti_keeps_quotes_and_knows_category_and_challenge(folders):
    found = read_prompt_set("parti", folders["parti"])
    assert [row.prompt for row in found.rows] == ['"RED" written on a cup', "a dog", "a cat "]
    assert (found.rows[0].task, found.rows[0].metadata["challenge"]) == ("Artifacts", "Writing & Symbols")
    assert found.version.startswith("3 prompts, list ")


@pytest.mark.parametrize("text", [DRAWBENCH, DRAWBENCH.replace("Prompts", "prompt"), "\ufeff" + DRAWBENCH, DRAWBENCH.replace("\n", "\r\n")])
def test_drawbench_with_categories(tmp_path, text):
    (tmp_path / "list.csv").write_bytes(text.encode())
    assert prompts("drawbench", tmp_path / "list.csv") == [("A red car.", "Colors"), ("A dog, and a cat.", "Counting")]


@pytest.mark.parametrize("text", ["A red car.\n\nA dog, and a cat.\n", '["A red car.", "A dog, and a cat."]'])
def test_drawbench_as_a_plain_list(tmp_path, text):
    (tmp_path / "list.txt").write_text(text)
    assert prompts("drawbench", tmp_path / "list.txt") == [("A red car.", "all"), ("A dog, and a cat.", "all")]


def test_hpsv2_names_images_as_its_evaluator_reads_them(folders):
    rows = read_prompt_set("hpsv2", folders["hpsv2"]).rows
    assert [row.path for row in rows][:3] == ["anime/00000.jpg", "anime/00001.jpg", "concept-art/00000.jpg"]
    assert [row.task for row in rows] == [style for style in ("anime", "concept-art", "paintings", "photo") for _ in range(2)]


def test_dpg_in_three_layouts_is_one_list(folders, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"item_id": k, "prompt": v}) + "\n" for k, v in DPG_PROMPTS.items()))
    texts = tmp_path / "clone" / "dpg_bench" / "prompts"
    texts.mkdir(parents=True)
    for item, prompt in DPG_PROMPTS.items():
        (texts / f"{item}.txt").write_text(prompt + "\n")
    found = [read_prompt_set("dpg", source) for source in (folders["dpg"], tmp_path / "prompts.jsonl", tmp_path, tmp_path / "clone")]
    assert all(each == found[0] for each in found)
    assert [row.metadata["item_id"] for row in found[0].rows] == ["9", "10", "whoops3"]
    assert found[0].rows[0].path.format(sample=2) == "9/samples/00002.png"


def test_geneval2_carries_its_questions(folders):
    rows = read_prompt_set("geneval2", folders["geneval2"] / "geneval2_data.jsonl").rows
    assert [(row.prompt, row.task) for row in rows] == [("two dogs and a red cup", "4 atoms"), ("a cat", "3 atoms")]
    assert rows[0].metadata == {"questions": GENEVAL2[0]["vqa_list"], "skills": GENEVAL2[0]["skills"]}


@pytest.mark.parametrize("name", READERS)
def test_a_folder_and_its_url_are_the_same(folders, name):
    assert read_prompt_set(name, folders[name]) == read_prompt_set(name, folders[name].as_uri())


@pytest.mark.parametrize("name", READERS)
def test_what_is_not_there_is_named(tmp_path, name):
    for source in (tmp_path, (tmp_path / "nowhere").as_uri()):
        with pytest.raises(FileNotFoundError, match=r"the prompts are (not|neither) at .*of your copy of"):
            read_prompt_set(name, source)


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("parti", "PartiPrompts.tsv", "a\tb\n1\t2\n", "lacks the columns prompt, category"),
        ("parti", "PartiPrompts.tsv", "Prompt\tCategory\n", "holds no prompts of parti"),
        ("parti", "PartiPrompts.tsv", "Prompt\tCategory\n \tAnimals\n", "prompt 1 of parti is empty"),
        ("parti", "PartiPrompts.tsv", "Prompt\tCategory\na dog\n", "line 2 has too few columns"),
        ("drawbench", "drawbench.json", '[1, "a"]', "prompt 1 of drawbench is empty or no text: 1"),
        ("drawbench", "drawbench.json", "[1,", "is not valid JSON"),
        ("dpg", "prompts.jsonl", '{"item_id": "../x", "prompt": "a"}\n', "become folders"),
        ("dpg", "prompts.jsonl", '{"item_id": "x"}\n', "line 1 lacks prompt"),
        ("geneval2", "geneval2_data.jsonl", '{"prompt": "a", "atom_count": 3, "vqa_list": [["q"]], "skills": ["s"]}', "pairs"),
        ("geneval2", "geneval2_data.jsonl", "[1]\n", "line 1 is not a JSON object"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, name, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompt_set(name, tmp_path)


def test_text_of_other_encodings_is_refused(tmp_path):
    (tmp_path / "PartiPrompts.tsv").write_bytes("Prompt\tCategory\nein Bär\tAnimals\n".encode("utf-16"))
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_prompt_set("parti", tmp_path)


def test_a_single_file_where_there_are_several(folders):
    with pytest.raises(NotADirectoryError, match="give their folder"):
        read_prompt_set("hpsv2", folders["hpsv2"] / "anime.json")


# --- the released lists -------------------------------------------------------------------------------------------------------


def test_the_released_partiprompts():
    found = read_prompt_set("parti", recorded.path("parti"))
    assert found.version == "PartiPrompts, 1,632 prompts"
    assert len({row.prompt for row in found.rows}) == 1632
    categories, challenges = Counter(row.task for row in found.rows), Counter(row.metadata["challenge"] for row in found.rows)
    assert (len(categories), categories["Animals"], categories["Indoor Scenes"]) == (12, 314, 40)
    assert (len(challenges), challenges["Fine-grained Detail"], challenges["Properties & Positioning"]) == (11, 312, 35)


def test_the_released_prompts_of_dpg_bench():
    found = read_prompt_set("dpg", recorded.path("dpg_bench"))
    assert (found.version, len(found.rows)) == ("DPG-Bench, 1,065 prompts", 1065)
    words = [len(row.prompt.split()) for row in found.rows]
    assert (min(words), max(words)) == (37, 130)
