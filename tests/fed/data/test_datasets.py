import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features, Image, Value
from PIL import Image as PILImage

from lora_dp.fed.data.encoding import ImageSpec, TextSpec, encode
from lora_dp.fed.data.opening import open_data
from lora_dp.fed.data.options import DataConfig
from lora_dp.fed.data.own_data import open_own

SPEC = ImageSpec(16, 16, 1, (0.5,), (0.5,))


class Words:
    """A tokenizer of words: its ids are their lengths; it marks which text of a pair a word belongs to."""

    pad_token_id = 0

    def __call__(self, texts, pairs, truncation, max_length, return_attention_mask):
        assert truncation and not return_attention_mask
        if pairs is None:
            return {"input_ids": [[len(word) for word in text.split()][:max_length] for text in texts]}
        words = [(a.split(), b.split()) for a, b in zip(texts, pairs, strict=True)]
        return {
            "input_ids": [[len(word) for word in a + b][:max_length] for a, b in words],
            "token_type_ids": [([0] * len(a) + [1] * len(b))[:max_length] for a, b in words],
        }


def write(folder, features=None, **splits):
    """A folder of one parquet file a split, from columns."""
    folder.mkdir(exist_ok=True)
    for name, columns in splits.items():
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")
    return str(folder)


def write_texts(folder, labels, **more):
    return write(folder, train={"text": [f"text {i}" for i in range(len(labels))], "label": labels, **more})


def test_digits_are_split_the_same_way_every_time():
    raw = open_data(DataConfig())
    splits = encode(raw, SPEC)
    assert (raw.kind, raw.num_labels, raw.label_names) == ("image", 10, list("0123456789"))
    assert len(splits.train) + len(splits.validation) == 1797
    assert len(splits.validation) == pytest.approx(0.2 * 1797, abs=5)
    # stratified: a fifth of each class
    counts = torch.bincount(splits.validation.labels) / torch.bincount(
        torch.cat([splits.train.labels, splits.validation.labels])
    )
    assert counts.sub(0.2).abs().max() < 0.01
    again = encode(open_data(DataConfig()), SPEC)
    assert torch.equal(again.train.batch(range(9))["pixel_values"], splits.train.batch(range(9))["pixel_values"])
    other = open_data(DataConfig(split_seed=1))
    assert not np.array_equal(other.validation_labels, raw.validation_labels)


def test_digits_keep_their_grey_levels():
    train = encode(open_data(DataConfig()), ImageSpec(8, 8, 1, (0.0,), (1.0,))).train
    pixels = train.batch(range(50))["pixel_values"]
    assert pixels.min() == 0 and pixels.max() == 1
    assert (pixels * 16 - (pixels * 16).round()).abs().max() < 0.04


def test_finds_image_and_label_columns_and_the_validation_split(tmp_path):
    features = Features({"id": Value("string"), "picture": Image(), "kind": ClassLabel(names=["cat", "dog"])})
    pictures = [PILImage.new("RGB", (10 + i, 8), (255, 0, 0)) for i in range(4)]
    rows = {"id": list("abcd"), "picture": pictures, "kind": [0, 1, 1, 0]}
    test = {name: column[:2] for name, column in rows.items()}
    folder = write(tmp_path / "pets", features, train=rows, test=test)
    raw = open_data(DataConfig(dataset=folder))
    assert (raw.kind, raw.label_names) == ("image", ["cat", "dog"])
    grey = encode(raw, SPEC)
    assert (len(grey.train), len(grey.validation)) == (4, 2)
    assert grey.train.batch(range(4))["pixel_values"].shape == (4, 1, 16, 16)
    coloured = encode(raw, ImageSpec(6, 5, 3, (0.0,) * 3, (1.0,) * 3)).train[0]["pixel_values"]
    assert torch.equal(coloured, torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 6, 5))


def test_opens_a_folder_of_images(tmp_path):
    for split, count in (("train", 3), ("validation", 2)):
        for label in ("left", "right"):
            (tmp_path / "shapes" / split / label).mkdir(parents=True)
            for i in range(count):
                PILImage.new("L", (8, 8), 30 * i).save(tmp_path / "shapes" / split / label / f"{i}.png")
    splits = encode(open_data(DataConfig(dataset=str(tmp_path / "shapes"))), SPEC)
    assert splits.label_names == ["left", "right"]
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(splits.validation) == 4


def test_string_labels_become_classes_and_texts_tokens(tmp_path):
    folder = write(
        tmp_path / "mail",
        train={"text": ["a bb ccc", "dddd", "", "e"], "label": ["spam", "ham", "spam", "ham"]},
        validation={"text": ["a b c d e f g h i j"], "label": ["spam"]},
    )
    raw = open_data(DataConfig(dataset=folder))
    assert (raw.kind, raw.label_names) == ("text", ["ham", "spam"])
    splits = encode(raw, TextSpec(Words(), 9))
    assert splits.train.labels.tolist() == [1, 0, 1, 0]
    batch = splits.train.batch(range(3))
    assert batch["input_ids"][:, :4].tolist() == [[1, 2, 3, 0], [4, 0, 0, 0], [0, 0, 0, 0]]
    # a text without tokens still has something to attend to
    assert batch["attention_mask"].sum(1).tolist() == [3, 1, 1]
    assert splits.validation.batch([0])["input_ids"].shape == (1, 9)
    shorter = encode(open_data(DataConfig(dataset=folder, max_length=2)), TextSpec(Words(), 9))
    assert shorter.validation.batch([0])["input_ids"].tolist() == [[1, 1]]


