"""mlerl: reinforcement learning for machine learning engineering agents, in one file.

A language model (the policy) writes programs that solve Kaggle tasks; they are executed and graded;
PPO makes it write better ones. This reimplements "Reinforcement Learning for Machine Learning
Engineering Agents" (arXiv 2509.01684, "the paper") after its Algorithm 1: begin at `train`.

    python mlerl.py --task random-acts-of-pizza                  # train, evaluate, draw figures
    python mlerl.py --mode run --task NAME --program FILE.py     # execute and grade one program

pi, theta   policy, weights: `actor`             s, a     prompt; plan + program (state, action)
D, D_prev   tasks; solutions to be improved      R, dt    reward; seconds the program ran
N, B, m     iterations, batch, oversampling      V, A, w  value, advantage, duration weight
The paper's gamma is both a learning rate (Alg. 1) and a discount (Table 3): here `lr` and `gamma`.
In shapes, B or b is sequences, T response tokens, L all of theirs, d hidden size, n tokens.
`CHOICE:` marks what the paper leaves open, `DEVIATION:` what differs from it; `# §` finds sections.
"""
from __future__ import annotations

import ast, atexit, collections, concurrent.futures, contextlib, copy, ctypes, dataclasses
import datetime, fcntl, functools, gc, glob, hashlib, importlib, inspect, io, itertools, json, math
import os, pathlib, random, re, resource, secrets, select, shutil, signal, socket, stat, struct
import subprocess, sys, tempfile, threading, time, types, weakref
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import tqdm
from annotated_types import Interval

import grade, prompts
from grade import DataError as UserError  # what is wrong and what the user can do, in one line

RANK, WORLD, LOCAL_WORLD = (int(os.environ.get(name, default)) for name, default in (
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))  # processes of torchrun

def import_torch():
    """Bind slow libraries as globals: --help and workers start without. Meet torchrun's others."""
    global checkpoint, state_dict, torch, transformers
    import torch
    import transformers
    from torch.distributed.checkpoint import state_dict
    from torch.utils.checkpoint import checkpoint
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if WORLD > 1 and not torch.distributed.is_initialized():
        if cuda := torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(days=1))
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout  # the terminal is rank 0's

# §1 Config and Attempt (Table 3) ------------------------------------------------------------------
Count, Index = Annotated[int, Interval(ge=1, le=1e9)], Annotated[int, Interval(ge=0, le=1e9)]
Positive, Size = Annotated[float, Interval(gt=0, le=1e9)], Annotated[float, Interval(ge=0, le=1e9)]
Share = Annotated[float, Interval(ge=0, le=1)]

@dataclasses.dataclass(frozen=True)
class Config:
    """Every option. Defaults are the paper's (Table 3); TINY lists what `--preset tiny` changes."""
    task: str = "random-acts-of-pizza"  # in tasks.json, or a JSON file; several with commas; all
    mode: Literal["train", "evaluate", "run", "plot"] = "train"  # what to do
    preset: Literal["auto", "tiny", "paper"] = "auto"  # auto: paper with a GPU, tiny without
    run: str = ""  # run folder; the same command again resumes it (default: runs/TASK-PRESET-sSEED)
    data_dir: str = "data"  # MLE-bench layout: DIR/TASK/prepared/{public,private}
    raw: str = ""  # folder with Kaggle's raw files, to prepare missing data from
    program: str = ""  # --mode run: the Python file to execute
    seed: Index = 0  # seed of everything random
    model: str = "Qwen/Qwen2.5-3B-Instruct"  # name or folder, or "tiny" (Table 3)
    sampler: Literal["hf", "vllm"] = "hf"  # who writes responses: transformers, or vLLM (a GPU)
    kv_cache_gb: Positive = 16.0  # GiB that vLLM has for keys and values (CHOICE)
    policy: str = ""  # a trained policy's folder to evaluate or train on, of the same preset
    sft_steps: Count = 400  # supervised steps of the tiny policy (CHOICE: the paper has none)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the forward pass (Table 3)
    gradient_checkpointing: bool = True  # trade time for memory (Table 3)
    iterations: Index = 100  # N; "total_epochs" (Table 3)
    batch_size: Count = 128  # B, executions an update (Table 3)
    oversample: Annotated[float, Interval(ge=1, le=1000)] = 2.0  # m; m * B in flight (CHOICE)
    collect: Literal["carry", "first", "wait"] = "carry"  # the unfinished (m-1)B (CHOICE: train)
    max_staleness: Index = 8  # updates; older samples are dropped (CHOICE)
    p_improve: Share = 0.5  # probability of an improvement prompt (Sec. 3.3)
    max_prompt_tokens: Count = 1024  # tokens (Table 3)
    max_response_tokens: Count = 1024  # tokens (Table 3)
    temperature: Positive = 0.7  # log-probs everywhere are of logits / temperature (Table 3)
    top_k: Annotated[int, Interval(ge=-1)] = -1  # -1: no truncation (Table 3)
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0  # 1: no truncation (Table 3)
    ignore_eos: bool = False  # go on after the end token (Table 3)
    instrument: Literal["lm", "ast", "none"] = "lm"  # who places the milestone prints (Sec. 3.2)
    reward: Literal["paper", "bounded"] = "paper"  # paper: -10 + 0.1 a milestone, else the score
    duration: Literal["paper", "none"] = "paper"  # paper: dt / mean dt on the policy loss (Eq. 3)
    drop_leaks: bool = False  # hide columns known to give the label away (tasks.json)
    report_fold: Annotated[float, Interval(ge=0, lt=1)] = 0.0  # private rows kept for reporting
    lr: Size = 1e-5  # actor (Table 3)
    anneal_to: Share = 1.0  # share of the learning rates left at iteration N (1: Table 3)
    critic_lr: Size = 1e-5  # critic (Table 3)
    critic_init_std: Size = 0.02  # of the critic's new head
    weight_decay: Size = 0.01  # AdamW
    actor_grad_clip: Positive = 1.0  # norm (Table 3)
    critic_grad_clip: Positive = 1.0  # norm (Table 3)
    mini_batch: Count = 128  # sequences an optimizer step (Table 3)
    micro_batch: Count = 8  # sequences a forward pass of each GPU (Table 3)
    ppo_epochs: Count = 1  # Table 3 says 100, but its base library then ignored it (DEVIATION)
    clip: Size = 0.2  # PPO ratio (Table 3)
    value_clip: Size = 0.5  # critic (Table 3)
    max_is_weight: Positive = 2.0  # C, cap of the weight of stale samples (CHOICE)
    entropy_coef: Size = 0.001  # bonus on a token's entropy (Table 3)
    crowding: Size = 0.0  # off a valid R, times the share of the batch with its score (CHOICE)
    kl_coef: Size = 0.001  # against the initial policy, in the reward (Table 3)
    gamma: Share = 1.0  # discount (Table 3)
    lam: Share = 1.0  # GAE's lambda (Table 3)
    loss_agg: Literal["seq", "token"] = "seq"  # mean over sequences of token means, or over tokens
    workers: Index = 0  # programs at once; 0: one a core
    timeout: Positive = 600.0  # wall seconds a program (CHOICE)
    cpu_limit: Positive = 1200.0  # CPU seconds a program (CHOICE)
    memory_gb: Positive = 8.0  # GiB a process of a program (CHOICE)
    disk_mb: Count = 1024  # MiB of a program's files, without namespaces of each one (CHOICE)
    output_kb: Count = 64  # KiB of terminal output kept, head and tail (CHOICE)
    max_procs: Count = 256  # processes and threads of a program (CHOICE)
    threads: Index = 0  # BLAS threads a program; 0: cores / workers
    fresh_interpreters: bool = False  # a new interpreter a program, not a fork
    unsafe_exec: bool = False  # run although answers or trainer cannot be protected here
    program_gpu: bool = False  # let programs see the GPU
    eval_samples: Count = 128  # samples of an evaluation (Sec. 4.1)
    save_every: Count = 10  # iterations between checkpoints (CHOICE)

TINY = dict(  # CHOICE: the tiny policy's settings; README gives the reasons
    model="tiny", dtype="float32", gradient_checkpointing=False, save_every=1, iterations=44,
    batch_size=64, mini_batch=32, micro_batch=4, oversample=1.25, max_prompt_tokens=384,
    max_response_tokens=256, top_p=0.98, instrument="ast", reward="bounded", duration="none",
    lr=2e-4, anneal_to=0.15, critic_lr=1e-3, critic_init_std=0.0, ppo_epochs=2, entropy_coef=0.015,
    crowding=0.4, kl_coef=0.005, timeout=20.0, cpu_limit=15.0, memory_gb=2.0, disk_mb=64)

@dataclasses.dataclass
class Attempt:
    """One action from prompt s to reward R."""
    task: str
    kind: str  # "solve" or "improve"
    prompt_ids: list[int]
    parent: int | None = None  # id of the attempt that is to be improved
    id: int = -1
    version: int = -1  # updates the policy had seen when it sampled this action
    response_ids: list[int] = dataclasses.field(default_factory=list)
    logp: list[float] = dataclasses.field(default_factory=list)  # behaviour policy's, per token
    plan: str = ""
    code: str = ""  # as the policy wrote it, without instrumentation
    reused: bool = False  # what follows is another attempt's with the same program
    placed: str = ""  # who placed the milestone prints: lm, ast
    outcome: str = ""  # ok no_code syntax import crash timeout memory (no|invalid)_submission infra
    dt: float | None = None  # wall seconds of the program alone; None: nothing was run
    exit: int | None = None  # exit status, or minus the signal
    output: str = ""  # stdout and stderr, head and tail, without the secret
    marks: list[str] = dataclasses.field(default_factory=list)  # what the inserted prints said
    submission: bytes = b""  # dropped once logged
    score: float | None = None  # raw score on the rows that are rewarded, None if invalid
    report: float | None = None  # raw score on the rows that are reported
    R: float = 0.0
    reason: str = ""  # why a submission was refused
    valid = property(lambda self: self.outcome == "ok")

