"""Trials of a model's own batches: other numbers of examples, other padding, other structures, numbers as arguments."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_dp.engine.hooks
import lora_dp.isolation.trials
from lora_dp import DPLinear, IsolationError, LoRAConfig, PrivacyEngine, inject_lora
from lora_dp.isolation.batches.kinds import chosen, structure
from lora_dp.isolation.batches.padding import narrowed
from tests.isolation.text_models import LONGEST, VOCABULARY, Patches, Pooling, Scaled, run, scaled, texts
from tests.models import assert_refuses, examples, mlp, take_step
from tests.support import make_private

# Padding


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("left", [False, True])
def test_a_pooling_over_padding_is_refused_once_widths_differ(left, dropout):
    first, second = texts(4, 4, 4, 4, left=left), texts(9, 4, 3, 6, left=left)
    with pytest.raises(IsolationError, match="changes with the padding of the batch"):
        run(Pooling(masked=False, dropout=dropout), first, second)
    run(Pooling(masked=True, dropout=dropout), first, second)


def test_one_fixed_width_is_nobodys_business():
    """Padding that every batch has alike ties no example to another."""
    run(Pooling(masked=False), *[texts(*lengths, width=LONGEST) for lengths in ((4, 4, 4, 4), (9, 4, 3, 6), (1, 2, 9))])


def test_padding_is_found_without_a_mask():
    """A model that is given ids alone; the zeros that end them are padding."""
    batches = [{"input_ids": texts(*lengths)["input_ids"]} for lengths in ((4, 4, 4, 4), (9, 4, 3, 6))]
    with pytest.raises(IsolationError, match="changes with the padding of the batch"):
        run(Pooling(masked=False), *batches)


def test_the_loader_tells_that_widths_vary():
    """Then the very first batch is tried."""
    model = Pooling(masked=False).train()
    optimizer = make_private(model, batch_size=4)
    optimizer.recorder.expect_padding()
    assert_refuses(IsolationError, "changes with the padding of the batch", lambda: model(**texts(9, 4, 3, 6)))


def test_absolute_positions_of_left_padded_texts_are_refused():
    """Without position_ids GPT-2 counts padding: an example's positions move with the longest of its batch."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=VOCABULARY, n_positions=20)
    model = inject_lora(tf.GPT2LMHeadModel(config), LoRAConfig(r=2, target_modules=["c_attn"]))
    nn.init.normal_(model.transformer.h[0].attn.c_attn.lora_B)
    engine = PrivacyEngine("rdp")
    assert_refuses(
        IsolationError, "changes with the padding", lambda: engine.check_isolation(model, texts(9, 4, 3, 6, left=True))
    )
    engine.check_isolation(model, texts(9, 4, 3, 6))


def test_answers_found_among_padding_are_refused():
    """Transformers' question answering divides by all positions, padding too: the width enters every loss."""
    import transformers as tf

    torch.manual_seed(0)
    model = inject_lora(
        tf.BertForQuestionAnswering(
            tf.BertConfig(
                vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20
            )
        ),
        LoRAConfig(r=2, target_modules=["query"], trainable_modules=["qa_outputs"]),
    )
    batch = {
        **texts(9, 4, 3, 6),
        "start_positions": torch.tensor([1, 0, 2, 3]),
        "end_positions": torch.tensor([2, 3, 2, 5]),
    }
    engine = PrivacyEngine("rdp")
    make_private(model.train(), batch_size=4, engine=engine)
    assert_refuses(IsolationError, "changes with the padding", lambda: engine.check_isolation(model, batch))


# Structures that come later


def classifier() -> nn.Module:
    import transformers as tf

    torch.manual_seed(0)
    return inject_lora(
        tf.BertForSequenceClassification(
            tf.BertConfig(
                vocab_size=VOCABULARY,
                num_labels=3,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=20,
            )
        ),
        LoRAConfig(r=2, target_modules=["query"], trainable_modules=["classifier"]),
    )


def labelled(*labels: int) -> dict[str, Tensor]:
    return {**texts(*[5] * len(labels)), "labels": torch.tensor(labels)}


@pytest.mark.slow
def test_ignored_labels_of_a_later_batch_are_refused():
    model = classifier()
    with pytest.raises(IsolationError, match="The loss mixes examples"):
        run(model, labelled(0, 1, 2, 0, 1, 2), labelled(0, 1, 0, 1), labelled(0, -100, 2, -100, 1, 1))


def refuse_an_answer_beyond(n: int, place: int) -> None:
    """In the second batch, one answer lies beyond the tokens: the loss passes over it."""
    import transformers as tf

    torch.manual_seed(0)
    model = inject_lora(
        tf.BertForQuestionAnswering(
            tf.BertConfig(
                vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20
            )
        ),
        LoRAConfig(r=2, target_modules=["query"], trainable_modules=["qa_outputs"]),
    )
    inside = {**texts(*[5] * n), "start_positions": torch.arange(n) % 4, "end_positions": torch.arange(n) % 3 + 2}
    beyond = {**inside, "start_positions": torch.where(torch.arange(n) == place, 99, inside["start_positions"])}
    with pytest.raises(IsolationError, match="The loss mixes examples"):
        run(model, inside, beyond)


