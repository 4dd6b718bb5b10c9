"""The committed experiments: each runs, on tiny random models and data of the shapes that it names."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import timm
import torch
from datasets import ClassLabel, Features, Image, Value
from PIL import Image as PILImage
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lora_dp.fed.cli import main
from lora_dp.fed.commands import compare_parser
from lora_dp.fed.compare.grid import Grid
from lora_dp.fed.compare.options import CompareConfig
from lora_dp.fed.data.opening import open_data
from lora_dp.fed.data.options import DataConfig
from lora_dp.fed.methods import get_method

FOLDER = Path(__file__).parents[3] / "experiments"
CONFIGS = sorted(FOLDER.glob("**/*.yaml"))
WORDS = "the film was a joy and its plot fell flat whether you like it or not".split()  # noqa: SIM905
ROWS = 24


def options(path: Path, *more: str) -> tuple[CompareConfig, dict[str, Any]]:
    given = compare_parser().parse_args(["--config", str(path), *more], defaults=False).as_dict()
    given.pop("config")
    own = {name: given.pop(name) for name in CompareConfig.__dataclass_fields__ if name in given}
    return CompareConfig(**own), given


def images(width: int, mode: str, classes: int, image: str, label: str, **more: int) -> dict[str, datasets.Dataset]:
    generator = np.random.default_rng(0)
    shape = (ROWS, width, width) + ((3,) if mode == "RGB" else ())
    pictures = [PILImage.fromarray(p) for p in generator.integers(0, 256, shape, dtype=np.uint8)]
    columns = {image: pictures, label: [i % classes for i in range(ROWS)]}
    features = {image: Image(), label: ClassLabel(num_classes=classes)}
    for name, number in more.items():
        columns[name], features[name] = [i % number for i in range(ROWS)], ClassLabel(num_classes=number)
    data = datasets.Dataset.from_dict(columns, features=Features(features))
    return {"train": data, "validation": data}


def texts(classes: int, *names: str, **splits: str) -> dict[str, datasets.Dataset]:
    generator = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {
        name: [" ".join(generator.choice(WORDS, generator.integers(3, 12))) for _ in range(ROWS)] for name in names
    }
    columns |= {"label": [i % classes for i in range(ROWS)], "idx": list(range(ROWS))}
    features = {name: Value("string") for name in names} | {
        "label": ClassLabel(num_classes=classes),
        "idx": Value("int32"),
    }
    data = datasets.Dataset.from_dict(columns, features=Features(features))
    return {"train": data, splits.get("validation", "validation"): data}


def completions(*names: str) -> dict[str, datasets.Dataset]:
    """Texts by column, and four kinds of them."""
    found = texts(4, *names)
    return {split: data.remove_columns("idx").rename_column("label", "category") for split, data in found.items()}


# By configuration: the data set's columns and classes on the hub.
DATA = {
    "digits": lambda: images(8, "L", 10, "image", "label"),
    "usps": lambda: images(16, "L", 10, "image", "label"),
    "pneumoniamnist": lambda: images(28, "L", 2, "image", "label"),
    "pneumoniamnist-head": lambda: images(28, "L", 2, "image", "label"),
    "pneumoniamnist-rivals": lambda: images(28, "L", 2, "image", "label"),
    "pneumoniamnist-published": lambda: images(28, "L", 2, "image", "label"),
    "pneumoniamnist-ablation": lambda: images(28, "L", 2, "image", "label"),
    "banking77-head": lambda: texts(77, "text"),
    "sst2": lambda: texts(2, "sentence"),
    "sst2-head": lambda: texts(2, "text"),
    "e2e": lambda: completions("mr", "ref"),
    "llama-3.2-1b": lambda: completions("instruction", "context", "response"),
    "qwen3-0.6b": lambda: completions("instruction", "context", "response"),
    "gemma-3-1b": lambda: completions("instruction", "context", "response"),
    "swin-tiny-imagenet": lambda: images(64, "RGB", 200, "image", "label"),
    "swin-cifar100": lambda: images(32, "RGB", 100, "img", "fine_label", coarse_label=20),
    "roberta-sst2": lambda: texts(2, "sentence"),
    "roberta-qnli": lambda: texts(2, "question", "sentence"),
    "roberta-qqp": lambda: texts(2, "question1", "question2"),
    "roberta-mnli": lambda: texts(3, "premise", "hypothesis", validation="validation_matched"),
}


def write_data(folder: Path, splits: dict[str, datasets.Dataset], subset: str | None) -> Path:
    folder.mkdir()
    for name, data in splits.items():
        data.to_parquet(folder / f"{name}.parquet")
    if subset is not None:
        files = "".join(f"  - split: {name}\n    path: {name}.parquet\n" for name in splits)
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n{files}---\n")
    return folder


def write_model(folder: Path, name: str) -> str:
    """A tiny random model of the class that the configuration's model has; the embedded one and timm's are named."""
    torch.manual_seed(0)
    if name == "default" or "swin" in name:
        return name
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad", "mask")}
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(WORDS, vocab_size=300, special_tokens=list(special.values()))
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, model_max_length=128, **special).save_pretrained(folder)
    sizes = {
        "vocab_size": 320,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 132,
        "pad_token_id": 3,
    }
    causal = {"num_key_value_heads": 1, "head_dim": 8, "eos_token_id": 1, **sizes}
    if "Llama" in name or "SmolLM2" in name:
        LlamaForCausalLM(LlamaConfig(**causal)).save_pretrained(folder)
    elif "Qwen3" in name:
        Qwen3ForCausalLM(Qwen3Config(**causal)).save_pretrained(folder)
    elif "gemma-3" in name:
        Gemma3ForCausalLM(Gemma3TextConfig(**causal)).save_pretrained(folder)
    elif "roberta" in name:
        RobertaForSequenceClassification(RobertaConfig(**sizes)).save_pretrained(folder)
    else:
        BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(folder)
    return str(folder)


def test_every_experiment_is_exercised():
    assert {path.stem for path in CONFIGS} == set(DATA)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_grid_can_be_run(path):
    """As committed: every cell's configuration holds together, and its data and model have public names."""
    config, common = options(path)
    grid = Grid(config, common)
    rows = len(config.methods) + len(config.variants)
    assert len(grid.cells) == rows * len(config.epsilons) * len(config.seeds) >= 8
    for name in (common["dataset"], common["model"]):
        assert not name.startswith(("/", ".", "~"))
    methods = [*config.methods, *(options["method"] for options in config.variants.values())]
    # Else nothing is tuned: methods' own rates were chosen on the digits.
    rated = not config.methods and all("lr" in own for own in config.variants.values())
    known = common["dataset"] == "digits" or all(get_method(method).recipe for method in methods)
    assert config.search or rated or known
    assert len(config.tuning_seeds) > 1 and common["delta"] == 1e-5
    assert f"--config experiments/{path.relative_to(FOLDER)} " in path.read_text()