# §2 Algorithm 1 -----------------------------------------------------------------------------------
def train(cfg, D, learner, sampler, env, maker, run):
    """Algorithm 1 with a PPO update. `run` is new, or holds a checkpoint's state (§12).
    What becomes of the (m-1)B unfinished executions decides how duration biases the gradient.
    CHOICE: "carry" lets them run on into later batches (nothing is lost, samples are a few updates
    stale), "first" kills them (slow programs are censored), "wait" samples only B and waits."""
    N, B, m, D_prev = cfg.iterations, cfg.batch_size, cfg.oversample, run.D_prev
    wanted, keep = dict(carry=(m * B, True), first=(m * B, False), wait=(B, True))[cfg.collect]
    env.submit(run.in_flight[RANK::WORLD])  # a checkpoint holds no processes: run them again
    bar = progress(desc="training", total=N * B, initial=run.iteration * B)
    for i in range(run.iteration, N):                                         # l. 1
        began = time.monotonic()
        n = round(wanted) - len(run.in_flight)
        s = draw_prompts(D, D_prev, n, maker, run, cfg.p_improve)             # l. 2: D u D_prev
        a = sampler.sample(s, learner.actor, version=i)                       # l. 3: a ~ pi(.|s)
        env.submit(a)                                                         # l. 4: env-inst(a)
        sampled = time.monotonic()
        batch, lost = env.collect(B // WORLD, i, keep, bar.update)            # l. 5: B of s', R, dt
        executed = time.monotonic()
        x = assemble(batch, learner, cfg, i)                                  # tokens, log-probs, V
        r = shape_rewards(x.R, x.logp_old, x.logp_ref, x.mask, cfg.kl_coef)
        A, returns = gae(r, x.V, x.mask, cfg.gamma, cfg.lam)
        A = whiten(A, x.mask, [a.task for a in batch], x.R)                   # l. 6: A(s, a)
        w = duration_weights([a.dt for a in batch], cfg)                      # l. 6: Eq. 3
        stats = update(learner, x, A, w, returns, cfg, i)                     # l. 7
        D_prev = [a for a in batch if a.valid]                                # l. 8: a new buffer
        run.iteration, run.D_prev = i + 1, D_prev
        run.in_flight = gather([a for a, _ in env.running])
        stats |= dict(sample_s=sampled - began, execute_s=executed - sampled,
                      update_s=time.monotonic() - executed, in_flight=len(run.in_flight))
        run.log(batch, lost, iteration_metrics(i, batch, lost, x, w, returns, stats, env))
        if (i + 1) % cfg.save_every == 0 or i + 1 == N:
            run.save(learner)
    bar.close()

# §3 Tasks and prompts (Alg. 1 l. 2 and 8, Sec. 3.3) -----------------------------------------------
def encode(tokenizer, chat):
    """Token ids of chat messages, up to where the response begins."""
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]

class PromptMaker:
    """Turns tasks and earlier attempts into token ids that fit `max_prompt_tokens`."""
    def __init__(self, cfg, D, tokenizer):
        self.cfg, self.tokenizer, self.packages = cfg, tokenizer, prompts.importable()
        widths = (200, 80, 30, 0)  # characters of a value in the snippet of the data; 0: no snippet
        self.snippets = {(name, width): prompts.snippet(task, width)
                         for name, task in D.items() for width in widths[:3]}
        self.solve_ids = {name: self.fit(prompts.solve, [(task, width) for width in widths])
                          for name, task in D.items()}
        if long := [name for name, ids in self.solve_ids.items() if not ids]:
            raise UserError(f"the prompt of {long[0]} does not fit: raise --max-prompt-tokens")

    def fit(self, build, ladder):
        """Token ids of the first prompt on the ladder that fits, else []."""
        for task, width, *parts in ladder:  # CHOICE: the tiny policy gets short prompts
            chat = build(task, self.snippets.get((task["name"], width), ""), self.packages, *parts,
                         short=self.cfg.model == "tiny")
            if len(ids := encode(self.tokenizer, chat)) <= self.cfg.max_prompt_tokens:
                return ids
        return []

    def improve(self, task, a):
        """Token ids of the prompt to improve attempt a (App. C.2), [] if its code is too long.
        CHOICE: over budget go the snippet, then the head of the output, then the goal."""
        return self.fit(prompts.improve, [
            (task | goal, width, a.plan, a.code, a.output[-tail:] if tail else "")
            for goal, width, tail in (({}, 80, 1500), ({}, 0, 1500), ({}, 0, 600), ({}, 0, 200),
                                      ({"goal": ""}, 0, 200), ({"goal": ""}, 0, 0))])

def draw_prompts(D, D_prev, n, maker, run, p_improve):
    """n prompts s from D u D_prev (Alg. 1 l. 2): tasks evenly, improve with p_improve (Sec. 3.3).
    CHOICE: while D_prev has nothing of a task, or what is drawn is too long, from scratch. Of
    several processes each returns its own, as many as the others: n is rounded up."""
    names, drawn, first = list(D), [], run.drawn
    run.drawn += math.ceil(max(0, n) / WORLD) * WORLD
    seed = maker.cfg.seed * 10 ** 6 + first + RANK
    rng = random.Random(seed)
    torch.manual_seed(seed)  # also of what is sampled next: a resumed run draws the same
    for k in range(first + RANK, run.drawn, WORLD):
        task = D[names[k % len(names)]]
        candidates = [a for a in D_prev if a.task == task["name"]]
        a, ids = Attempt(task["name"], "solve", maker.solve_ids[task["name"]], id=k), []
        if candidates and rng.random() < p_improve:
            parent = rng.choice(candidates)
            ids = maker.improve(task, parent)
            run.skipped += not ids
        drawn.append(Attempt(task["name"], "improve", ids, parent.id, id=k) if ids else a)
    return drawn

# §4 Sampling (Alg. 1 l. 3) ------------------------------------------------------------------------
class HFSampler:
    """`sample` yields attempts as they are written: their programs run already."""
    def __init__(self, cfg, tokenizer):
        self.cfg, self.tokenizer, self.eos = cfg, tokenizer, tokenizer.eos_token_id
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama's has none
        self.generation = transformers.GenerationConfig(
            do_sample=True, temperature=cfg.temperature, top_k=max(0, cfg.top_k), top_p=cfg.top_p,
            repetition_penalty=1.0, max_new_tokens=cfg.max_response_tokens, pad_token_id=self.eos,
            eos_token_id=None if cfg.ignore_eos else self.eos)

    def sample(self, attempts, lm, version):
        """Fill response_ids, logp, version, plan and code of each attempt and yield it."""
        for a in self.write(attempts, lm):
            text = self.tokenizer.decode(a.response_ids, skip_special_tokens=True)
            a.version, (a.plan, a.code) = version, parse_response(text)
            yield a

    def write(self, attempts, lm):
        """Yield the attempts with response_ids and logp."""
        lm.generation_config = transformers.GenerationConfig()  # a checkpoint's would fill gaps
        for k in range(0, len(attempts), self.cfg.batch_size):
            chunk = attempts[k:k + self.cfg.batch_size]
            asked = self.tokenizer.pad({"input_ids": [a.prompt_ids for a in chunk]},
                                       padding_side="left", return_tensors="pt").to(lm.device)
            with torch.no_grad(), autocast(self.cfg, lm.device):
                out = lm.generate(**asked, generation_config=self.generation, synced_gpus=WORLD > 1)
            for a, row in zip(chunk, out[:, asked.input_ids.shape[1]:].tolist()):
                stop = self.eos in row and not self.cfg.ignore_eos
                a.response_ids = row[:row.index(self.eos) + 1] if stop else row
            logp, mask = score_tokens(lm, chunk, self.cfg, shared=False)      # (b, T)
            for a, row, keep in zip(chunk, logp, mask):
                a.logp = row[keep].tolist()
            yield from chunk

class VLLMSampler(HFSampler):
    """The same with vLLM, in this process: one engine writes with the weights of whichever model it
    is given, and sleeps in between. Log-probs are its own, of the tempered (truncated) policy."""
    def __init__(self, cfg, folder):
        os.environ |= dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
        with grade.blame(UserError, f"vLLM can't serve {folder} (no GPU free? less --kv-cache-gb)"):
            import vllm
            super().__init__(cfg, transformers.PreTrainedTokenizerFast.from_pretrained(folder))
            self.llm = vllm.LLM(
                str(folder), skip_tokenizer_init=True, dtype=cfg.dtype, seed=cfg.seed + RANK,
                distributed_executor_backend="external_launcher" if WORLD > 1 else None,
                max_num_seqs=cfg.batch_size, kv_cache_memory_bytes=int(cfg.kv_cache_gb * 2 ** 30),
                logprobs_mode="processed_logprobs", enable_sleep_mode=torch.cuda.is_available())
        self.longest = self.llm.llm_engine.model_config.max_model_len  # tokens
        self.params = vllm.SamplingParams(  # ignore_eos: no end token but ours ends a response
            temperature=cfg.temperature, top_k=max(0, cfg.top_k), top_p=cfg.top_p, ignore_eos=True,
            stop_token_ids=[] if cfg.ignore_eos else [self.eos], logprobs=0,
            max_tokens=cfg.max_response_tokens, detokenize=False)

    def write(self, attempts, lm):
        """Yield each attempt when it is done, while the others are written on."""
        torch.cuda.empty_cache()
        self.llm.wake_up()
        weights = ((name, whole(t)) for name, t in lm.state_dict().items())  # also tied ones
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()  # of other weights
        engine, waiting = self.llm.llm_engine, {str(a.id): a for a in attempts}
        for key, a in waiting.items():
            if len(a.prompt_ids) < self.longest:  # else a program too long to be copied
                engine.add_request(key, {"prompt_token_ids": a.prompt_ids}, self.params)
        while engine.has_unfinished_requests():
            for out in [out for out in engine.step() if out.finished]:
                a, done = waiting.pop(out.request_id), out.outputs[0]
                a.response_ids = list(done.token_ids)
                a.logp = [p[token].logprob for p, token in zip(done.logprobs, a.response_ids)]
                yield a
        if torch.cuda.is_available():  # a CPU has no such mode
            self.llm.sleep(level=2)  # without weights, keys and values

