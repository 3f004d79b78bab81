"""Noun phrases, questions and the file that keeps them; spaCy itself where it is installed."""

import pytest

from diffalign.benchmarks.t2i_compbench.language import Annotations, Grammar, annotate, clean, questions, without_adjectives
from diffalign.benchmarks.t2i_compbench.spatial import Token


def test_questions_are_clean_lower_case_and_leave_out_what_is_no_thing():
    assert questions(["A Red Cup", "top", "the left", 'a "blue" (bowl).']) == ["a red cup?", "a blue bowl?"]
    assert questions(["the left side"]) == ["the left side?"]
    assert len(questions([f"thing {i}" for i in range(12)])) == 8


def test_a_question_has_at_most_fifty_words():
    assert len(clean("word " * 60 + "?").split(" ")) == 50
    assert clean("A cup: #1; *two*?") == "a cup 1 two?"


def test_the_file_and_back(tmp_path):
    grammar = Grammar(("a red cup",), (Token("a", "DET"), Token("red", "ADJ"), Token("cup", "NOUN")))
    path = tmp_path / "phrases.json"
    Annotations("tagger 1.0", {"a red cup": grammar}).write(path)
    found = Annotations.read(path)
    assert found == Annotations("tagger 1.0", {"a red cup": grammar})
    assert without_adjectives(found["a red cup"].tokens) == "a cup"
    with pytest.raises(ValueError, match=r"made by tagger 1\.0 lacks the prompt 'a dog'"):
        found["a dog"]


def test_later_prompts_join_the_list_of_the_same_tagger_alone():
    older, newer = Annotations("tagger 1.0", {"a cup": Grammar(("a cup",))}), Annotations("tagger 1.0", {"a dog": Grammar(("a dog",))})
    assert list(newer.beside(older).prompts) == ["a cup", "a dog"]
    assert newer.beside(None) == newer
    with pytest.raises(ValueError, match=r"made by tagger 0\.9, and tagger 1\.0 is here"):
        newer.beside(Annotations("tagger 0.9", older.prompts))


@pytest.mark.parametrize("text", ["[]", '{"made_by": "x"}', '{"made_by": "x", "prompts": {"a cup": {}}}'])
def test_a_file_that_is_something_else(tmp_path, text):
    path = tmp_path / "phrases.json"
    path.write_text(text)
    with pytest.raises(ValueError, match='must hold "made_by" and "prompts"'):
        Annotations.read(path)


def test_without_spacy_it_says_what_to_install():
    with pytest.raises(ImportError, match="python -m spacy download no_such_model"):
        annotate(["a red cup"], model="no_such_model")


def test_spacy_finds_what_the_template_says():
    spacy = pytest.importorskip("spacy")
    if not spacy.util.is_package("en_core_web_sm"):
        pytest.skip("spaCy's en_core_web_sm is not installed")
    prompt = "a green bench and a blue bowl"
    assert annotate([prompt])[prompt].phrases == ("a green bench", "a blue bowl")
