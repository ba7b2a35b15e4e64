"""Tests of mlerl.py in the order of the paper, each named for the claim that it checks.

Oracles are written from the formulas, slowly, and share nothing with the code under test. The
language model is a real but tiny one; what executes programs is faked (`FakePool`) except where
instrumented programs are run to see what they print.
"""
import ast
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
import types

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background jobs ignore it
import mlerl
import prompts

mlerl.import_torch()
import grade
import numpy as np
import pandas as pd
import torch
import transformers

HERE = pathlib.Path(mlerl.__file__).resolve().parent
TASK = "random-acts-of-pizza"
SECRET = "5ec7e7"
MARKERS = ["imported packages", "loaded data", "defined model", "training loss:", "trained model",
           "testing loss:", "predicted test labels"]  # Sec. 3.2, in the paper's order


# --------------------------------------------------------------------------------------------------
# Fixtures and fakes
# --------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def config(**changes):
    """A Config for the tiny models of this file; everything else is the paper's default."""
    small = dict(dtype="float32", gradient_checkpointing=False, batch_size=4, mini_batch=4,
                 micro_batch=3, max_prompt_tokens=3000, max_response_tokens=12, workers=2,
                 save_every=1, model="not used", eval_samples=4)
    return dataclasses.replace(mlerl.Config(), **(small | changes))


def small_tokenizer():
    """The tiny policy's kind of tokenizer, trained on 50 texts."""
    return mlerl.tiny_tokenizer([
        ([{"role": "user", "content": f"Task: {k}\n"}],
         f"Use tree {k}.\n```python\nimport os\nprint({k % 5})\n```") for k in range(50)])


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    """Folder of a tiny Qwen2 with a tokenizer, in Hugging Face format."""
    return save_qwen(tmp_path_factory.mktemp("policy"), hidden_size=16, std=0.3)


def save_qwen(folder, hidden_size, std):
    torch.manual_seed(1)
    tokenizer = small_tokenizer()
    lm = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        initializer_range=std, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def learner(policy):
    """Actor, critic and reference with plain SGD of step 1: a step shows the gradient."""
    torch.manual_seed(2)
    learner = mlerl.Learner(config(critic_init_std=0.5), policy)
    learner.actor_opt = torch.optim.SGD(learner.actor.parameters(), lr=1.0)
    learner.critic_opt = torch.optim.SGD(learner.critic.parameters(), lr=1.0)
    return learner


EXAMPLE = "Use tree 7.\n```python\nimport os\nprint(2)\n```"


def random_attempts(n, seed=0, vocabulary=250):
    """n attempts with random tokens: ragged prompts and responses, stale behaviour log-probs."""
    rng = random.Random(seed)
    ids = lambda low, high: [rng.randrange(2, vocabulary) for _ in range(rng.randint(low, high))]
    attempts = [mlerl.Attempt(TASK, "solve", ids(1, 9), response_ids=ids(1, 7)) for _ in range(n)]
    for a in attempts:
        a.logp = [-rng.uniform(0, 8) for _ in a.response_ids]
        a.R, a.dt = rng.gauss(0, 1), rng.uniform(0.1, 10)
    return attempts


def script(**what):
    """A program that FakePool understands: what is to happen stands in its first statement."""
    return f"WHAT = {json.dumps(what)!r}\nx = 1\n"


def answers(n=40):
    """A private answer table of the pizza task."""
    return pd.DataFrame({"request_id": [f"t3_{k:04d}" for k in range(n)],
                         "requester_received_pizza": [k % 4 == 0 for k in range(n)]})


def submission(noise, seed=0):
    """CSV bytes of predictions: the truth, mixed with a share of noise."""
    truth, rng = answers(), np.random.default_rng(seed)
    p = (1 - noise) * truth.requester_received_pizza + noise * rng.random(len(truth))
    return pd.DataFrame({"request_id": truth.request_id,
                         "requester_received_pizza": p}).to_csv(index=False).encode()


class FakePool:
    """Executes nothing: results follow from the program's text, first in, first out."""

    last = None  # the pool made last

    def __init__(self, cfg, public, private, secret):
        self.submitted, self.closed, self.report = [], False, ["scripted"]
        self.stage = pathlib.Path("no folder is staged")
        FakePool.last = self

    def submit(self, function, *args):
        future = concurrent.futures.Future()
        future.set_result(function(*args))
        return future

    def run(self, task, code):
        self.submitted.append(code)
        first = re.search(r"^WHAT = (.*)$", code, re.MULTILINE)
        what = json.loads(ast.literal_eval(first[1])) if first else {"outcome": "crash"}
        result = dict(outcome=what.get("outcome", "ok"), dt=what.get("dt", 1.0), exit=0,
                      output=what.get("output", "done\n"), marks=what.get("marks", []))
        if result["outcome"] == "ok":
            result["submission"] = (what["file"].encode() if "file" in what
                                    else submission(what.get("noise", 0.5)))
        return result

    def cancel(self):
        return [0.5]

    def close(self):
        self.closed = True


class ScriptedSampler:
    """Draws tokens from torch's generator and programs from a list: a policy that can write."""

    def __init__(self, cfg, tokenizer=None, programs=None):
        self.cfg, self.calls = cfg, []
        marks = MARKERS[:2]
        self.programs = programs or [
            script(dt=2.0, noise=0.9), script(dt=0.5, noise=0.7), script(dt=4.0, noise=0.8),
            script(dt=3.0, noise=1.0, output="trained\n"), script(dt=9.0, noise=0.6),
            script(outcome="crash", dt=0.25, marks=marks), script(outcome="timeout", dt=20.0),
            script(outcome="import", dt=0.1), script(dt=1.0, file="nonsense"), ""]

    def sample(self, attempts, lm, version):
        self.calls.append((version, list(attempts)))
        for a in attempts:
            tokens = torch.randint(2, 250, (int(torch.randint(1, 8, ())),)).tolist()
            a.response_ids, a.version = tokens, version
            a.plan, a.code = "Plan.", self.programs[sum(tokens) % len(self.programs)]
        logp, _ = mlerl.score_tokens(lm, attempts, self.cfg, shared=False)
        for a, row in zip(attempts, logp.tolist()):
            a.logp = row[:len(a.response_ids)]
            yield a


@pytest.fixture
def fakes(monkeypatch):
    """No execution, no look at data or packages."""
    monkeypatch.setattr(mlerl, "Pool", FakePool)
    monkeypatch.setattr(prompts, "importable", lambda *a, **k: ["pandas"], raising=False)
    monkeypatch.setattr(prompts, "snippet", lambda task, width, *a, **k: "row " + "x" * width,
                        raising=False)


@pytest.fixture
def D(tmp_path):
    """The pizza task over 40 made-up answers."""
    truth = answers()
    everything = np.ones(len(truth), bool)
    (tmp_path / "sampleSubmission.csv").write_text("request_id,requester_received_pizza\nt3_a,0\n")
    return {TASK: dict(grade.load_task(TASK), public=tmp_path, private=tmp_path, truth=truth,
                       standin=True, rows=everything, report_rows=everything)}


def environment(D, **changes):
    env = mlerl.Environment(config(**changes), D)
    env.secret = SECRET
    return env


def attempt(code, id=0, plan="Plan.", **fields):
    return mlerl.Attempt(TASK, "solve", [1, 2], id=id, plan=plan, code=code, **fields)


def executed(D, code, **changes):
    """One program through Environment."""
    return through(environment(D, **changes), attempt(code))


def through(env, a):
    env.submit([a])
    (done,), _ = env.collect(1, 0, keep=True)
    return done


# --------------------------------------------------------------------------------------------------
# Slow oracles: one sequence at a time, one token at a time, no padding
# --------------------------------------------------------------------------------------------------
def slow_logprobs(lm, a, temperature):
    """Log-prob and entropy of each response token of one attempt, from a plain forward pass."""
    ids = torch.tensor([a.prompt_ids + a.response_ids])
    logits = lm(input_ids=ids).logits[0].float() / temperature
    logp, entropy = [], []
    for t, token in enumerate(a.response_ids):
        p = torch.softmax(logits[len(a.prompt_ids) + t - 1], -1)
        logp.append(p[token].log())
        entropy.append(-(p * p.log()).sum())
    return torch.stack(logp), torch.stack(entropy)


def slow_values(critic, a):
    """Critic's value before each response token of one attempt."""
    scores = critic(input_ids=torch.tensor([a.prompt_ids + a.response_ids])).logits[0, :, 0]
    return torch.stack([scores[len(a.prompt_ids) + t - 1] for t in range(len(a.response_ids))])


def slow_aggregate(tokens, loss_agg):
    """Loss of a list of per-token tensors, one tensor a sequence."""
    if loss_agg == "token":
        return sum(t.sum() for t in tokens) / sum(len(t) for t in tokens)
    return sum(t.sum() / len(t) for t in tokens) / len(tokens)


def slow_policy_token(logp, prox, old, A, w, clip, C):
    """Decoupled PPO loss of one token, numbers in, number out."""
    rho = math.exp(logp - prox)
    near = min(max(rho, 1 - clip), 1 + clip)
    return w * min(C, math.exp(prox - old)) * max(-A * rho, -A * near)


def grads(loss, model):
    """Gradient of a scalar with respect to every parameter, by name."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {k: torch.zeros_like(p) if g is None else g
            for (k, p), g in zip(named.items(), found)}


def close(a, b, tolerance=2e-5):
    """Assert that two dicts of tensors agree, relative to the largest entry."""
    scale = max(float(v.abs().max()) for v in b.values())
    assert scale > 1e-6  # otherwise nothing is compared
    for k in b:
        assert float((a[k] - b[k]).abs().max()) <= tolerance * max(scale, 1), k


def ragged_mask(B, T, seed=0):
    """(B, T) bool, a first part of each row, at least one token."""
    rng = random.Random(seed)
    return torch.tensor([[t < n for t in range(T)]
                         for n in [rng.randint(1, T) for _ in range(B)]])


# --------------------------------------------------------------------------------------------------
# Table 3
# --------------------------------------------------------------------------------------------------
TABLE_3 = dict(
    max_prompt_tokens=1024, max_response_tokens=1024, batch_size=128, iterations=100,
    temperature=0.7, top_k=-1, top_p=1.0, ignore_eos=False, dtype="bfloat16",
    model="Qwen/Qwen2.5-3B-Instruct", gradient_checkpointing=True, lr=1e-5, critic_lr=1e-5,
    actor_grad_clip=1.0, critic_grad_clip=1.0, mini_batch=128, micro_batch=8, clip=0.2,
    value_clip=0.5, entropy_coef=0.001, kl_coef=0.001, gamma=1.0, lam=1.0)


def field_lines():
    """{field of Config: its line of source}."""
    source = (HERE / "mlerl.py").read_text().splitlines()
    body = next(n for n in ast.parse("\n".join(source)).body
                if isinstance(n, ast.ClassDef) and n.name == "Config").body
    return {n.target.id: source[n.lineno - 1] for n in body if isinstance(n, ast.AnnAssign)}


@pytest.mark.parametrize("name, value", TABLE_3.items())
def test_table3_default_is_the_papers(name, value):
    assert getattr(mlerl.Config(), name) == value
    assert "Table 3" in field_lines()[name]


def test_table3_ppo_epochs_is_a_documented_deviation():
    assert mlerl.Config().ppo_epochs == 1  # NOTES: Table 3's 100 was ignored by its library
    line = field_lines()["ppo_epochs"]
    assert "DEVIATION" in line and "100" in line


def test_defaults_of_the_method_are_the_papers():
    cfg = mlerl.Config()
    assert (cfg.duration, cfg.reward, cfg.p_improve, cfg.eval_samples) == ("paper", "paper", 0.5, 128)
    assert (cfg.collect, cfg.oversample, cfg.max_is_weight, cfg.max_staleness) == ("carry", 2, 2, 8)
    assert cfg.loss_agg == "seq" and cfg.report_fold == 0 and cfg.weight_decay == 0.01


def test_every_hyperparameter_has_one_commented_line():
    lines = field_lines()
    assert set(lines) == {f.name for f in dataclasses.fields(mlerl.Config)}
    assert all(re.search(r"#\s*\S+", line) for line in lines.values())
    assert mlerl.Config.__dataclass_params__.frozen


# --------------------------------------------------------------------------------------------------
# Sec. 3.1, Eq. 2 and 3: duration-aware gradient
# --------------------------------------------------------------------------------------------------
def bandit_gradients(w, n_fast, cfg):
    """Norms of what the fast and the slow samples of a two-armed softmax add to the gradient."""
    norms = []
    for rows in (slice(0, n_fast), slice(n_fast, None)):
        theta = torch.zeros(2, requires_grad=True)
        arms = torch.tensor([0] * n_fast + [1] * (len(w) - n_fast))
        logp = theta.log_softmax(0)[arms][:, None]
        old, A = logp.detach(), torch.ones(len(w), 1)
        loss = mlerl.policy_loss(logp, old, old, A, w, cfg)[0]
        norms.append(float(torch.autograd.grad(loss[rows].sum(), theta)[0].norm()))
    return norms


@pytest.mark.parametrize("duration, ratio", [("none", 10.0), ("paper", 1.0)])
def test_eq3_two_actions_counted_as_sec_31_assumes(duration, ratio):
    cfg, pi, T = config(duration=duration), 0.5, 100
    n_fast, n_slow = round(pi * T / 1), round(pi * T / 10)  # N = pi T / dt
    w = mlerl.duration_weights([1.0] * n_fast + [10.0] * n_slow, cfg)
    fast, slow = bandit_gradients(w, n_fast, cfg)
    assert fast / slow == pytest.approx(ratio, rel=1e-4)


def test_eq3_weights_are_dt_over_mean_dt_of_the_batch():
    dt = [0.5, 20.0, 3.0, 0.01]
    w = mlerl.duration_weights(dt, config())
    assert w.dtype == torch.float32
    assert w.tolist() == pytest.approx([t / (sum(dt) / 4) for t in dt], rel=1e-6)


def test_eq3_what_never_ran_has_weight_one_and_does_not_shift_the_rest():
    w = mlerl.duration_weights([None, 1.0, None, 3.0], config())
    assert w.tolist() == pytest.approx([1.0, 0.5, 1.0, 1.5])
    assert mlerl.duration_weights([None, None], config()).tolist() == [1.0, 1.0]


def test_duration_none_gives_ones():
    assert mlerl.duration_weights([0.1, 30.0, None], config(duration="none")).tolist() == [1, 1, 1]


def test_eq3_ppo_gradient_at_theta_old_is_w_A_grad_log_pi(learner):
    cfg, attempts = config(), random_attempts(6)
    w = mlerl.duration_weights([a.dt for a in attempts], cfg)
    ids, where, mask = mlerl.padded(attempts, learner.actor.device)
    A = torch.randn(mask.shape) * mask
    logp, _ = mlerl.response_logprobs(learner.actor, ids, where, mask, cfg)
    old = logp.detach()
    loss, clipped = mlerl.policy_loss(logp, old, old, A, w, cfg)
    ours = grads((mlerl.token_weights(mask, "seq") * loss).sum(), learner.actor)
    terms = [w[k] * A[k, :len(a.response_ids)] * slow_logprobs(learner.actor, a, 0.7)[0]
             for k, a in enumerate(attempts)]
    oracle = grads(-slow_aggregate(terms, "seq"), learner.actor)
    close(ours, oracle)
    assert not clipped.any()


# --------------------------------------------------------------------------------------------------
# Rewards with KL, GAE, whitening
# --------------------------------------------------------------------------------------------------
def test_kl_shaped_rewards_against_a_loop():
    mask, R = ragged_mask(5, 7), torch.randn(5)
    old, ref = -torch.rand(5, 7) * mask, -torch.rand(5, 7) * mask
    r = mlerl.shape_rewards(R, old, ref, mask, 0.3)
    for b, t in itertools.product(range(5), range(7)):
        last = int(mask[b].sum()) - 1
        expected = (float(R[b]) if t == last else 0.0) - 0.3 * float(old[b, t] - ref[b, t])
        assert float(r[b, t]) == pytest.approx(expected if t <= last else 0.0, abs=1e-6)


def test_kl_shaped_rewards_ignore_what_stands_behind_the_mask():
    mask, R = ragged_mask(5, 7), torch.randn(5)
    old, ref = torch.randn(5, 7), torch.randn(5, 7)
    clean = mlerl.shape_rewards(R, old * mask, ref * mask, mask, 0.3)
    assert torch.equal(mlerl.shape_rewards(R, old, ref, mask, 0.3), clean)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.95), (0.99, 0.0), (1.0, 0.5), (0.3, 1.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_gae_against_the_double_sum(gamma, lam, seed):
    torch.manual_seed(seed)
    mask = ragged_mask(6, 9, seed)
    r, V = torch.randn(6, 9) * mask, torch.randn(6, 9) * mask
    A, returns = mlerl.gae(r, V, mask, gamma, lam)
    for b in range(6):
        n = int(mask[b].sum())
        v = [float(x) for x in V[b, :n]] + [0.0]  # V = 0 after the last token
        delta = [float(r[b, t]) + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(9):
            expected = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
            assert float(A[b, t]) == pytest.approx(expected, abs=1e-5)
            assert float(returns[b, t]) == pytest.approx(expected + v[t] if t < n else 0, abs=1e-5)


def test_gae_telescopes_at_gamma_and_lambda_one():
    mask = ragged_mask(8, 11)
    r, V = torch.randn(8, 11) * mask, torch.randn(8, 11) * mask
    A, returns = mlerl.gae(r, V, mask, 1.0, 1.0)
    to_go = torch.stack([torch.stack([row[t:].sum() for t in range(11)]) for row in r])
    assert torch.allclose(A, (to_go - V) * mask, atol=1e-5)
    assert torch.allclose(returns, to_go * mask, atol=1e-5)


def test_gae_ignores_what_stands_behind_the_mask():
    mask = ragged_mask(5, 6)
    r, V, junk = torch.randn(5, 6) * mask, torch.randn(5, 6) * mask, 100 * ~mask
    for clean, dirty in zip(mlerl.gae(r, V, mask, 0.9, 0.8),
                            mlerl.gae(r + junk, V + junk, mask, 0.9, 0.8)):
        assert torch.allclose(clean * mask, dirty * mask)


def test_whitening_has_mean_0_and_variance_1_over_valid_tokens_of_each_task():
    mask, tasks = ragged_mask(60, 20), ["a", "b", "b"] * 20
    A = torch.randn(60, 20) * 5 + 3
    A[[t == "b" for t in tasks]] *= 100
    out = mlerl.whiten(A, mask, tasks, torch.randn(60))
    for task in "ab":
        rows = [k for k, t in enumerate(tasks) if t == task]
        values = [float(out[k, t]) for k in rows for t in range(20) if mask[k, t]]
        mean = sum(values) / len(values)
        assert mean == pytest.approx(0, abs=1e-4)
        assert sum((v - mean) ** 2 for v in values) / len(values) == pytest.approx(1, rel=0.01)
    assert (out[~mask] == 0).all()


def test_whitening_never_looks_at_masked_entries_and_keeps_the_input():
    mask = ragged_mask(10, 8)
    A = torch.randn(10, 8)
    before = A.clone()
    junk = torch.where(mask, A, torch.full_like(A, 1e6))
    whitened = [mlerl.whiten(values, mask, ["a"] * 10, torch.arange(10)) for values in (A, junk)]
    assert torch.equal(*whitened) and whitened[0].any()
    assert torch.equal(A, before)


@pytest.mark.parametrize("values", [[[2.0], [2.0]], [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]])
def test_whitening_of_values_without_spread_is_finite(values):
    A = torch.tensor(values)
    out = mlerl.whiten(A, torch.ones_like(A).bool(), ["a", "a"], torch.tensor([0.0, 1.0]))
    assert torch.isfinite(out).all() and out.abs().max() < 1e-3


def test_whitening_leaves_out_a_task_whose_rewards_do_not_vary():
    A, mask, tasks = torch.randn(6, 4), ragged_mask(6, 4), ["a", "b"] * 3
    out = mlerl.whiten(A, mask, tasks, torch.tensor([-10.0, -10.0, -10.0, 0.5, -10.0, 0.6]))
    assert not out[::2].any() and out[1::2].any()
    alone = mlerl.whiten(A[1::2], mask[1::2], tasks[1::2], torch.arange(3))
    assert torch.equal(out[1::2], alone)


# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------
def test_policy_loss_against_a_loop_stale_and_clipped():
    cfg = config()
    logp, prox, old, A = torch.randn(4, 40, 30).mul(0.7).unbind(0)
    w = torch.rand(40) * 3
    loss, clipped = mlerl.policy_loss(logp, prox, old, A, w, cfg)
    for b, t in itertools.product(range(40), range(30)):
        args = [float(x[b, t]) for x in (logp, prox, old, A)]
        assert float(loss[b, t]) == pytest.approx(
            slow_policy_token(*args, float(w[b]), clip=0.2, C=2.0), rel=1e-4, abs=1e-5)
    assert 0.1 < float(clipped.float().mean()) < 0.9


@pytest.mark.parametrize("A, rho, expected, flat", [
    (1.0, 1.5, -1.2, True),  # good action, far up: no more gain
    (1.0, 0.5, -0.5, False),  # good action, gone down: full gradient back
    (-1.0, 1.5, 1.5, False),  # bad action, gone up: full gradient back
    (-1.0, 0.5, 0.8, True),  # bad action, far down: no more gain
    (1.0, 1.1, -1.1, False), (-1.0, 0.9, 0.9, False)])  # inside the clip range
def test_policy_clip_for_both_signs_of_A(A, rho, expected, flat):
    logp = torch.tensor([[math.log(rho)]], requires_grad=True)
    zero, one = torch.zeros(1, 1), torch.ones(1)
    loss, clipped = mlerl.policy_loss(logp, zero, zero, torch.tensor([[A]]), one, config())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert bool(clipped) == flat
    assert (float(torch.autograd.grad(loss.sum(), logp)[0]) == 0) == flat


def test_decoupled_loss_is_plain_ppo_for_fresh_samples():
    logp, old, A = torch.randn(3, 6, 5).mul(0.5).unbind(0)
    w = torch.rand(6)
    loss, _ = mlerl.policy_loss(logp, old, old, A, w, config())
    rho = torch.exp(logp - old)
    plain = w[:, None] * -torch.min(A * rho, A * torch.clip(rho, 0.8, 1.2))
    assert torch.allclose(loss, plain, atol=1e-6)


@pytest.mark.parametrize("stale, weight", [(math.log(1.5), 1.5), (math.log(50), 2.0), (-1.0, math.exp(-1))])
def test_stale_samples_weigh_min_C_and_clip_around_the_proximal_policy(stale, weight):
    prox, old, one = torch.full((1, 1), stale), torch.zeros(1, 1), torch.ones(1)
    A = torch.ones(1, 1)
    for rho, surrogate in ((1.0, 1.0), (1.1, 1.1), (2.0, 1.2)):  # rho = pi / pi_prox
        logp = prox + math.log(rho)
        loss, _ = mlerl.policy_loss(logp, prox, old, A, one, config())
        assert float(loss) == pytest.approx(-weight * surrogate, rel=1e-5)


def test_importance_weight_carries_no_gradient():
    logp = torch.zeros(1, 1, requires_grad=True)
    loss, _ = mlerl.policy_loss(logp, torch.zeros(1, 1), torch.full((1, 1), -0.5), torch.ones(1, 1),
                                torch.ones(1), config())
    assert float(torch.autograd.grad(loss.sum(), logp)[0]) == pytest.approx(-math.exp(0.5))


@pytest.mark.parametrize("V, expected", [
    (0.2, 0.5 * 0.8 ** 2),  # within 0.5 of V_old = 0: plain
    (0.9, 0.5 * 0.5 ** 2),  # moved 0.9 towards G = 1: counts as if at 0.5
    (-2.0, 0.5 * 3.0 ** 2),  # moved away: the larger, plain error
    (3.0, 0.5 * 2.0 ** 2)])
def test_value_clip(V, expected):
    v = torch.tensor([[V]])
    loss = mlerl.value_loss(v, torch.zeros(1, 1), torch.ones(1, 1), config())
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss_agg", ["seq", "token"])
def test_aggregation_over_sequences_or_tokens(loss_agg):
    mask, loss = ragged_mask(6, 9), torch.randn(6, 9)
    c = mlerl.token_weights(mask, loss_agg)
    rows = [loss[k][mask[k]] for k in range(6)]
    assert float((c * loss).sum()) == pytest.approx(float(slow_aggregate(rows, loss_agg)), rel=1e-5)
    assert float(c.sum()) == pytest.approx(1) and (c[~mask] == 0).all()


# --------------------------------------------------------------------------------------------------
# Log-probs, values, sampling: one tempered policy everywhere
# --------------------------------------------------------------------------------------------------
def test_padding_stands_right_of_responses_and_is_never_scored():
    attempts = random_attempts(5)
    ids, where, mask = mlerl.padded(attempts, "cpu")
    longest = max(len(a.prompt_ids + a.response_ids) for a in attempts)
    assert ids.shape == where.shape == (5, longest)
    assert mask.shape == (5, max(len(a.response_ids) for a in attempts))
    for k, a in enumerate(attempts):
        row, n = a.prompt_ids + a.response_ids, len(a.response_ids)
        assert ids[k].tolist() == row + [0] * (longest - len(row))
        assert where[k].tolist() == [len(a.prompt_ids) <= j < len(row) for j in range(longest)]
        assert mask[k].tolist() == [t < n for t in range(mask.shape[1])]


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_response_logprobs_and_entropy_equal_a_plain_forward_pass(learner, temperature):
    attempts = random_attempts(7)
    ids, where, mask = mlerl.padded(attempts, "cpu")
    logp, entropy = mlerl.response_logprobs(learner.actor, ids, where, mask,
                                            config(temperature=temperature))
    for k, a in enumerate(attempts):
        slow = slow_logprobs(learner.actor, a, temperature)
        for ours, oracle in zip((logp, entropy), slow):
            assert torch.allclose(ours[k, :len(oracle)], oracle, atol=1e-4)
            assert (ours[k, len(oracle):] == 0).all()


def test_response_values_equal_a_plain_forward_pass(learner):
    attempts = random_attempts(7)
    ids, where, mask = mlerl.padded(attempts, "cpu")
    V = mlerl.response_values(learner.critic, ids, where, mask, config())
    for k, a in enumerate(attempts):
        oracle = slow_values(learner.critic, a)
        assert torch.allclose(V[k, :len(oracle)], oracle, atol=1e-4)
        assert (V[k, len(oracle):] == 0).all()


def test_logits_in_chunks_change_nothing(learner, monkeypatch):
    ids, where, mask = mlerl.padded(random_attempts(7), "cpu")
    args = (learner.actor, ids, where, mask, config())
    whole = mlerl.response_logprobs(*args)
    gradient = grads((whole[0] + whole[1]).sum(), learner.actor)
    monkeypatch.setattr(mlerl, "LOGITS", 3 * learner.actor.config.vocab_size)
    parts = mlerl.response_logprobs(*args)
    assert torch.allclose(whole[0], parts[0], atol=1e-5)
    close(grads((parts[0] + parts[1]).sum(), learner.actor), gradient)


@pytest.mark.parametrize("micro", [1, 3, 100])
def test_score_tokens_equals_the_oracle_for_every_micro_batch(learner, micro):
    attempts, cfg = random_attempts(7), config(micro_batch=micro)
    logp, mask = mlerl.score_tokens(learner.actor, attempts, cfg)
    V, _ = mlerl.score_tokens(learner.critic, attempts, cfg)
    for k, a in enumerate(attempts):
        n = len(a.response_ids)
        assert mask[k].tolist() == [t < n for t in range(mask.shape[1])]
        assert torch.allclose(logp[k, :n], slow_logprobs(learner.actor, a, 0.7)[0], atol=1e-4)
        assert torch.allclose(V[k, :n], slow_values(learner.critic, a), atol=1e-4)


def test_micro_batches_hold_every_row_once():
    attempts, rows = random_attempts(11), [0, 2, 3, 5, 7, 8, 10]
    groups = mlerl.micro_batches(attempts, rows, 3)
    assert sorted(k for g, _ in groups for k in g) == rows and max(len(g) for g, _ in groups) == 3
    assert [counts for _, counts in groups] == [1.0] * 3 and mlerl.micro_batches(attempts, [], 3) == []


def test_a_model_without_a_critics_head_is_refused_in_a_line(policy, tmp_path):
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=300)).save_pretrained(tmp_path)
    mlerl.load_policy(policy)[1].save_pretrained(tmp_path)
    with pytest.raises(mlerl.UserError, match="critic"):
        mlerl.Learner(config(), tmp_path)


def test_critic_starts_from_the_actors_checkpoint_with_its_own_head(policy):
    learner = mlerl.Learner(config(), policy)
    actor, critic = learner.actor.model.state_dict(), learner.critic.base_model.state_dict()
    assert all(torch.equal(actor[k], critic[k]) for k in actor)
    assert critic[next(iter(critic))].data_ptr() != actor[next(iter(actor))].data_ptr()
    assert 0.01 < float(learner.critic.score.weight.detach().std()) < 0.03
    assert (learner.critic.score.bias == 0).all()
    for group in (learner.actor_opt.defaults, learner.critic_opt.defaults):
        assert group["betas"] == (0.9, 0.999) and group["weight_decay"] == 0.01
        assert group["lr"] == 1e-5
    assert not any(p.requires_grad for p in learner.ref.parameters())


def test_tokenizer_survives_saving_and_loading(policy):
    made, (lm, loaded) = small_tokenizer(), mlerl.load_policy(policy)
    assert len(made.encode(EXAMPLE)) < 10  # merges cross words
    assert loaded.encode(EXAMPLE) == made.encode(EXAMPLE)
    assert loaded.decode(loaded.encode(EXAMPLE)) == EXAMPLE
    assert loaded.eos_token_id == made.eos_token_id
    assert len(loaded) == lm.config.vocab_size  # no token that the model does not have


def sampled(learner, cfg, prompts_, version=3):
    attempts = [mlerl.Attempt(TASK, "solve", ids) for ids in prompts_]
    return list(mlerl.HFSampler(cfg, learner.tokenizer).sample(attempts, learner.actor, version))


def test_sampler_logp_equals_a_fresh_forward_pass(learner):
    cfg = config(max_response_tokens=9, batch_size=4)
    done = sampled(learner, cfg, [a.prompt_ids for a in random_attempts(10)])
    assert len(done) == 10 and {a.version for a in done} == {3}
    for a in done:
        oracle, _ = slow_logprobs(learner.actor, a, 0.7)
        assert a.logp == pytest.approx(oracle.tolist(), abs=1e-4)
        assert len(a.response_ids) <= 9


def test_sampling_after_an_update_with_gradient_checkpointing_sees_the_whole_context(policy):
    cfg = config(gradient_checkpointing=True, batch_size=8, mini_batch=8, lr=1e-4, temperature=1e-3, max_response_tokens=6)
    learner = mlerl.Learner(cfg, policy)
    mlerl.update(learner, *update_inputs(learner, cfg), cfg, 0)
    for a in sampled(learner, cfg, [[5, 9, 40, 7], [30, 31], [12] * 5]):
        for t, token in enumerate(a.response_ids):
            ids = torch.tensor([a.prompt_ids + a.response_ids[:t]])
            with torch.no_grad():
                assert int(learner.actor(ids).logits[0, -1].argmax()) == token


def test_sampler_keeps_the_end_token_and_nothing_after(learner):
    cfg, eos = config(max_response_tokens=12), learner.tokenizer.eos_token_id
    with torch.no_grad():  # the end becomes a likely token
        learner.actor.get_input_embeddings().weight[eos] *= 3
    done = sampled(learner, cfg, [[k + 5] * 3 for k in range(200)])
    ended = [a for a in done if eos in a.response_ids]
    assert 0 < len(ended)
    for a in done:
        assert a.response_ids.count(eos) <= 1
        assert (a.response_ids[-1] == eos) if a in ended else len(a.response_ids) == 12


CHECKPOINT = dict(repetition_penalty=3.0, top_k=1, top_p=0.1, temperature=0.05, min_p=0.9,
                  do_sample=False, suppress_tokens=list(range(200)), no_repeat_ngram_size=1)


@pytest.mark.parametrize("name", [None, *CHECKPOINT])
def test_sampler_draws_from_the_tempered_policy_whatever_the_checkpoint_says(learner, name):
    cfg, n = config(max_response_tokens=1, batch_size=1000), 1000
    prompt = [7, 8]
    for _ in range(12):  # greedy text repeats itself: a penalty on repetition would show
        prompt.append(int(learner.actor(input_ids=torch.tensor([prompt])).logits[0, -1].argmax()))
    if name:
        setattr(learner.actor.generation_config, name, CHECKPOINT[name])
    counts = np.zeros(learner.actor.config.vocab_size)
    for a in sampled(learner, cfg, [prompt] * n):
        counts[a.response_ids[0]] += 1
    ids = torch.tensor([prompt])
    p = torch.softmax(learner.actor(input_ids=ids).logits[0, -1] / 0.7, -1).detach().numpy()
    chance = np.abs(np.random.default_rng(0).multinomial(n, p / p.sum()) / n - p).sum() / 2
    assert p[prompt].max() > 0.05
    distance = float(np.abs(counts / n - p).sum() / 2)
    assert distance < 1.35 * chance + 0.01


def test_ignore_eos_goes_on_to_the_full_length(learner):
    learner.actor.generation_config.eos_token_id = list(range(learner.actor.config.vocab_size))
    done = sampled(learner, config(max_response_tokens=6, ignore_eos=True), [[5, 6]] * 4)
    assert [len(a.response_ids) for a in done] == [6] * 4
    for a in done:
        assert a.logp == pytest.approx(slow_logprobs(learner.actor, a, 0.7)[0].tolist(), abs=1e-4)


def test_a_tokenizer_without_a_padding_token_will_do(learner):
    learner.tokenizer.pad_token = None
    done = sampled(learner, config(max_response_tokens=5), [[5, 6, 7], [5]])
    for a in done:
        assert a.logp == pytest.approx(slow_logprobs(learner.actor, a, 0.7)[0].tolist(), abs=1e-4)


def test_attempts_are_written_in_the_order_in_which_they_were_drawn(learner):
    """By length, `--collect first` would kill the long prompts' programs before they began."""
    drawn = [[5, 6, 7] * 4, [5], [5, 6] * 3, [6], [7, 8, 9, 10]]
    done = sampled(learner, config(max_response_tokens=3, batch_size=2), drawn)
    assert [a.prompt_ids for a in done] == drawn


