"""What a configuration names, opened: the data, split over the clients, and the model with what trains it."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from lora_dp.fed.config import RunConfig
from lora_dp.fed.data.augmentation import Views
from lora_dp.fed.data.completions import CompletionExamples
from lora_dp.fed.data.encoding import ImageSpec, InputSpec, RawData, Splits, TextSpec, encode
from lora_dp.fed.data.examples import Examples
from lora_dp.fed.data.kept_activations import KeptActivations
from lora_dp.fed.data.opening import open_data
from lora_dp.fed.data.partition import partition
from lora_dp.fed.methods import Method, WeightedAverage
from lora_dp.fed.models.causal_models import load_causal_model
from lora_dp.fed.models.class_texts import texts_of_names
from lora_dp.fed.models.completion_loss import CompletionLoss
from lora_dp.fed.models.feature_models import blank_batch, vocabulary_of
from lora_dp.fed.models.frozen_front import Front, HeadAlone, LastBlocks, head_is_last
from lora_dp.fed.models.loading import LoadedModel, load_model
from lora_dp.fed.models.pooling import blocks_of
from lora_dp.fed.origin import Origin, examples_digest, plain_options
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.generation import Prompts
from lora_dp.fed.rounds.kept_data import made_once
from lora_dp.fed.rounds.local_training import LocalTraining
from lora_dp.fed.rounds.messages import Workspace
from lora_dp.fed.rounds.privacy_plan import PrivacyPlan
from lora_dp.fed.rounds.seeds import Stream, derived_seed


@dataclass(frozen=True)
class Job:
    """An opened run; server and clients alike open it from the configuration.

    Attributes:
        trainer: does a client's turn.
        train: all private examples.
        parts: indices of each client's examples; a range where only their number is known.
        validation: public examples to evaluate on.
        ranks: of each client's adapters.
        prompts: that a language model is to go on from before and after training; None for none.
    """

    trainer: Trainer
    train: Examples
    parts: Sequence[np.ndarray | range]
    validation: Examples
    ranks: list[int]
    prompts: Prompts | None = None

    @property
    def sizes(self) -> list[int]:
        """Number of examples of each client."""
        return [len(part) for part in self.parts]

    def examples(self, client: int) -> Examples:
        """A client's private examples, as a view."""
        return self.train.subset(self.parts[client])

    def origin(self, config: RunConfig) -> Origin:
        """What tells this run from another, opened from ``config``."""
        return Origin(plain_options(config), examples_digest(self.train, self.parts, self.validation))