def test_integer_labels_are_counted_from_zero(tmp_path):
    raw = open_data(DataConfig(dataset=write_texts(tmp_path / "stars", [5, -1, 3] * 10)))
    assert raw.label_names == ["-1", "3", "5"]
    assert set(raw.train_labels) == {0, 1, 2}


def test_holds_out_a_part_of_train(tmp_path):
    folder = write_texts(tmp_path / "one", [0, 1] * 50)
    raw = open_data(DataConfig(dataset=folder, validation_fraction=0.3))
    assert np.bincount(raw.validation_labels).tolist() == [15, 15]
    assert sorted([*raw.train_inputs, *raw.validation_inputs]) == sorted(f"text {i}" for i in range(100))
    # inputs and labels still belong together
    numbers = np.array([int(text.split()[1]) for text in raw.train_inputs])
    assert np.array_equal(numbers % 2, raw.train_labels)


def test_columns_can_be_named(tmp_path):
    columns = {"title": ["t"] * 10, "body": ["b"] * 10, "stars": [1, 2] * 5, "votes": [1, 3] * 5}
    folder = write(tmp_path / "reviews", train=columns)
    raw = open_data(DataConfig(dataset=folder, input_column="title", label_column="votes"))
    assert raw.label_names == ["1", "3"]
    assert set(raw.train_inputs) == {"t"}
    both = "columns of labels and of images or texts: set label_column and input_column to some of title, body, stars"
    with pytest.raises(ValueError, match=both):
        open_data(DataConfig(dataset=folder))
    with pytest.raises(ValueError, match="column of labels: set label_column to one of title, body, stars, votes"):
        open_data(DataConfig(dataset=folder, input_column="body"))
    with pytest.raises(ValueError, match="set input_column to one of title, body, stars, votes"):
        open_data(DataConfig(dataset=folder, label_column="stars"))
    with pytest.raises(ValueError, match="no column topic in the data set: set input_column to one of"):
        open_data(DataConfig(dataset=folder, label_column="stars", input_column="topic"))
    with pytest.raises(ValueError, match="no column score in the data set: set label_column to one of"):
        open_data(DataConfig(dataset=folder, label_column="score"))
    with pytest.raises(ValueError, match="neither images nor texts"):
        open_data(DataConfig(dataset=folder, label_column="stars", input_column="votes"))


def test_all_columns_that_are_missing_are_named_at_once(tmp_path):
    columns = {"title": ["t"] * 10, "stars": [1, 2] * 5}
    wrong = DataConfig(
        dataset=write(tmp_path / "a", train=columns), label_column="s", input_column="t", pair_column="u"
    )
    said = "no column s and t and u in the data set: set label_column and input_column and pair_column to some of title"
    with pytest.raises(ValueError, match=said.replace("column s", "columns s")):
        open_data(wrong)


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "CSV"])
def test_a_file_is_a_data_set(kind, tmp_path):
    path, rows = tmp_path / f"test.{kind}", {"text": [f"text, {i}" for i in range(20)], "label": [0, 1] * 10}
    data = datasets.Dataset.from_dict(rows)
    if kind.lower() in ("csv", "tsv"):
        data.to_csv(path, sep="\t" if kind == "tsv" else ",")
    elif kind == "parquet":
        data.to_parquet(path)
    else:
        data.to_json(path)
    (tmp_path / "train.csv").write_text("beside it, and another data set")
    raw = open_data(DataConfig(dataset=str(path)))
    assert sorted([*raw.train_inputs, *raw.validation_inputs]) == sorted(rows["text"])
    assert (raw.kind, raw.label_names, len(raw.validation_labels)) == ("text", ["0", "1"], 4)
    own = open_own(DataConfig(dataset=str(path)))
    assert [str(text) for text in own.train_inputs] == rows["text"] and own.train_labels.tolist() == rows["label"]


