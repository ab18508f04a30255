"""Anything at all, given to every public call: typed errors only, and never a half-converted model."""

import inspect
import json
import warnings
from contextlib import AbstractContextManager

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import nn

import rewire
from rewire.errors import ConversionError, RewireError
from rewire.rules import resolve
from rewire.rules.direct import DFA

FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
MANY = settings(FEW, max_examples=150)
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A parent that uses a weight itself, a tied layer, an attention: whatever leaves something on modules."""

    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Linear(4, 4), nn.ReLU()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.used = nn.Linear(4, 4)
        self.again = self.first
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.act(self.again(self.first(x)))
        h = h + self.attention(h[:, None], h[:, None], h[:, None])[0][:, 0]
        return self.head(F.linear(h, self.used.weight))


def looks(model):
    """All that a call which fails must leave as it was."""
    return [
        (
            type(m),
            {name: id(value) for name, value in m.__dict__.items()},
            [list(hooks) for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)],
            [(name, id(p)) for name, p in m._parameters.items()],
        )
        for m in model.modules()
    ]


class Odd:
    """Cannot be compared or hashed."""

    def __eq__(self, other):
        raise ValueError("compared")

    __hash__ = None


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=3)
words = st.sampled_from(
    [
        *rewire.rules(),
        *rewire.structures.NAMES,
        *("first", "used", "head", "attention", "attention.in_proj", "*", "[", "", "4", "\0"),
        *("keep", "cut", "auto", "skip", "raise", "Dense()", "dfa(", "dfa()", "dfa(layout=1)", "dfa(x=1)", "(((("),
        *(
            "dfa(feedback=LowRank(rank=2))",
            "dfa(feedback=LowRank(rank=-1))",
            "dfa(feedback=os.system('true'))",
            "fa(a=b)",
        ),
    ]
)
objects = st.sampled_from(
    [
        nn.Linear,
        nn.ReLU,
        nn.Module,
        int,
        rewire.LocalRule,
        rewire.DirectRule(),
        rewire.Rule(),
        DFA(),
        rewire.structures.Dense,
        rewire.structures.Sparse(density=0.5),
        torch.zeros(2),
        torch.ones(()),
        torch.float16,
        np.zeros(3),
        np.float64(2.0),
        np.int64(3),
        10**400,
        -(10**400),
        Odd(),
        Odd,
        range(2),
        object(),
        inspect,
        nn.Linear(2, 2),
    ]
)
leaf = plain | words | objects
hashable = plain | words | st.sampled_from([nn.Linear, nn.ReLU, nn.Module, int, 10**400])
anything = st.recursive(
    leaf | leaf.map(lambda value: lambda *_: value),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(hashable, inner, max_size=3)
    ),
    max_leaves=4,
)


def tolerant(call, *allowed):
    """What ``call`` returns; None where it raised a typed error."""
    try:
        return call()
    except (RewireError, *allowed) as problem:
        assert str(problem)
        return None


# -- convert -----------------------------------------------------------------------------------------------

OPTIONS = [name for name in inspect.signature(rewire.convert).parameters if name != "model"]


@MANY
@given(st.dictionaries(st.sampled_from(OPTIONS), anything, min_size=1, max_size=2), st.booleans())
def test_convert_changes_all_or_nothing(options, converted):
    model = Net()
    plain_looks = looks(model)
    if converted:
        rewire.convert(model, "fa")
    before = looks(model)
    if tolerant(lambda: rewire.convert(model, **options)) is None:
        assert looks(model) == before
        # Such as it was, it works.
        model(X).sum().backward()
    else:
        assert all("_rewire" in m.__dict__ for m in (model.first, model.head))
    rewire.restore(model)
    # Ids of removed entries aside, everything is as it was before any conversion.
    assert looks(model) == plain_looks


@MANY
@given(anything)
def test_names_of_rules_and_structures(value):
    tolerant(lambda: resolve(value))
    tolerant(lambda: rewire.structures.resolve(value))
    tolerant(lambda: DFA(layout=value))
    tolerant(lambda: DFA(feedback=value))


@FEW
@given(st.sampled_from(sorted(rewire.structures.__all__)), st.data())
def test_options_of_structures(name, data):
    kind = getattr(rewire.structures, name)
    if not (isinstance(kind, type) and issubclass(kind, rewire.structures.Structure)) or not hasattr(kind, "make"):
        return
    options = [option for option in inspect.signature(kind).parameters if option not in ("args", "kwargs", "_")]
    if kind is not rewire.structures.Structure and options:
        chosen = data.draw(st.dictionaries(st.sampled_from(options), anything, max_size=2))
        tolerant(lambda: kind(**chosen))


@FEW
@given(anything, anything)
def test_register_rule(name, cls):
    before = rewire.rules()
    made = tolerant(lambda: rewire.register_rule(name)(cls))
    if made is None:
        assert rewire.rules() == before


# -- calls on models ---------------------------------------------------------------------------------------


def loss_fn(outputs):
    return outputs.square().mean()


def trained(kind):
    torch.manual_seed(0)
    model = Net()
    if kind != "plain":
        rewire.convert(model, "fa" if kind == "fa" else "dfa", skip="cut" if kind == "cut" else "keep")
        loss_fn(model(X)).backward()
    return model


ON_MODELS = [
    name
    for name in rewire.__all__
    if callable(getattr(rewire, name))
    and not isinstance(getattr(rewire, name), type)
    and name not in ("register_rule", "rules", "targets", "convert")
]


@pytest.mark.parametrize("name", ON_MODELS)
@FEW
@given(model=anything, more=st.lists(anything, max_size=2))
def test_what_is_no_model(name, model, more):
    call = getattr(rewire, name)

    def run():
        result = call(model, *more)
        if isinstance(result, AbstractContextManager):
            with result:
                pass

    if not isinstance(model, nn.Module):
        with pytest.raises((RewireError, TypeError)):
            run()


ARGUMENTS = {
    "backward_streamed": ["inputs", "loss_fn", "optimizer"],
    "verify": ["inputs", "loss_fn"],
    "alignment": ["inputs", "loss_fn"],
    "summary": ["inputs"],
    "use_rule": ["rule"],
    "load_config": ["source"],
}


@pytest.mark.parametrize("kind", ["plain", "fa", "dfa", "cut"])
@pytest.mark.parametrize("name", [name for name in ARGUMENTS if hasattr(rewire, name)])
@FEW
@given(value=anything, which=st.integers(0, 2))
def test_arguments_beside_a_model(name, kind, value, which):
    model = trained(kind)
    before = looks(model)
    names = ARGUMENTS[name]
    usual = {"inputs": X, "loss_fn": loss_fn}
    given_ = {argument: usual[argument] for argument in names if argument in usual}
    replaced = names[which % len(names)]
    given_[replaced] = value
    # What the model itself says to inputs that are none of its kind is its own affair, and so is what a loss does.
    theirs = (Exception,) if replaced == "inputs" else (TypeError, OSError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def run():
            result = getattr(rewire, name)(model, **given_)
            if isinstance(result, AbstractContextManager):
                with result:
                    loss_fn(model(X)).backward()
            return result

        tolerant(run, *theirs)
        assert looks(model) == before
        loss_fn(model(X)).backward()


@FEW
@given(anything)
def test_targets(value):
    def run():
        with rewire.targets(value):
            pass
        return True

    if tolerant(run) is None:
        assert not isinstance(value, torch.Tensor)


# -- configurations ------------------------------------------------------------------------------------------


def places(value, path=()):
    """Every place in a JSON value."""
    if isinstance(value, dict):
        for key in value:
            yield (*path, key)
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield (*path, index)
            yield from places(inner, (*path, index))


CONFIGS = {kind: json.dumps(rewire.config(trained(kind))) for kind in ("fa", "dfa", "cut")}
json_values = st.recursive(
    plain.filter(lambda value: not isinstance(value, bytes)) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | words, inner, max_size=3),
    max_leaves=5,
)


@MANY
@given(st.sampled_from(sorted(CONFIGS)), st.data(), st.booleans())
def test_a_configuration_with_one_thing_changed_fits_or_changes_nothing(kind, data, converted):
    config = json.loads(CONFIGS[kind])
    path = data.draw(st.sampled_from(list(places(config))))
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[path[-1]] = data.draw(json_values)
    else:
        del inner[path[-1]]
    model = trained(kind) if converted else Net()
    before = looks(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if tolerant(lambda: rewire.load_config(model, config)) is None:
            assert looks(model) == before
        else:
            loss_fn(model(X)).backward()


@FEW
@given(st.text() | json_values.map(json.dumps))
def test_files_that_are_no_configurations(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("fuzz") / "x.json"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    model = Net()
    before = looks(model)
    with pytest.raises(ConversionError):
        rewire.load_config(model, file)
    assert looks(model) == before


@FEW
@given(anything)
def test_paths_that_are_none(value):
    if isinstance(value, str):
        value = (value.replace("/", "") and "") or "\0"
    with pytest.raises(ConversionError):
        rewire.save_config(trained("fa"), value)


# -- pure functions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rewire.functional.__all__)
@FEW
@given(st.data())
def test_functional_raises_where_torch_does(name, data):
    """The same shapes, strides and paddings go and do not go as for the function of the same name."""
    ours, theirs = getattr(rewire.functional, name), getattr(F, name)
    shapes = st.lists(st.integers(0, 5), max_size=5).map(tuple)
    x, W = torch.zeros(data.draw(shapes)), torch.zeros(data.draw(shapes))
    options = {
        option: data.draw(st.integers(-1, 3))
        for option in ("stride", "padding", "dilation", "groups", "output_padding")
        if option in inspect.signature(ours).parameters and data.draw(st.booleans())
    }
    try:
        expected = theirs(x, W, None, **options)
    except (RuntimeError, ValueError, TypeError, IndexError):
        with pytest.raises((RewireError, RuntimeError, ValueError, TypeError, IndexError)):
            ours(x, W, W, **options)
        return
    assert ours(x, W, W, **options).shape == expected.shape


@FEW
@given(anything, anything, anything)
def test_functional_with_no_tensors(x, W, B):
    if not all(isinstance(value, torch.Tensor) for value in (x, W, B)):
        with pytest.raises(TypeError):
            rewire.functional.linear(x, W, B)
