"""All text that a model sees: prompts, milestones, and the tiny policy's supervised corpus.

`solve`, `improve` and `instrument` return chat messages (Sec. 3.2, 3.3, App. C). `corpus` composes
the programs from which the embedded tiny policy learns to write at all; it looks at no data.
"""
from __future__ import annotations

import random
import re

# The packages that a program may use (App. C): name in the prompt -> module to import.
PACKAGES = {"statsmodels": "statsmodels", "pandas": "pandas", "timm": "timm",
            "bayesian-optimization": "bayes_opt", "scikit-learn": "sklearn", "xgboost": "xgboost",
            "numpy": "numpy", "torch": "torch", "torchvision": "torchvision",
            "lightGBM": "lightgbm", "torch-geometric": "torch_geometric"}

# Progress of a program (App. C.3): the words printed, and what earns partial credit (Sec. 3.2).
# A loss counts only with its value. `instrument` below asks the LM for exactly these words.
MILESTONES = (
    ("imported packages", r"^imported packages"),
    ("loaded data", r"^loaded data"),
    ("defined model", r"^defined model"),
    ("training loss:", r"^training loss:\s*\S"),
    ("trained model", r"^trained model"),
    ("testing loss:", r"^testing loss:\s*\S"),
    ("predicted test labels", r"^predicted test labels"),
)

SYSTEM = ("You are a machine learning engineer. You solve a task by writing one Python program that "
          "trains a model, applies it to the test set and writes a submission file.")
ANSWER = ("Answer with an outline of your approach in 3 to 5 sentences, followed by exactly one "
          "markdown code block (```python ... ```) that holds the complete program. "
          "Nothing comes after the code block.")
SHORT_SYSTEM = "Write one Python program that solves the task."


# --------------------------------------------------------------------------------------------------
# Prompts (App. C)
# --------------------------------------------------------------------------------------------------
def chat(system, user):
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def describe(task, snippet, packages):
    """The notes on a task that solve and improve share. Empty parts are left out."""
    folder = f"./{task['name']}/prepared/public/"
    header = ",".join([task["id"], *task["targets"]])
    rows = "\n".join([header, *task.get("sample_rows", [])])
    notes = [
        f"Task: {task['goal']}" if task["goal"] else "",
        f"The score is {task['metric_text']} on the test set; "
        f"{'higher' if task['higher_is_better'] else 'lower'} is better.",
        f"The data is in {folder}: {task['train']} for training, {task['test']} to predict, "
        f"{task['sample']} as an example of a submission.",
        "Run the trained model on the test set and save its predictions as ./submission.csv. The "
        f"file has one line per test record and looks like this:\n{rows}",
        f"Installed packages: {', '.join(packages)}." if packages else "",
        "There is no internet access: nothing can be installed, and no pre-trained model can be "
        "downloaded.",
    ]
    text = "Notes:\n" + "\n".join(f"- {note}" for note in notes if note)
    return text + (f"\n\nWhat the data looks like:\n{snippet}" if snippet else "")


def brief(task):
    """The tiny policy's description of a task (CHOICE: it has room for 128 tokens)."""
    return (f"Task: {task['name']}\nMetric: {task['metric']}\n"
            f"Write submission.csv: {','.join([task['id'], *task['targets'][:3]])}\n")


def solve(task, snippet, packages, short=False):
    """Messages that ask for a solution from scratch (App. C).

    snippet: text, the first records of the public files; packages: names to be listed.
    short: the tiny policy's wording, without snippet and packages.
    """
    if short:
        return chat(SHORT_SYSTEM, brief(task))
    return chat(SYSTEM, f"{ANSWER}\n\n{describe(task, snippet, packages)}")


def improve(task, snippet, packages, plan, code, output, short=False):
    """Messages that ask for a better version of a previous solution (Sec. 3.3, App. C.2).

    output: what the previous program printed, with the secret of instrumentation stripped.
    """
    if short:
        # The last lines hold the losses; a warning's long text would not fit.
        tail = "".join(line + "\n" for line in output.splitlines()[-4:] if len(line) < 40)
        return chat(SHORT_SYSTEM, f"{brief(task)}Improve:\n{plan}\n{code}Output:\n{tail}")
    asked = ("You have already implemented a solution to the task below. Revise it so that it does "
             "better on the test set. Parts that you keep must be repeated in full, because only "
             "the new program is run.")
    printed = f"\n\nIt printed:\n{output}" if output else ""
    return chat(SYSTEM, f"{asked} {ANSWER}\n\n{describe(task, snippet, packages)}\n\n"
                        f"Your previous solution:\n{plan}\n```python\n{code}```{printed}")


