"""Comparing two results: by hand-made folders of scores whose difference is known."""

import json
import re

import numpy as np
import pytest
from conftest import toy_protocol
from test_report import cells

from qpenet_jax.cli.main import main
from qpenet_jax.core.errors import InputError
from qpenet_jax.evaluation.compare import compare_results, comparison_table
from qpenet_jax.evaluation.metrics import Scores
from qpenet_jax.evaluation.report import summarize, write_report

NAMES = ("cat", "dog")
IDS = (3, 8)


def scores_of(seeds, episodes, gain=0):
    """Class 3 for the even episodes; `gain` is of its 1000 pixels an episode.

    IoU varies by image, 0.3 to 0.5; the background is 0.9 everywhere.
    """
    rows = [
        (s, i, i % 17, IDS[i % 2], 900, 1000, 300 + 12 * (i % 17), 1000)
        for s in seeds
        for i in range(episodes)
    ]
    rows = np.array(rows)
    rows[rows[:, 3] == 3, 6] += gain
    return Scores(rows)


def write_run(folder, *, gain=0, name="episodes_qpenet.csv", facts=None, **changes):
    """Write what an evaluation leaves; return the path of its results.json."""
    fields = {"classes": NAMES, "version": "1.0 abc", "episodes": 40, "seeds": (0, 1)}
    protocol = toy_protocol(**fields | changes)
    scores = scores_of(protocol.seeds, protocol.episodes, gain)
    results = summarize(scores, protocol, IDS) | {"class_ids": list(IDS)}
    folder.mkdir()
    scores.save(folder / name)
    write_report(folder, results | (facts or {}))
    return folder / "results.json"


def test_a_run_against_itself_is_0(tmp_path):
    """Also where a preset gives the same protocol another name."""
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", preset="bam")
    names = [json.loads(p.read_text())["protocol"]["name"] for p in (a, b)]
    assert names[0] != names[1]
    found = compare_results(a, b)
    assert found["differs"] == {}
    assert found["episodes"] == {"common": 80, "a": 80, "b": 80}
    rows = [*found["per_class"].values(), found["miou"], found["fb_iou"]]
    for row in rows:
        assert row["a"] == row["b"] > 30
        assert (row["difference"], row["interval"]) == (0, [0, 0])


def test_the_comparison_never_replaces_what_it_compares(tmp_path, capsys):
    facts = {"episodes_file": "scores.csv"}
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", name="scores.csv", facts=facts)
    inputs = [a, a.with_name("episodes_qpenet.csv"), b, b.with_name("scores.csv")]
    before = [file.read_bytes() for file in inputs]
    for given, out in [(a, file) for file in inputs] + [(a.parent, a)]:
        with pytest.raises(SystemExit) as stopped:
            main(["compare", str(given), str(b.parent), "--out", str(out)])
        assert stopped.value.code == 2
        assert f"over the input {out}" in capsys.readouterr().err
    assert [file.read_bytes() for file in inputs] == before
    main(["compare", str(a), str(b), "--out", str(tmp_path / "new.json")])
    assert json.loads((tmp_path / "new.json").read_text())["miou"]["difference"] == 0


def test_a_known_shift(tmp_path):
    facts = {"selection": "last step", "episodes_file": "scores.csv"}
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", gain=100, name="scores.csv", facts=facts)
    found = compare_results(a, b)
    values = scores_of((0, 1), 40)
    cat = values.rows[values.column("class_id") == 3]
    assert found["per_class"] == {
        "cat": {
            "a": round(cat[:, 6].mean() / 10, 2),
            "b": round(cat[:, 6].mean() / 10 + 10, 2),
            "difference": 10.0,
            "interval": [10.0, 10.0],  # every image gains 10, whatever its weight
            "episodes": 40,
        },
        "dog": found["per_class"]["dog"] | {"difference": 0.0, "interval": [0.0, 0.0]},
    }
    assert (found["miou"]["difference"], found["miou"]["interval"]) == (5, [5, 5])
    # FB-IoU gains a half of the foreground's 100 pixels in each second episode.
    assert found["fb_iou"]["difference"] == 2.5
    low, high = found["fb_iou"]["interval"]
    assert 1 < low < 2.5 < high < 4
    assert compare_results(b, a)["miou"]["difference"] == -5
    assert compare_results(a.parent, b.parent) == found, "folders will do"

    text = comparison_table(found)
    lines = text.splitlines()
    assert lines[0] == f"A: {a}"
    assert lines[2] == f"B: {b} (last step)"
    assert lines[4] == f"Protocol: {json.loads(a.read_text())['protocol']['text']}"
    assert "Common episodes: 80, of 80 in A and 80 in B" in text
    head, _, *rows = cells(text)
    assert head == ["IoU %", "A", "B", "B - A", "episodes"]
    assert [row[0] for row in rows] == ["cat", "dog", "mIoU", "FB-IoU"]
    assert rows[0][3:] == ["+10.0 [+10.0, +10.0]", "40"]
    assert rows[2][3:] == ["+5.0 [+5.0, +5.0]", "80"]


