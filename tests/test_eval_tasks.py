"""The questions of `eval`: every answer stands in the document, places cover all depths, scores count what is there."""

from __future__ import annotations

import random

import pytest

from hylra_gguf import eval_tasks
from hylra_gguf.cli import TASKS
from hylra_gguf.eval_tasks import KINDS, NEEDLES, Question, make_facts, plant, score, word_list

HAY = [ord("x")] * 3000


def letters(text: str) -> list[int]:
    return [ord(char) for char in text]


def planted(seed: int, count: int = 20):
    rng = random.Random(seed)
    facts = make_facts(rng, KINDS, count)
    tokens, rest, questions = plant(rng, HAY, facts, letters, len(HAY))
    return "".join(map(chr, tokens)), rest, questions, facts


def test_the_command_line_knows_every_kind():
    assert set(TASKS) == set(KINDS)


@pytest.mark.parametrize("seed", range(5))
def test_answers_stand_in_the_document_once(seed):
    text, rest, questions, facts = planted(seed)
    assert len(text) == len(HAY) and len(questions) == 20 and "".join(map(chr, rest)) == "x" * sum(
        len(sentence) + 2 for fact in facts for sentence in fact.sentences)
    for question, fact in zip(questions, facts):
        assert all(text.count(f"\n{sentence}\n") == 1 for sentence in fact.sentences)
        assert all(one in " ".join(fact.sentences) for one in question.expected)
        assert score(question, question.reference) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_keys_and_names_are_asked_for_once(seed):
    _, _, questions, _ = planted(seed, 40)
    assert len({question.text for question in questions}) == 40


def test_places_cover_all_depths_and_are_true():
    text, _, questions, facts = planted(0, 30)
    slots = sorted(place for question in questions for place in question.where)
    assert all(any(i / 10 <= place < (i + 1) / 10 for place in slots) for i in range(10))
    for question, fact in zip(questions, facts):
        found = [text.index(sentence) / len(text) for sentence in fact.sentences][: len(question.where)]
        assert found == pytest.approx(question.where, abs=0.12), fact.kind  # planted sentences move what stands behind them
        assert fact.kind != "variables" or found == sorted(found)


def test_a_look_alike_shares_the_noun():
    _, _, _, facts = planted(1, 40)
    pairs = [[sentence.split(" for ")[1].split(" is")[0] for sentence in fact.sentences] for fact in facts if fact.kind == "multikey"]
    assert pairs and all(a != b and a.split("-")[1] == b.split("-")[1] for a, b in pairs)


def test_the_wanted_kinds_take_turns():
    found = [fact.kind for fact in make_facts(random.Random(0), ("facts", "single"), 5)]
    assert found == ["single", "facts", "single", "facts", "single"]
    assert [fact.kind for fact in make_facts(random.Random(0), KINDS, 10)] == list(NEEDLES)
    assert make_facts(random.Random(0), ("copy",), 5) == []


@pytest.mark.parametrize("kind, expected, answer, points", [
    ("single", ("48213",), "It is 48213.", 1.0),
    ("single", ("calm-river",), "Calm-River", 1.0),
    ("multivalue", ("1", "2", "3", "4"), "2 and 4", 0.5),
    ("variables", ("ABCDE", "FGHIJ"), "none", 0.0),
    ("copy", ("one two three four",), "one two four", 0.5),
    ("copy", ("one two",), "one two and more", 1.0),
    ("copy", ("one two",), "", 0.0),
])
def test_scores(kind, expected, answer, points):
    assert score(Question(kind, "", expected, "", (0.5,)), answer) == points


@pytest.mark.parametrize("kind, n", [("common", 10), ("frequent", 3)])
def test_the_words_to_count_are_the_most_frequent(kind, n):
    text, question = word_list(random.Random(3), 3000, kind)
    words = text.split()
    ranking = sorted(set(words), key=words.count, reverse=True)
    assert set(ranking[:n]) == set(question.expected) and words.count(ranking[n - 1]) > words.count(ranking[n])


def test_a_copied_passage_follows_its_words():
    tokens = list(range(1000))
    question = eval_tasks.copy_question(random.Random(0), tokens, lambda part: " ".join(map(str, part)))
    start = int(question.text.split()[-1]) + 1
    assert question.expected[0].split() == [str(i) for i in range(start, start + 24)]
