"""`hylra-gguf eval`: arms against each other on a tiny model, the whole command on a small real one, errors in one line."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from profiles import make_profile
from support import random_tokens, silence, write_tiny_model
from test_engine import policy

from hylra_gguf import engine, eval_arms, eval_documents
from hylra_gguf import eval as eval_command
from hylra_gguf.cli import main
from hylra_gguf.divergence import Judge
from hylra_gguf.errors import PolicyError
from hylra_gguf.eval_arms import Reference, greedy, make_arms, move_state, teacher_forced
from hylra_gguf.gguf_header import write_policy
from hylra_gguf.policy import REUSE, SELECT, Policy, read_policy
from hylra_gguf.session import Context, Model

DEPTH, N = 600, 21


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def filled(tiny):
    """A context with DEPTH tokens in its cache, and tokens that follow"""
    silence(engine.activate())
    tokens = random_tokens(DEPTH + N, 1)
    with Model(str(tiny)) as model, Context(model, DEPTH + 200) as context:
        engine.set_policy(context.ctx, None)
        context.prefill(tokens[:DEPTH])
        yield context, tokens[DEPTH:]


def sit_down(filled, p, reference, is_dense=False):
    context, following = filled
    engine.set_policy(context.ctx, p)
    return teacher_forced(context, DEPTH, following, reference, is_dense)


def test_divergence_is_what_plan_refine_measures(filled, tiny):
    p, tokens = policy("SRSR", top_k=24), random_tokens(DEPTH + N, 1)
    reference = Reference(N, filled[0].model.n_vocab)
    dense = sit_down(filled, eval_arms.all_full(str(tiny)), reference, is_dense=True)
    found = sit_down(filled, p, reference)
    with Model(str(tiny)) as model, Judge(model, [tokens], DEPTH, N - 1, p) as judge:
        expected = judge.compare(p)
    np.testing.assert_allclose(found.kld, expected.kld[0], rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(found.same_top, expected.same_top[0])
    np.testing.assert_allclose(found.change, np.exp(-found.nll) - np.exp(-dense.nll), atol=1e-6)
    assert not dense.kld.any() and dense.same_top.all() and found.kld.mean() > 1e-4


@pytest.mark.parametrize("guess", ["right", "wrong", "right at first", "longer", "none"])
@pytest.mark.parametrize("n", [1, 8, 9, 30])
def test_a_guess_changes_no_answer(filled, guess, n):
    context, following = filled
    engine.set_policy(context.ctx, policy("SRSR", top_k=24))
    plain = greedy(context, DEPTH, following[:11], [], n)
    assert len(plain) == n
    guesses = {"right": plain, "wrong": [0] * n, "right at first": plain[: n // 2] + [0, 0, 0], "longer": plain + [0] * 5, "none": []}
    assert greedy(context, DEPTH, following[:11], guesses[guess], n) == plain


def test_a_document_read_elsewhere_gives_the_same_predictions(filled):
    context, following = filled
    reference = Reference(N, context.model.n_vocab)
    here = sit_down(filled, policy("SRSR", top_k=24), reference)
    with Context(context.model, DEPTH + 200) as other:
        move_state(context, other)
        there = sit_down((other, following), policy("SRSR", top_k=24), reference)
    np.testing.assert_array_equal(here.nll, there.nll)


def test_arms(tiny):
    arms = make_arms(["stock-fa0", "kv-q4_0", "hylra", "dense"], {"a": policy("SRSR"), "b": policy("SRRR")}, str(tiny))
    assert [(arm.name, arm.cache, arm.policy and arm.policy.layer_map()) for arm in arms] == [
        ("dense", (True, "f16"), "FFFF"), ("stock-fa0", (False, "f16"), None), ("kv-q4_0", (True, "q4_0"), None),
        ("hylra:a", (True, "f16"), "SRSR"), ("hylra:b", (True, "f16"), "SRRR")]


# -- documents --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(smollm2):
    silence(engine.activate())
    with Model(str(smollm2)) as model:
        yield model


def make(model, kinds=("single", "copy"), haystack=("prose", "noise"), **fields):
    hays = eval_documents.haystacks(model, list(haystack), [])
    given = {"depth": 1500, "count": 2, "questions": 7, "kinds": kinds, "following": 50, "seed": 1, **fields}
    return list(eval_documents.documents(model, hays, **given))


def test_documents_have_their_length_and_what_follows(model):
    prose, noise = make(model)
    assert [len(one.tokens) for one in (prose, noise)] == [1500, 1500] and (len(prose.following), len(noise.following)) == (50, 0)
    assert [question.kind for question in prose.questions] == ["single", "single", "copy"]
    assert [question.kind for question in noise.questions] == ["single"] * 4
    text = eval_documents.texts.prose_text()
    assert model.detokenize(prose.tokens[-8:] + prose.following) in text  # nothing is left out between the two
    assert make(model)[0].tokens == prose.tokens and make(model, seed=2)[0].tokens != prose.tokens


def test_lists_of_words_are_documents_of_their_own(model):
    made = make(model, kinds=("common",))
    assert [(one.haystack, len(one.tokens), len(one.questions), one.following) for one in made] == [("words", 1500, 1, [])] * 2
    text = model.detokenize(made[0].tokens)
    assert all(word in text for word in made[0].questions[0].expected)


def test_questions_stand_in_the_chat_format_of_the_model(model):
    chat = eval_documents.chat_of(model)
    asked = chat.ask(eval_documents.plain(model), "Who?")
    whole = chat.head + eval_documents.plain(model)("Text.") + asked
    assert model.tokenize("<|im_start|>user\nText.", special=True) == whole[: -len(asked)]
    assert asked[-4:] == model.tokenize("<|im_start|>assistant\n", start=False, special=True)


# -- plans ------------------------------------------------------------------------------------------------------------


def args_of(**fields):
    return SimpleNamespace(**{"plan": None, "profile": None, "policy": None, "model": "none.gguf", **fields})


def test_plans_are_made_from_the_profile(tmp_path):
    path = str(tmp_path / "p.json")
    make_profile(np.full((4, 4), 0.9)).save(path)
    found = eval_command.policies_for(args_of(profile=path, plan=["--strategy every-n --n 2 --recent 8", "--strategy explicit --layers 0"]))
    assert {name: one.layer_map() for name, one in found.items()} == {"strategy every-n n 2 recent 8": "SRSR", "strategy explicit layers 0": "SRRR"}


@pytest.mark.parametrize("fields, words", [
    ({"plan": ["--theta 0.9"]}, "--plan and --profile need each other"),
    ({"profile": "p.json", "plan": ["--theta 3"]}, "--plan '--theta 3': argument --theta"),
    ({"profile": "p.json", "plan": ["--strategy every-n"]}, "--plan '--strategy every-n': "),
])
def test_plans_that_cannot_be_made_are_refused(fields, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_profile(np.full((4, 4), 0.9)).save("p.json")
    with pytest.raises(PolicyError, match=words):
        eval_command.policies_for(args_of(**fields))


# -- command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(smollm2, tmp_path_factory):
    """A real model with a policy that leaves much out"""
    path = tmp_path_factory.mktemp("eval") / "own.gguf"
    modes = [SELECT if layer % 10 == 0 else REUSE for layer in range(30)]
    lossy = Policy(layer_mode=modes, layer_source=[layer // 10 * 10 for layer in range(30)], head_kv_count=3, top_k=64, recent_tokens=32,
                   min_context=256)
    write_policy(smollm2, lossy, path)
    return path


@pytest.mark.parametrize("given, within", [(None, "0"), ("", "0"), ("300", "300")])
def test_the_device_rule_is_off_while_eval_runs_and_no_longer(monkeypatch, given, within):
    monkeypatch.delenv("HYLRA_DEVICE_MIN_CONTEXT", raising=False)
    if given is not None:
        monkeypatch.setenv("HYLRA_DEVICE_MIN_CONTEXT", given)
    with eval_command.sparse_on_any_device():
        assert os.environ["HYLRA_DEVICE_MIN_CONTEXT"] == within
    assert os.environ.get("HYLRA_DEVICE_MIN_CONTEXT") == given


def test_the_whole_command(own, tmp_path, capsys, monkeypatch):
    """Every kind of arm; the numbers go into the file, and `show` prints them."""
    monkeypatch.setattr(eval_arms, "MAX_ANSWER_TOKENS", 8)  # answers of a damaged model run on
    path = tmp_path / "m.gguf"
    shutil.copyfile(own, path)
    line = f"eval {path} -d 600 --docs 1 --questions 4 --following 40 --generate 4 --time 1 --arms stock-fa1,kv-q8_0,hylra --save -t 1"
    assert main([*line.split(), "-o", "json", "--no-progress", "--png", str(tmp_path / "png")]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["arm"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "stock-fa1", "kv-q8_0", "hylra"] and len(result["questions"]) == 4
    assert rows["dense"]["mean_kld"] == 0 < rows["stock-fa1"]["mean_kld"] < rows["hylra"]["mean_kld"]
    assert rows["hylra"]["sparse_steps"] > 0 == rows["stock-fa1"]["sparse_steps"] and rows["hylra"]["reads"] < 0.3
    assert all(row["n_tokens"] == 39 and row["n_questions"] == 4 and row["n_long"] == len(eval_command.LONG_REQUESTS) == 4 and row["speedup"] for row in rows.values())
    assert "too wide" in result["verdict"] and "--docs 2 --questions 8" in result["next"]
    assert sorted(file.name for file in (tmp_path / "png").iterdir()) == ["frontier-600.png", "kld-depth.png", "needle-grid.png"]
    measured = read_policy(path).measured
    assert measured["kld_600"] == pytest.approx(rows["hylra"]["mean_kld"]) and len(measured["model_sha256"]) == 64
    assert main(["show", str(path)]) == 0
    assert "kld_600" in capsys.readouterr().out


def test_a_policy_of_another_model_is_refused_before_any_reading(own, tmp_path, capsys):
    policy("SRSR").save(tmp_path / "four-layers.json")
    assert main(["eval", str(own), "-d", "512", "--policy", str(tmp_path / "four-layers.json")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "arm hylra: " in err.splitlines()[-1] and "document 1" not in err


@pytest.mark.parametrize("flags, words", [
    ("-d 100", "-d: documents of fewer than 512 tokens"),
    ("--save --policy x.json", "leave out --policy and --plan"),
    ("--profile x.json", "--plan and --profile need each other"),
    ("--tasks magic", "'magic' is none of single"),
    ("--arms hylra,full", "'full' is none of dense"),
])
def test_errors_are_one_line(own, capsys, flags, words):
    assert main(["eval", str(own), *flags.split(), "--no-progress"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err


def test_an_interrupted_run_shows_what_is_done(own, capsys, monkeypatch):
    examine, done = eval_command.Examiner.examine, []

    def once(self, *args):
        if done:
            raise KeyboardInterrupt
        done.append(examine(self, *args))
        return done[0]

    monkeypatch.setattr(eval_command.Examiner, "examine", once)
    monkeypatch.setattr(eval_arms, "MAX_ANSWER_TOKENS", 8)
    assert main(["eval", str(own), *"-d 512 --docs 3 --questions 3 --following 0 --time 0 --arms hylra -t 1 -o json".split()]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"][1]["n_documents"] == 1 and "of the 1 documents that were done" in err


def test_save_needs_a_policy(tiny, capsys):
    assert main(["eval", str(tiny), "--save"]) == 2
    assert "--save has no policy to write to" in capsys.readouterr().err
