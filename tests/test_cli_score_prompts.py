"""Which images of a folder are scored, and where their prompts are found. No image is opened for it."""

from __future__ import annotations

import json
import unicodedata

import pytest

from diffalign.evaluation import image_prompts
from diffalign.evaluation.image_files import list_images
from diffalign.evaluation.image_prompts import find_prompts


def make(folder, *names, **texts):
    """Empty image files, and text files given as name=content ("__" for "/")."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def found(folder, **options):
    return {name: prompt.text for name, prompt in find_prompts(folder, list_images(folder).images, **options).items()}


def names(folder, match=None):
    return [image.name for image in list_images(folder, match).images]


# --- which images -------------------------------------------------------------------------------------------------------------


def test_every_image_below_the_folder_in_the_order_of_names(tmp_path):
    make(tmp_path, "b.PNG", "a.webp", "deep/er/c.jpeg", "notes.md", ".hidden.png", ".git/d.png")
    assert names(tmp_path) == ["a.webp", "b.PNG", "deep/er/c.jpeg"]
    assert list_images(tmp_path).others == 1


def test_links_to_folders_are_not_entered(tmp_path):
    make(tmp_path, "a.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert names(tmp_path) == ["a.png"]


def test_a_pattern_is_of_the_end_of_the_path(tmp_path):
    make(tmp_path, "none/00000/samples/0.png", "reno/00000/samples/0.png", "reno/after.png", "after.png")
    assert names(tmp_path, "after.png") == ["after.png", "reno/after.png"]
    assert names(tmp_path, "reno/*/samples/*.png") == ["reno/00000/samples/0.png"]


def test_names_that_are_no_text_are_written_out(tmp_path):
    (tmp_path / "caf\udce9.png").touch()  # the byte e9, which alone is no UTF-8
    assert names(tmp_path) == ["caf\\xe9.png"]


@pytest.mark.parametrize(
    ("beside", "kept", "aside"),
    [
        (["x/trace.json"], ["x/before.png", "x/after.png"], ["x/strip.png", "x/rewards.png"]),
        (["x/metadata.jsonl"], ["x/samples/0.png"], ["x/grid.png"]),
        (["x/summary.json", "x/table.md"], ["x/none/00000/samples/0.png"], ["x/grid.png"]),
        (["x/results.json", "x/scores/a.jsonl"], ["a.png"], ["x/distributions.png"]),
    ],
)
def test_pictures_about_images_are_left_aside(tmp_path, beside, kept, aside):
    make(tmp_path, *beside, *kept, *aside)
    listing = list_images(tmp_path)
    assert [image.name for image in listing.images] == sorted(kept)
    assert list(listing.aside) == sorted(aside)


def test_what_generate_and_bench_leave_is_what_is_left_aside_here(tmp_path):
    """The marks above, against what generate really writes; the tests of bench see to theirs."""
    from tests.test_cli_generate import FILES

    make(tmp_path, *(f"00000-a/{name}" for name in FILES))
    assert names(tmp_path) == ["00000-a/after.png", "00000-a/before.png"]


# --- beside the images --------------------------------------------------------------------------------------------------------


def test_text_files(tmp_path):
    make(tmp_path, "a.png", "b.jpg", "c.png", "d.e.png")
    write(tmp_path, "a.txt", b"\xef\xbb\xbf a red circle\n\n")
    write(tmp_path, "b.txt", "two\nlines 🎨")
    write(tmp_path, "c.txt", " \n")
    write(tmp_path, "d.e.txt", "dots")
    assert found(tmp_path) == {"a.png": "a red circle", "b.jpg": "two\nlines 🎨", "d.e.png": "dots"}


def test_genevals_layout(tmp_path):
    for index, prompt in enumerate(["a red circle", "two stars"]):
        make(tmp_path, f"{index:05d}/samples/0000.png", f"{index:05d}/samples/0001.png", f"{index:05d}/grid.png")
        write(tmp_path, f"{index:05d}/metadata.jsonl", json.dumps({"tag": "single_object", "include": [], "prompt": prompt}))
    assert found(tmp_path) == {f"{i:05d}/samples/{j:04d}.png": p for i, p in ((0, "a red circle"), (1, "two stars")) for j in (0, 1)}
    assert found(tmp_path / "00001") == {"samples/0000.png": "two stars", "samples/0001.png": "two stars"}
    assert found(tmp_path / "00001" / "samples") == {"0000.png": "two stars", "0001.png": "two stars"}


@pytest.mark.parametrize("key", ["text", "prompt"])
def test_imagefolder_metadata(tmp_path, key):
    make(tmp_path, "a.png", "sub/b.png", "sub/c.png", "other.png")
    rows = [{"file_name": "a.png", key: "a"}, {"file_name": "./sub/b.png", key: "b"}, {"file_name": "sub/c.png", "label": 3}]
    write(tmp_path, "metadata.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    write(tmp_path, "sub/metadata.csv", 'file_name,label,text\r\nc.png,3,"c, ""quoted"""\r\n')
    assert found(tmp_path) == {"a.png": "a", "sub/b.png": "b", "sub/c.png": 'c, "quoted"'}


