"""``Recorder``: alignment over training, saved and drawn."""

import json
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire
from rewire.diagnose import plots

X = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(4, (16,), generator=torch.Generator().manual_seed(1))


def loss_of(out):
    return F.cross_entropy(out, Y)


def made(rule="fa"):
    torch.manual_seed(0)
    return rewire.convert(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), rule)


def run(recorder, model, steps, lr=0.5):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        recorder.step(X, loss_of)
        optimizer.zero_grad()
        loss_of(model(X)).backward()
        optimizer.step()


@pytest.fixture
def recorded():
    model = made()
    recorder = rewire.Recorder(model, every=3, null=3)
    run(recorder, model, 10)
    return model, recorder


def test_every_k_steps_beginning_with_the_first(recorded):
    model, recorder = recorded
    assert [record["step"] for record in recorder.records] == [0, 3, 6, 9]
    assert recorder.steps == 10
    torch.manual_seed(0)
    plain = rewire.alignment(model, X, loss_of, null=3)
    assert recorder.measure(X, loss_of).record() == plain.record()
    assert recorder.records[-1] == {"step": 10, **plain.record()}
    assert recorder.newest.record() == plain.record()


def test_training_is_as_without():
    weights = []
    for every in (1, 1000):
        model = made("dfa")
        recorder = rewire.Recorder(model, every=every, null=2)
        run(recorder, model, 5)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    plain = made("dfa")
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(plain(X)).backward()
        optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in plain.parameters()])
    assert all(torch.equal(found, expected) for found in weights)


def test_inputs_and_loss_of_its_own():
    model = made()
    recorder = rewire.Recorder(model, loss_of, every=2, inputs=X, null=0)
    assert recorder.step() is not None
    assert recorder.step() is None
    for missing in ({"loss_fn": loss_of}, {"inputs": X}):
        with pytest.raises(rewire.ConversionError, match="the recorder has no"):
            rewire.Recorder(model, **missing).step()


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_every_is_a_number_of_steps(every):
    with pytest.raises(rewire.ConversionError, match="every is how many"):
        rewire.Recorder(made(), every=every)


