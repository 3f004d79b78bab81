"""What is said where a judge's model cannot be had."""

import logging

import pytest
from transformers import CLIPModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from diffalign.benchmarks.models.pretrained import load_model, load_part
from tests.benchmarks.tiny_clip import tiny_clip


@pytest.fixture
def folder(tmp_path):
    for part in tiny_clip():
        part.save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_loads_without_a_bar(folder, capfd):
    transformers_logging.enable_progress_bar()  # whatever was run before
    model = load_model(CLIPModel, str(folder))
    assert not model.training
    assert load_part(CLIPTokenizer, str(folder)).vocab_size
    assert capfd.readouterr().err == ""
    assert transformers_logging.is_progress_bar_enabled()  # only ours are silent


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_a_folder_that_is_not_there(source):
    with pytest.raises(FileNotFoundError, match=f"there is no folder {source}; give a folder"):
        load_model(CLIPModel, source)


def test_the_hub_out_of_reach_is_one_sentence(caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(OSError, match=r"could not load 'someone/no-such-model' \(.*\); check the name"):
        load_model(CLIPModel, "someone/no-such-model")
    assert not caplog.records


def test_a_folder_without_weights_is_not_complete(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="its folder is not complete"):
        load_model(CLIPModel, str(folder))
