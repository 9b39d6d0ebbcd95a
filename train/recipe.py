"""What follows from the size of a decoder: tokens and batch of its pretraining, and the learning
rates of all stages. docs/recipe.md has the measurements, and how far they reach."""

BY_RULE = -1  # the value of a setting that is to be filled in
RATES = ("muon_lr", "momentum", "lr")


def fill_in(cfg):
    """Replace each setting of pretrain.Config that is BY_RULE.

    Parameters are those of the blocks, 12 * n_layer * n_embd^2, as in scaling laws: embedding and
    head depend on the vocabulary. A step is a multiple of `context` tokens.
    """
    context, width = max(1, cfg.context), max(1, cfg.n_embd)  # Run refuses others by name
    tokens = max(1, cfg.tokens_per_parameter * 12 * cfg.n_layer * width**2)
    fill(cfg, batch_tokens=max(1, round(2900 * (tokens / 1.3e6) ** 0.4 / context)) * context)
    fill(cfg, max_steps=max(1, round(tokens / max(1, cfg.batch_tokens))))
    fill_rates(cfg, width)
    fill(cfg, embedding_lr=0.1)


def fill_rates(cfg, width, new=True):
    """Replace the learning rates and the momentum of any stage's settings that are BY_RULE.

    width: of the decoder or text encoder. new: whether its weights are new; those of a trained one
    move at a quarter of Muon's rate and a sixth of AdamW's.
    """
    longer = max(1, cfg.max_steps) / 320
    muon, adamw = (1, 1) if new else (1 / 4, 1 / 6)
    fill(cfg, muon_lr=muon * 0.041 * longer**-0.16, momentum=0.9 if longer < 16 else 0.95,
         lr=adamw * 6e-3 / (width / 256) ** 0.7)


def fill(cfg, **values):
    for name, value in values.items():
        if getattr(cfg, name) == BY_RULE:
            setattr(cfg, name, value)
