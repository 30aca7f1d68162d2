"""Short traces give the amounts of other layers, micro-batches and recomputation."""

from __future__ import annotations

import pytest

from launcher.memory.estimate import (
    Amounts,
    Estimate,
    Trace,
    at_all_layers,
    at_micro_batch,
    moved,
    partly_recomputed,
)


def amounts(layers: int, rows: int, kept: int = 10) -> Amounts:
    """What a model needs whose layers have a state of 7, and keep `kept` for each row."""
    activations = layers * rows * kept
    return {
        "layers": layers,
        "weights": 100 + 7 * layers,
        "kept": activations,
        "peak1/forward@last": 100 + 7 * layers + activations + 3 * rows,
        "peak2/backward@first": 200 + 14 * layers + 50 * rows,
    }


def test_layers_and_rows_are_linear() -> None:
    def whole(rows: int) -> Amounts:
        few, more = (
            Trace(layers=n, all_layers=80, amounts=amounts(n, rows), wider=amounts(n, 2 * rows))
            for n in (3, 4)
        )
        assert at_all_layers(few, more)[1] == amounts(80, 2 * rows)
        return at_all_layers(few, more)[0]

    assert whole(1) == amounts(80, 1)
    assert at_micro_batch((1, whole(1)), (2, whole(2)), 16) == amounts(80, 16)


def test_a_model_without_repetition_is_traced_whole() -> None:
    whole = Trace(layers=5, all_layers=5, amounts=amounts(5, 1), wider={})
    assert at_all_layers(whole, whole) == (amounts(5, 1), {})


def test_other_strategies_change_as_the_reference_does() -> None:
    base = amounts(80, 1) | {"weights": 9000, "peak1/forward@last": 9999}
    result = moved(base, amounts(80, 1), amounts(80, 4))
    assert result["weights"] == 9000
    assert result["peak1/forward@last"] == 9999 + 3 * 80 * 10 + 9


def test_half_of_the_layers_keep_half() -> None:
    full, none = amounts(80, 2, kept=1), amounts(80, 2, kept=20)
    half = partly_recomputed(full, none, 2)
    assert half["kept"] == (full["kept"] + none["kept"]) / 2
    assert half["peak1/forward@last"] == full["peak1/forward@last"] + 80 * 19
    assert half["peak2/backward@first"] == full["peak2/backward@first"]


@pytest.mark.parametrize(
    ("accumulates", "peak", "phase"), [(False, 154, "forward"), (True, 292, "backward")]
)
def test_the_peak_is_that_of_a_step(accumulates: bool, peak: int, phase: str) -> None:
    estimate = Estimate(amounts=amounts(3, 1), accumulates=accumulates)
    assert (estimate.peak, estimate.phase) == (peak, phase)


def test_loading_depends_on_neither_rows_nor_recomputation_and_grows_with_layers() -> None:
    """A process may make something once, which shows in the first of its traces."""
    once, later = ({"peak1/loading": size, "weights": 1.0} for size in (90.0, 40.0))
    few, more = (
        Trace(layers=n, all_layers=9, amounts=a, wider={}) for n, a in ((3, once), (4, later))
    )
    assert at_all_layers(few, more)[0]["peak1/loading"] == 90.0
    grown = Trace(layers=4, all_layers=9, amounts={"peak1/loading": 100.0}, wider={})
    assert at_all_layers(few, grown)[0]["peak1/loading"] == 150.0
    assert moved({"peak1/loading": 60.0}, once, later) == {"peak1/loading": 60.0}
