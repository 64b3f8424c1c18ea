import numpy as np
import pytest
import tensorflow_datasets as tfds

from sparseformer_jax.data.text import make_text

TEXTS = [f"text {i} é" for i in range(300)]


class SmallBooks(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    names = {"book": tfds.features.Text(), "title": np.str_, "year": np.int32}

    def _info(self):
        features = tfds.features.FeaturesDict(self.names)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        values = {"text": "the text", "title": "a title", "year": 1900, "note": "-"}
        for i, text in enumerate(TEXTS):
            yield i, {name: {**values, "book": text}[name] for name in self.names}


class SmallNotes(SmallBooks):
    names = {"text": tfds.features.Text(), "note": tfds.features.Text()}


class SmallTitles(SmallBooks):
    names = {
        "title": np.str_,
        "note": tfds.features.Text(),
        "book": tfds.features.Text(),
    }


class SmallYears(SmallBooks):
    names = {"year": np.int32}


@pytest.fixture
def prepare(data, tmp_path, capsys):
    """Prepares a data set and returns a config that names it."""

    def build(builder, file_format="array_record"):
        builder(data_dir=tmp_path, file_format=file_format).download_and_prepare()
        data.tfds_name = builder.name
        data.tfds_data_dir = str(tmp_path)
        return data

    tfds.disable_progress_bar()
    return build


def test_reads_the_only_text_feature(prepare, joined):
    source = make_text(prepare(SmallBooks))
    documents = source.documents("train")
    assert sorted(joined(documents)) == sorted(TEXTS)
    assert documents.order is None
    assert list(documents.pieces()) == list(documents.pieces())
    with pytest.raises(ValueError, match="'small_books' has no split 'test'; it has tr"):
        source.documents("test")


def test_prefers_the_feature_text(prepare, joined):
    assert set(joined(make_text(prepare(SmallNotes)).documents("train"))) == {"the text"}


def test_text_field_chooses_a_feature(prepare, joined):
    data = prepare(SmallTitles)
    fingerprints = set()
    for field, expected in (("title", "a title"), ("note", "-")):
        data.text_field = field
        source = make_text(data)
        fingerprints.add(source.fingerprint)
        assert set(joined(source.documents("train"))) == {expected}
    assert len(fingerprints) == 2


@pytest.mark.parametrize(
    ("builder", "field", "message"),
    [
        (
            SmallTitles,
            "text",
            "data.text_field='text': .* choose one of title, note, bo",
        ),
        (SmallBooks, "bok", "data.text_field='bok': .* choose one of book, title"),
        (SmallBooks, "year", "data.text_field='year': .* choose one of book, title"),
        (SmallYears, "text", "choose one of another data set: it has no text"),
    ],
)
def test_no_such_text(prepare, builder, field, message):
    data = prepare(builder)
    data.text_field = field
    with pytest.raises(ValueError, match=message):
        make_text(data)


def test_another_file_format(prepare):
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="stored as parquet .*, only array_record"):
        make_text(prepare(SmallYears, "parquet"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "lm1b",
            "is not prepared in .*; prepare it with: python -c .*'lm1b', data_dir=",
        ),
        ("no_such_set", "no_such_set not found. If it exists, prepare it with"),
        ("not a name", "data.tfds_name='not a name': Parsing builder name string"),
    ],
)
def test_not_installed(data, tmp_path, name, message):
    data.tfds_name = name
    data.tfds_data_dir = str(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        make_text(data)
    assert "\n" not in str(error.value)