def samples_with_vllm(policy, found):
    """In a process of its own: largest difference of vLLM's log-probs to a forward pass, with weights
    that were not handed over, with the actor's, with the frozen LM's; and what it wrote."""
    cfg = config(sampler="vllm", max_prompt_tokens=32, max_response_tokens=24, batch_size=8, kv_cache_gb=0.2)
    sampler = mlerl.VLLMSampler(cfg, policy)
    torch.manual_seed(0)
    learner = mlerl.Learner(cfg, policy)
    with torch.no_grad():
        for p in learner.actor.parameters():
            p.add_(0.03 * torch.randn_like(p))

    def difference(lm, attempts):
        logp, mask = mlerl.score_tokens(lm, attempts, cfg)
        return float((logp[mask] - torch.tensor([p for a in attempts for p in a.logp])).abs().max())

    def ask(n=20):
        return [mlerl.Attempt(TASK, "solve", [5, 9, 11] + [20 + k] * (k % 7), id=k) for k in range(n)]

    hand_over, sampler.llm.collective_rpc = sampler.llm.collective_rpc, lambda *_, **__: None
    seen = dict(stale=difference(learner.actor, list(sampler.sample(ask(), learner.actor, 0))))
    sampler.llm.collective_rpc = hand_over
    for name in ("actor", "ref", "actor"):  # one engine, weights swapped, the same prompts
        done = [next(written := sampler.sample(ask(), getattr(learner, name), 3))]
        seen["unfinished"] = sampler.llm.llm_engine.has_unfinished_requests()
        done += written
        seen[name] = difference(getattr(learner, name), done)
    end = learner.tokenizer.eos_token_id
    seen["ids"], seen["versions"] = [a.id for a in done], [a.version for a in done]
    seen["ended"] = [a.response_ids[-1] == end or len(a.response_ids) == 24 for a in done]
    seen["inside"] = sum(end in a.response_ids[:-1] for a in done)
    long = [mlerl.Attempt(TASK, "instrument", [7] * 40_000), *ask(2)]
    seen["too_long"] = len(list(sampler.sample(long, learner.ref, -1)))
    pathlib.Path(found).write_text(json.dumps(seen))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm (a build for CPUs will do) is not installed")
def test_vllm_samples_with_the_weights_it_is_given(tmp_path):
    policy = save_qwen(tmp_path / "policy", hidden_size=64, std=0.1)  # vLLM needs heads of at least 32
    code = f"import test_mlerl; test_mlerl.samples_with_vllm({str(policy)!r}, {str(tmp_path / 'found')!r})"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)
    seen = json.loads((tmp_path / "found").read_text())
    assert seen["stale"] > 0.05
    assert seen["actor"] < 1e-5 and seen["ref"] < 1e-5
    assert seen["unfinished"] and sorted(seen["ids"]) == list(range(20))  # yielded as they end
    assert all(seen["ended"]) and not seen["inside"] and seen["versions"] == [3] * 20
    assert seen["too_long"] == 2


def test_only_the_tokenizers_end_token_ends_a_response(learner):
    learner.actor.generation_config.eos_token_id = list(range(learner.actor.config.vocab_size))
    done = sampled(learner, config(max_response_tokens=6), [[5, 6]] * 20)
    assert sum(len(a.response_ids) == 6 for a in done) > 10


# --------------------------------------------------------------------------------------------------
# Update (Alg. 1 l. 7)
# --------------------------------------------------------------------------------------------------
def update_inputs(learner, cfg, n=8):
    """A batch whose clips bind: proximal log-probs and old values are moved away."""
    attempts = random_attempts(n)
    x = mlerl.assemble(attempts, learner, cfg, 0)
    torch.manual_seed(5)
    x.logp_prox = (x.logp_prox + 0.4 * torch.randn(x.mask.shape)) * x.mask
    x.logp_old = (x.logp_prox + 0.6 * torch.randn(x.mask.shape)) * x.mask
    x.V = (x.V + torch.randn(x.mask.shape)) * x.mask
    A, G = torch.randn(2, *x.mask.shape) * x.mask
    return x, A, torch.rand(n) * 2, G


def slow_update_losses(learner, x, A, w, G, cfg):
    """Actor and critic loss of a whole batch by loops over sequences, and the means to be logged."""
    policy, value, entropies, clips, surrogate = [], [], [], [], []
    for k, a in enumerate(x.attempts):
        n = len(a.response_ids)
        logp, entropy = slow_logprobs(learner.actor, a, cfg.temperature)
        rho = torch.exp(logp - x.logp_prox[k, :n])
        stale = torch.exp(x.logp_prox[k, :n] - x.logp_old[k, :n]).clip(max=cfg.max_is_weight)
        near = rho.clip(1 - cfg.clip, 1 + cfg.clip)
        loss = -w[k] * stale * torch.min(A[k, :n] * rho, A[k, :n] * near)
        surrogate.append(loss)
        policy.append(loss - cfg.entropy_coef * entropy)
        entropies.append(entropy)
        clips.append((A[k, :n] * near < A[k, :n] * rho).float())
        V, old = slow_values(learner.critic, a), x.V[k, :n]
        moved = old + (V - old).clip(-cfg.value_clip, cfg.value_clip)
        value.append(torch.max((V - G[k, :n]) ** 2, (moved - G[k, :n]) ** 2) / 2)
    means = {key: float(slow_aggregate(parts, cfg.loss_agg).detach()) for key, parts in dict(
        policy_loss=surrogate, value_loss=value, entropy=entropies, clip_fraction=clips).items()}
    return (slow_aggregate(policy, cfg.loss_agg), slow_aggregate(value, cfg.loss_agg), means)


def weights(model):
    return {k: p.detach().clone() for k, p in model.named_parameters()}


def step(learner, x, A, w, G, cfg, i=0):
    """One update; returns statistics and by how much actor and critic moved."""
    before = weights(learner.actor), weights(learner.critic)
    lr, critic_lr = (o.param_groups[0]["lr"] for o in (learner.actor_opt, learner.critic_opt))
    stats = mlerl.update(learner, x, A, w, G, dataclasses.replace(cfg, lr=lr, critic_lr=critic_lr), i)
    moved = [{k: old[k] - new for k, new in weights(model).items()}
             for model, old in zip((learner.actor, learner.critic), before)]
    return stats, *moved


FREE = dict(actor_grad_clip=1e9, critic_grad_clip=1e9, entropy_coef=0.1)


@pytest.mark.parametrize("loss_agg", ["seq", "token"])
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_update_takes_the_gradient_of_the_loss_whatever_the_micro_batch(learner, micro, loss_agg):
    cfg = config(batch_size=8, mini_batch=8, micro_batch=micro, loss_agg=loss_agg, **FREE)
    x, A, w, G = update_inputs(learner, cfg)
    actor_loss, critic_loss, means = slow_update_losses(learner, x, A, w, G, cfg)
    oracle = grads(actor_loss, learner.actor), grads(critic_loss, learner.critic)
    stats, actor, critic = step(learner, x, A, w, G, cfg)
    close(actor, oracle[0], 1e-4)
    close(critic, oracle[1], 1e-4)
    for key, mean in means.items():  # means over the batch, not of the last micro-batch
        assert stats[key] == pytest.approx(mean, rel=1e-3, abs=1e-5), key
    assert 0 < means["clip_fraction"] < 1


@pytest.mark.parametrize("i, left", [(0, 1.0), (5, 0.6), (9, 0.28)])
def test_learning_rates_fall_linearly_to_the_share_anneal_to(learner, i, left):
    cfg = config(batch_size=8, mini_batch=8, iterations=10, anneal_to=0.2, lr=0.5, critic_lr=2.0)
    mlerl.update(learner, *update_inputs(learner, cfg), cfg, i)
    assert learner.actor_opt.param_groups[0]["lr"] == pytest.approx(0.5 * left)
    assert learner.critic_opt.param_groups[0]["lr"] == pytest.approx(2.0 * left)


def test_value_loss_is_never_weighted_by_duration(learner):
    cfg = config(batch_size=8, mini_batch=8, **FREE)
    x, A, w, G = update_inputs(learner, cfg)
    other = copy.deepcopy(learner)
    for it in (learner, other):  # a copy's optimizer must hold the copy's parameters
        it.actor_opt = torch.optim.SGD(it.actor.parameters(), lr=1.0)
        it.critic_opt = torch.optim.SGD(it.critic.parameters(), lr=1.0)
    _, actor_w, critic_w = step(learner, x, A, w, G, cfg)
    _, actor_1, critic_1 = step(other, x, A, torch.ones(8), G, cfg)
    assert all(torch.equal(critic_w[k], critic_1[k]) for k in critic_w)
    assert any(not torch.allclose(actor_w[k], actor_1[k]) for k in actor_w)


def test_gradient_norms_are_clipped(learner):
    cfg = config(batch_size=8, mini_batch=8, actor_grad_clip=0.01, critic_grad_clip=0.02)
    _, actor, critic = step(learner, *update_inputs(learner, cfg), cfg)
    norm = lambda moved: math.sqrt(sum(float((v ** 2).sum()) for v in moved.values()))
    assert norm(actor) == pytest.approx(0.01, rel=1e-3)
    assert norm(critic) == pytest.approx(0.02, rel=1e-3)


class Counting(torch.optim.SGD):
    steps = 0

    def step(self, *args, **kwargs):
        self.steps += 1
        return super().step(*args, **kwargs)


@pytest.mark.parametrize("changes, critic_steps, actor_steps", [
    (dict(ppo_epochs=1), 1, 1), (dict(ppo_epochs=3), 3, 3),
    (dict(ppo_epochs=2, mini_batch=3), 6, 6)])
def test_epochs_and_mini_batches(learner, changes, critic_steps, actor_steps):
    cfg = config(batch_size=8, **(dict(mini_batch=8) | changes))
    x, A, w, G = update_inputs(learner, cfg)
    learner.actor_opt = Counting(learner.actor.parameters(), lr=0.1)
    learner.critic_opt = Counting(learner.critic.parameters(), lr=0.1)
    mlerl.update(learner, x, A, w, G, cfg, 0)
    assert (learner.critic_opt.steps, learner.actor_opt.steps) == (critic_steps, actor_steps)


def test_actor_is_left_alone_without_an_advantage(learner):
    cfg = config(batch_size=8, mini_batch=8)
    x, A, w, G = update_inputs(learner, cfg)
    still = lambda moved: all((v == 0).all() for v in moved.values())
    assert not still(step(learner, x, A, w, G, cfg)[1])
    A = mlerl.whiten(A, x.mask, ["t"] * 8, torch.full((8,), -10.0))  # rewards that do not vary
    _, actor, critic = step(learner, x, A, w, G, cfg)
    assert still(actor) and not still(critic)


@pytest.mark.parametrize("sampler", ["hf", "vllm"])
def test_assemble_scores_with_actor_where_stale_reference_and_critic(learner, sampler):
    attempts, cfg = random_attempts(5), config(sampler=sampler)
    with torch.no_grad():
        learner.actor.model.norm.weight *= 1.5  # actor and reference differ
    for k, a in enumerate(attempts):
        a.version = k
    x = mlerl.assemble(attempts, learner, cfg, 3)
    for k, a in enumerate(attempts):
        n = len(a.response_ids)
        assert x.logp_old[k, :n].tolist() == pytest.approx(a.logp)
        stale = k < 3 or sampler == "vllm"  # what update 3's own policy sampled here, it need not score again
        current = slow_logprobs(learner.actor, a, 0.7)[0] if stale else torch.tensor(a.logp)
        assert torch.allclose(x.logp_prox[k, :n], current, atol=1e-4)
        assert not x.logp_prox[k, n:].any()
        assert torch.allclose(x.logp_ref[k, :n], slow_logprobs(learner.ref, a, 0.7)[0], atol=1e-4)
        assert torch.allclose(x.V[k, :n], slow_values(learner.critic, a), atol=1e-4)
    assert x.R.tolist() == pytest.approx([a.R for a in attempts])


def test_crowding_costs_a_valid_program_the_share_of_the_batch_that_scores_as_it_does(learner):
    attempts, codes = random_attempts(10), "aaabbcaaad"
    for k, (a, code) in enumerate(zip(attempts, codes)):
        a.code, a.outcome = f"x = {k}\n", "crash" if k in (2, 9) else "ok"  # one score, whatever the words
        a.score = None if k in (2, 9) else ord(code) / 128
    shares = [0.5, 0.5, 0, 0.2, 0.2, 0.1, 0.5, 0.5, 0.5, 0]  # by hand
    x = mlerl.assemble(attempts, learner, config(crowding=0.3), 0)
    assert x.R.tolist() == pytest.approx([a.R - 0.3 * share for a, share in zip(attempts, shares)])
    assert mlerl.Config().crowding == 0  # the paper has none


# --------------------------------------------------------------------------------------------------
# Several processes (torchrun)
# --------------------------------------------------------------------------------------------------
def replay(policy, found, changes):
    """Two full updates on recorded attempts, each process with its own share of them until it gathers
    those of all, as `collect` does. Rank 0 saves the models, what was logged, and the seeds' draws."""
    cfg = config(lr=1e-3, critic_lr=1e-3, micro_batch=2, critic_init_std=0.5, kl_coef=0.05, **changes)
    if mlerl.RANK == 0:  # the tiny policy is trained by one process, which the others do not hear of
        mlerl.supervised(*mlerl.load_policy(policy), [([{"role": "user", "content": "Task"}], EXAMPLE)] * 5,
                         dataclasses.replace(cfg, sft_steps=2))
    learner, stats = mlerl.Learner(cfg, policy), []
    for i in range(2):
        mine = random_attempts(11, seed=i)[mlerl.RANK::mlerl.WORLD]
        attempts = sorted(mlerl.gather(mine), key=lambda a: a.dt)  # one order, whoever had them
        for k, a in enumerate(attempts):
            a.version = -(k % 3)  # some are stale, some of them in each share
        x = mlerl.assemble(attempts, learner, cfg, i)
        A, G = mlerl.gae(mlerl.shape_rewards(x.R, x.logp_old, x.logp_ref, x.mask, cfg.kl_coef), x.V, x.mask, 1.0, 1.0)
        A = mlerl.whiten(A, x.mask, [a.task for a in attempts], x.R)
        w = mlerl.duration_weights([a.dt for a in attempts], cfg)
        stats.append(mlerl.update(learner, x, A, w, G, cfg, i))
    models = {name: {k: mlerl.whole(p).detach().clone() for k, p in getattr(learner, name).named_parameters()}
              for name in ("actor", "critic")}
    shares = {p.numel() for p in map(lambda p: p.to_local() if mlerl.WORLD > 1 else p, learner.actor.parameters())}
    if mlerl.RANK == 0:
        torch.save(dict(models=models, stats=stats, held=sum(shares)), found)
    if mlerl.WORLD > 1:  # as `main` does
        torch.distributed.destroy_process_group()
        time.sleep(1)


def torchrun(n, *argv, **environment):
    """argv by n processes of torchrun on this machine."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "--"]  # its parser would stumble over --run
    return subprocess.run([*launch, *map(str, argv)], cwd=HERE, capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS="1") | environment)


@pytest.mark.parametrize("changes", [
    dict(loss_agg="seq", mini_batch=11), dict(loss_agg="token", mini_batch=4, ppo_epochs=2, gradient_checkpointing=True)])
def test_two_processes_update_as_one(policy, tmp_path, changes):
    """The same recorded attempts, two updates: each model's difference is below 1e-3 of its way."""
    replay(policy, tmp_path / "1", changes)
    done = torchrun(2, "test_mlerl.py", "replay", policy, tmp_path / "2", json.dumps(changes))
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / n, weights_only=False) for n in "12")
    torch.manual_seed(0)
    before = mlerl.Learner(config(critic_init_std=0.5), policy)
    for name in ("actor", "critic"):
        flat = [torch.cat([models[name][k].flatten() for k, _ in getattr(before, name).named_parameters()])
                for models in (one["models"], two["models"])]
        start = torch.cat([p.detach().flatten() for p in getattr(before, name).parameters()])
        way = (flat[0] - start).norm()
        assert way > 0.01 and (flat[0] - flat[1]).norm() < 1e-3 * way, name
    for a, b in zip(one["stats"], two["stats"]):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-6)
    assert two["held"] < one["held"]  # a process holds only its part of the weights


class Translated(mlerl.HFSampler):
    """Tokens of the real policy, each answer replaced by a program of the list. With DIES set, the
    last process ends in that iteration."""

    def sample(self, attempts, lm, version):
        if os.environ.get("DIES") == str(version) and mlerl.RANK == mlerl.WORLD - 1:
            raise mlerl.UserError("this process is to end")
        programs = ScriptedSampler(self.cfg).programs
        for a in super().sample(attempts, lm, version):
            a.plan, a.code = "Plan.", programs[sum(a.response_ids) % len(programs)]
            yield a


def short_wording(wording, *parts, short=True):
    return wording(*parts, short=True)


def whole_command(argv):
    """main() in a process of torchrun, with FakePool; fails if it ends well and still in a group."""
    mlerl.Pool, mlerl.HFSampler = FakePool, Translated
    prompts.importable, prompts.snippet = lambda *a, **k: ["pandas"], lambda task, width: "row"
    for name in ("solve", "improve"):
        setattr(prompts, name, functools.partial(short_wording, getattr(prompts, name)))
    grade.ensure_data = lambda *a, **k: True
    sys.exit(mlerl.main(argv) or torch.distributed.is_initialized())