def instrument(code):
    """Messages that ask the frozen LM for progress prints (Sec. 3.2, App. C.3)."""
    marks = "\n".join(f'{k}. print("{marker}")' if not marker.endswith(":")
                      else f'{k}. print("{marker}", value)  # only if the program computes this loss'
                      for k, (marker, _) in enumerate(MILESTONES, 1))
    return chat("You add progress messages to Python programs and change nothing else.", (
        "Insert the following print statements, in this order, into the program below:\n"
        f"{marks}\n\nRequirements:\n"
        "1. Each print comes after the operation it names has finished, never before it.\n"
        "2. The two losses are printed only where the program itself computes such a value, from "
        "the variable that holds it; compute nothing new for them.\n"
        "3. Return the whole program in one ```python code block.\n"
        "4. Leave every other line exactly as it is: fix nothing, reformat nothing.\n\n"
        f"```python\n{code}```"))


# --------------------------------------------------------------------------------------------------
# Fragments of the tiny policy's corpus (CHOICE: the paper starts from an instruction-tuned model)
# --------------------------------------------------------------------------------------------------
# {a|b|c} stands for one option, drawn when a program is composed. Every line is ordinary library
# use. What is drawn depends on the rule in `draw` alone, never on how well anything scores.

# Family, words of the plan, import lines, expression. Families of one level share a feature budget.
SCALED = "from sklearn.pipeline import make_pipeline\nfrom sklearn.preprocessing import StandardScaler"
MODELS = (
    # level 0: simple learners on raw columns
    (0, "Gaussian naive Bayes", "from sklearn.naive_bayes import GaussianNB",
     "GaussianNB(var_smoothing={1e-9|1e-6|1e-3})"),
    (0, "Bernoulli naive Bayes", "from sklearn.naive_bayes import BernoulliNB",
     "BernoulliNB(alpha={0.1|0.5|1.0|2.0})"),
    (0, "a small decision tree", "from sklearn.tree import DecisionTreeClassifier",
     "DecisionTreeClassifier(max_depth={1|2|3|4}, random_state=0)"),
    (0, "nearest neighbors", "from sklearn.neighbors import KNeighborsClassifier",
     "KNeighborsClassifier(n_neighbors={5|11|25|51})"),
    (0, "SGD", "from sklearn.linear_model import SGDClassifier",
     'SGDClassifier(loss="log_loss", alpha={0.0001|0.001|0.01}, random_state=0)'),
    # level 1: scaled columns
    (1, "logistic regression", SCALED + "\nfrom sklearn.linear_model import LogisticRegression",
     "make_pipeline(StandardScaler(), LogisticRegression(C={0.01|0.1|1.0}, max_iter=200))"),
    (1, "ridge regression", SCALED + "\nfrom sklearn.linear_model import Ridge",
     "make_pipeline(StandardScaler(), Ridge(alpha={1.0|10.0|100.0}))"),
    (1, "scaled neighbors", SCALED + "\nfrom sklearn.neighbors import KNeighborsClassifier",
     "make_pipeline(StandardScaler(), KNeighborsClassifier(n_neighbors={15|31|61|101}))"),
    (1, "a neural network", SCALED + "\nfrom sklearn.neural_network import MLPClassifier",
     "make_pipeline(StandardScaler(), MLPClassifier(hidden_layer_sizes={16|32}, max_iter={10|20|40}, "
     "random_state=0))"),
    # level 2: ensembles
    (2, "a random forest", "from sklearn.ensemble import RandomForestClassifier",
     "RandomForestClassifier(n_estimators={30|60|100}, min_samples_leaf={1|3|5|10}, random_state=0)"),
    (2, "extra trees", "from sklearn.ensemble import ExtraTreesClassifier",
     "ExtraTreesClassifier(n_estimators={30|60|100}, min_samples_leaf={1|3|5|10}, random_state=0)"),
    (2, "gradient boosting", "from sklearn.ensemble import GradientBoostingClassifier",
     "GradientBoostingClassifier(n_estimators={30|60|100}, max_depth={2|3|4}, subsample={0.5|0.7|1.0}, "
     "random_state=0)"),
    (2, "histogram boosting", "from sklearn.ensemble import HistGradientBoostingClassifier",
     "HistGradientBoostingClassifier(max_iter={30|60|100}, learning_rate={0.03|0.05|0.1}, "
     "max_leaf_nodes={6|10|16}, random_state=0)"),
    # level 3: searches and averages of ensembles, slow
    (3, "a grid search", "from sklearn.ensemble import GradientBoostingClassifier\n"
     "from sklearn.model_selection import GridSearchCV",
     "GridSearchCV(GradientBoostingClassifier(subsample=0.7, random_state=0), "
     '{"max_depth": {[2, 3]|[2, 4]|[3, 5]}, "n_estimators": {[30, 60]|[50, 100]}}, '
     'scoring="roc_auc", cv=3)'),
    (3, "an average of two models", "from sklearn.ensemble import GradientBoostingClassifier, "
     "RandomForestClassifier, VotingClassifier",
     'VotingClassifier([("gb", GradientBoostingClassifier(n_estimators={60|100}, max_depth={2|3}, '
     'subsample=0.7, random_state=0)), ("rf", RandomForestClassifier(n_estimators={100|200}, '
     'min_samples_leaf={3|5|10}, random_state=0))], voting="soft")'),
)
# Most feature lines of a program of each level (a numeric column counts as one, a table of words
# as two): rich features occur with simple learners, strong learners with few features. What
# combines both stands nowhere in the corpus and has to be found.
LIMIT = (9, 3, 3, 2)
LEVELS = (0, 0, 0, 1, 1, 2, 2, 2, 3)  # how often each level is drawn
P_CONSTANT, P_BUG = 0.04, 0.8

