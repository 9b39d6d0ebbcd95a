"""train/recipe.py: what is not given follows from the size, what is given stays."""

from pretrain import Config


def test_length_batch_and_rates_follow_from_the_size():
    small, cfg, large = (Config(n_layer=n, n_embd=64 * n) for n in (4, 20, 24))
    assert abs(cfg.batch_tokens * cfg.max_steps / 9.0e9 - 1) < 0.01 > cfg.batch_tokens % cfg.context
    assert small.batch_tokens < cfg.batch_tokens < large.batch_tokens
    assert small.muon_lr > cfg.muon_lr > large.muon_lr and small.lr > cfg.lr > large.lr
    given = dict(max_steps=7, batch_tokens=1024, muon_lr=0.5, momentum=0.0, lr=0.0, embedding_lr=0)
    assert given.items() <= vars(Config(**given)).items()
