"""Questions about long documents, made from a seed in the manner of RULER: facts are planted in text, and each answer is known.

The wording is the one that SmolLM2-135M-Needle-32K was taught (tools/needle_model); other models understand it too. A document holds
all of its facts at once, so one prefill serves all of its questions, and every needle has the others as distractors.
"""

from __future__ import annotations

import random
import string
import uuid
from dataclasses import dataclass
from typing import Callable

ADJECTIVES = ("amber brave calm dusty eager faint giant happy icy jolly kind lunar merry noble olive proud quiet rapid silver tiny urban "
              "vivid warm young zesty bitter cosmic early fancy gentle hidden").split()
NOUNS = ("anchor bridge candle desert engine forest garden harbor island jungle kettle ladder meadow needle ocean pepper quarry river "
         "saddle temple valley window yacht button castle dragon feather guitar hammer lantern mirror orchard pencil ribbon shadow "
         "tunnel violin wagon").split()
FIRST_NAMES = ("Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karin Louis Marta Nadia Oscar Paula Quentin Rosa Simon Teresa "
               "Ursula Victor Wanda Xavier Yvonne Zoe").split()
LAST_NAMES = ("Abbott Becker Castro Dumont Eriksen Fischer Garcia Hansen Ibsen Jansen Keller Lehmann Moreau Novak Olsen Petrov Quinn "
              "Rossi Silva Tanaka Ulrich Vargas Weber Young Zeman").split()
CITIES = ("Vienna Madrid Dublin Athens Warsaw Prague Lisbon Berlin Geneva Zurich Naples Seville Tallinn Vilnius Zagreb Bergen Aarhus "
          "Utrecht Leipzig Krakow Toledo Palermo Nantes Graz").split()
JOBS = ("baker carpenter dentist engineer farmer gardener historian judge librarian mechanic nurse optician painter pilot plumber "
        "sailor surgeon tailor teacher welder").split()

# One turn of a document's questions. Words to count need documents of their own, and the passage to copy comes from the text itself.
NEEDLES = ("single", "facts", "multikey", "variables", "single", "multivalue", "facts", "multikey", "single", "multiquery")
COPY, COMMON, FREQUENT = "copy", "common", "frequent"
KINDS = (*dict.fromkeys(NEEDLES), COPY, COMMON, FREQUENT)


@dataclass(frozen=True)
class Question:
    """expected: strings that a right answer holds; where: relative place of each of its facts, from 0 (start) to 1; reference: the
    answer in the taught wording, which only serves as a guess of what the model will say."""

    kind: str
    text: str
    expected: tuple[str, ...]
    reference: str
    where: tuple[float, ...]

    @property
    def depth(self) -> float:
        return sum(self.where) / len(self.where)


@dataclass(frozen=True)
class Fact:
    """sentences: each is planted at a place of its own"""

    kind: str
    sentences: tuple[str, ...]
    text: str
    expected: tuple[str, ...]
    reference: str


def score(question: Question, answer: str) -> float:
    """Share of the expected strings that the answer holds; of a copied passage the share of leading words that are right."""
    if question.kind == COPY:
        return leading_words(question.expected[0].split(), answer.split())
    found = answer.lower()
    return sum(one.lower() in found for one in question.expected) / len(question.expected)


def leading_words(expected: list[str], found: list[str]) -> float:
    right = next((i for i, (a, b) in enumerate(zip(expected, found)) if a != b), min(len(expected), len(found)))
    return right / len(expected)


# -- facts ------------------------------------------------------------------------------------------------------------