def parse_response(text):
    """(plan, code): the text before the first closed fenced block, and what stands in the block."""
    block = re.search(r"^```\w*[ \t]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return (text[:block.start()].strip(), block.group(1)) if block else (text.strip(), "")

# §5 Environment instrumentation (Alg. 1 l. 4, Sec. 3.2, App. C.3) ---------------------------------
MODEL = re.compile("Classif|Regress|Ridge|Lasso|NB$|SV[CR]$|Search|[Mm]odel|Net$|ipeline|Sequent")
LOAD = {"read_csv", "read_json", "read_parquet", "load", "loads", "open"}
PREDICT = {"predict", "predict_proba", "predict_log_proba", "decision_function"}
LOSS = "loss|auc|acc|accuracy|score|error|rmse|mse|mae|logloss|kappa|f1"
STAGES, LOSSES = ([marker for marker, _ in prompts.MILESTONES if marker.endswith(":") == loss]
                  for loss in (False, True))
# A milestone's print. A loss is a bare name or subscript: printing it cannot change anything.
MARKER_PRINT = re.compile(
    rf"""^([ \t]*)print\(["']((?:{'|'.join(STAGES)})(?=["']\))|(?:{'|'.join(LOSSES)})(?=["'],))"""
    r"""["'](?:, *(\w+(?:\[["']?\w+["']?\])*))?\)[ \t]*(?:#.*)?$""", re.MULTILINE)
HIDE = r"\1pass"  # takes the place of the policy's own marker prints

def calls(node):
    """Names of all that a statement calls, as in {"read_csv", "fit"}."""
    return {getattr(c.func, "attr", getattr(c.func, "id", "")) for c in ast.walk(node)
            if isinstance(c, ast.Call)}

def milestones(tree):
    """Yields (marker, the statement after which it is reached, a loss's expression or None).
    CHOICE: rules instead of the paper's LM: the last import, the last load before the model, the
    first model built, the last fit before the last prediction, the last prediction, and any
    assignment to a name such as train_auc or val_loss."""
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
    for marker, nodes in zip(STAGES, (imports, loaded, model, trained, predicted)):
        yield from ((marker, n, None) for n in nodes)
    parts = "train|training", "test|testing|val|valid|validation|cv|oof|dev"
    for marker, who in zip(LOSSES, parts):
        name = re.compile(rf"(({who})_({LOSS})|({LOSS})_({who}))s?", re.IGNORECASE)
        yield from ((marker, n, n.targets[0].id) for n in simple if isinstance(n, ast.Assign)
                    and isinstance(n.targets[0], ast.Name) and name.fullmatch(n.targets[0].id))

def instrument(code, secret, copied=""):
    """(program with a print at each milestone, who placed them: "lm" or "ast") (Sec. 3.2).
    Each print carries the run's secret, so that the policy's own earn nothing, in a try block, that
    cannot fail. Of the frozen LM's copy only places count: if more was changed, rules decide. What
    does not parse stays, or in threads at once (CPython's gh-106905, a SystemError)."""
    def ours(indent, marker, loss):
        loss = f", {loss}" if loss else ""
        return f"{indent}try: print('{secret} {marker}'{loss})\n{indent}except Exception: pass"
    def passes(program):  # one more for each print, unless it got into a text
        return sum(isinstance(node, ast.Pass) for node in ast.walk(ast.parse(program)))
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError, SystemError):
        plain, m = MARKER_PRINT.subn(HIDE, code)
        program, n = MARKER_PRINT.subn(lambda found: ours(*found.groups()), copied)
        if copied and passes(program) == passes(code) + m + n and ast.dump(ast.parse(plain)) == (
                ast.dump(ast.parse(MARKER_PRINT.sub("", copied)))):
            return program, "lm"
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError, SystemError):
        n, lines = 0, re.sub("\r\n?", "\n", code).split("\n")
        found = sorted(milestones(ast.parse(code)), key=lambda found: found[1].end_lineno)
        for marker, node, loss in reversed(found):
            indent = lines[node.lineno - 1][:node.col_offset]
            if not indent.strip():  # else other statements stand on its line
                lines.insert(node.end_lineno, ours(indent, marker, loss))
                n += 1
        if passes("\n".join(lines)) == passes(code) + n:
            return "\n".join(lines), "ast"
    return code, ""

def lm_copies(attempts, sampler, lm):
    """Pairs (attempt, the frozen LM's copy of its program with the prints asked for) (App. C.3)."""
    left = {a.id: a for a in attempts}  # all: weights must not change while something is written
    asked = [Attempt("", "instrument", encode(sampler.tokenizer, prompts.instrument(
        MARKER_PRINT.sub(HIDE, a.code))), id=a.id)
        for a in left.values() if a.code.strip() and instrument(a.code, "")[1]]  # it parses
    for copied in sampler.sample(asked, lm, -1):  # programs run as soon as they are copied
        yield left.pop(copied.id), copied.code
    yield from ((a, "") for a in left.values())

