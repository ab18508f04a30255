"""Two processes that train one model together get what a single one gets. All cases run in one pair of processes."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import rewire
from rewire.rules.base import resolve
from tests.every_rule import SCHEDULES
from tests.ranks import run_ranks

from . import cases
from .cases import (
    LOCAL,
    NOT_LINEAR,
    RULES,
    STEPS,
    STRUCTURED,
    batch,
    build,
    half,
    loss_of,
    optimizer_of,
    single,
    state_of,
    train,
)
from .worker import digests

TOL = 1e-10
HEAD = "3."  # the output layer's parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder):
    """What each of two processes found, by case."""
    return run_ranks(folder, "-m", "tests.distributed.worker")


def agree(found, wanted, tol=TOL):
    assert found.keys() == wanted.keys()
    for name, t in found.items():
        off = float((t - wanted[name]).abs().max())
        assert off <= tol, f"{name}: off by {off}"


def on_both(ranks, case):
    """What the case found, which has to be the same on both ranks, bit for bit."""
    one, two = (rank[case] for rank in ranks)
    states = [x[0] if isinstance(x, tuple) else x for x in (one, two)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())
    if isinstance(one, tuple):
        assert one[1:] == two[1:]
    return one


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("rule", [*RULES, *STRUCTURED])
def test_two_processes_equal_one_on_the_joint_batch(ranks, rule, how):
    """Parameters and gradients after several steps, the first of which measures the scales."""
    found, scales, hashes = on_both(ranks, f"{how}, {rule}")
    if rule == "grape":  # its probes are random, and other ones on each rank than on the joint batch; both ranks agree
        return
    model = single(rule)
    learns = resolve(rule).learns  # what was learned is a sum over ranks, in another order
    agree(found, state_of(model), **({"tol": 1e-8} if learns else {}))
    model(batch(0)[0])
    mine = rewire.scales(model)
    assert scales == pytest.approx(mine, rel=1e-8 if learns else 1e-12) and scales.keys() == mine.keys()
    if hashes and not learns and set(scales.values()) == set(mine.values()):
        assert hashes == digests(model)


def test_feedback_of_a_given_scale_is_the_same_everywhere_bit_for_bit(ranks):
    """Nothing is sent from rank to rank: it is made from the seed, and so is the single process's."""
    _, scales, hashes = on_both(ranks, "ddp, dfa")
    model = rewire.convert(build(), "dfa", scale=scales)
    train(model, [batch(0)])
    assert hashes == digests(model) and len(hashes) == 3


@pytest.mark.parametrize("rule", NOT_LINEAR)
def test_rules_that_drop_the_size_of_e_step_half_as_far_on_two_ranks(rule):
    """What a sample adds to a hidden layer's gradient is B sign(e) however large the batch that the loss is a mean of.

    So a sum over the whole batch is twice the average of two ranks' sums. Two processes are compared with that average.
    """
    model = rewire.convert(build(), rule, scale=0.3)
    loss_of(model, *batch(0)).backward()
    whole = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    for rank in (0, 1):
        loss_of(model, *half(0, rank)).backward()
    for name, p in model.named_parameters():
        factor = 1 if name.startswith(HEAD) else 2
        assert float((whole[name] - factor * p.grad / 2).abs().max()) <= TOL, name


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_wrapped_first_and_converted_later(ranks, how):
    found, scales = on_both(ranks, f"converted last, {how}")
    agree(found, state_of(single("dfa")))
    assert len(scales) == 3


@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_no_sync_accumulates_as_one_process_does(ranks, rule):
    model = rewire.convert(build(), rule)
    optimizer = optimizer_of(model)
    for step in range(0, 2 * STEPS, 2):
        optimizer.zero_grad()
        for micro in (step, step + 1):
            loss_of(model, *batch(micro)).backward()
        optimizer.step()
    agree(on_both(ranks, f"no_sync, {rule}"), state_of(model))


@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_a_rank_that_has_a_batch_less(ranks, rule):
    """Under DDP's join the missing rank counts with a gradient of zero."""
    model = rewire.convert(build(), rule)
    optimizer = train(model, [batch(step) for step in range(STEPS - 1)])
    optimizer.zero_grad()
    (loss_of(model, *half(STEPS - 1, 0)) / 2).backward()
    optimizer.step()
    found = [rank[f"join, {rule}"] for rank in ranks]
    agree(found[0], state_of(model))
    parameters = [name for name in found[1] if not name.endswith(".grad")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in parameters)


