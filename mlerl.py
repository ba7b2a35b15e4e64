"""mlerl: reinforcement learning for machine learning engineering agents, in one file.

A language model (the policy) is shown a Kaggle task and writes a program that solves it; the
program is executed and graded; PPO makes the model write better programs. This reimplements
"Reinforcement Learning for Machine Learning Engineering Agents" (arXiv 2509.01684, "the paper")
and follows its Algorithm 1: start reading at `train`.

    python mlerl.py --task random-acts-of-pizza                  # train, evaluate, draw figures
    python mlerl.py --mode run --task NAME --program FILE.py     # execute and grade one program
    python mlerl.py --mode plot --run runs/DIR                   # draw a run's figures again

pi, theta   policy, weights: `actor`             s, a     prompt; plan + program (state, action)
D, D_prev   tasks; solutions to be improved      R, dt    reward; seconds the program ran
N, B, m     iterations, batch, oversampling      V, A, w  value, advantage, duration weight
The paper's gamma is both a learning rate (Alg. 1) and a discount (Table 3): here `lr` and `gamma`.
In shapes, B or b is sequences, T response tokens, P prompt tokens, d hidden size, n tokens.
`CHOICE:` marks what the paper leaves open, `DEVIATION:` what differs from it: grep for both.

Contents
    §1  Config and Attempt (Table 3)
    §2  Algorithm 1
    §3  Tasks and prompts (Alg. 1 l. 2 and 8, Sec. 3.3)
    §4  Sampling (Alg. 1 l. 3)
    §5  Environment instrumentation (Alg. 1 l. 4, Sec. 3.2, App. C.3)
    §6  Execution (Alg. 1 l. 4-5)
    §7  Reward (Alg. 1 l. 5, Sec. 3.2)
    §8  Actor, critic, reference (Table 3)
    §9  Advantages, duration weights, losses (Alg. 1 l. 6, Eq. 2-3)
    §10 Update (Alg. 1 l. 7)
    §11 Evaluation (Sec. 3.3, Sec. 4.1)
    §12 Run folder, checkpoint, resume
    §13 Metrics and figures (Fig. 1, 2, 7-10)
    §14 Supervised fine-tuning and the tiny policy
    §15 Command line
"""
from __future__ import annotations

import ast
import collections
import contextlib
import copy
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import pathlib
import random
import re
import secrets
import shutil
import sys
import time
from typing import Literal

import prompts


def import_libraries():
    """Bind the large libraries as globals, once arguments are parsed: `--help` and the processes
    that execute programs start without them."""
    global checkpoint, grade, np, pd, torch, tqdm, transformers
    import numpy as np
    import pandas as pd
    import torch
    import tqdm
    import transformers
    from torch.utils.checkpoint import checkpoint

    import grade
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class UserError(Exception):
    """What the user can put right, in one line that says what is wrong and what to do."""


# --------------------------------------------------------------------------------------------------
# §1 Config and Attempt (Table 3)
# --------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Config:
    """Every hyperparameter and option. Defaults are the paper's (Table 3); `--preset tiny` changes
    those listed in PRESETS. A flag given on the command line overrides both."""

    # What to do
    task: str = "random-acts-of-pizza"  # task in tasks.json; several with commas
    mode: Literal["train", "evaluate", "run", "plot"] = "train"  # what to do
    preset: Literal["auto", "tiny", "paper"] = "auto"  # auto: paper with a GPU, tiny without
    run: str = ""  # run folder; the same command again resumes it (default: runs/TASK-PRESET-sSEED)
    data_dir: str = "data"  # MLE-bench layout: DIR/TASK/prepared/{public,private}
    raw: str = ""  # folder with Kaggle's raw files, to prepare missing data from
    program: str = ""  # --mode run: the Python file to execute
    seed: int = 0  # seed of everything random
    # Model
    model: str = "Qwen/Qwen2.5-3B-Instruct"  # name or folder, or "tiny" (Table 3)
    sft: str = ""  # supervised fine-tuning first: JSON lines with "prompt" and "response"
    sft_steps: int = 300  # steps of supervised fine-tuning (CHOICE: the paper has none)
    sft_lr: float = 1e-5  # learning rate of supervised fine-tuning, cosine to 0 (CHOICE)
    sft_batch: int = 32  # sequences a step of supervised fine-tuning (CHOICE)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the forward pass (Table 3)
    gradient_checkpointing: bool = True  # trade time for memory (Table 3)
    # Algorithm 1
    iterations: int = 100  # N; "total_epochs" (Table 3)
    batch_size: int = 128  # B, executions an update (Table 3)
    oversample: float = 2.0  # m; m * B actions in flight (CHOICE: the paper gives no value)
    collect: Literal["carry", "first", "wait"] = "carry"  # the unfinished (m-1)B (CHOICE, see train)
    max_staleness: int = 8  # updates; older samples are dropped (CHOICE)
    p_improve: float = 0.5  # probability of an improvement prompt (Sec. 3.3)
    # Sampling
    max_prompt_tokens: int = 1024  # tokens (Table 3)
    max_response_tokens: int = 1024  # tokens (Table 3)
    temperature: float = 0.7  # log-probs everywhere are of logits / temperature (Table 3)
    top_k: int = -1  # -1: no truncation (Table 3)
    top_p: float = 1.0  # 1: no truncation (Table 3)
    ignore_eos: bool = False  # go on after the end token (Table 3)
    sample_batch: int = 128  # prompts a call of generate (CHOICE)
    # Environment and reward
    instrument: Literal["ast", "none"] = "ast"  # who inserts the milestone prints (Sec. 3.2)
    reward: Literal["paper", "bounded"] = "paper"  # paper: -10 + 0.1 a milestone, else the score
    duration: Literal["paper", "none"] = "paper"  # paper: dt / mean dt on the policy loss (Eq. 3)
    drop_leaks: bool = False  # hide columns known to give the label away (tasks.json)
    report_fold: float = 0.0  # share of private test rows kept for reporting (0: the paper's)
    # Learner
    lr: float = 1e-5  # actor (Table 3)
    critic_lr: float = 1e-5  # critic (Table 3)
    critic_init_std: float = 0.02  # of the critic's new head
    critic_warmup: int = 0  # first iterations that update the critic only (CHOICE)
    weight_decay: float = 0.01  # AdamW
    actor_grad_clip: float = 1.0  # norm (Table 3)
    critic_grad_clip: float = 1.0  # norm (Table 3)
    mini_batch: int = 128  # sequences an optimizer step (Table 3)
    micro_batch: int = 8  # sequences a forward pass (Table 3)
    ppo_epochs: int = 1  # Table 3 says 100, but its base library then ignored it (DEVIATION)
    clip: float = 0.2  # PPO ratio (Table 3)
    value_clip: float = 0.5  # critic (Table 3)
    max_is_weight: float = 2.0  # C, cap of the weight of stale samples (CHOICE)
    entropy_coef: float = 0.001  # Table 3
    kl_coef: float = 0.001  # against the initial policy, in the reward (Table 3)
    gamma: float = 1.0  # discount (Table 3)
    lam: float = 1.0  # GAE's lambda (Table 3)
    loss_agg: Literal["seq", "token"] = "seq"  # mean over sequences of token means, or over tokens
    target_kl: float = 0.0  # stop an update's epochs past this KL from its start; 0: never
    # Execution
    workers: int = 0  # programs at once; 0: one a core
    timeout: float = 600.0  # wall seconds a program (CHOICE)
    cpu_limit: float = 1200.0  # CPU seconds a program (CHOICE)
    memory_gb: float = 8.0  # GiB a program (CHOICE)
    disk_mb: int = 1024  # MiB that a program may write (CHOICE)
    output_kb: int = 64  # KiB of terminal output kept, head and tail (CHOICE)
    max_procs: int = 256  # processes and threads of a program (CHOICE)
    threads: int = 0  # BLAS threads a program; 0: cores / workers
    reuse: bool = False  # a program that stands twice in a batch runs once (CHOICE)
    fresh_interpreters: bool = False  # a new interpreter a program instead of a fork server
    unsafe_exec: bool = False  # run although answers or trainer cannot be protected here
    program_gpu: bool = False  # let programs see the GPU
    python: str = ""  # interpreter for the programs (default: this one)
    # Evaluation, saving
    eval_samples: int = 128  # samples of an evaluation (Sec. 4.1)
    save_every: int = 10  # iterations between checkpoints (CHOICE)


