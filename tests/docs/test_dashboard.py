"""The Grafana board asks only for metrics and labels that exist, and places its panels side by side."""

import json
import re
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest

from weft.telemetry.metrics import METRICS, MetricKind

BOARD = json.loads((Path(__file__).parents[2] / "deploy" / "grafana" / "weft.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
SPECS = {spec.name: spec for spec in METRICS}
FROM_THE_SCRAPER = {"job", "instance"}

SELECTOR = re.compile(r"([a-z_:]+)\{([^}]*)\}")
MATCHER = re.compile(r'([a-z_]+)=~?"([^"]*)"')
GROUPING = re.compile(r"by \(([^)]*)\)")


def expressions() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def spec_of(sample: str) -> Any:
    """The row of the table that a sample's name belongs to."""
    if sample in SPECS and SPECS[sample].kind is not MetricKind.HISTOGRAM:
        return SPECS[sample]
    stem = re.sub("_(bucket|sum|count)$", "", sample)
    spec = SPECS[stem]
    assert spec.kind is MetricKind.HISTOGRAM, sample
    return spec


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_names_only_what_exists(expression: str) -> None:
    selectors = SELECTOR.findall(expression)
    assert selectors
    labels = set().union(*(spec_of(sample).labels for sample, _ in selectors)) | FROM_THE_SCRAPER
    for _, matchers in selectors:
        assert {name for name, _ in MATCHER.findall(matchers)} <= labels
        assert 'job=~"$job", instance=~"$instance"' in matchers
    if any(sample.endswith("_bucket") for sample, _ in selectors):
        labels.add("le")
    for grouping in GROUPING.findall(expression):
        assert {name.strip() for name in grouping.split(",")} <= labels
    assert expression.count("(") == expression.count(")")


def test_quantiles_are_taken_over_buckets() -> None:
    for expression in expressions():
        if "histogram_quantile" in expression:
            assert "_bucket{" in expression
            assert re.search(r"by \([^)]*le", expression)


def test_every_variable_is_defined() -> None:
    defined = {variable["name"] for variable in BOARD["templating"]["list"]}

    used = set(re.findall(r"\$\{?([a-z_]+)", json.dumps(BOARD)))

    assert used - {name for name in used if name.startswith("__")} == defined
    for variable in BOARD["templating"]["list"]:
        assert variable["type"] == "datasource" or "tgi_request_count" in variable["definition"]


def test_panels_do_not_overlap_and_stay_on_the_board() -> None:
    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        position = panel["gridPos"]
        return {
            (position["x"] + column, position["y"] + row)
            for column in range(position["w"])
            for row in range(position["h"])
        }

    assert max(column for panel in BOARD["panels"] for column, _ in cells(panel)) <= 23
    for one, other in combinations(BOARD["panels"], 2):
        assert not cells(one) & cells(other), (one["title"], other["title"])
    assert all(one["id"] != other["id"] for one, other in pairwise(BOARD["panels"]))


def test_everything_that_tgis_board_shows_is_on_it() -> None:
    asked_for = {spec_of(sample).name for expression in expressions() for sample, _ in SELECTOR.findall(expression)}

    assert asked_for >= {name for name in SPECS if name.startswith("tgi_") and name not in NOT_SHOWN}


NOT_SHOWN = {
    "tgi_batch_inference_success",  # count less failure
    "tgi_request_inference_duration",  # the steps say more
    "tgi_request_max_new_tokens",  # what was allowed, not what happened
    "tgi_request_validation_duration",  # in the time to the first token
}