def test_two_processes_leave_their_group_before_they_end(data, tmp_path):
    """Else threads of the group abort a process now and then at its exit, and torchrun then the others."""
    (tmp_path / "program.py").write_text("print(1)")
    done = torchrun(2, "test_mlerl.py", "whole_command", "--preset", "tiny", "--data-dir", data, "--mode", "run",
                    "--program", tmp_path / "program.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["reward"] is not None


def test_a_run_on_two_processes_of_which_one_dies_goes_on_alone(data, policy, tmp_path):
    """Two ranks sample, gather, update and save; then one process takes everything over and goes on."""
    run = tmp_path / "r"
    flags = dict(preset="tiny", model=policy, data_dir=data, run=run, batch_size=4, mini_batch=4, eval_samples=6,
                 max_prompt_tokens=4000, max_response_tokens=9, oversample=2, lr=1e-3, iterations=3)
    argv = ["whole_command", *(word for k, v in flags.items() for word in ("--" + k.replace("_", "-"), str(v)))]
    died = torchrun(2, "test_mlerl.py", *argv, DIES="1")
    assert died.returncode != 0 and "mlerl: this process is to end" in died.stderr
    assert "Traceback" not in died.stderr.split("mlerl: this")[0]
    assert len(lines(run, "metrics.jsonl")) == 1
    saved = torch.load(run / "checkpoint.pt", weights_only=False)
    assert len(saved["state"]["in_flight"]) == 4 and saved["state"]["iteration"] == 1
    start = transformers.AutoModelForCausalLM.from_pretrained(policy).state_dict()
    kept = transformers.AutoModelForCausalLM.from_pretrained(run / "policy").state_dict()
    assert kept.keys() == start.keys() and any((kept[k] != start[k]).any() for k in kept)  # it did learn
    assert all(torch.equal(kept[k], saved["actor"][0][k]) for k in kept)
    assert "FSDP" not in (run / "policy" / "config.json").read_text()
    alone = subprocess.run([sys.executable, "test_mlerl.py", *argv], cwd=HERE, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr[-2000:]
    rows, attempts = lines(run, "metrics.jsonl"), lines(run, "attempts.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1, 2] and [row["in_flight"] for row in rows] == [4] * 3
    assert all(sum(row["outcomes"].values()) == 4 for row in rows)
    assert len({a["id"] for a in attempts}) == len(attempts) == 3 * 4 + 3 * 6
    assert {a.id for a in saved["state"]["in_flight"]} <= {a["id"] for a in attempts}  # none was lost
    steps = torch.load(run / "checkpoint.pt", weights_only=False)["actor"][1]["state"].values()
    assert {int(state["step"]) for state in steps} == {2 * 3}  # epochs times iterations: Adam's state went along


# --------------------------------------------------------------------------------------------------
# Reward (Sec. 3.2)
# --------------------------------------------------------------------------------------------------
def test_milestones_are_the_papers_seven_in_order():
    assert [marker for marker, _ in prompts.MILESTONES] == MARKERS
    for marker, pattern in prompts.MILESTONES:
        matched = [m for m in MARKERS if re.search(pattern, m + " 0.5")]
        assert matched == [marker]


def with_marks(n, outcome="crash", **fields):
    """An attempt that reached n milestones."""
    marks = [m + " 0.61" if m.endswith(":") else m for m in MARKERS[:n]]
    return attempt("x", marks=marks, **fields, outcome=outcome)


@pytest.mark.parametrize("n", range(8))
def test_failure_earns_minus_10_and_a_tenth_a_milestone(D, n):
    assert mlerl.reward(D[TASK], with_marks(n), config()) == pytest.approx(-10 + 0.1 * n)


@pytest.mark.parametrize("kind", ["paper", "bounded"])
def test_every_milestone_earns_more(D, kind):
    earned = [mlerl.reward(D[TASK], with_marks(n), config(reward=kind)) for n in range(8)]
    assert all(b > a for a, b in zip(earned, earned[1:]))


FAILURES = ["no_code", "syntax", "import", "crash", "timeout", "memory", "no_submission",
            "invalid_submission"]


@pytest.mark.parametrize("kind", ["paper", "bounded"])
@pytest.mark.parametrize("outcome", FAILURES)
def test_every_failure_is_rewarded_as_one(D, outcome, kind):
    a, cfg = with_marks(2, outcome=outcome, score=0.9), config(reward=kind)
    assert not a.valid
    assert mlerl.reward(D[TASK], a, cfg) == mlerl.reward(D[TASK], with_marks(2), cfg)


def test_a_marker_printed_twice_counts_once_and_a_loss_needs_its_value(D):
    a = attempt("x", outcome="crash", marks=["loaded data"] * 5 + ["training loss:", "testing loss: "])
    assert mlerl.reward(D[TASK], a, config()) == pytest.approx(-9.9)
    a.marks.append("training loss: 0.3")
    assert mlerl.reward(D[TASK], a, config()) == pytest.approx(-9.8)


@pytest.mark.parametrize("higher, score, expected", [(True, 0.71, 0.71), (False, 0.71, -0.71),
                                                     (False, 11.48, -11.48)])
def test_valid_program_earns_the_score_signed_where_lower_is_better(D, higher, score, expected):
    task = dict(D[TASK], sign=1 if higher else -1)
    a = with_marks(7, outcome="ok", score=score)
    assert mlerl.reward(task, a, config()) == pytest.approx(expected)  # no markers on top


@pytest.mark.parametrize("name", sorted(grade.load_tasks()))
def test_bounded_reward_is_monotone_and_any_valid_beats_any_failure(name):
    task = grade.load_tasks()[name]
    higher, gold, sample = task["higher_is_better"], task["gold"], task.get("sample_score")
    earn = lambda n, **how: mlerl.reward(task, with_marks(n, **how), config(reward="bounded"))
    start = sample or 0.0
    scores = np.linspace(2 * start - gold, 2 * gold - start, 31)  # from worse to better than both
    R = [earn(7, outcome="ok", score=s) for s in scores]
    assert all(b > a for a, b in zip(R, R[1:]))
    extreme = [earn(0, outcome="ok", score=s * (1 if higher else -1)) for s in (-1e9, -1, 0, 1, 1e9)]
    assert min(extreme) > earn(7) > earn(0) and max(extreme) < 10  # bounded, above any failure
    way = earn(7, outcome="ok", score=gold) - earn(7, outcome="ok", score=start)
    assert way > 0.2 * (earn(7, outcome="ok", score=start) - earn(0))  # scores are not drowned


@pytest.mark.parametrize("code, plan", [("", "Plan."), (" \n", "Plan."), (script(), "")])
def test_no_plan_or_no_code_fails_completely_without_execution(D, fakes, code, plan):
    a = through(environment(D), attempt(code, plan=plan))
    assert (a.outcome, a.R, a.dt) == ("no_code", -10, None)
    assert FakePool.last.submitted == []


def test_forged_prints_without_the_secret_earn_nothing(D, fakes):
    output = "\n".join(MARKERS) + "\ntraining loss: 0.1\n"
    a = executed(D, script(outcome="crash", output=output))
    assert a.R == -10 and a.output == output


def test_valid_needs_a_clean_end_and_an_accepted_submission(D, fakes):
    good = executed(D, script(noise=0.2))
    truth = answers().requester_received_pizza
    p = pd.read_csv(io.BytesIO(submission(0.2))).requester_received_pizza
    pairs = [(b > a) + (b == a) / 2 for a in p[~truth] for b in p[truth]]
    assert (good.outcome, good.valid) == ("ok", True)
    assert good.score == pytest.approx(sum(pairs) / len(pairs)) and good.R == good.score
    for code, outcome in ((script(file="nonsense"), "invalid_submission"),
                          (script(file="request_id,requester_received_pizza\nt3_0000,0.5\n"),
                           "invalid_submission"),
                          (script(outcome="no_submission"), "no_submission"),
                          (script(outcome="timeout"), "timeout"), (script(outcome="crash"), "crash")):
        a = executed(D, code)
        assert (a.outcome, a.valid, a.R, a.score) == (outcome, False, -10, None)
        assert bool(a.reason) == (outcome == "invalid_submission")


def test_reward_uses_the_rewarded_rows_and_report_the_reported_ones(D, fakes):
    task = D[TASK]
    task["rows"] = np.arange(40) < 25
    task["report_rows"] = ~task["rows"]
    a = executed(D, script(noise=0.8))
    p = pd.read_csv(io.BytesIO(submission(0.8))).requester_received_pizza
    for rows, score in ((task["rows"], a.score), (task["report_rows"], a.report)):
        truth = answers().requester_received_pizza[rows]
        pairs = [(b > c) + (b == c) / 2 for c in p[rows][~truth] for b in p[rows][truth]]
        assert score == pytest.approx(sum(pairs) / len(pairs))
    assert a.R == a.score != a.report


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_report_fold_splits_the_private_rows(tmp_path, monkeypatch, share):
    monkeypatch.setattr(grade, "ensure_data", lambda *a, **k: True)
    (tmp_path / TASK / "prepared" / "private").mkdir(parents=True)
    answers(400).to_csv(tmp_path / TASK / "prepared" / "private" / "test.csv", index=False)
    task = grade.open_task(TASK, str(tmp_path), fold=share)
    rows, report = np.asarray(task["rows"]), np.asarray(task["report_rows"])
    if share:
        assert (rows ^ report).all() and 80 < report.sum() < 160
    else:  # the paper's protocol reports the rows that it rewards
        assert rows.all() and report.all()


# --------------------------------------------------------------------------------------------------
# Environment instrumentation (Sec. 3.2, App. C.3)
# --------------------------------------------------------------------------------------------------
LEARN = '''
class RandomForestClassifier:
    def __init__(self, **k): pass
    def fit(self, X, y): return self
    def predict(self, X): return [0 for _ in X]
    predict_proba = predict
def roc_auc_score(y, p): return 0.5
def read_csv(path): return [1, 2, 3]
'''  # a library that programs of these tests import: what it is called is what matters

ORDINARY = '''import os
from learn import RandomForestClassifier, read_csv, roc_auc_score

train = read_csv("train.csv")
test = read_csv("test.csv")
model = RandomForestClassifier(n_estimators=10)
model.fit(train, train)
train_auc = roc_auc_score(train, model.predict(train))
valid_auc = roc_auc_score(train, model.predict_proba(train))
print("scores", train_auc, valid_auc)
p = model.predict_proba(test)
print("done", len(p))
'''

PROGRAMS = {
    "ordinary": ORDINARY,
    "functions": '''from learn import *
def load(path):
    """Reads."""
    data = read_csv(path)
    return data
def main():
    train = load("a")
    model = RandomForestClassifier()
    for depth in (1, 2):
        model = RandomForestClassifier(
            max_depth=depth,
        )
        model.fit(train,
                  train)
    p = model.predict(train)
    return p
print(main())
''',
    "with": '''import json, io
from learn import *
with io.StringIO("[1, 2]") as f:
    train = json.load(f)
with io.StringIO() as g: model = RandomForestClassifier()
model.fit(train, train)
print(model.predict(train))
''',
    "one-line suites": '''from learn import *
if True: train = read_csv("a")
for k in (1, 2): model = RandomForestClassifier()
if train: model.fit(train, train)
else: pass
while True: p = model.predict(train); break
print(p)
''',
    "one-line suite over lines": '''from learn import *
train = read_csv("a")
if train: model = RandomForestClassifier(
    depth=1)
else: model = None
model.fit(train, train)
print(model.predict(train))
''',
    "semicolons": '''import os; from learn import *
train = read_csv("a"); test = read_csv("b")
model = RandomForestClassifier(); model.fit(train, train)
p = model.predict(test); print(p);
''',
    "semicolon then several lines": '''from learn import *
train = read_csv("a"); total = (1 +
    2)
model = RandomForestClassifier(); text = """
two"""
model.fit(train, train)
print(model.predict(train), total, text)
''',
    "unicode before a semicolon": '''from learn import *
train = read_csv("ééééééééééééééééééééééé"); total = (1 +
    2)
model = RandomForestClassifier(name="日本語日本語日本語日本語"); model.fit(train,
    train)
print(model.predict(train), total)
''',
    "backslashes": '''from learn import \\
    RandomForestClassifier, read_csv
train = \\
    read_csv("a")
model = RandomForestClassifier() \\
    .fit(train, train)
p = model \\
  .predict(train)
print(p)
''',
    "backslash before a blank line": '''from learn import *
train = read_csv("a") \\

model = RandomForestClassifier() \\

model.fit(train, train)
print(model.predict(train))
''',
    "multi-line strings": '''from learn import *
note = """
import this
model = RandomForestClassifier()
"""; train = read_csv("""a
b""")
model = RandomForestClassifier(name=\'\'\'x
    y\'\'\')
model.fit(train, train)
print(note, model.predict(train))
''',
    "try": '''try:
    from learn import *
except ImportError:
    raise
try:
    train = read_csv("a")
    model = RandomForestClassifier()
except Exception as e:
    print(e)
else:
    model.fit(train, train)
finally:
    print("finally")
p = model.predict(train)
print(p)
''',
    "future": '''#!/usr/bin/env python
# -*- coding: utf-8 -*-
"""Docstring."""
from __future__ import annotations
from learn import *
train: list = read_csv("a")
model = RandomForestClassifier()
model.fit(train, train)
print(__doc__, model.predict(train))
''',
    "future last": '''"""Docstring."""
from __future__ import annotations
train = [1]
print(__doc__, train)
''',
    "decorators": '''from learn import *
import functools
@functools.lru_cache(maxsize=None)
def load():
    return read_csv("a")
class Model:
    model = RandomForestClassifier()
    @property
    def p(self):
        p = self.model.predict(load())
        return p
m = Model()
m.model.fit(load(), 1)
print(m.p)
''',
    "main guard": '''from learn import *
def main():
    train = read_csv("a")
    model = RandomForestClassifier()
    model.fit(train, train)
    p = model.predict(train)
    print(p)

if __name__ == "__main__":
    main()''',
    "tabs": '''from learn import *
if True:
\ttrain = read_csv("a")
\tfor k in range(2):
\t\tmodel = RandomForestClassifier()
\t\tmodel.fit(train, train)
\tp = model.predict(train)
\tprint(p)
''',
    "unicode": '''from learn import *
größe = read_csv("données_日本.csv")  # ünï
model = RandomForestClassifier(名前="é"); print("é")
modèle = RandomForestClassifier()
modèle.fit(größe, größe)
train_score = "ß"
print("→", modèle.predict(größe))
''',
    "crlf": ORDINARY.replace("\n", "\r\n"),
    "crlf block": 'from learn import *\r\nif True:\r\n    train = read_csv("a")\r\n    print(train)\r\n',
    "lone carriage returns": ORDINARY.replace("\n", "\r"),
    "mixed line ends": 'from learn import *\rx = 1\ntrain = read_csv("a")\rmodel = (\n1)\nprint(1)',
    "form feed": 'from learn import *\n\x0ctrain = read_csv("a")\n\x0c\nprint(train)\n',
    "comment behind": '''from learn import *  # one; two
train = read_csv("a")  # three; four
model = RandomForestClassifier()  # a "quote
model.fit(train, train)
print(model.predict(train))
''',
    "no newline at the end": "from learn import *\ntrain = read_csv('a')",
    "one chain": '''from learn import *
print(RandomForestClassifier().fit([1], [1]).predict(read_csv("a")))
''',
    "losses": '''import sys
train_loss = 0.5
class Odd:
    def __str__(self): raise RuntimeError("no text")
    __repr__ = __str__
val_loss = Odd()
test_acc = 1 / 3
del train_loss
print("end")
''',
    "names taken": '''from learn import *
import builtins
out, print = print, 5
train = read_csv("a")
print = out
Exception = None
train_loss = 0.25
print(train)
''',
    "empty": "",
    "only a comment": "# nothing\n",
}


def run_python(code, folder):
    """Really execute a program: (exit code, lines of output)."""
    (folder / "learn.py").write_text(LEARN)
    (folder / "program.py").write_bytes(code.encode())
    done = subprocess.run([sys.executable, "-S", "-X", "utf8", "program.py"], cwd=folder,
                          capture_output=True, text=True, timeout=20)
    return done.returncode, done.stdout.splitlines(), done.stderr


def marks_of(lines):
    """What followed the secret, as the executor reports it."""
    return [line[len(SECRET) + 1:].strip() for line in lines if line.startswith(SECRET + " ")]


class Uninstrument(ast.NodeTransformer):
    """Removes try statements whose body is one print of the secret."""

    def visit_Try(self, node):
        self.generic_visit(node)
        call = getattr(node.body[0], "value", None)
        ours = (isinstance(call, ast.Call) and getattr(call.func, "id", "") == "print" and call.args
                and str(getattr(call.args[0], "value", "")).startswith(SECRET))
        return None if ours and len(node.body) == 1 else node


def plain_tree(code):
    return ast.dump(Uninstrument().visit(ast.parse(code)))


@pytest.mark.parametrize("name", PROGRAMS)
def test_instrumented_program_differs_only_by_its_prints(name, tmp_path):
    code = PROGRAMS[name]
    inserted = mlerl.instrument(code, SECRET)[0]
    assert plain_tree(inserted) == plain_tree(code)
    before, after = run_python(code, tmp_path), run_python(inserted, tmp_path)
    assert before[0] == after[0] == 0, after[2]
    if name != "losses":  # there a value that cannot be printed leaves half a line
        assert [line for line in after[1] if not line.startswith(SECRET)] == before[1]
    assert after[2] == before[2]


@pytest.mark.parametrize("name, expected", {
    "ordinary": [0, 1, 2, 4, 3, 5, 6], "functions": [0, 1, 2, 4, 6], "main guard": [0, 1, 2, 4, 6],
    "tabs": [0, 1, 2, 4, 6], "crlf": [0, 1, 2, 4, 3, 5, 6], "backslashes": [0, 1, 2, 4, 6],
    "multi-line strings": [0, 2, 4], "unicode": [0, 1, 4, 3],
    "comment behind": [0, 1, 2, 4], "future": [0, 1, 2, 4], "future last": [0], "empty": []}.items())
def test_markers_appear_in_order_after_their_operation(name, expected, tmp_path):
    inserted = mlerl.instrument(PROGRAMS[name], SECRET)[0]
    said = marks_of(run_python(inserted, tmp_path)[1])
    seen = list(dict.fromkeys(next(m for m in MARKERS if s.startswith(m)) for s in said))
    missing = [MARKERS[k] for k in expected if MARKERS[k] not in seen]
    assert not missing
    if name not in ("functions", "tabs"):  # their loops pass milestones more than once
        # A program measures its training loss after it trained: those two may stand either way.
        rank = {m: k for k, m in enumerate(MARKERS)} | {"training loss:": 4.5}
        assert seen == sorted(seen, key=rank.get)


def test_losses_are_printed_with_their_value_and_only_if_computed(tmp_path):
    said = marks_of(run_python(mlerl.instrument(ORDINARY, SECRET)[0], tmp_path)[1])
    assert "training loss: 0.5" in said and "testing loss: 0.5" in said
    without = "\n".join(line for line in ORDINARY.split("\n") if "_auc" not in line)
    said = marks_of(run_python(mlerl.instrument(without, SECRET)[0], tmp_path)[1])
    assert said and not any("loss" in s for s in said)


@pytest.mark.parametrize("code", ["def f(:\n  pass", "x = 'open", "print(1", "  x = 1", "\x00", "é = = 1",
                                  "(" * 300, "x = " + "-" * 5000 + "1"])
def test_unparsable_text_is_returned_unchanged(code):
    with pytest.raises((SyntaxError, ValueError, RecursionError, MemoryError)):
        ast.parse(code)
    assert mlerl.instrument(code, SECRET)[0] == code


def test_instrument_none_changes_nothing(D, fakes):
    environment(D, instrument="none").submit([attempt(ORDINARY)])
    assert FakePool.last.submitted[0] == ORDINARY


COPY = """import math as np
print("imported packages")
x = np.floor(3)
print("loaded data")
for k in range(2):
    loss = {"train": k + 0.5}
    print("training loss:", loss["train"])
print("trained model")
"""
SHOWN = "".join(line + "\n" for line in COPY.splitlines() if "print(" not in line)


def test_the_lms_copy_decides_places_and_our_own_lines_are_inserted(tmp_path):
    program, placed = mlerl.instrument(SHOWN, SECRET, COPY)
    assert placed == "lm" and plain_tree(program) == plain_tree(SHOWN)
    assert marks_of(run_python(program, tmp_path)[1]) == [
        "imported packages", "loaded data", "training loss: 0.5", "training loss: 1.5", "trained model"]


@pytest.mark.parametrize("change", [
    ("floor(3)", "floor(4)"), ("x = np.floor(3)\n", ""), ("import math as np\n", "import math\n"),
    ('print("loaded data")', 'print("loaded the data")'), ('print("loaded data")', 'print("loaded data", x)'),
    ('loss["train"])', 'loss.pop("train"))'), ('loss["train"])', "max(loss))"), ("range(2)", "range(2, 3)"),
    ('print("loaded data")', 'print("loaded data", file=f)'), ("x = ", "y = "), ("for k", "for  x in []: pass\nfor k"),
    ("import math as np", "this is no Python"), (COPY, ""), ("k + 0.5", "k + 1/2"), ("import", "\x00import")])
def test_a_copy_that_changes_anything_but_milestone_prints_is_rejected(change):
    program, placed = mlerl.instrument(SHOWN, SECRET, COPY.replace(*change))
    assert placed == "ast" and plain_tree(program) == plain_tree(SHOWN)
    assert program == mlerl.instrument(SHOWN, SECRET)[0]


def test_a_comment_behind_a_print_of_the_copy_is_no_change(tmp_path):
    copied = COPY.replace('loss["train"])', 'loss["train"])  # only if the program computes this loss')
    assert mlerl.instrument(SHOWN, SECRET, copied) == mlerl.instrument(SHOWN, SECRET, COPY)


def test_prints_within_a_text_are_never_replaced(tmp_path):
    text = 'x = """\nprint("loaded data")\n"""\nprint(x)\n'
    for copied in ("", text, text + 'print("trained model")\n'):
        program, placed = mlerl.instrument(text, SECRET, copied)
        assert placed == "ast" and program == text


def test_what_cpython_fails_to_parse_in_threads_at_once_stops_no_run(monkeypatch):
    def parse(*_):
        raise SystemError("AST constructor recursion depth mismatch (before=27, after=22)")

    monkeypatch.setattr(ast, "parse", parse)
    assert mlerl.instrument("x = 1\n", SECRET, "x = 1\n") == ("x = 1\n", "")


def test_a_network_is_a_model(tmp_path):
    program, _ = mlerl.instrument("net = nn.Sequential(nn.Linear(2, 1))\n", SECRET)
    assert f"{SECRET} defined model" in program


def test_the_policys_own_marker_prints_are_hidden_from_the_lm_and_earn_nothing(tmp_path):
    own = SHOWN + "print('predicted test labels')\n"
    asked = []

    class Sampler:
        tokenizer = small_tokenizer()

        def sample(self, attempts, lm, version):
            for a in attempts:
                asked.append(self.tokenizer.decode(a.prompt_ids))
                a.code = COPY + "pass\n"  # what stands where the print stood
                yield a

    attempts = [attempt(own, id=7), attempt("", id=8), attempt("this does not parse", id=9)]
    pairs = mlerl.lm_copies(iter([*attempts, *(attempt(own, id=k) for k in range(4))]), Sampler(), None)
    a, copied = next(pairs)
    assert a.id == 7 and len(asked) == 1  # the first runs while the others are copied
    rest = {a.id: copied for a, copied in pairs}
    assert rest == {k: COPY + "pass\n" for k in range(4)} | {8: "", 9: ""} and len(asked) == 5
    assert "print('predicted test labels')" not in asked[0] and "floor" in asked[0]
    program, placed = mlerl.instrument(own, SECRET, copied)
    assert placed == "lm"
    assert "predicted test labels" not in " ".join(marks_of(run_python(program, tmp_path)[1]))


def test_attempts_are_instrumented_by_the_lm_or_by_rule_and_counted(D, fakes):
    env = environment(D, instrument="lm")
    copies = {0: script(dt=1.0) + 'print("loaded data")\n', 1: "x = 2"}
    env.copies = lambda attempts: ((a, copies.get(a.id, "")) for a in attempts)
    env.submit([attempt(script(dt=k + 1.0), id=k) for k in range(3)] + [attempt("", id=3)])
    batch, _ = env.collect(4, 0, keep=True)
    assert {a.id: a.placed for a in batch} == {0: "lm", 1: "ast", 2: "ast", 3: ""}
    assert "loaded data" in FakePool.last.submitted[0] and all(SECRET not in a.code for a in batch)



def test_prints_come_up_to_where_a_program_raises_and_the_ladder_is_strict(D, tmp_path):
    lines, earned = ORDINARY.strip().split("\n"), []
    stages = [next(k for k, line in enumerate(lines) if part in line) for part in (
        "import os", "train = read", "model = ", "model.fit", "train_auc", "valid_auc", "p = ")]
    for k in [*stages, len(lines)]:  # fail before each stage in turn
        code = "\n".join([*lines[:k], "raise RuntimeError", *lines[k:]])
        status, output, _ = run_python(mlerl.instrument(code, SECRET)[0], tmp_path)
        assert status == 1
        a = attempt(code, outcome="crash", marks=marks_of(output))
        earned.append([mlerl.reward(D[TASK], a, config(reward=r)) for r in ("paper", "bounded")])
    for earlier, later in zip(earned, earned[1:]):
        assert earlier[0] < later[0] and earlier[1] < later[1]
    assert (earned[0][0], earned[-1][0]) == (-10, pytest.approx(-9.3))


def test_pool_runs_the_instrumented_program_and_the_attempt_keeps_the_original(D, fakes):
    code = ORDINARY
    a = through(environment(D), attempt(code))
    submitted = FakePool.last.submitted[0]
    assert SECRET in submitted and plain_tree(submitted) == plain_tree(code)
    assert a.code == code and SECRET not in a.output


def test_each_run_has_its_own_secret(D, fakes):
    found = {mlerl.Environment(config(), D).secret for _ in range(5)}
    assert len(found) == 5 and min(map(len, found)) >= 16


# --------------------------------------------------------------------------------------------------
# Responses and prompts (App. C, Sec. 3.3)
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, plan, code", [
    ("Plan A.\n```python\nx = 1\n```", "Plan A.", "x = 1\n"),
    ("Plan A.\n```\nx = 1\n```\n", "Plan A.", "x = 1\n"),
    ("Plan A.\n\n```py\nx = 1\ny = 2\n```\nDone.", "Plan A.", "x = 1\ny = 2\n"),
    ("Plan.\n```python  \nx\n```", "Plan.", "x\n"),
    ("Plan.\n```Python\nx\n```", "Plan.", "x\n"),
    ("```python\nx\n```", "", "x\n"),
    ("Plan.\n```python\nx\n```\nor\n```python\ny\n```", "Plan.", "x\n"),  # the first counts
    ("Plan.\n```python\nx = '```'\ny\n```", "Plan.", "x = '```'\ny\n"),
    ("Plan without a program.", "Plan without a program.", ""),
    ("Cut.\n```python\nx = 1\n", "Cut.\n```python\nx = 1", ""),  # ran out of tokens: no program
    ("Use `x`.\n```python\n\n```", "Use `x`.", "\n"), ("", "", "")])
def test_parse_response(text, plan, code):
    assert mlerl.parse_response(text) == (plan, code)


def maker(D, policy, **changes):
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(policy)
    return mlerl.PromptMaker(config(**changes), D, tokenizer)


def parts_of(text, a):
    """Which parts an improvement prompt has kept."""
    return dict(code=a.code in text, output="LAST LINE" in text, goal="GOAL WORDS" in text,
                snippet="row xxx" in text)


def test_improvement_prompts_drop_snippet_then_goal_then_output_but_never_code(D, fakes, policy):
    D[TASK]["goal"] = "GOAL WORDS " + "and so on " * 20
    noise = "".join(f"epoch {k}\n" for k in range(300))
    a = attempt("".join(f"value_{k} = {k}\n" for k in range(150)), output=noise + "LAST LINE\n")
    seen, widest = [], None
    for budget in range(8000, 1500, -100):
        it = maker(D, policy, max_prompt_tokens=budget)
        run = types.SimpleNamespace(drawn=0, skipped=0, rng=random.Random(0))
        s, = mlerl.draw_prompts(D, [a], 1, it, run, 1.0)
        assert len(s.prompt_ids) <= budget
        if s.kind == "solve":  # the code alone does not fit: skipped and counted
            assert run.skipped == 1 and s.prompt_ids == it.solve_ids[TASK]
            seen.append("solve")
            continue
        assert run.skipped == 0 and s.parent == a.id
        kept = parts_of(it.tokenizer.decode(s.prompt_ids), a)
        assert kept.pop("code")
        widest = widest or kept
        assert kept["output"] or not kept["goal"]  # the tail of the output outlives the goal
        assert kept["goal"] or not kept["snippet"]  # the goal outlives the snippet
        seen.append("".join(k[0] for k, v in kept.items() if v))
    assert widest == dict(output=True, goal=True, snippet=True)
    assert {"ogs", "og", "o", "", "solve"} >= set(seen) >= {"ogs", "og", "o", "solve"}
    assert seen == sorted(seen, key=["ogs", "og", "o", "", "solve"].index)


@pytest.mark.parametrize("size", [0, 10, 700, 900, 1200, 1499])
def test_an_output_within_its_budget_is_shown_whole(D, fakes, policy, size):
    output = ("FIRST " + "x" * 1500)[:size]
    ids = maker(D, policy, max_prompt_tokens=9000).improve(D[TASK], attempt("x = 1\n", output=output))
    assert output in maker(D, policy).tokenizer.decode(ids)


def test_solve_prompts_fit_with_as_much_snippet_as_possible(D, fakes, policy):
    sizes, widths = set(), []
    whole = len(maker(D, policy, max_prompt_tokens=9000).solve_ids[TASK])
    for budget in (whole, whole - 1, whole - 121, whole - 171):
        it = maker(D, policy, max_prompt_tokens=budget)
        ids = it.solve_ids[TASK]
        assert len(ids) <= budget and D[TASK]["goal"] in it.tokenizer.decode(ids)
        sizes.add(len(ids))
        widths.append(it.tokenizer.decode(ids).count("x" * 20))
    assert len(sizes) == 4 and widths == sorted(widths, reverse=True) and widths[0] > widths[-1]
    with pytest.raises(mlerl.UserError):
        maker(D, policy, max_prompt_tokens=50)


def test_prompts_show_the_first_lines_of_the_sample_submission_and_cut_wide_tables(D, fakes, policy):
    it = maker(D, policy, max_prompt_tokens=9000)
    assert "request_id,requester_received_pizza\nt3_a,0" in it.tokenizer.decode(it.solve_ids[TASK])
    wide = ",".join(f"species_{k}" for k in range(99))
    (D[TASK]["public"] / "sampleSubmission.csv").write_text(f"{wide}\n" * 50)
    text = prompts.describe(D[TASK], "", [])
    assert wide[:100] in text and wide not in text and text.count("species_0,") < 5


def drawn(D, policy, D_prev, n, p, seed=0):
    state = types.SimpleNamespace(rng=random.Random(seed), drawn=0, skipped=0)
    return mlerl.draw_prompts(D, D_prev, n, maker(D, policy), state, p), state


def test_half_of_the_prompts_improve_a_previous_solution(D, fakes, policy):
    D_prev = [attempt(f"x = {k}\n", id=100 + k) for k in range(3)]
    s, state = drawn(D, policy, D_prev, 400, 0.5)
    improve = [a for a in s if a.kind == "improve"]
    assert 150 < len(improve) < 250
    assert {a.parent for a in improve} == {100, 101, 102}
    assert [a.id for a in s] == list(range(400)) and state.drawn == 400
    assert not any(a.parent for a in s if a.kind == "solve")


@pytest.mark.parametrize("parents, p, kind", [([], 0.5, "solve"), ([], 1.0, "solve"),
                                              ([1], 0.0, "solve"), ([1], 1.0, "improve")])
def test_prompts_from_scratch_while_D_prev_is_empty(D, fakes, policy, parents, p, kind):
    s, _ = drawn(D, policy, [attempt("x = 1\n", id=k) for k in parents], 20, p)
    assert len(s) == 20 and {a.kind for a in s} == {kind}


def test_tasks_are_drawn_evenly_and_improved_with_their_own_solutions(D, fakes, policy):
    D["other"] = dict(D[TASK], name="other")
    s, _ = drawn(D, policy, [attempt("x = 1\n", id=7)], 40, 1.0)
    assert [a.task for a in s].count("other") == 20
    assert {a.kind for a in s if a.task == "other"} == {"solve"}
    assert {a.kind for a in s if a.task == TASK} == {"improve"}


# --------------------------------------------------------------------------------------------------
# Algorithm 1: collecting, training, logging
# --------------------------------------------------------------------------------------------------
def submit_all(env, codes, versions=None):
    for k, code in enumerate(codes):
        env.submit([attempt(code, id=k, version=versions[k] if versions else 0)])


def test_collect_takes_B_and_leaves_the_rest_in_flight(D, fakes):
    env = environment(D)
    submit_all(env, [script(dt=k) for k in range(7)])
    batch, lost = env.collect(4, 0, keep=True)
    assert [a.id for a in batch] == [0, 1, 2, 3] and len(env.running) == 3
    assert sorted(a.id for a, _ in env.running) == [4, 5, 6]
    assert lost == dict(infra=[], stale=[], killed=[])
    assert [a.dt for a in batch] == [0, 1, 2, 3]


def test_collect_first_kills_the_rest(D, fakes):
    env = environment(D)
    submit_all(env, [script(dt=k) for k in range(7)])
    batch, lost = env.collect(4, 0, keep=False)
    assert len(batch) == 4 and env.running == [] and lost["killed"] == [0.5]


def test_stale_samples_are_dropped_and_counted(D, fakes):
    env = environment(D, max_staleness=8)
    submit_all(env, [script()] * 4, versions=[12, 4, 3, 0])
    batch, lost = env.collect(4, 12, keep=True)
    assert [a.version for a in batch] == [12, 4]
    assert len(lost["stale"]) == 2 and all(12 - a.version > 8 for a in lost["stale"])


def test_infra_is_left_out_and_counted_never_rewarded(D, fakes):
    env = environment(D)
    submit_all(env, [script(), script(outcome="infra"), *[script()] * 6])
    batch, lost = env.collect(6, 0, keep=True)
    assert [a.id for a in batch] == [0, 2, 3, 4, 5, 6] and [a.id for a in lost["infra"]] == [1]


def test_copies_of_a_program_in_flight_share_its_one_execution(D, fakes, tmp_path):
    """Not with one of another task, one that an update has consumed, or one without a plan, which is none."""
    D["other"] = dict(D[TASK], name="other")
    env, first, second = environment(D), script(dt=2.0), script(dt=3.0)
    made = [attempt(code, id=k) for k, code in enumerate([first, second, first, first, first])]
    made[3].task, made[4].plan = "other", ""
    env.submit(made[:2])  # in flight from an earlier call
    env.submit(made[2:])
    batch, _ = env.collect(5, 0, keep=True)
    assert [a.id for a in batch] == [0, 1, 2, 3, 4]
    assert [a.reused for a in batch] == [False, False, True, False, False]
    assert [a.dt for a in batch] == [2.0, 3.0, 2.0, 2.0, None]
    assert batch[2].R == batch[0].R and batch[2].submission and batch[4].outcome == "no_code"
    assert FakePool.last.submitted == [first, second, first]
    run = mlerl.Run(config(run=str(tmp_path / "run")), D)
    run.log_attempts(batch, "train")
    assert run.executions == 3  # the shared one counts once, what was not run not at all
    env.submit([attempt(first, id=5)])  # the others are gone
    (again,), _ = env.collect(1, 1, keep=True)
    assert not again.reused and len(FakePool.last.submitted) == 4


def test_tick_counts_the_consumed(D, fakes):
    env, ticks = environment(D), []
    submit_all(env, [script()] * 3 + [script(outcome="infra")] + [script()] * 5)
    env.collect(7, 0, keep=True, tick=ticks.append)
    assert sum(ticks) == 7


def parts(policy, D, folder, sampler=None, seed=0, **changes):
    """All that `train` needs, in a run folder. What was saved there is loaded."""
    cfg = config(run=str(folder), model="tiny", **changes)  # "tiny": short prompts
    torch.manual_seed(seed)
    learner = mlerl.Learner(cfg, policy)
    run = mlerl.Run(cfg, D)
    run.load(learner)
    env = mlerl.Environment(cfg, D)
    sampler = sampler(cfg) if sampler else ScriptedSampler(cfg)
    return cfg, D, learner, sampler, env, mlerl.PromptMaker(cfg, D, learner.tokenizer), run


def finish(run, env):
    """Release the folder's lock, as the end of the process does."""
    env.pool.close()
    for value in vars(run).values():
        if hasattr(value, "close"):
            value.close()


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def trained(policy, D, folder, **changes):
    """Run `train` to the end of its iterations; returns what it worked with."""
    things = parts(policy, D, folder, **changes)
    mlerl.train(*things)
    finish(things[6], things[4])
    return things


METRICS = """iteration wall_s sample_s execute_s update_s reward_mean task_score_mean valid_share
valid_score_mean best_score duration_mean duration_sampled_mean weight_max ess kl entropy
clip_fraction value_loss explained_variance staleness_mean in_flight distinct variance_valid
variance_markers variance_score outcomes""".split()


@pytest.mark.parametrize("collect, sampled_each, in_flight, cancelled", [
    ("carry", [8, 4, 4], [4, 4, 4], 0), ("first", [8, 8, 8], [0, 0, 0], 3),
    ("wait", [4, 4, 4], [0, 0, 0], 0)])
def test_alg1_consumes_exactly_B_an_iteration(fakes, D, policy, tmp_path, collect, sampled_each,
                                              in_flight, cancelled):
    programs = [script(dt=k + 0.5, noise=k / 10) for k in range(9)]  # all need the executor
    *_, sampler, env, _, state = trained(
        policy, D, tmp_path / "run", sampler=lambda cfg: ScriptedSampler(cfg, programs=programs),
        iterations=3, collect=collect, oversample=2.0)
    rows = lines(tmp_path / "run", "metrics.jsonl")
    assert [len(s) for _, s in sampler.calls] == sampled_each
    assert [v for v, _ in sampler.calls] == [0, 1, 2]
    assert [row["in_flight"] for row in rows] == in_flight
    assert [sum(row["outcomes"].values()) for row in rows] == [4, 4, 4]
    attempts = lines(tmp_path / "run", "attempts.jsonl")
    assert len(attempts) == 12 and len({a["id"] for a in attempts}) == 12
    assert sum(row["lost_killed"] for row in rows) == cancelled
    # first in, first out: `carry` consumes the oldest, so its samples grow one update stale
    assert [row["staleness_mean"] for row in rows] == ([0, 1, 1] if collect == "carry" else [0] * 3)
    assert state.iteration == 3


def test_alg1_what_is_dropped_as_stale_is_logged_and_never_rewarded(fakes, D, policy, tmp_path):
    programs = [script(dt=k + 0.5, noise=k / 10) for k in range(9)]
    trained(policy, D, tmp_path / "run", iterations=3, max_staleness=0,
            sampler=lambda cfg: ScriptedSampler(cfg, programs=programs))
    rows, attempts = (lines(tmp_path / "run", log) for log in ("metrics.jsonl", "attempts.jsonl"))
    dropped = [a for a in attempts if a["phase"] == "dropped"]
    assert len(dropped) == sum(row["lost_stale"] for row in rows) > 0
    assert len({a["id"] for a in attempts}) == len(attempts) == 12 + len(dropped)
    for i, row in enumerate(rows):  # what was dropped had run all the same
        used, stale = ([a["dt"] for a in attempts if a["phase"] == phase] for phase in ("train", "dropped"))
        used, stale = used[4 * i:4 * i + 4], stale[sum(r["lost_stale"] for r in rows[:i]):][:row["lost_stale"]]
        assert row["duration_mean"] == pytest.approx(np.mean(used))
        assert row["duration_sampled_mean"] == pytest.approx(np.mean(used + stale))
    assert all(row["enforced"] == rows[0]["enforced"] for row in rows)


def test_alg1_first_sees_its_batch_while_the_rest_has_not_run(fakes, D, policy, tmp_path):
    *_, sampler, _, _, _ = trained(policy, D, tmp_path / "run", iterations=2, collect="first",
                                      oversample=1.5)
    assert [len(s) for _, s in sampler.calls] == [6, 6]


def test_alg1_D_prev_is_replaced_by_the_valid_attempts_of_the_batch(fakes, D, policy, tmp_path):
    *_, state = trained(policy, D, tmp_path / "run", iterations=4, collect="wait", batch_size=6,
                        mini_batch=6)
    attempts = lines(tmp_path / "run", "attempts.jsonl")
    by_batch = [attempts[k:k + 6] for k in range(0, 24, 6)]
    valid = [[a["id"] for a in batch if a["outcome"] == "ok"] for batch in by_batch]
    assert [a.id for a in state.D_prev] == valid[-1]
    for earlier, batch in zip([[], *valid], by_batch):
        improve = [a for a in batch if a["kind"] == "improve"]
        assert {a["parent"] for a in improve} <= set(earlier)
    assert any(a["kind"] == "improve" for a in attempts)


def test_alg1_the_buffer_holds_the_program_as_the_policy_wrote_it(fakes, D, policy, tmp_path):
    code = script(noise=0.1) + ORDINARY
    *_, env, maker, state = trained(
        policy, D, tmp_path / "run", sampler=lambda cfg: ScriptedSampler(cfg, programs=[code]),
        iterations=1, collect="wait")
    assert len(state.D_prev) == 4 and {a.code for a in state.D_prev} == {code}
    assert env.secret in FakePool.last.submitted[0]
    text = (tmp_path / "run" / "attempts.jsonl").read_text()
    assert env.secret not in text and env.secret not in (tmp_path / "run/best" / f"{TASK}.py").read_text()


@pytest.mark.parametrize("changes", [{}, dict(duration="none"), dict(collect="first")])
def test_alg1_metrics_line_has_every_key(fakes, D, policy, tmp_path, changes):
    trained(policy, D, tmp_path / "run", iterations=2, **changes)
    for row in lines(tmp_path / "run", "metrics.jsonl"):
        assert not [key for key in METRICS if key not in row]


def test_alg1_metrics_are_means_over_the_batch(fakes, D, policy, tmp_path):
    trained(policy, D, tmp_path / "run", iterations=3, batch_size=7, mini_batch=7, collect="wait")
    attempts, best = lines(tmp_path / "run", "attempts.jsonl"), []
    for i, row in enumerate(lines(tmp_path / "run", "metrics.jsonl")):
        batch = attempts[7 * i:7 * i + 7]
        mean = lambda values: sum(values) / len(values) if values else None
        valid = [a for a in batch if a["outcome"] == "ok"]
        dt = [a["dt"] for a in batch if a["dt"] is not None]
        w = [1.0 if a["dt"] is None else a["dt"] / mean(dt) for a in batch]
        best += [a["score"] for a in valid]
        expected = dict(
            iteration=i, reward_mean=mean([a["R"] for a in batch]), valid_share=len(valid) / 7,
            task_score_mean=mean([a["score"] if a in valid else -10 for a in batch]),
            valid_score_mean=mean([a["score"] for a in valid]), duration_mean=mean(dt),
            weight_max=max(w), ess=sum(w) ** 2 / sum(v * v for v in w),
            best_score=max(best, default=None), distinct=len({a["code"] for a in batch} - {""}))
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=1e-5), key
        assert row["tasks"] == {TASK: mlerl.summarize(D[TASK], [types.SimpleNamespace(
            **a, valid=a["outcome"] == "ok") for a in batch])}
        assert row["outcomes"] == {o: sum(a["outcome"] == o for a in batch)
                                   for o in {a["outcome"] for a in batch}}


