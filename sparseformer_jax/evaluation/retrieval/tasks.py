"""Retrieval tasks: prompts of exactly so many tokens, each with answers that stand in it.

The tasks are those of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3), drawn from a seed
and without examples in the prompt:

    passkey            a number in a haystack of five repeated sentences
    needle             the number of a thing, in a haystack of sentences that hardly repeat
    multi_key          the same, among the numbers of three other things
    variable_tracking  a chain of assignments: all variables that have a value
    common_words       a list of words: the three that occur four times, the others once

The first three have what is asked for at a depth that is given. The others spread it evenly at
random.
"""

import bisect
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.evaluation.retrieval import templates
from sparseformer_jax.generation.sampling import Sampler

_NUM_DISTRACTORS = 3
_NUM_HOPS = 4
_NUM_COMMON, _COMMON_TIMES = 3, 4

# A model may begin its answer with a space, a quotation mark or a line.
_SPARE_TOKENS = 8
# More characters than a token has on average in any text of ours.
_MAX_CHARACTERS = 64
# A haystack grows by proportion until no more tokens than that are missing, then step by step.
_NEAR, _GUESSES = 6, 24


class Haystack:
    """Unending text that may be cut anywhere, in which pieces are hidden between sentences.

    Args:
      sentences: without end, each with the space after it; words in the same way.
    """

    def __init__(self, sentences: Iterator[str]) -> None:
        self._sentences, self._text, self._starts = sentences, "", [0]

    def cut(self, size: int, pieces: Sequence[tuple[float, str]]) -> str:
        """Returns the first `size` characters, with pieces in them.

        Args:
          size: of the haystack alone.
          pieces: depth and text of each, in order. A depth is the fraction of the haystack that
            stands before the piece, up to the nearest start of a sentence.
        """
        self._grow(size)
        starts = self._starts[: bisect.bisect_right(self._starts, size)]
        parts, end = [], 0
        for depth, piece in pieces:
            start = _nearest(starts, depth * size)
            parts += [self._text[end:start], piece]
            end = start
        return "".join(parts) + self._text[end:size]

    def _grow(self, size: int) -> None:
        added = []
        while self._starts[-1] < size:
            added.append(next(self._sentences))
            self._starts.append(self._starts[-1] + len(added[-1]))
        self._text += "".join(added)


def _nearest(ordered: Sequence[int], wanted: float) -> int:
    place = bisect.bisect_left(ordered, wanted)
    return min(ordered[max(0, place - 1) : place + 1], key=lambda value: abs(value - wanted))


@dataclasses.dataclass(frozen=True)
class Example:
    """A question about a text that may have any length.

    Attributes:
      head: before the haystack.
      haystack: where the pieces are hidden.
      pieces: depth and text of each, in order.
      tail: after the haystack, up to where the answer begins.
      answers: what a right continuation contains, in any order.
    """

    head: str
    haystack: Haystack
    pieces: Sequence[tuple[float, str]]
    tail: str
    answers: Sequence[str]

    def prompt(self, size: int) -> str:
        """Returns the prompt with a haystack of `size` characters."""
        return self.head + self.haystack.cut(size, self.pieces) + self.tail

    def answer(self) -> str:
        """Returns the continuation that gives all answers and nothing else."""
        return templates.ANSWER.format(answers=templates.ANSWER_SEPARATOR.join(self.answers))


def score(continuation: str, answers: Sequence[str]) -> float:
    """Returns the fraction of answers that a continuation contains, as RULER: without case."""
    text = continuation.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def passkey(rng: random.Random, depth: float) -> Example:
    """Returns a question for a number of five digits, hidden in noise."""
    value = _number(rng, 5)
    return Example(
        templates.PASSKEY_HEAD,
        Haystack(_noise()),
        [(depth, templates.PASSKEY.format(value=value))],
        templates.PASSKEY_TAIL,
        [value],
    )


def needle(rng: random.Random, depth: float) -> Example:
    """Returns a question for the one number of seven digits in varied sentences."""
    return _needles(rng, depth, templates.NEEDLE_HEAD, 0)