def test_metadata_of_another_kind_is_passed_over(tmp_path):
    make(tmp_path, "a.png", "sub/b.png")
    write(tmp_path, "metadata.csv", "camera,exposure\nx,1\n")
    write(tmp_path, "sub/metadata.jsonl", '{"prompt": "one"}\n{"prompt": "two"}\n')  # does not say whose
    assert found(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("a red cup and a blue plate_000012.png", "a red cup and a blue plate"),
        ("a cup_of tea_3.png", "a cup_of tea"),
        ("samples/cup_000001.png", "cup"),
        ("IMG_20240101.png", None),
        ("00012.png", None),
        ("a red cup.png", None),
    ],
)
def test_prompts_in_names(tmp_path, name, prompt):
    make(tmp_path, name)
    assert found(tmp_path) == ({name: prompt} if prompt else {})


def test_traces_of_generate_and_bench_come_first(tmp_path):
    make(tmp_path, "00000-a/before.png", "00000-a/after.png", "colour/samples/cut short_000003.png", "shapes/00007/samples/00000.png")
    write(tmp_path, "00000-a/trace.json", '{"prompt": "of generate"}')
    write(tmp_path, "00000-a/before.txt", "something else")
    write(tmp_path, "colour/traces/cut short_000003.json", '{"prompt": "the whole prompt"}')
    write(tmp_path, "shapes/00007/metadata.jsonl", '{"prompt": "of the row"}')
    write(tmp_path, "shapes/00007/traces/00000.json", '{"prompt": "of the trace"}')
    assert found(tmp_path) == {
        "00000-a/after.png": "of generate",
        "00000-a/before.png": "of generate",
        "colour/samples/cut short_000003.png": "the whole prompt",
        "shapes/00007/samples/00000.png": "of the trace",
    }


def test_real_runs_of_the_benchmarks_are_understood(tmp_path):
    """Written by the code that writes them."""
    from PIL import Image

    from diffalign.benchmarks.base import Item
    from diffalign.evaluation.generation import Generated, save

    image = Generated(Image.new("RGB", (2, 2)), {"seconds": 1.0, "best": 0, "rewards": {}})
    save(Item(3, 1, 0, "colors", "a red cup", {"prompt": "a red cup"}), image, tmp_path)
    save(Item(0, 0, 0, "color", "a cup", {"prompt": "a cup"}, "color/samples/a cup_000000.png"), image, tmp_path)
    assert found(tmp_path) == {"00003/samples/00001.png": "a red cup", "color/samples/a cup_000000.png": "a cup"}
    for trace in tmp_path.rglob("traces/*.json"):
        trace.unlink()
    assert found(tmp_path) == {"00003/samples/00001.png": "a red cup", "color/samples/a cup_000000.png": "a cup"}


# --- given --------------------------------------------------------------------------------------------------------------------

TABLES = {
    "p.csv": "file_name,prompt,seed\na.png,A,1\nsub/b.png,B,2\n",
    "q.csv": 'Prompt,Filename\r\nA,./a.png\r\n"B",images/sub/b.png\r\n',
    "p.tsv": "image\tcaption\na.png\tA\nb.png\tB\n",
    "p.json": '{"a.png": "A", "b": "B"}',
    "q.json": '[{"file": "a.png", "prompt": "A"}, {"file": "sub\\\\b.png", "text": "B"}]',
    "r.json": '{"a.png": {"prompt": "A", "seed": 1}, "sub/b.png": {"prompt": "B"}}',
    "p.jsonl": '\ufeff{"path": "a.png", "prompt": "A"}\n\n{"path": "sub/b.png", "prompt": "B"}',
}