@pytest.mark.slow
def test_an_answer_beyond_the_tokens_of_a_later_batch_is_refused():
    refuse_an_answer_beyond(4, 2)


@pytest.mark.slow
def test_an_answer_beyond_the_tokens_is_among_the_few_examples_that_are_tried():
    refuse_an_answer_beyond(12, 9)


def images(*sizes: tuple[int, int]) -> dict[str, Tensor]:
    counts = torch.tensor(sizes)
    return {
        "input_ids": torch.ones(len(sizes), 3, dtype=torch.long),
        "counts": counts,
        "patches": torch.randn(int(counts.prod(1).sum()), 6, generator=torch.Generator().manual_seed(0)),
    }


@pytest.mark.parametrize(
    "later", [((1, 2), (2, 5), (1, 2), (1, 2)), ((2, 2), (2, 2), (1, 2), (2, 3)), ((2, 4), (1, 2), (2, 2), (2, 1))]
)
def test_unequal_groups_of_a_later_batch_are_refused(later):
    with pytest.raises(IsolationError, match="attributed to other examples"):
        run(Patches(), images((2, 2), (2, 2), (2, 2), (2, 2)), images(*later))


# Other numbers of examples, and numbers as arguments


@pytest.mark.parametrize("tensor", [False, True])
def test_a_count_among_the_arguments_is_refused(tensor):
    def count(value: float) -> Any:
        return torch.tensor(value) if tensor else value

    with pytest.raises(IsolationError, match=r"was declared a mean.*\['tokens'\]"):
        run(Scaled(), scaled(4, count(4.0)))
    model = Scaled().train()
    optimizer = make_private(model, batch_size=4, loss_reduction="sum")
    model(**scaled(4, count(4.0)))
    optimizer.recorder.discard()
    with pytest.raises(IsolationError, match=r"The argument \S*\['tokens'\] of the model differs from batch to batch"):
        model(**scaled(4, count(5.0)))


class Switched(nn.Module):
    """Looks at the first columns alone, unless it is told that the batch holds something long."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DPLinear(6, 3)

    def forward(self, x: Tensor, long: Any, harmless: Any = None) -> Tensor:
        return self.inner(
            x
            if long == "yes" or long is True or (isinstance(long, Tensor) and bool(long))
            else x * (torch.arange(6) < 3)
        )


@pytest.mark.parametrize(
    ("short", "long"),
    [(False, True), ("no", "yes"), (torch.tensor(False), torch.tensor(True))],
    ids=["bool", "str", "tensor"],
)
def test_what_is_switched_from_batch_to_batch_must_change_nothing(short, long):
    model = Switched().train()
    optimizer = make_private(model, batch_size=4)
    for harmless in (short, long, short):
        model(examples(4)[0], short, harmless)
        optimizer.recorder.discard()
    with pytest.raises(IsolationError, match=r"The argument \S*\['long'\] of the model differs from batch to batch"):
        model(examples(4)[0], long)


def test_a_loss_that_is_no_mean_although_it_looks_at_no_other_example_is_refused():
    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.inner(x)
            return {"loss": F.cross_entropy(logits, labels, reduction="sum") / len(x) ** 0.5, "logits": logits}

    x, y = examples(8)
    with pytest.raises(IsolationError, match="neither a mean nor a sum"):
        run(Rooted(), {"x": x, "labels": y})


def test_an_output_that_counts_the_batch_is_refused():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) / len(x)

    with pytest.raises(IsolationError, match="changes with the number of examples"):
        run(Counting(), {"x": examples(8)[0]})


def test_every_loss_that_a_model_returns_is_tried_when_it_is_used():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            out = self.inner(x)
            return {"loss": out.square().mean(), "balance": out.mean(0).square().sum()}

    model, (x, _) = Two().train(), examples(8)
    optimizer = make_private(model, batch_size=8)
    optimizer.batch.expect(8)
    model(x)["loss"].backward()
    optimizer.step()
    output = model(x)
    with pytest.raises(IsolationError, match="a number that the model returned"):
        (output["loss"] + 0.01 * output["balance"]).backward()


# How often, and how closely


def count_trials(monkeypatch: pytest.MonkeyPatch, batches: list[dict[str, Any]]) -> int:
    calls, check = [], lora_dp.engine.hooks.check_isolation
    monkeypatch.setattr(
        lora_dp.engine.hooks, "check_isolation", lambda *args, **options: calls.append(1) or check(*args, **options)
    )
    monkeypatch.setattr(lora_dp.engine.hooks, "drawn_for_test", lambda: False)
    run(Pooling(masked=True), *batches)
    return len(calls)


@pytest.mark.slow
def test_batches_of_one_structure_are_tried_once(monkeypatch):
    """Sizes within a factor of two are one structure; that widths vary is told by the second batch."""
    batches = [texts(*[5 + i % 2] * (4 + i)) for i in range(8)]
    assert count_trials(monkeypatch, batches) == 2
    assert count_trials(monkeypatch, [*batches, texts(6, 5, 3, 4)]) == 3  # the first that has padding
    assert count_trials(monkeypatch, [*batches, texts(20, 17, 3, 9), texts(9, 4, 3, 6), texts(8, 5, 3, 6)]) == 4


def test_later_batches_are_tried_in_secret(monkeypatch):
    class Late(nn.Module):
        mixes = False

        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x)
            return out - out.mean(0) if self.mixes else out

    monkeypatch.setattr(lora_dp.engine.hooks, "drawn_for_test", lambda: model.mixes)
    model = Late().train()
    optimizer = make_private(model, batch_size=4)
    take_step(model, optimizer, examples(4))
    model.mixes = True
    assert_refuses(IsolationError, "", lambda: model(examples(4)[0]))


@pytest.mark.parametrize(("share", "refused"), [(1e-5, False), (1e-3, True), (3e-3, True)])
def test_a_small_share_of_the_others_is_seen(share, refused, monkeypatch):
    """Above a ten-thousandth of an example's own values, in float32."""
    # By weights that nobody knows, one example in some thousands has a tenth of the others' gradient.
    monkeypatch.setattr(lora_dp.isolation.trials, "secrets", SimpleNamespace(randbits=lambda bits: 1))

    class Leaky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + share * x.roll(1, 0)

    torch.manual_seed(0)  # an example whose own values all but cancel has none to compare with
    model = nn.Sequential(DPLinear(6, 6), Leaky(), DPLinear(6, 3)).train()
    x = torch.ones(4, 6) + 0.5 * torch.rand(4, 6)
    if refused:
        with pytest.raises(IsolationError):
            run_positional(model, x)
    else:
        run_positional(model, x)