# §6 Execution (Alg. 1 l. 4-5) ---------------------------------------------------------------------
# Programs are hostile: in search of reward they find the answers if they can. The trainer, which
# alone knows these, hands programs to workers. A worker, one a slot, forks one program at a time
# behind these walls, watches it, kills all that it leaves, and empties its box:
#   user id     one a slot, where the trainer is root: files, signals and limits of others
#   namespaces  the worker is process 1 of its own process ids and network; all mounts are read-only
#               but a box and a /dev/shm in memory, new for each program, which the kernel bounds
#   Landlock    a list of folders that may be read or written; no TCP, signals or tracing outward
WALLS = (["user id", "namespaces", "Landlock"], ["namespaces", "Landlock"], ["user id", "Landlock"],
         [])  # best first; the last only with --unsafe-exec
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CORES = max(1, CORES // LOCAL_WORLD)  # of this process
REMOVE = 'rm -rf "$0" || { sleep 1; chmod -R u+rwX "$0"; rm -rf "$0"; }'  # also closed folders
MAX_FILES, MAX_SUBMISSION, FLOOD = 20000, 100 << 20, 64 << 20  # files, bytes, bytes
FAILURES = dict(SyntaxError="syntax", IndentationError="syntax", TabError="syntax",
                ImportError="import", ModuleNotFoundError="import", MemoryError="memory")
PRELOAD = """pandas sklearn.compose sklearn.decomposition sklearn.ensemble sklearn.linear_model
    sklearn.feature_extraction.text sklearn.model_selection sklearn.naive_bayes sklearn.neighbors
    sklearn.neural_network sklearn.svm lightgbm xgboost torch""".split()

def libc(name, *args):
    """Call the C library; OSError where the function fails."""
    args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    if (value := getattr(ctypes.CDLL(None, use_errno=True), name)(*args)) == -1:
        raise OSError(ctypes.get_errno(), f"{name} failed")
    return value

def landlock(readable, writable):
    """Restrict this process for good to these paths (Linux 5.13), no TCP (6.7), signals (6.12)."""
    create, add, restrict = 444, 445, 446  # system calls, the same on all architectures
    abi = libc("syscall", create, None, 0, 1)
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1  # all that this kernel knows
    rules = struct.pack("QQQ", rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    ruleset = libc("syscall", create, rules, len(rules), 0)
    read, on_files = 1 << 0 | 1 << 2 | 1 << 3, 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
    for path in filter(os.path.exists, [*readable, *writable]):
        allowed = (rights if path in writable else read) & (-1 if os.path.isdir(path) else on_files)
        rule = struct.pack("=Qi", allowed & rights, os.open(path, os.O_PATH))
        libc("syscall", add, ruleset, 1, rule, 0)
    libc("syscall", restrict, ruleset, 0)

def enter_box(job):
    """Import what programs import (only: forks would miss threads); build the walls that stay."""
    for name in PRELOAD if job.forked else []:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if job.walls:
        pathlib.Path("/proc/self/oom_score_adj").write_text("1000")  # killed before the trainer is
        libc("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: nothing gets out of sight
        libc("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if "namespaces" in job.walls:
        mount_setattr, recursive, read_only = 442, 0x8000, struct.pack("QQQQ", 1, 0, 0, 0)
        libc("syscall", mount_setattr, -100, b"/", recursive, read_only, 32)
    weakref.finalize._registry.clear()  # torch's would take each program 25 ms
    gc.freeze()  # the collector must not touch, hence copy, pages that forks share

def drop_rights(job):
    """Build the walls of a program around this process, for good."""
    # DATA, not AS: numpy reserves addresses that it never touches. NPROC counts all of a user's.
    procs = job.max_procs + 4096 * (not job.walls)
    for name, limit in dict(CORE=0, CPU=math.ceil(job.cpu_limit), FSIZE=job.disk_mb << 20,
                            NOFILE=1024, DATA=int(job.memory_gb * 2 ** 30), NPROC=procs).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit + (name == "CPU")))
    if "Landlock" in job.walls:
        devices = [f"/dev/{name}" for name in "null zero full random urandom shm".split()]
        gpus = glob.glob("/dev/nvidia*") if job.program_gpu else []
        system = """/usr /bin /lib /lib64 /proc /sys /etc/alternatives /etc/fonts /etc/group
            /etc/passwd /etc/ld.so.cache /etc/localtime /etc/nsswitch.conf""".split()
        landlock([*system, *map(os.path.realpath, filter(None, sys.path)), sys.prefix,
                  sys.base_prefix, job.public], [".", *devices, *gpus])
    if "user id" in job.walls:
        os.setgroups([])
        os.setresgid(*[job.uid] * 3)
        os.setresuid(*[job.uid] * 3)
    if job.walls:
        with contextlib.suppress(OSError):  # a new keyring (where containers do not forbid it)
            libc("syscall", 250 if os.uname().machine == "x86_64" else 219, 1, None)
        libc("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))  # no capabilities, also as root
        libc("prctl", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: may see its own /proc

def become_program(job, output):
    """Run program.py in this forked process as `python -u program.py` would. Never returns."""
    os.setsid()
    os.nice(10)  # the worker, which must be able to stop it, comes first
    work = os.getcwd()
    os.environ.update(HOME=work, TMPDIR=f"{work}/tmp")
    for fd, source in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
        os.dup2(source, fd)
    drop_rights(job)
    os.closerange(3, 1024)  # a fork inherits everything
    if not job.forked:
        os.execv(sys.executable, [sys.executable, "-u", "program.py"])
    for generator in (np.random, getattr(sys.modules.get("torch"), "default_generator", np.random)):
        generator.seed()  # else all forks would draw the same numbers
    sys.path.insert(0, work)
    sys.argv = ["program.py"]
    main = sys.modules["__main__"] = types.ModuleType("__main__")  # as pickling expects
    main.__file__, status = f"{work}/program.py", 1
    try:
        code = pathlib.Path(main.__file__).read_bytes()
        exec(compile(code, main.__file__, "exec", dont_inherit=True), main.__dict__)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        print(end.code if status and status is not end.code else "", end="", file=sys.stderr)
    except BaseException as error:  # printed without the frame of this function
        sys.excepthook(type(error), error.with_traceback(error.__traceback__.tb_next), None)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    main.__dict__.clear()  # closes, so writes, forgotten files
    gc.collect()
    os._exit(status & 255)

def see_out(job, pid):
    """Wait until a program ends or has to, kill and reap all it leaves; its exit, outcome, dt."""
    began, ended, why = time.monotonic(), 0, ""
    while ended != pid and not why:
        if select.select([0], [], [], min(max((time.monotonic() - began) / 50, 5e-4), 0.05))[0]:
            why = "cancelled"  # the trainer wants it no more, or is gone
        elif time.monotonic() > began + job.timeout:
            why = "timeout"
        else:
            ended, status = os.waitpid(-1, os.WNOHANG)  # the program, or an orphan of it
    dt = job.timeout if why == "timeout" else time.monotonic() - began
    if os.getpid() != 1 and "user id" in job.walls:  # at one stroke: a sweep would miss what forks
        kill_user(job.uid)
    else:
        with contextlib.suppress(ProcessLookupError):  # the namespace, else the program's group
            os.kill(-1 if os.getpid() == 1 else -pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)  # orphans are our children, since we are process 1 or a subreaper
    return dict(exit=None if why else os.waitstatus_to_exitcode(status), outcome=why, dt=dt)

@contextlib.contextmanager
def new_box(job, slot):
    """Make a work folder, the current one until it is removed with all that a program left."""
    in_memory = [slot, "/dev/shm", "/run"] if "namespaces" in job.walls else []  # hides services
    for folder in in_memory:
        libc("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 2 | 4,  # no setuid, no device files
             b"mode=1777,size=%dm,nr_inodes=%d" % (job.disk_mb, MAX_FILES))
    (slot / "work/tmp").mkdir(parents=True)
    os.chdir(slot / "work")  # whatever a program puts in its place
    shutil.copyfile(job.code, "program.py")
    pathlib.Path(job.task).symlink_to(pathlib.Path(job.public, job.task))
    for path in (".", "tmp", "program.py") if "user id" in job.walls else ():
        os.chown(path, job.uid, job.uid)
    yield
    os.chdir("/")
    for folder in in_memory:
        libc("umount2", os.fsencode(folder), 2)  # MNT_DETACH
    if not in_memory:
        subprocess.run(["sh", "-c", REMOVE, slot / "work"])
        subprocess.run(["find", "/dev/shm", "-user", str(job.uid), "-delete"])

def execute(job, slot, channel):
    """Run one program in a new work folder; give the trainer what it leaves, open but unread."""
    with new_box(job, slot):
        output = tempfile.TemporaryFile(dir=slot)
        pid = os.fork()
        if pid == 0:
            try:
                become_program(job, output.fileno())
            finally:
                os._exit(77)
        result = see_out(job, pid)
        # Whatever this process reads, later programs, its forks, could find in its memory.
        files = [output, *filter(None, [result["exit"] == 0 and open_submission()])]
    socket.send_fds(channel, [json.dumps(result).encode()], [f.fileno() for f in files])

def receive(channel, secret, limit):
    """What the Attempt is to hold of a program; ValueError if its worker died. No word of output is
    believed: forging one may change the name of a program's failure, never make it a success."""
    said, fds, *_ = socket.recv_fds(channel, 1 << 16, 2)
    with contextlib.ExitStack() as stack:
        files, result = [stack.enter_context(open(fd, "rb")) for fd in fds], json.loads(said)
        if not files:  # "infra"
            return result
        fcntl.fcntl(files[0], fcntl.F_SETFL, 0)  # no O_DIRECT, with which reading would fail
        text = os.pread(fds[0], FLOOD, 0).decode(errors="replace")
        data = files[1].read() if len(files) > 1 else None
    # One behind a quote is only a traceback's view of an inserted line.
    marks = re.findall(rf"(?<!['\"]){secret} ([^\r\n]{{0,200}})", text)[:64]
    text = re.sub(f"{secret} ?", "", text)
    if len(text) > limit:
        cut = f"\n... {len(text) - limit} characters cut ...\n"
        text = text[:limit // 2] + cut + text[-limit // 2:]
    outcome = result["outcome"] or name_outcome(result["exit"], text, data)
    return result | dict(outcome=outcome, output=text, marks=marks, submission=data or b"")

def name_outcome(status, text, data):
    """A word for how a program ended; for a failure from the traceback at the end of its output."""
    if status == 0:
        return "no_submission" if data is None else "ok"
    if status == -signal.SIGXCPU:
        return "timeout"
    error = (re.findall(r"^([\w.]*(?:Error|Exception|Interrupt))(?::|$)", text, re.M) or [""])[-1]
    return next((word for end, word in FAILURES.items() if error.endswith(end)), "crash")

def open_submission():
    """A submission, opened; None for a link, FIFO, device, folder or gigantic file."""
    plain = lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    with contextlib.suppress(OSError):
        info = os.fstat((file := open("submission.csv", "rb", opener=plain)).fileno())
        if stat.S_ISREG(info.st_mode) and info.st_nlink == 1 and info.st_size <= MAX_SUBMISSION:
            return file

def kill_user(uid):
    """Kill all processes of a user at one stroke, with ids that no program can signal."""
    code = f"import os; os.setresuid({uid - 10**9}, {uid}, {uid - 10**9}); os.kill(-1, 9)"
    subprocess.run([sys.executable, "-ISc", code], stderr=subprocess.DEVNULL, cwd="/")

def worker():
    """A slot's process: reads jobs from stdin, a line of JSON each, until it closes, and answers
    there: it is a socket. An empty line means: kill the program that runs."""
    slot, channel, boxed = pathlib.Path.cwd(), socket.socket(fileno=0), False
    del sys.path[0]  # this file's folder, in which data and runs may lie: closed to programs
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a handler would let programs reach process 1
    kinds = range(16 if sys.platform == "linux" else 9)
    limits = [*map(resource.getrlimit, kinds), os.nice(0)]
    for line in filter(bytes.strip, sys.stdin.buffer):
        job = types.SimpleNamespace(**json.loads(line))
        try:
            boxed = boxed or not enter_box(job)
            execute(job, slot, channel)
        except OSError as error:
            channel.sendall(json.dumps(dict(outcome="infra", output=str(error))).encode())
        if limits != [*map(resource.getrlimit, kinds), os.nice(0)]:
            return  # a program of our own user id changed them

PROBE = """
import contextlib, os, resource, socket, wave  # the last one anew: libraries must be readable
for claim, attacks in [
        ("private answers", [(os.open, path, os.O_RDONLY) for path in {answers!r}]),
        ("the trainer", [(os.kill, {pid}, 0), (open, "/proc/{pid}/environ"),
                         (resource.prlimit, {pid}, resource.RLIMIT_CORE)]),
        ("files outside its folder", [(os.utime, {stage!r}), *((os.listdir, f) for f in {home!r})]),
        ("network", [(socket.socket(type=socket.SOCK_DGRAM).sendto, b"", ("127.0.0.1", 9))]),
        ("a virtual machine's host", [(socket.socket, 40)])]:  # AF_VSOCK
    reached = "out of"
    for act, *arguments in attacks:
        with contextlib.suppress(OSError):
            act(*arguments)
            reached = "NOT out of"
    print(reached, "their reach:", claim)
import pandas, sklearn.linear_model
sklearn.linear_model.LogisticRegression().fit([[0.0], [1.0]], [0, 1])
open("submission.csv", "w").close()
"""

class Pool(concurrent.futures.ThreadPoolExecutor):  # a thread a slot
    """Executes programs, cfg.workers at a time. public: {task: folder that programs see}, staged as
    a copy; private: folders they must not see. `report` says in words what was found to hold.
    Raises UserError where the answers or the trainer cannot be protected, unless unsafe_exec."""
    def __init__(self, cfg, public, private, secret):
        super().__init__(count := cfg.workers or CORES)
        threads = str(cfg.threads or max(1, CORES // count))
        kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LD_LIBRARY_PATH")}
        self.env = kept | dict(OMP_NUM_THREADS=threads, LANG="C.UTF-8", PYTHONMALLOC="malloc",
                               PYTHONHASHSEED="0",  # sets print alike in all workers
                               GLIBC_TUNABLES="glibc.malloc.hugetlb=1")  # so forks are faster
        self.env |= {} if cfg.program_gpu else {"CUDA_VISIBLE_DEVICES": ""}
        self.stage = pathlib.Path(tempfile.mkdtemp(prefix="mlerl-"))
        self.janitor = subprocess.Popen(  # clears up when we end, however we end
            ["sh", "-c", f"cat; {REMOVE}", self.stage], stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True)
        uid = 1_900_000_000 + secrets.randbelow(1 << 20) * 100  # nobody's
        self.slots = [types.SimpleNamespace(folder=self.stage / f"slot{k}", uid=uid + k,
                                            process=None, began=None) for k in range(count)]
        self.free = self.slots.copy()
        self.job = dataclasses.asdict(cfg) | dict(secret=secret, public=str(self.stage / "public"))
        for task, folder in public.items():
            shutil.copytree(folder, self.stage / "public" / task / "prepared" / "public")
        subprocess.run(["chmod", "-R", "u+rwX,go=rX", self.stage], check=True)
        self.report = [f"{count} at once, {threads} thread(s) each",
                       *self.choose(cfg, next(iter(public)), private)]

    def choose(self, cfg, task, private):
        """Take the first walls that withstand PROBE, forking if that works; says what holds."""
        answers = [os.path.abspath(path) for folder in filter(None, [*private, cfg.raw])
                   for path in (folder, *pathlib.Path(folder).rglob("*"))]
        code = PROBE.format(answers=answers, pid=os.getpid(), stage=str(self.stage),
                            home=[os.path.expanduser("~"), os.path.abspath(cfg.run)])
        possible = [walls for walls in WALLS if "user id" not in walls or not os.getuid()]
        for walls, forked in itertools.product(possible, (not cfg.fresh_interpreters, False)):
            self.job |= dict(walls=walls, forked=forked)
            result = self.run(task, code, timeout=120, cpu_limit=60, memory_gb=4)
            report = re.findall("(?:NOT )?out of their reach: .*", result["output"])
            safe = "NOT" not in "".join(report[:2])  # the answers and the trainer
            if result["outcome"] == "ok" and (safe or cfg.unsafe_exec):
                return [
                    "forked with the usual imports" if forked else "fresh interpreters",
                    f"walls: {', '.join(walls) or 'none'}", *report,
                    "NOT limited: memory that their processes share, or hold together"
                    + ", number of files" * ("namespaces" not in walls)
                    + ", number of processes" * (not os.getuid() and "user id" not in walls)]
            self.hang_up(self.free[-1])  # the worker is behind these walls for good
        raise UserError(f"programs cannot run safely here ({result['outcome']}: "
                        f"{result['output'][-200:]}): see README's table, or accept the risk with "
                        "--unsafe-exec")

    def run(self, task, code, **limits):
        """Execute a program, again where it failed by our fault; what `receive` returns. Blocks."""
        slot = self.free.pop()
        job = self.job | dict(task=task, code=f"{slot.folder}.py", uid=slot.uid) | limits
        for _ in range(2):
            slot.began = time.monotonic()
            try:
                pathlib.Path(job["code"]).write_bytes(code.encode(errors="replace"))
                slot.process = slot.process or self.start_worker(slot, job["walls"])
                slot.channel.sendall(json.dumps(job).encode() + b"\n")
                result = receive(slot.channel, job["secret"], job["output_kb"] << 10)
            except (OSError, ValueError) as error:
                result = dict(outcome="infra", output=f"a worker died or did not start ({error})")
            if result["outcome"] != "infra":
                break
            self.hang_up(slot)
        slot.began = None
        self.free.append(slot)
        return result | dict(output=result["output"].replace(f"{slot.folder}/work/", ""))

    def start_worker(self, slot, walls):
        """A worker in a clean environment and perhaps in its own namespaces."""
        subprocess.run(["sh", "-c", REMOVE, slot.folder])  # of a worker that died
        slot.folder.mkdir(mode=0o711)
        command = [sys.executable, "-u", os.path.abspath(__file__), "_worker"]
        if "namespaces" in walls:
            unshare = "unshare --pid --fork --kill-child --net --ipc --mount --mount-proc".split()
            command = unshare + ["--map-root-user"] * ("user id" not in walls) + command
        slot.channel, theirs = socket.socketpair()
        with theirs:
            return subprocess.Popen(
                command, stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                cwd=slot.folder, env=self.env, start_new_session=True)

    def hang_up(self, slot):
        """A slot's worker kills its program and ends."""
        process, slot.process = slot.process, None
        if process:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                slot.channel.shutdown(socket.SHUT_WR)
                process.wait(1)
            process.kill()
            process.wait()
            if not os.getuid():  # without namespaces, the program of a dead worker lives on
                kill_user(slot.uid)

    def cancel(self):
        """Kill what runs; returns the seconds that each program had run."""
        running = [(slot, began) for slot in self.slots if (began := slot.began)]
        for slot, _ in running:
            with contextlib.suppress(OSError, AttributeError):  # no worker now
                slot.channel.sendall(b"\n")
        return [time.monotonic() - began for _, began in running]

    def close(self):
        """End all workers and what they run."""
        self.shutdown(wait=False, cancel_futures=True)
        while any(slot.process or slot.began for slot in self.slots):  # also one that starts now
            with concurrent.futures.ThreadPoolExecutor(len(self.slots)) as threads:
                list(threads.map(self.hang_up, self.slots))
        self.shutdown()
        self.janitor.communicate()

# §7 Reward (Alg. 1 l. 5, Sec. 3.2) ----------------------------------------------------------------
FAIL, MARK = -10.0, 0.1  # a total failure; each milestone it reached nevertheless (Sec. 3.2)

def reward(task, a, cfg):
    """R(s, env-inst(a)) of an executed attempt.
    paper: -10 + 0.1 a milestone, or the score, negated where lower is better (Sec. 3.2).
    bounded (CHOICE): (-1 + 0.1 a milestone) / 10, or for the signed score s of a valid program
    (1 + tanh(2 (s - bronze) / |bronze - sample|)) / 2: steepest at a bronze medal (or median)."""
    marks = sum(any(re.search(p, m) for m in a.marks) for _, p in prompts.MILESTONES)
    if cfg.reward == "paper":
        return task["sign"] * a.score if a.valid else FAIL + MARK * marks
    if not a.valid:
        return (-1.0 + MARK * marks) / 10
    sample, bronze = task["sample_score"] or 0.0, next(
        v for v in (task["bronze"], task["median"], 0.0) if v is not None)
    far = abs(bronze - sample) or 1.0
    return 0.5 + 0.5 * math.tanh(2 * task["sign"] * (a.score - bronze) / far)

class Environment:
    """P(s, env-inst(a)) of Alg. 1 l. 4: instruments, executes, grades and rewards attempts."""
    def __init__(self, cfg, D):
        self.cfg, self.D, self.secret = cfg, D, secrets.token_hex(8)
        self.pool = Pool(cfg, {name: task["public"] for name, task in D.items()},
                         [task["private"] for task in D.values()], self.secret)
        for name, task in D.items():  # from here on prompts show what programs see
            task["public"] = self.pool.stage / "public" / name / "prepared" / "public"
            if cfg.drop_leaks:
                grade.drop_columns(task["public"], task["leaks"])
        self.copies = lambda attempts: ((a, "") for a in attempts)  # or lm_copies
        self.running = []  # (attempt, future of its result), oldest first

    def submit(self, attempts):
        """Queue attempts as they come. CHOICE: copies of a program in flight share its run."""
        for a, copied in self.copies(attempts):
            same = [f for b, f in self.running if b.task == a.task and b.code == a.code and b.plan]
            a.reused = bool(a.plan and same)
            self.running += [(a, same[0] if a.reused else self.pool.submit(self.step, a, copied))]

    def step(self, a, copied=""):
        """Instrument, execute, grade and reward an attempt, in a thread: the fields that this
        fills. One without plan or code fails unexecuted (Sec. 3.2)."""
        task, result = self.D[a.task], dict(outcome="no_code")
        if a.plan and a.code.strip():
            code, placed = ((a.code, "") if self.cfg.instrument == "none" else
                            instrument(a.code, self.secret, copied))
            result = self.pool.run(a.task, code) | dict(placed=placed)
        if result["outcome"] == "ok":
            try:
                result |= {name: grade.grade(task, result["submission"], task["truth"], task[rows])
                           for name, rows in (("score", "rows"), ("report", "report_rows"))}
            except grade.InvalidSubmission as problem:
                result |= dict(outcome="invalid_submission", reason=str(problem)[:300])
        return result | dict(R=reward(task, dataclasses.replace(a, **result), self.cfg))

    def collect(self, B, i, keep, tick=lambda n: None):
        """Wait until B executions complete (Alg. 1 l. 5), each process for its own; returns all of
        theirs: (batch, lost). lost["infra"], ["stale"]: attempts that failed by our fault, or are
        over max_staleness updates old, never rewarded; ["killed"]: seconds of those not kept."""
        batch, lost = [], dict(infra=[], stale=[], killed=[])
        while len(batch) < B and self.running:
            futures = [future for _, future in self.running]
            ended = concurrent.futures.wait(futures, return_when="FIRST_COMPLETED").done
            a, future = self.running.pop([f in ended for f in futures].index(True))  # the oldest
            vars(a).update(future.result())
            old = i - a.version > self.cfg.max_staleness
            where = lost["infra"] if a.outcome == "infra" else lost["stale"] if old else batch
            where.append(a)
            tick(where is batch)
        if not keep:
            lost["killed"] = self.cancel()
        batch, lost = gather(batch), {why: gather(those) for why, those in lost.items()}
        if len(lost["infra"]) > 0.2 * (len(batch) + len(lost["infra"])):
            why = lost["infra"][-1].output[-200:].strip()
            raise UserError(f"{len(lost['infra'])} programs failed by our fault ({why}): try again")
        return batch, lost

    def cancel(self):
        """Kill everything in flight; returns the seconds each program had run."""
        for _, future in self.running:
            future.cancel()
        self.running.clear()
        return self.pool.cancel()

# §8 Actor, critic, reference (Table 3) ------------------------------------------------------------
LOGITS = 2 ** 28  # numbers that exist at one time: 1 GiB in float32

class Learner:
    """Actor (a causal LM), critic (a separate model of the same checkpoint, scalar head) and their
    optimizers (Table 3); ref, the frozen initial policy; tokenizer. Float32 master weights."""
    def __init__(self, cfg, folder):
        torch.manual_seed(cfg.seed)  # again: a policy from the cache has drawn nothing
        self.actor, self.tokenizer = load_policy(folder)
        with grade.blame(UserError, f"{folder} can't be a critic: take a Qwen, Llama, Mistral ..."):
            critic = transformers.AutoModelForTokenClassification.from_pretrained(
                folder, num_labels=1, dtype=torch.float32)  # its head's bias is 0
            torch.nn.init.normal_(critic.score.weight, std=cfg.critic_init_std)
        self.critic = critic.to(self.actor.device)  # too little memory is another matter
        self.ref = copy.deepcopy(self.actor).to(getattr(torch, cfg.dtype)).requires_grad_(False)
        for model in (self.actor, self.critic) if cfg.gradient_checkpointing else ():
            model.gradient_checkpointing_enable({"use_reentrant": False})  # where `optimize` trains
        for model in (self.actor, self.critic, self.ref):
            model.measure = types.MethodType(
                response_values if model is self.critic else response_logprobs, model)
            shard(model, cfg)
        self.actor_opt, self.critic_opt = (torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=cfg.weight_decay,
            fused=model.device.type == "cuda") for model, lr in (
                (self.actor, cfg.lr), (self.critic, cfg.critic_lr)))
        self.trained = dict(actor=(self.actor, self.actor_opt),
                            critic=(self.critic, self.critic_opt))

def load_policy(folder):
    """(model with float32 master weights, tokenizer). UserError where it can't be had."""
    with grade.blame(UserError, f"cannot load --model {folder} (give a folder, go online, or use "
                                "--preset tiny)"):
        # Not AutoTokenizer: for Qwen2 it would replace the tiny tokenizer's own splitting rule.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if tokenizer.chat_template is None:
        raise UserError(f"--model {folder} has no chat template: choose an instruction-tuned model")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer

def gather(items):
    """The lists of all processes as one, in the order of ranks, on each of them."""
    parts = [items] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(parts, items)
    return list(itertools.chain(*parts))

def shard(model, cfg):
    """FSDP2: weights, gradients and optimizer state are spread over all processes, if several, and
    whole only layer by layer, while `measure` or the model itself is called."""
    from torch.distributed import fsdp
    precision = fsdp.MixedPrecisionPolicy(getattr(torch, cfg.dtype), reduce_dtype=torch.float32)
    for part in (*model.base_model.layers, model) if WORLD > 1 else ():
        fsdp.fully_shard(part, mp_policy=precision)
    fsdp.register_fsdp_forward_method(model, "measure")

def whole(tensor):
    """A tensor, or all of one that is spread over the processes (which must all ask for it)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

def autocast(cfg, device):
    """bfloat16 compute over float32 master weights, or nothing for float32 (Table 3)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16",
                          cache_enabled=not cfg.gradient_checkpointing)  # it would hold all weights

def padded(attempts, device):
    """ids (b, L) int64, prompts and responses, padded right; where (b, L) bool, response tokens in
    them; mask (b, T) bool, the same ones, each response from t = 0."""
    texts = [torch.tensor(a.prompt_ids + a.response_ids) for a in attempts]
    where = [torch.arange(len(text)) >= len(a.prompt_ids) for text, a in zip(texts, attempts)]
    mask = [torch.ones(len(a.response_ids), dtype=torch.bool) for a in attempts]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return tuple(pad(rows).to(device) for rows in (texts, where, mask))

def hidden_states(backbone, ids, where):
    """States from which the n response tokens are predicted: (n, d). No attention mask: what
    stands right of a token cannot be seen by it anyway, and unmasked attention is faster."""
    return backbone(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][where[:, 1:]]

def response_logprobs(lm, ids, where, mask, cfg):
    """log pi(a_t | s, a_<t) and entropy of the tempered policy, logits / temperature.
    All log-probs (ratio, KL, behaviour but vLLM's) come from this one. Returns two (b, T) float32,
    zero where masked. The vocabulary is large: only LOGITS of all logits exist at one time."""
    h, y = hidden_states(lm.get_decoder(), ids, where), ids[where]            # (n, d), (n,)
    head = lm.get_output_embeddings()
    chunk = max(1, LOGITS // head.out_features)  # tokens
    def score(h, y):
        log_p = (head(h).float() / cfg.temperature).log_softmax(-1)           # (chunk, V)
        return log_p.gather(-1, y[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    again = torch.is_grad_enabled() and len(h) > chunk  # compute, not keep, logits for backward
    parts = [checkpoint(score, *some, use_reentrant=False) if again else score(*some)
             for some in zip(h.split(chunk), y.split(chunk))]
    blank = torch.zeros(mask.shape, device=ids.device)
    return tuple(blank.masked_scatter(mask, torch.cat(p)) for p in zip(*parts))

def response_values(critic, ids, where, mask, cfg):
    """V(s, a_<t) before each response token: (b, T) float32, zero where masked."""
    values = critic.score(hidden_states(critic.base_model, ids, where))       # (n, 1)
    return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, values.float())

def micro_batches(attempts, rows, size, shared=True):
    """This process's share of the rows: pairs (at most `size` row numbers, 1.0), of similar length:
    little work on padding. Each process must have as many; one too many is any row, 0.0."""
    rows = sorted(rows, key=lambda k: len(attempts[k].prompt_ids) + len(attempts[k].response_ids))
    world = WORLD if shared else 1
    groups = np.array_split(rows, max(1, math.ceil(len(rows) / size / world) * world))
    groups = [group.tolist() for group in groups][RANK % world::world] if rows else []
    return [(group or rows[:1], float(bool(group))) for group in groups]

def score_tokens(model, attempts, cfg, only=None, shared=True):
    """A model's log-probs or values, no gradient, of all rows or `only` these: (B, T), mask.
    shared: all processes have the same attempts, and each scores a part."""
    mask = padded(attempts, "cpu")[2]
    out, wanted = torch.zeros(mask.shape), range(len(attempts)) if only is None else only
    parts = []
    for rows, _ in micro_batches(attempts, wanted, cfg.micro_batch, shared):
        batch = padded([attempts[k] for k in rows], model.device)
        with torch.no_grad(), autocast(cfg, model.device):
            values = model.measure(*batch, cfg)
        parts.append((rows, (values[0] if isinstance(values, tuple) else values).cpu()))
    for rows, values in gather(parts) if shared else parts:
        out[rows, :values.shape[1]] = values
    return out, mask

# §9 Advantages, duration weights, losses (Alg. 1 l. 6, Eq. 2-3) -----------------------------------
def assemble(attempts, learner, cfg, i):
    """x, tensors of update i on the CPU, zero where masked: rewards R (B,), less crowding; mask
    (B, T) bool of response tokens; (B, T) float32: logp_old of the behaviour policy, as sampled,
    logp_prox of the current one (fresh: the same), logp_ref of the initial one, values V."""
    stale = [k for k, a in enumerate(attempts) if a.version < i or cfg.sampler == "vllm"]
    scored, mask = score_tokens(learner.actor, attempts, cfg, only=stale)
    logp_old, same = torch.zeros_like(scored), collections.Counter(a.score for a in attempts)
    logp_old[mask] = torch.tensor([p for a in attempts for p in a.logp])
    return types.SimpleNamespace(
        attempts=attempts, mask=mask, logp_old=logp_old,
        logp_prox=logp_old.index_copy(0, torch.tensor(stale).long(), scored[stale]),
        R=torch.tensor([a.R - cfg.crowding * a.valid * same[a.score] / len(attempts)
                        for a in attempts]),
        logp_ref=score_tokens(learner.ref, attempts, cfg)[0],
        V=score_tokens(learner.critic, attempts, cfg)[0])

def shape_rewards(R, logp_old, logp_ref, mask, kl_coef):
    """Token rewards r_t = R [t = last] - kl_coef (log pi_old - log pi_ref) (Table 3, k1 estimator).
    R: (B,), the rest (B, T). Returns (B, T), zero where masked."""
    r = -kl_coef * (logp_old - logp_ref) * mask                               # (B, T)
    last = mask.sum(1) - 1                                                    # (B,)
    r[torch.arange(len(R)), last] += R
    return r

def gae(r, V, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016, Eq. 16; Table 3: gamma = lam = 1).
    A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), V = 0 after the last token.
    r, V, mask: (B, T), responses begin at t = 0. Returns advantages and returns A + V, both (B, T),
    zero where masked."""
    A = torch.zeros_like(r)
    A_next, V_next = torch.zeros(len(r)), torch.zeros(len(r))                 # (B,)
    for t in reversed(range(r.shape[1])):
        delta = r[:, t] + gamma * V_next - V[:, t]
        A_next = (delta + gamma * lam * A_next) * mask[:, t]
        V_next = V[:, t] * mask[:, t]
        A[:, t] = A_next
    return A, (A + V) * mask

def whiten(A, mask, tasks, R):
    """Advantages with mean 0 and variance 1 over all valid tokens of each task's rows: (B, T).
    CHOICE: 0 for a task whose rewards R (B,) do not vary: else mere noise of the critic grows."""
    out = torch.zeros_like(A)
    for task in set(tasks):
        mine = torch.tensor([t == task for t in tasks])                       # (B,)
        rows = mine[:, None] & mask                                           # (B, T)
        values, varied = A[rows], R[mine].max() > R[mine].min()
        out[rows] = varied * (values - values.mean()) * (values.var(correction=0) + 1e-8).rsqrt()
    return out

def duration_weights(dt, cfg):
    """Weights w = dt / mean(dt) on the policy gradient (Eq. 3, Sec. 3.1).
    dt: B wall seconds, None where nothing was run. Returns (B,) float32 with mean 1; it multiplies
    the policy loss only, never the value loss. CHOICE: an answer without a program was no execution
    whose duration could bias how often it is seen: weight 1 (0 would leave it no gradient)."""
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
    """Clipped surrogate (Schulman et al. 2017, Eq. 7) of Eq. 2, weighted by duration (Eq. 3).
    rho = pi / pi_prox, L = w min(C, pi_prox / pi_old) max(-A rho, -A clip(rho, 1-eps, 1+eps)).
    For fresh samples pi_prox = pi_old and this is plain PPO; stale ones and vLLM's are partly
    corrected, by a truncated weight a token (Hilton et al. 2022). logp*, A: (b, T); w: (b,).
    Returns the loss and whether it is clipped, both (b, T)."""
    rho = (logp - logp_prox).exp()                                            # (b, T)
    is_weight = (logp_prox - logp_old).exp().clamp(max=cfg.max_is_weight)     # (b, T)
    plain, clipped = -A * rho, -A * rho.clamp(1 - cfg.clip, 1 + cfg.clip)     # (b, T)
    return w[:, None] * is_weight * torch.maximum(plain, clipped), clipped > plain

def value_loss(V, V_old, returns, cfg):
    """0.5 max((V - G)^2, (clip(V, V_old +- value_clip) - G)^2) per token (Table 3): (b, T)."""
    near = V_old + (V - V_old).clamp(-cfg.value_clip, cfg.value_clip)         # (b, T)
    return 0.5 * torch.maximum((V - returns) ** 2, (near - returns) ** 2)

# §10 Update (Alg. 1 l. 7) -------------------------------------------------------------------------
def update(learner, x, A, w, returns, cfg, i):
    """PPO epochs over the batch, critic then actor (Table 3). Returns means over optimizer steps.
    The actor is left alone where no advantage is left (CHOICE)."""
    left = 1 - (1 - cfg.anneal_to) * i / max(1, cfg.iterations)
    torch.manual_seed(cfg.seed * 10 ** 6 + i)  # mini-batches: the same in all processes
    def critic_loss(rows, batch, c):
        V = learner.critic.measure(*batch, cfg)                               # (b, T)
        loss = (c * value_loss(V, like(V, x.V, rows), like(V, returns, rows), cfg)).sum()
        return loss, {"value_loss": loss}
    def actor_loss(rows, batch, c):
        logp, entropy = learner.actor.measure(*batch, cfg)                    # (b, T) each
        prox, old = like(logp, x.logp_prox, rows), like(logp, x.logp_old, rows)
        loss, clipped = policy_loss(logp, prox, old, like(logp, A, rows),
                                    w[rows].to(logp.device), cfg)             # (b, T)
        k3 = (logp - prox).exp() - 1 - (logp - prox)                          # Schulman's k3
        report = {"policy_loss": (c * loss).sum(), "entropy": (c * entropy).sum(),
                  "clip_fraction": (c * clipped).sum(), "update_kl": (c * k3).sum()}
        return report["policy_loss"] - cfg.entropy_coef * report["entropy"], report
    learner.actor_opt.param_groups[0]["lr"] = cfg.lr * left
    learner.critic_opt.param_groups[0]["lr"] = cfg.critic_lr * left
    stats = dict.fromkeys(("policy_loss", "entropy", "clip_fraction", "update_kl", "grad_norm"))
    critic = optimize(learner.critic, learner.critic_opt, critic_loss, x.attempts, x.mask, cfg,
                      cfg.critic_grad_clip)
    stats |= dict(value_loss=critic["value_loss"], critic_grad_norm=critic["grad_norm"])
    if A.any():
        stats |= optimize(learner.actor, learner.actor_opt, actor_loss, x.attempts, x.mask, cfg,
                          cfg.actor_grad_clip)
    return stats

def like(tensor, full, rows):
    """The given rows of a (B, T) tensor, in shape and on the device of `tensor`."""
    return full[rows, :tensor.shape[1]].to(tensor.device)

def optimize(model, optimizer, loss_function, attempts, mask, cfg, grad_clip, shared=True):
    """cfg.ppo_epochs passes of mini-batches; gradients add up over micro-batches (shared: and
    processes). Returns the mean over steps of what loss_function reports, and the gradient norm."""
    totals, steps = collections.Counter(), 0
    model.train()  # no dropout anywhere: this only lets checkpointing work
    for _ in range(cfg.ppo_epochs):
        for mini in torch.randperm(len(attempts)).split(cfg.mini_batch):
            mini = sorted(mini.tolist())
            c_all = torch.zeros(mask.shape)
            c_all[mini] = token_weights(mask[mini], cfg.loss_agg)             # (B, T)
            for rows, counts in micro_batches(attempts, mini, cfg.micro_batch, shared):
                batch = padded([attempts[j] for j in rows], model.device)
                with autocast(cfg, model.device):
                    loss, report = loss_function(rows, batch, like(batch[2], c_all, rows) * counts)
                (loss * WORLD ** shared).backward()  # FSDP takes the mean over processes
                totals.update({key: float(value.detach()) for key, value in report.items()})
            totals["grad_norm"] += float(whole(
                torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip))) / WORLD ** shared
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            steps += 1
    model.eval()  # checkpointing would keep `generate` from its cache
    sums = collections.Counter()
    for part in gather([totals]) if shared else [totals]:
        sums.update(part)
    return {key: value / steps for key, value in sums.items()}

# §11 Evaluation (Sec. 3.3, Sec. 4.1) --------------------------------------------------------------
def evaluate(phase, lm, D, parents, sampler, env, maker, run):
    """eval_samples programs a task, from scratch or improving `parents`, executed and logged as
    `phase`. Puts {task: summary} into run.evaluation and returns the valid attempts."""
    n = run.cfg.eval_samples * len(D)
    env.submit(sampler.sample(draw_prompts(D, parents, n, maker, run, 1.0), lm, run.iteration))
    done, _ = env.collect(n, run.iteration, True, progress(desc=phase, total=n).update)
    run.log_attempts(done, phase)
    run.evaluation[phase] = {name: summarize(task, [a for a in done if a.task == name])
                             for name, task in D.items()}
    return [a for a in done if a.valid]

def summarize(task, attempts):
    """Scores of the reported rows; score_mean counts -10 for an invalid attempt (Fig. 10), and
    best_clean leaves out programs that read a column known to leak the label."""
    valid = [a for a in attempts if a.valid]
    clean = [a for a in valid if not any(column in a.code for column in task["leaks"])]
    top, top_clean = (grade.best(task, [a.report for a in those]) for those in (valid, clean))
    return dict(n=len(attempts), valid_share=mean(a.valid for a in attempts),
                valid_score_mean=mean(a.report for a in valid),
                score_mean=mean(task["sign"] * a.report if a.valid else FAIL for a in attempts),
                best=top, best_clean=top_clean, leak_readers=len(valid) - len(clean),
                distinct=len({a.code for a in attempts if a.code}))

def mean(values):
    """Mean of an iterable of numbers, None if it is empty."""
    return float(sum(values) / len(values)) if (values := list(values)) else None

def write_evaluation(D, run):
    """evaluation.json (one task: its record alone), and a table beside the paper's numbers and
    MLE-bench's thresholds. The better of scratch and improve counts (App. C.2)."""
    records = {}
    for name, task in D.items():
        parts = {phase: tables[name] for phase, tables in run.evaluation.items()}
        top = grade.best(task, [parts[p]["best"] for p in parts if p != "untrained"])
        records[name] = parts | dict(
            best=top, medal=None if top is None or task["standin"] else grade.medal(task, top),
            executions=run.executions, paper=task["paper"], standin=task["standin"],
            report_fold=run.cfg.report_fold, prompts_skipped=run.skipped)
        known = {f"paper: {who}": {"best": score and score[0]}
                 for who, score in task["paper"].get("Table 1", {}).items()}
        known |= {f"MLE-bench: {k}": {"best": task[k]} for k in "gold silver bronze median".split()}
        print(f"\n{name}, medal: {records[name]['medal']}"
              + " - STAND-IN data, scores are not comparable" * task["standin"])
        print(pd.DataFrame(parts | known).T.to_string(float_format="{:.4g}".format, na_rep=""))
    write(run.folder / "evaluation.json", records if len(D) > 1 else records[name])

# §12 Run folder, checkpoint, resume ---------------------------------------------------------------
LOGS = "metrics.jsonl", "attempts.jsonl"
FREE = ("run", "mode", "program", "iterations", "workers", "eval_samples", "save_every", "raw",
        "data_dir", "unsafe_exec", "sampler", "kv_cache_gb")  # may differ when a run resumes
STATE = "iteration D_prev in_flight drawn skipped executions wall_s best evaluation".split()
progress = functools.partial(tqdm.tqdm, unit=" programs", leave=False, disable=RANK > 0 or None)

class Run:
    """A run's folder and state. The two logs only grow and are cut back to the last checkpoint on
    resume, which also drops a half-written line; every other file is replaced as a whole."""
    def __init__(self, cfg, D):
        self.scratch = tempfile.TemporaryDirectory()  # ranks but 0 write what nobody reads
        self.folder = pathlib.Path(self.scratch.name if RANK else cfg.run)
        self.cfg, self.D, self.clock = cfg, D, time.monotonic()
        self.D_prev, self.in_flight, self.best, self.evaluation = [], [], {}, {}
        self.iteration = self.drawn = self.skipped = self.executions = self.wall_s = 0  # so far
        self.folder.mkdir(0o700, parents=True, exist_ok=True)
        self.lock = open(self.folder / ".lock", "w")
        with grade.blame(UserError, f"{cfg.run} is in use: wait, or give another --run"):
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new, path = dataclasses.asdict(cfg), self.folder / "config.json"
        with grade.blame(UserError, f"{path} is not valid JSON; mend it or move it away"):
            old = json.loads(path.read_text()) if path.exists() else new
        if changed := [k for k in new if k not in FREE and old.get(k) != new[k]]:
            raise UserError(f"{cfg.run} differs in {', '.join(changed)}: keep it, or a new --run")
        write(path, new)
        write(self.folder / "mlerl.py", pathlib.Path(__file__).read_bytes())

    def load(self, learner):
        """Go back to the last checkpoint, if there is one."""
        path, saved, sizes = self.folder / "checkpoint.pt", {}, dict.fromkeys(LOGS, 0)
        if path.exists():
            with grade.blame(UserError, f"cannot read {path}; move it away to begin anew"):
                saved = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        vars(self).update(gather([saved.get("state", {})])[0])
        how = state_dict.StateDictOptions(full_state_dict=True, broadcast_from_rank0=WORLD > 1)
        for name, pair in learner.trained.items() if self.iteration else ():
            weights, moments = saved.get(name, ({}, {}))
            state_dict.set_state_dict(
                *pair, model_state_dict=weights, optim_state_dict=moments, options=how)
        for log, size in saved.get("log_sizes", sizes).items():
            with open(self.folder / log, "ab") as file:
                file.truncate(size)

    def save(self, learner):
        """Write checkpoint.pt, for any number of processes, and the policy as Hugging Face does."""
        saved = dict(state={name: getattr(self, name) for name in STATE},
                     log_sizes={log: (self.folder / log).stat().st_size for log in LOGS})
        for name, pair in learner.trained.items() if self.iteration else ():  # else as at the start
            saved[name] = state_dict.get_state_dict(*pair, options=state_dict.StateDictOptions(
                full_state_dict=True, cpu_offload=True))
        with grade.blame(OSError, "no checkpoint written"):  # torch raises RuntimeError, too
            save_policy(self.folder / "policy", learner.actor, learner.tokenizer)
            torch.save(saved, self.folder / "checkpoint.new")
            os.replace(self.folder / "checkpoint.new", self.folder / "checkpoint.pt")

    def log_attempts(self, attempts, phase):
        """Append to attempts.jsonl; keep each task's best program and submission in best/."""
        hidden = ("prompt_ids", "response_ids", "logp", "submission")
        with open(self.folder / "attempts.jsonl", "a") as file:
            for a in attempts:
                task, old = self.D[a.task], self.best.get(a.task)
                row = {k: v for k, v in vars(a).items() if k not in hidden}
                row |= dict(phase=phase, tokens=len(a.response_ids), standin=task["standin"])
                file.write(json.dumps(row) + "\n")
                self.executions += a.dt is not None and not a.reused
                if a.valid and a.score != old and grade.best(task, [a.score, old]) == a.score:
                    self.best[a.task] = a.score
                    for end, content in dict(py=a.code, csv=a.submission, json=row).items():
                        write(self.folder / "best" / f"{a.task}.{end}", content)
                a.submission = b""  # no longer needed

    def log(self, batch, lost, row):
        """Log an iteration: its attempts, its line of metrics, its line on the terminal."""
        self.log_attempts(batch, "train")
        self.log_attempts(lost["infra"] + lost["stale"], "dropped")
        self.wall_s, self.clock = self.wall_s + time.monotonic() - self.clock, time.monotonic()
        row |= dict(wall_s=self.wall_s, best_score=self.best.get(next(iter(self.D))),
                    standin=any(task["standin"] for task in self.D.values()))
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        tqdm.tqdm.write(
            "{iteration:4d}  valid {valid_share:.2f}  score {valid_score_mean:.4f}  best "
            "{best_score:.4f}  dt {duration_mean:.2f}s  kl {kl:.3f}  sample {sample_s:.1f}s  "
            "execute {execute_s:.1f}s  update {update_s:.1f}s".format_map(
                {k: math.nan if v is None else v for k, v in row.items()}))

def write(path, content):
    """Write bytes, text or JSON so that neither a reader nor a crash ever sees half a file."""
    text = json.dumps(content, indent=1) if isinstance(content, dict) else content
    path.parent.mkdir(exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_bytes(text if isinstance(text, bytes) else text.encode())
    os.replace(new, path)

def save_policy(folder, lm, tokenizer):
    """Save in Hugging Face format beside `folder`, then take its place."""
    new = folder.with_name(folder.name + ".new")
    lm.save_pretrained(new, is_main_process=RANK == 0, state_dict=state_dict.get_model_state_dict(
        lm, options=state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)))
    tokenizer.save_pretrained(new)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)

# §13 Metrics and figures (Fig. 1, 2, 7-10) --------------------------------------------------------
def variance_parts(R, valid):
    """Shares of Var(R), by the law of total variance, that come from: being valid or not, the
    milestones of failures, the scores of valid programs. R (B,), valid (B,) bool."""
    groups, whole = pd.Series(R).groupby(valid), np.var(R)
    within = groups.var(ddof=0) * groups.size() / len(R)
    parts = {"markers": within.get(False, 0.0), "score": within.get(True, 0.0)}
    parts["valid"] = whole - sum(parts.values())
    return {f"variance_{name}": float(part / (whole or 1.0)) for name, part in parts.items()}

def iteration_metrics(i, batch, lost, x, w, returns, stats, env):
    """One line of metrics.jsonl; "sampled" durations are also of stale and killed programs."""
    dt = [a.dt for a in batch if a.dt is not None]
    sampled = dt + lost["killed"] + [a.dt for a in lost["stale"] if a.dt is not None]
    G, V = returns[x.mask], x.V[x.mask]
    return dict(
        iteration=i, reward_mean=mean(a.R for a in batch),
        task_score_mean=mean(env.D[a.task]["sign"] * a.score if a.valid else FAIL for a in batch),
        valid_share=mean(a.valid for a in batch),
        valid_score_mean=mean(a.score for a in batch if a.valid),
        duration_mean=mean(dt), duration_sampled_mean=mean(sampled),
        weight_max=float(w.max()), ess=float(w.sum() ** 2 / (w ** 2).sum()),
        kl=float((x.logp_old - x.logp_ref)[x.mask].mean()), **stats,
        explained_variance=float(1 - (G - V).var() / G.var().clamp(min=1e-12)),
        staleness_mean=mean(i - a.version for a in batch),
        distinct=len({a.code for a in batch if a.code}), reused=mean(a.reused for a in batch),
        tasks={t: summarize(env.D[t], [a for a in batch if a.task == t]) for t in env.D},
        lm_placed=mean(a.placed == "lm" for a in batch if a.placed),
        **variance_parts([a.R for a in batch], [a.valid for a in batch]),
        outcomes=dict(collections.Counter(a.outcome for a in batch)), enforced=env.pool.report,
        **{f"lost_{why}": len(those) for why, those in lost.items()})

def plot(folder):
    """Draw figures/training.png from metrics.jsonl, config.json and evaluation.json alone."""
    import matplotlib.pyplot
    matplotlib.use("Agg")
    path = folder / "evaluation.json"
    with grade.blame(UserError, f"{folder} has nothing to draw yet, or a file there is damaged"):
        text = (folder / "metrics.jsonl").read_text().rpartition("\n")[0]  # the rest is half a line
        table = pd.read_json(io.StringIO(text), lines=True)
        table["hours"] = table["wall_s"] / 3600
        task = json.loads((folder / "config.json").read_text())["task"]
        untrained = json.loads(path.read_text() if path.exists() else "{}").get("untrained", {})
    figure, axes = matplotlib.pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis, (title, names, before) in zip(axes.flat, (
            ("Best score so far (Fig. 1, 7)", "best_score", "best"),
            ("Mean execution time, seconds (Fig. 2, 8)", "duration_mean duration_sampled_mean", ""),
            ("Mean task score, -10 if invalid (Fig. 9, 10)", "task_score_mean", "score_mean"),
            ("Mean score of valid programs", "valid_score_mean", "valid_score_mean"),
            ("Share of valid programs", "valid_share", "valid_share"),
            ("Sources of reward variance", "variance_valid variance_markers variance_score", ""))):
        x = "hours" if names == "best_score" else "iteration"
        table.plot(x=x, y=names.split(), ax=axis, title=title, grid=True)
        if untrained.get(before) is not None:
            axis.axhline(untrained[before], color="gray", ls=":", label="untrained policy")
        axis.legend()
    figure.suptitle(task + " - STAND-IN data, not comparable" * bool(table["standin"].any()))
    (folder / "figures").mkdir(exist_ok=True)
    figure.savefig(folder / "figures" / "training.png", dpi=110)

# §14 Supervised fine-tuning and the tiny policy ---------------------------------------------------
def supervised(lm, tokenizer, pairs, cfg):
    """Fine-tune lm on (chat, response) pairs: AdamW, cosine to 0, loss on response tokens (CHOICE:
    the paper's model is instruction-tuned). Temperature 1; sampling at 0.7 makes bugs rarer."""
    rng = random.Random(cfg.seed)
    cfg = dataclasses.replace(cfg, temperature=1.0, ppo_epochs=1, loss_agg="token")
    data = [Attempt("", "solve", encode(tokenizer, chat), response_ids=[
                *tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id])
            for chat, response in pairs]
    optimizer = torch.optim.AdamW(lm.parameters(), lr=2e-3, weight_decay=cfg.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.sft_steps)
    def loss(rows, batch, c):
        nll = -(c * response_logprobs(lm, *batch, cfg)[0]).sum()
        return nll, {"loss": nll}
    for _ in tqdm.trange(cfg.sft_steps, desc="supervised fine-tuning", leave=False, disable=None):
        chosen = rng.sample(data, min(cfg.mini_batch, len(data)))
        optimize(lm, optimizer, loss, chosen, padded(chosen, "cpu")[2], cfg, 1.0, shared=False)
        schedule.step()

def tiny_tokenizer(pairs):
    """Byte-level BPE of 1,300 tokens, trained on the corpus and split at line ends only, so that
    merges cross words: a common line of a program becomes a token or two."""
    from tokenizers import ByteLevelBPETokenizer, Regex, pre_tokenizers
    bpe, special = ByteLevelBPETokenizer(), ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\n"), "merged_with_previous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    # One prompt in ten: all of them, thousands of equal lines, would use up the vocabulary.
    texts = [r for _, r in pairs] + [m["content"] for chat, _ in pairs[::10] for m in chat]
    bpe.train_from_iterator(texts, vocab_size=1300, min_frequency=0, show_progress=False,
                            special_tokens=special)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>",
        additional_special_tokens=special[1:])
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    return tokenizer

def tiny_policy(cfg, D):
    """Folder of the embedded policy, trained on prompts.corpus and kept in the user's cache."""
    recipe = repr([cfg.sft_steps, cfg.mini_batch, cfg.seed, *(
        prompts.corpus(task, 50, 0) for task in D.values())]) + "".join(map(
            inspect.getsource, (prompts, supervised, tiny_tokenizer, tiny_policy)))
    name = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "mlerl", name).expanduser()
    if not folder.exists():
        pairs = [p for task in D.values() for p in prompts.corpus(task, 6000 // len(D), cfg.seed)]
        tokenizer = tiny_tokenizer(pairs)
        lm = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
            hidden_size=128, intermediate_size=336, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=4, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
            vocab_size=len(tokenizer), bos_token_id=None, pad_token_id=tokenizer.pad_token_id))
        torch.set_num_threads(max(1, min(4, CORES) - int(os.getloadavg()[0])))  # those that idle
        supervised(lm, tokenizer, pairs, cfg)
        save_policy(folder, lm, tokenizer)
    return folder

# §15 Command line ---------------------------------------------------------------------------------
def parse(argv):
    """Command line -> Config. UserError where a flag is unknown, malformed or impossible."""
    import pydantic, tyro
    preset = (re.findall(r"--preset[= ](\w+)", " ".join(argv)) or ["auto"])[-1]
    if preset == "auto":  # not torch.cuda: importing torch takes seconds
        preset = "paper" if os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi") else "tiny"
    default = dataclasses.replace(Config(), preset=preset, **TINY if preset == "tiny" else {})
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            cfg = tyro.cli(Config, args=argv, default=default)
        pydantic.TypeAdapter(Config).validate_python(dataclasses.asdict(cfg))
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(re.sub(r"[│╭╮╰╯─\s]+", " ", said.getvalue())[:300] + " (see --help)")
    except pydantic.ValidationError as problem:
        first = problem.errors()[0]
        raise UserError(f"--{first['loc'][0].replace('_', '-')} {first['input']}: {first['msg']}")
    if (cfg.mode == "run") != bool(cfg.program) or cfg.program and re.search("^all$|,", cfg.task):
        raise UserError("--mode run and --program FILE go together, with one --task: see --help")
    if cfg.batch_size % WORLD or WORLD > 1 and (cfg.instrument, cfg.sampler) == ("lm", "hf"):
        raise UserError(f"torchrun needs a --batch-size of k * {WORLD}, and --sampler vllm for lm")
    name = f"runs/{cfg.task.replace(',', '+')}-{preset}-s{cfg.seed}"
    cfg = dataclasses.replace(cfg, run=cfg.run or name)
    if cfg.mode in ("plot", "evaluate") and not os.path.exists(
            cfg.policy or f"{cfg.run}/metrics.jsonl"):
        raise UserError(f"--mode {cfg.mode} needs --run with a run's folder, not {cfg.run!r}")
    return cfg

def run_program(cfg, D):
    """--mode run: one program exactly as in training; prints one JSON object."""
    path = pathlib.Path(cfg.program)
    with grade.blame(UserError, f"cannot read --program {path}"):
        a = Attempt(*D, "solve", [], plan="given", code=path.read_text())
    env = Environment(cfg, D)
    with contextlib.closing(env.pool):
        vars(a).update(env.step(a))
    if a.valid:
        write(path := path.with_suffix(".submission.csv"), a.submission)
    print(json.dumps(dict(outcome=a.outcome, reward=a.R, score=a.score, reason=a.reason,
                          markers=a.marks, duration=a.dt, exit=a.exit, output=a.output[-2000:],
                          submission=str(path) if a.valid else None, standin=D[a.task]["standin"])))

def run_training(cfg, D):
    """--mode train and evaluate, from the warm start to the closing table."""
    run, env = Run(cfg, D), Environment(cfg, D)
    with contextlib.closing(env.pool):
        print(*(f"task       {name}, {('real', 'STAND-IN')[task['standin']]} data"
                for name, task in D.items()), f"policy     {cfg.policy or cfg.model} (preset "
              f"{cfg.preset}: reward {cfg.reward}, duration {cfg.duration}), {cfg.collect}, in "
              f"{cfg.run}", *(f"programs   {line}" for line in env.pool.report), sep="\n")
        torch.manual_seed(cfg.seed)
        folder = cfg.policy or cfg.model
        if folder == "tiny":
            folder = gather([tiny_policy(cfg, D) if RANK == 0 else None])[0]
        torch.set_num_threads(1 if not torch.cuda.is_available() else 4)  # programs need the cores
        engine = VLLMSampler(cfg, folder) if cfg.sampler == "vllm" else None  # memory is free now
        learner = Learner(cfg, folder)
        run.load(learner)
        sampler = engine or HFSampler(cfg, learner.tokenizer)
        if cfg.instrument == "lm":
            env.copies = lambda attempts: lm_copies(attempts, sampler, learner.ref)
        common = sampler, env, PromptMaker(cfg, D, learner.tokenizer), run
        if cfg.mode == "train" and not run.evaluation:
            evaluate("untrained", learner.ref, D, [], *common)
            run.save(learner)
        if cfg.mode == "train" and run.iteration < cfg.iterations:
            train(cfg, D, learner, *common)
            run.evaluation.pop("trained_improve", None)
        if cfg.mode == "evaluate" or "trained_improve" not in run.evaluation:
            env.cancel()  # what `carry` left in flight
            valid = evaluate("trained_scratch", learner.actor, D, [], *common)
            evaluate("trained_improve", learner.actor, D, valid, *common)  # Sec. 3.3, App. C.2
            run.save(learner)
        write_evaluation(D, run)
    if run.iteration and RANK == 0:
        plot(run.folder)
    print(f"{run.folder}: figures/training.png, evaluation.json, best/, policy/, metrics.jsonl")

def main(argv):
    """Run the command; returns the exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    try:
        cfg = parse(argv)
        if cfg.mode == "plot":
            return plot(pathlib.Path(cfg.run)) or 0
        import_torch()
        D = [grade.open_task(name.strip(), cfg.data_dir, cfg.raw or None, cfg.report_fold, cfg.seed)
             for name in (grade.load_tasks() if cfg.task == "all" else cfg.task.split(","))]
        (run_program if cfg.program else run_training)(cfg, {task["name"]: task for task in D})
        if WORLD > 1:
            torch.distributed.destroy_process_group()
            time.sleep(1)  # gloo's threads live on: none may free tensors while Python ends
        return 0
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except UserError as error:
        problem = error
    except (MemoryError, getattr(globals().get("torch"), "OutOfMemoryError", MemoryError)):
        problem = "out of memory: lower --micro-batch or --workers, or a smaller --model"
    except OSError as error:
        problem = f"{error}: free space or mend permissions, then run again to go on"
    print("mlerl:", " ".join(str(problem).split()), file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(worker() if sys.argv[1:2] == ["_worker"] else main(sys.argv[1:]))
