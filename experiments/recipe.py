"""The pretraining recipe: trials of one change each, and the comparison with other recipes.

    bash runs/recipe.sh books.jsonl                              # the comparison, 15 core hours
    python experiments/recipe.py 3x128 320 base polar --seeds=1,2,3   # trials: size, steps, names
    python experiments/recipe.py 3x128 320                       # all trials, one seed
    python experiments/recipe.py table                           # differences from base
    python experiments/recipe.py compare                         # with the reference's recipe

Each run is a row of docs/recipe_runs.csv, and is not repeated if it is there already (same size,
steps, trial, seed). A step has 4,096 tokens; runs of one seed have the same initial weights and
data order. A trial is a few lines here and needs no switch in the product. Set OMP_NUM_THREADS=1
and run as many at once as there are cores.
"""

import csv
import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "docs/recipe_runs.csv"
now = {"step": 0, "of": 1, "factor": 1.0}  # of the run in this process


def change_groups(change):
    """A patch that calls change(kind, group) for each parameter group before the first step;
    kind: muon, embedding, head or vector."""
    def patch(pretrain):
        make = pretrain.make_optimizer

        def changed(model, cfg):
            optimizer = make(model, cfg)
            names = {p: name for name, p in model.named_parameters()}
            for number, member in enumerate(optimizer.members):
                for group in member.param_groups:
                    name, p = names[group["params"][0]], group["params"][0]
                    kind = ("muon" if number == 0 and len(optimizer.members) > 1 else "embedding"
                            if "embedding" in name else "vector" if p.ndim < 2 else "head")
                    change(kind, group)
            return optimizer
        pretrain.make_optimizer = changed
    return patch


def scale_lr(**factors):
    """Other peak learning rates: factors of those of the config, by kind."""
    def change(kind, group):
        group["initial_lr"] *= factors.get(kind, 1)
    return change_groups(change)


def set_decay(**decays):
    def change(kind, group):
        group["weight_decay"] = decays.get(kind, group["weight_decay"])
    return change_groups(change)


def each_step(before=None, after=None):
    """A patch that calls before(optimizer) and after(optimizer) around every update."""
    def patch(pretrain):
        from train import optim
        step = optim.Optimizers.step

        def wrapped(self, skip):
            if before:
                before(self)
            step(self, skip)
            if after:
                after(self)
        optim.Optimizers.step = wrapped
    return patch


def momentum(first, last, share=1.0):
    """Muon's momentum rises (or falls) over `share` of the steps."""
    def before(optimizer):
        done = min(1, now["step"] / (share * now["of"]))
        optimizer.members[0].param_groups[0]["momentum"] = first + (last - first) * done
    return each_step(before)


def decay_to_zero(optimizer):
    """Weight decay follows the learning rate a second time (it is multiplied by it already)."""
    for member in optimizer.members:
        for group in member.param_groups:
            peak = group.setdefault("peak_decay", group["weight_decay"])
            group["weight_decay"] = peak * now["factor"]


def cooldowns(muon, adamw):
    """Another share of decay for Muon than for AdamW."""
    def before(optimizer):
        for member, share in zip(optimizer.members, (muon, adamw), strict=True):
            left = (now["of"] - now["step"]) / (share * now["of"])
            for group in member.param_groups:
                warm = min(1, (now["step"] + 1) / (0.02 * now["of"] + 1))
                group["lr"] = group["initial_lr"] * min(warm, left, 1)
    return each_step(before)


def shape(function):
    """Another shape of the decay: function(share of the decay that is left) -> factor."""
    def before(optimizer):
        if 0 < now["factor"] < 1 and now["step"] > 0.1 * now["of"]:
            for member in optimizer.members:
                for group in member.param_groups:
                    group["lr"] = group["initial_lr"] * function(now["factor"])
    return each_step(before)


