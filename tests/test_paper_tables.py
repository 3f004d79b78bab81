"""scripts/paper_tables.py at a size that runs in seconds: tiny pipeline, judges and LoRA in place of the papers'."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from diffalign.pipelines.presets import PRESETS
from diffalign.reward_models import SPECS
from tests.benchmarks.prompt_files import write_prompt_files
from tests.benchmarks.tiny_clip import tiny_clip
from tests.benchmarks.tiny_mask2former import mmdet_layout, tiny_mask2former
from tests.tiny import tiny_stable_diffusion

SCRIPT = Path(__file__).parents[1] / "scripts" / "paper_tables.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("paper_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    for part in tiny_clip():
        part.save_pretrained(folder / "clip")
    torch.save({"state_dict": mmdet_layout(tiny_mask2former(classes=80))}, folder / "detector.pth")
    return ["--detector", folder / "detector.pth", "--clip", folder / "clip"]


@pytest.fixture(autouse=True)
def small_input(monkeypatch):
    monkeypatch.setattr("diffalign.benchmarks.models.mask2former.SHORT_SIDE", 64)
    monkeypatch.setattr("diffalign.benchmarks.models.mask2former.LONG_SIDE", 107)


@pytest.fixture
def lora(tmp_path):
    """LoRA weights of the tiny pipeline's U-Net as diffusers saves them, large enough to change the image."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = tiny_stable_diffusion()
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    type(pipe).save_lora_weights(tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    return tmp_path / "lora"


def run(script, tiny_folder, tmp_path, table, *more):
    fixed = ["--pipeline", tiny_folder, "--limit", "6", "--steps", "1", "--guidance-scale", "0", "--device", "cpu", "--batch-size", "6"]
    code = script.main(list(map(str, [table, *fixed, "--out", tmp_path / "out", *more])))
    folder = tmp_path / "out" / table
    return code, (folder / "table.md").read_text(), json.loads((folder / "table.json").read_text())["rows"]


@pytest.mark.parametrize("table", ["reno-geneval", "best-of-n"])
def test_a_search_table_with_published_figures_beside(script, tiny_folder, tmp_path, detector, table, capsys):
    search = ["--samples", "1", "--reward", "brightness=1", "--budget", "2"]
    code, text, rows = run(script, tiny_folder, tmp_path, table, *detector, *search)
    assert code == 0, capsys.readouterr().err
    assert [row["method"] for row in rows] == list(script.TABLES[table].methods)
    assert all(set(row["ours"]) == set(script.GENEVAL) for row in rows)
    limited = "limited to 1 prompt a task (6 of 553)"
    assert all(row["limited"] == limited for row in rows)
    assert text.startswith(f"## {table}, ours {limited}\n")
    assert "pipeline none, published" in text
    assert "HyperNoise (2025), table 1" in text
    assert "0.63" in text
    assert (tmp_path / "out" / table / "pipeline" / "none" / "summary.txt").is_file()


def test_tuned_weights_beside_their_base(script, tiny_folder, tmp_path, detector, lora, capsys):
    code, text, rows = run(script, tiny_folder, tmp_path, "tuned-geneval", *detector, "--samples", "1", "--tuned", f"dcpo-h={lora}")
    assert code == 0, capsys.readouterr().err
    assert [row["method"] for row in rows] == ["none", "dcpo-h"]
    assert "0.51" in text  # DCPO's own
    folder = tmp_path / "out" / "tuned-geneval"
    assert json.loads((folder / "pipeline-dcpo-h" / "none" / "settings.json").read_text())["lora"].startswith("pytorch_lora_weights")
    images = [next(iter(sorted(place.rglob("*.png")))).read_bytes() for place in (folder / "pipeline", folder / "pipeline-dcpo-h")]
    assert images[0] != images[1]


def test_win_rates_by_hand(script, tiny_folder, tmp_path, lora, capsys):
    prompts = ["--prompts", write_prompt_files(tmp_path / "prompts")["parti"], "--reward", "brightness"]
    code, _, rows = run(script, tiny_folder, tmp_path, "tuned-parti", *prompts, "--tuned", f"inpo={lora}")
    assert code == 0, capsys.readouterr().err
    folder = tmp_path / "out" / "tuned-parti"
    of = {}
    for name in ("pipeline", "pipeline-inpo"):
        lines = (folder / name / "none" / "results.jsonl").read_text().splitlines()
        of[name] = [json.loads(line)["values"]["brightness"] for line in lines]
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(of["pipeline-inpo"], of["pipeline"], strict=True)]
    assert rows[1]["ours"]["brightness"] == {"mean": pytest.approx(sum(wins) / 3), "images": 3}


def test_a_failing_run_ends_the_table(script, tmp_path, capsys):
    code = script.main(["reno-geneval", "--pipeline", "shapes-turbo", "--out", str(tmp_path)])
    assert code == 1
    assert "--detector is needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tuned-geneval"], "needs --tuned LABEL=PATH"),
        (["reno-geneval", "--tuned", "a=/"], "takes no --tuned"),
        (["tuned-geneval", "--tuned", "a=/nowhere"], "something that is there"),
        (["reno-geneval", "--only", "sdxl"], "not sdxl"),
    ],
)
def test_wrong_arguments(script, arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert message in capsys.readouterr().err


def test_tables_name_what_there_is(script):
    """Presets, rewards and columns, and no figure without its source."""
    for table in script.TABLES.values():
        assert set(table.models) <= set(PRESETS)
        assert {name.partition("=")[0] for name in table.rewards} <= set(SPECS)
        for (model, _), figure in table.published.items():
            assert model in table.models
            assert set(figure.values) <= set(table.columns)
            assert figure.source