VECTORS = (  # plan words, expression of a table of words
    ("TF-IDF", "TfidfVectorizer(max_features={100|300|1000})"),
    ("TF-IDF", 'TfidfVectorizer(max_features={100|300}, stop_words="english")'),
    ("word counts", "CountVectorizer(max_features={50|200|500}, binary={True|False})"),
    ("word pairs", "TfidfVectorizer(ngram_range=(1, 2), min_df={10|20|40})"),
)
CONSTANTS = (  # plan, prediction
    ("Predict the mean of the training labels for all.", "np.full(len(test), y.mean())"),
    ("Predict the same value for all.", "np.full(len(test), {0.1|0.25|0.5})"),
    ("Predict random numbers.", "np.random.default_rng({0|1|2}).random(len(test))"),
)
PLANS = ("I fit {M} on {F}.", "Train {M} with {F}.", "Use {F} for {M}.")
WORDS = {"random-acts-of-pizza": "job paycheck family kids student friend money please thank help "
                                 "hungry broke tonight week college rent http birthday".split()}

# Bugs: stage, pattern, replacement. One is put into most programs, in a stage drawn evenly, so that
# long programs fail no more often than short ones: otherwise the shortest, a constant, would be the
# harbor in which a policy learns to hide.
BUGS = (
    ("import", r"(?m)^.+\n", ""),
    ("import", r"from sklearn\.\w+ import", "from sklearn import"),
    ("load", r"train\.(json|csv)", r"training.\1"),
    ("load", r"prepared/public/", "public/"),
    ("load", r"\)\n", "\n"),
    ("load", r'y = train\["\w+"\]', 'y = train["target"]'),
    ("features", r"_at_request\"", '_at_retrieval"'),
    ("features", r'(df|train)\["(\w+)_\w+"\]', r'\1["\2"]'),
    ("features", r'(X\["\w+_(?:length|words)"\] = df\["\w+"\])\..*', r"\1"),
    ("features", r"    return X\n", ""),
    ("features", r"features\(test\)", "features(train)"),
    ("features", r"words\.fit_transform", "words.transform"),
    ("model", r"\((\w+)=", r"(\1s="),
    ("model", r"^model = ", "classifier = "),
    ("model", r"\)\n", "\n"),
    ("fit", r"fit\((\w+), \w+\)", r"fit(\1)"),
    ("fit", r"(?m)^model\.fit.*\n", ""),
    ("fit", r"fit\(X, y\)", "fit(X_test, y)"),
    ("predict", r"X_test", "X"),
    ("predict", r"\[:, 1\]", ""),
    ("predict", r"len\(test\)", "len(train)"),
    ("predict", r"= model\.", "= models."),
    ("predict", r"y\.mean\(\)", "train.mean()"),
    ("write", r', "\w+": p', ', "prediction": p'),
    ("write", r'"submission\.csv"', '"predictions.csv"'),
    ("write", r": p\}", ": pd.Series(p, index=test.iloc[:, 0])}"),
    ("write", r"to_csv", "to_file"),
)


