"""One training run: processes, run folder, steps, checkpoints, and resuming from them.

pretrain.py shows its use. start() resumes; steps() stops after SIGTERM (train/signals.py).
"""

import dataclasses
import gc
import os
import sys
import time
from pathlib import Path

import torch

from common import checkpoint
from common import device as devices
from common.atomic import writing
from common.config import UserError
from train.anomaly import Guard
from train.async_save import Saver
from train.loader import Loader
from train.log import COSTS, Log, per_step, report_run, with_origin
from train.optim import lr_factor
from train.recipe import BY_RULE, RATES
from train.signals import STOPPED_EARLY, StopSignal, end_torchrun
from train.watchdog import Watch
from vision import open_model

WARM_STEPS = 5  # after these, the objects in memory are long-lived: not garbage-collected again
LOWEST = dict(max_steps=1, context=2, batch_tokens=1, batch_pairs=1, micro_rows=1, val_rows=1,
              val_chats=1, val_pairs=1, n_layer=1, n_head=1, n_embd=1, vision_heads=1,
              text_heads=1, image_size=1, patch_size=1, micro_pairs=0, seed=0, workers=-1, lr=0,
              muon_lr=0, embedding_lr=0, projector_lr=0, weight_decay=0, grad_clip=0, text_share=0,
              replay_share=0, keep_every=0, vision_width=1, text_width=1, embed_dim=1)
LONG_TIMEOUT = 60.0  # minutes that compiling, evaluating or saving may take