@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_a_rank_that_has_fewer_samples(ranks, rule):
    """DDP averages over ranks, not samples."""
    model = rewire.convert(build(), rule)
    optimizer = train(model, [batch(step) for step in range(STEPS)])
    optimizer.zero_grad()
    x, labels = batch(STEPS, 4)
    ((loss_of(model, x[:3], labels[:3]) + loss_of(model, x[3:], labels[3:])) / 2).backward()
    optimizer.step()
    agree(on_both(ranks, f"fewer samples, {rule}"), state_of(model))


@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_compiled(ranks, rule):
    agree(on_both(ranks, f"compiled ddp, {rule}"), state_of(single(rule, whole=cases.Net(build()))))


def test_a_graph_that_ddp_cuts_into_buckets_is_refused(ranks):
    for rank in ranks:
        assert "its compiled graph was cut in two" in rank["compiled in buckets, True"]
        assert "torch._dynamo.config.optimize_ddp = False" in rank["compiled in buckets, True"]
        assert rank["compiled in buckets, False"] <= TOL


def test_layers_that_do_not_run_on_every_rank(ranks):
    """A layer that one rank has measured and the other not has one scale all the same."""
    _, scales = on_both(ranks, "not on every rank")
    assert scales["middle"] not in (scales["body.1.linear"], scales["body.2.linear"])
    _, scales = on_both(ranks, "never at first")
    others = [scales[name] for name in ("body.1.linear", "body.2.linear", "body.3")]
    mean = torch.tensor(others, dtype=torch.float64).log().mean().exp().item()
    assert scales["middle"] == pytest.approx(mean, rel=1e-12)


def test_a_forward_on_one_rank_alone_does_not_disturb(ranks):
    agree(on_both(ranks, "a rank looks by itself"), state_of(single("dfa")))


def test_ranks_that_nobody_knows_to_be_one_are_warned(ranks):
    for rank in ranks:
        assert any("measured on this rank alone" in text for text in rank["by hand"])


def test_a_sharded_checkpoint_of_two_is_resumed_by_one(ranks, folder):
    found, scales = on_both(ranks, "checkpoint")
    model = rewire.convert(build(seed=1), "dfa", scale=scales)
    optimizer = optimizer_of(model)
    train(model, [(batch(0)[0], batch(0)[1])], optimizer)  # roles, and a momentum to be replaced
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    half_way = single("dfa")
    agree({n: p.detach() for n, p in model.named_parameters()}, {n: p.detach() for n, p in half_way.named_parameters()})
    train(model, [batch(step) for step in range(STEPS, STEPS + 2)], optimizer)
    agree(state_of(model), found)
    agree(found, state_of(single("dfa", STEPS + 2)))


# Feedback that learns from data takes each part of a pipeline's batch for a pass of its own.
FIXED = [rule for rule in LOCAL if not resolve(rule).learns or rule == "kp"]


@pytest.mark.parametrize("rule", ["bp", *FIXED])
def test_pipeline_stages_under_local_rules(ranks, rule):
    model = rewire.convert(build(), rule)
    for _ in range(2):
        model.zero_grad()
        x, labels = batch(0)
        for part in (slice(0, 4), slice(4, 8)):
            (loss_of(model, x[part], labels[part]) / 2).backward()
    agree({**ranks[0][f"pipeline, {rule}"], **ranks[1][f"pipeline, {rule}"]}, state_of(model))


def test_pipeline_stages_without_the_output_error_are_refused(ranks):
    for rank in ranks:
        said = rank["pipeline without e, new"]
        assert "layer '0.linear' is in stage 0 of a pipeline of 2, and rule dfa needs the output error" in said
        assert "layers={'0.linear': 'fa'}" in said
        said = rank["pipeline without e, trained"]
        assert "layer '1.linear' got a gradient, but no output error can reach it" in said
        assert "Of a pipeline only the last stage has the output error" in said


@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_tensor_parallel_layers_are_refused_and_run_on_backprop(ranks, rule):
    for rank in ranks:
        said, _ = rank[f"tensor parallel, {rule}"]
        assert "layer '0.linear': its weight is split over ranks" in said
        assert "layers={'0.linear': 'bp'}" in said
    _, found = ranks[0][f"tensor parallel, {rule}"]
    model = rewire.convert(build(), rule, scale=0.3, layers={"[01].*": "bp"})
    for _ in range(2):
        model.zero_grad()
        loss_of(model, *batch(0)).backward()
    agree(found, state_of(model))


def test_every_rule_there_is_has_been_tried():
    assert set(cases.RULES) | set(SCHEDULES) == set(rewire.rules())