# Every third of them runs in CI.
@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.long] if place % 3 else []) for place, p in enumerate(CONFIGS)],
)
def test_it_runs_on_a_tiny_model(path, tmp_path, capsys, monkeypatch):
    config, common = options(path)
    # Windows of 7, images of 224, layers named as in Swin-B, with fewer channels and blocks.
    sizes = {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)}
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **more: create(name, **more, **sizes))
    data = write_data(tmp_path / "data", DATA[path.stem](), common.get("subset"))
    model = write_model(tmp_path / "model", common["model"])
    method = [*config.methods, *(own["method"] for own in config.variants.values())][0]
    code = main(
        [
            "compare",
            "--config",
            str(path),
            "--dataset",
            str(data),
            "--model",
            model,
            "--methods",
            method,
            "--variants",
            "{}",
            "--epsilons",
            "8",
            "--seeds",
            "0",
            "--search",
            "{}",
            "--lr",
            "0.01",
            "--clients",
            "2",
            "--partition",
            "iid",
            "--rounds",
            "1",
            "--local_steps",
            "2",
            "--batch_size",
            "4",
            "--accountant",
            "rdp",
            "--generate",
            "4",
            "--device",
            "cpu",
            "--processes",
            "1",
            "--output",
            str(tmp_path / "grid"),
        ]
    )
    shown = capsys.readouterr().out
    assert code == 0 and "failed" not in shown and f"{method}, ε = 8, seed 0   {config.metric or 'accuracy'}" in shown


def test_e2e_as_published_becomes_a_folder(tmp_path):
    pandas.DataFrame({"mr": ["name[A]", "name[B]"] * 3, "ref": ["A.", "B."] * 3}).to_csv(
        tmp_path / "dev.csv", index=False
    )
    inputs = [f"name[{number}]" for number in range(80) for _ in range(2)]
    pandas.DataFrame({"mr": inputs, "ref": [f"{text}." for text in inputs]}).to_csv(tmp_path / "test.csv", index=False)
    script = FOLDER / "e2e.py"
    files = [tmp_path / name for name in ("dev.csv", "test.csv", "data")]
    subprocess.run([sys.executable, script, *files], check=True)
    raw = open_data(DataConfig(dataset=str(tmp_path / "data")))
    assert raw.task == "causal-lm" and len(raw.train_inputs) == 6
    assert list(raw.train_inputs[:2]) == [("name[A]\n", "A."), ("name[B]\n", "B.")]
    assert len(raw.validation_inputs) == 100 and len({prompt for prompt, _ in raw.validation_inputs}) == 50


@pytest.mark.slow
def test_pneumoniamnist_as_published_becomes_a_folder(tmp_path):
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for part, count in (("train", 12), ("val", 6), ("test", 3)):
        arrays[f"{part}_images"] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(count).reshape(-1, 1) % 2
    np.savez(tmp_path / "pneumoniamnist.npz", **arrays)
    script = FOLDER / "pneumoniamnist.py"
    subprocess.run([sys.executable, script, tmp_path / "pneumoniamnist.npz", tmp_path / "data"], check=True)
    raw = open_data(DataConfig(dataset=str(tmp_path / "data")))
    assert raw.label_names == ["normal", "pneumonia"] and raw.validation_labels.tolist() == [0, 1] * 3
    assert np.array_equal(np.stack([np.asarray(image) for image in raw.train_inputs]), arrays["train_images"])
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["train.parquet", "validation.parquet"]
