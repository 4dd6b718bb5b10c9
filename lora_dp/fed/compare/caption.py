"""What stands below the table of a comparison: all that must be known to read it."""

import math

from pandas import DataFrame

from lora_dp.fed.compare import search, tables
from lora_dp.fed.compare.grid import LR_FACTOR, Cell, Grid
from lora_dp.fed.compare.measures import MEASURES
from lora_dp.fed.compare.outcomes import Outcomes
from lora_dp.fed.rounds.privacy_plan import UNITS
from lora_dp.fed.runs.folder import ENDED


def caption(outcomes: Outcomes, cells: DataFrame) -> str:
    """What the table shows, and what must be known to read it.

    Args:
        outcomes: of the grid.
        cells: its table of all cells (:meth:`~lora_dp.fed.compare.outcomes.Outcomes.cells_frame`).
    """
    grid = outcomes.grid
    parts = [_what(grid), *_variants(grid), *_spread(grid, cells), *_budget(grid, cells)]
    measure = MEASURES[grid.metric]
    before = measure.factor * cells.loc[cells["status"].isin(ENDED), measure.before].astype(float)
    if len(before):
        low, high = measure.number(before.min()), measure.number(before.max())
        parts.append(f"Before training: {low if low == high else f'{low} to {high}'}.")
    parts += _search(outcomes, cells) if grid.searches else [_rates(grid)]
    diverged = int((cells["status"] == "diverged").sum())
    if missing := int((~cells["status"].isin(ENDED)).sum()) - diverged:
        parts.append(f"{missing} of {len(cells)} runs are missing.")
    if diverged:
        parts.append(f"{diverged} of {len(cells)} runs diverged, and are in no mean.")
    if spent := int((cells["status"] == "budget spent").sum()):
        parts.append(f"In {spent} runs the budget was spent before the last planned round, after an interruption.")
    return " ".join(parts)


def _what(grid: Grid) -> str:
    example = grid.example
    federation = example.federation
    drawn = f", {federation.clients_per_round} of them a round" if federation.clients_per_round else ""
    among = "" if federation.partition == "iid" else f" (Dirichlet {federation.dirichlet_alpha:g})"
    rounds, steps = (
        "as many" if name in grid.searched else str(getattr(federation, name)) for name in ("rounds", "local_steps")
    )
    return (
        f"{MEASURES[grid.metric].name} after the last round, {MEASURES[grid.metric].means} of "
        f"{example.data.dataset}; model {example.model.name}, {federation.clients} clients{among}{drawn}, {rounds} "
        f"rounds of {steps} local steps{' as were chosen' if 'as many' in (rounds, steps) else ''}."
    )


def _variants(grid: Grid) -> list[str]:
    listed = [
        f"{name} is {options['method']} with "
        + (", ".join(f"{option} {value}" for option, value in options.items() if option != "method") or "nothing else")
        for name, options in grid.variants.items()
    ]
    return [f"Variants: {'; '.join(listed)}."] if listed else []


def _spread(grid: Grid, cells: DataFrame) -> list[str]:
    seeds = sorted(cells["seed"].unique())
    listed = ", ".join(map(str, seeds)) if len(seeds) <= 10 else f"{seeds[0]} to {seeds[-1]}"
    if len(seeds) == 1:
        parts = [f"One run each (n = 1, seed {listed}), so that nothing is known of the spread."]
    else:
        parts = [
            f"Mean ± half of the 95 % confidence interval (Student's t) over n = {len(seeds)} seeds ({listed}), of "
            "initialisation, partition, batches and noise."
        ]
    if cells["method"].nunique() > 1:
        numbers = tables.statistics(cells, grid.metric)
        pairs = sorted(numbers["pairs"].dropna().astype(int).unique())
        words = "Best mean of a column in bold"
        if pairs:
            count = str(pairs[0]) if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
            words += (
                f"; {tables.TIED}: cannot be told from it at 5 % (paired t-test on the n = {count} seeds that both "
                "have, Holm-corrected for the rivals in the column)"
            )
        parts.append(f"{words}.")
    return parts


def _budget(grid: Grid, cells: DataFrame) -> list[str]:
    example = grid.example
    privacy, parts = example.privacy, []
    if (cells["epsilon"] != "none").any():
        if privacy.mechanism == "as-released":
            parts.append(
                "No privacy guarantee (ε = ∞): this is what the authors' released code does; the ε of a column is what "
                "its noise is set for, and does not keep."
            )
        else:
            parts.append(f"ε at δ = {privacy.delta:g} for {UNITS[privacy.unit]}, of each run by itself.")
    if example.run.reproducible:
        parts.append(
            "Research only: batches and noise follow the seed, so that the guarantee does not hold; do not release."
        )
    return parts


def _rates(grid: Grid) -> str:
    rate = grid.common.get("lr")
    others = " but variants that name their own" if any("lr" in own for own in grid.variants.values()) else ""
    if rate is None:
        return f"Learning rates: each method's default for its ε{',' * bool(others)}{others}."
    return f"Learning rates: {rate:g} for all{others}."


def _search(outcomes: Outcomes, cells: DataFrame) -> list[str]:
    grid = outcomes.grid
    standings = {group: outcomes.standing(*group) for group in grid.searches}
    trials = next(iter(grid.searches.values())).trials
    ranges = ", ".join(
        f"{option} from {low:g} to {high:g}" + (" times the method's own" if name == LR_FACTOR else "")
        for option, (name, (low, high)) in grid.searched.items()
    )
    seeds = ", ".join(map(str, grid.tuning_seeds))
    metric = grid.metric.replace("-", " ")
    complete = [standing for standing in standings.values() if standing.complete]
    widened = sum(len(standing.settings) > trials for standing in standings.values())
    at_edge = sum(bool(standing.edges) for standing in complete)
    parts = [
        f"Settings: {ranges}; for each method at each ε the best of {trials}, drawn at random on a log scale and alike "
        f"for all, by mean {metric} on these validation data over seed{'s' * (len(grid.tuning_seeds) > 1)} {seeds}.",
        f"Where the best lay in the outer {100 * search.edge(trials):.3g} % of a range, "
        f"{math.ceil(search.EXTRA * trials)} more were drawn beyond it, at most {search.EXTENSIONS} times: in "
        f"{widened} of {len(standings)} searches; {at_edge} of {len(complete)} chose at an edge after it.",
    ]
    diverged = sum(
        any(outcomes.diverged(Cell(*group, seed, setting.name)) for seed in grid.tuning_seeds)
        for group, standing in standings.items()
        for setting in standing.settings
    )
    if diverged:
        parts.append(f"{diverged} of {sum(len(s.settings) for s in standings.values())} settings diverged.")
    private = [standing for (_, epsilon), standing in standings.items() if epsilon != "none"]
    if private and grid.example.privacy.mechanism == "sound":
        count = max(len(standing.settings) for standing in private) * len(grid.tuning_seeds)
        parts.append(
            f"ε does not count the tuning. With it a run costs up to {count + 1} times its ε, at {count + 1} times δ "
            f"(basic composition with the up to {count} trials of its method at this ε)."
        )
    return parts
