"""Races time only what agrees, and keep ratios, never times."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest

from algokit import races
from algokit.races import AnswersDisagreeError, Contestant, Limit, race


def _data():
    return np.arange(5.0)


def _fast(x):
    time.sleep(0.002)
    return x.sum()


def _slow(x):
    time.sleep(0.02)
    return x.sum()


def _wrong(x):
    return x.sum() + 1


def _pid(_):
    return os.getpid()


def _fails(_):
    raise OSError("no licence")


def run(ours, peer, **kwargs):
    options = dict(data=_data, agree=np.isclose, agreement="same sum", runs=3) | kwargs
    return race("five numbers", ours=Contestant("ours", ours), peers=[Contestant("peer", peer, "numpy")], **options)


@pytest.mark.parametrize("isolate", [False, True])
def test_ratio_is_peer_over_ours(isolate):
    result = run(_fast, _slow, isolate=isolate, limit=lambda s: Limit("bytes", 1e-3 / s, "nothing"))
    (ratio,) = result.ratios
    assert ratio.median > 3 and ratio.low <= ratio.median <= ratio.high
    assert ratio.version == np.__version__ and ratio.runs == 3
    assert result.limit is not None and 0 < result.limit.fraction < 1


def test_nothing_is_timed_when_answers_differ():
    with pytest.raises(AnswersDisagreeError, match="peer does not agree with ours"):
        run(_fast, _wrong)


def test_isolated_contestants_run_in_processes_of_their_own():
    pids = []
    run(_pid, _pid, isolate=True, agree=lambda a, b: pids.extend((a, b)) or a != b)
    assert os.getpid() not in pids


def test_error_of_an_isolated_contestant_arrives():
    with pytest.raises(OSError, match="no licence"):
        run(_fast, _fails, isolate=True)


def test_results_file_has_ratios_and_the_machine_but_no_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(races, "copy_bandwidth", lambda: 10.0)
    monkeypatch.setattr(races, "matmul_rate", lambda: 100.0)
    path = races.write_results("part", "slug", [run(_fast, _slow)], folder=tmp_path)
    record = json.loads(path.read_text())
    assert path == tmp_path / "part" / "slug.json" and list(tmp_path.rglob("*.tmp")) == []
    assert record["machine"]["copy_bandwidth_gb_s"] == 10.0 and record["races"][0]["ratios"][0]["peer"] == "peer"
    assert "seconds" not in path.read_text() and "ahead" in capsys.readouterr().out
    device = races.write_results("part", "slug", [run(_fast, _slow)], folder=tmp_path, device="NVIDIA H100")
    assert device.name == "slug.nvidia-h100.json"


def test_limits_of_the_machine_are_plausible():
    assert 0.5 < races.copy_bandwidth(2**22, runs=2) < 10_000
    assert 0.1 < races.matmul_rate(256, runs=2) < 1e6


@pytest.mark.parametrize(
    ("change", "part"), [(dict(runs=2), "runs"), (dict(peers=[]), "peers"), (dict(isolate=1), "isolate")]
)
def test_malformed_race_is_refused(change, part):
    options = dict(
        data=_data, ours=Contestant("a", _fast), peers=[Contestant("b", _fast)], agree=np.isclose, agreement=""
    )
    with pytest.raises((ValueError, TypeError), match=part):
        race("name", **(options | change))
    with pytest.raises(ValueError, match="races"):
        races.write_results("p", "s", [], folder=".")