# CHOICE: the tiny policy's settings. Only the first line is about scale; README gives the reasons
# for the rest and shows the paper's own settings beside them.
PRESETS = {
    "paper": {},
    "tiny": dict(model="tiny", dtype="float32", gradient_checkpointing=False, save_every=1,
                 sft_steps=400, sft_lr=2e-3, iterations=40, batch_size=64, mini_batch=64,
                 micro_batch=64, max_prompt_tokens=384, max_response_tokens=256,
                 lr=1e-4, critic_lr=1e-3, critic_init_std=0.0, critic_warmup=1, ppo_epochs=3,
                 reward="bounded", timeout=20.0, cpu_limit=15.0, memory_gb=2.0, disk_mb=64,
                 reuse=True),
}


@dataclasses.dataclass
class Attempt:
    """One action from prompt to reward. Each stage fills its own group of fields."""

    # Prompt s
    task: str
    kind: str  # "solve" or "improve"
    prompt_ids: list[int]
    parent: int | None = None  # id of the attempt that is to be improved
    # Action a
    id: int = -1
    version: int = -1  # updates the policy had seen when it sampled this action
    response_ids: list[int] = dataclasses.field(default_factory=list)
    logp: list[float] = dataclasses.field(default_factory=list)  # behaviour policy's, per token
    plan: str = ""
    code: str = ""  # as the policy wrote it, without instrumentation
    # Execution
    outcome: str = ""
    dt: float | None = None  # wall seconds of the program alone; None: nothing was run
    exit: int | None = None
    output: str = ""
    marks: list[str] = dataclasses.field(default_factory=list)
    reused: bool = False  # result of an identical program of the same batch
    submission: bytes | None = None  # dropped once graded and logged
    # Reward
    score: float | None = None  # raw score on the rows that are rewarded, None if invalid
    report: float | None = None  # raw score on the rows that are reported
    R: float = 0.0
    reason: str = ""  # why a submission was refused

    @property
    def valid(self):
        return self.outcome == "ok"


# --------------------------------------------------------------------------------------------------
# §2 Algorithm 1
# --------------------------------------------------------------------------------------------------
def train(cfg, D, learner, sampler, env, maker, run, state):
    """Algorithm 1 with a PPO update. `state` is a checkpoint's (§13) or a new one.

    What becomes of the (m-1)B unfinished executions decides how duration biases the gradient.
    CHOICE: "carry" lets them run on into later batches (nothing is lost, samples are a few updates
    stale), "first" kills them (slow programs are censored), "wait" samples only B and waits.
    """
    N, B, m = cfg.iterations, cfg.batch_size, cfg.oversample
    wanted, keep = dict(carry=(m * B, True), first=(m * B, False), wait=(B, True))[cfg.collect]
    D_prev = state.D_prev
    for a in state.in_flight:  # a checkpoint holds actions, not their processes: run them again
        env.submit(a)
    bar = run.bar(N * B, "training", state.iteration * B)
    for i in range(state.iteration, N):                                       # l. 1
        clock = Clock()
        s = draw_prompts(D, D_prev, round(wanted) - env.in_flight, maker, state, cfg.p_improve)  # l. 2
        for a in sampler.sample(s, learner.actor, version=i):                 # l. 3: a ~ pi(.|s)
            env.submit(a)                                                     # l. 4: s' ~ P(s, env-inst(a))
        clock.lap("sample_s")
        batch, lost = env.collect(B, i, keep, bar.update)                     # l. 5: R and dt of B executions
        clock.lap("execute_s")
        x = assemble(batch, learner, cfg)                                     # tokens, log-probs, V
        r = shape_rewards(x.R, x.logp_old, x.logp_ref, x.mask, cfg.kl_coef)
        A, returns = gae(r, x.V, x.mask, cfg.gamma, cfg.lam)
        A = whiten(A, x.mask, [a.task for a in batch])                        # l. 6: A(s, a)
        w = duration_weights([a.dt for a in batch], cfg)                      # l. 6: dt / mean dt (Eq. 3)
        stats = update(learner, x, A, w, returns, cfg, i)                     # l. 7
        D_prev = [a for a in batch if a.valid]                                # l. 8: replaced each time
        clock.lap("update_s")

        state.iteration, state.D_prev, state.in_flight = i + 1, D_prev, env.unfinished()
        run.log(batch, state, clock.laps | iteration_metrics(
            i, batch, lost, x, w, returns, stats, env))
        if (i + 1) % cfg.save_every == 0 or i + 1 == N:
            run.save(learner, state)
    bar.close()


# --------------------------------------------------------------------------------------------------
# §3 Tasks and prompts (Alg. 1 l. 2 and 8, Sec. 3.3)
# --------------------------------------------------------------------------------------------------
def open_tasks(cfg):
    """D: {name: record of tasks.json}, to which its data is added: `standin` (bool), `public` and
    `private` folder, `truth` (answers, a table), `rows` and `report_rows` (bool masks over the
    answers: those that are rewarded, those that are reported). Raises grade.DataError."""
    D = {}
    for name in cfg.task.split(","):
        try:
            task = dict(grade.load_task(name.strip()))
            task["standin"] = grade.ensure_data(task, cfg.data_dir, cfg.raw or None)
        except grade.DataError as problem:
            raise UserError(str(problem))
        task["public"], task["private"] = grade.paths(task, cfg.data_dir)
        task["truth"] = grade.read_answers(task, task["private"] / task["answers"])
        held_out = np.random.default_rng(cfg.seed).random(len(task["truth"])) < cfg.report_fold
        task["rows"] = ~held_out
        task["report_rows"] = held_out if cfg.report_fold else ~held_out  # 0: the paper's protocol
        D[task["name"]] = task
    return D


class PromptMaker:
    """Turns tasks and earlier attempts into token ids that fit `max_prompt_tokens`."""

    def __init__(self, cfg, D, tokenizer):
        self.cfg, self.tokenizer = cfg, tokenizer
        self.packages = prompts.importable(cfg.python or sys.executable)
        self.short = cfg.model == "tiny"  # CHOICE: short prompts, a plan of one sentence
        self.skipped = 0  # improvement candidates whose code alone was too long
        self.snippets = {(name, width): prompts.snippet(task, width) if width else ""
                         for name, task in D.items() for width in (200, 80, 30, 0)}
        self.solve_ids = {name: self.solve(task) for name, task in D.items()}

    def encode(self, build, *parts):
        """Token ids of a prompt up to where the response begins."""
        chat = self.tokenizer.apply_chat_template(build(*parts, short=self.short),
                                                  add_generation_prompt=True, return_dict=True)
        return list(chat["input_ids"])

    def solve(self, task):
        """Prompt from scratch, with as much of the data snippet as fits."""
        for width in (200, 80, 30, 0):
            ids = self.encode(prompts.solve, task, self.snippets[task["name"], width], self.packages)
            if len(ids) <= self.cfg.max_prompt_tokens:
                return ids
        raise UserError(f"the prompt of {task['name']} has {len(ids)} tokens: raise "
                        f"--max-prompt-tokens (now {self.cfg.max_prompt_tokens})")

    def improve(self, task, a):
        """Prompt to improve attempt a (App. C.2); from scratch if a's code alone does not fit.
        CHOICE: over budget go the snippet, then the head of the output, then the goal."""
        no_goal = dict(task, goal="")
        for record, width, tail in ((task, 80, 1500), (task, 0, 1500), (task, 0, 600),
                                    (task, 0, 200), (no_goal, 0, 200), (no_goal, 0, 0)):
            ids = self.encode(prompts.improve, record, self.snippets[task["name"], width],
                              self.packages, a.plan, a.code, a.output[len(a.output) - tail:])
            if len(ids) <= self.cfg.max_prompt_tokens:
                return Attempt(task["name"], "improve", ids, parent=a.id)
        self.skipped += 1
        return Attempt(task["name"], "solve", self.solve_ids[task["name"]])


def draw_prompts(D, D_prev, n, maker, state, p_improve):
    """n prompts s from D u D_prev (Alg. 1 l. 2): tasks evenly, improve with p_improve (Sec. 3.3).
    CHOICE: while D_prev has nothing of a task, its prompts are from scratch."""
    names, drawn = list(D), []
    for k in range(state.drawn, state.drawn + max(0, n)):
        task = D[names[k % len(names)]]
        candidates = [a for a in D_prev if a.task == task["name"]]
        if candidates and state.rng.random() < p_improve:
            drawn.append(maker.improve(task, state.rng.choice(candidates)))
        else:
            drawn.append(Attempt(task["name"], "solve", maker.solve_ids[task["name"]]))
        drawn[-1].id = k
    state.drawn += len(drawn)
    return drawn