class ClientExamples(Sequence[Examples]):
    """Each client's examples, made when they are asked for: an idle client is a list of indices."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __len__(self) -> int:
        return len(self._job.parts)

    def __getitem__(self, client: int) -> Examples:  # type: ignore[override]
        return self._job.examples(client)


def plan_of(config: RunConfig, examples: int = 0) -> PrivacyPlan:
    """The privacy of a run, from its configuration alone: no data are needed to judge it.

    Args:
        config: of the run.
        examples: of all clients together; used for the noise of DEeR's released code alone.
    """
    privacy, chosen = config.privacy, config.federation
    return PrivacyPlan(
        privacy.target,
        privacy.delta,
        privacy.accountant,
        privacy.unit,
        privacy.noise_by,
        privacy.max_grad_norm,
        privacy.max_update_norm,
        privacy.clipping,
        chosen.batch_size,
        chosen.local_steps,
        config.method.turns,
        chosen.rounds,
        chosen.participations,
        chosen.client_rate,
        chosen.clients,
        privacy.mechanism,
        examples,
        privacy.sums_share,
        privacy.clip_quantile,
    )


def open_job(
    config: RunConfig, *, raw: RawData | None = None, encode: Callable[[RawData, InputSpec], Splits] = encode
) -> Job:
    """Opens data and model and splits the examples over the clients.

    Args:
        config: of the run.
        raw: the data, where they have been opened.
        encode: makes tensors of what was opened.

    Raises:
        ValueError: data, model and settings that do not go together, in one sentence.
    """
    device = _device(config.run.device)
    seed, chosen = config.run.seed, config.federation
    torch.manual_seed(seed)
    own_data = raw is None
    raw = made_once("opened", config.data, lambda: open_data(config.data)) if raw is None else raw
    ranks = chosen.client_ranks(config.model.r if config.method.has_adapters else 0, derived_seed(seed, Stream.RANKS))
    config.settle_task(raw.task)
    model_config = config.model
    if model_config.class_texts == "names":
        model_config = replace(model_config, class_texts=texts_of_names(raw.label_names))
    if raw.task == "causal-lm":
        loaded = load_causal_model(
            model_config, seed=seed, adapter=config.method.adapter, adapts_last=config.method.adapts_last
        )
    else:
        loaded = load_model(
            model_config,
            raw.num_labels,
            raw.kind,
            seed=seed,
            adapter=config.method.adapter,
            adapted=config.method.has_adapters,
            adapts_last=config.method.adapts_last,
        )
    config.settle(loaded.config, head_is_new=loaded.head_is_new)
    if config.privacy.sums_share and config.model.features == "own":
        raise ValueError(
            f"sums_share starts a head on features of unit length, but {config.model.name} keeps its own head: choose "
            "features unit or mean, or leave sums_share out."
        )
    spec = loaded.spec
    if own_data:
        # A tokenizer is made anew with each model, and is the same for the same name.
        same = spec if isinstance(spec, ImageSpec) else (config.model.name, spec.max_length)
        splits = made_once("encoded", (config.data, same), lambda: encode(raw, spec))
    else:
        splits = encode(raw, spec)
    if isinstance(splits.validation, CompletionExamples) and len(splits.validation) and not splits.validation.learned:
        # Of the validation data alone, which are public: at a node one private text could decide.
        raise ValueError(
            f"no token of any completion of the validation data lies within max_length {config.data.max_length}: raise "
            "it, or shorten the prompts"
        )
    model = loaded.model.to(device)
    called = CompletionLoss(model) if raw.task == "causal-lm" else model
    workspace, train, validation = _without_front(config, loaded, model, called, splits)
    if config.optimization.views > 1 and (raw.kind != "image" or isinstance(train, KeptActivations)):
        raise ValueError(
            "views are of images that all of the model is trained on: leave views out for texts, with adapt_last, and "
            "with a method that has no adapters."
        )
    parts = partition(
        splits.train.labels.numpy(),
        chosen.clients,
        chosen.partition,
        alpha=chosen.dirichlet_alpha,
        seed=seed,
        # Who is alone has all, however few; that a client has few is not public where whole clients are protected.
        **({"min_examples": 1} if chosen.clients == 1 else {}),
    )
    method = config.method
    optimization = config.optimization
    assert optimization.lr is not None and optimization.lr_ratio is not None
    assert optimization.server_lr is not None
    assert optimization.low_pass is not None and optimization.low_pass_strength is not None
    training = LocalTraining(
        optimization.optimizer,
        optimization.lr,
        optimization.lr_ratio,
        None if optimization.low_pass == "none" else optimization.low_pass,
        optimization.low_pass_strength,
        chosen.batch_size,
        chosen.local_steps,
        config.model.precision,
        optimization.server_optimizer,
        optimization.server_lr,
        optimization.averaging,
        optimization.balanced,
        optimization.warm_start,
        Views(optimization.views, optimization.mirror),
    )
    plan = plan_of(config, len(splits.train))
    plan.check(max(len(part) for part in parts))
    _check_method(method, plan)
    trainer = Trainer(workspace, method, training, plan, seed, config.run.reproducible)
    return Job(trainer, train, parts, validation, ranks, _prompts(config, splits.validation, spec))


def _prompts(config: RunConfig, validation: Examples, spec: InputSpec) -> Prompts | None:
    count = config.run.generate
    if not (count and isinstance(validation, CompletionExamples) and isinstance(spec, TextSpec) and len(validation)):
        return None
    return Prompts(validation, spec.tokenizer, count, spec.max_length)


def _without_front(
    config: RunConfig, loaded: LoadedModel, model: nn.Module, called: nn.Module, splits: Splits
) -> tuple[Workspace, Examples, Examples]:
    """The model and the examples; where a front of the model is frozen, the rest, on what the front makes of them.

    ``called`` is what is given batches: the model, or what returns its losses.
    """
    precision, first = config.model.precision, 0
    if not config.method.has_adapters and head_is_last(model, loaded.heads, loaded.spec):
        [head] = loaded.heads
        front = Front(model, precision, head=head)
        rest: nn.Module = HeadAlone(model, head)
    elif config.model.adapt_last is not None and (first := len(blocks_of(model)) - config.model.adapt_last):
        blocks = blocks_of(model)
        places = [block - 1 if block > 0 else block + len(blocks) for block in config.model.feature_blocks]
        # Blocks whose outputs are features, and the one before the first that is adapted.
        kept = {first - 1, *(place for place in places if place < first)}
        front = Front(model, precision, blocks=blocks[:first], kept=sorted(kept))
        front(blank_batch(loaded.spec))  # it learns what blocks return, which kept activations do not tell
        rest = LastBlocks(called, front)
    else:
        return Workspace(called, model), splits.train, splits.validation
    # Once for both parts, and never where no run shares them: it reads all weights.
    made_by = functools.cache(lambda: front.digest(loaded.heads, config.model))
    vocabulary = vocabulary_of(model)
    train, validation = (
        KeptActivations(
            part, front, with_inputs=first > 0, vocabulary=vocabulary, rows=_rows(config), front_digest=made_by
        )
        for part in (splits.train, splits.validation)
    )
    return Workspace(rest, model), train, validation


def _rows(config: RunConfig) -> int:
    """That a frozen front is given at once. A language model's is large, and tried with so many in each width."""
    return 8 if config.data.task == "causal-lm" else 64


def match_threads(model: nn.Module) -> None:
    """One thread for a tiny model on a CPU: more would wait for each other, for minutes where other work runs too."""
    if all(p.device.type == "cpu" for p in model.parameters()) and sum(p.numel() for p in model.parameters()) < 10**6:
        torch.set_num_threads(1)


def _check_method(method: Method, plan: PrivacyPlan) -> None:
    """Raises ValueError where a method asks for what cannot be kept."""
    if plan.server_adds_noise and type(method.aggregation()) is not WeightedAverage:
        raise ValueError(
            f"{method.name} combines updates in its own way, but noise by the server is for sums: set noise_by client, "
            "or unit example."
        )
    for index in range(plan.rounds if method.regulates_noise and plan.private else 0):
        for turn in range(method.turns):
            if method.phases(index, turn) not in ("A", "B"):
                raise ValueError(
                    f"{method.name} regulates its noise, which takes turns that train one factor, but turn {turn} of "
                    f"round {index + 1} trains {method.phases(index, turn)}: switch regulates_noise off."
                )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"There is no device {name!r} here: choose auto or cpu.") from error
    return device
