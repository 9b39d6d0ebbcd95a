"""Solutions with a typical mistake each, which the tests of the chapters must refuse."""

import math

import torch

WRONG = {
    # 1
    "count_tokens": lambda text, merges: len(text.split()),  # words, not tokens
    "bits_per_byte": lambda nats, n_tokens, n_bytes: nats * n_tokens / n_bytes,  # nats, not bits
    # 2
    "softmax": lambda z: z.exp() / z.exp().sum(-1, keepdim=True),  # overflows
    # the second use of a token replaces the first
    "embedding_gradient": lambda ids, g, V: torch.zeros(V, g.size(1)).index_put_((ids,), g),
    # 3
    "causal_mean": lambda v: v.mean(0).expand_as(v),  # reads the future
    # w positions before it, and itself
    "window_mask": lambda T, w: torch.ones(T, T, dtype=torch.bool).tril().triu(-w),
    # 4
    "interleaved": lambda x, theta: x,  # no rotation
    "permutation": lambda D: [i for pair in zip(range(D // 2), range(D // 2, D), strict=True)
                              for i in pair],  # the inverse
    # 5
    "rms_norm": lambda x, w: x / x.std(-1, keepdim=True) * w,  # subtracts the mean
    "n_parameters": lambda V, n, C: 2 * V * C + 12 * n * C * C,  # no norms, no bias
    # 6
    "perplexity": lambda z, y: (z.exp().sum(-1).log() - z[torch.arange(len(y)), y]).mean().exp(),
    "mean_loss": lambda parts: sum(s / n for s, n in parts) / len(parts),  # the mean of the means
    # 7
    "clip_gradients": lambda grads, limit: [g * limit / g.norm() for g in grads],  # one by one
    "cosine": lambda s, n, w, f: f + (1 - f) * 0.5 * (1 + math.cos(math.pi * s / n)),  # no warmup
    # 8
    "sample": lambda z, t, u: int(z.argmax()),  # always greedy
    "cache_bytes": lambda n, C, T, b: n * T * C * b,  # keys without values
    # 9
    "last_answer_only": lambda messages: [[role == "assistant"] * len(ids)
                                             for ids, role in messages],  # all answers
    "truncate": lambda ids, mask, T: (ids[:T], mask[:T]),  # in the middle of an answer
    # 10
    "first_fit": lambda lengths, T: [[i] for i in range(len(lengths))],  # one chat per row
    "loss_weight": lambda targets, segments: (targets >= 0) / (targets >= 0).sum(),  # by tokens
    # 11
    "accuracy": lambda s, k: (s.argmax(1) == torch.arange(len(s))).float().mean(),  # k is ignored
    "sigmoid_loss": lambda a, b, s, bias: -torch.nn.functional.logsigmoid(
        s * a @ b.T + bias).sum(1).mean(),  # all pairs are positive
    # 12
    "place": lambda x, ids, i, f: x.masked_scatter((ids == i)[..., None], f.flatten()[: 3 * int(
        (ids == i).sum())].repeat(4)),  # never refuses
    "vision_gain": lambda loss, pixels, shift: loss(pixels),  # a loss, not a difference
}