def test_a_file_of_another_kind_or_without_rows_is_refused(tmp_path):
    (tmp_path / "notes.docx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"notes.docx is no file of data: give a folder, or a file ending in .csv"):
        open_data(DataConfig(dataset=str(tmp_path / "notes.docx")))
    with pytest.raises(ValueError, match=r"no folder missing.csv: give a folder or file"):
        open_data(DataConfig(dataset="missing.csv"))
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(ValueError, match="no data set could be opened in .*empty.json"):
        open_data(DataConfig(dataset=str(tmp_path / "empty.json")))


def test_refuses_labels_that_are_not_classes(tmp_path):
    with pytest.raises(ValueError, match="holds float64, not classes"):
        open_data(DataConfig(dataset=write_texts(tmp_path / "a", [0.5, 1.5])))
    with pytest.raises(ValueError, match="fewer than two classes"):
        open_data(DataConfig(dataset=write_texts(tmp_path / "b", [1, 1])))
    with pytest.raises(ValueError, match="1 rows have a label that the train split does not know"):
        open_data(DataConfig(dataset=write_texts(tmp_path / "c", [0, 1, None])))
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    hidden = {"text": ["x", "y"], "label": [-1, -1]}
    folder = write(tmp_path / "d", features, train={"text": ["x", "y"], "label": [0, 1]}, test=hidden)
    with pytest.raises(ValueError, match="set validation_split to a labelled split"):
        open_data(DataConfig(dataset=folder))


def test_refuses_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no folder .*nowhere: give a folder"):
        open_data(DataConfig(dataset=str(tmp_path / "nowhere")))
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="no data set could be opened in the folder"):
        open_data(DataConfig(dataset=str(tmp_path / "bare")))
    folder = write_texts(tmp_path / "few", [0, 1])
    with pytest.raises(ValueError, match="too few to hold some out: name a validation_split"):
        open_data(DataConfig(dataset=folder))
    with pytest.raises(ValueError, match="has no split dev: set validation_split to one of train"):
        open_data(DataConfig(dataset=folder, validation_split="dev"))
    rows = {"text": ["x", "y"], "label": [0, 1]}
    features = Features({"text": Value("string"), "label": Value("int64")})
    folder = write(tmp_path / "empty", features, train=rows, validation={"text": [], "label": []})
    with pytest.raises(ValueError, match="check its name, and that every split has rows"):
        open_data(DataConfig(dataset=folder))


def test_refuses_missing_inputs_and_deep_images(tmp_path):
    folder = write(tmp_path / "holes", train={"text": ["x", None] * 5, "label": [0, 1] * 5})
    with pytest.raises(ValueError, match="row 1 has no text"):
        encode(open_data(DataConfig(dataset=folder)), TextSpec(Words(), 9))
    features = Features({"image": Image(), "label": Value("int64")})
    deep = [PILImage.fromarray(np.full((4, 4), 40_000, dtype=np.uint16))] * 10
    folder = write(tmp_path / "deep", features, train={"image": deep, "label": [0, 1] * 5})
    with pytest.raises(ValueError, match="more than 8 bits"):
        encode(open_data(DataConfig(dataset=folder)), SPEC)
    folder = write(tmp_path / "gaps", features, train={"image": [None] * 10, "label": [0, 1] * 5})
    with pytest.raises(ValueError, match="row 0 has no image"):
        encode(open_data(DataConfig(dataset=folder)), SPEC)


def test_refuses_a_model_for_another_kind():
    with pytest.raises(ValueError, match="the data set holds images but the model takes texts"):
        encode(open_data(DataConfig()), TextSpec(Words(), 9))


@pytest.mark.parametrize("settings", [{"validation_fraction": 1.0}, {"max_length": 0}])
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        DataConfig(**settings)


def test_pairs_of_texts(tmp_path):
    columns = {
        "premise": ["a man", "two dogs run"],
        "hypothesis": ["someone", "dogs are running"],
        "label": [0, 1],
        "idx": [0, 1],
    }
    folder = write(tmp_path / "data", train=columns, validation=columns)
    raw = open_data(DataConfig(dataset=folder, input_column="premise", pair_column="hypothesis"))
    assert raw.kind == "text" and raw.train_inputs[1] == ("two dogs run", "dogs are running")
    examples = encode(raw, TextSpec(Words(), 5)).train
    batch = examples.batch([1, 0])
    assert batch["input_ids"].tolist() == [[3, 4, 3, 4, 3], [1, 3, 7, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    joined = examples.collate([examples[1], examples[0]])
    assert all(torch.equal(joined[name], batch[name]) for name in batch)
    # The second column is no candidate for the first.
    renamed = write(tmp_path / "other", train={"one": ["a"] * 4, "two": ["b"] * 4, "label": [0, 0, 1, 1]})
    assert (
        open_data(DataConfig(dataset=renamed, pair_column="two", validation_fraction=0.5)).train_inputs
        == [("a", "b")] * 2
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pair_column": "nothing"}, "no column nothing in the data set: set pair_column to one of"),
        ({"pair_column": "label"}, "column label holds no texts: set pair_column"),
        ({"input_column": "text", "pair_column": "text"}, "pair_column and input_column are both text"),
    ],
)
def test_pairs_that_cannot_be(tmp_path, options, message):
    folder = write_texts(tmp_path / "data", [0, 1, 0, 1])
    with pytest.raises(ValueError, match=message):
        open_data(DataConfig(dataset=folder, **options))


def test_a_pair_without_its_second_text_is_named(tmp_path):
    folder = write(tmp_path / "data", train={"a": ["x"] * 4, "b": ["y", None, "y", "y"], "label": [0, 1, 0, 1]})
    raw = open_data(DataConfig(dataset=folder, input_column="a", pair_column="b", validation_fraction=0.5))
    with pytest.raises(ValueError, match="has no text"):
        encode(raw, TextSpec(Words(), 5))