POLAR = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
         (4.042929935166739, -2.808917465908714, 0.5000178451051316),
         (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
         (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
         (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))  # arXiv 2505.16932


def polar_express(pretrain):
    from train import optim

    def orthogonalise(matrices, dtype, steps=5):
        norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
        x = (matrices / (1.02 * norms + 1e-6)).to(dtype)
        tall = x.size(-2) > x.size(-1)
        x = x.mT if tall else x
        for a, b, c in POLAR:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x
    optim.orthogonalise = orthogonalise


def normuon(pretrain):
    """Rows of an update are divided by the root of their mean square over time (arXiv
    2510.05491)."""
    from train import optim
    plain, moments = optim.orthogonalise_distributed, {}

    def normalised(matrices, dtype):
        update = plain(matrices, dtype).float()
        square = update.square().mean(-1, keepdim=True)
        moment = moments.setdefault(tuple(matrices.shape), torch.zeros_like(square))
        moment.lerp_(square, 0.05)
        scaled = update / (moment.sqrt() + 1e-10)
        return scaled * (update.norm(dim=(-2, -1), keepdim=True)
                         / (scaled.norm(dim=(-2, -1), keepdim=True) + 1e-10))
    optim.orthogonalise_distributed = normalised


def cautious_decay(pretrain):
    """Decay only where the update goes the same way (arXiv 2510.12402)."""
    from train import optim

    class Cautious(optim.Muon):
        def _step_together(self, params, shape, stacked, group):
            before = [p.clone() for p in params]
            plain = dict(group, weight_decay=0.0)
            super()._step_together(params, shape, stacked, plain)
            for p, old in zip(params, before, strict=True):
                same = ((old - p) * old) > 0  # towards zero
                p.sub_(torch.where(same, old * (group["lr"] * group["weight_decay"]), 0.0))
    optim.Muon = Cautious


def average(share=0.1, mix=1.0, every=1):
    """Evaluate the mean of the weights of the last `share` of the steps (mixed in by `mix`)."""
    def patch(pretrain):
        mean, count = {}, [0]

        def after(optimizer):
            if now["step"] < (1 - share) * now["of"] or now["step"] % every:
                return
            count[0] += 1
            for member in optimizer.members:
                for group in member.param_groups:
                    for p in group["params"]:
                        mean.setdefault(p, torch.zeros_like(p)).lerp_(p.detach(), 1 / count[0])
        each_step(after=after)(pretrain)
        validate = pretrain.validation_loss

        def with_mean(machine, val, rows, model, n):
            with torch.no_grad():
                for p in model.parameters():
                    p.lerp_(mean[p], mix)
            return validate(machine, val, rows, model, n)
        pretrain.validation_loss = with_mean
    return patch


def outer_nesterov(every=20, lr=0.7, momentum=0.4):
    """Every few steps a Nesterov step along the way that the inner optimizer went."""
    def patch(pretrain):
        slow, buffers = {}, {}

        def before(optimizer):
            if not slow:
                slow.update((p, p.detach().clone()) for m in optimizer.members
                            for g in m.param_groups for p in g["params"])

        @torch.no_grad()
        def after(optimizer):
            if (now["step"] + 1) % every and now["step"] + 1 < now["of"]:
                return
            for p, old in slow.items():
                way = p - old
                buffer = buffers.setdefault(p, torch.zeros_like(p)).mul_(momentum).add_(way)
                old.add_(way + momentum * buffer, alpha=lr)
                p.copy_(old)
        each_step(before, after)(pretrain)
    return patch


def initial(change):
    """A patch that calls change(model) on the initial weights."""
    def patch(pretrain):
        make = pretrain.make_optimizer

        def changed(model, cfg):
            with torch.no_grad():
                change(model)
            return make(model, cfg)
        pretrain.make_optimizer = changed
    return patch


def tokens_of_train():
    import numpy as np
    return np.load(next((ROOT / "data/recipe").glob("*train*.npy")), mmap_mode="r")


def unigram(model, size=10.0):
    """The initial model predicts the frequencies of tokens: one channel of the last norm is
    constant."""
    import numpy as np
    counts = np.bincount(tokens_of_train(), minlength=model.config.vocab_size) + 0.5
    logs = torch.from_numpy(np.log(counts / counts.sum())).float()
    model.final_norm.weight[0], model.final_norm.bias[0] = 0.0, size
    model.head.weight[:, 0] = logs / size


def bigram(share=0.75, smoothing=5.0):
    """The initial model predicts pairs of tokens: embedding and head are factors of their pointwise
    mutual information, found by a truncated singular value decomposition, in a share of the
    channels. The others are random, so that all rows of the embedding are as long: the norm
    before the head divides them by the same number."""
    def change(model):
        import numpy as np
        from scipy.sparse import csr_array
        from scipy.sparse.linalg import svds
        V, C, ids = model.config.vocab_size, model.config.n_embd, tokens_of_train().astype(int)
        k = round(share * C)
        pairs, n = np.unique(ids[:-1] * V + ids[1:], return_counts=True)
        a, b, counts = pairs // V, pairs % V, np.bincount(ids, minlength=V) + 0.5
        p = counts[b] / counts.sum()
        information = np.log((n + smoothing * p) / ((counts[a] + smoothing) * p))
        weight = np.sqrt(counts)  # frequent tokens are fitted best
        u, s, vt = svds(csr_array((information * weight[a], (a, b)), (V, V)), k, random_state=0)
        left, right = u / weight[:, None] * s**0.5, vt.T * s**0.5
        norms = np.linalg.norm(left, axis=1)
        longest = np.quantile(norms, 0.99)
        size = C**0.5 / longest
        rest = torch.from_numpy(np.sqrt(np.clip(longest**2 - norms**2, 0, None)) * size).float()
        noise = torch.nn.functional.normalize(torch.randn(V, C - 1 - k)) * rest[:, None]
        unigram(model)
        model.token_embedding.weight[:, 0] = 0
        model.token_embedding.weight[:, 1:] = torch.cat(
            (torch.from_numpy(left * size).float(), noise), 1)
        model.head.weight[:, 1:] = 0
        model.head.weight[:, 1 : 1 + k] = torch.from_numpy(right / size).float()
    return initial(change)


def per_head(model):
    """Muon orthogonalises each head of q, k and v separately."""
    for block in model.blocks:
        block.attention.qkv.weight.stacked = 3 * model.config.n_head


def parts(**factors):
    """Other rates of Muon by part: attention, mlp, or a name."""
    def patch(pretrain):
        make = pretrain.make_optimizer

        def changed(model, cfg):
            optimizer = make(model, cfg)
            muon = optimizer.members[0]
            names = {p: name for name, p in model.named_parameters()}
            groups = []
            for group in muon.param_groups:
                for p in group["params"]:
                    factor = next((f for part, f in factors.items() if part in names[p]), 1)
                    lr = group["initial_lr"] * factor
                    groups.append({**group, "params": [p], "lr": lr, "initial_lr": lr})
            muon.param_groups[:] = groups
            return optimizer
        pretrain.make_optimizer = changed
    return patch


def head_muon(factor):
    """The decoder's output matrix by Muon too, at another rate."""
    def patch(pretrain):
        from train import optim
        kind_of = optim.kind_of
        optim.kind_of = lambda name, p, optimizer: (
            "muon" if name == "head.weight" else kind_of(name, p, optimizer))
        parts(**{"head.weight": factor})(pretrain)
    return patch


def both(*patches):
    def patch(pretrain):
        for one in patches:
            one(pretrain)
    return patch


TRIALS = {
    "base": ([], None),
    "muon_0.02": (["--muon_lr=0.02"], None), "muon_0.03": (["--muon_lr=0.03"], None),
    "muon_0.06": (["--muon_lr=0.06"], None),
    "decay_0": (["--weight_decay=0"], None), "decay_0.025": (["--weight_decay=0.025"], None),
    "decay_0.05": (["--weight_decay=0.05"], None), "decay_0.1": (["--weight_decay=0.1"], None),
    "decay_0.2": (["--weight_decay=0.2"], None),
    "decay_0.1_to_zero": (["--weight_decay=0.1"], each_step(decay_to_zero)),
    "head_decay_0": ([], set_decay(head=0.0)), "muon_decay_0.1": ([], set_decay(muon=0.1)),
    "cautious_0.05": ([], both(cautious_decay, set_decay(muon=0.05))),
    "cautious_0.1": ([], both(cautious_decay, set_decay(muon=0.1))),
    "embedding_x0.5": ([], scale_lr(embedding=0.5)), "embedding_x2": ([], scale_lr(embedding=2)),
    "embedding_x4": ([], scale_lr(embedding=4)),
    "head_x0.5": ([], scale_lr(head=0.5)), "head_x2": ([], scale_lr(head=2)),
    "head_x4": ([], scale_lr(head=4)),
    "vector_x0.5": ([], scale_lr(vector=0.5)), "vector_x2": ([], scale_lr(vector=2)),
    "vector_x4": ([], scale_lr(vector=4)),
    "momentum_0.85": (["--momentum=0.85"], None), "momentum_0.95": (["--momentum=0.95"], None),
    "momentum_0.85_0.95": ([], momentum(0.85, 0.95)),
    "momentum_0.85_0.97": ([], momentum(0.85, 0.97)),
    "momentum_0.8_0.9": ([], momentum(0.8, 0.9)), "momentum_0.95_0.85": ([], momentum(0.95, 0.85)),
    "cooldown_0.3": (["--cooldown=0.3"], None), "cooldown_0.65": (["--cooldown=0.65"], None),
    "cooldown_0.8": (["--cooldown=0.8"], None), "cooldown_0.98": (["--cooldown=0.98"], None),
    "floor_0.05": (["--final_lr=0.05"], None), "floor_0.1": (["--final_lr=0.1"], None),
    "cosine": (["--schedule=cosine"], None), "sqrt": ([], shape(lambda x: 1 - (1 - x) ** 0.5)),
    "cooldowns_0.8_0.4": ([], cooldowns(0.8, 0.4)), "cooldowns_0.4_0.8": ([], cooldowns(0.4, 0.8)),
    "warmup_0": (["--warmup=0"], None), "warmup_0.05": (["--warmup=0.05"], None),
    "normuon": ([], normuon), "polar": ([], polar_express),
    "normuon_polar": ([], both(normuon, polar_express)),
    "outer_20": ([], outer_nesterov()), "outer_5": ([], outer_nesterov(5, 0.7, 0.4)),
    "outer_20_strong": ([], outer_nesterov(20, 0.7, 0.6)),
    "average_0.05": ([], average(0.05)), "average_0.1": ([], average(0.1)),
    "average_0.2_half": ([], average(0.2, 0.5)),
    "floor_0.2_average_0.1": (["--final_lr=0.2"], average(0.1)),
    "beta2_0.98": (["--beta2=0.98"], None), "beta2_0.9": (["--beta2=0.9"], None),
    "beta1_0.8": (["--beta1=0.8"], None), "beta1_0.95": (["--beta1=0.95"], None),
    "clip_0": (["--grad_clip=0"], None),
    "unigram": ([], initial(unigram)), "bigram": ([], bigram()),
    "per_head": ([], initial(per_head)),
    "head_zero": ([], initial(lambda model: model.head.weight.zero_())),
    "mlp_x1.4": ([], parts(mlp=1.4)), "attention_x1.4": ([], parts(attention=1.4)),
    "bigram_polar": ([], both(bigram(), polar_express)), "bigram_half": ([], bigram(0.5)),
    "unigram_polar": ([], both(initial(unigram), polar_express)),
    "batch_x0.5_muon_0.028": (["--batch_tokens=2048", "--muon_lr=0.028", "--lr=4.2e-3"], None),
    "batch_x0.5_momentum_0.93": (["--batch_tokens=2048", "--muon_lr=0.028", "--lr=4.2e-3",
                                  "--embedding_lr=0.07", "--momentum=0.93"], None),
    "head_muon": ([], head_muon(1)), "head_muon_x0.3": ([], head_muon(0.3)),
    "head_muon_x0.1": ([], head_muon(0.1)), "head_muon_x3": ([], head_muon(3)),
    "head_muon_x2": ([], head_muon(2)),
    "embedding_x2_momentum_0.85": (["--embedding_lr=0.2", "--momentum=0.85"], None),
    "batch_x0.5": (["--batch_tokens=2048"], None), "batch_x2": (["--batch_tokens=8192"], None),
}
# AdamW as in the project that this one started from (configs/recipe_reference), and as in nanoGPT
NANOGPT = ["--init=small", "--grad_clip=1"]
OTHERS = {f"{name}_{lr}": ([f"--lr={lr}", f"--embedding_lr={lr}", *flags], None)
          for name, flags in (("reference", []), ("nanogpt", NANOGPT))
          for lr in (0.001, 0.002, 0.004, 0.008, 0.016)}
SIZES, STEPS, GOAL = ("3x128", "4x192", "6x256"), 800, 0.4  # of the comparison
HEADS = {96: 2, 128: 2, 192: 3, 256: 4, 384: 6}


def one(size, steps, trial, seed, flags):
    """Train in this process; returns the final validation loss and the seconds."""
    import pretrain
    import train.run as run
    layers, width = size.split("x")
    own, patch = {**TRIALS, **OTHERS}[trial]
    recipe = "recipe_reference" if trial in OTHERS else "recipe"
    steps = int(steps)
    for flag in own:
        if flag.startswith("--batch_tokens="):
            steps = steps * 4096 // int(flag.split("=")[1])
    factor = run.lr_factor

    def noted(cfg, step):
        now.update(step=step, of=cfg.max_steps, factor=factor(cfg, step))
        return now["factor"]
    run.lr_factor = noted
    if patch:
        patch(pretrain)
    found = []
    record = run.Run.record
    run.Run.record = lambda self, step, **figures: (found.append(figures["val_loss"]),
                                                    record(self, step, **figures))
    run.Run.finish = lambda self, *_: self.end_saving()
    run.Run.save = lambda self, step: None
    sys.argv = ["pretrain.py", str(ROOT / f"configs/{recipe}/pretrain.py"), f"--n_layer={layers}",
                f"--n_embd={width}", f"--n_head={HEADS[int(width)]}", f"--max_steps={steps}",
                "--eval_every=0", "--log_every=20", f"--seed={seed}", "--resume=False",
                f"--out=out/trials/{size}_{steps}_{trial}_{seed}_{os.getpid()}", *own, *flags]
    began = time.process_time()
    pretrain.main()
    return found[-1], time.process_time() - began


def rows():
    if not RESULTS.is_file():
        return []
    with open(RESULTS, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table():
    groups = defaultdict(lambda: defaultdict(dict))
    for row in rows():
        groups[row["size"], row["steps"]][row["trial"]][row["seed"]] = float(row["val_loss"])
    for where, trials in groups.items():
        base = trials["base"]
        print(*where, "base", {seed: round(loss, 4) for seed, loss in base.items()})
        differences = {}
        for trial, losses in trials.items():
            pairs = [losses[seed] - base[seed] for seed in losses if seed in base]
            if pairs and trial != "base":
                differences[trial] = statistics.mean(pairs), len(pairs)
        for trial, (mean, n) in sorted(differences.items(), key=lambda item: item[1]):
            print(f"  {mean:+.4f}  {trial} ({n} seeds)")


def best_rate(size, steps, other):
    """The trial with the learning rate at which another recipe ends lowest with seed 1."""
    losses = {row["trial"]: float(row["val_loss"]) for row in rows() if row["seed"] == "1" and
              (row["size"], row["steps"]) == (size, str(steps)) and row["trial"].startswith(other)}
    return min(losses, key=losses.get)


def compare():
    """For each size: does ours, scheduled to end at GOAL of the tokens, reach the other recipe's
    mean final loss with its best learning rate; and the ratio of tokens at equal loss."""
    found = defaultdict(list)  # (size, steps, trial) -> rows of all seeds
    for row in rows():
        found[row["size"], int(row["steps"]), row["trial"]].append(row)

    def losses(*key):
        return [float(row["val_loss"]) for row in found[key]]

    for (size, steps), other in itertools.product(
            sorted({(size, steps) for size, steps, trial in found if trial in OTHERS}),
            ("reference", "nanogpt")):
        tried = {trial: statistics.mean(losses(size, steps, trial)) for s, n, trial in list(found)
                 if (s, n) == (size, steps) and trial.startswith(other)}
        if not tried:
            continue
        best = best_rate(size, steps, other)
        goal, theirs = tried[best], found[size, steps, best]
        print(f"{size}, {steps * 4096:,} tokens: {best} ends at {goal:.4f} (mean of "
              f"{len(theirs)} seeds; learning rates tried: {len(tried)})")
        curve = sorted((n, statistics.mean(losses(size, n, "base")), losses(size, n, "base"))
                       for s, n, trial in list(found) if (s, trial) == (size, "base"))
        for n, mean, each in curve:
            seconds = statistics.mean(float(row["cpu_seconds"]) for row in found[size, n, "base"])
            theirs_s = statistics.mean(float(row["cpu_seconds"]) for row in theirs)
            reached = "reached" if mean <= goal else "not reached"
            print(f"    ours, {n / steps:.2f} of the tokens, {seconds / theirs_s:.2f} of the "
                  f"seconds: {mean:.4f} ({len(each)} seeds) {reached}")
        for (n, high, _), (m, low, each) in itertools.pairwise(curve):
            if low <= goal <= high:  # interpolated in the logarithm of the tokens
                slope = (high - low) / math.log(m / n)
                ratio = m / steps * math.exp((low - goal) / slope)
                error = ratio / slope * math.hypot(*(
                    statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0.0
                    for v in (each, losses(size, steps, best))))
                print(f"    equal loss at {ratio:.3f} +- {error:.3f} of the tokens")


def main():
    if sys.argv[1] == "table":
        return table()
    if sys.argv[1] == "best":
        return print(best_rate(*sys.argv[2:]))
    if sys.argv[1] == "compare":
        return compare()
    if sys.argv[1] == "one":
        size, steps, trial, seed, *flags = sys.argv[2:]
        loss, seconds = one(size, steps, trial, seed, flags)
        new = not RESULTS.is_file()
        with open(RESULTS, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["size", "steps", "trial", "seed", "val_loss", "cpu_seconds"])
            writer.writerow([size, steps, trial, seed, f"{loss:.5f}", f"{seconds:.0f}"])
        os._exit(0)
    size, steps, *names = [a for a in sys.argv[1:] if not a.startswith("--")]
    seeds = next((a[8:] for a in sys.argv if a.startswith("--seeds=")), "1").split(",")
    for seed in seeds:
        for trial in names or TRIALS:
            if not any((r["size"], r["steps"], r["trial"], r["seed"]) == (size, steps, trial, seed)
                       for r in rows()):
                code = subprocess.run([sys.executable, __file__, "one", size, steps, trial, seed],
                                      cwd=ROOT).returncode
                print(trial, seed, "failed" if code else rows()[-1]["val_loss"], flush=True)


if __name__ == "__main__":
    main()