def test_alg1_explained_variance_and_kl_are_over_all_tokens(fakes, D, policy, tmp_path, monkeypatch):
    seen = {}

    def spy(name):
        function = getattr(mlerl, name)

        def wrapped(*args):
            seen[name] = args, function(*args)
            return seen[name][1]

        monkeypatch.setattr(mlerl, name, wrapped)

    spy("shape_rewards"), spy("gae")
    trained(policy, D, tmp_path / "run", iterations=5, lr=1e-2, critic_lr=1e-2)  # the last one is seen
    row = lines(tmp_path / "run", "metrics.jsonl")[-1]
    (_, old, ref, mask, _), _ = seen["shape_rewards"]
    (_, V, _, _, _), (_, returns) = seen["gae"]
    valid = [(b, t) for b, t in itertools.product(*map(range, mask.shape)) if mask[b, t]]
    old, ref, V, G = (np.array([float(z[at]) for at in valid]) for z in (old, ref, V, returns))
    assert abs((old - ref).mean()) > 1e-4
    assert row["kl"] == pytest.approx((old - ref).mean(), rel=1e-3, abs=1e-6)
    assert row["explained_variance"] == pytest.approx(1 - (G - V).var() / G.var(), rel=1e-3)


@pytest.mark.parametrize("valid_share", [0.0, 0.3, 1.0])
def test_variance_parts_sum_to_one_by_the_law_of_total_variance(valid_share):
    rng = np.random.default_rng(0)
    valid = rng.random(128) < valid_share
    R = np.where(valid, rng.random(128), -10 + 0.1 * rng.integers(0, 8, 128))
    out = mlerl.variance_parts(R, valid)
    mean, total = sum(R) / 128, sum((r - sum(R) / 128) ** 2 for r in R)
    groups = {v: [r for r, ok in zip(R, valid) if ok == v] for v in (True, False)}
    within = {v: sum((r - sum(g) / len(g)) ** 2 for r in g) if g else 0 for v, g in groups.items()}
    between = sum(len(g) * (sum(g) / len(g) - mean) ** 2 for g in groups.values() if g)
    assert out["variance_score"] == pytest.approx(within[True] / total, abs=1e-9)
    assert out["variance_markers"] == pytest.approx(within[False] / total, abs=1e-9)
    assert out["variance_valid"] == pytest.approx(between / total, abs=1e-9)
    assert sum(out.values()) == pytest.approx(1)
    assert all(math.isfinite(v) for v in mlerl.variance_parts([-10.0] * 5, [False] * 5).values())


def test_alg1_rewards_the_likelier_the_better_program(fakes, D, policy, tmp_path):
    """Several updates on two programs raise the probability of the responses that earned more."""
    class TwoResponses(ScriptedSampler):
        def sample(self, attempts, lm, version):
            for a in attempts:
                good = bool(torch.rand(()) < 0.5)
                a.response_ids, a.version, a.plan = [5, 6] if good else [7, 8], version, "Plan."
                a.code = script(noise=0.1) if good else script(outcome="crash")
            logp, _ = mlerl.score_tokens(lm, attempts, self.cfg)
            for a, row in zip(attempts, logp.tolist()):
                a.logp = row[:len(a.response_ids)]
                yield a

    cfg = dict(iterations=6, collect="wait", batch_size=8, mini_batch=8, lr=1e-2, p_improve=0.0)
    _, _, learner, *_ = trained(policy, D, tmp_path / "run", sampler=TwoResponses, **cfg)
    D[TASK]["public"] = tmp_path  # the run's staged folder is gone
    prompt = mlerl.PromptMaker(config(), D, learner.tokenizer).solve_ids[TASK]

    def odds(lm):
        good, bad = (mlerl.Attempt(TASK, "solve", prompt, response_ids=ids)
                     for ids in ([5, 6], [7, 8]))
        with torch.no_grad():
            return float(slow_logprobs(lm, good, 0.7)[0].sum() - slow_logprobs(lm, bad, 0.7)[0].sum())

    assert odds(learner.actor) > odds(learner.ref) + 0.5


def test_a_batch_without_a_single_execution_stops_with_one_clear_line(fakes, D, policy, tmp_path):
    with pytest.raises(mlerl.UserError) as stopped:
        trained(policy, D, tmp_path / "run", iterations=1, sampler=lambda cfg: ScriptedSampler(
            cfg, programs=[script(outcome="infra")]))
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("higher", [True, False])
def test_best_keeps_the_best_program_submission_and_score(fakes, D, policy, tmp_path, higher):
    D[TASK]["sign"] = 1 if higher else -1
    *_, env, _, run = parts(policy, D, tmp_path / "run")
    codes = [script(noise=0.9, n=1), script(noise=0.2, n=2), script(outcome="crash"), script(noise=1.0)]
    for k, code in enumerate(codes):
        run.log_attempts([through(env, attempt(code, id=k))], "train")
    finish(run, env)
    scores = [a["score"] for a in lines(tmp_path / "run", "attempts.jsonl") if a["score"] is not None]
    best = json.loads((tmp_path / "run" / "best" / f"{TASK}.json").read_text())
    assert len(set(scores)) == 3 and best["score"] == (max if higher else min)(scores)
    assert (tmp_path / "run" / "best" / f"{TASK}.py").read_text() == codes[best["id"]]


def test_attempts_line_tells_the_whole_story(fakes, D, policy, tmp_path):
    trained(policy, D, tmp_path / "run", iterations=2, collect="wait")
    for row in lines(tmp_path / "run", "attempts.jsonl"):
        assert {"task", "kind", "parent", "version", "plan", "code", "output", "outcome", "dt",
                "score", "R"} <= set(row)


# --------------------------------------------------------------------------------------------------
# Resume
# --------------------------------------------------------------------------------------------------
TIMING = ("wall_s", "sample_s", "execute_s", "update_s", "reused")  # a resumed run executes copies in flight, too
LEARNS = dict(batch_size=5, mini_batch=3, oversample=1.6, ppo_epochs=2, lr=1e-3, critic_lr=1e-3)


def same(a, b):
    """Bit-for-bit equality of nested state dicts."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(one, two, folder_one, folder_two):
    for name in ("actor", "critic", "actor_opt", "critic_opt"):
        assert same(*(getattr(t[2], name).state_dict() for t in (one, two))), name
    rows = [[{k: v for k, v in row.items() if k not in TIMING} for row in lines(f, "metrics.jsonl")]
            for f in (folder_one, folder_two)]
    assert rows[0] == rows[1]
    attempts = [[a | dict(reused=None) for a in lines(f, "attempts.jsonl")] for f in (folder_one, folder_two)]
    assert attempts[0] == attempts[1]
    for field in ("iteration", "drawn", "best"):
        assert getattr(one[-1], field) == getattr(two[-1], field)
    assert [a.id for a in one[-1].D_prev] == [a.id for a in two[-1].D_prev]
    assert [a.id for a in one[-1].in_flight] == [a.id for a in two[-1].in_flight]


@pytest.mark.parametrize("collect", ["wait", "carry", "first"])
def test_resume_one_and_one_iterations_equal_two_bit_for_bit(fakes, D, policy, tmp_path, collect):
    cfg = LEARNS | dict(collect=collect)
    whole = trained(policy, D, tmp_path / "a", iterations=3, **cfg)
    trained(policy, D, tmp_path / "b", iterations=1, **cfg)
    halves = None
    for n in (2, 3):  # a new process begins with other random numbers
        halves = trained(policy, D, tmp_path / "b", iterations=n, **cfg | dict(seed=0))
    assert_same_run(whole, halves, tmp_path / "a", tmp_path / "b")
    assert not same(whole[2].actor.state_dict(), whole[2].ref.state_dict())  # it did learn


def test_resume_forgets_what_came_after_the_last_checkpoint(fakes, D, policy, tmp_path):
    """Killed in iteration 4, with the checkpoint of iteration 2: iteration 3 is run again."""
    class Killed(ScriptedSampler):
        def sample(self, attempts, lm, version):
            for k, a in enumerate(super().sample(attempts, lm, version)):
                if version == 3 and k == 1:
                    raise KeyboardInterrupt
                yield a

    cfg = LEARNS | dict(save_every=2, iterations=4)
    whole = trained(policy, D, tmp_path / "a", **cfg)
    things = parts(policy, D, tmp_path / "b", sampler=Killed, **cfg)
    with pytest.raises(KeyboardInterrupt):
        mlerl.train(*things)
    finish(things[6], things[4])
    assert len(lines(tmp_path / "b", "metrics.jsonl")) == 3  # one more than is saved
    again = trained(policy, D, tmp_path / "b", **cfg)
    assert_same_run(whole, again, tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("log", ["metrics.jsonl", "attempts.jsonl"])
def test_resume_repairs_a_half_written_last_line(fakes, D, policy, tmp_path, log):
    whole = trained(policy, D, tmp_path / "a", iterations=2, **LEARNS)
    trained(policy, D, tmp_path / "b", iterations=1, **LEARNS)
    with open(tmp_path / "b" / log, "a") as file:
        file.write('{"iteration": 1, "wall_')
    again = trained(policy, D, tmp_path / "b", iterations=2, **LEARNS)
    assert_same_run(whole, again, tmp_path / "a", tmp_path / "b")


def test_resume_before_the_first_checkpoint_begins_anew(fakes, D, policy, tmp_path):
    cfg = LEARNS | dict(save_every=2, iterations=2)
    whole = trained(policy, D, tmp_path / "a", **cfg)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").write_text('{"iteration": 0}\n{"iterat')
    (tmp_path / "b" / "checkpoint.new").write_bytes(b"half a checkpoint")
    again = trained(policy, D, tmp_path / "b", **cfg)
    assert_same_run(whole, again, tmp_path / "a", tmp_path / "b")


def test_resume_with_another_flag_is_refused_in_one_line(fakes, D, policy, tmp_path):
    trained(policy, D, tmp_path / "run", iterations=1)
    with pytest.raises(mlerl.UserError) as refused:
        mlerl.Run(config(run=str(tmp_path / "run"), iterations=1, lr=0.5), D)
    assert "lr" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(lines(tmp_path / "run", "metrics.jsonl")) == 1  # nothing was touched


def test_resume_may_go_on_for_more_iterations_with_other_workers(fakes, D, policy, tmp_path):
    trained(policy, D, tmp_path / "run", iterations=1)
    *_, state = trained(policy, D, tmp_path / "run", iterations=2, workers=5)
    assert state.iteration == 2


@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json"])
def test_a_spoiled_file_of_a_run_is_one_clear_line(fakes, D, policy, tmp_path, name):
    trained(policy, D, tmp_path / "run", iterations=1)
    (tmp_path / "run" / name).write_bytes(b"{ not what was written")
    with pytest.raises(mlerl.UserError) as refused:
        parts(policy, D, tmp_path / "run", iterations=2)
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_two_runs_never_share_a_run_folder(D, tmp_path):
    first = mlerl.Run(config(run=str(tmp_path / "run")), D)  # holds the lock while it lives
    with pytest.raises(mlerl.UserError) as refused:
        mlerl.Run(config(run=str(tmp_path / "run")), D)
    assert "\n" not in str(refused.value) and first is not None


def test_run_folder_can_be_loaded_by_transformers(fakes, D, policy, tmp_path):
    _, _, learner, *_ = trained(policy, D, tmp_path / "run", iterations=1, lr=1e-3)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    assert same(dict(saved.state_dict()), dict(learner.actor.state_dict()))
    assert (tmp_path / "run" / "mlerl.py").read_bytes() == (HERE / "mlerl.py").read_bytes()


# --------------------------------------------------------------------------------------------------
# The whole command, evaluation
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data folder in MLE-bench's layout with 40 answers, marked as a stand-in."""
    folder = tmp_path_factory.mktemp("data")
    home = folder / TASK / "prepared"
    (home / "public").mkdir(parents=True)
    (home / "private").mkdir()
    answers().to_csv(home / "private" / "test.csv", index=False)
    for name in ("train.json", "test.json"):
        (home / "public" / name).write_text('[{"request_id": "t3_0"}]')
    (home / "public" / "sampleSubmission.csv").write_bytes(submission(1.0))
    return folder


PLOT = mlerl.plot