# --------------------------------------------------------------------------------------------------
# §4 Sampling (Alg. 1 l. 3)
# --------------------------------------------------------------------------------------------------
class HFSampler:
    """Samples with transformers. A sampler has one method, `sample`, that yields each attempt as
    soon as its response is there: programs start to run before sampling ends."""

    def __init__(self, cfg, tokenizer):
        self.cfg, self.tokenizer, self.eos = cfg, tokenizer, tokenizer.eos_token_id
        # All that a checkpoint's own generation_config might change (a repetition penalty, say) is
        # set here: programs must come from the very policy whose log-probs are computed.
        self.generation = transformers.GenerationConfig(
            do_sample=True, temperature=cfg.temperature, top_k=max(0, cfg.top_k), top_p=cfg.top_p,
            repetition_penalty=1.0, max_new_tokens=cfg.max_response_tokens, pad_token_id=self.eos,
            eos_token_id=None if cfg.ignore_eos else self.eos)

    def sample(self, attempts, lm, version):
        """Fill response_ids, logp, version, plan and code of each attempt and yield it."""
        attempts = sorted(attempts, key=lambda a: len(a.prompt_ids))  # less padding
        for k in range(0, len(attempts), self.cfg.sample_batch):
            chunk = attempts[k:k + self.cfg.sample_batch]
            ids, attention, _ = padded(chunk, lm.device, self.eos)
            with torch.no_grad(), autocast(self.cfg, lm.device):
                out = lm.generate(ids, attention_mask=attention, generation_config=self.generation)
            for a, row in zip(chunk, out[:, ids.shape[1]:].tolist()):
                stop = self.eos in row and not self.cfg.ignore_eos
                a.response_ids = row[:row.index(self.eos) + 1] if stop else row
                text = self.tokenizer.decode(a.response_ids, skip_special_tokens=True)
                a.version, (a.plan, a.code) = version, parse_response(text)
            logp, mask = score_tokens(lm, chunk, self.cfg)                    # (b, T)
            for a, row, keep in zip(chunk, logp, mask):
                a.logp = row[keep].tolist()
            yield from chunk


def parse_response(text):
    """(plan, code): the text before the first closed fenced block, and what stands in the block."""
    block = re.search(r"^```(?:python|py)?[ \t]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return (text[:block.start()].strip(), block.group(1)) if block else (text.strip(), "")


# --------------------------------------------------------------------------------------------------
# §5 Environment instrumentation (Alg. 1 l. 4, Sec. 3.2, App. C.3)
# --------------------------------------------------------------------------------------------------
MODEL = re.compile(r"Classifier|Regress|Ridge|Lasso|NB$|SV[CR]$|SearchCV|Neighbors|[Mm]odel|Net$|"
                   r"Sequential|[Pp]ipeline|Tree|Forest|Boost")
LOAD = {"read_csv", "read_json", "read_parquet", "load", "loads", "open"}
PREDICT = {"predict", "predict_proba", "predict_log_proba", "decision_function"}
LOSS = "loss|auc|acc|accuracy|score|error|rmse|mse|mae|logloss|kappa|f1"


def calls(node):
    """Names of all that a statement calls, as in {"read_csv", "fit"}."""
    return {getattr(c.func, "attr", getattr(c.func, "id", "")) for c in ast.walk(node)
            if isinstance(c, ast.Call)}


def milestones(tree):
    """Yields (marker, the statement after which it is reached, name of a loss or None).

    CHOICE: rules instead of the paper's LM: the last import, the last load before the model, the
    first model built, the last fit before the last prediction, the last prediction, and any
    assignment to a name such as train_auc or val_loss.
    """
    simple = [n for n in ast.walk(tree) if isinstance(n, (ast.Assign, ast.Expr, ast.AnnAssign))]
    simple = sorted(simple, key=lambda n: n.lineno)

    def reached(names, before=math.inf):
        return [n for n in simple if n.lineno < before and calls(n) & names][-1:]

    imports = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))][-1:]
    predicted = reached(PREDICT)
    end = predicted[0].lineno + 1 if predicted else math.inf
    trained = reached({"fit", "train"}, end)
    model = [n for n in simple if any(MODEL.search(c) for c in calls(n))][:1]
    loaded = reached(LOAD, model[0].lineno if model else end)
    for marker, nodes in (("imported packages", imports), ("loaded data", loaded),
                          ("defined model", model), ("trained model", trained),
                          ("predicted test labels", predicted)):
        yield from ((marker, n, None) for n in nodes)
    for marker, who in (("training loss:", "train|training"),
                        ("testing loss:", "test|testing|val|valid|validation|cv|oof|dev")):
        name = re.compile(rf"(({who})_({LOSS})|({LOSS})_({who}))s?", re.IGNORECASE)
        yield from ((marker, n, n.targets[0].id) for n in simple if isinstance(n, ast.Assign)
                    and isinstance(n.targets[0], ast.Name) and name.fullmatch(n.targets[0].id))


def instrument(code, secret, cfg):
    """The program with a print after each milestone (Sec. 3.2); as it is if it does not parse.

    Each print carries the run's secret, so that prints of the policy's own earn nothing, and is a
    line of its own inside try/except, so that it cannot make the program fail.
    """
    try:
        tree = ast.parse(code if cfg.instrument == "ast" else "")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code
    lines, inserts = code.split("\n"), []
    starts = {n.lineno for n in ast.walk(tree) if isinstance(n, ast.stmt)}
    for marker, node, loss in milestones(tree):
        indent = lines[node.lineno - 1][:node.col_offset]
        alone = not indent.strip() and ";" not in lines[node.end_lineno - 1][node.end_col_offset:]
        if alone and not starts & set(range(node.lineno + 1, node.end_lineno + 1)):
            text = f"{secret} {marker}"
            inserts.append((node.end_lineno, f"{indent}try: print({text!r}, {loss or repr('')})\n"
                                             f"{indent}except Exception: pass"))
    for line, text in sorted(inserts, reverse=True):
        lines.insert(line, text)
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# §6 Execution (Alg. 1 l. 4-5)
# --------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Result:
    outcome: str
    exit: int | None = None
    dt: float | None = None
    cpu: float = 0.0
    output: str = ""
    marks: list[str] = dataclasses.field(default_factory=list)
    submission: bytes | None = None


class Pool:
    pass


# --------------------------------------------------------------------------------------------------
# §7 Reward (Alg. 1 l. 5, Sec. 3.2)
# --------------------------------------------------------------------------------------------------
FAIL, MARK = -10.0, 0.1  # a total failure; each milestone it reached nevertheless (Sec. 3.2)


def reward(task, a, cfg):
    """R(s, env-inst(a)) of an executed attempt.

    paper: -10 + 0.1 a milestone, or the score, negated where lower is better (Sec. 3.2).
    bounded (CHOICE): -1 + 0.1 a milestone, or (1 + tanh((s - sample) / |gold - sample|)) / 2 of the
    signed score s: any valid program beats any failure, and scores are not drowned by -10.
    """
    sign = 1.0 if task["higher_is_better"] else -1.0
    marks = sum(any(re.search(p, m) for m in a.marks) for _, p in prompts.MILESTONES)
    fail = (FAIL if cfg.reward == "paper" else -1.0) + MARK * marks
    if not a.valid:
        return fail
    if cfg.reward == "paper":
        return sign * a.score
    sample = task["sample_score"]
    return 0.5 + 0.5 * math.tanh(sign * (a.score - sample) / (abs(task["gold"] - sample) or 1.0))