def multi_key(rng: random.Random, depth: float) -> Example:
    """Returns a question for one of four numbers, each of a thing of its own."""
    return _needles(rng, depth, templates.MULTI_KEY_HEAD, _NUM_DISTRACTORS)


def variable_tracking(rng: random.Random) -> Example:
    """Returns a question for all variables of a chain, the first of which is assigned a value."""
    names = [name.upper() for name in itertools.islice(_distinct(_name, rng), _NUM_HOPS + 1)]
    value = _number(rng, 5)
    chain = zip(names, [value, *names], strict=False)
    pieces = [templates.ASSIGNMENT.format(name=name, value=source) for name, source in chain]
    return Example(
        templates.VARIABLES_HEAD,
        Haystack(_noise()),
        list(zip(_depths(rng, len(pieces)), pieces, strict=True)),
        templates.VARIABLES_TAIL.format(value=value),
        names,
    )


def common_words(rng: random.Random) -> Example:
    """Returns a question for the words that a list has more than once."""
    words = _distinct(_word, rng)
    common = list(itertools.islice(words, _NUM_COMMON))
    pieces = [templates.COMMON_WORD.format(word=word) for word in common * _COMMON_TIMES]
    rng.shuffle(pieces)
    depths = _depths(rng, len(pieces))
    return Example(
        templates.COMMON_WORDS_HEAD,
        Haystack(templates.COMMON_WORD.format(word=word) for word in words),
        list(zip(depths, pieces, strict=True)),
        templates.COMMON_WORDS_TAIL.format(number=_NUM_COMMON),
        common,
    )


AT_DEPTH: dict[str, Callable[[random.Random, float], Example]] = {
    "passkey": passkey,
    "needle": needle,
    "multi_key": multi_key,
}
SPREAD: dict[str, Callable[[random.Random], Example]] = {
    "variable_tracking": variable_tracking,
    "common_words": common_words,
}
TASKS = (*AT_DEPTH, *SPREAD)


