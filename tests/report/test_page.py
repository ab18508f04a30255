"""The page as a file: right numbers, nothing that loads or runs, any input."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from rewire.ablation.html import write as write_page
from rewire.errors import InputError
from rewire.report import render
from tests.report.made_up import LAYERS, RULES, diverged, failed, grid, line, write
from tests.report.pages import Page


def test_the_table_has_the_numbers_of_the_files(tmp_path: Path) -> None:
    lines = [line(rule, seed) for rule in ("bp", "fa", "dfa") for seed in range(4)]
    page = Page(render([write(tmp_path / "a", lines)]))
    head, *rows = page.tables["Results of mlp on digits"]

    assert head[0] == "rule" and head[1].split() == ["test", "accuracy,", "%"]
    scores = {rule: [100 * each["accuracy"] for each in lines if each["cell"]["rule"] == rule] for rule in RULES[:4]}
    p = {rule: stats.ttest_rel(scores[rule], scores["bp"]).pvalue for rule in ("fa", "dfa")}
    low, high = sorted(p.values())
    # Holm for two: the smaller doubled, and the larger at least that.
    holm = {rule: min(1, 2 * low) if each == low else max(high, min(1, 2 * low)) for rule, each in p.items()}
    for rule, row in zip(("bp", "fa", "dfa"), rows, strict=True):
        mean, deviation = statistics.fmean(scores[rule]), statistics.stdev(scores[rule])
        assert row[0].startswith(rule) and row[1].split(" ", 3)[:3] == [f"{mean:.2f}", "±", f"{deviation:.2f}"]
        if rule == "bp":
            assert row[3:5] == ["–", "–"]
            continue
        difference = [a - b for a, b in zip(scores[rule], scores["bp"], strict=True)]
        half = stats.t.ppf(0.975, 3) * statistics.stdev(difference) / 2
        middle = statistics.fmean(difference)
        numbers = [float(each.replace("−", "-")) for each in re.findall(r"[+−]\d+\.\d+", row[3])]
        assert numbers == pytest.approx([middle, middle - half, middle + half], abs=0.006)
        assert row[4] == ("< 0.001" if holm[rule] < 0.001 else f"{holm[rule]:.3f}")
        assert row[5] == ("worse" if holm[rule] < 0.05 else "no clear difference") + " paired t-test, 4 seeds"
    gamma = [each["alignment"][-1]["gamma"] for each in lines if each["cell"]["rule"] == "dfa"]
    assert rows[2][6] == f"{statistics.fmean(gamma):.3f} ± {statistics.stdev(gamma):.3f}"
    assert rows[2][8] == "0.71"


def test_cost_and_layers_have_the_numbers_of_the_files(tmp_path: Path) -> None:
    lines = [line(rule, seed) for rule in ("bp", "fa") for seed in range(2)]
    page = Page(render([write(tmp_path / "a", lines)]))

    head, _, fa = page.tables["Cost of mlp on digits"]
    assert head == ["rule", "step time ÷ bp", "as a bar", "step, ms", "memory, MB", "seconds a cell"]
    ms, seconds = ([each[name] for each in lines[2:]] for name in ("step_ms", "seconds"))
    assert fa[1] == "1.02" and fa[4] == f"{310 * 1.02:.0f}"
    assert fa[3] == f"{statistics.fmean(ms):.2f} ± {statistics.stdev(ms):.2f}"
    assert fa[5] == f"{statistics.fmean(seconds):.1f} ± {statistics.stdev(seconds):.1f}"

    layers = page.tables["Layers of mlp on digits"]
    row = layers[[each[0] for each in layers].index("fa") + 1]
    angles = [each["alignment"][-1]["layers"]["conv1"]["weight_angle"] for each in lines[2:]]
    assert row[:2] == ["conv1", f"{statistics.fmean(angles):.1f}°"]
    assert row[layers[0].index("W to B angle")] == "88.0°"


def test_nothing_loads_and_only_our_script_runs(tmp_path: Path) -> None:
    text = render([write(tmp_path / "a", grid(2))])
    page = Page(text)

    assert (
        not re.search(r"(?:src|href|action)=[\"'](?!#|data:,)", text) and "url(" not in text and "@import" not in text
    )
    names = [tag for tag, _ in page.tags]
    assert not {"iframe", "object", "embed", "form", "base", "img"} & set(names) and names.count("script") == 2
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy is not None and "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'><b>&amp;{{ 7*7 }}"


def test_what_comes_from_files_is_text(tmp_path: Path) -> None:
    good = line(EVIL, 0, model=EVIL, data=EVIL)
    for moment in good["alignment"]:
        moment["flags"] = [EVIL]
        moment["layers"] = {EVIL: moment["layers"]["fc1"] | {"note": EVIL}}
    lines = [good, line("bp", 0, model=EVIL, data=EVIL), failed("fa", 0, EVIL), failed("fa", 1, f"{EVIL}\n{EVIL}")]
    folder = write(tmp_path / "a", lines, command=EVIL, environment={EVIL: EVIL}, grid={EVIL: [EVIL]}, started=EVIL)
    text = render([folder])
    page = Page(text)

    assert [tag for tag, _ in page.tags].count("script") == 2 and not {"img", "b>"} & {tag for tag, _ in page.tags}
    assert not [a for _, a in page.tags if "onerror" in a]
    assert "alert(1)" in text and "49" not in re.findall(r"&amp;amp;(\S+)", text)
    assert EVIL in page.text
    assert json.loads(page.scripts[0])["charts"][0]["lines"][1]["label"].startswith(EVIL)


def test_a_grid_of_a_hundred_cells_stays_below_a_megabyte(tmp_path: Path) -> None:
    """Two models, ten rules, five seeds; fifty epochs, sixteen layers, sixty records of alignment."""
    rules = [f"{rule}{more}" for rule in RULES[:5] for more in ("", "(a=1)")]
    lines = [line(r, s, model=m, epochs=50) for m in ("mlp", "cnn") for r in rules for s in range(5)]
    for each in lines:
        sixty = (each["alignment"] * 2)[:60]
        each["alignment"] = [
            moment | {"step": step, "layers": {f"encoder.layers.{i}.query": found[LAYERS[i % 5]] for i in range(16)}}
            for step, moment in enumerate(sixty)
            if (found := moment["layers"])
        ]
    text = render([write(tmp_path / "a", lines)])

    assert len(lines) == 100 and text.count('class="heat') >= 16
    assert len(text.encode()) < 1_000_000


def test_the_same_results_give_the_same_page(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", grid(2))
    assert render([folder]) == render([folder])


def test_flags_failures_and_the_way_to_repeat_it_are_there(tmp_path: Path) -> None:
    page = Page(render([write(tmp_path / "a", grid(3), torn='{"cut')]))

    flagged = page.tables["Trust flags"]
    assert any("made of rounding" in " ".join(row) for row in flagged)
    table = page.tables["Failed and diverged cells"]
    assert table[1][0].startswith("dfa, seed 1") and table[1][1:3] == ["failed", "–"]
    assert "RuntimeError: <script>alert(1)</script> & more" in table[1][3]
    assert table[2][1:] == ["diverged", "5", "the loss stopped being finite"]
    assert "rewire ablate --model 'mlp cnn' --rules 'bp fa usf dfa' --seeds 5" in page.text
    assert "is cut off" in page.text and '"lr": 0.002' in page.text
    assert ["threads", "1"] in page.tables["Environment"]


def test_differing_environments_are_marked(tmp_path: Path) -> None:
    folders = [
        write(tmp_path / name, [line("bp", seed)], environment={"torch": version, "threads": 1})
        for seed, (name, version) in enumerate((("a", "2.13"), ("b", "2.14")))
    ]
    page = Page(render(folders))

    assert page.tables["Environment"] == [["run", "a", "b"], ["torch differs", "2.13", "2.14"], ["threads", "1", "1"]]
    assert "different environments (torch)" in page.text


def test_runs_without_alignment_say_so(tmp_path: Path) -> None:
    page = Page(render([write(tmp_path / "a", [line("bp", 0) | {"alignment": []}, failed("fa", 0, "x")])]))

    assert "Alignment was not recorded." in page.text and "believed" not in page.text
    assert "alignment Γ" not in page.tables["Results of mlp on digits"][0]


def test_nothing_but_failures_is_a_page_too(tmp_path: Path) -> None:
    page = Page(render([write(tmp_path / "a", [failed("bp", 0, "no"), failed("fa", 0, "no")])]))
    assert "No cell gave a result." in page.text


def test_write_puts_the_page_into_the_folder_or_where_it_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [line()])

    assert write_page(folder) == folder / "report.html"
    assert write_page(folder, out=tmp_path / "x.html") == tmp_path / "x.html"
    assert (tmp_path / "x.html").read_text() == (folder / "report.html").read_text() == render([folder])
    assert sorted(each.name for each in folder.iterdir()) == ["report.html", "results.jsonl", "run.json"]
    with pytest.raises(InputError, match=r"cannot write .*No such file or directory"):
        write_page(folder, out=tmp_path / "no" / "x.html")
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*taken: Is a directory"):
        write_page(folder, out=tmp_path / "taken")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "taken", "x.html"]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
SOME = [line("bp", 0), line("dfa", 0), line("dfa", 1), diverged("fa", 0), failed("fa", 1, "x")]
for each in SOME:
    del each["history"][3:], each["alignment"][2:]


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(place for key, each in inner for place in places(each, (*way, key)))]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_content_of_the_files_breaks_the_report(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    lines = copy.deepcopy(SOME)
    about: dict[str, Any] = {}
    for _ in range(data.draw(st.integers(1, 4))):
        *way, last = data.draw(st.sampled_from([each for each in places(lines) if len(each) > 1]))
        target: Any = lines
        try:
            for key in way:
                target = target[key]
            if data.draw(st.booleans()):
                target[last] = data.draw(ANYTHING)
            else:
                del target[last]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
    if data.draw(st.booleans()):
        about[data.draw(st.sampled_from(["command", "grid", "environment", "baseline", "started", "version"]))] = (
            data.draw(ANYTHING)
        )
    folder = write(tmp_path_factory.mktemp("runs") / "a", lines, **about)
    for kind in ("html", "csv", "markdown"):
        assert render([folder], format=kind)
