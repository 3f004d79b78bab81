"""Prompt files in the layouts of their releases, with prompts of our own."""

from __future__ import annotations

import json
from pathlib import Path

PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    '"RED" written on a cup\tArtifacts\tWriting & Symbols\t\n'
    "a dog\tAnimals\tBasic\ta note\n"
    "a cat \tAnimals\tQuantity\t\n"
)
DRAWBENCH = 'Prompts,Category\nA red car.,Colors\n"A dog, and a cat.",Counting\n'
DPG_PROMPTS = {"10": "a dense prompt about a dog", "9": "a dense prompt about a cat", "whoops3": "a dense prompt about a cup"}
DPG_HEAD = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
DPG_ROWS = "".join(
    f'{item},"{text}",k,1,0,entity,whole,entity - whole (thing),Is there a thing?\n'
    f'{item},"{text}",k,2,1,attribute,color,"attribute - color (thing, red)",Is the thing red?\n'
    for item, text in DPG_PROMPTS.items()
)
GENEVAL2 = [
    {
        "prompt": "two dogs and a red cup",
        "atom_count": 4,
        "vqa_list": [["How many dogs are in the image?", "two"], ["Is the cup red?", "Yes"]],
        "skills": ["count", "attribute"],
    },
    {"prompt": "a cat", "atom_count": 3, "vqa_list": [["Are there any cats in the image?", "Yes"]], "skills": ["object"]},
]


def write_prompt_files(root: Path) -> dict[str, Path]:
    """A folder for each benchmark."""
    folders = {name: root / name for name in ("parti", "drawbench", "hpsv2", "dpg", "geneval2")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    (folders["parti"] / "PartiPrompts.tsv").write_text(PARTI)
    (folders["drawbench"] / "drawbench.csv").write_text(DRAWBENCH)
    for style in ("anime", "concept-art", "paintings", "photo"):
        (folders["hpsv2"] / f"{style}.json").write_text(json.dumps([f"a dog, {style}", f"a cat, {style}"]))
    (folders["dpg"] / "dpg_bench").mkdir()
    (folders["dpg"] / "dpg_bench" / "dpg_bench.csv").write_text(DPG_HEAD + DPG_ROWS)
    (folders["geneval2"] / "geneval2_data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GENEVAL2))
    return folders