@pytest.fixture
def command(fakes, monkeypatch, data, policy, tmp_path):
    """Call main in a fresh folder: no execution, no large model, a sampler that can write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grade, "ensure_data", lambda *a, **k: True)
    monkeypatch.setattr(mlerl, "HFSampler", ScriptedSampler)
    monkeypatch.setattr(mlerl, "plot", lambda folder: None)  # slow; where it matters, PLOT is put back
    for name in ("solve", "improve"):  # short prompts are faster
        monkeypatch.setattr(prompts, name, lambda *parts, wording=getattr(prompts, name), short=False:
                            wording(*parts, short=True))

    def call(*argv, **flags):
        small = dict(preset="tiny", model=policy, data_dir=data, run="r", iterations=2, batch_size=4,
                     mini_batch=4, eval_samples=6, max_prompt_tokens=4000, max_response_tokens=9)
        words = [str(w) for k, v in (small | flags).items() if v is not None
                 for w in ("--" + k.replace("_", "-"), v)]
        return mlerl.main([*words, *argv])

    return call


PHASES = ("untrained", "trained_scratch", "trained_improve")


def test_one_command_trains_evaluates_and_draws(command, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mlerl, "plot", PLOT)
    assert command() == 0
    run, said = tmp_path / "r", capsys.readouterr()
    assert "STAND-IN" in said.out and "Traceback" not in said.err
    attempts, found = lines(run, "attempts.jsonl"), json.loads((run / "evaluation.json").read_text())
    for phase in PHASES:
        rows = [a for a in attempts if a["phase"] == phase]
        valid = [a["score"] for a in rows if a["outcome"] == "ok"]
        assert found[phase]["n"] == len(rows) == 6
        assert found[phase]["valid_share"] == pytest.approx(len(valid) / 6)
        scores = [a["score"] if a["outcome"] == "ok" else -10 for a in rows]
        assert found[phase]["score_mean"] == pytest.approx(sum(scores) / 6)
        assert found[phase]["best"] == max(valid, default=None)
        assert found[phase]["distinct"] == len({a["code"] for a in rows} - {""})
        assert (found[phase]["valid_score_mean"] is None) == (not valid)
    assert {a["kind"] for a in attempts if a["phase"] == "trained_improve"} == {"improve"}
    assert {a["kind"] for a in attempts if a["phase"] in PHASES[:2]} == {"solve"}
    scratch = {a["id"] for a in attempts if a["phase"] == "trained_scratch" and a["outcome"] == "ok"}
    assert {a["parent"] for a in attempts if a["phase"] == "trained_improve"} <= scratch
    assert found["executions"] == sum(a["dt"] is not None and not a["reused"] for a in attempts)
    assert found["standin"] is True and found["report_fold"] == 0
    assert {"medal", "paper"} <= set(found) and found["paper"]["Table 1"]
    assert (run / "figures").is_dir() and list((run / "figures").glob("*.png"))
    assert len(lines(run, "metrics.jsonl")) == 2


def test_figures_are_drawn_again_from_the_folder_alone(command, monkeypatch, tmp_path):
    assert command() == 0
    monkeypatch.setattr(mlerl, "plot", PLOT)
    with open(tmp_path / "r" / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 2, "wall')  # its writer was killed in the middle of a line
    assert mlerl.main(["--mode", "plot", "--run", str(tmp_path / "r")]) == 0
    assert list((tmp_path / "r" / "figures").glob("*.png"))


def test_the_same_command_again_changes_no_result(command, tmp_path):
    assert command() == 0
    names = ("evaluation.json", "attempts.jsonl", "metrics.jsonl")
    before = [(tmp_path / "r" / name).read_bytes() for name in names]
    assert command() == 0
    assert [(tmp_path / "r" / name).read_bytes() for name in names] == before


def test_killed_in_the_evaluation_and_called_again_equals_a_run_in_one_go(command, tmp_path, monkeypatch):
    assert command(run="a") == 0

    class Killed(ScriptedSampler):
        def sample(self, attempts, lm, version):
            self.calls.append(None)
            if len(self.calls) == 4:  # untrained, two iterations, then this
                raise KeyboardInterrupt
            self.calls.pop()
            yield from super().sample(attempts, lm, version)

    monkeypatch.setattr(mlerl, "HFSampler", Killed)
    assert command(run="b") == 130
    monkeypatch.setattr(mlerl, "HFSampler", ScriptedSampler)
    assert command(run="b") == 0
    assert lines(tmp_path / "a", "attempts.jsonl") == lines(tmp_path / "b", "attempts.jsonl")
    one, two = (json.loads((tmp_path / f / "evaluation.json").read_text()) for f in "ab")
    assert {k: one[k] for k in PHASES} == {k: two[k] for k in PHASES}


def test_iterations_0_evaluates_the_untrained_policy(command, monkeypatch, tmp_path):
    monkeypatch.setattr(mlerl, "plot", PLOT)
    assert command(iterations=0) == 0
    found = json.loads((tmp_path / "r" / "evaluation.json").read_text())
    assert found["untrained"]["n"] == 6 and found["trained_scratch"]["n"] == 6


def test_mode_evaluate_adds_an_evaluation(command, tmp_path):
    assert command() == 0
    assert command(mode="evaluate") == 0
    phases = [a["phase"] for a in lines(tmp_path / "r", "attempts.jsonl")]
    assert phases.count("trained_improve") == 12 and phases.count("untrained") == 6


def test_a_trained_policy_is_evaluated_on_tasks_it_has_not_seen(command, tmp_path):
    assert command() == 0
    assert command(mode="evaluate", policy="r/policy", model="tiny", run="other") == 0
    found = json.loads((tmp_path / "other" / "evaluation.json").read_text())
    assert found["trained_scratch"]["n"] == found["trained_improve"]["n"] == 6
    assert "untrained" not in found  # nothing of this folder knows where the policy began
    assert command(mode="evaluate", policy="no-such-folder", run="third") == 2


def test_mode_run_prints_one_json_object(command, tmp_path, capsys):
    (tmp_path / "p.py").write_text(script(noise=0.2, marks=MARKERS[:2]))
    assert command(mode="run", program="p.py") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"outcome", "reward", "score", "markers", "duration", "output", "submission"} <= set(found)
    assert (found["outcome"], found["markers"]) == ("ok", MARKERS[:2])
    assert (tmp_path / found["submission"]).read_bytes() == submission(0.2)


@pytest.mark.parametrize("pairs, steps", [(6, 90)])
def test_supervised_fine_tuning_raises_the_likelihood_of_responses(policy, pairs, steps):
    learner = mlerl.Learner(config(), policy)
    texts = [([{"role": "user", "content": f"Task: {k}"}], f"Use tree {k}.\n```python\nx\n```")
             for k in range(pairs)]

    def likelihood():
        total = 0.0
        for chat, response in texts:
            prompt = learner.tokenizer.apply_chat_template(chat, add_generation_prompt=True,
                                                           return_dict=True)["input_ids"]
            ids = [*learner.tokenizer.encode(response), learner.tokenizer.eos_token_id]
            total += float(slow_logprobs(learner.actor, mlerl.Attempt(
                TASK, "solve", list(prompt), response_ids=ids), 1.0)[0].sum().detach())
        return total

    before = likelihood()
    mlerl.supervised(learner.actor, learner.tokenizer, texts,
                     config(sft_steps=steps, mini_batch=4))
    assert likelihood() > 0.5 * before  # log-likelihoods are negative


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------
def one_clear_line(code, capfd):
    """Exit code 2 and one line that a person understands."""
    error = capfd.readouterr().err
    assert code == 2, error
    assert len(error.splitlines()) == 1 and error.startswith("mlerl: "), error
    assert "Traceback" not in error and 10 < len(error) < 600
    return error


def test_help_needs_no_torch():
    program = ("import sys, mlerl\n"
               "try: mlerl.main(['--help'])\nexcept SystemExit as end: assert not end.code\n"
               "heavy = {'torch', 'transformers', 'sklearn'} & set(sys.modules)\n"
               "assert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for field in dataclasses.fields(mlerl.Config):
        assert "--" + field.name.replace("_", "-") in done.stdout


def test_a_bad_flag_of_the_real_command_is_one_line():
    done = subprocess.run([sys.executable, "mlerl.py", "--colect", "carry"], cwd=HERE,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("mlerl: ") and len(done.stderr.splitlines()) == 1
    assert "colect" in done.stderr


WRONG_WORDS = [
    dict(mode="fly"), dict(collect="second"), dict(duration="long"), dict(reward="big"),
    dict(instrument="magic"), dict(preset="huge"), dict(loss_agg="mean"), dict(dtype="int8"),
    dict(seed="one"), dict(lr="fast"), dict(batch_size="4.5")]
WRONG_NUMBERS = [
    dict(batch_size=0), dict(mini_batch=0), dict(micro_batch=-1), dict(ppo_epochs=0),
    dict(save_every=0), dict(eval_samples=-1), dict(iterations=-1),
    dict(oversample=0.5), dict(oversample="nan"), dict(oversample="inf"), dict(temperature=0),
    dict(temperature="nan"), dict(top_p=0), dict(top_p=1.5), dict(top_k=-2), dict(p_improve=1.5),
    dict(p_improve="nan"), dict(report_fold=1.0), dict(report_fold=-0.1), dict(timeout=0),
    dict(timeout="nan"), dict(cpu_limit=-1), dict(memory_gb=0), dict(disk_mb=0), dict(output_kb=-1),
    dict(max_procs=0), dict(workers=-1), dict(threads=-1), dict(seed=-1), dict(lr=-1),
    dict(critic_lr="nan"), dict(clip=-0.1), dict(lam=1.5), dict(gamma=-1), dict(max_is_weight=0),
    dict(max_prompt_tokens=0), dict(max_response_tokens=0), dict(max_staleness=-1),
    dict(sft_steps=0), dict(mini_batch=0)]
WRONG_COMBINATIONS = [
    (dict(mode="run"), "program"), (dict(program="p.py"), "program"), (dict(mode="run", task="all"), "program"),
    (dict(mode="run", program="p.py", task=f"{TASK},{TASK}"), "one"),
    (dict(mode="evaluate", run="nowhere"), "run"), (dict(mode="plot", run="nowhere"), "run")]


@pytest.mark.parametrize("flags", ["--batch-size 64", "--batch-size 63 --instrument lm"])
def test_what_several_processes_cannot_do_is_refused_in_a_line(monkeypatch, flags):
    monkeypatch.setattr(mlerl, "WORLD", 3)
    with pytest.raises(mlerl.UserError, match="torchrun"):
        mlerl.parse(["--preset", "tiny", *flags.split()])
    assert mlerl.parse(["--preset", "tiny", "--batch-size", "63"]).batch_size == 63


def test_mode_evaluate_finds_the_run_folder_by_its_other_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--task", TASK, "--preset", "tiny", "--seed", "7", "--mode", "evaluate"]
    with pytest.raises(mlerl.UserError):
        mlerl.parse(flags)
    (tmp_path / "runs" / f"{TASK}-tiny-s7").mkdir(parents=True)
    (tmp_path / "runs" / f"{TASK}-tiny-s7" / "metrics.jsonl").touch()
    assert mlerl.parse(flags).run == f"runs/{TASK}-tiny-s7"


def name_of(value):
    return " ".join(f"{k}={x}" for k, x in value.items()) if isinstance(value, dict) else "says"


def says(error, flag):
    """Whether a line names a flag, as --batch-size or as batch_size."""
    return re.search(rf"\b{re.escape(flag).replace('_', '[-_]')}\b", error)


@pytest.mark.parametrize("flags, said", [
    *((f, next(iter(f))) for f in WRONG_WORDS + WRONG_NUMBERS), *WRONG_COMBINATIONS], ids=name_of)
def test_a_flag_that_makes_no_sense_is_one_line_that_names_it(command, monkeypatch, capfd, flags, said):
    def accepted(*args):
        raise AssertionError("accepted")

    monkeypatch.setattr(grade, "open_task", accepted)
    error = one_clear_line(command(**flags), capfd)
    assert says(error, said), error


@pytest.mark.parametrize("flags, said", [
    (dict(task="random-acts-of-piza"), TASK), (dict(task=""), "task"),
    (dict(task=f"{TASK},nonsense"), "nonsense"),
    (dict(max_prompt_tokens=5), "max_prompt_tokens"),
    (dict(report_fold=0.001), "report-fold"),  # too few rows for a score
    (dict(mode="run", program="missing.py"), "missing.py"), (dict(mode="run", program="."), "program"),
    (dict(mode="run", program="binary"), "binary"),
    (dict(model="missing"), "missing"), (dict(model="empty"), "empty"), (dict(model="none/x"), "none/x"),
    (dict(model="bad_config"), "bad_config"), (dict(model="bad_weights"), "bad_weights"),
    (dict(model="no_weights"), "no_weights"), (dict(model="no_tokenizer"), "no_tokenizer"),
    (dict(model="no_template"), "template"), (dict(run="binary"), "binary"),
    (dict(mode="plot", run="begun"), "begun"), (dict(mode="plot", run="spoiled"), "spoiled"),
    (dict(run="spoiled"), "spoiled")], ids=name_of)
def test_bad_input_is_one_clear_line(command, monkeypatch, policy, tmp_path, capfd, flags, said):
    def trains(*args):
        raise AssertionError("accepted")

    monkeypatch.setattr(mlerl, "train", trains)
    texts = {"p.py": script(), "empty": "", "begun/config.json": "{}", "spoiled/config.json": "{ nonsense"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    spoil_model(policy, tmp_path / str(flags.get("model", "no model")))
    if flags.get("mode") == "plot":
        monkeypatch.setattr(mlerl, "plot", PLOT)
    error = one_clear_line(command(**flags), capfd)
    assert says(error, said), error


def spoil_model(policy, folder):
    """A copy of the model folder with what its name says; nothing for other names."""
    if folder.name not in ("bad_config", "bad_weights", "no_weights", "no_tokenizer", "no_template"):
        return
    folder.mkdir()
    for file in policy.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights_file = folder / "model.safetensors"
    if folder.name == "bad_config":
        (folder / "config.json").write_text("{ nonsense")
    elif folder.name == "bad_weights":
        weights_file.write_bytes(weights_file.read_bytes()[:1000])
    elif folder.name == "no_weights":
        weights_file.unlink()
    elif folder.name == "no_tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif folder.name == "no_template":
        (folder / "chat_template.jinja").unlink()


def test_resuming_with_another_flag_is_one_clear_line(command, capfd):
    assert command(iterations=1) == 0
    capfd.readouterr()
    assert "clip" in one_clear_line(command(iterations=1, clip=0.3), capfd)


def test_a_full_disk_stops_with_one_line_and_the_run_goes_on_later(command, monkeypatch, tmp_path, capfd):
    save = torch.save

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    one_clear_line(command(), capfd)
    monkeypatch.setattr(torch, "save", save)
    assert command() == 0 and len(lines(tmp_path / "r", "metrics.jsonl")) == 2


# --------------------------------------------------------------------------------------------------
# The file is the paper's: citations, contents, flags, budgets
# --------------------------------------------------------------------------------------------------
SOURCE = (HERE / "mlerl.py").read_text()
TREE = ast.parse(SOURCE)
BANNERS = re.findall(r"^# (§\d+) +(.*?) -+$", SOURCE, re.MULTILINE)


def body():
    """The source without the module's docstring and the section banners."""
    after = SOURCE.split('"""', 2)[2]
    return re.sub(r"^# §.*$", "", after, flags=re.MULTILINE)


@pytest.mark.parametrize("citation", ["Eq. 2", "Eq. 3", "Table 3", "Alg. 1", "Sec. 3.1", "Sec. 3.2",
                                      "Sec. 3.3", "Sec. 4.1", "App. C", "Fig. 2", "Fig. 8", "Fig. 9",
                                      "Fig. 10", *[f"l. {k}" for k in range(1, 9)]])
def test_the_paper_is_cited_where_it_is_implemented(citation):
    pattern = (rf"(?:{re.escape(citation)}|Fig\. [\d, -]*\b{citation[5:]})(?!\d)"
               if citation.startswith("Fig") else re.escape(citation) + r"(?!\d)")
    assert re.search(pattern, body())


def test_train_follows_algorithm_1_in_order():
    function = next(n for n in TREE.body if getattr(n, "name", "") == "train")
    text = ast.get_source_segment(SOURCE, function)
    cited = [int(k) for k in re.findall(r"# l\. (\d)", text)]
    assert cited == sorted(cited) and set(cited) == set(range(1, 9))
    assert function.end_lineno - function.lineno + 1 <= 85


def test_banners_are_numbered():
    assert len(BANNERS) >= 10
    assert [int(n[1:]) for n, _ in BANNERS] == list(range(1, len(BANNERS) + 1))


@pytest.mark.parametrize("flag", ["collect", "duration", "reward"])
def test_an_ablation_flag_is_read_on_one_line(flag):
    printed = {id(n) for s in ast.walk(TREE) if isinstance(s, ast.JoinedStr) for n in ast.walk(s)}
    read = {n.lineno for n in ast.walk(TREE) if isinstance(n, ast.Attribute) and n.attr == flag
            and ast.unparse(n.value).split(".")[-1] == "cfg" and id(n) not in printed}
    assert len(read) == 1


def test_every_flag_is_read_somewhere():
    read = {n.attr for n in ast.walk(TREE) if isinstance(n, ast.Attribute)}
    words = {n.value for n in ast.walk(TREE) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    unread = [f.name for f in dataclasses.fields(mlerl.Config) if f.name not in read | words]
    assert unread == []


@pytest.mark.parametrize("name, budget", [("mlerl.py", 1500), ("grade.py", 600), ("prompts.py", 350)])
def test_line_budgets_hold(name, budget):
    assert len((HERE / name).read_text().splitlines()) <= budget


@pytest.mark.parametrize("name", [
    "mlerl.py", "grade.py", "prompts.py"])
def test_no_line_is_wider_than_100(name):
    rows = (HERE / name).read_text().splitlines()
    assert [k for k, row in enumerate(rows, 1) if len(row) > 100] == []


@pytest.mark.parametrize("name", ["mlerl.py", "grade.py", "prompts.py"])
def test_functions_are_short_documented_and_catch_nothing_blindly(name):
    tree = ast.parse((HERE / name).read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    length = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    assert [f for f, n in length.items() if n > 40 and f != "train"] == []
    handlers = [n for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler)]
    assert [n.lineno for n in handlers if n.type is None] == []

# --------------------------------------------------------------------------------------------------
# Execution: real programs, real walls
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def real_pool(tmp_path_factory):
    """A Pool with two workers over a small public folder and private answers."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "public").mkdir()
    (folder / "private").mkdir()
    (folder / "public" / "train.csv").write_text("id,x\n1,2\n")
    (folder / "private" / "answers.csv").write_text("id,label\nTHE-ANSWER,1\n")
    cfg = config(timeout=6.0, cpu_limit=5.0, memory_gb=1.0, disk_mb=32, workers=2, unsafe_exec=True)
    pool = mlerl.Pool(cfg, {TASK: folder / "public"}, [folder / "private"], SECRET)
    yield pool, folder
    pool.close()


def run_real(real_pool, code):
    """The Result of one program."""
    pool, _ = real_pool
    return types.SimpleNamespace(**{"marks": [], **pool.run(TASK, code)})


WRITE = "open('submission.csv', 'w').write('id,x\\n1,0\\n')\n"


@pytest.mark.parametrize("code, outcome", [
    (WRITE, "ok"), ("x = (", "syntax"), ("import no_such_module_at_all", "import"),
    (WRITE + "1 / 0", "crash"), (WRITE + "import os; os._exit(3)", "crash"), ("pass", "no_submission"),
    (WRITE + "import sys; sys.exit(0)", "ok"), ("raise MemoryError", "memory"),
    (WRITE + "while True: pass", "timeout"), (WRITE + "import time; time.sleep(60)", "timeout"),
    ("import os; os.mkdir('submission.csv')", "no_submission"),
    ("import os; os.mkfifo('submission.csv')", "no_submission"),
    ("import os; os.symlink('/etc/passwd', 'submission.csv')", "no_submission")])
def test_a_programs_outcome_is_named_and_an_error_is_never_a_success(real_pool, code, outcome):
    result = run_real(real_pool, code)
    assert result.outcome == outcome, result.output
    assert (result.submission != b"") == (outcome == "ok")


def test_a_program_sees_the_public_folder_and_not_the_answers(real_pool):
    pool, folder = real_pool
    if any("NOT out" in line and "answers" in line for line in pool.report):
        pytest.skip("answers cannot be protected on this machine: " + pool.report[-1])
    seen = run_real(real_pool, f"print(open('{TASK}/prepared/public/train.csv').read())\n"
                    f"try:\n    print(open({str(folder / 'private' / 'answers.csv')!r}).read())\n"
                    "except OSError:\n    print('closed')\n").output
    assert "id,x" in seen and "closed" in seen and "THE-ANSWER" not in seen


def test_a_program_cannot_signal_the_trainer(real_pool):
    pool, _ = real_pool
    if any("NOT out" in line and "trainer" in line for line in pool.report):
        pytest.skip("the trainer cannot be protected on this machine: " + pool.report[-1])
    seen = run_real(real_pool, f"import os\ntry:\n    os.kill({os.getpid()}, 0)\n    print('reached')\n"
                    "except OSError:\n    print('closed')\n").output
    assert "closed" in seen and "reached" not in seen


def test_marks_need_the_secret_and_the_secret_is_not_kept(real_pool):
    result = run_real(real_pool, f"print('loaded data')\nprint('{SECRET} imported packages')\n")
    assert result.marks == ["imported packages"]
    assert SECRET not in result.output and "loaded data" in result.output


def test_more_than_64_marks_are_no_fault_of_ours(real_pool):
    result = run_real(real_pool, f"for k in range(500): print('{SECRET} training loss:', k)\n" + WRITE)
    assert result.outcome == "ok" and result.marks[0] == "training loss: 0"


def test_what_a_killed_program_printed_is_kept(real_pool):
    result = run_real(real_pool, f"print('{SECRET} loaded data')\nimport time; time.sleep(60)")
    assert result.outcome == "timeout" and result.marks == ["loaded data"]
    assert result.dt == 6.0


def test_a_flood_of_output_ends_the_program_not_the_run(real_pool):
    result = run_real(real_pool, "while True: print('x' * 100000)")
    assert result.outcome in ("crash", "timeout") and len(result.output) < 200_000
    assert run_real(real_pool, WRITE).outcome == "ok"


def test_children_do_not_outlive_their_program(real_pool, tmp_path):
    token = f"9{os.getpid()}.25"
    run_real(real_pool, f"import subprocess; subprocess.Popen(['sleep', '{token}'])\n" + WRITE)
    alive = [p for p in pathlib.Path("/proc").glob("[0-9]*/cmdline")
             if token.encode() in (p.read_bytes() if p.exists() else b"")]
    assert not alive


def test_forked_programs_draw_different_numbers_and_seeded_ones_the_same(real_pool):
    code = "import numpy as np; {}print(np.random.rand())\n"
    free = {run_real(real_pool, code.format("")).output for _ in range(3)}
    seeded = {run_real(real_pool, code.format("np.random.seed(0); ")).output for _ in range(3)}
    assert len(free) == 3 and len(seeded) == 1


# --------------------------------------------------------------------------------------------------
# Attacks: a test for every threat, behind the best walls of this machine, and without namespaces
# --------------------------------------------------------------------------------------------------
import base64, ctypes, hashlib, secrets, shutil, socket, tempfile

ANSWER = "id,label\nTHE-ANSWER,1\n"
LEVELS = {"best": mlerl.WALLS, "container": [w for w in mlerl.WALLS if "namespaces" not in w]}


class World:
    """A trainer's side: data, answers, a run folder, a process to kill, a pool."""

    def __init__(self, walls, **changes):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="world-"))
        self.folder.chmod(0o755)
        self.data = self.folder / "data" / "pizza" / "prepared"
        for name in ("public/sub", "private"):
            (self.data / name).mkdir(parents=True)
        (self.folder / "run").mkdir()
        (self.data / "public/train.csv").write_text("id,x\n1,2\n")
        (self.data / "private/answers.csv").write_text(ANSWER)
        (self.data / "private/submission.csv").write_text(ANSWER)  # under the name it looks for
        for path in (self.data / "private").iterdir():
            path.chmod(0o600)  # as the trainer leaves them
        (self.folder / "run/attempts.jsonl").write_text("THE-ANSWER")
        (self.folder / "run").chmod(0o700)
        self.canary = subprocess.Popen(["sleep", "1000"], env={"TOKEN": "ENVIRONMENT-SECRET"})
        self.cfg = dataclasses.replace(mlerl.Config(), **{
            **dict(workers=2, timeout=60, cpu_limit=30, memory_gb=1, disk_mb=50, output_kb=32, max_procs=60,
                   threads=1, run=str(self.folder / "run"), data_dir=str(self.folder / "data")), **changes})
        keep, mlerl.WALLS = mlerl.WALLS, walls
        try:
            self.pool = mlerl.Pool(self.cfg, {"pizza": self.data / "public"}, [self.data / "private"], SECRET)
        except mlerl.UserError as problem:
            self.canary.kill()
            if walls is LEVELS["best"] or walls == [[]]:
                raise
            pytest.skip(f"these walls do not work on this machine: {str(problem)[:150]}")
        finally:
            mlerl.WALLS = keep
        print(*self.pool.report, sep="\n")
        self.has = {wall: wall in self.pool.job["walls"] for wall in ("user id", "namespaces", "Landlock")}

    def runs(self, codes, **limits):
        """Run programs together; Results in their order. <names> in them stand for what to attack."""
        usual = self.pool.job
        self.pool.job = usual | limits
        names = dict(answers=self.data / "private/answers.csv", private=self.data / "private", world=self.folder,
                     canary=self.canary.pid, trainer=os.getpid(), stage=self.pool.stage, home=os.path.expanduser("~"))
        running = []
        for code in codes:
            for name, value in names.items():
                code = code.replace(f"<{name}>", str(value))
            running.append(self.pool.submit(self.pool.run, "pizza", code))
        found = [future.result() for future in running]
        self.pool.job = usual
        return [types.SimpleNamespace(**{"marks": [], "exit": None, "dt": None, **f})
                for f in found]

    def run(self, code, **limits):
        return self.runs([code], **limits)[0]

    def close(self):
        self.pool.close()
        self.canary.kill()
        self.canary.wait()
        assert not self.pool.stage.exists() and not leftovers(str(self.pool.stage))
        shutil.rmtree(self.folder)


def below(pid):
    """All processes below one."""
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [*children, *(grandchild for child in children for grandchild in below(child))]


def leftovers(word):
    """Processes with this word on their command line or as their folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if word in os.readlink(f"/proc/{pid}/cwd") or word in open(f"/proc/{pid}/cmdline").read():
                found.append(pid)
        except OSError:
            pass
    return found


@pytest.fixture(scope="module", params=LEVELS)
def world(request):
    world = World(LEVELS[request.param])
    yield world
    world.close()


@pytest.fixture(autouse=True)
def unharmed(request):
    """After every attack the trainer's things are as before, nothing runs on, the pool still works."""
    yield
    if "world" not in request.fixturenames:
        return
    world = request.getfixturevalue("world")
    assert "State:\tS" in pathlib.Path(f"/proc/{world.canary.pid}/status").read_text()
    assert (world.data / "private/answers.csv").read_text() == ANSWER
    assert (world.data / "public/train.csv").read_text() == "id,x\n1,2\n"
    assert not any(slot.began for slot in world.pool.slots)
    for slot in world.pool.slots:
        if slot.process and slot.process.poll() is None:
            assert len(below(slot.process.pid)) == world.has["namespaces"], "something runs on"
    for r in world.runs(["import os\nprint(open('pizza/prepared/public/train.csv').read(), sorted(os.listdir('.')))\n"
                         "open('submission.csv','w').write('fine')"] * 2):
        assert (r.outcome, r.submission) == ("ok", b"fine"), r
        assert "id,x\n1,2\n ['pizza', 'program.py', 'tmp']" in r.output


def test_threat_private_answers_are_read(world):
    """By path, walk, /proc, links and inherited descriptors; neither the run folder nor home."""
    r = world.run("""
import os, glob
for path in ['<answers>', '<private>', '<world>/run/attempts.jsonl', '<world>/run', '<home>', '/proc/<trainer>/root<answers>']:
    try: print('OPENED', path, os.open(path, 0))
    except OSError: pass
for top in ['<world>', '<stage>', '..', '/proc/1/root<world>', '/tmp', '/var/tmp']:
    for d, ds, fs in os.walk(top):
        for f in fs:
            try: print(open(os.path.join(d, f), errors='replace').read(99).replace('program', ''))
            except OSError: pass
mine = {str(os.getpid()), 'self', 'thread-self'}
for path in glob.glob('/proc/[0-9]*/environ') + glob.glob('/proc/[0-9]*/mem') + glob.glob('/proc/[0-9]*/fd/*') + glob.glob('/proc/[0-9]*/cwd/*'):
    if path.split('/')[2] not in mine:
        try: open(path, 'rb').read(1); print('PROC', path)
        except OSError: pass
for fd in range(3, 1024):
    try: os.fstat(fd); print('INHERITED', fd, os.readlink(f'/proc/self/fd/{fd}'))
    except OSError: pass
""")
    assert r.outcome == "no_submission" and not re.search("THE-ANSWER|OPENED|PROC|INHERITED", r.output), r


def test_threat_submission_is_no_plain_file(world):
    makes = ["os.symlink('<answers>', 'submission.csv')", "os.symlink('/etc/passwd', 'submission.csv')",
             "os.link('<answers>', 'submission.csv')", "open('x','w'); os.link('x', 'submission.csv')",
             "os.mkfifo('submission.csv')", "os.mkdir('submission.csv')",
             "os.mknod('submission.csv', 0o20666, os.makedev(1, 5))",
             "os.mknod('disk', 0o60666, os.makedev(254, 0)); print('EVIL', open('disk', 'rb').read(9))",
             "d = os.getcwd(); os.rename(d, d + 'x'); os.symlink('<private>', d)",
             "f = open('submission.csv','w'); f.truncate(10**12)", "os.chmod('.', 0)"]
    for r in world.runs([f"import os\ntry:\n    {make}\nexcept OSError as e: print(e)" for make in makes]):
        assert not r.submission and r.outcome in ("no_submission", "crash", "ok") and "EVIL" not in r.output, r
    r = world.run("import os\nos.chdir('..')\nfor name in ('output', 'work', 'left'):\n    try:\n"
                  "        os.rename(name, name + 'x') if os.path.exists(name) else None\n        os.mkfifo(name)\n"
                  "    except OSError: pass", timeout=5)  # the log, too, is read as it was opened
    assert r.outcome == "no_submission" and r.dt < 5
    big, swap = world.runs(["f = open('submission.csv','wb'); f.truncate(20 << 20)", """
import os
open('submission.csv','w').write('first')
if os.fork() == 0:
    os.setsid()
    while True:
        try: os.symlink('<answers>', 'l'); os.rename('l', 'submission.csv')
        except OSError: pass
os._exit(0)"""])
    assert len(big.submission) == 20 << 20 and swap.submission in (b"", b"first")