@pytest.mark.parametrize("table", TABLES)
def test_tables(tmp_path, monkeypatch, table):
    monkeypatch.chdir(tmp_path)  # q.csv names a path from here
    make(tmp_path / "images", "a.png", "sub/b.png", "c.png")
    write(tmp_path, table, TABLES[table])
    assert found(tmp_path / "images", table=tmp_path / table) == {"a.png": "A", "sub/b.png": "B"}


def test_a_table_comes_before_what_lies_beside_and_one_prompt_before_all(tmp_path):
    make(tmp_path, "a.png", "b.png")
    write(tmp_path, "a.txt", "beside")
    write(tmp_path, "b.txt", "beside")
    table = write(tmp_path, "p.json", '{"a.png": "given", "of no image.png": "x"}')
    assert found(tmp_path, table=table) == {"a.png": "given", "b.png": "beside"}
    assert found(tmp_path, for_all="one") == {"a.png": "one", "b.png": "one"}


def test_accents_match_in_either_form_of_unicode(tmp_path):
    make(tmp_path, unicodedata.normalize("NFD", "é.png"))
    table = write(tmp_path, "p.json", json.dumps({unicodedata.normalize("NFC", "é.png"): "accent"}))
    assert list(found(tmp_path, table=table).values()) == ["accent"]


LONG = "word " * 2000 + '"quoted", and, commas 🎨'


def test_prompts_come_through_to_the_letter(tmp_path):
    awkward = [LONG, "line\nline", "line\r\nline", "\u2028 and \x85", " spaces around ", "tab\t"]
    make(tmp_path, *(f"{i}.png" for i in range(len(awkward))))
    quoted = ['"' + prompt.replace('"', '""') + '"' for prompt in awkward]
    csv = write(tmp_path, "p.csv", "file_name,prompt\n" + "".join(f"{i}.png,{text}\n" for i, text in enumerate(quoted)))
    rows = [{"file_name": f"{i}.png", "prompt": prompt} for i, prompt in enumerate(awkward)]
    jsonl = write(tmp_path, "p.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    for table in (csv, jsonl):
        assert list(found(tmp_path, table=table).values()) == awkward


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "a red circle", "does not say whose they are"),
        ("p.parquet", "PAR1", "must be .csv, .tsv, .json or .jsonl"),
        ("p.csv", b"caf\xe9", "is not UTF-8 text"),
        ("p.csv", "", "must name its columns, file_name and prompt; it has nothing"),
        ("p.csv", "a.png,a red circle\n", "it has a.png, a red circle"),
        ("p.csv", "file_name,prompt\na.png,a circle, red\n", "line 2 has more fields"),
        ("p.csv", 'file_name,prompt\na.png,"a circle\n', "is not valid CSV"),
        ("p.csv", "file_name,prompt\na.png\n", "line 2 has no prompt"),
        ("p.csv", "file_name,prompt\n", "holds no prompt"),
        ("p.csv", "file_name,prompt\nx.png,a\ny.png,b\n", "names no image of"),
        ("p.csv", "file_name,prompt\na.png,a\na.png,b\n", "line 3 gives a.png another prompt than"),
        ("p.csv", "file_name,prompt\nb.png,a\n", "'b.png' fits one/b.png, two/b.png; write the path"),
        ("p.json", "{", "is not valid JSON"),
        ("p.json", "3", "must hold an object from file names to prompts"),
        ("p.json", '{"a.png": 3}', "'a.png' has no prompt"),
        ("p.json", '["a"]', "entry 1 must be a JSON object"),
        ("p.json", r'{"a.png": "half \ud83d"}', "is not Unicode text, at character 5"),
        ("p.jsonl", '{"file": "a.png", "prompt": "a"}\n{"prompt": "b"}\n', "line 2 names no file"),
        ("p.jsonl", '{"file": "a.png"}\n', "line 1 has no prompt (prompt, text, caption); it has file"),
        ("p.jsonl", "rubbish\n", "line 1 is not valid JSON"),
    ],
)
def test_bad_tables_are_named_with_the_line(tmp_path, name, content, message):
    make(tmp_path / "images", "a.png", "one/b.png", "two/b.png")
    table = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=r".") as error:
        found(tmp_path / "images", table=table)
    assert message in str(error.value)
    assert str(table) in str(error.value)


def test_the_list_at_the_head_of_the_file_is_whole():
    """Every origin that a prompt can have is described there."""
    described = image_prompts.__doc__
    for word in ("--prompt TEXT", "--prompts FILE", "trace.json", "metadata.jsonl", "metadata.csv", "NAME.txt", "PROMPT_000012"):
        assert word in described
