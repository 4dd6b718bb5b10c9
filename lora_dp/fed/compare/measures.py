"""What a comparison measures runs by: where their summaries have it, and whether more of it is better."""

from dataclasses import dataclass

from lora_dp.fed.compare.options import Metric


@dataclass(frozen=True)
class Measure:
    """One metric.

    Attributes:
        name: in words.
        axis: what stands at the axis of a picture.
        after, before: of a run, what its summary calls the value at the end and at the start.
        factor: by which the summary's value is multiplied to be shown.
        unit: behind a shown value.
        digits: of a shown value, behind the point.
        sign: 1 where more is better, −1 where less is.
        means: what the value is, for a caption.

    >>> MEASURES["accuracy"].shown(0.5), MEASURES["perplexity"].shown(7.389)
    ('50.0 %', '7.39')
    """

    name: str
    axis: str
    after: str
    before: str
    factor: float = 100.0
    unit: str = " %"
    digits: int = 1
    sign: int = 1
    means: str = "in percent of the validation data"

    def shown(self, value: float) -> str:
        """A summary's value as it is printed, with its unit."""
        return f"{self.number(self.factor * value)}{self.unit}"

    def number(self, value: float) -> str:
        """A shown value in figures alone."""
        return f"{value:.{self.digits}f}"


MEASURES: dict[Metric, Measure] = {
    "accuracy": Measure("Accuracy", "Accuracy (%)", "accuracy_after", "accuracy_before"),
    "balanced-accuracy": Measure(
        "Balanced accuracy (mean recall of the classes)",
        "Balanced accuracy (%)",
        "balanced_accuracy_after",
        "balanced_accuracy_before",
    ),
    "perplexity": Measure(
        "Perplexity (lower is better)",
        "Perplexity (to the right is better)",
        "perplexity_after",
        "perplexity_before",
        factor=1.0,
        unit="",
        digits=2,
        sign=-1,
        means="over the completions' tokens of the validation data",
    ),
}