class Run:
    """The parts of a run that all stages share."""

    def __init__(self, cfg, stage):
        self.cfg, self.stage = cfg, stage
        by_rule = [name for name in RATES if getattr(cfg, name) == BY_RULE]
        for name, lowest in LOWEST.items():
            if getattr(cfg, name, lowest) < lowest and name not in by_rule:
                raise UserError(f"--{name}={getattr(cfg, name)}: it must be at least {lowest}")
        for name in "momentum", "beta1", "beta2":
            if not 0 <= getattr(cfg, name) < 1 and name not in by_rule:
                raise UserError(f"--{name}={getattr(cfg, name)}: it must be at least 0, below 1")
        self.machine = devices.setup(cfg.device, cfg.precision)
        self.device, self.ranks = self.machine.device, self.machine.ranks
        self.folder = Path(cfg.out)
        self.settings = dataclasses.asdict(cfg)
        self.unit = "img" if stage == "clip_pretrain" else "tok"
        self.per_step = per_step(self.settings)  # units of a step, in all processes together
        self.log = Log(self.folder, self.machine.is_main)
        self.metrics, self.notes, self.origins = {}, [], []
        self.first_step, self.saved, self.evaluated, self.reason = 0, None, None, ""
        self.began = time.time()  # of the complete run: earlier on resuming, for the cost
        self.dollars_per_second = cfg.dollars_per_hour * self.ranks / 3600
        self.stop_signal, self.saver = StopSignal(cfg.time_limit), Saver(self.device)
        self.watch = Watch(self.folder, self.machine, cfg.step_timeout, LONG_TIMEOUT)
        self.train_loader = None
        devices.cudnn_attention(self.device, stage == "pretrain")  # whose shapes never change
        torch.manual_seed(cfg.seed)

    def rows(self, max_positions):
        """Rows of `context` tokens in a step, in all processes together."""
        if self.cfg.context > max_positions:
            raise UserError(f"--context={self.cfg.context} is more than the model's max_positions, "
                            f"{max_positions}")
        if self.cfg.batch_tokens % self.cfg.context:
            raise UserError(f"--batch_tokens={self.cfg.batch_tokens} is not a multiple of "
                            f"--context={self.cfg.context}")
        return self.cfg.batch_tokens // self.cfg.context

    def loader(self, dataset, rows, micro_rows):
        """The Loader of the training data, with --workers processes where the stage has any."""
        workers = getattr(self.cfg, "workers", 0)
        if workers < 0:  # the cores that each GPU leaves over
            here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            on_gpu = self.device.type == "cuda"
            workers = max(1, min(8, devices.cores() // here - 1)) if on_gpu else 0
        self.train_loader = Loader(dataset, rows, micro_rows, self.machine, self.cfg.seed, workers,
                                   self._waiting)
        return self.train_loader

    def _waiting(self, step, reason):
        """The loader waits for the data of `step`, or it never comes: stop if asked to stop."""
        if reason != self.reason:
            self.log.say(reason)
        self.reason = reason
        self.watch.since = time.monotonic()  # a wait for data is no stall
        if self.stop_signal():
            self.stop_early(step - 1, together=False)

    def note(self, *lines):
        """Print lines that go into the report as well."""
        for line in lines:
            self.log.say(line)
        self.notes += lines

    def start(self, model, optimizer, tokenizer, info):
        """Resume from the newest checkpoint, if any; returns the network to call in the loop.
        info: kind, model configuration and lineage, for config.json."""
        self.model, self.optimizer, self.tokenizer, self.info = model, optimizer, tokenizer, info
        self.settings.update(dataclasses.asdict(self.cfg))  # rates by rule are known now
        self.log.track(self.cfg.tracker, self.settings)
        state = self._load_newest()  # may change the precision
        self.fp16 = torch.amp.GradScaler(self.device.type,
                                         enabled=self.machine.dtype == torch.float16)
        self.guard = Guard(self.device, self.cfg.grad_clip)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        if self.cfg.compile:
            devices.compile_blocks(model)
        self.net = model
        if self.ranks > 1 and self.trained:
            self.net = devices.averaging(model, self.device)
        self.flop = 0.0  # that the model needed until now, all processes together
        if state:
            self.load_state_dict(state)
            self.flop = self.metrics["tflop"] * 1e12
        self.origins = with_origin(self.origins, self.machine, self.first_step, self.cfg.max_steps)
        self.peak = devices.peak_flops(self.machine)
        self.loss = torch.zeros((), device=self.device)  # of this step, in this process
        self.losses = torch.zeros(2, device=self.device)  # since the last printed line, in all
        # processes: sum of the losses, number of steps
        count = sum(p.numel() for p in self.trained)
        own, muon = map(devices.precision_name, (self.machine.dtype, self.optimizer.dtype))
        self.log.say(f"{self.stage}: {count / 1e6:.2f} M parameters to train on {self.ranks} x "
                     f"{self.machine.name} in {own}, Muon's products in {muon}, into {self.folder}")
        return self.net

    def steps(self):
        """The steps still to do. Saves and ends the program early if asked to stop."""
        self.window = (time.perf_counter(), self.first_step, self.flop)
        self.watch.start()
        for step in range(self.first_step, self.cfg.max_steps):
            self.optimizer.set_lr(lr_factor(self.cfg, step))
            self.watch.patient = step == self.first_step  # which may compile
            self.watch.passed(f"the start of step {step}")
            yield step
            self.watch.passed(f"the end of step {step}")
            if step == self.first_step + WARM_STEPS:
                gc.collect()
                gc.freeze()  # later collections skip the objects that exist now
                if self.machine.is_main and not self.saver.job:  # allocate its buffers early
                    self.saver.start(self.saver.copy, self.state_dict(step))
            if step + 1 < self.cfg.max_steps:
                self.end_saving(wait=False, last=False)
                if self.machine.any(self.stop_signal()):
                    self.stop_early(step)
        self.watch.passed("the last step", long=True)
        if self.train_loader:
            self.train_loader.close()

    def stop_early(self, step, together=True):
        """Save the state after `step`, for which all processes must be here (together), and end
        the program with status STOPPED_EARLY."""
        self.watch.ended.set()
        if step >= self.first_step and (together or self.ranks == 1):
            self.save(step)
            self.end_saving()
            self.log.say(f"stopped after step {step} and saved; the same command resumes")
        else:
            self.log.say("stopped; the same command resumes from the newest checkpoint")
        alone = not self.stop_signal.received  # a signal would have ended torchrun too
        if self.machine.any(alone) if together else alone:
            end_torchrun()
        self.machine.leave()
        sys.exit(STOPPED_EARLY)

    def forward(self, batch):
        """Context of a forward pass: autocast; gradients are summed on the last micro-batch."""
        self.watch.passed("a forward pass")
        self.flop += self.ranks * self.model.flops(batch)
        if self.net is not self.model:
            self.net.require_backward_grad_sync = batch.is_last  # as DDP's no_sync does
        return self.machine.autocast()

    def backward(self, loss):
        """Gradients of `loss`, this micro-batch's share of the mean loss of the step."""
        self.loss += loss.detach()
        # DDP averages gradients over the processes; times their number, that is the sum.
        self.fp16.scale(loss * self.ranks).backward()
        self.watch.passed("a backward pass")

    def optimizer_step(self, step):
        """Clip the gradient and update the weights, unless anomaly.Guard finds loss or gradient
        anomalous: it decides on the device, so that the host need not wait."""
        for member in self.optimizer.members:
            self.fp16.unscale_(member)
        limit = self.cfg.grad_clip or float("inf")
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.trained, limit)
        loss = self.machine.sum(self.loss.clone())
        skip = self.guard.anomalous(step, loss, self.grad_norm)
        self.optimizer.step(skip)
        self.fp16.update()
        self.optimizer.zero_grad()
        self.losses += torch.where(skip, 0.0, torch.stack((loss, torch.ones_like(loss))))
        self.loss.zero_()

    def progress(self, step):
        """After an optimizer step; every `log_every` steps a printed line and a log.jsonl row."""
        self.watch.passed(f"the update of step {step}", long=True)  # evaluation may follow
        if not self.due(step, self.cfg.log_every):
            return
        figures = torch.stack((*self.losses, self.grad_norm))
        losses, taken, grad_norm = figures.tolist()  # waits for the device
        now, (then, first, flop) = time.perf_counter(), self.window
        seconds = (now - then) / (step + 1 - first)
        rate = self.per_step / seconds
        left = (self.cfg.max_steps - step - 1) * seconds
        f = dict(loss=losses / taken if taken else float("nan"), grad_norm=grad_norm,
                 lr=lr_factor(self.cfg, step), ms=seconds * 1e3,
                 mfu=(self.flop - flop) / (now - then) / self.peak / self.ranks,
                 dollars=self.dollars_per_second * (time.time() - self.began))
        self.log.say(f"step {step:5d} | loss {f['loss']:.4f} | norm {grad_norm:.2f} | "
                     f"lr x{f['lr']:.3f} | {f['ms']:.0f} ms | {rate:,.0f} {self.unit}/s | "
                     f"mfu {f['mfu']:.0%} | {left / 60:.1f} min left | ${f['dollars']:.2f}")
        if skipped := self.guard.messages(self.train_loader.describe):
            self.note(*skipped)
            self.guard.check()
        self.log.add(step, {**f, f"{self.unit}_per_s": rate})
        self.losses.zero_()
        devices.release_free_memory()
        self.window = (now, step + 1, self.flop)

    def record(self, step, **figures):
        """Print and log figures of an evaluation; a checkpoint of this step has them as well."""
        self.metrics.update(figures)
        self.evaluated = step
        text = " | ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.log.say(f"step {step:5d} | {text}")
        self.log.add(step, figures)
        self.window = (time.perf_counter(), step + 1, self.flop)  # evaluating is no training
        self.losses.zero_()

    def due(self, step, every):
        """Whether what is done every so many steps is due after `step`; after the last it is."""
        return step + 1 == self.cfg.max_steps or (every > 0 and (step + 1) % every == 0)

    def state_dict(self, step):
        """Everything that resuming after `step` needs. Of the data that is the step alone, which
        determines the rows, see Loader.rows_of."""
        return {"weights": self.model.state_dict(), "training": dict(
            step=step + 1, fp16=self.fp16.state_dict(), guard=self.guard.state_dict(),
            rng=torch.get_rng_state(), optimizer=self.optimizer.state_dict())}

    def load_state_dict(self, state):
        """Resume from the "training" part of a state_dict; start has loaded the weights."""
        self.first_step = state["step"]
        if state["fp16"]:  # empty in other precisions
            self.fp16.load_state_dict(state["fp16"])
        self.guard.load_state_dict(state["guard"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])

    def save(self, step):
        """Start writing a checkpoint of the state after `step`, unless it was saved already."""
        self.end_saving(last=False)  # retries one of this step that failed
        if not self.machine.any(step != self.saved):  # only the main process knows of a failure
            return
        self.saved = step
        if self.machine.is_main:
            state = self.saver.copy(self.state_dict(step))
            m, (gpu_gb, host_gb) = self.metrics, devices.peak_memory_gb(self.device)
            seconds = time.time() - self.began
            m.update(seconds=seconds, dollars=self.dollars_per_second * seconds,
                     tflop=self.flop / 1e12,
                     peak_gpu_gb=max(gpu_gb, m.get("peak_gpu_gb", 0)),
                     peak_rss_gb=max(host_gb, m.get("peak_rss_gb", 0)))
            info = dict(stage=self.stage, **self.info, step=step + 1, settings=self.settings,
                        tokenizer=self.tokenizer.fingerprint, tokenizer_name=self.tokenizer.name,
                        precision=devices.precision_name(self.machine.dtype),
                        muon_precision=devices.precision_name(self.optimizer.dtype),
                        processes=self.ranks, origins=self.origins, metrics={
                            name: m[name] for name in m
                            if name in COSTS or self.evaluated == step})
            self.saver.start(checkpoint.save, self.folder, step + 1, state["weights"], info,
                             self.tokenizer, state["training"], self.cfg.keep_every)
        self.machine.barrier()

    def end_saving(self, wait=True, last=True):
        """Raise the error of the last write. Unless no save follows, a failed one (a full disk) is
        only reported and training continues; without `wait` a write may still run."""
        error = self.saver.ended(wait)
        if isinstance(error, UserError) and not last:
            self.log.say(f"{error}; training continues, the next save tries again")
            self.saved = None
        elif error:
            raise error

    def _load_newest(self):
        """Load the weights of the newest intact checkpoint; returns its training state, or None."""
        info, weights, state = self._read_newest()
        if not info:
            self.log.resume(-1)
            return None
        if (info["stage"] != self.stage or info["tokenizer"] != self.tokenizer.fingerprint
                or "imported_from" in info):  # without an optimizer
            raise UserError(f"{self.folder} holds a run of {info['stage']}.py, of another tokenizer"
                            " or imported; choose another --out, or --resume=False to replace it")
        checkpoint.load_weights(self.model, weights, info["folder"])
        self.metrics, self.origins = info["metrics"], info["origins"]
        if "lineage" in info:  # of these weights, even if --init_from was changed or trained again
            self.info["lineage"] = info["lineage"]
        self.began -= self.metrics["seconds"]
        self.log.resume(state["step"] - 1)
        changed = [f"{name} ({info['settings'].get(name)} -> {value})"
                   for name, value in self.settings.items() if info["settings"].get(name) != value]
        self.log.say(f"resuming from {info['folder']}" + "; changed: " * bool(changed)
                     + ", ".join(changed))
        if state["step"] >= self.cfg.max_steps:  # nothing is trained with other settings
            self.settings = info["settings"]
        before = devices.PRECISIONS[info["precision"]], devices.PRECISIONS[info["muon_precision"]]
        if self.cfg.precision == "auto" and (self.machine.dtype, self.optimizer.dtype) != before:
            self.log.say(f"the run began in {info['precision']}, Muon's products in "
                         f"{info['muon_precision']}, and stays so to be exact; this machine would "
                         f"choose --precision={devices.precision_name(self.machine.dtype)}")
            self.machine.dtype, self.optimizer.dtype = before
        if info["processes"] != self.ranks:
            self.log.say(f"{info['processes']} processes before, {self.ranks} now: the same batches"
                         ", but sums in another order, so results differ in the last bits")
        return state

    def _read_newest(self):
        """(info, weights, training state) of the newest intact checkpoint, None each without one;
        makes the run's folder, and removes what killed runs left in it."""
        if self.machine.is_main:
            with writing(self.folder, "--out="):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = checkpoint.lock(self.folder)
                checkpoint.clear(self.folder, everything=not self.cfg.resume)
        self.machine.barrier()
        found = checkpoint.steps_in(self.folder)
        newest = torch.tensor(max(found, default=0) if self.folder.is_dir() else -1,
                              device=self.device)
        if self.machine.sum(newest.clone()) != self.ranks * newest:
            raise UserError(f"the processes see different contents in --out={self.folder}: it must "
                            "be a folder that all machines share")
        for folder in reversed(found.values()):
            try:
                return checkpoint.read(folder, with_state=True)
            except UserError as error:
                if folder == min(found.values()):
                    raise
                self.log.say(f"{error}; trying the one before")
        return None, None, None

    def finish(self, samples, data):
        """Write the report. samples(model): what report.sample_blocks shows; the model is the one
        that was saved, not compiled. data: the folders that were read."""
        self.end_saving()
        self.machine.barrier()
        self.watch.ended.set()
        self.optimizer.members.clear()  # makes room
        devices.cudnn_attention(self.device, False)  # samples differ in length
        if self.machine.is_main:
            model, _, _ = open_model(self.folder, self.device)
            report_run(self, samples(model), data)
        self.machine.barrier()
        self.log.say(f"done: {self.folder} (report.html, report.md, log.jsonl, the checkpoint)")
        self.machine.leave()