def test_saved_as_json_lines(recorded, tmp_path):
    _, recorder = recorded
    path = tmp_path / "alignment.jsonl"
    path.write_text("older")
    recorder.save(path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == recorder.records
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_leaves_the_old_one(recorded, tmp_path):
    _, recorder = recorded
    path = tmp_path / "alignment.jsonl"
    path.write_text("older")
    recorder.records.append({"step": object()})
    with pytest.raises(TypeError):
        recorder.save(path)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_going_on_from_a_checkpoint():
    whole_model = made()
    whole = rewire.Recorder(whole_model, every=3, null=3)
    run(whole, whole_model, 12)

    model = made()
    first = rewire.Recorder(model, every=3, null=3)
    run(first, model, 7)
    state = json.loads(json.dumps(first.state_dict()))
    other = made()
    other.load_state_dict(model.state_dict())
    rewire.convert(other, "fa", scale=rewire.scales(model))
    second = rewire.Recorder(other, every=3, null=3)
    second.load_state_dict(state)
    run(second, other, 5)
    assert [r["step"] for r in second.records] == [0, 3, 6, 9]
    for one, two in zip(whole.records, second.records, strict=True):
        assert one["gamma"] == pytest.approx(two["gamma"], abs=1e-5)
        for name, layer in one["layers"].items():
            growth = two["layers"][name]["growth"]
            if one["step"] == 0:  # nothing to compare with yet; the first record is what later ones are compared with
                assert layer["growth"] is growth is None
            else:
                assert layer["growth"] == pytest.approx(growth, rel=1e-4), (one["step"], name)


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_drawn(recorded, tmp_path):
    pytest.importorskip("matplotlib")
    _, recorder = recorded
    recorder.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    recorder.plot(tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "<svg" in text


def drawn_axes(monkeypatch, records, path):
    """The figure's axes, by title."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: kept.append(self))
    plots.draw(records, path)
    return kept[0], {axes.get_title(loc="left"): axes for axes in kept[0].axes}


def test_curves_are_the_numbers_that_were_recorded(recorded, monkeypatch, tmp_path):
    _, recorder = recorded
    figure, panels = drawn_axes(monkeypatch, recorder.records, tmp_path / "a.png")
    assert len(panels) == 6
    curves = {
        "Weight W and feedback B": ("feedback_angle", ["0", "2", "4"]),
        "Size of the feedback": ("feedback_ratio", ["0", "2", "4"]),
        "Gradient of the weight, rule against backprop": ("weight_angle", ["0", "2"]),
        "Gradient at the layer's input, rule against backprop": ("input_angle", ["2", "4"]),
        "Size of the layer's output": ("activation_norm", ["0", "2", "4"]),
    }
    for title, (field, names) in curves.items():
        lines = [line for line in panels[title].lines if list(line.get_xdata()) == [0, 3, 6, 9]]
        for name, line in zip(names, lines, strict=False):
            assert list(line.get_ydata()) == [record["layers"][name][field] for record in recorder.records]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["0", "2", "4 (output)", "arccos Γ"]


def test_what_was_not_measurable_is_a_gap_and_flags_are_marked(recorded, monkeypatch, tmp_path):
    _, recorder = recorded
    records = json.loads(json.dumps(recorder.records))
    records[1]["layers"]["0"]["feedback_angle"] = None
    for record in records:
        record["flags"] = []
    records[1]["flags"] = ["activations have blown up, by more than 100 since the start: 0 (×200)"]
    figure, panels = drawn_axes(monkeypatch, records, tmp_path / "a.png")
    panel = panels["Weight W and feedback B"]
    values = next(line for line in panel.lines if len(line.get_xdata()) == 4).get_ydata()
    assert values[1] != values[1] and values[0] == values[0]
    spans = [patch for patch in panel.patches]
    assert len(spans) == 1
    assert (spans[0].get_x(), spans[0].get_x() + spans[0].get_width()) == (1.5, 4.5)
    assert "activations have blown up, by more than 100 since the start: at step 3" in [
        t.get_text() for t in figure.texts
    ]


def test_direct_rules_have_no_panel_of_weights_and_feedback(monkeypatch, tmp_path):
    model = made("dfa")
    recorder = rewire.Recorder(model, loss_of, inputs=X, null=0)
    recorder.step()
    _, panels = drawn_axes(monkeypatch, recorder.records, tmp_path / "a.png")
    assert len(panels) == 4


def test_many_layers_have_a_scale_of_colours(recorded, monkeypatch, tmp_path):
    _, recorder = recorded
    records = json.loads(json.dumps(recorder.records))
    for record in records:
        record["layers"] = {f"blocks.{i}.{n}": v for i in range(10) for n, v in record["layers"].items()}
    figure, panels = drawn_axes(monkeypatch, records, tmp_path / "a.png")
    assert not figure.legends
    assert len(panels["layer"].get_yticklabels()) == 8
    plots.draw(records, tmp_path / "b.png")


@pytest.mark.parametrize("layers", [1, 5])
def test_names_that_read_as_formulas(recorded, monkeypatch, tmp_path, layers):
    _, recorder = recorded
    records = json.loads(json.dumps(recorder.records))
    for record in records:
        record["layers"] = {f"$\\foo{i}$.{n}": v for i in range(layers) for n, v in record["layers"].items()}
        record["flags"] = ["feedback of $\\bar$"]
    plots.draw(records, tmp_path / "a.png")
    figure, panels = drawn_axes(monkeypatch, records, tmp_path / "b.png")
    shown = figure.legends[0].get_texts() if layers == 1 else panels["layer"].get_yticklabels()
    assert shown[0].get_text() == r"\$\foo0\$.0"


def test_no_label_is_cut_off(recorded, tmp_path):
    """Labels of a scale that spans less than a decade are wide: the picture is as wide as they need."""
    image = pytest.importorskip("matplotlib.image")
    _, recorder = recorded
    records = json.loads(json.dumps(recorder.records))
    for i, record in enumerate(records):
        for layer in record["layers"].values():
            layer["norm"] = layer["backprop_norm"] = 3e-11 + i * 1e-12
    recorder.plot(tmp_path / "a.png")
    plots.draw(records, tmp_path / "b.png")
    pictures = [image.imread(tmp_path / name)[:, :, :3] for name in ("a.png", "b.png")]
    for picture in pictures:
        edges = picture[:, :5], picture[:, -5:], picture[:5], picture[-5:]
        assert all((edge == 1).all() for edge in edges)


def test_nothing_to_draw_and_nothing_to_draw_with(recorded, monkeypatch, tmp_path):
    with pytest.raises(rewire.RewireError, match="nothing has been recorded"):
        rewire.Recorder(made()).plot(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(rewire.RewireError, match=r"rewire\[plots\]"):
        recorded[1].plot(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("network", "rule"), [("lenet", "fa"), ("residual", "dfa")])
def test_the_example(network, rule, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    import runpy

    main = runpy.run_path("examples/alignment.py")["main"]
    result = main(network, rule, str(tmp_path / "a.png"), steps=30)
    assert f"Γ = {result.gamma:.3f}" in capsys.readouterr().out
    assert (tmp_path / "a.png").exists()
