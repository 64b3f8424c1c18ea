"""Prompts of retrieval are as long as asked, hold their answers where asked, and never change."""

import collections
import itertools
import re

import pytest
import tokenizers

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from sparseformer_jax.evaluation.retrieval import tasks, templates
from sparseformer_jax.generation.sampling import Sampler

PIECE = re.compile(
    r"The (?:number of \w+|pass key) is (\d+)\. (?:Remember it\. \d+ is the pass key\. )?"
)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Reader(Sampler):
    """A sampler that has read no model."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


def subwords(folder):
    """Words that the tasks' text often has are a token, the others several."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<bos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    example = tasks.example("needle", 0.5, 0, 0)
    tokenizer.train_from_iterator([example.prompt(4000)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return Reader(HuggingFaceTokenizer(str(folder / "tokenizer.json"), bos_token="<bos>"))


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return {
        "bytes": Reader(ByteTokenizer()),
        "bytes alone": Reader(ByteTokenizer("", "")),
        "subwords": subwords(tmp_path_factory.mktemp("tokenizer")),
    }


def questions(reader, task, length, seed=0, num_examples=2):
    return tasks.make_questions(
        task, length, depths=DEPTHS, num_examples=num_examples, seed=seed, sampler=reader
    )


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("name", ["bytes", "bytes alone", "subwords"])
def test_a_prompt_and_its_answer_have_exactly_the_length(readers, name, task):
    reader = readers[name]
    for length in (256, 257, 611):
        made = questions(reader, task, length)
        assert len(made.items) == 2 * (len(DEPTHS) if task in tasks.AT_DEPTH else 1)
        for item in made.items:
            tokens = reader.encode(item.prompt)
            assert len(tokens) + made.answer_tokens == length
            answer = " " + ", ".join(item.answers) + "."
            assert len(reader.tokenizer.encode(answer)) < made.answer_tokens


def test_a_length_is_found_where_a_character_adds_two_tokens_or_takes_some():
    """Twenty characters are 14 tokens: one each to 9, then 11 to 15, then 9 to 13."""

    def encode(prompt):
        whole, part = divmod(len(prompt), 20)
        return [0] * (14 * whole + part + (0 if part < 10 else 1 if part < 15 else -6))

    example = tasks.example("passkey", 0.5, 0, 0)
    for num_tokens in range(200, 214):
        assert len(encode(tasks._fitted(example, num_tokens, encode))) == num_tokens


@pytest.mark.parametrize("task", tasks.TASKS)
def test_questions_follow_the_seed_and_nothing_else(readers, task):
    first = questions(readers["bytes"], task, 300)
    assert first == questions(readers["bytes"], task, 300)
    prompts = {item.prompt for item in first.items}
    assert len(prompts) == len(first.items)
    other = questions(readers["bytes"], task, 300, seed=1)
    assert not prompts & {item.prompt for item in other.items}
    longer = questions(readers["bytes"], task, 320)
    assert [item.answers for item in longer.items] == [item.answers for item in first.items]


def test_the_first_questions_are_those_of_every_release(readers):
    """Accuracies of different releases are of the same prompts."""
    (item,) = questions(readers["bytes"], "variable_tracking", 256, num_examples=1).items
    assert item.prompt == (
        "Variables are assigned in this text. Follow them.\n"
        "VAR FMNB = 88145. VAR MKFL = FMNB. VAR BBKP = MKFL. The grass is green. "
        "VAR SGTB = BBKP. VAR KBVF = SGTB. The sky is blu"
        "\nWhich variables have the value 88145? They are"
    )  # fmt: skip


@pytest.mark.parametrize("task", ["passkey", "needle", "multi_key"])
def test_what_is_asked_for_stands_once_and_at_its_depth(readers, task):
    for item in questions(readers["bytes"], task, 2000).items:
        (answer,) = item.answers
        (_, text, question) = item.prompt.split("\n")
        name = re.fullmatch(r"What is the (number of \w+|pass key)\? The \1 is", question)[1]
        numbers = PIECE.findall(text)
        assert len(set(numbers)) == len(numbers) == (4 if task == "multi_key" else 1)
        before = PIECE.sub("", text[: text.index(f"The {name} is {answer}. ")])
        haystack = PIECE.sub("", text)
        assert not re.search(r"\d", haystack)
        assert before == "" or before.endswith(". ")
        longest = len("In the village the teacher praised a gentle blanket. ")
        # To the nearest start of a sentence; the last one is cut, and none starts at its end.
        off = longest if item.depth == 1 else longest / 2
        assert abs(len(before) - item.depth * len(haystack)) <= off


def test_a_piece_goes_to_the_nearest_start_of_a_sentence():
    hay = tasks.Haystack(iter(["aa. ", "bb. ", "cc. ", "dd. "]))
    assert hay.cut(8, []) == "aa. bb. "
    assert [hay.cut(8, [(depth, "X ")]) for depth in (0.0, 0.2, 0.3, 0.7, 0.8, 1.0)] == [
        *("X aa. bb. ", "X aa. bb. ", "aa. X bb. "),
        *("aa. X bb. ", "aa. bb. X ", "aa. bb. X "),
    ]
    assert hay.cut(14, [(0.5, "X "), (0.5, "Y "), (1.0, "Z ")]) == "aa. bb. X Y cc. Z dd"
    assert hay.cut(0, [(0.0, "X "), (1.0, "Y ")]) == "X Y "


def test_every_variable_of_the_chain_has_the_value(readers):
    for item in questions(readers["bytes"], "variable_tracking", 600).items:
        assigned = dict(re.findall(r"VAR (\w+) = (\w+)\. ", item.prompt))
        value = re.search(r"have the value (\d+)\? They are$", item.prompt)[1]
        assert len(assigned) == 5
        has_value = set()
        for name, source in assigned.items():  # in the order of the text
            if source == value or source in has_value:
                has_value.add(name)
        assert has_value == set(item.answers) == set(assigned)


def test_common_words_are_the_only_ones_that_occur_often(readers):
    for item in questions(readers["bytes"], "common_words", 4000).items:
        counts = collections.Counter(item.prompt.split("\n")[1].split())
        assert {word for word, times in counts.items() if times == 4} == set(item.answers)
        assert set(counts.values()) == {4, 1}
        assert len(counts) > 500


def test_no_sentence_names_a_key():
    lists = (templates.ADJECTIVES, templates.PERSONS, templates.THINGS, templates.PLACES)
    text = " ".join(itertools.chain(*lists, templates.VERBS, templates.TIMES, templates.SENTENCES))
    assert not set(text.lower().split()) & set(templates.KEYS)
    assert len(set(templates.KEYS)) == len(templates.KEYS)


def test_the_score_is_the_fraction_of_answers_in_the_continuation():
    assert tasks.score(" it is 12345.", ["12345"]) == 1
    assert tasks.score(" 1234 5", ["12345"]) == 0
    assert tasks.score("abc\nXYZ", ["ABC", "xyz", "KLM", "NOP"]) == 0.5
    assert tasks.score("", ["1"]) == 0


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_length_without_room_says_how_much_the_task_takes(readers, task):
    with pytest.raises(ConfigError, match=rf"--lengths=20: {task} takes \d+ tokens") as raised:
        questions(readers["bytes"], task, 20)
    least = int(re.search(r"takes (\d+)", str(raised.value))[1])
    assert least <= 256  # what the quickstart reads
    questions(readers["bytes"], task, least)
    with pytest.raises(ConfigError, match=f"takes {least} tokens"):
        questions(readers["bytes"], task, least - 1)


def test_a_tokenizer_that_loses_the_answers_is_refused(tmp_path):
    vocabulary = {"<bos>": 0, "<unk>": 1, "text": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    reader = Reader(HuggingFaceTokenizer(str(tmp_path / "tokenizer.json")))
    with pytest.raises(
        ConfigError, match=r"data.tokenizer: cannot write '\d{5}', an answer of passkey"
    ):
        questions(reader, "passkey", 256)


def test_a_tokenizer_that_reads_nothing_of_a_haystack_is_refused(monkeypatch):
    reader = Reader(ByteTokenizer())
    encode = reader.encode
    monkeypatch.setattr(reader, "encode", lambda prompt: encode(prompt)[:200])
    with pytest.raises(ConfigError, match="makes no text of exactly 241 tokens"):
        questions(reader, "passkey", 256)