def test_threat_secrets_in_environment_or_proc(world):
    os.environ["KAGGLE_KEY"] = "ENVIRONMENT-SECRET"
    r = world.run("import os, subprocess; print(dict(os.environ), open('/proc/self/environ').read())\n"
                  "print(subprocess.run(['env'], capture_output=True).stdout)")
    assert "SECRET" not in r.output and "KAGGLE" not in r.output and "HOME" in r.output


def test_threat_trainer_is_killed_stopped_or_traced(world):
    nice = os.getpriority(os.PRIO_PROCESS, os.getpid())
    kill, trace = world.runs(["""
import os, ctypes, signal
for pid in (<trainer>, <canary>, os.getppid(), -1):
    if pid not in (0, 1) and (pid > 0 or os.getuid()):  # -1 as root in a container would reach too far
        for s in (signal.SIGSTOP, signal.SIGINT, signal.SIGKILL):
            try: os.kill(pid, s); print('EVIL' if pid in (<trainer>, <canary>) else 'sent')
            except OSError: pass
for pid in (<trainer>, <canary>):
    try: os.setpriority(0, pid, 19)
    except OSError: pass
""".replace("os.getuid()", str(int(world.has["namespaces"]))), """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for pid in (<trainer>, <canary>, os.getppid()):
    if pid:
        if libc.ptrace(16, pid, None, None) != -1 or libc.ptrace(0x4206, pid, None, None) != -1: print('TRACED', pid)
        fd = libc.syscall(434, pid, 0)
        if fd >= 0 and libc.syscall(438, fd, 0, 0) >= 0: print('PIDFD', pid)
        if fd >= 0 and pid > 1 and libc.syscall(424, fd, 19, None, 0) == 0: print('PIDFD', pid)  # 1: deaf to it
    for name in ('oom_score_adj', 'mem', 'clear_refs'):
        try: open(f'/proc/{pid}/{name}', 'w').write('1'); print('WROTE', pid)
        except OSError: pass
"""])
    assert "EVIL" not in kill.output and kill.outcome != "infra", kill
    assert not trace.output, trace
    if world.has["namespaces"] or world.has["user id"]:
        assert os.getpriority(os.PRIO_PROCESS, os.getpid()) == nice


HOLD = "import os, time, signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
HOP = "#include <unistd.h>\\nint main(){setsid(); for(;;) if (fork()) _exit(0);}"


def test_threat_program_outlives_its_timeout(world):
    """Ignored signals, daemons, double forks, pid hopping, stopped programs, held pipes."""
    codes = ["time.sleep(1000)", "while True: pass",
             "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1000)\n    os._exit(0)",
             "import subprocess\nsubprocess.Popen(['sh', '-c', 'while :; do sleep 1; done'], start_new_session=True)",
             "for _ in range(20):\n    if os.fork() == 0:\n        while True:\n            if os.fork(): os._exit(0)",
             f"open('a.c','w').write('{HOP}')\nos.system('gcc a.c; for i in 1 2 3 4 5 6 7 8; do ./a.out & done')\ntime.sleep(1)",
             "os.close(1); os.close(2); time.sleep(1000)", "os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(1000)",
             "for _ in range(10):\n    if os.fork() == 0:\n        os.kill(os.getpid(), signal.SIGSTOP)\n        time.sleep(1000)",
             "import atexit\natexit.register(time.sleep, 1000)"]
    for code, r in zip(codes, world.runs([HOLD + code for code in codes], timeout=2)):
        assert r.outcome in ("timeout", "no_submission", "crash"), (code, r)
        assert r.dt <= 2.5 or r.outcome != "timeout"
    r = world.run(f"import time\nprint('{SECRET} one')\nprint('x', end='')\ntime.sleep(1000)", timeout=2)
    assert (r.outcome, r.dt, r.marks, r.output) == ("timeout", 2, ["one"], "one\nx")
    assert world.run("while True: pass", cpu_limit=1).outcome == "timeout"


def test_threat_floods(world):
    """Memory, disk, inodes, nested folders, processes, threads, output, descriptors; what is not held is named."""
    floods = {"x = bytearray(3 << 30)": "memory", "import numpy as np; x = np.ones(3 << 27)": "memory",
              "import resource\nresource.setrlimit(resource.RLIMIT_DATA, (-1, -1))": "crash",
              "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').write(bytes(1 << 20))": "crash",
              "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'w').close()": "crash",
              "import os\nos.mkdir('hide'); os.chdir('hide'); os.chmod('../hide', 0)\ni = 0\nwhile True:\n    i += 1\n"
              "    open(str(i), 'wb').write(bytes(1 << 20))": "crash",
              "import os\nwhile True:\n    os.mkdir('d'); os.chdir('d')": "crash timeout",
              "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass": "crash timeout memory",
              "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(100,)).start()": "crash timeout",
              "while True: print('x' * 10000)": "crash", "x = []\nwhile True: x.append(open('/dev/null'))": "crash",
              "import os, time\nif os.fork() == 0:\n    while True:\n        if os.fork(): os._exit(0)\n"
              "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').write(bytes(1 << 20))": "crash",
              "i = 0\nwhile True:\n    i += 1\n    open(f'/dev/shm/EVIL{i}', 'wb').write(bytes(9 << 20))": "crash"}
    if not (world.has["namespaces"] or world.has["user id"]):  # nothing limits the processes of root
        floods = {code: word for code, word in floods.items() if "os.fork()\n    except" not in code}
    if not world.has["namespaces"]:
        floods = {code: word for code, word in floods.items() if "open(str(i)" not in code and "EVIL" not in code}
    named = [line for line in world.pool.report if "NOT limited" in line]
    assert len(named) == 1 and "memory" in named[0] and ("files" in named[0]) != world.has["namespaces"]
    before = set(os.listdir("/dev/shm"))
    for (code, words), r in zip(floods.items(), world.runs(floods, timeout=10)):
        assert r.outcome in words and len(r.output) < 40_000, (code, r)
    assert set(os.listdir("/dev/shm")) == before


def test_threat_work_folder_is_left_in_any_state(world):
    codes = ["os.chmod('.', 0)", "os.mkdir('a'); open('a/b','w'); os.chmod('a', 0)", "os.mkfifo('f')",
             "for _ in range(5000): os.mkdir('d'); os.chdir('d')",
             "for i in range(1000): open(b'\\xff\\n%d' % i, 'w').close()",
             "os.rmdir('tmp'); os.unlink('program.py'); os.symlink('/', 'tmp'); os.symlink('<world>', 'program.py')"]
    for code, r in zip(codes, world.runs(["import os\n" + code for code in codes])):
        assert r.outcome in ("no_submission", "crash"), (code, r)
    assert world.folder.stat().st_mode & 0o777 == 0o755


def test_threat_network(world):
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0mlerl-{os.getpid()}")
        abstract.listen()
        r = world.run(f"""
import socket
def go(name, f):
    try: f(); print(name, 'OPEN')
    except OSError as e: print(name, e)
go('tcp', lambda: socket.create_connection(('127.0.0.1', {tcp.getsockname()[1]}), 1))
go('udp', lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9)))
go('abstract', lambda: socket.socket(socket.AF_UNIX).connect('\\0mlerl-{os.getpid()}'))
go('raw', lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
go('vsock', lambda: socket.socket(socket.AF_VSOCK))
""")
    opened = set(re.findall(r"(\w+) OPEN", r.output))
    assert any("NOT out of their reach: a virtual machine's host" in line for line in world.pool.report) == (
        "vsock" in opened)  # no wall, so it is named
    opened -= {"vsock"}
    assert opened <= (set() if world.has["namespaces"] else {"udp"}), r.output
    assert any("NOT out of their reach: network" in line for line in world.pool.report) == bool(opened)


def test_threat_writing_elsewhere(world):
    """Outside the work folder, into data, another program's folder, site-packages."""
    r = world.run("""
import os, json, pandas, sys
own = os.path.dirname(os.getcwd())  # its box, which is emptied after it
for place in ['../..', '/', '/tmp', '/etc', os.path.dirname(json.__file__), os.path.dirname(pandas.__file__), sys.prefix, '<world>',
              '<private>', '<home>', '<stage>', '<stage>/slot0', '<stage>/slot0/work', '<stage>/slot1', '<stage>/slot1/work',
              'pizza/prepared/public', '/var/tmp', '/run', '/dev', '/proc/sys/kernel', '/sys/fs/cgroup']:
    try:
        if not os.path.realpath(place).startswith(own): open(place + '/EVIL', 'w').write('x'); print('WROTE', place)
    except OSError: pass
for path in ('pizza/prepared/public/train.csv', '<answers>', json.__file__):
    for how in (lambda: open(path, 'a'), lambda: os.truncate(path, 0), lambda: os.unlink(path), lambda: os.rename(path, path + 'x'),
                lambda: os.chmod(path, 0o777), lambda: os.utime(path, (1, 1)), lambda: os.chown(path, 1, 1)):
        try: how(); print('CHANGED', path)
        except OSError: pass
""")
    assert "WROTE" not in r.output, r
    if world.has["namespaces"] or world.has["user id"]:
        assert "CHANGED" not in r.output, r
    else:  # metadata only, and said so
        assert "NOT out of their reach: files outside" in "".join(world.pool.report)
        for path in (world.data / "public/train.csv", world.data / "private/answers.csv", pathlib.Path(json.__file__)):
            os.chown(path, os.getuid(), os.getgid())
            path.chmod(0o644)


def test_threat_other_program_is_read(world):
    spy = """
import os, time
open('MINE<n>', 'w').write('x')
time.sleep(1)
places = [d for d, _, _ in os.walk('<stage>')] + ['<stage>/slot0/work', '<stage>/slot1/work'] + [f'/proc/{p}/cwd' for p in os.listdir('/proc')]
for place in places:
    try: print(*['FOUND' for f in os.listdir(place) if f.startswith('MINE') and f != 'MINE<n>'])
    except OSError: pass
for n in (0, 1):
    if not os.getcwd().startswith(f'<stage>/slot{n}/'):
        try: open(f'<stage>/slot{n}/output').read(); print('FOUND')
        except OSError: pass
"""
    for r in world.runs([spy.replace("<n>", n) for n in "12"]):
        assert r.outcome == "no_submission" and "FOUND" not in r.output, r


def test_threat_other_programs_remains_are_found_in_memory(world):
    """Programs are forks of one worker: had it read an earlier one's code, output or submission, all could."""
    for rows in (1162, 6000):
        word = secrets.token_hex(12)
        victim = f"word = '{word}'  # of {rows}\nprint(*[word] * {rows})\nopen('submission.csv', 'w').write("
        victim += f"'id,label\\n' + ''.join(f'{{k:05d}},{{word}}\\n' for k in range({rows})))"
        seen = world.run(victim)
        assert word in seen.output and seen.submission.count(word.encode()) == rows
        encoded = base64.b64encode(seen.submission[9:39]).decode()  # a line of 31 in three ends where a byte does
        r = world.run("""
import hashlib, re
mem = open('/proc/self/mem', 'rb')
for line in open('/proc/self/maps').readlines():
    start, end, mode, *_ = re.split('[- ]', line)
    if mode.startswith('rw'):
        try: mem.seek(int(start, 16)); part = mem.read(int(end, 16) - int(start, 16))
        except (OSError, OverflowError): continue
        for begin, rest in <halves>:  # so that it never finds itself
            for m in re.finditer(begin, part):
                if hashlib.sha256(part[m.end():m.end() + 8]).hexdigest() == rest: print('FOUND', hex(m.start() + int(start, 16)))
print('read', int(end, 16))
open('submission.csv', 'w').close()
""".replace("<halves>", repr([(text[:12].encode(), hashlib.sha256(text[12:20].encode()).hexdigest())
                              for text in (word, encoded)])), memory_gb=4)
        assert r.outcome == "ok" and "read" in r.output and "FOUND" not in r.output, r


def test_threat_other_programs_are_spoilt(world):
    """By limits of the worker, which they would inherit; its death is no one's crash (`unharmed` runs two more)."""
    for name in ("AS", "NOFILE"):
        r = world.run(f"""
import os, resource
used = int(open('/proc/self/statm').read().split()[0]) * 4096
try: resource.prlimit(os.getppid(), resource.RLIMIT_{name}, (used + (120 << 20) if '{name}' == 'AS' else 0,) * 2)
except OSError: pass
""")
        assert r.outcome in ("no_submission", "infra"), r
        later = world.run("import os, numpy\nnumpy.ones(1 << 26)\nopen('x', 'w').write('x')\nopen('submission.csv', 'w').close()")
        assert later.outcome == "ok", (name, later)


def test_threat_output_cannot_be_read(world):
    """O_DIRECT on the open file that programs share with us; it is their output that fails, not our reading."""
    r = world.run("import os, fcntl\nprint('said', flush=True)\ntry: fcntl.fcntl(1, fcntl.F_SETFL, os.O_DIRECT)\n"
                  "except OSError: pass\nos._exit(3)")
    assert (r.outcome, r.exit, r.output) == ("crash", 3, "said\n")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give user ids to programs")
def test_threat_the_killer_of_a_users_processes_is_hindered(tmp_path, monkeypatch):
    """By the neighbouring slot's killer, at the same moment, or by libraries planted where it starts."""
    code, run = [], subprocess.run
    monkeypatch.setattr(mlerl.subprocess, "run", lambda command, **kw: code.append(command[-1]))
    mlerl.kill_user(1_900_000_001)
    monkeypatch.setattr(mlerl.subprocess, "run", run)
    neighbour = code[0].replace("os.kill(-1, 9)", "print(flush=True); import time; time.sleep(60)")
    assert neighbour != code[0]
    (tmp_path / "libc.so.6").write_text("planted")
    become = "import os, time; os.setresuid(*[1_900_000_000] * 3); print(flush=True); time.sleep(60)"
    with contextlib.ExitStack() as stack:
        other, program = (stack.enter_context(subprocess.Popen(
            [sys.executable, "-c", text], stdout=subprocess.PIPE)) for text in (neighbour, become))
        other.stdout.readline(), program.stdout.readline()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("LD_LIBRARY_PATH", ":")
        mlerl.kill_user(1_900_000_000)
        assert program.wait(20) == -signal.SIGKILL and other.poll() is None
        other.kill()


def test_threat_keys_of_the_trainer_are_read(world):
    """A key in the trainer's session keyring of the kernel; one that a program leaves there for the next."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    join, add = (250, 248) if os.uname().machine == "x86_64" else (219, 217)
    if call(join, 1, None) == -1:
        pytest.skip("no keyrings here")
    assert call(add, b"user", b"mlerl-test", b"THE-KEY", 7, -3) > 0
    for slot in world.pool.slots:  # new workers, which inherit our keyring
        world.pool.hang_up(slot)
        slot.process = world.pool.start_worker(slot, world.pool.job["walls"])
    for r in world.runs([f"""
import ctypes, os
call, found = ctypes.CDLL(None, use_errno=True).syscall, ctypes.create_string_buffer(99)
for name in (b'mlerl-test', b'left'):
    key = call({join}, 10, -3, b'user', name, 0)
    if key > 0: print('KEY', call({join}, 11, key, found, 99), found.value)
call({add}, b'user', b'left', b'x', 1, -3)
"""] * 3):
        assert r.outcome == "no_submission" and not r.output, r


def test_threat_forged_marks_and_results(world):
    r = world.run(f"""
print('training loss: 0.1')
print('{SECRET} training loss: 0.3')
print('50%|####', end=' '); print('{SECRET} after a progress bar')
print(' "{SECRET} quoted as in a traceback"')
for c in '{SECRET} split\\n': print(c, end='')
print(('x' * 997 + '{SECRET} y') * 2000)
print('{SECRET} ' + 'long' * 100)
""")
    assert r.marks[:3] == ["training loss: 0.3", "after a progress bar", "split"] and len(r.marks) <= 64
    assert SECRET[:8] not in r.output and "training loss: 0.3" in r.output and len(r.output) < 33_000
    r = world.run("""
import os, json
fake = json.dumps({"outcome": "ok", "exit": 0, "dt": 0.1, "output": "", "marks": ["x"], "submission": "aWQ="}).encode()
for fd in range(1, 100):
    try: os.write(fd, len(fake).to_bytes(8, 'little') + fake)
    except OSError: pass
os._exit(77)
""")
    assert (r.outcome, r.exit, r.submission, r.marks) == ("crash", 77, b"", [])


def test_outcomes(world):
    cases = {"x = = 1": ("syntax", 1), "import no_such_module": ("import", 1), "raise MemoryError": ("memory", 1),
             "def f():\n    1/0\nf()": ("crash", 1), "import ctypes; ctypes.string_at(0)": ("crash", -11),
             "import sys; sys.exit('words')": ("crash", 1), "import sys; sys.exit(256)": ("no_submission", 0),
             "import os; os._exit(3)": ("crash", 3), "x = '\\ud800'; open('submission.csv', 'w').write('')": ("ok", 0),
             "\ud800": ("syntax", 1), "import sys; open('submission.csv', 'w').write('x'); sys.exit(0)": ("ok", 0),
             "f = open('submission.csv', 'w'); f.write('unclosed')": ("ok", 0),
             "import atexit\natexit.register(lambda: open('submission.csv', 'w').write('late'))": ("ok", 0),
             "import threading, time\ndef f(): time.sleep(0.3); open('submission.csv', 'w').write('late')\n"
             "threading.Thread(target=f).start()": ("ok", 0)}
    results = world.runs(cases)
    assert [(r.outcome, r.exit) for r in results] == list(cases.values()), results
    assert "words" in results[5].output and results[11].submission == b"unclosed"
    assert results[3].output.startswith('Traceback (most recent call last):\n  File "program.py", line 3')


BENIGN = {
    "threads": "from concurrent.futures import ThreadPoolExecutor as T\nprint(list(T(4).map(abs, [-1, 2])))",
    "pool": "import multiprocessing as m\ndef f(x): return x * x\nwith m.Pool(2) as p: print(p.map(f, range(9)))",
    "joblib": "from joblib import Parallel, delayed\nprint(Parallel(n_jobs=2)(delayed(abs)(i) for i in range(-3, 3)))",
    "forest": "from sklearn.ensemble import RandomForestClassifier as R\nimport numpy as np\nx = np.random.RandomState(0).rand(200, 5)\n"
              "print(R(20, n_jobs=2, random_state=0).fit(x, x[:, 0] > .5).predict_proba(x).sum())",
    "boosting": "from sklearn.ensemble import HistGradientBoostingClassifier as R\nimport numpy as np\nx = np.random.RandomState(0)"
                ".rand(500, 5)\nprint(R(random_state=0, max_iter=20).fit(x, x[:, 0] > .5).predict_proba(x).sum())",
    "temp": "import tempfile, os\nwith tempfile.TemporaryDirectory() as d, tempfile.NamedTemporaryFile('w') as f:\n"
            "    open(d + '/a', 'w').write('y'); print(os.listdir(d))\nos.makedirs(os.path.expanduser('~/.cache/x'))",
    "unicode": "import sys; print('żółć \u2603 ' * 3); print('ü', file=sys.stderr)",
    "output": "for i in range(50000): print('x' * 100)",
    "subprocess": "import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', 'import numpy; print(numpy.ones(2))'], "
                  "capture_output=True, text=True).stdout, subprocess.check_output('echo hi', shell=True))",
    "seeded": "import numpy as np, random\nnp.random.seed(1); random.seed(1)\nprint(np.random.rand(3), random.random(), {'a', 'b', 'c'})",
    "main": "import pickle, sys, inspect\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))), sys.argv, inspect.getsource(A), "
            "sys.path[0] == __import__('os').getcwd())\ntry: input()\nexcept EOFError: print('eof')",
    "torch": "import torch\ntorch.manual_seed(0)\nl = torch.nn.Linear(5, 1)(torch.ones(4, 5)).mean(); l.backward()\nprint(float(l))",
}


def test_benign_programs_agree_fresh_and_forked(world):
    names = [n for n in BENIGN if n not in ("pool", "joblib", "forest") or world.has["namespaces"] or world.has["user id"]]
    forked = world.runs([BENIGN[n] for n in names])
    world.pool.job["forked"] = False
    fresh = world.runs([BENIGN[n] for n in names])
    world.pool.job["forked"] = True
    for name, a, b in zip(names, forked, fresh):
        assert (a.outcome, "Traceback" in a.output) == ("no_submission", False), (name, a)
        warned = "in serial mode" in b.output  # joblib, where Landlock alone keeps /dev/shm closed
        assert warned or (a.outcome, a.output, a.exit) == (b.outcome, b.output, b.exit), (name, a, b)
    differ = world.runs(["import numpy as np, random\nprint(np.random.rand(), random.random())"] * 4)
    assert len({r.output for r in differ}) == 4


def test_cancelled_programs_end_and_never_hit_the_next(world):
    pool = world.pool
    for round in range(30):  # cancellations race with programs that end
        lost = [pool.submit(pool.run, "pizza", f"import time; time.sleep({round / 1000})") for _ in range(4)]
        time.sleep(round / 300)
        for future in lost:
            future.cancel()
        assert all(ran >= 0 for ran in pool.cancel())
        kept = [pool.submit(pool.run, "pizza", "open('submission.csv', 'w').write('kept')") for _ in range(2)]
        assert [future.result()["outcome"] for future in kept] == ["ok", "ok"]


def busy(pool):
    """A worker that runs a program."""
    while not (running := [slot for slot in pool.slots if slot.began and slot.process]):
        time.sleep(0.05)
    time.sleep(0.7)
    return running[0].process


def test_after_a_workers_death_its_program_runs_once_more_and_is_then_infra(world):
    again = world.pool.submit(world.pool.run, "pizza", "import time; time.sleep(2); open('submission.csv', 'w').write('x')")
    busy(world.pool).kill()
    assert (again.result()["outcome"], again.result()["submission"]) == ("ok", b"x")
    twice = world.pool.submit(world.pool.run, "pizza", "import time; time.sleep(60)")
    first = busy(world.pool)
    first.kill()
    first.wait()
    time.sleep(0.3)
    busy(world.pool).kill()
    assert twice.result()["outcome"] == "infra"


TRAINER = """
import sys, dataclasses, pathlib, time
sys.path.insert(0, {repo!r})
import mlerl
cfg = dataclasses.replace(mlerl.Config(), workers=2, timeout=60, memory_gb=1, disk_mb=50, run='none')
try:
    pool = mlerl.Pool(cfg, dict(pizza={public!r}), [{private!r}], 'x')
    code = "import subprocess; subprocess.run(['sleep', '1234'])"
    running = [pool.submit(pool.run, 'pizza', code) for _ in range(4)]
    while sum(slot.began is not None for slot in pool.slots) < 2: time.sleep(0.1)
    time.sleep(1)
    print(pool.stage, flush=True)
    print(running[0].result())
finally:
    if 'pool' in globals(): pool.close()
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_end_of_the_trainer_leaves_nothing(world, sign):
    code = TRAINER.format(repo=str(pathlib.Path(mlerl.__file__).parent), public=str(world.data / "public"),
                          private=str(world.data / "private"))
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True, start_new_session=True)
    stage = trainer.stdout.readline().strip()
    assert stage and leftovers(stage)
    cpu = sum(map(int, open(f"/proc/{trainer.pid}/stat").read().split()[13:15]))
    time.sleep(2)
    assert sum(map(int, open(f"/proc/{trainer.pid}/stat").read().split()[13:15])) - cpu <= 2, "a waiting trainer is idle"
    os.killpg(trainer.pid, sign)
    trainer.wait(10)
    end = time.monotonic() + 10
    while (leftovers(stage) or os.path.exists(stage)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not leftovers(stage) and not os.path.exists(stage)


def test_refuses_where_answers_or_trainer_are_open():
    with pytest.raises(mlerl.UserError, match="unsafe-exec"):
        World([[]])
    world = World([[]], unsafe_exec=True)
    assert any("NOT out of their reach: private answers" in line for line in world.pool.report)
    world.close()


def test_the_probe_finds_answers_that_are_given_by_a_relative_path(tmp_path, monkeypatch):
    """As --data-dir data, the default, gives them: programs run in another folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlerl, "WALLS", ([],))
    for folder in ("data/public", "data/private"):
        pathlib.Path(folder).mkdir(parents=True)
    pathlib.Path("data/private/answers.csv").write_text(ANSWER)
    with pytest.raises(mlerl.UserError, match="unsafe-exec"):
        mlerl.Pool(config(), {"t": "data/public"}, ["data/private"], SECRET)


@pytest.mark.skipif(os.getuid() != 0, reason="runs as an ordinary user already")
@pytest.mark.parametrize("who, level", [
    ("setpriv --reuid=65534 --regid=65534 --clear-groups", "best"), ("", "container")])
def test_threats_as_an_ordinary_user_and_as_root_without_namespaces(who, level):
    """Some of these tests again, the Python of a closed /root made readable by a bind mount."""
    base = sys.base_prefix
    box = pathlib.Path(tempfile.mkdtemp(prefix="user-"))
    box.chmod(0o777)
    script = "" if not base.startswith("/root/") else f"""
        mkdir {box}/py && mount --bind {base} {box}/py && mount -t tmpfs -o mode=755 tmpfs /root || exit 99
        mkdir -p {base} && mount --bind {box}/py {base} || exit 99
    """
    script += f"exec {who} env HOME={box} TMPDIR={box} {sys.executable} -m pytest -q -p no:cacheprovider {__file__} -rs "
    script += f"-k '{level} and (answers_are or killed or elsewhere or outlives or proc or plain_file or death or network or forged or other or keys or output)'"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True)
    subprocess.run(["rm", "-rf", box])
    if done.returncode == 99 or "unshare" in done.stderr or "setpriv" in done.stderr or "No module" in done.stderr:
        pytest.skip("no way to become an ordinary user: " + done.stderr[-200:])
    if "do not work on this machine" in done.stdout:
        pytest.skip(done.stdout[-300:])
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:] + done.stderr[-500:]


# --------------------------------------------------------------------------------------------------
# The grader and the tasks
# --------------------------------------------------------------------------------------------------
import hashlib, io, itertools, json, math, os, pathlib, shutil, subprocess, sys, zipfile

import numpy as np
import pandas as pd
import pytest

REPO = pathlib.Path(os.environ.get("MLERL_REPO") or pathlib.Path(__file__).resolve().parent)
sys.path.insert(0, str(REPO))

import grade  # noqa: E402

TASKS = grade.load_tasks()
WORDS = "insults essay pizza tweet may dec patent plant leaf nomad spooky lmsys"  # one of each name
SHORT = {word: next(name for name in TASKS if word in name) for word in WORDS.split()}
REAL = ("pizza", "insults", "tweet", "patent", "leaf", "nomad", "spooky", "plant")

def kaggle_dir():
    """Folder of real raw Kaggle files, or None."""
    folder = pathlib.Path(os.environ.get("MLERL_KAGGLE") or REPO.parent / "shared" / "kaggle")
    return folder if folder.is_dir() else None

@pytest.fixture(autouse=True, scope="session")
def no_kaggle_token(tmp_path_factory):
    """A developer's own Kaggle token must not make a test download anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path_factory.mktemp("no-token")))
        patch.delenv("KAGGLE_USERNAME", raising=False)
        yield

def task(short):
    return TASKS[SHORT[short]]

def csv_bytes(table):
    return table.to_csv(index=False).encode()

def invalid(t, submission, answers, word=""):
    """The submission is refused, with a one-line reason that holds `word`."""
    with pytest.raises(grade.InvalidSubmission) as caught:
        grade.grade(t, submission, answers)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 400

# --------------------------------------------------------------------------------------------------
# Metrics against oracles written from the definitions

def slow_auc(truth, score):
    pairs = [(p, n) for (p, y), (n, v) in itertools.product(zip(score, truth), repeat=2) if y > v]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)

