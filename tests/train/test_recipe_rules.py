"""train/recipe.py: what is not given follows from the size, what is given stays."""

import pytest
from conftest import newest

from common.config import read_json
from pretrain import Config


def test_length_batch_and_rates_follow_from_the_size():
    small, cfg, large = (Config(n_layer=n, n_embd=64 * n) for n in (4, 20, 24))
    assert abs(cfg.batch_tokens * cfg.max_steps / 9.0e9 - 1) < 0.01 > cfg.batch_tokens % cfg.context
    assert small.batch_tokens < cfg.batch_tokens < large.batch_tokens
    assert small.muon_lr > cfg.muon_lr > large.muon_lr and small.lr > cfg.lr > large.lr
    given = dict(max_steps=7, batch_tokens=1024, muon_lr=0.5, momentum=0.0, lr=0.0, embedding_lr=0)
    assert given.items() <= vars(Config(**given)).items()


def test_each_stage_records_the_rates_that_followed(pipeline):
    settings = {stage: read_json(newest(pipeline.folder / stage) / "config.json")["settings"]
                for stage in ("sft", "vision_pretrain", "vision_sft")}
    tuned, new = settings["sft"], settings["vision_pretrain"]
    assert tuned["muon_lr"] == new["muon_lr"] / 4 and tuned["lr"] == pytest.approx(new["lr"] / 6)
    assert all(found["momentum"] == 0.9 and found["lr"] > 0 for found in settings.values())
