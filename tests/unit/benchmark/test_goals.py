"""Goals compare with the right peers, and say so when there is none; pages and plots show what was measured."""

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from weft.benchmark.goals import Verdict, judge, verdict_table
from weft.benchmark.load import Reply
from weft.benchmark.page import render
from weft.benchmark.plot import draw
from weft.benchmark.profiles import PROFILES
from weft.benchmark.records import Cell, Sitting, Start, by_title_and_server
from weft.benchmark.report import summarize

FIGURES = summarize([Reply(sent_ns=0, finished_ns=10**9, token_ns=[10**8, 10**9], completion_tokens=2, status=200)])


def make_cell(server: str, rate: float, **changes: object) -> Cell:
    profile = PROFILES[str(changes.pop("profile", "streams-1"))]
    values: dict[str, object] = {
        "profile": profile.name,
        "title": profile.title,
        "server": server,
        "precision": server.rpartition(" ")[2],
        "is_peer": not server.startswith("weft"),
        "repeat": 0,
        "figures": replace(FIGURES, output_tokens_per_s=rate, total_tokens_per_s=2 * rate),
        "bandwidth_gb_per_s": 50.0,
        "limit_s": 0.5,
        "limit_cause": "bytes",
    }
    return Cell(**{**values, **changes})  # type: ignore[arg-type]


def make_sitting(*cells: Cell, **changes: object) -> Sitting:
    values: dict[str, object] = {"when": "today", "machine": "<two> cores", "commit": "abc", "cells": list(cells)}
    return Sitting(**{**values, **changes})  # type: ignore[arg-type]


def only_verdict(*cells: Cell) -> Verdict:
    [verdict] = judge(make_sitting(*cells))
    return verdict


def test_ours_is_compared_with_the_best_peer() -> None:
    verdict = only_verdict(make_cell("weft bf16", 130), make_cell("a bf16", 90), make_cell("b bf16", 100))

    assert (verdict.best_peer, verdict.needed, verdict.ratio, verdict.is_reached) == ("b bf16", 120.0, 1.3, True)


def test_a_coarser_peer_is_no_rival_but_a_finer_one_is() -> None:
    peers = (make_cell("a int8", 200), make_cell("b bf16", 100))

    assert only_verdict(make_cell("weft bf16", 130), *peers).best_peer == "b bf16"
    assert only_verdict(make_cell("weft int8", 130), *peers).best_peer == "a int8"
    assert only_verdict(make_cell("weft int8", 130), peers[1]).best_peer == "b bf16"


def test_repeats_count_by_their_median() -> None:
    rates = (make_cell("weft bf16", rate) for rate in (100, 130, 500))

    assert only_verdict(*rates, make_cell("a bf16", 100)).measured == 130


def test_without_a_peer_nothing_is_reached_or_missed() -> None:
    verdict = only_verdict(make_cell("weft bf16", 130))

    assert (verdict.needed, verdict.is_reached) == (None, None)


def test_near_the_limit_is_enough_where_the_goal_says_so() -> None:
    ours = make_cell("weft bf16", 24, profile="large-1", limit_s=0.97)
    peer = make_cell("a bf16", 24, profile="large-1")

    verdict = only_verdict(ours, peer)

    assert verdict.needed == pytest.approx(0.95 * 24 / 0.97)
    assert verdict.is_reached


def test_only_the_second_round_of_a_shared_prefix_counts() -> None:
    title = PROFILES["shared-prefix"].title
    cells = [
        make_cell("weft bf16", rate, profile="shared-prefix", title=f"{title}, round {n}")
        for n, rate in ((1, 5), (2, 7))
    ]

    assert only_verdict(*cells).measured == 7


def test_latency_is_bounded_from_above() -> None:
    slow = make_cell("weft bf16", 1, profile="running-stream", figures=replace(FIGURES, itl_p99_ms=121.0))

    assert only_verdict(slow).is_reached is False
    assert only_verdict(replace(slow, figures=replace(FIGURES, itl_p99_ms=119.0))).is_reached


def test_memory_is_judged_without_the_pool_and_large_models_not_at_all() -> None:
    small = Start(
        server="weft int8",
        precision="int8",
        is_peer=False,
        is_large_model=False,
        ready_s=2.0,
        pss_mb=1500.0,
        kv_pool_mb=700.0,
    )

    verdicts = judge(make_sitting(starts=[small, replace(small, is_large_model=True, ready_s=99.0)]))

    assert [(verdict.measured, verdict.is_reached) for verdict in verdicts] == [(2.0, True), (800.0, True)]


def test_a_sitting_survives_its_file() -> None:
    sitting = make_sitting(make_cell("weft bf16", 130), absent={"x": "why"}, peaks={"bf16": 1e12})

    assert Sitting.from_json(sitting.to_json()) == sitting


def test_repeats_of_a_cell_stand_together() -> None:
    cells = [make_cell("weft bf16", 1), make_cell("a bf16", 2), make_cell("weft bf16", 3, repeat=1)]

    assert [len(repeats) for repeats in by_title_and_server(cells).values()] == [2, 1]


def test_the_page_names_failures_limits_and_what_is_missing() -> None:
    failed = make_cell("weft bf16", 130, figures=replace(FIGURES, failed=2))

    text = render(make_sitting(failed, absent={"vLLM bf16": "no wheel"}), "x.svg")

    assert "weft bf16 (2 failed)" in text
    assert "50% (bytes)" in text
    assert "* vLLM bf16: no wheel" in text
    assert "(x.svg)" in text


def test_an_empty_sitting_has_a_page_and_a_picture() -> None:
    assert "abc" in render(make_sitting())
    ET.fromstring(draw(make_sitting()))


def test_the_picture_has_a_bar_per_server_and_escapes_text() -> None:
    cells = (make_cell("weft bf16", 130), make_cell("a & b bf16", 90), make_cell("dead bf16", 0))

    root = ET.fromstring(draw(make_sitting(*cells)))

    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"weft bf16", "a & b bf16", "130", "90"} <= set(texts)
    assert "dead bf16" not in texts


def test_the_table_of_goals_says_yes_no_and_nothing() -> None:
    verdicts = [
        Verdict(what="w", server="s", measured=2.0, needed=1.0),
        Verdict(what="w", server="s", measured=2.0, needed=1.0, is_upper_bound=True),
        Verdict(what="w", server="s", measured=2.0, needed=None),
    ]

    rows = verdict_table(verdicts).splitlines()[2:]

    assert [row.split("|")[7].strip() for row in rows] == ["yes", "no", "–"]