def test_other_protocols_are_refused_then_paired_where_asked(tmp_path):
    a = write_run(tmp_path / "a")
    changes = {"episode_list": "e" * 64, "release": "pascal5i/trainaug/1.0.0"}
    other = write_run(tmp_path / "other", **changes)
    differs = compare_results(a, other, different_protocols=True)["differs"]
    assert differs == {name: ["", value] for name, value in changes.items()}
    differences = (
        f"release (none) / {changes['release']}, episode_list (none) / {'e' * 37}..."
    )
    with pytest.raises(InputError, match=re.escape(differences)):
        compare_results(a, other)
    b = write_run(tmp_path / "b", gain=100, episodes=30, seeds=(1, 2), scoring="exact")
    with pytest.raises(InputError) as error:
        compare_results(a, b)
    message = str(error.value)
    differences = "episodes 40 / 30, seeds 0,1 / 1,2, scoring original / exact"
    assert message.startswith(f"{a} and {b}: different protocols ({differences}); ")
    assert "--different-protocols" in message
    assert "\n" not in message

    found = compare_results(a, b, different_protocols=True)
    assert found["differs"] == {
        "episodes": [40, 30],
        "seeds": [[0, 1], [1, 2]],
        "scoring": ["original", "exact"],
    }
    assert found["episodes"] == {"common": 30, "a": 80, "b": 60}
    assert found["per_class"]["cat"]["episodes"] == 15
    common = scores_of((1,), 30)
    dog = common.rows[common.column("class_id") == 8, 6].mean() / 10
    assert found["per_class"]["dog"]["a"] == round(dog, 2), "both on common episodes"
    assert (found["miou"]["difference"], found["miou"]["interval"]) == (5, [5, 5])
    text = comparison_table(found)
    assert f"DIFFERENT PROTOCOLS, A / B: {differences}\n" in text
    assert "Common episodes: 30, of 80 in A and 60 in B" in text


def test_results_without_a_common_episode(tmp_path):
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", side=41, version="1.1 def")
    message = r"different data \(version 1.0 abc / 1.1 def\), so no episode is"
    for forced in (False, True):
        with pytest.raises(InputError, match=f"^{a} and {b}: .*{message}"):
            compare_results(a, b, different_protocols=forced)
    c = write_run(tmp_path / "c", seeds=(5,))
    with pytest.raises(InputError, match=f"^{a} and {c}: .*no episode in common"):
        compare_results(a, c, different_protocols=True)


def test_a_class_that_only_one_scored_is_left_out(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", gain=100)
    results = json.loads(b.read_text())
    scores = scores_of((0, 1), 40, 100)
    cats = Scores(scores.rows[scores.column("class_id") == 3])
    cats.save(b.parent / "episodes_qpenet.csv")
    results["class_ids"], results["protocol"]["classes"] = [3], ["cat"]
    results["miou"] = results["per_class"]["cat"]
    b.write_text(json.dumps(results))
    with pytest.raises(InputError, match=r"\(classes cat,dog / cat\)"):
        compare_results(a, b)
    found = compare_results(a, b, different_protocols=True)
    assert list(found["per_class"]) == ["cat"]
    assert found["miou"]["difference"] == 10
    assert found["episodes"] == {"common": 40, "a": 80, "b": 40}


def test_missing_broken_and_foreign_scores(tmp_path):
    """Foreign as when an evaluation is killed between its two files."""
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", gain=1)
    with pytest.raises(InputError, match=r"c/results\.json: no such file"):
        compare_results(a, tmp_path / "c" / "results.json")
    scores = b.parent / "episodes_qpenet.csv"
    scores_of((0, 1), 40).save(scores)
    with pytest.raises(InputError, match=r"b/episodes_qpenet\.csv: not the episodes"):
        compare_results(a, b)
    scores.write_text(scores.read_text()[:-9])
    with pytest.raises(InputError, match=r"b/episodes_qpenet\.csv: not a whole file"):
        compare_results(a, b)
    scores.unlink()
    with pytest.raises(InputError, match=r"b/episodes_qpenet\.csv: no such file"):
        compare_results(a, b)


@pytest.mark.parametrize(
    "broken",
    [
        lambda results: "",
        lambda results: json.dumps(results)[:-20],
        lambda results: "[]",
        lambda results: b"\xff\xfe\x00{",
        lambda results: json.dumps(results | {"protocol": "toy"}),
        lambda results: json.dumps(results | {"protocol": None}),
        lambda results: json.dumps(results | {"class_ids": [3]}),
        lambda results: json.dumps(results | {"class_ids": [[3], [8]]}),
        lambda results: json.dumps(results | {"miou": "high"}),
        lambda results: json.dumps(results | {"episodes_file": 3}),
        lambda results: json.dumps({k: results[k] for k in results if k != "miou"}),
    ],
)
def test_broken_results(broken, tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    broken = broken(json.loads(b.read_text()))
    b.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    with pytest.raises(InputError, match=r"b/results\.json: not a results\.json of"):
        compare_results(a, b)