def example(task: str, depth: float | None, number: int, seed: int) -> Example:
    """Returns an example, another one for every argument.

    It is asked at every length, so that what differs between lengths is not the question.

    Args:
      task: one of `TASKS`.
      depth: 0 to 1, of what is asked for; None for a task that spreads it.
      number: of the example.
      seed: of all examples.
    """
    rng = random.Random(f"{seed} {task} {depth} {number}")
    return SPREAD[task](rng) if depth is None else AT_DEPTH[task](rng, depth)


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt and what is asked for.

    Attributes:
      prompt: the text.
      answers: what a right continuation contains.
      depth: 0 to 1, of what is asked for; None: spread.
    """

    prompt: str
    answers: Sequence[str]
    depth: float | None


@dataclasses.dataclass(frozen=True)
class Questions:
    """All questions of a task at a length.

    Attributes:
      task: its name.
      length: of a prompt and `answer_tokens`, in tokens.
      answer_tokens: how many tokens each answer may take.
      items: each of them, in the order of depths.
    """

    task: str
    length: int
    answer_tokens: int
    items: Sequence[Question]


def make_questions(
    task: str,
    length: int,
    *,
    depths: Sequence[float],
    num_examples: int,
    seed: int,
    sampler: Sampler,
) -> Questions:
    """Returns the questions of a task at a length.

    Args:
      task: one of `TASKS`.
      length: in tokens.
      depths: 0 to 1; a task that spreads what is asked for does not look at them.
      num_examples: at each depth.
      seed: of the examples.
      sampler: whose tokens count.

    Raises:
      ConfigError: the length is too small for the task, or the tokenizer loses the answers.
    """
    places = depths if task in AT_DEPTH else [None]
    drawn = [
        (depth, example(task, depth, number, seed))
        for depth, number in itertools.product(places, range(num_examples))
    ]
    answers = [sampler.tokenizer.encode(x.answer()) for _, x in drawn]
    answer_tokens = _SPARE_TOKENS + max(map(len, answers))
    least = answer_tokens + max(len(sampler.encode(x.prompt(0))) for _, x in drawn)
    if length < least:
        raise ConfigError(
            f"--lengths={length}: {task} takes {least} tokens or more, {answer_tokens} of them "
            "for the answer; make it longer, or leave the task out of --tasks"
        )
    found = []
    for depth, x in drawn:
        prompt = _fitted(x, length - answer_tokens, sampler.encode)
        _check_answers(task, prompt, x.answers, sampler)
        found.append(Question(prompt, x.answers, depth))
    return Questions(task, length, answer_tokens, found)


def _check_answers(task: str, prompt: str, answers: Sequence[str], sampler: Sampler) -> None:
    """Refuses a tokenizer that does not know the characters of an answer."""
    text = sampler.tokenizer.decode(sampler.encode(prompt))
    missing = [answer for answer in answers if not score(text, [answer])]
    if missing:
        raise ConfigError(
            f"data.tokenizer: cannot write {missing[0]!r}, an answer of {task}; take one that "
            "knows all letters and digits, or leave the task out of --tasks"
        )


def _fitted(example: Example, num_tokens: int, encode: Callable[[str], list[int]]) -> str:
    """The prompt of exactly so many tokens."""

    def missing(size: int) -> int:
        return num_tokens - len(encode(example.prompt(size)))

    wanted, size = missing(0), 0
    for _ in range(_GUESSES):
        left = missing(size)
        if not left:
            return example.prompt(size)
        if size and abs(left) > _NEAR:
            size = min(round(size * wanted / max(1, wanted - left)), _MAX_CHARACTERS * wanted)
        else:  # most characters more are a token more, or none
            size = max(0, size + left)
    # Steps go to and fro where a character makes two tokens more.
    nearby = range(max(0, size - _MAX_CHARACTERS), size + _MAX_CHARACTERS)
    for place in sorted(nearby, key=lambda place: abs(place - size)):
        if not missing(place):
            return example.prompt(place)
    raise ConfigError(
        f"data.tokenizer: makes no text of exactly {num_tokens} tokens; take other --lengths"
    )


def _needles(rng: random.Random, depth: float, head: str, num_distractors: int) -> Example:
    key, *others = rng.sample(templates.KEYS, 1 + num_distractors)
    value, *values = itertools.islice(_distinct(_seven_digits, rng), 1 + num_distractors)
    pieces = [(depth, templates.NEEDLE.format(key=key, value=value))]
    for place, other, number in zip(_depths(rng, num_distractors), others, values, strict=True):
        pieces.append((place, templates.NEEDLE.format(key=other, value=number)))
    return Example(
        head,
        Haystack(_sentences(rng)),
        sorted(pieces),
        templates.NEEDLE_TAIL.format(key=key),
        [value],
    )


def _depths(rng: random.Random, number: int) -> list[float]:
    return sorted(rng.random() for _ in range(number))


def _number(rng: random.Random, digits: int) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _seven_digits(rng: random.Random) -> str:
    return _number(rng, 7)


def _name(rng: random.Random) -> str:
    return "".join(rng.choices(templates.CONSONANTS, k=4))


def _word(rng: random.Random) -> str:
    letters = (templates.CONSONANTS, templates.VOWELS) * 2 + (templates.CONSONANTS,)
    return "".join(map(rng.choice, letters))


def _distinct(draw: Callable[[random.Random], str], rng: random.Random) -> Iterator[str]:
    """Draws without end, none twice."""
    seen: set[str] = set()
    while True:
        drawn = draw(rng)
        if drawn not in seen:
            seen.add(drawn)
            yield drawn


def _noise() -> Iterator[str]:
    return itertools.cycle(templates.NOISE)


def _sentences(rng: random.Random) -> Iterator[str]:
    while True:
        yield rng.choice(templates.SENTENCES).format(
            adjective=rng.choice(templates.ADJECTIVES),
            person=rng.choice(templates.PERSONS),
            verb=rng.choice(templates.VERBS),
            thing=rng.choice(templates.THINGS),
            place=rng.choice(templates.PLACES),
            time=rng.choice(templates.TIMES),
        )
