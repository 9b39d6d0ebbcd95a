"""Solutions of the exercises. Try first: python docs/learn/run.py 3 my_solutions.py"""

import math
from functools import cache

import torch


# 1. Tokens
def count_tokens(text, merges):
    from docs.learn.run import chapter_names

    names = chapter_names(1)
    length = cache(lambda word: len(names["encode"](word, merges)))
    return sum(length(word) for word in names["WORDS"].findall(text))


def bits_per_byte(nats, n_tokens, n_bytes):
    return nats / math.log(2) * n_tokens / n_bytes


# 2. Embeddings
def softmax(logits):
    e = (logits - logits.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def embedding_gradient(ids, grad, V):
    return torch.zeros(V, grad.size(1)).index_add_(0, ids, grad)


# 3. Attention
def causal_mean(v):
    return v.cumsum(0) / torch.arange(1, len(v) + 1)[:, None]


def window_mask(T, w):
    distance = torch.arange(T)[:, None] - torch.arange(T)
    return (distance >= 0) & (distance < w)


# 4. Rotary positions
def interleaved(x, theta):
    T, D = x.shape
    angle = torch.arange(T)[:, None] * theta ** (-torch.arange(0, D, 2) / D)
    a, b = x[:, 0::2], x[:, 1::2]
    out = torch.empty_like(x)
    out[:, 0::2] = a * angle.cos() - b * angle.sin()
    out[:, 1::2] = b * angle.cos() + a * angle.sin()
    return out


def permutation(D):
    return [*range(0, D, 2), *range(1, D, 2)]


# 5. The block
def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def n_parameters(V, n_layer, C):
    attention, mlp, norms = 4 * C * C + C, 8 * C * C, 2 * 2 * C
    return 2 * V * C + n_layer * (attention + mlp + norms) + 2 * C


# 6. The loss
def perplexity(logits, targets):
    own = logits[torch.arange(len(targets)), targets]
    return (logits.logsumexp(-1) - own).mean().exp()


def mean_loss(parts):
    return sum(loss for loss, _ in parts) / sum(n for _, n in parts)


# 7. Training
def clip_gradients(grads, limit):
    norm = torch.sqrt(sum(grad.square().sum() for grad in grads))
    return [grad * min(1.0, limit / float(norm)) for grad in grads]


def cosine(step, steps, warmup_steps, final):
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps + 1) / (steps - warmup_steps)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


# 8. Generation
def sample(logits, temperature, u):
    if temperature == 0:
        return int(logits.argmax())
    return int(((logits / temperature).softmax(-1).cumsum(-1) > u).int().argmax())


def cache_bytes(n_layer, C, T, bytes_per_number):
    return 2 * n_layer * T * C * bytes_per_number


# 9. Chat templates
def last_answer_only(messages):
    last = max(i for i, (_, role) in enumerate(messages) if role == "assistant")
    return [[i == last] * len(ids) for i, (ids, _) in enumerate(messages)]


def truncate(ids, supervised, T):
    from docs.learn.run import chapter_names

    end = chapter_names(9)["t"].end
    ends = [i + 1 for i, (token, mask) in enumerate(zip(ids, supervised, strict=True))
            if mask and token == end and i < T]
    if len(ids) <= T:
        return ids, supervised
    return (ids[: ends[-1]], supervised[: ends[-1]]) if ends else None


# 10. Packing
def first_fit(lengths, T):
    rows = []
    for i, length in enumerate(lengths):
        for row in rows:
            if sum(lengths[j] for j in row) + length <= T:
                row.append(i)
                break
        else:
            rows.append([i])
    return rows


def loss_weight(targets, segments):
    weights = torch.zeros(targets.shape)
    for row in range(len(targets)):
        for segment in segments[row].unique():
            own = (segments[row] == segment) & (targets[row] >= 0)
            if segment > 0 and own.any():
                weights[row][own] = 1 / own.sum()
    return weights / weights.sum()


# 11. CLIP
def accuracy(similarity, k):
    best = similarity.topk(k).indices
    return (best == torch.arange(len(similarity))[:, None]).any(1).float().mean()


def sigmoid_loss(images, texts, scale, bias):
    signs = 2 * torch.eye(len(images)) - 1
    logits = scale * images @ texts.T + bias
    return -torch.nn.functional.logsigmoid(signs * logits).sum(1).mean()


# 12. Vision
def place(x, ids, image_id, features):
    where, features = ids == image_id, features.flatten(0, 1)
    if where.sum() != len(features):
        raise ValueError(f"{len(features)} patches for {where.sum()} places")
    x = x.clone()
    x[where] = features
    return x


def vision_gain(loss, pixels, shift):
    # shift=0 compares the right images with themselves: the gain would always be 0.
    return loss(pixels.roll(shift, 0)) - loss(pixels)