def slow_kappa(a, b):
    rank = {v: k for k, v in enumerate(sorted(set(a) | set(b)))}
    observed = sum((rank[x] - rank[y]) ** 2 for x, y in zip(a, b))
    return 1 - observed / (sum((rank[x] - rank[y]) ** 2 for x in a for y in b) / len(a))

def test_metrics_match_slow_oracles():
    rng = np.random.default_rng(0)
    for levels in (2, 5, 1000):  # few levels: many ties, which count half
        truth, score = np.arange(60) % 2, rng.integers(0, levels, 60) / levels
        assert grade.roc_auc(truth, score) == pytest.approx(slow_auc(truth, score), abs=1e-12)
        a, b = rng.integers(-2, levels, 50), rng.integers(0, levels, 50) * 3  # ranks, not values
        wanted = slow_kappa(a.tolist(), b.tolist())
        assert grade.quadratic_kappa(a, b) == pytest.approx(wanted, abs=1e-12)
    assert grade.quadratic_kappa(np.array([1, 2, 3, 3, 2]), np.full(5, 3)) == 0.0

def test_metrics_by_hand():
    p = np.array([[0.5, 0.25, 0.25], [0.2, 0.1, 0.6]])  # the second row sums to 0.9, and stays so
    loss = grade.log_loss(np.array([[1, 0, 0], [0, 1, 0]]), p)
    assert loss == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2)
    clipped = grade.log_loss(np.array([[1, 0]]), np.array([[0, 1]]))
    assert clipped == pytest.approx(36.0437, abs=1e-4)
    assert grade.word_jaccard(["a a b", "Sooo SAD"], ["A b", "sooo sad I will"]) == (1 + 0.5) / 2
    truth, given = np.array([0.0, 1.0, 3.0]), np.array([1.0, 1.0, 1.0])
    assert grade.rmsle(truth, given) == pytest.approx(math.sqrt(2 * math.log(2) ** 2 / 3))
    assert grade.accuracy(np.array([1, 2, 3, 4]), np.array([1.0, 2.0, 9.0, 4.0])) == 0.75
    x, y = np.array([1.0, 2.0, 4.0, 9.0]), np.array([2.0, 1.0, 5.0, 6.0])
    r = (x - 4) @ (y - 3.5) / math.sqrt(((x - 4) ** 2).sum() * ((y - 3.5) ** 2).sum())
    for scale in (1, 1e300, 1e-300):  # neither overflows nor underflows
        assert grade.pearson(x, y * scale) == pytest.approx(r, abs=1e-12)
    assert math.isnan(grade.pearson(x, np.full(4, 0.1))) and math.isnan(grade.pearson(x, x * 0))

# --------------------------------------------------------------------------------------------------
# Validity rules

def example(short, n=12):
    """(task, answers, a good submission), whose rows are shuffled where they are aligned by id."""
    t, rng = task(short), np.random.default_rng(5)
    numbered, targets = short in ("may", "dec", "nomad", "leaf", "lmsys"), t["targets"]
    ids = {t["id"]: list(range(100, 100 + n)) if numbered else [f"key {k}" for k in range(n)]}
    p = rng.dirichlet(np.ones(len(targets)) * 3, n).round(4)
    p[:, -1] = np.abs(1 - p[:, :-1].sum(axis=1))
    make = {"log_loss": lambda k: ((np.arange(n) % len(targets) == k).astype(int), p[:, k]),
            "roc_auc": lambda k: ((np.arange(n) + k) % 2, rng.random(n)),
            "quadratic_kappa": lambda k: rng.integers(1, 7, (2, n)),
            "accuracy": lambda k: rng.integers(1, 7, (2, n)),
            "word_jaccard": lambda k: ([f"so sad {i % 3}" for i in range(n)],
                                       [f"very sad {i % 4}" for i in range(n)]),
            "pearson": lambda k: rng.random((2, n)), "rmsle": lambda k: rng.random((2, n))}
    pairs = {c: make[t["metric"]](k) for k, c in enumerate(targets)}
    truth, given = (pd.DataFrame({**ids, **{c: v[k] for c, v in pairs.items()}}) for k in (0, 1))
    return t, truth, given if short == "nomad" else given.sample(frac=1, random_state=0)

@pytest.mark.parametrize("short", SHORT)
def test_validity_matrix(short, tmp_path):
    """MLE-bench's rules, cell by cell, each through a CSV file's bytes."""
    t, truth, good = example(short)
    key, target, score = t["id"], t["targets"][0], grade.grade(t, csv_bytes(good), truth)
    path = tmp_path / "s.CSV"
    path.write_bytes(b"\xef\xbb\xbf" + csv_bytes(good))
    assert type(score) is float and score == grade.grade(t["name"], path, truth)
    assert score == grade.grade(t, io.BytesIO(csv_bytes(good)), truth)
    turned = good if short == "spooky" else good[good.columns[::-1]]
    assert grade.grade(t, csv_bytes(turned), truth) == score

    def cell(value):
        bad = good.astype({target: object})
        bad.iloc[3, bad.columns.get_loc(target)] = value
        return csv_bytes(bad)

    if short == "spooky":
        invalid(t, csv_bytes(good[good.columns[[1, 0, 2, 3]]]), truth, "first column")
    if short in ("plant", "leaf", "spooky"):
        invalid(t, csv_bytes(good.assign(note=1)), truth, "extra column")
    else:
        assert grade.grade(t, csv_bytes(good.assign(note=1)), truth) == score
    for rows in (good.iloc[1:], pd.concat([good, good.iloc[:1]]), good.iloc[:0]):
        invalid(t, csv_bytes(rows), truth)
    wrong = csv_bytes(good.replace({key: {truth[key][5]: truth[key][6]}}))
    if short == "nomad":  # aligned by position
        assert grade.grade(t, wrong, truth) == score
        assert grade.grade(t, csv_bytes(good.drop(columns=key)), truth) == score
        assert grade.grade(t, csv_bytes(good[::-1]), truth) != score
        invalid(t, cell(-0.01), truth, "at least 0")
    else:
        invalid(t, wrong, truth, repr(key))
        invalid(t, csv_bytes(good.drop(columns=key)), truth, repr(key))
    invalid(t, csv_bytes(good.rename(columns={target: target.upper() + "X"})), truth, repr(target))
    if short == "may":  # ids as floats and predictions as booleans are numbers
        assert grade.grade(t, csv_bytes(good.astype({"id": float})), truth) == score
        invalid(t, csv_bytes(good.assign(id="x")), truth, "'id'")
        said = good.assign(target=good["target"] > 0.5)
        as_numbers = grade.grade(t, said.astype({"target": int}), truth)
        assert grade.grade(t, csv_bytes(said), truth) == as_numbers
    if short == "tweet":
        assert grade.grade(t, cell(None), truth) < score + 1e-12
        return
    invalid(t, cell(None), truth, "missing")
    invalid(t, cell("inf"), truth)
    if short == "dec":
        assert grade.grade(t, cell("two"), truth) == 0.0
    else:
        invalid(t, cell("text"), truth, "numeric")
    if short in ("insults", "pizza", "may", "leaf", "spooky", "lmsys"):
        invalid(t, cell(1.5), truth, "at most 1")
        invalid(t, cell(-0.1), truth, "at least 0")
    if short in ("plant", "patent"):
        assert type(grade.grade(t, cell(-7.5), truth)) is float
    if short in ("essay", "dec"):
        invalid(t, cell(3.5), truth, "whole numbers")
        invalid(t, cell(1e300), truth, "whole numbers")
        assert type(grade.grade(t, cell(3.0), truth)) is float
        assert type(grade.grade(t, cell(99), truth)) is float

@pytest.mark.parametrize("short, off, fine", [
    ("lmsys", 4e-7, True), ("lmsys", 6e-7, False), ("spooky", 1.0e-5, True),
    ("spooky", 1.3e-5, False), ("leaf", 1.0e-5, True), ("leaf", 1.3e-5, False)])
def test_validity_row_sums(short, off, fine):
    t, truth, good = example(short)
    off_by = good.assign(**{t["targets"][0]: good[t["targets"][0]] + off})
    if fine:
        assert type(grade.grade(t, csv_bytes(off_by), truth)) is float
    else:
        invalid(t, csv_bytes(off_by), truth, "add up")

def test_validity_repeated_keys_and_nan_scores():
    t = task("insults")
    truth = pd.DataFrame({"Comment": ["a", "b", "a", "c"], "Insult": [1, 0, 1, 0]})
    good = pd.DataFrame({"Insult": [0.9, 0.2, 0.1, 0.4], "Comment": ["a", "c", "a", "b"]})
    # pairs (0.9, 0.1) against (0.4, 0.2): 2 of 4 right, however the two a's are placed
    assert grade.grade(t, good, truth) == grade.grade(t, good[::-1], truth) == 0.5
    invalid(t, good.assign(Comment=["a", "c", "b", "b"]), truth, "Comment")
    t, truth, good = example("patent")
    invalid(t, good.assign(score=0), truth, "not a number")

def test_validity_unreadable_files(tmp_path, monkeypatch):
    t, truth, good = example("pizza")
    n, data = grade.MAX_COLUMNS + 1, csv_bytes(good)
    for bad, word in ((b"", "empty"), (b" \n\n", "empty"), (b"\xff\xfe\x00bad", "UTF-8"),
                      (b"\0" * 99, ""), (b"a," * n + b"\n", "columns"), (b'"' * 1001, ""),
                      (b"a,b\n" + b"1," * n + b"\n", "columns"), (data[:-40], ""),
                      (b"a" * (grade.HEAD_BYTES + 9), ""), (b"PK\x03\x04" + os.urandom(500), "")):
        invalid(t, bad, truth, word)
    (tmp_path / "good.txt").write_bytes(data)
    for path in (tmp_path / "none.csv", tmp_path, str(tmp_path / "good.txt")):
        invalid(t, path, truth, "no .csv file")
    monkeypatch.setattr(grade, "MAX_BYTES", 100)
    monkeypatch.setattr(grade, "read_csv", None)  # would fail if it were reached
    invalid(t, data, truth, "over 100 bytes")
    invalid(t, io.BytesIO(data), truth, "over 100 bytes")

VALUES = (b"|NaN|inf|-inf|1e999|-1|2|0.5|1e-320|True|x|\"|\"\"|\0|\xff|-0.0|0x10|1+2j|\r|1_000| 1 |"
          b"a,b|18446744073709551615|-9223372036854775808|None|\xc3\xa9|1e308|-1e308|id|[1]|"
          + b"9" * 30 + b"|" + b"9" * 400).split(b"|")

def fuzz(data, rng):
    """One random mutation of CSV bytes: of a cell, a column, the lines or of raw bytes."""
    lines, kind, value = data.split(b"\n"), rng.integers(6), VALUES[rng.integers(len(VALUES))]
    r, at = int(rng.integers(len(lines))), int(rng.integers(len(data) + 1))
    if kind < 2:
        lines[r] = b",".join([*lines[r].split(b",")[kind:], value][:len(lines[r].split(b","))])
    elif kind == 2:
        lines[1:] = [b",".join(line.split(b",")[:-1] + [value]) for line in lines[1:]]
    elif kind == 3:
        lines[r:r + 1] = [lines[int(rng.integers(len(lines)))]] * int(rng.integers(3))
    elif kind == 4:
        return data[:at] + rng.bytes(int(rng.integers(9))) + data[at + int(rng.integers(9)):]
    else:
        return data[:at]
    return b"\n".join(lines)

@pytest.mark.parametrize("short", SHORT)
def test_fuzzed_submissions_score_or_are_invalid(short):
    """A float or InvalidSubmission, never anything else. MLERL_FUZZ sets the number (per task)."""
    t, truth, good = example(short)
    rng = np.random.default_rng(len(short) * 7)
    for _ in range(int(os.environ.get("MLERL_FUZZ", 60))):
        data = csv_bytes(good)
        for _ in range(int(rng.integers(1, 4))):
            data = fuzz(data, rng)
        try:
            score = grade.grade(t, data, truth)
            assert type(score) is float and math.isfinite(score)
        except grade.InvalidSubmission as error:
            assert str(error)

def test_grade_on_some_rows_checks_all():
    t, truth, good = example("pizza", 40)
    target, rows = t["targets"][0], np.arange(40) % 3 != 0
    given = good.set_index("request_id").loc[truth["request_id"], target].to_numpy()
    wanted = slow_auc(truth[target][rows].tolist(), given[rows].tolist())
    assert grade.grade(t, good, truth, rows) == pytest.approx(wanted, abs=1e-12)
    with pytest.raises(grade.InvalidSubmission):  # the fault is in another row
        grade.grade(t, truth.assign(**{target: np.where(rows, given, 5.0)}), truth, rows)
    for mask in (np.zeros(40, bool), np.ones(3, bool), np.arange(40) % 2 == 0):
        with pytest.raises(grade.DataError):
            grade.grade(t, good, truth, mask)

def test_grade_faults_of_the_answers_are_ours(tmp_path):
    t, truth, good = example("pizza")
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x00")
    for answers in (tmp_path / "none.csv", tmp_path / "empty.csv", tmp_path / "binary.csv",
                    truth.drop(columns="request_id"), truth[:0], tmp_path,
                    truth.assign(requester_received_pizza=1)):
        with pytest.raises(grade.DataError) as caught:
            grade.grade(t, good, answers)
        assert "\n" not in str(caught.value)

def test_medals_are_decided_on_rounded_scores():
    t, leaf = task("pizza"), task("leaf")
    for score, wanted in ((0.97908, "gold"), (0.9790749, "silver"), (0.69209, None),
                          (0.6921, "bronze"), (0.69209500001, "bronze")):
        assert grade.medal(t, score) == wanted, score
    assert [grade.medal(leaf, s) for s in (2e-16, 0.01526, 0.01527)] == ["gold", "bronze", None]
    assert grade.lead(t, 0.6, "median") > 0 >= grade.lead(t, 0.599591, "median")
    assert grade.lead(leaf, 0.1, "median") > 0 > grade.lead(leaf, 0.11, "median")

def test_tasks_are_complete():
    for t in TASKS.values():
        steps = [t[k] for k in ("median", "bronze", "silver", "gold")]
        assert steps == sorted(steps, reverse=not t["higher_is_better"])
        assert t["higher_is_better"] is grade.METRICS[t["metric"]][1]
        assert [len(t["paper"][k]) for k in ("Table 1", "Table 2", "Table 4")] == [5, 3, 2]
        assert {f"public/{t['train']}", f"private/{t['answers']}"} < set(t["md5"])
    assert len(TASKS) == len(SHORT) == 12 and len(task("leaf")["numeric"]) == 192

# --------------------------------------------------------------------------------------------------
# Preparation

@pytest.fixture(scope="session")
def standins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standins")
    for t in TASKS.values():
        assert grade.ensure_data(t, folder) is True
    return folder

@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """Data folder with the eight real tasks that are at hand, prepared once."""
    raw = kaggle_dir()
    if raw is None:
        pytest.skip("no real Kaggle files: set MLERL_KAGGLE")
    folder = tmp_path_factory.mktemp("real")
    plants = folder / "raw-plants"
    (plants / "images").mkdir(parents=True)
    shutil.copy(raw / SHORT["plant"] / "train.csv", plants)
    for k in range(1821):  # the photos are not at hand and not checksummed
        (plants / "images" / f"Train_{k}.jpg").write_bytes(b"%d" % k)
    for short in REAL:
        source = plants if short == "plant" else raw
        assert grade.ensure_data(SHORT[short], folder, source) is False
    return folder

def test_real_preparation_has_mle_benchs_md5s_and_sample_scores(real, capsys):
    assert grade.main(["verify", *(SHORT[s] for s in REAL), "--data-dir", str(real)]) == 0
    assert capsys.readouterr().out.count(": ok\n") == sum(len(task(s)["md5"]) for s in REAL)
    for t in map(task, REAL):
        public, private = grade.paths(t, real)
        if t["sample_score"] is None:
            invalid(t, public / t["sample"], private / t["answers"], "not a number")
        else:
            score = grade.grade(t, public / t["sample"], private / t["answers"])
            assert round(score, 5) == t["sample_score"]

def test_real_files_beside_the_tables(real):
    leaf, nomad, plants = (grade.paths(SHORT[s], real)[0] for s in ("leaf", "nomad", "plant"))
    assert len(list((leaf / "images").iterdir())) == 990
    assert [len(list((nomad / p).glob("*/geometry.xyz"))) for p in ("train", "test")] == [2160, 240]
    with zipfile.ZipFile(kaggle_dir() / SHORT["nomad"] / "train.zip") as packed:
        second = packed.read("train/757/tmp_geometry.xyz")  # of two files in one folder, the last
    assert (nomad / "train/2121/geometry.xyz").read_bytes() == second
    order = np.random.RandomState(0).permutation(1821)
    assert (plants / "images/Test_0.jpg").read_bytes() == b"%d" % order[0]
    assert (plants / "images/Train_1637.jpg").read_bytes() == b"%d" % order[-1]

def kinds(path):
    """{column: kind of value} of a table: number, text, or the types of the JSON values."""
    if path.suffix == ".json":
        records = json.loads(path.read_text())
        return {c: {type(r[c]).__name__ for r in records} for c in records[0]}
    table = pd.read_csv(path)
    return {c: {str(table[c].dtype) if table[c].dtype.kind in "if" else "text"} for c in table}

@pytest.mark.parametrize("short", REAL)
def test_standin_has_the_real_schema(short, real, standins):
    t = task(short)
    for file in t["md5"]:
        truth = kinds(real / t["name"] / "prepared" / file)
        made = kinds(standins / t["name"] / "prepared" / file)
        assert list(made) == list(truth), file
        assert all(made[c] <= truth[c] for c in truth), file  # rare types need not occur

def raw_of(short, folder, rows=50, seed=0):
    """A small raw folder of the task, imitated."""
    t = dict(task(short))
    t["standin"] = dict(t["standin"], rows=rows)
    grade.make_raw(t, folder, seed)
    return t

def tree(folder):
    """{relative path: content} of every file."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

def test_prepare_accepts_every_layout_of_the_raw_files(tmp_path):
    plain, zips, extracted = (tmp_path / kind for kind in ("plain", "zips", "extracted"))
    t = raw_of("nomad", plain)
    zips.mkdir()
    shutil.make_archive(str(zips / "train.csv"), "zip", plain, "train.csv")
    shutil.make_archive(str(zips / "train"), "zip", plain, "train")
    (extracted / "train.csv").mkdir(parents=True)
    shutil.copy(plain / "train.csv", extracted / "train.csv" / "train.csv")
    shutil.copytree(plain / "train", extracted / "train" / "train")
    made = []
    for raw in (plain, zips, extracted):
        assert grade.ensure_data(t, tmp_path / "out" / raw.name, raw) is False
        made.append(tree(grade.paths(t, tmp_path / "out" / raw.name)[0].parent))
    assert made[0] == made[1] == made[2] and len(made[0]) == 4 + 50

def test_prepare_second_run_does_nothing_and_a_users_cache_is_not_touched(standins, tmp_path):
    t = task("spooky")
    shutil.copytree(standins / t["name"] / "prepared", tmp_path / t["name"] / "prepared")
    (tmp_path / t["name"] / "prepared" / "STANDIN").unlink()  # now it looks like a user's own data
    before = tree(tmp_path)
    assert grade.ensure_data(t, tmp_path) is False
    assert grade.ensure_data(t, tmp_path, raw=tmp_path / "nowhere") is False
    assert grade.main(["standin", t["name"], "--data-dir", str(tmp_path)]) == 0
    assert tree(tmp_path) == before
    (tmp_path / t["name"] / "prepared/public" / t["test"]).unlink()
    with pytest.raises(grade.DataError, match="test.csv"):  # incomplete: said, not repaired
        grade.ensure_data(t, tmp_path)

def test_prepare_interrupted_leaves_nothing_half_written(tmp_path, monkeypatch):
    t, home = raw_of("nomad", tmp_path / "raw"), tmp_path / SHORT["nomad"]
    for problem, seen in ((OSError(28, "No space left"), grade.DataError),
                          (KeyboardInterrupt(), KeyboardInterrupt)):
        def stop(*_, problem=problem):
            assert len(list(home.glob("*/new/public/train/*"))) == 45  # half of the work is done
            raise problem
        with monkeypatch.context() as patch, pytest.raises(seen):
            patch.setattr(grade, "write_table", stop)
            grade.ensure_data(t, tmp_path, tmp_path / "raw")
        assert not list(home.iterdir())
    grade.ensure_data(t, tmp_path, tmp_path / "raw")
    assert [p.name for p in home.iterdir()] == ["prepared"]

def test_prepare_by_two_processes_at_once(tmp_path):
    command = [sys.executable, str(REPO / "grade.py"), "standin", SHORT["pizza"],
               "--data-dir", str(tmp_path)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate()[1] for process in running]
    assert [p.returncode for p in running] == [0, 0] and b"Traceback" not in b"".join(said)
    assert not grade.missing_files(task("pizza"), tmp_path)
    assert [p.name for p in (tmp_path / SHORT["pizza"]).iterdir()] == ["prepared"]

def test_prepare_errors_name_the_file(tmp_path):
    raw, t = tmp_path / "raw", raw_of("plant", tmp_path / "raw")
    next((raw / "images").iterdir()).unlink()
    for word, change in (("no Train_", None), ("train.csv", b"\xff\xfe\0bad"),
                         ("image_id", b"a,b\n1,2\n3,4\n5,6\n")):
        if change:
            (raw / "train.csv").write_bytes(change)
        with pytest.raises(grade.DataError, match=word):
            grade.ensure_data(t, tmp_path, raw)
    (raw / "train.csv").rename(raw / "train.csv.zip")
    with pytest.raises(grade.DataError, match="train.csv.zip is a damaged zip"):
        grade.ensure_data(t, tmp_path, raw)

def test_drop_columns_takes_them_from_tables_and_deletes_zips(standins, tmp_path):
    t = task("pizza")
    public = shutil.copytree(grade.paths(t, standins)[0], tmp_path / "public")
    grade.drop_columns(public, [])
    assert tree(public) == tree(grade.paths(t, standins)[0])
    grade.drop_columns(public, t["leaks"])
    assert {p.name for p in public.iterdir()} == {t["train"], t["test"], t["sample"]}
    for name in (t["train"], t["test"]):
        old = json.loads((grade.paths(t, standins)[0] / name).read_text())
        for record in old:
            del record[t["leaks"][0]]
        assert json.loads((public / name).read_text()) == old

# --------------------------------------------------------------------------------------------------
# The tiny policy's corpus: programs composed of fragments

def family(response):
    """What a program of the corpus trains, by its plan."""
    plan = response.split("\n")[0]
    return "constant" if plan.startswith("Predict") else next(
        (words for _, words, _ in sorted(prompts.MODELS, key=lambda m: -len(m[1])) if words in plan))


def test_corpus_is_seeded_diverse_and_has_few_constants_and_no_leak():
    t = task("pizza")
    pairs = prompts.corpus(t, 1500, 3)
    assert pairs == prompts.corpus(t, 1500, 3) and pairs[:50] != prompts.corpus(t, 50, 4)
    assert len({code for _, code in pairs}) > 1350
    assert sum(family(r) == "constant" for _, r in pairs) <= 0.05 * len(pairs)
    assert not any(leak in str(pair) for leak in t["leaks"] for pair in pairs)


def test_corpus_bugs_hit_no_family_half_as_often_again_as_another():
    t, rng, bugged = task("pizza"), random.Random(0), {}
    for _ in range(4000):
        spec = prompts.draw(rng, t)
        plan, stages = prompts.render(t, spec)
        spoilt = stages
        for _ in range(rng.choice(prompts.N_BUGS) if rng.random() < prompts.P_BUG else 0):
            spoilt = prompts.spoil(rng, spoilt)
        bugged.setdefault(family(plan), []).append(spoilt != stages)
    shares = {name: np.mean(hits) for name, hits in bugged.items() if name != "constant"}
    assert len(shares) == len(prompts.MODELS)
    assert max(shares.values()) <= 1.5 * min(shares.values())
    assert max(1 - s for s in shares.values()) <= 3 * min(1 - s for s in shares.values())


def test_corpus_strong_learners_never_meet_many_groups_of_columns():
    t, rng = task("pizza"), random.Random(1)
    for spec in (prompts.draw(rng, t) for _ in range(3000)):
        if spec["model"] and spec["model"][0] > 0:
            assert sum(groups for *_, groups in spec["features"]) <= 1


@pytest.mark.parametrize("short", ["insults", "spooky"])
def test_corpus_plans_of_text_only_tasks_name_the_vectorizer_and_a_third_use_one(short):
    t, rng, whole = task(short), random.Random(2), 0
    for spec in (prompts.draw(rng, t) for _ in range(1000)):
        plan, stages = prompts.render(t, spec)
        model = stages.get("model", "")  # a feature may weigh terms, too: that is not the model
        assert ("CountVectorizer" in model) == (" of counts" in plan)
        assert ("TfidfVectorizer" in model) == (" of terms" in plan)
        whole += "Vectorizer" in model
    assert 250 < whole < 450


def test_corpus_programs_without_bugs_are_valid_on_every_task(standins, tmp_path):
    cfg = config(run=str(tmp_path / "run"), workers=2, timeout=40, cpu_limit=8, memory_gb=2.0,
                 instrument="ast")
    D = {task(short)["name"]: grade.open_task(task(short)["name"], standins) for short in SHORT}
    env, rng, attempts = mlerl.Environment(cfg, D), random.Random(7), []
    with contextlib.closing(env.pool):
        for t in D.values():
            for k in range(2):
                plan, stages = prompts.render(t, prompts.draw(rng, t))
                attempts.append(mlerl.Attempt(t["name"], "solve", [], plan=plan,
                                              code="".join(stages.values())))
        env.submit(attempts)
        batch, _ = env.collect(len(attempts), -1, True)
    for a in batch:
        if a.outcome != "timeout" or len(D[a.task]["targets"]) < 9:  # 99 classes: slow boosting
            assert a.valid, (a.task, a.plan, a.code, a.outcome, a.reason, a.output)
            assert any(mark.startswith("predicted") for mark in a.marks) or "Predict" in a.plan


@pytest.mark.parametrize("short, other", [("plant", {"name": "pears"}), ("tweet", {"text": ["text"]})])
def test_corpus_refuses_what_it_has_no_fragments_for_in_one_line(short, other):
    with pytest.raises(grade.DataError, match="choose a --model"):
        prompts.corpus(task(short) | other, 5, 0)


def test_corpus_programs_stay_below_the_bar_on_the_real_data(real, tmp_path):
    t = grade.open_task(SHORT["pizza"], real)
    cfg = config(run=str(tmp_path / "run"), workers=2, timeout=60, cpu_limit=60, memory_gb=4.0)
    env, rng = mlerl.Environment(cfg, {t["name"]: t}), random.Random(8)
    with contextlib.closing(env.pool):
        for k in range(12):
            plan, stages = prompts.render(t, prompts.draw(rng, t))
            env.submit([mlerl.Attempt(t["name"], "solve", [], plan=plan,
                                      code="".join(stages.values()))])
        batch, _ = env.collect(12, -1, True)
    assert all(a.valid for a in batch) and max(a.score for a in batch) <= 0.66

# --------------------------------------------------------------------------------------------------
# Stand-ins

@pytest.mark.parametrize("short", SHORT)
def test_standin_is_complete_and_marked(short, standins):
    t = task(short)
    public, private = grade.paths(t, standins)
    if short == "patent":
        invalid(t, public / t["sample"], private / t["answers"], "not a number")
    else:
        assert type(grade.grade(t, public / t["sample"], private / t["answers"])) is float
    assert {p.name for p in public.parent.iterdir()} == {"public", "private", "STANDIN"}
    made = {str(p.relative_to(public.parent)) for p in public.parent.glob("p*/*") if p.is_file()}
    assert {m for m in made if not m.endswith(".zip")} == set(t["md5"])
    test = pd.read_json(public / t["test"]) if t["test"].endswith("json") else pd.read_csv(
        public / t["test"])
    assert set(t["text"] + t["numeric"] + t["leaks"]) <= set(test.columns)  # what prompts name

def test_standin_is_deterministic_for_a_seed_and_gives_way_to_real_data(standins, tmp_path):
    for short in ("pizza", "nomad", "plant"):
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            raw_of(short, tmp_path / short / name, seed=seed)
        first, again, other = (tree(tmp_path / short / name) for name in "abc")
        assert first == again != other
    t = task("spooky")
    assert grade.ensure_data(t, tmp_path) is True
    raw_of("spooky", tmp_path / "raw")
    assert grade.ensure_data(t, tmp_path, tmp_path / "raw") is False
    assert not grade.is_standin(t, tmp_path)

def test_standin_of_pizza_has_a_signal_in_words_and_numbers(standins):
    """Logistic regression on words, a forest on the numbers, and the better of both together."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    t, (public, private) = task("pizza"), grade.paths(task("pizza"), standins)
    train, test = pd.read_json(public / t["train"]), pd.read_json(public / t["test"])
    words = TfidfVectorizer(max_features=300).fit(train["request_text_edit_aware"])
    a, b = (words.transform(x["request_text_edit_aware"]).toarray() for x in (train, test))
    n, m = train[t["numeric"]].to_numpy(float), test[t["numeric"]].to_numpy(float)
    forest = RandomForestClassifier(60, min_samples_leaf=5, max_features=0.2, random_state=0)
    guesses = [test[t["leaks"][0]].ne("N/A").astype(int)]
    for model, x, z in ((LogisticRegression(), a, b), (forest, n, m),
                        (forest, np.hstack([a, n]), np.hstack([b, m]))):
        fitted = model.fit(x, train[t["targets"][0]].astype(int))
        guesses.append(fitted.predict_proba(z)[:, 1])
    leak, text, numbers, both = (grade.grade(t, pd.DataFrame(
        {t["id"]: test[t["id"]], t["targets"][0]: p}), private / t["answers"]) for p in guesses)
    assert 0.55 < text < 0.68 and 0.58 < numbers < 0.72 and 0.6 < leak < 0.7, (text, numbers, leak)
    assert both > max(text, 0.62), (both, text)