class Environment:
    """P(s, env-inst(a)) of Alg. 1 l. 4: instruments, executes, grades and rewards attempts."""

    def __init__(self, cfg, D, secret=None):
        self.cfg, self.D, self.secret = cfg, D, secret or secrets.token_hex(8)
        self.pool = Pool(cfg, {name: task["public"] for name, task in D.items()},
                         [task["private"] for task in D.values()], self.secret)
        self.running = {}  # id -> Attempt, in order of submission
        self.twins = {}  # (task, code) -> ids that wait for the same execution
        self.results = {}  # (task, code) -> Attempt, executed in this iteration
        self.done = collections.deque()  # finished, not yet collected
        self.executions = 0

    @property
    def in_flight(self):
        return len(self.running) + len(self.done)

    def unfinished(self):
        """Attempts in flight, to be kept in a checkpoint."""
        return list(self.done) + list(self.running.values())

    def submit(self, a):
        """Queue an attempt. Never blocks. One without plan or code fails at once (Sec. 3.2)."""
        key = (a.task, a.code)
        if not (a.plan and a.code.strip()):
            self.finish(a, Result("no_code", dt=None))
        elif self.cfg.reuse and key in self.results:
            self.copy(self.results[key], a)
        else:
            self.running[a.id] = a
            same = self.twins.setdefault(key if self.cfg.reuse else a.id, [])
            same.append(a.id)
            if len(same) == 1:
                self.pool.submit(a.id, a.task, instrument(a.code, self.secret, self.cfg))

    def next(self):
        """The next finished attempt, graded and rewarded. Blocks."""
        while not self.done:
            id, result = self.pool.wait()
            a = self.running.pop(id)
            self.finish(a, result)
            self.executions += 1
            key = (a.task, a.code) if self.cfg.reuse else id
            for twin in self.twins.pop(key):
                if twin != id:
                    self.copy(a, self.running.pop(twin))
            if a.outcome != "infra":
                self.results[key] = a
        return self.done.popleft()

    def copy(self, a, b):
        """b is the same program as a: same result, marked as reused."""
        for field in ("outcome", "dt", "exit", "output", "marks", "score", "report", "R", "reason"):
            setattr(b, field, getattr(a, field))
        b.reused = True
        self.done.append(b)

    def finish(self, a, result):
        """Grade and reward an executed attempt."""
        task = self.D[a.task]
        a.outcome, a.dt, a.exit = result.outcome, result.dt, result.exit
        a.output, a.marks, a.submission = result.output, result.marks, result.submission
        if a.outcome == "ok":
            try:
                a.score = grade.grade(task, a.submission, task["truth"], task["rows"])
                a.report = grade.grade(task, a.submission, task["truth"], task["report_rows"])
            except grade.InvalidSubmission as problem:
                a.outcome, a.reason, a.score = "invalid_submission", str(problem)[:300], None
        a.R = reward(task, a, self.cfg)
        self.done.append(a)

    def collect(self, B, i, keep, tick=lambda: None):
        """Wait until B executions complete (Alg. 1 l. 5). Returns (batch, lost).

        lost: {"infra": n, "stale": n, "killed": [seconds each had run]}. Attempts that failed by
        our fault or are staler than max_staleness updates are left out, never rewarded. `tick` is
        called for each attempt of the batch.
        """
        batch, lost = [], dict(infra=0, stale=0, killed=[])
        while len(batch) < B and self.in_flight:
            a = self.next()
            if a.outcome == "infra":
                lost["infra"] += 1
            elif i - a.version > self.cfg.max_staleness:
                lost["stale"] += 1
            else:
                batch.append(a)
                tick()
        self.results.clear()
        if not keep:
            lost["killed"] = self.cancel()
        return batch, lost

    def cancel(self):
        """Kill everything in flight; returns the seconds each had run."""
        ran = [self.pool.cancel(id) or 0.0 for id in self.running]
        self.running.clear()
        self.twins.clear()
        self.done.clear()
        return ran

    def close(self):
        """Kill and clean up everything."""
        self.pool.close()


# --------------------------------------------------------------------------------------------------
# §8 Actor, critic, reference (Table 3)
# --------------------------------------------------------------------------------------------------
CHUNK = 4096  # tokens whose logits exist at one time


@dataclasses.dataclass
class Learner:
    """Everything that learns, and the frozen copy of the initial policy."""

    actor: object  # causal LM, float32 master weights
    critic: object  # separate model of the same checkpoint with a scalar head (Table 3)
    ref: object  # the initial policy: KL reference and "untrained" of the evaluation
    tokenizer: object
    actor_opt: object
    critic_opt: object


def load_learner(cfg, folder):
    """Actor, critic, reference and optimizers from one checkpoint folder or hub name."""
    actor, tokenizer = load_policy(folder, cfg)
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=1)
    config.classifier_dropout = 0.0  # its default, 0.1, would make values random
    critic = transformers.AutoModelForTokenClassification.from_pretrained(
        folder, config=config, dtype=torch.float32).to(actor.device)
    torch.nn.init.normal_(critic.score.weight, std=cfg.critic_init_std)
    torch.nn.init.zeros_(critic.score.bias)
    ref = copy.deepcopy(actor).to(getattr(torch, cfg.dtype)).requires_grad_(False)
    for model in (actor, critic):
        if cfg.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # no dropout anywhere: this only lets checkpointing work
    def optimizer(model, lr):
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999),
                                 weight_decay=cfg.weight_decay, fused=actor.device.type == "cuda")
    return Learner(actor, critic, ref.eval(), tokenizer,
                   optimizer(actor, cfg.lr), optimizer(critic, cfg.critic_lr))


def load_policy(folder, cfg):
    """(model with float32 master weights, tokenizer). One clear line where it can't be had."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as problem:
        raise UserError(f"cannot load --model {folder}: {str(problem).strip().splitlines()[0]} "
                        "(give a folder, go online, or use --preset tiny)")
    if tokenizer.chat_template is None:
        raise UserError(f"--model {folder} has no chat template: choose an instruction-tuned model")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def autocast(cfg, device):
    """bfloat16 compute over float32 master weights, or nothing for float32 (Table 3)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")


def padded(attempts, device, pad=0):
    """ids, attention (b, P+T) int64, prompts padded left, responses right; mask (b, T) bool."""
    P = max(len(a.prompt_ids) for a in attempts)
    T = max(len(a.response_ids) for a in attempts)
    ids = torch.full((len(attempts), P + T), pad)
    attention = torch.zeros_like(ids)
    for row, a in enumerate(attempts):
        left, right = P - len(a.prompt_ids), P + len(a.response_ids)
        ids[row, left:right] = torch.tensor(a.prompt_ids + a.response_ids)
        attention[row, left:right] = 1
    return ids.to(device), attention.to(device), attention[:, P:].bool().to(device)


def hidden_states(backbone, ids, attention, T):
    """States from which each of the last T tokens is predicted: (b, T, d)."""
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    out = backbone(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False)
    return out.last_hidden_state[:, -T - 1:-1]