# --------------------------------------------------------------------------------------------------
# Composition of the corpus
# --------------------------------------------------------------------------------------------------
def feature_lines(task):
    """{plan words: [lines of code]}; a numeric column stands as its bare name."""
    lines = {"numeric columns": list(task["numeric"])}
    for c in task["text"]:
        def add(words, new):
            lines.setdefault(words, []).extend(new)
        add("lengths", (f'X["{c}_length"] = df["{c}"].str.len()',
                        f'X["{c}_words"] = df["{c}"].str.split().str.len()'))
        add("punctuation", (f'X["{c}_{name}"] = df["{c}"].str.count("{mark}")' for name, mark in (
            ("exclamations", "!"), ("questions", "[?]"), ("commas", ","), ("lines", r"\n"),
            ("digits", "[0-9]"), ("capitals", "[A-Z]"))))
        add("keywords", (f'X["{w}"] = df["{c}"].str.contains("{w}", case=False).astype(int)'
                         for w in WORDS.get(task["name"], ("the", "you", "not", "why"))))
    if task["name"] == "random-acts-of-pizza":
        clock = 'pd.to_datetime(df["unix_timestamp_of_request_utc"], unit="s")'
        lines["time"] = [f'X["{part}"] = {clock}.dt.{part}'
                         for part in ("hour", "month", "dayofweek", "day")]
        names = 'df["requester_subreddits_at_request"]'
        lines["subreddits"] = [f'X["subreddits"] = {names}.str.len()'] + [
            f'X["{s}"] = {names}.apply(lambda names: "{s}" in names).astype(int)'
            for s in ("AskReddit", "pics", "gaming", "funny")]
    return lines


def pick(rng, text):
    """Replace every {a|b|c} by one of its options."""
    return re.sub(r"\{([^{}]*\|[^{}]*)\}", lambda m: rng.choice(m[1].split("|")), text)


def draw(rng, task):
    """A correct program as a dict of independent choices. The only rule between them is LIMIT."""
    if rng.random() < P_CONSTANT:
        plan, prediction = rng.choice(CONSTANTS)
        return dict(model=None, constant=(plan, pick(rng, prediction)))
    level = rng.choice(LEVELS)
    _, name, imports, expression = rng.choice([m for m in MODELS if m[0] == level])
    lines, size, features, vector = feature_lines(task), rng.randint(1, LIMIT[level]), [], None
    if task["text"] and rng.random() < 0.3 and size > 1:
        words, table = rng.choice(VECTORS)
        vector, size = (words, rng.choice(task["text"]), pick(rng, table)), size - 2
    while len(features) < size:
        words = rng.choice([*lines, "numeric columns"])
        feature = (words, rng.choice(lines[words]))
        features += [feature] * (feature not in features)
    return dict(model=(level, name, imports, pick(rng, expression)), features=features,
                vector=vector, check=rng.random() < 0.3, hard=rng.random() < 0.06,
                plan=rng.choice(PLANS))


def revise(rng, task, old):
    """One or two of the choices drawn anew, at random: nothing here knows what is better."""
    while True:
        new = draw(rng, task)
        if old["model"] is None or new["model"] is None:
            return new
        keys = rng.sample(("model", "features", "vector", "check"), rng.randint(1, 2))
        out = {**old, "plan": new["plan"], **{k: new[k] for k in keys}}
        size = len(out["features"]) + 2 * bool(out["vector"])
        if any(out[k] != old[k] for k in keys) and 0 < size <= LIMIT[out["model"][0]]:
            return out


def feature_stage(spec, imports):
    """(words for the plan, code that makes X and X_test)."""
    words, code = list(dict.fromkeys(w for w, _ in spec["features"])), ""
    if spec["features"]:
        columns = [line for w, line in spec["features"] if w == "numeric columns"]
        rest = [line for w, line in spec["features"] if w != "numeric columns"]
        start = (f"df[{columns}].astype(float)".replace("'", '"') if columns
                 else "pd.DataFrame(index=df.index)")
        code = ("def features(df):\n" + "".join(f"    {line}\n" for line in (f"X = {start}", *rest))
                + "    return X\n\nX, X_test = features(train), features(test)\n")
    if spec["vector"]:
        kind, column, table = spec["vector"]
        words.append(f"{kind} of {column}")
        imports.append(f"from sklearn.feature_extraction.text import {table.split('(')[0]}")
        code += (f'words = {table}\nW = words.fit_transform(train["{column}"]).toarray()\n'
                 f'W_test = words.transform(test["{column}"]).toarray()\n')
        code += ("X, X_test = np.hstack([X, W]), np.hstack([X_test, W_test])\n" if spec["features"]
                 else "X, X_test = W, W_test\n")
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))), code