# --------------------------------------------------------------------------------------------------
# Command line, Kaggle's client, a user's own task

def fails(capsys, arguments, word, code=2):
    """The command exits with the code and says one line that holds `word`."""
    assert grade.main([str(a) for a in arguments]) == code
    said = capsys.readouterr().err
    assert word in said and "Traceback" not in said and said.count("\n") == 1, said

def test_command_line_errors_are_one_line(capsys, tmp_path, standins):
    data, table, own = ["--data-dir", tmp_path / "data"], tmp_path / "x.csv", tmp_path / "own.json"
    fails(capsys, ["verify", "pizza", *data], "give random-acts-of-pizza,")
    fails(capsys, ["verify", "leaf-clasification", *data], "give leaf-classification")
    fails(capsys, ["verify", own, *data], "own.json")
    fails(capsys, ["prepare", SHORT["leaf"], *data], "--raw")
    fails(capsys, ["prepare", SHORT["leaf"], "--raw", tmp_path / "nowhere", *data], "nowhere")
    fails(capsys, ["prepare", SHORT["spooky"], "--data-dir", standins], "--raw")
    fails(capsys, ["score", SHORT["leaf"], table, *data], "x.csv")
    table.write_text("id\n1\n")
    fails(capsys, ["score", SHORT["leaf"], table, *data], "prepared")
    fails(capsys, ["standin", SHORT["leaf"], "--data-dir", table], "x.csv")
    fails(capsys, ["verify", SHORT["spooky"], "--data-dir", standins], "STAND-IN", code=1)

def test_command_line_scores_as_json(capsys, standins, tmp_path):
    t, bad = task("spooky"), tmp_path / "bad.csv"
    bad.write_text("id,EAP\nx,1\n")
    said = []
    for file in (grade.paths(t, standins)[0] / t["sample"], bad):
        assert grade.main(["score", t["name"], str(file), "--data-dir", str(standins)]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0]["valid"] and said[0]["standin"] and said[0]["medal"] is None
    assert said[0]["paper"] == t["paper"] and said[0]["gold"] == t["gold"]
    assert not said[1]["valid"] and said[1]["score"] is None and "'HPL'" in said[1]["reason"]

CLIENT = """import os, shutil, sys
if os.environ["FAKE"] == "403":
    sys.exit("403 Client Error: Forbidden for url")
shutil.copy(os.environ["FAKE"], sys.argv[sys.argv.index("-p") + 1])
"""

def test_kaggle_download_through_its_client(tmp_path, monkeypatch):
    t, data, site = task("spooky"), tmp_path / "data", tmp_path / "site/kaggle"
    (tmp_path / "kaggle.json").write_text("{}")
    site.mkdir(parents=True)
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(site.parent))
    with pytest.raises(grade.DataError, match="pip install kaggle"):
        grade.ensure_data(t, data)
    (site / "cli.py").write_text(CLIENT)
    monkeypatch.setenv("FAKE", "403")
    with pytest.raises(grade.DataError, match=f"403.*kaggle.com/c/{t['name']}/rules"):
        grade.ensure_data(t, data)
    assert not list((data / t["name"]).iterdir())
    raw_of("spooky", tmp_path / "raw")
    archive = shutil.make_archive(str(tmp_path / t["name"]), "zip", tmp_path / "raw")
    monkeypatch.setenv("FAKE", archive)
    assert grade.ensure_data(t, data) is False and not grade.is_standin(t, data)

def test_own_task_made_from_a_csv(tmp_path):
    raw, own = tmp_path / "raw", tmp_path / "pets.json"
    x = np.random.default_rng(0).normal(size=300)
    raw.mkdir()
    table = pd.DataFrame({"id": range(300), "x": x, "animal": np.where(x > 0.1, "dog", "cat")})
    table.to_csv(raw / "train.csv", index=False)
    record = {"goal": "Tell cats from dogs.", "metric": "accuracy", "id": "id",
              "targets": ["animal"], "prepare": {"sample": "cat"}}
    for change in ({"metric": "nonsense"}, {"goal": ""}, {"targets": "y"}):
        own.write_text(json.dumps({**record, **change}))
        with pytest.raises(grade.DataError, match="pets.json.*goal.*roc_auc"):
            grade.load_task(own)
    own.write_text(json.dumps(record))
    t = grade.load_task(own)
    with pytest.raises(grade.DataError, match="--raw"):
        grade.ensure_data(t, tmp_path)
    assert grade.ensure_data(t, tmp_path, raw) is False
    public, private = grade.paths(t, tmp_path)
    test = pd.read_csv(public / "test.csv")
    assert list(test.columns) == ["id", "x"] and len(test) == 60
    good = test[["id"]].assign(animal=np.where(test["x"] > 0.1, "dog", "cat"))
    assert grade.grade(t, good, private / t["answers"]) == 1.0
    assert grade.grade(t, public / t["sample"], private / t["answers"]) < 0.8
    assert grade.medal(t, 1.0) is None and grade.lead(t, 1.0, "median") < 0


# --------------------------------------------------------------------------------------------------
# python test_mlerl.py bench [seconds a figure]: ratios, measured side by side in one run
# --------------------------------------------------------------------------------------------------
MADE_UP = ("import numpy as np\nr = np.random.RandomState(0)\nx = r.rand(1000, 10)\n"
           "y = x[:, 0] + r.rand(1000) > 1\n")
BENCH = {
    "imports only": "import pandas, sklearn.ensemble, sklearn.linear_model\nprint('done')\n",
    "7 small logistic regressions": MADE_UP + "from sklearn.linear_model import LogisticRegression as L\n"
    "for c in (.01, .03, .1, .3, 1, 3, 10): print(round(L(C=c).fit(x, y).score(x, y), 4))\n",
    "gradient boosting, 40 rounds": MADE_UP + "from sklearn.ensemble import "
    "HistGradientBoostingClassifier as H\nprint(H(max_iter=40).fit(x, y).score(x, y))\n",
    "one CPU-second of training": MADE_UP + "import time\nfrom sklearn.linear_model import "
    "LogisticRegression as L\nend = time.process_time() + 1\n"
    "while time.process_time() < end: L().fit(x, y)\nprint('done')\n"}


def rate(submit, wait, seconds):
    """(programs a second, their outputs) with four in flight."""
    begun, count, outputs = time.monotonic(), 0, set()
    for _ in range(4):
        submit()
    while count < 4 or time.monotonic() < begun + seconds:
        outputs.add(wait())
        count += 1
        submit()
    spent = time.monotonic() - begun
    for _ in range(4):
        wait()
    return count / spent, outputs


TINY_SHAPE = dict(vocab_size=1300, hidden_size=128, intermediate_size=336, num_hidden_layers=4, num_attention_heads=4,
                  num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=1)


def beside_trl(lengths, micro, rounds, mini, prompt=64, T=200):
    """Seconds of PPO updates without generation by TRL's PPOTrainer and by ours, in turn, and the losses of the
    first one: {name: list}, {name: dict}. Same models, fresh samples, old log-probs, scores, mini- and micro-batches,
    one epoch, one thread; learning rates 0. TRL pads to T and leaves its reward model out here. TRL counts the place
    behind a short response as a token, so that losses agree at full length only."""
    import datasets
    import tokenizers
    import trl.experimental.ppo.ppo_trainer as ppo
    torch.manual_seed(0)
    torch.set_num_threads(1)
    n, vocab, seconds, losses = len(lengths), TINY_SHAPE["vocab_size"], dict(TRL=[], mlerl=[]), {}
    names = dict(policy_loss="loss/policy_avg", value_loss="loss/value_avg", clip_fraction="policy/clipfrac_avg",
                 entropy="policy/entropy_avg")
    cfg = mlerl.Config(dtype="float32", gradient_checkpointing=False, mini_batch=mini, micro_batch=micro, lr=0.0, critic_lr=0.0,
                       loss_agg="token", entropy_coef=0.0, actor_grad_clip=1e9, critic_grad_clip=1e9)
    words = tokenizers.models.WordLevel({"<end>": 0, "<pad>": 1, **{str(k): k for k in range(2, vocab)}}, unk_token="<pad>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), eos_token="<end>",
                                                     pad_token="<pad>", chat_template="{{ messages }}")
    with tempfile.TemporaryDirectory() as temp:
        folder = pathlib.Path(temp, "policy")
        mlerl.save_policy(folder, transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TINY_SHAPE)), tokenizer)
        learner = mlerl.Learner(cfg, folder)
        policy, value = (kind.from_pretrained(folder, dtype=torch.float32, **more) for kind, more in (
            (transformers.AutoModelForCausalLM, {}), (transformers.AutoModelForSequenceClassification, {"num_labels": 1})))
    value.load_state_dict(learner.critic.state_dict(), strict=False)
    with torch.no_grad():  # not the policy that sampled any more: ratios vary
        for model in (policy, learner.actor):
            model.model.norm.weight *= 1.3
    ids, scores = torch.randint(2, vocab, (n, prompt + T)), torch.randn(n)
    for row, m in zip(ids, lengths):
        row[prompt + m - 1], row[prompt + m:] = 0, 1
    with torch.no_grad():
        logits = learner.ref(ids, attention_mask=(ids != 1).long()).logits[:, prompt - 1:-1] / cfg.temperature
    logp = logits.log_softmax(-1).gather(-1, ids[:, prompt:, None])[..., 0]
    attempts = [mlerl.Attempt("t", "solve", row[:prompt].tolist(), response_ids=row[prompt:prompt + m].tolist(),
                              version=0, logp=old[:m].tolist(), R=float(R)) for row, m, old, R in zip(ids, lengths, logp, scores)]

    def ours():
        begun = time.perf_counter()
        x = mlerl.assemble(attempts, learner, cfg, 0)
        r = mlerl.shape_rewards(x.R, x.logp_old, x.logp_ref, x.mask, cfg.kl_coef)
        A, returns = mlerl.gae(r, x.V, x.mask, cfg.gamma, cfg.lam)
        A = mlerl.whiten(A, x.mask, ["t"] * n, x.R)
        stats = mlerl.update(learner, x, A, torch.ones(n), returns, cfg, 0)
        seconds["mlerl"].append(time.perf_counter() - begun)
        losses.setdefault("mlerl", {k: stats[k] for k in names})

    class Turn(transformers.TrainerCallback):
        begun = 0.0

        def on_log(self, args, state, control, logs=None, **_):
            if names["policy_loss"] in logs:
                losses.setdefault("TRL", {k: logs[theirs] for k, theirs in names.items()})

        def on_step_end(self, *_, **__):
            seconds["TRL"].append(time.perf_counter() - Turn.begun)
            ours()

    place = {tuple(row): k for k, row in enumerate(ids[:, :prompt].tolist())}

    def places(rows):  # looked up, since TRL's seconds run
        return [place[tuple(row)] for row in rows[:, :prompt].tolist()]

    def recorded(model, queries, *_):  # instead of generation
        out = ids[places(queries)], logits[places(queries)]
        Turn.begun = time.perf_counter()
        return out

    def get_reward(model, rows, *rest, get=ppo.get_reward):
        return get(model, rows, *rest) if model is value else (None, scores[places(rows)], None)

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(ppo, "batch_generation", recorded)
        patch.setattr(ppo, "get_reward", get_reward)
        args = ppo.PPOConfig(
            folder, per_device_train_batch_size=micro, gradient_accumulation_steps=n // micro, num_mini_batches=n // mini,
            num_ppo_epochs=1, total_episodes=rounds * n, response_length=T, temperature=cfg.temperature, stop_token_id=0,
            kl_coef=cfg.kl_coef, kl_estimator="k1", gamma=1.0, lam=1.0, cliprange=cfg.clip, cliprange_value=cfg.value_clip,
            vf_coef=1.0, learning_rate=1e-30, local_rollout_forward_batch_size=32, num_sample_generations=0, bf16=False,
            use_cpu=True, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True)
        data = datasets.Dataset.from_dict({"input_ids": ids[:, :prompt].tolist()})
        ppo.PPOTrainer(args, tokenizer, policy, copy.deepcopy(learner.ref), torch.nn.Linear(1, 1), data, value, eval_dataset=data,
                       callbacks=[Turn()], data_collator=lambda rows: {
                           "input_ids": torch.tensor([row["input_ids"] for row in rows])}).train()
    return seconds, losses


def bench_update():
    """Beside TRL's PPO, where it is installed (pip install trl==1.12.0 datasets, in an environment of its own)."""
    if not importlib.util.find_spec("trl"):
        print("\nPPO update beside TRL: skipped, no package trl here (1.12.0 is the last with PPO)")
        return
    _, losses = beside_trl([200] * 32, micro=32, mini=32, rounds=1)
    print("\nlosses of a first batch at full length:", losses)
    rng = np.random.default_rng(0)
    natural = np.clip(rng.lognormal(np.log(48), 0.32, 128), 8, 200).astype(int)  # as the untrained tiny policy writes
    natural[0] = 200
    for name, lengths, micro in (("natural lengths", natural, 4), ("natural lengths", natural, 8),
                                 ("full length", np.full(128, 200), 4)):
        seconds, _ = beside_trl(lengths.tolist(), micro=micro, mini=32, rounds=4)
        ours, trl = (sorted(seconds[who][1:])[1] for who in ("mlerl", "TRL"))  # the first one warms up
        print(f"PPO update, 128 x (64 + {name}, mean {lengths.mean():.0f}), micro-batches of {micro}: TRL {trl:.2f} s, "
              f"mlerl {ours:.2f} s, ratio {trl / ours:.2f}", flush=True)


def bench(seconds):
    env = dict(PATH=os.environ["PATH"], PYTHONHASHSEED="0", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

    def plain(code):
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout

    world = World(mlerl.WALLS)
    pool, usual = world.pool, world.pool.job
    print(f"\n{'programs a second, 2 workers':32}{'subprocess.run':>15}{'fresh':>8}{'forked':>8}{'forked/plain':>14}")
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        for name, code in BENCH.items():
            waiting, rates = [], []
            rates.append(rate(lambda: waiting.append(threads.submit(plain, code)),
                              lambda: waiting.pop(0).result(), seconds))
            for forked in (False, True):
                pool.job = usual | dict(forked=forked)
                for slot in pool.slots:  # a worker is either kind for good
                    pool.hang_up(slot)
                world.runs(["pass"] * 4)
                rates.append(rate(lambda: waiting.append(pool.submit(pool.run, "pizza", code)),
                                  lambda: waiting.pop(0).result()["output"], seconds))
            (a, out), (b, fresh), (c, ours) = rates
            print(f"{name:32}{a:15.2f}{b:8.2f}{c:8.2f}{c / a:13.1f}x  outputs equal: {out == fresh == ours}")
    pool.job = usual

    print("\nmilliseconds of an empty forked program in a row of them, medians of rounds side by side")
    spent = {}
    for _ in range(8):
        for walls in ([], usual["walls"]):
            for slot in pool.slots:
                pool.hang_up(slot) if spent.get("last") != walls else None
            spent["last"], pool.job = walls, usual | dict(walls=walls)
            world.runs(["pass"] * 4)
            begun = time.monotonic()
            for _ in range(20):
                world.run("pass")
            spent.setdefault(str(walls), []).append((time.monotonic() - begun) / 20 * 1000)
    del spent["last"]
    for walls, times in spent.items():
        print(f"{walls:50}{sorted(times)[len(times) // 2]:8.1f}")
    for slot in pool.slots:
        pool.hang_up(slot)
    pool.job = usual

    rng, B, m, busy = random.Random(0), 16, 2, 0.0
    world.runs(["pass"] * 4)
    begun, running = time.monotonic(), set()
    while time.monotonic() < begun + 10 * seconds:  # `carry`: sample, take B, update for a second
        while len(running) < m * B:
            code = f"import time; time.sleep({0.1 * 100 ** rng.random()})"
            running.add(pool.submit(pool.run, "pizza", code))
        for future in itertools.islice(concurrent.futures.as_completed(set(running)), B):
            running.remove(future)
            busy += future.result()["dt"]
        time.sleep(1)
    spent = time.monotonic() - begun
    busy += sum(time.monotonic() - slot.began for slot in pool.slots if slot.began)
    busy += sum(future.result()["dt"] for future in running if future.done())
    print(f"\nidle share of 2 workers under carry, B = {B}, m = {m}, 0.1 to 10 s: {1 - busy / (2 * spent):.1%}")
    world.close()
    bench_update()


def collectors(iterations):
    """What the learner sees of slow programs (3 in 10 of those sampled, 20 times longer), by collector: share of the
    batch, share of the weights of Eq. 3, mean staleness in updates. All m * B run at once; real executions."""
    B, rng = 8, random.Random(0)
    with tempfile.TemporaryDirectory() as data:
        D = [grade.open_task("random-acts-of-pizza", data, None, 0.0, 0)]
        env = mlerl.Environment(mlerl.Config(workers=2 * B, instrument="none"), {task["name"]: task for task in D})
        print(f"{'collector':24}{'slow share':>12}{'of weights':>12}{'staleness':>12}")
        for collect, m in (("wait", 1), ("first", 1.25), ("first", 2), ("carry", 2)):
            slow, weights, stale = [], [], []
            for i in range(iterations):
                env.submit([mlerl.Attempt(
                    D[0]["name"], "solve", [], version=i, plan="Wait.",
                    code=f"import time\ntime.sleep({2.0 if rng.random() < 0.3 else 0.1})")
                    for _ in range(round(m * B) - len(env.running))])
                batch, _ = env.collect(B, i, keep=collect != "first")
                stale += [i - a.version for a in batch]
                slow += [a.dt > 1 for a in batch]
                weights += mlerl.duration_weights([a.dt for a in batch], env.cfg).tolist()
            env.cancel()
            mass = sum(w for w, long in zip(weights, slow) if long) / sum(weights)
            print(f"{collect}, m = {m:<13}{np.mean(slow):12.2f}{mass:12.2f}{np.mean(stale):12.2f}", flush=True)
        env.pool.close()


SOAK = [  # two in three mean no harm
    "print('hello')", "open('submission.csv', 'w').write('x')", "import numpy as np\nprint(np.ones(3).sum())",
    "import pandas as pd\npd.DataFrame({'a': [1]}).to_csv('submission.csv')", "open('tmp/a', 'w').write('x' * 10 ** 6)",
    "import subprocess\nprint(subprocess.check_output('echo hi', shell=True))", "import threading\n"
    "t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()", "print('long ' * 20000)",
    "import sklearn.linear_model as l\nl.LogisticRegression().fit([[0.], [1.]], [0, 1])", "1 / 0", "raise SystemExit(3)",
    "import multiprocessing as m\nprint(m.get_context('fork').Value('i', 3).value)",
    # and one does
    "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        import time; time.sleep(1000)",
    "import os, signal\nfor s in range(1, 64):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    "os.fork(); os.kill(os.getppid(), 9) if os.getppid() > 1 else None",
    "import os\nos.makedirs('/'.join(['d'] * 60)); os.chmod('d', 0)", "import os\nos.mkfifo('submission.csv')",
    "import os\nos.mkdir('submission.csv')", "open('/dev/shm/left', 'w').write('x' * 10 ** 6)"]


def soak(n):
    """n short programs: what they leave behind, and the trainer's memory."""
    world = World(mlerl.WALLS, timeout=20)
    state = lambda: dict(
        trainer_mb=int(re.search(r"VmRSS:\s+(\d+)", open("/proc/self/status").read())[1]) // 1024,
        descriptors=len(os.listdir("/proc/self/fd")), processes=len(below(os.getpid())),
        files=sum(len(names) for _, _, names in os.walk(world.pool.stage)),
        workers_mb=sum(int(re.search(r"VmRSS:\s+(\d+)", open(f"/proc/{pid}/status").read())[1]) // 1024
                       for pid in below(os.getpid())))
    outcomes, begun = {}, time.monotonic()
    for k in range(0, n, 100):
        for r in world.runs([SOAK[j % len(SOAK)] for j in range(k, k + 100)]):
            outcomes[r.outcome] = outcomes.get(r.outcome, 0) + 1
        if k in (100, 1000) or (k + 100) % (n // 5) == 0:
            print(f"{k + 100:6} programs, {(k + 100) / (time.monotonic() - begun):.0f} a second", state(), outcomes, flush=True)
    world.close()


def raw_rows(task, n, rng):
    """Header and n rows, as text, of a raw training file with the real columns and about the real sizes."""
    def words(k):
        return " ".join(f"word{rng.randrange(5000)}" for _ in range(k))

    if task.startswith("tabular-playground-series-may"):
        columns = ["id", *(f"f_{k:02}" for k in range(31)), "target"]
        tails = [[rng.gauss(0, 1) for _ in range(7)] + [rng.randrange(10) for _ in range(11)]
                 + [rng.gauss(0, 2) for _ in range(9)] + ["".join(rng.choices("ABCDEFGH", k=10))]
                 + [rng.gauss(0, 90)] + [rng.randrange(2) for _ in range(3)]
                 for _ in range(5000)]
    elif task.startswith("tabular-playground-series-dec"):
        columns = ["Id", *(f"F{k}" for k in range(54)), "Cover_Type"]
        tails = [[rng.randrange(5000) for _ in range(10)] + [rng.randrange(2) for _ in range(44)] + [rng.randrange(1, 8)]
                 for _ in range(5000)]
    elif task.startswith("learning"):
        columns = ["essay_id", "full_text", "score"]
        tails = [[f'"{words(370)}, ""quoted""\nnew line"', rng.randrange(1, 7)] for _ in range(500)]
    else:
        columns = "id model_a model_b prompt response_a response_b winner_model_a winner_model_b winner_tie".split()
        tails = [["a", "b", f'"[""{words(60)}""]"', f'"[""{words(230)}""]"', f'"[""{words(230)}""]"', *labels]
                 for labels in rng.choices([(1, 0, 0), (0, 1, 0), (0, 0, 1)], k=500)]
    tails = [",".join(map(str, tail)) for tail in tails]
    yield ",".join(columns) + "\n"
    yield from (f"{'e' * ('essay_id' in columns)}{k},{tails[k % len(tails)]}\n" for k in range(n))


FULL_SIZE = {"tabular-playground-series-may-2022": (900_000, 100_000), "tabular-playground-series-dec-2021": (4_000_000, 400_000),
             "learning-agency-lab-automated-essay-scoring-2": (17_307, 1731), "lmsys-chatbot-arena": (57_477, 5748)}


def prepare_full_size(home):
    """Generated raw files with the real columns and row counts: seconds and peak memory of their preparation, each
    in its own process; row counts, ids by numpy's permutation, md5 of the samples that do not depend on the data."""
    for task, (n, n_test) in FULL_SIZE.items():
        raw = pathlib.Path(home, "raw", task)
        raw.mkdir(parents=True, exist_ok=True)
        with open(raw / "train.csv", "w") as file:
            file.writelines(raw_rows(task, n, random.Random(0)))
        begun = time.monotonic()
        command = [sys.executable, grade.__file__, "prepare", task, "--raw", str(raw), "--data-dir", str(home)]
        usage = "import resource, subprocess, sys; r = subprocess.run(sys.argv[1:]).returncode; " \
                "print(r, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)"
        said = subprocess.run([sys.executable, "-c", usage, *command], capture_output=True, text=True)
        seconds, (code, peak) = time.monotonic() - begun, said.stdout.split()[-2:]
        record, (public, private) = grade.load_task(task), grade.paths(task, home)
        test, answers = pd.read_csv(public / "test.csv"), private / record["answers"]
        rows = [len(pd.read_csv(p, usecols=[record["id"]])) for p in (public / "train.csv", public / "test.csv", answers)]
        order = np.random.RandomState(0).permutation(n)[:n_test]
        wanted = range(n - n_test, n) if "new_ids" in record["prepare"] else order
        ids = [f"e{k}" if task.startswith("learning") else k for k in wanted]
        md5 = record["md5"].get("public/sample_submission.csv") == hashlib.md5(
            (public / "sample_submission.csv").read_bytes()).hexdigest()
        print(f"{task:48} exit {code}, {raw.joinpath('train.csv').stat().st_size / 1e6:5.0f} MB raw, {seconds:5.1f} s, "
              f"peak {peak} MiB, rows right: {rows == [n - n_test, n_test, n_test]}, ids right: "
              f"{list(test[record['id']]) == list(ids)}, sample's md5: {md5}", said.stderr[-300:], flush=True)
        shutil.rmtree(raw)


if __name__ == "__main__" and sys.argv[1:2] == ["whole_command"]:
    whole_command(sys.argv[2:])
if __name__ == "__main__" and sys.argv[1:2] == ["replay"]:
    replay(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
if __name__ == "__main__" and sys.argv[1:2] == ["bench"]:
    bench(float(sys.argv[2]) if len(sys.argv) > 2 else 10.0)
if __name__ == "__main__" and sys.argv[1:2] == ["soak"]:
    soak(int(sys.argv[2]) if len(sys.argv) > 2 else 10000)
if __name__ == "__main__" and sys.argv[1:2] == ["collectors"]:
    collectors(int(sys.argv[2]) if len(sys.argv) > 2 else 40)
if __name__ == "__main__" and sys.argv[1:2] == ["prepare"]:
    prepare_full_size(sys.argv[2])