def response_logprobs(lm, ids, attention, mask, cfg):
    """log pi(a_t | s, a_<t) and entropy of the tempered policy, logits / temperature.

    Everything (sampling, ratio, KL, entropy) uses this one function. Returns two (b, T) float32,
    zero where masked. The vocabulary is large: logits exist for `CHUNK` tokens at a time only.
    """
    T = mask.shape[1]
    h = hidden_states(lm.get_decoder(), ids, attention, T)[mask]              # (n, d)
    y = ids[:, -T:][mask]                                                     # (n,)
    head = lm.get_output_embeddings()

    def score(h, y):
        log_p = (head(h).float() / cfg.temperature).log_softmax(-1)           # (chunk, V)
        return log_p.gather(-1, y[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    def run(h, y):  # logits are computed again in the backward pass rather than kept
        return checkpoint(score, h, y, use_reentrant=False) if torch.is_grad_enabled() else score(h, y)

    parts = [run(*c) for c in zip(h.split(CHUNK), y.split(CHUNK))]
    blank = torch.zeros(mask.shape, device=ids.device)
    return tuple(blank.masked_scatter(mask, torch.cat(p)) for p in zip(*parts))


def response_values(critic, ids, attention, mask, cfg):
    """V(s, a_<t) before each response token: (b, T) float32, zero where masked."""
    T = mask.shape[1]
    h = hidden_states(critic.base_model, ids, attention, T)                   # (b, T, d)
    return critic.score(h)[..., 0].float() * mask                             # (b, T)


def micro_batches(attempts, rows, size):
    """Row numbers in groups of at most `size`, of similar length: little work on padding."""
    rows = sorted(rows, key=lambda k: len(attempts[k].prompt_ids) + len(attempts[k].response_ids))
    return [rows[k:k + size] for k in range(0, len(rows), size)]


def score_tokens(model, attempts, cfg, function=response_logprobs):
    """`function` (log-probs or values) without gradient over all attempts: (B, T), mask (B, T)."""
    T = max(len(a.response_ids) for a in attempts)
    out = torch.zeros(len(attempts), T)
    mask = torch.zeros(len(attempts), T, dtype=torch.bool)
    for rows in micro_batches(attempts, range(len(attempts)), cfg.micro_batch):
        ids, attention, keep = padded([attempts[k] for k in rows], model.device)
        with torch.no_grad(), autocast(cfg, model.device):
            values = function(model, ids, attention, keep, cfg)
        values = values[0] if isinstance(values, tuple) else values
        out[rows, :keep.shape[1]] = values.cpu()
        mask[rows, :keep.shape[1]] = keep.cpu()
    return out, mask


# --------------------------------------------------------------------------------------------------
# §9 Advantages, duration weights, losses (Alg. 1 l. 6, Eq. 2-3)
# --------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Batch:
    """The tensors of one update. All (B, T) float32 on the CPU, zero where `mask` is False."""

    attempts: list
    mask: object  # (B, T) bool: response tokens
    R: object  # (B,) reward of the execution
    logp_old: object  # behaviour policy, as sampled
    logp_prox: object  # policy at the start of this update
    logp_ref: object  # initial policy
    V: object  # critic at the start of this update


def assemble(attempts, learner, cfg):
    """Score a collected batch with the current actor and critic and the frozen reference."""
    logp_prox, mask = score_tokens(learner.actor, attempts, cfg)
    logp_ref, _ = score_tokens(learner.ref, attempts, cfg)
    V, _ = score_tokens(learner.critic, attempts, cfg, response_values)
    logp_old = torch.zeros_like(logp_prox)
    logp_old[mask] = torch.tensor([p for a in attempts for p in a.logp])
    R = torch.tensor([a.R for a in attempts])
    return Batch(attempts, mask, R, logp_old, logp_prox, logp_ref, V)


def shape_rewards(R, logp_old, logp_ref, mask, kl_coef):
    """Token rewards r_t = R [t = last] - kl_coef (log pi_old - log pi_ref) (Table 3, k1 estimator).

    R: (B,), the rest (B, T). Returns (B, T), zero where masked.
    """
    r = -kl_coef * (logp_old - logp_ref) * mask                               # (B, T)
    last = mask.sum(1) - 1                                                    # (B,)
    r[torch.arange(len(R)), last] += R
    return r


def gae(r, V, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016, Eq. 16; Table 3: gamma = lam = 1).

    A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), V = 0 after the last token.
    r, V, mask: (B, T), responses begin at t = 0. Returns advantages and returns A + V, both (B, T),
    zero where masked.
    """
    A = torch.zeros_like(r)
    A_next, V_next = torch.zeros(len(r)), torch.zeros(len(r))                 # (B,)
    for t in reversed(range(r.shape[1])):
        delta = r[:, t] + gamma * V_next - V[:, t]
        A_next = (delta + gamma * lam * A_next) * mask[:, t]
        V_next = V[:, t] * mask[:, t]
        A[:, t] = A_next
    return A, (A + V) * mask


def whiten(A, mask, tasks):
    """Advantages with mean 0 and variance 1 over all valid tokens of each task's rows: (B, T)."""
    out = torch.zeros_like(A)
    for task in set(tasks):
        rows = torch.tensor([t == task for t in tasks])[:, None] & mask       # (B, T)
        values = A[rows]
        out[rows] = (values - values.mean()) * torch.rsqrt(values.var() + 1e-8)
    return out


def duration_weights(dt, cfg):
    """Weights w = dt / mean(dt) on the policy gradient (Eq. 3, Sec. 3.1).

    dt: B wall seconds, None where nothing was run. Returns (B,) float32 with mean 1; it multiplies
    the policy loss only, never the value loss.
    CHOICE: an answer without a program never was an execution, so no duration biases how often it
    is seen: it gets weight 1 (0 would make it the one failure without a gradient).
    """
    ran = [t for t in dt if t is not None]
    if cfg.duration == "none" or not sum(ran):
        return torch.ones(len(dt))
    mean = sum(ran) / len(ran)
    return torch.tensor([1.0 if t is None else t / mean for t in dt])


def token_weights(mask, loss_agg):
    """Coefficient of each token in a loss, (b, T), sum 1 (CHOICE: `seq` is what Table 3's library
    did in effect). seq: mean over sequences of token means; token: mean over tokens."""
    if loss_agg == "token":
        return mask / mask.sum()
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


def policy_loss(logp, logp_prox, logp_old, A, w, cfg):
    """Clipped surrogate (Schulman et al. 2017, Eq. 7) per token, weighted by duration (Eq. 3).

    rho = pi / pi_prox, L = w min(C, pi_prox / pi_old) max(-A rho, -A clip(rho, 1-eps, 1+eps)).
    For fresh samples pi_prox = pi_old and this is plain PPO; stale ones are corrected by the
    truncated weight (decoupled objective, Hilton et al. 2022). logp*, A: (b, T); w: (b,).
    Returns the loss and whether it is clipped, both (b, T).
    """
    rho = (logp - logp_prox).exp()                                            # (b, T)
    is_weight = (logp_prox - logp_old).exp().clamp(max=cfg.max_is_weight)     # (b, T)
    plain, clipped = -A * rho, -A * rho.clamp(1 - cfg.clip, 1 + cfg.clip)     # (b, T)
    return w[:, None] * is_weight * torch.maximum(plain, clipped), clipped > plain


def value_loss(V, V_old, returns, cfg):
    """0.5 max((V - G)^2, (clip(V, V_old +- value_clip) - G)^2) per token (Table 3): (b, T)."""
    near = V_old + (V - V_old).clamp(-cfg.value_clip, cfg.value_clip)         # (b, T)
    return 0.5 * torch.maximum((V - returns) ** 2, (near - returns) ** 2)


# --------------------------------------------------------------------------------------------------
# §10 Update (Alg. 1 l. 7)
# --------------------------------------------------------------------------------------------------
def update(learner, x, A, w, returns, cfg, i):
    """PPO epochs over the batch, critic then actor (Table 3). Returns statistics, batch means.

    The actor is left alone while the critic warms up and where rewards do not vary: whitening
    would blow up mere noise of the critic (CHOICE).
    """
    def critic_loss(rows, ids, attention, mask, c):
        T = mask.shape[1]
        V = response_values(learner.critic, ids, attention, mask, cfg)        # (b, T)
        loss = value_loss(V, on(V, x.V, rows, T), on(V, returns, rows, T), cfg)
        return (c * loss).sum(), {"value_loss": (c * loss).sum()}

    def actor_loss(rows, ids, attention, mask, c):
        T = mask.shape[1]
        logp, entropy = response_logprobs(learner.actor, ids, attention, mask, cfg)  # (b, T)
        prox, old = on(logp, x.logp_prox, rows, T), on(logp, x.logp_old, rows, T)
        loss, clipped = policy_loss(logp, prox, old, on(logp, A, rows, T),
                                    w[rows].to(logp.device), cfg)             # (b, T)
        total = (c * (loss - cfg.entropy_coef * entropy)).sum()
        k3 = (logp - prox).exp() - 1 - (logp - prox)                          # Schulman's k3
        return total, {"policy_loss": (c * loss).sum(), "entropy": (c * entropy).sum(),
                       "clip_fraction": (c * clipped).sum(), "update_kl": (c * k3).sum()}

    stats = optimize(learner.critic, learner.critic_opt, critic_loss, x, cfg, cfg.critic_grad_clip)
    if i >= cfg.critic_warmup and x.R.std() > 0:
        stats |= optimize(learner.actor, learner.actor_opt, actor_loss, x, cfg,
                          cfg.actor_grad_clip, cfg.target_kl)
    return stats


def on(like, full, rows, T):
    """The given rows and first T tokens of a (B, T) tensor, on the device of `like`."""
    return full[rows, :T].to(like.device)


def optimize(model, optimizer, loss_function, x, cfg, grad_clip, target_kl=0.0):
    """cfg.ppo_epochs passes of mini-batches; gradients add up over micro-batches.

    Stops before an epoch once `update_kl` of the last one passed target_kl. Returns the mean over
    optimizer steps of what loss_function reports, and the gradient norm.
    """
    totals, steps = collections.Counter(), 0
    for epoch in range(cfg.ppo_epochs):
        order = torch.randperm(len(x.attempts)).tolist()
        kl = 0.0
        for k in range(0, len(order), cfg.mini_batch):
            mini = sorted(order[k:k + cfg.mini_batch])
            c_all = torch.zeros(x.mask.shape)
            c_all[mini] = token_weights(x.mask[mini], cfg.loss_agg)           # (B, T)
            for rows in micro_batches(x.attempts, mini, cfg.micro_batch):
                ids, attention, mask = padded([x.attempts[j] for j in rows], model.device)
                with autocast(cfg, model.device):
                    loss, report = loss_function(rows, ids, attention, mask,
                                                 on(ids, c_all, rows, mask.shape[1]))
                loss.backward()
                report = {key: float(value.detach()) for key, value in report.items()}
                totals.update(report)
                kl += report.get("update_kl", 0.0)
            totals["grad_norm"] += float(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            steps += 1
        if target_kl and kl / -(-len(order) // cfg.mini_batch) > target_kl:
            break
    return {key: value / steps for key, value in totals.items()}


# --------------------------------------------------------------------------------------------------
# §11 Evaluation (Sec. 3.3, Sec. 4.1)
# --------------------------------------------------------------------------------------------------
def evaluate(phase, lm, D, parents, sampler, env, maker, run, state):
    """eval_samples programs a task, from scratch or as improvements of `parents`, executed and
    logged under the name `phase`. Returns (attempts, {task: summary}), see `summarize`."""
    n = run.cfg.eval_samples * len(D)
    for a in sampler.sample(draw_prompts(D, parents, n, maker, state, 1.0), lm, state.iteration):
        env.submit(a)
    with run.bar(n, phase) as bar:
        done, _ = env.collect(n, state.iteration, keep=True, tick=bar.update)
    run.log_attempts(done, phase)
    return done, {name: summarize(task, [a for a in done if a.task == name])
                  for name, task in D.items()}


def summarize(task, attempts):
    """Scores of the reported rows; score_mean counts -10 for an invalid attempt (Fig. 10), and
    best_clean leaves out programs that read a column known to leak the label."""
    sign = 1 if task["higher_is_better"] else -1
    valid = [a for a in attempts if a.valid]
    clean = [a for a in valid if not any(column in a.code for column in task["leaks"])]
    best = lambda group: sign * max(sign * a.report for a in group) if group else None
    return dict(n=len(attempts), valid_share=mean(a.valid for a in attempts),
                valid_score_mean=mean(a.report for a in valid),
                score_mean=mean(sign * a.report if a.valid else FAIL for a in attempts),
                best=best(valid), best_clean=best(clean), leak_readers=len(valid) - len(clean),
                distinct=len({a.code for a in attempts if a.code}))


def evaluate_policy(D, learner, sampler, env, maker, run, state):
    """Test-time protocol: samples from scratch and as many improvements of the valid ones; the
    better of the two counts (App. C.2). Fills state.evaluation and writes evaluation.json."""
    common = (sampler, env, maker, run, state)
    scratch, state.evaluation["trained_scratch"] = evaluate(
        "trained_scratch", learner.actor, D, [], *common)
    _, state.evaluation["trained_improve"] = evaluate(
        "trained_improve", learner.actor, D, [a for a in scratch if a.valid], *common)
    report = {}
    for name, task in D.items():
        sign = 1 if task["higher_is_better"] else -1
        parts = {phase: tables[name] for phase, tables in state.evaluation.items()}
        scores = [p["best"] for k, p in parts.items() if k != "untrained" and p["best"] is not None]
        best = sign * max(sign * score for score in scores) if scores else None
        report[name] = dict(
            parts, best=best, medal=grade.medal(task, best) if best is not None else None,
            executions=state.executions, paper=task["paper"], standin=task["standin"],
            report_fold=run.cfg.report_fold, prompts_skipped=maker.skipped)
    write(run.folder / "evaluation.json",
          json.dumps(report if len(D) > 1 else report[next(iter(D))], indent=1))


def mean(values):
    """Mean of an iterable of numbers, None if it is empty."""
    values = list(values)
    return float(sum(values) / len(values)) if values else None


# --------------------------------------------------------------------------------------------------
# §12 Run folder, checkpoint, resume
# --------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class State:
    """What a run remembers between iterations besides weights and optimizers."""

    rng: random.Random  # of the prompts
    iteration: int = 0
    D_prev: list[Attempt] = dataclasses.field(default_factory=list)
    in_flight: list[Attempt] = dataclasses.field(default_factory=list)
    drawn: int = 0  # prompts so far; the next attempt's id
    executions: int = 0
    wall_s: float = 0.0  # seconds up to the last checkpoint
    best: dict = dataclasses.field(default_factory=dict)  # task -> best score in training
    evaluation: dict = dataclasses.field(default_factory=dict)  # phase -> task -> summary


class Run:
    """A run folder. The two logs only grow and are cut back to the last checkpoint on resume (which
    also drops a half-written line); every other file is replaced as a whole."""

    LOGS = ("metrics.jsonl", "attempts.jsonl")
    MODELS = ("actor", "critic", "actor_opt", "critic_opt")
    FREE = {"run", "mode", "program", "iterations", "workers", "eval_samples", "save_every", "raw",
            "data_dir", "unsafe_exec"}  # flags that may differ when a run resumes

    def __init__(self, cfg, D):
        self.folder, self.cfg, self.D = pathlib.Path(cfg.run), cfg, D
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock, self.start = open(self.folder / ".lock", "w"), time.monotonic()
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{cfg.run} is in use by another process: wait, or give another --run")
        new, path = dataclasses.asdict(cfg), self.folder / "config.json"
        old = read_json(path) if path.exists() else new
        changed = [f"{k} was {old[k]}, now {new[k]}" for k in new
                   if k not in self.FREE and k in old and old[k] != new[k]]
        if changed:
            raise UserError(f"{cfg.run} was begun with other flags ({'; '.join(changed)}): "
                            "give the same ones, or another --run")
        write(path, json.dumps(new, indent=1))
        write(self.folder / "mlerl.py", pathlib.Path(__file__).read_bytes())

    def load(self, learner):
        """Load the last checkpoint into the learner and return its State, or a new State."""
        path = self.folder / "checkpoint.pt"
        sizes, state = dict.fromkeys(self.LOGS, 0), State(random.Random(self.cfg.seed))
        if path.exists():
            try:
                saved = torch.load(path, map_location="cpu", weights_only=False)
            except Exception as problem:  # torch raises what pickle and zipfile raise
                raise UserError(f"{path} cannot be read ({problem}): move it away to begin anew")
            for name in self.MODELS:
                getattr(learner, name).load_state_dict(saved[name])
            torch.set_rng_state(saved["torch_rng"])
            sizes, state = saved["log_sizes"], State(**saved["state"])
        for log, size in sizes.items():
            with open(self.folder / log, "ab") as file:
                file.truncate(size)
        return state

    def save(self, learner, state):
        """Write checkpoint.pt, and the policy in Hugging Face format."""
        state.wall_s, self.start = self.wall(state), time.monotonic()
        saved = {name: getattr(learner, name).state_dict() for name in self.MODELS}
        saved |= dict(state=vars(state), torch_rng=torch.get_rng_state(),
                      log_sizes={log: (self.folder / log).stat().st_size for log in self.LOGS})
        buffer = self.folder / "checkpoint.new"
        try:
            torch.save(saved, buffer)
        except RuntimeError as problem:  # so torch reports a full disk
            buffer.unlink(missing_ok=True)
            raise OSError(errno.ENOSPC, f"checkpoint not written ({problem})")
        os.replace(buffer, self.folder / "checkpoint.pt")
        save_policy(self.folder / "policy", learner.actor, learner.tokenizer)

    def wall(self, state):
        """Seconds that this run has taken so far, earlier processes included."""
        return state.wall_s + time.monotonic() - self.start

    def log_attempts(self, attempts, phase):
        """Append to attempts.jsonl; keep each task's best program, submission and score in best/."""
        hidden = ("prompt_ids", "response_ids", "logp", "submission")
        with open(self.folder / "attempts.jsonl", "a") as file:
            for a in attempts:
                row = {k: v for k, v in vars(a).items() if k not in hidden}
                file.write(json.dumps(dict(row, phase=phase, tokens=len(a.response_ids))) + "\n")
        for a in attempts:
            path = self.folder / "best" / f"{a.task}.json"
            sign = 1 if self.D[a.task]["higher_is_better"] else -1
            if a.valid and not (path.exists() and sign * read_json(path)["score"] >= sign * a.score):
                path.parent.mkdir(exist_ok=True)
                write(path.with_suffix(".py"), a.code.encode())
                write(path.with_suffix(".csv"), a.submission)
                write(path, json.dumps(dict(score=a.score, reported=a.report, attempt=a.id,
                                            plan=a.plan, standin=self.D[a.task]["standin"])))
            a.submission = None  # no longer needed

    def log(self, batch, state, row):
        """Log an iteration: its attempts, its line of metrics, its line on the terminal."""
        self.log_attempts(batch, "train")
        for a in (a for a in batch if a.valid):
            better = max if self.D[a.task]["higher_is_better"] else min
            state.best[a.task] = better(a.score, state.best.get(a.task, a.score))
        row |= dict(wall_s=self.wall(state), best_score=next(iter(state.best.values()), None),
                    standin=any(task["standin"] for task in self.D.values()))
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        report(row, self.cfg.iterations)

    def bar(self, total, what, initial=0):
        """A progress bar with rate and time left."""
        return tqdm.tqdm(total=total, desc=what, initial=initial, unit=" programs", leave=False,
                         dynamic_ncols=True, disable=None)


def write(path, content):
    """Write text or bytes so that neither a reader nor a crash ever sees half a file."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(temporary, path)


def save_policy(folder, lm, tokenizer):
    """Save in Hugging Face format beside `folder`, then take its place."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    lm.save_pretrained(new)
    tokenizer.save_pretrained(new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_json(path):
    """Parse a JSON file, or say in one line that it is malformed."""
    try:
        return json.loads(path.read_text())
    except ValueError as problem:
        raise UserError(f"{path} is not valid JSON ({problem}): mend it or move it away")


# --------------------------------------------------------------------------------------------------
# §13 Metrics and figures (Fig. 1, 2, 7-10)
# --------------------------------------------------------------------------------------------------
class Clock:
    """Seconds of consecutive laps, by name."""

    def __init__(self):
        self.laps, self.last = {}, time.monotonic()

    def lap(self, name):
        """Name the time since the last lap."""
        now = time.monotonic()
        self.laps[name], self.last = now - self.last, now


EDGES = (0, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1e9)  # seconds, of the histograms of durations


def variance_parts(R, valid):
    """Shares of Var(R), by the law of total variance, that come from: being valid or not, the
    milestones of failures, the scores of valid programs. R (B,), valid (B,) bool."""
    R, valid = np.asarray(R, float), np.asarray(valid, bool)
    total = R.var() or 1.0
    score = R[valid].var() * valid.mean() if valid.any() else 0.0
    markers = R[~valid].var() * (~valid).mean() if (~valid).any() else 0.0
    return dict(variance_valid=float((R.var() - score - markers) / total),
                variance_markers=float(markers / total), variance_score=float(score / total))


def iteration_metrics(i, batch, lost, x, w, returns, stats, env):
    """One line of metrics.jsonl. `durations` are of consumed programs, `durations_sampled` also of
    those killed before the batch was full, which count the seconds they had run."""
    dt = [a.dt for a in batch if a.dt is not None]
    sampled = dt + lost["killed"]
    sign = {name: 1 if task["higher_is_better"] else -1 for name, task in env.D.items()}
    G, V = returns[x.mask], x.V[x.mask]
    return dict(
        iteration=i, reward_mean=mean(a.R for a in batch),
        task_score_mean=mean(sign[a.task] * a.score if a.valid else FAIL for a in batch),
        valid_share=mean(a.valid for a in batch),
        valid_score_mean=mean(a.score for a in batch if a.valid),
        improve_share=mean(a.kind == "improve" for a in batch),
        valid_share_improve=mean(a.valid for a in batch if a.kind == "improve"),
        duration_mean=mean(dt), duration_sampled_mean=mean(sampled),
        durations=np.histogram(dt, EDGES)[0].tolist(),
        durations_sampled=np.histogram(sampled, EDGES)[0].tolist(),
        weight_max=float(w.max()), ess=float(w.sum() ** 2 / (w ** 2).sum()),
        kl=float((x.logp_old - x.logp_ref)[x.mask].mean()), **stats,
        explained_variance=float(1 - (G - V).var() / G.var().clamp(min=1e-12)),
        staleness_mean=mean(i - a.version for a in batch), in_flight=env.in_flight,
        distinct=len({a.code for a in batch if a.code}), reused=sum(a.reused for a in batch),
        tokens=int(x.mask.sum()), **variance_parts(x.R, [a.valid for a in batch]),
        outcomes=dict(collections.Counter(a.outcome for a in batch)),
        **{f"lost_{why}": n if why != "killed" else len(n) for why, n in lost.items()})


def report(row, N):
    """One line of terminal output for an iteration."""
    f = lambda key, form: "-" if row[key] is None else format(row[key], form)
    tqdm.tqdm.write(
        f"{row['iteration'] + 1:4d}/{N}  valid {row['valid_share']:.2f}  "
        f"score {f('valid_score_mean', '.4f')}  best {f('best_score', '.4f')}  "
        f"dt {f('duration_mean', '.2f')}s  kl {row['kl']:+.3f}  distinct {row['distinct']:3d}  "
        f"sample {row['sample_s']:.1f}s  execute {row['execute_s']:.1f}s  update {row['update_s']:.1f}s")


def plot(folder):
    """Draw figures/training.png from metrics.jsonl, config.json and evaluation.json alone."""
    import matplotlib
    matplotlib.use("Agg")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not rows:
        raise UserError(f"{folder}/metrics.jsonl is empty: nothing to draw yet")
    table = pd.json_normalize(rows, max_level=0).astype({"best_score": float})
    table["hours"] = table.wall_s / 3600
    panels = [("Best score so far (Fig. 1, 7)", "hours", ["best_score"]),
              ("Mean execution time, seconds (Fig. 2, 8)", "iteration",
               ["duration_mean", "duration_sampled_mean"]),
              ("Mean task score, -10 if invalid (Fig. 9, 10)", "iteration", ["task_score_mean"]),
              ("Mean score of valid programs", "iteration", ["valid_score_mean"]),
              ("Share of valid programs", "iteration", ["valid_share"]),
              ("What the reward's variance comes from", "iteration",
               ["variance_valid", "variance_markers", "variance_score"])]
    figure, axes = matplotlib.pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis, (title, x, ys) in zip(axes.flat, panels):
        table.plot(x=x, y=ys, ax=axis, title=title, grid=True, legend=len(ys) > 1)
    evaluation = folder / "evaluation.json"
    found = read_json(evaluation) if evaluation.exists() else {}
    for axis, key in ((axes[0, 0], "best"), (axes[0, 2], "score_mean"), (axes[1, 0], "valid_score_mean"),
                      (axes[1, 1], "valid_share")):
        if found.get("untrained", {}).get(key) is not None:
            axis.axhline(found["untrained"][key], color="gray", ls=":", label="untrained policy")
            axis.legend()
    figure.suptitle(read_json(folder / "config.json")["task"]
                    + (" - STAND-IN data, not comparable" if rows[-1]["standin"] else ""))
    (folder / "figures").mkdir(exist_ok=True)
    figure.savefig(folder / "figures" / "training.png", dpi=110)


# --------------------------------------------------------------------------------------------------
# §14 Supervised fine-tuning and the tiny policy
# --------------------------------------------------------------------------------------------------
def supervised(lm, tokenizer, pairs, cfg):
    """Fine-tune lm on (chat, response) pairs: AdamW, cosine to 0, loss on response tokens.

    CHOICE: the paper begins with an instruction-tuned model; one trained from nothing needs this
    first. It is trained at temperature 1 and sampled at 0.7, which makes its bugs rarer.
    """
    cfg, rng = dataclasses.replace(cfg, temperature=1.0), random.Random(cfg.seed)
    data = [Attempt("", "solve", list(tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_dict=True)["input_ids"]), response_ids=[
                *tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id])
            for chat, response in pairs]
    optimizer = torch.optim.AdamW(lm.parameters(), lr=cfg.sft_lr, weight_decay=cfg.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.sft_steps)
    bar = tqdm.trange(cfg.sft_steps, desc="supervised fine-tuning", unit=" steps", leave=False,
                      disable=None)
    for _ in bar:
        chosen, total = rng.sample(data, min(cfg.sft_batch, len(data))), 0.0
        n = sum(len(a.response_ids) for a in chosen)
        for rows in micro_batches(chosen, range(len(chosen)), cfg.micro_batch):
            ids, attention, mask = padded([chosen[k] for k in rows], lm.device)
            with autocast(cfg, lm.device):
                loss = -response_logprobs(lm, ids, attention, mask, cfg)[0].sum() / n
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(lm.parameters(), cfg.actor_grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        bar.set_postfix(loss=f"{total:.3f}")


def tiny_tokenizer(pairs):
    """Byte-level BPE of 1,000 tokens, trained on the corpus and split at line ends only, so that
    merges cross words: a common line of a program becomes one token, a program some 50."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[^\n]*\n"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        (text for chat, response in pairs for text in (*(m["content"] for m in chat), response)),
        trainers.BpeTrainer(vocab_size=1000, special_tokens=["<|end|>", "<|user|>", "<|policy|>"],
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                            show_progress=False))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>",
                                                pad_token="<|end|>")
    fast.chat_template = ("{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
                          "{% if add_generation_prompt %}<|policy|>{% endif %}")
    return fast


def tiny_policy(cfg, D):
    """Folder of the embedded policy: a Qwen2 of under a million weights, trained from nothing on
    programs composed of fragments (prompts.corpus); kept in the user's cache."""
    recipe = [open(f).read() for f in (__file__, prompts.__file__)] + [
        str((cfg.sft_steps, cfg.sft_lr, cfg.sft_batch, cfg.seed, sorted(D)))]
    name = hashlib.sha256("".join(recipe).encode()).hexdigest()[:16]
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mlerl" / name
    if not folder.exists():
        pairs = [p for task in D.values() for p in prompts.corpus(task, 6000 // len(D), cfg.seed)]
        tokenizer = tiny_tokenizer(pairs)
        lm = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=336, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id))
        supervised(lm, tokenizer, pairs, cfg)
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_policy(folder, lm, tokenizer)
    return folder


def initial_policy(cfg, D):
    """Folder or hub name of the policy that training starts from, fine-tuned first if --sft."""
    start = tiny_policy(cfg, D) if cfg.model == "tiny" else cfg.model
    folder = pathlib.Path(cfg.run, "sft")
    if cfg.sft and not folder.exists():
        try:
            rows = [json.loads(line) for line in open(cfg.sft)]
            pairs = [([{"role": "user", "content": r["prompt"]}], r["response"]) for r in rows]
        except (ValueError, KeyError, TypeError) as problem:
            raise UserError(f"--sft {cfg.sft}: every line must be a JSON object with prompt and "
                            f"response ({problem})")
        lm, tokenizer = load_policy(start, cfg)
        supervised(lm, tokenizer, pairs, cfg)
        save_policy(folder, lm, tokenizer)
    return folder if cfg.sft else start


# --------------------------------------------------------------------------------------------------
# §15 Command line
# --------------------------------------------------------------------------------------------------
def parse(argv):
    """Command line -> Config. Raises UserError on a flag that is unknown, malformed or impossible."""
    import tyro
    asked = re.search(r"--preset[= ](\w+)", " ".join(argv))
    preset = asked.group(1) if asked else "auto"
    if preset == "auto":  # not torch.cuda: importing torch takes seconds
        preset = "paper" if os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi") else "tiny"
    default = dataclasses.replace(Config(), preset=preset, **PRESETS.get(preset, {}))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            cfg = tyro.cli(Config, args=argv, default=default)
    except SystemExit as end:
        if end.code:  # tyro draws a box: keep its first two lines of text
            lines = [line.strip("│╭╮╰╯─ ") for line in said.getvalue().splitlines()]
            raise UserError(": ".join([line for line in lines if line][:2]) + " (see --help)")
        raise
    wrong = [what for bad, what in (
        (min(cfg.batch_size, cfg.micro_batch, cfg.mini_batch, cfg.ppo_epochs) < 1, "sizes below 1"),
        (cfg.oversample < 1, "--oversample below 1"), (cfg.temperature <= 0, "--temperature <= 0"),
        (not 0 <= cfg.p_improve <= 1, "--p-improve outside [0, 1]"),
        (not 0 <= cfg.report_fold < 1, "--report-fold outside [0, 1)"),
        (min(cfg.timeout, cfg.cpu_limit, cfg.memory_gb) <= 0, "a limit <= 0"),
        ((cfg.mode == "run") != bool(cfg.program), "--mode run and --program FILE go together"),
        (cfg.mode == "run" and "," in cfg.task, "--mode run takes one task"),
        (cfg.sft and not os.path.isfile(cfg.sft), f"--sft {cfg.sft} is not a file"),
        (cfg.mode in ("plot", "evaluate") and not os.path.exists(os.path.join(cfg.run, "config.json")),
         f"--mode {cfg.mode} needs --run with an existing run folder")) if bad]
    if wrong:
        raise UserError(f"{wrong[0]}: see --help")
    name = f"{cfg.task.replace(',', '+')}-{preset}-s{cfg.seed}"
    return dataclasses.replace(cfg, run=cfg.run or os.path.join("runs", name))


def run_program(cfg, D):
    """--mode run: one program exactly as in training; prints one JSON object."""
    path = pathlib.Path(cfg.program)
    try:
        code = path.read_text()
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"--program {path} cannot be read: {problem}")
    with contextlib.closing(Environment(cfg, D)) as env:
        env.submit(Attempt(cfg.task, "solve", [], id=0, plan="given", code=code))
        a = env.next()
    submission = path.with_suffix(".submission.csv") if a.submission is not None else None
    if submission:
        write(submission, a.submission)
    print(json.dumps(dict(outcome=a.outcome, reward=a.R, score=a.score, reason=a.reason,
                          markers=a.marks, duration=a.dt, exit=a.exit, output=a.output[-2000:],
                          submission=submission and str(submission), standin=D[a.task]["standin"])))


def run_training(cfg, D):
    """--mode train and evaluate, from the warm start to the closing table."""
    torch.manual_seed(cfg.seed)
    run = Run(cfg, D)
    with contextlib.closing(Environment(cfg, D)) as env:
        header(cfg, D, env)
        learner = load_learner(cfg, initial_policy(cfg, D))
        state = run.load(learner)
        sampler, maker = HFSampler(cfg, learner.tokenizer), PromptMaker(cfg, D, learner.tokenizer)
        if not state.evaluation:
            _, state.evaluation["untrained"] = evaluate(
                "untrained", learner.ref, D, [], sampler, env, maker, run, state)
            run.save(learner, state)
        if cfg.mode == "train" and state.iteration < cfg.iterations:
            train(cfg, D, learner, sampler, env, maker, run, state)
            state.evaluation.pop("trained_improve", None)
        if cfg.mode == "evaluate" or "trained_improve" not in state.evaluation:
            env.cancel()  # what `carry` left in flight
            evaluate_policy(D, learner, sampler, env, maker, run, state)
            run.save(learner, state)
    closing_table(D, run, state)
    plot(run.folder)
    print(f"{run.folder}: figures/training.png, evaluation.json, best/, policy/, metrics.jsonl")


def header(cfg, D, env):
    """What is about to run, in a few lines."""
    for task in D.values():
        data = "STAND-IN data, scores are not comparable" if task["standin"] else "real data"
        print(f"task       {task['name']} ({task['metric_text']}), {data}")
    print(f"policy     {cfg.model}, preset {cfg.preset}; run folder {cfg.run}\n"
          f"method     N={cfg.iterations} B={cfg.batch_size} m={cfg.oversample} collect={cfg.collect} "
          f"duration={cfg.duration} reward={cfg.reward} instrument={cfg.instrument}")
    for line in env.pool.report:
        print(f"programs   {line}")


def closing_table(D, run, state):
    """Untrained and trained policy beside the paper's numbers and MLE-bench's thresholds."""
    for name, task in D.items():
        print(f"\n{name}, {task['metric_text']}"
              + (" - STAND-IN data: not comparable with the rows below the line" * task["standin"]))
        table = pd.DataFrame({phase: tables[name] for phase, tables in state.evaluation.items()}).T
        print(table.to_string(float_format=lambda v: f"{v:.4g}"))
        for who, (value, error) in task["paper"]["Table 1"].items():
            print(f"  paper, {who:<20} {value if value is not None else 'N/A'}")
        print(f"  MLE-bench gold {task['gold']}, silver {task['silver']}, bronze {task['bronze']}, "
              f"median {task['median']:.5g}")


def main(argv):
    """Run the command; returns the exit code: 0, 2 for what the user can put right, 130 for Ctrl-C."""
    cfg = None
    try:
        cfg = parse(argv)
        import_libraries()
        if cfg.mode == "plot":
            plot(pathlib.Path(cfg.run))
            return 0
        torch.set_num_threads(1 if not torch.cuda.is_available() else 4)  # programs need the cores
        D = open_tasks(cfg)
        run_program(cfg, D) if cfg.mode == "run" else run_training(cfg, D)
        return 0
    except KeyboardInterrupt:
        print(f"\nstopped; the same command continues {cfg.run if cfg else ''}", file=sys.stderr)
        return 130
    except MemoryError:
        problem = "out of memory: lower --micro-batch, --workers or --memory-gb"
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        problem = f"{error.strerror or error}: free space or mend permissions, then run again to go on"
    except ValueError as error:
        if not isinstance(error, UserError):
            raise
        problem = str(error)
    print(f"mlerl: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(worker() if sys.argv[1:2] == ["_worker"] else main(sys.argv[1:]))