class Facts:
    """Facts of one document: no key or name occurs twice, except where `multikey` wants a look-alike."""

    def __init__(self, rng: random.Random):
        self.rng, self.used = rng, set()

    def make(self, kind: str) -> Fact:
        return getattr(self, kind)()

    def fresh(self, draw: Callable[[], str]) -> str:
        while (found := draw()) in self.used:
            pass
        self.used.add(found)
        return found

    def key(self) -> str:
        return self.fresh(lambda: f"{self.rng.choice(ADJECTIVES)}-{self.rng.choice(NOUNS)}")

    def value(self, what: str) -> str:
        rng = self.rng
        if what == "number":
            return str(rng.randint(10**4, 10**rng.choice((5, 6, 7)) - 1))
        if what == "word":
            return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        if what == "uuid":
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))
        return "".join(rng.choice("0123456789abcdef") for _ in range(12))

    def what(self) -> str:
        return self.rng.choice(("number", "number", "word", "code", "uuid"))

    def single(self) -> Fact:
        return self.needle("single", self.key(), self.what())

    def needle(self, kind: str, key: str, what: str, decoy: str = "") -> Fact:
        value = self.value(what)
        return Fact(kind, (f"The special magic {what} for {key} is: {value}.",) + ((decoy,) if decoy else ()),
                    f"What is the special magic {what} for {key} mentioned in the provided text?", (value,),
                    f"The special magic {what} for {key} mentioned in the provided text is {value}.")

    def multikey(self) -> Fact:
        """A second key with the same noun and the same kind of value stands elsewhere."""
        key, what = self.key(), self.what()
        other = self.fresh(lambda: f"{self.rng.choice(ADJECTIVES)}-{key.split('-')[1]}")
        return self.needle("multikey", key, what, f"The special magic {what} for {other} is: {self.value(what)}.")

    def multivalue(self) -> Fact:
        key, what = self.key(), self.rng.choice(("number", "word", "code"))
        values = tuple(self.value(what) for _ in range(self.rng.randint(2, 4)))
        return Fact("multivalue", tuple(f"One of the special magic {what}s for {key} is: {value}." for value in values),
                    f"What are all the special magic {what}s for {key} mentioned in the provided text?", values,
                    f"The special magic {what}s for {key} mentioned in the provided text are {', '.join(values)}.")

    def multiquery(self) -> Fact:
        keys, values = [self.key(), self.key()], [self.value("number"), self.value("number")]
        return Fact("multiquery", tuple(f"The special magic number for {key} is: {value}." for key, value in zip(keys, values)),
                    f"What are the special magic numbers for {keys[0]} and {keys[1]} mentioned in the provided text?", tuple(values),
                    f"The special magic numbers for {keys[0]} and {keys[1]} mentioned in the provided text are {values[0]} and {values[1]}.")

    def facts(self) -> Fact:
        rng = self.rng
        name = self.fresh(lambda: f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}")
        city, job = rng.choice(CITIES), rng.choice(JOBS)
        sentence = rng.choice((f"{name} lives in {city} and works as a {job}.", f"In {city}, {name} earns a living as a {job}."))
        if rng.random() < 0.5:
            return Fact("facts", (sentence,), f"Where does {name} live?", (city,), f"{name} lives in {city}.")
        return Fact("facts", (sentence,), f"What is the job of {name}?", (job,), f"{name} works as a {job}.")

    def variables(self) -> Fact:
        value = self.fresh(lambda: str(self.rng.randint(10000, 99999)))
        names = tuple("".join(self.rng.choice(string.ascii_uppercase) for _ in range(5)) for _ in range(self.rng.randint(2, 4)))
        chain = tuple(f"VAR {b} = VAR {a}." for a, b in zip(names, names[1:]))
        return Fact("variables", (f"VAR {names[0]} = {value}.", *chain),
                    f"Find all variables that are assigned the value {value} in the text above.", names,
                    f"The variables assigned the value {value} are {', '.join(names)}.")


def make_facts(rng: random.Random, kinds: tuple[str, ...], count: int, turn: int = 0) -> list[Fact]:
    """count facts of the wanted kinds in the order of NEEDLES; turn: where in it to begin, so that documents differ"""
    order = [kind for kind in NEEDLES if kind in kinds]
    facts = Facts(rng)
    return [facts.make(order[(turn + i) % len(order)]) for i in range(count)] if order else []


# -- documents --------------------------------------------------------------------------------------------------------


def plant(rng: random.Random, hay: list[int], facts: list[Fact], tokenize: Callable[[str], list[int]],
          n_tokens: int) -> tuple[list[int], list[int], list[Question]]:
    """(n_tokens of hay and sentences, the hay that was not used, questions). Places are one per slot of equal size, shuffled, so that every
    depth is asked for; the assignments of a chain keep their order."""
    n_slots = sum(len(fact.sentences) for fact in facts)
    slots = [(i + rng.random()) / n_slots for i in range(n_slots)]
    rng.shuffle(slots)
    planted, questions = [], []
    for fact in facts:
        where = [slots.pop() for _ in fact.sentences]
        if fact.kind == "variables":
            where.sort()
        planted += [(place, tokenize(f"\n{sentence}\n")) for place, sentence in zip(where, fact.sentences)]
        asked = where[:1] if fact.kind == "multikey" else where  # the second sentence is the look-alike
        questions.append(Question(fact.kind, fact.text, fact.expected, fact.reference, tuple(asked)))
    rest = n_tokens - sum(len(tokens) for _, tokens in planted)
    out, done = [], 0
    for place, tokens in sorted(planted):
        out += hay[done : int(place * rest)] + tokens
        done = int(place * rest)
    return out + hay[done:rest], hay[rest:], questions


def copy_question(rng: random.Random, tokens: list[int], detokenize: Callable[[list[int]], str]) -> Question:
    """A stretch of the document, named by the words before it."""
    start = rng.randrange(len(tokens) // 20, len(tokens) - 80)
    before, passage = detokenize(tokens[start : start + 24]), detokenize(tokens[start + 24 : start + 48])
    return Question(COPY, f"Copy the passage that follows these words: {before}", (passage,), passage, (start / len(tokens),))


def word_list(rng: random.Random, n_words: int, kind: str) -> tuple[str, Question]:
    """common: ten words stand ten times as often as all others; frequent: made-up words, the n-th about n**-2 as often as the first."""
    if kind == COMMON:
        words = [f"{a}{n}" for a in ADJECTIVES for n in NOUNS]
        rng.shuffle(words)
        asked, rare = words[:10], words[10:]
        once = max(1, n_words // (10 * 10 + len(rare)))
        listed = asked * (10 * once) + (rare * (once + 1))[: max(0, n_words - 100 * once)]
        text = "What are the 10 most common words in the above list?"
    else:
        words = ["".join(rng.choice(string.ascii_lowercase) for _ in range(6)) for _ in range(200)]
        weights = [(i + 1) ** -2.0 for i in range(len(words))]
        asked, listed = words[:3], rng.choices(words, weights, k=n_words)
        text = "What are the three most frequently appeared words in the above coded text?"
    rng.shuffle(listed)
    return " ".join(listed), Question(kind, text, tuple(asked), ", ".join(asked), (0.5,))