def render(task, spec):
    """(plan, {stage: code}) of a program, stages in the order in which they stand."""
    folder, target = f"{task['name']}/prepared/public", task["targets"][0]
    imports, out = ["import pandas as pd"], {"import": ""}
    out["load"] = "".join(
        f'{part} = pd.read_{task[part].split(".")[-1]}("{folder}/{task[part]}")\n'
        for part in ("train", "test")) + f'y = train["{target}"].astype(int)\n'
    if spec["model"] is None:
        plan, prediction = spec["constant"]
        out["predict"] = f"p = {prediction}\n"
    else:
        _, name, lines, model = spec["model"]
        words, out["features"] = feature_stage(spec, imports)
        plan = spec["plan"].replace("{M}", name).replace("{F}", words)
        plan = plan[0].upper() + plan[1:]
        imports.append(lines)
        out["model"] = f"model = {model}\n"
        # A ridge regression has no probabilities, and may leave [0, 1].
        proba = ("model.predict({}).clip(0, 1)" if "Ridge(" in model
                 else "model.predict_proba({})[:, 1]")
        out["fit"] = "model.fit(X, y)\n"
        if spec["check"]:
            imports.append("from sklearn.metrics import roc_auc_score\n"
                           "from sklearn.model_selection import train_test_split")
            out["fit"] = ("X_fit, X_valid, y_fit, y_valid = train_test_split(X, y, random_state=0)\n"
                          "model.fit(X_fit, y_fit)\n" + "".join(
                              f"{who}_auc = round(roc_auc_score(y_{part}, "
                              f"{proba.format('X_' + part)}), 3)\n"
                              for who, part in (("train", "fit"), ("valid", "valid"))))
        out["predict"] = f"p = {'model.predict({})' if spec['hard'] else proba}\n".format("X_test")
    if "np." in "".join(out.values()):
        imports.insert(0, "import numpy as np")
    out["write"] = (f'submission = pd.DataFrame({{"{task["id"]}": test["{task["id"]}"], '
                    f'"{target}": p}})\nsubmission.to_csv("submission.csv", index=False)\n')
    return plan, {**out, "import": "\n".join(imports) + "\n"}


def spoil(rng, stages):
    """The stages with one bug: first the stage is drawn, then the bug, then the place."""
    options = {}
    for stage, pattern, new in BUGS:
        if stage in stages and re.search(pattern, stages[stage]):
            options.setdefault(stage, []).append((pattern, new))
    stage = rng.choice(list(options))
    pattern, new = rng.choice(options[stage])
    place = rng.choice(list(re.finditer(pattern, stages[stage])))
    text = stages[stage]
    return {**stages, stage: text[:place.start()] + place.expand(new) + text[place.end():]}


def output_of(rng, stages):
    """What a correct program prints once instrumented; the corpus invents the losses' values."""
    checked = "train_test_split" in stages["fit"] if "fit" in stages else False
    return "".join(f"{marker} {rng.uniform(0.5, 0.8):.3f}\n" if marker.endswith(":") else f"{marker}\n"
                   for marker, _ in MILESTONES
                   if (checked or not marker.endswith(":"))
                   and ("model" in stages or "model" not in marker))


def corpus(task, n, seed, p_improve=0.4, p_bug=P_BUG):
    """n pairs (messages, response) for the tiny policy, the same for the same seed.

    A share p_improve asks for an improvement of a correct program; p_bug of the responses fail.
    """
    rng, pairs = random.Random(f"{task['name']} {seed}"), []
    for _ in range(n):
        spec = draw(rng, task)
        messages = solve(task, "", [], short=True)
        if rng.random() < p_improve:
            plan, stages = render(task, spec)
            messages = improve(task, "", [], plan, "".join(stages.values()),
                               output_of(rng, stages), short=True)
            spec = revise(rng, task, spec)
        plan, stages = render(task, spec)
        if rng.random() < p_bug:
            stages = spoil(rng, stages)
        pairs.append((messages, f"{plan}\n```python\n{''.join(stages.values())}```"))
    return pairs