def run_positional(model: nn.Module, x: Tensor) -> None:
    make_private(model, batch_size=len(x))
    model(x)


def test_few_examples_of_a_batch_are_tried():
    """The first, the last, and the extremes of labels and lengths."""
    batch = {**texts(*[5] * 40), "labels": torch.zeros(40, 5, dtype=torch.long)}
    batch["labels"][7] = -100
    batch["attention_mask"][11, 1:] = 0
    rows = chosen(((), batch, None), 40, 4)
    assert len(rows) == 4 and rows == sorted(set(rows)) and {7, 11} <= set(rows)
    assert len(chosen(batch, 3, 4)) == 3


def test_padding_is_cut_where_it_is():
    batch = texts(9, 4, 3, 6)
    found = list(narrowed(batch, 4))
    assert [(part.rows, part.tokens, part.kept) for part in found[0]] == [
        ([1, 2], 9, slice(0, 4)),
        ([1, 2], 9, slice(0, 8)),
    ]  # the second for models that work on blocks
    assert found[0][0].call["input_ids"].shape == (2, 4) and found[0][0].mask.sum(1).tolist() == [4, 3]
    assert not list(narrowed(texts(5, 5, 5), 3))


def test_structures_tell_what_matters_apart():
    kinds = [
        structure(batch, 4)
        for batch in (
            labelled(0, 1, 2, 0),
            labelled(2, 2, 1, 1),
            labelled(0, -100, 1, 1),
            texts(5, 5, 5, 5),
            texts(9, 5, 5, 5),
        )
    ]
    assert kinds[0] == kinds[1] and len(set(kinds)) == 4


@pytest.mark.parametrize("error", [AssertionError, KeyError, TypeError])
def test_a_model_of_one_size_is_left_alone(error):
    """Images with a border: less of them is no batch that the model takes, whatever it says to that."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = DPLinear(8 * 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1:] != (1, 8, 8):
                raise error("another size")
            return self.head(x.flatten(1))

    model, x = Fixed().train(), torch.rand(6, 1, 8, 8)
    for row, border in enumerate((1, 2, 3, 1, 2, 2)):
        x[row, :, :, -border:] = 0
    optimizer = make_private(model, batch_size=6)
    optimizer.recorder.expect_padding()
    take_step(model, optimizer, (x, examples(6)[1]))
    assert optimizer.ledger.steps == 1


@pytest.mark.slow
@pytest.mark.parametrize("looks", [False, True])
def test_padding_is_tried_in_full_precision_under_autocast(looks):
    """Rounded to bfloat16, what another padding leaves alone would seem to change with it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = inject_lora(
        transformers.BertForSequenceClassification(config),
        LoRAConfig(r=2, target_modules=["query"], trainable_modules=["classifier"]),
    ).train()
    optimizer = make_private(model, batch_size=4)
    optimizer.recorder.expect_padding()
    mask = (torch.arange(48) < torch.tensor([[15], [39], [7], [30]])).long()
    batch = {"input_ids": torch.randint(2, 40, (4, 48)) * mask, "attention_mask": mask if not looks else None}
    with torch.autocast("cpu", torch.bfloat16):
        if looks:
            assert_refuses(IsolationError, "changes with the padding", lambda: model(**batch))
        else:
            model(**batch)
