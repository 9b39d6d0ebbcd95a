"""One training run: the processes, the folder, the steps, and going on where a run stopped.

    run = Run(cfg, "pretrain")
    model, optimizer = ...
    net = run.start(model, optimizer, ...)         # resumes, compiles, joins the processes
    for step in run.steps():                       # ends early on SIGTERM, Ctrl-C or --time_limit
        for micro, batch in enumerate(loader.step(step)):
            with run.forward(micro):
                loss = net(...) / batch.n_targets
            run.backward(loss)
        run.update(step)
        ...
    run.finish()
"""

import contextlib
import dataclasses
import gc
import os
import sys
import time
from pathlib import Path

import torch

from common import checkpoint
from common.config import UserError
from common.device import (
    averaging,
    compile_blocks,
    cores,
    peak_flops,
    peak_memory_gb,
    precision_name,
    release_free_memory,
    setup,
)
from train.anomaly import Guard
from train.async_save import Saver
from train.flops import flop_counter
from train.fsdp import number_of_shard, shard, unshard, whole, whole_weights
from train.log import Log, report_run, with_origin
from train.optim import lr_factor
from train.resuming import make_folder, resume
from train.signals import STOPPED_EARLY, Stopping, end_torchrun
from train.watchdog import Watch

WARM_STEPS = 5  # after these nothing new lives long
LOWEST = dict(max_steps=1, context=1, batch_tokens=1, batch_pairs=1, micro_rows=1, val_rows=1,
              val_chats=1, micro_pairs=0, seed=0, workers=-1,
              projector_lr=0, text_share=0, replay_share=0, keep_every=0)
EVALUATION = 60.0  # minutes that evaluating or saving may take before a process counts as stalled


class Run:
    """Plumbing of one stage; the stage file shows what is trained on what."""

    def __init__(self, cfg, stage):
        self.cfg, self.stage = cfg, stage
        for name, lowest in LOWEST.items():
            if getattr(cfg, name, lowest) < lowest:
                raise UserError(f"--{name}={getattr(cfg, name)}: it must be at least {lowest}")
        self.machine = setup(cfg.device, cfg.precision)
        self.device, self.ranks = self.machine.device, self.machine.ranks
        self.sharded = cfg.shard != "none" and self.ranks > 1
        self.folder = Path(cfg.out)
        self.settings = dataclasses.asdict(cfg)
        self.log = Log(self.folder, self.machine.is_main, cfg.tracker, self.settings)
        self.metrics, self.notes, self.n_lost, self.origins, self.saved = {}, [], 0, [], None
        self.began = time.time()  # of the whole run; moved back on resuming, for the cost
        self.wants_to_stop, self.saver = Stopping(cfg.time_limit), Saver()
        self.watch = Watch(self.folder, self.machine, cfg.step_timeout, EVALUATION)
        self.loader = None  # the last one made: names the rows of a step
        torch.manual_seed(cfg.seed)

    def split(self, rows, micro_rows):
        """How `rows` a step divide: (micro-batches, rows each) per process, the same job for any
        number of processes."""
        if rows < 1:
            raise UserError("a step has not one whole row: raise --batch_tokens or lower --context")
        if rows % self.ranks:
            raise UserError(f"a batch of {rows} rows does not divide by {self.ranks} processes")
        mine = rows // self.ranks
        self.accumulate = -(-mine // micro_rows)
        while mine % self.accumulate:
            self.accumulate += 1
        if mine // self.accumulate < min(mine, micro_rows) / 2:
            self.log.say(f"{mine} rows a process only divide into micro-batches of "
                         f"{mine // self.accumulate}; another batch size would be faster")
        return self.accumulate, mine // self.accumulate

    def rows(self, max_positions):
        """How many rows of `context` tokens make up a step of the whole job."""
        if self.cfg.context > max_positions:
            raise UserError(f"--context={self.cfg.context} is more than the model's max_positions, "
                            f"{max_positions}")
        if self.cfg.batch_tokens % self.cfg.context:
            raise UserError(f"--batch_tokens={self.cfg.batch_tokens} is not a multiple of "
                            f"--context={self.cfg.context}")
        return self.cfg.batch_tokens // self.cfg.context

    def workers(self):
        """How many processes make batches: --workers, or for a GPU the cores left over to it."""
        if self.cfg.workers >= 0:
            return self.cfg.workers
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return max(1, min(8, cores() // here - 1)) if self.device.type == "cuda" else 0

    def note(self, *lines):
        """Say lines that the report should have as well."""
        for line in lines:
            self.log.say(line)
        self.notes += lines

    def lost(self, reasons):
        """Count chats whose pictures could not be read any more; the first are named."""
        for reason in reasons:
            self.n_lost += 1
            if self.n_lost <= 5:
                self.log.say(f"left out: {reason}")

    def start(self, model, optimizer, tokenizer, info, unit="tok", per_step=0, flops=0):
        """Resume if there is something to resume; returns the network to call in the loop.

        info: kind, model configuration and lineage, for config.json. per_step: how many `unit` one
        step handles in the whole job, flops: floating-point operations for each of them.
        """
        self.model, self.optimizer, self.tokenizer, self.info = model, optimizer, tokenizer, info
        self.unit, self.per_step, self.flops = unit, per_step, flops
        make_folder(self)
        state = resume(self)  # which may change the precision
        self.fp16 = torch.amp.GradScaler(
            self.device.type, enabled=self.machine.dtype == torch.float16
        )
        self.net = self._join_processes(model)
        if state:
            optimizer.load_state_dict(state["optimizer"])
            self.fp16.load_state_dict(state["fp16"])
            torch.set_rng_state(state["rng"])
        self.guard = Guard(self.device, self.cfg.grad_clip)
        if state and "guard" in state:
            self.guard.load_state_dict(state["guard"])
        self.first_step = state["step"] if state else 0
        self.counter, self.step_flops = None, 0  # operations of a step of the whole job, counted
        if state and not self.cfg.compile:
            self.step_flops = self.metrics.get("tflop", 0) * 1e12 / self.first_step
        self.origins = with_origin(self.origins, self.machine, self.first_step,
                                   self.cfg.max_steps)
        self.peak = peak_flops(self.machine) * self.ranks
        self.loss = torch.zeros((), device=self.device)  # of this step, in this process
        self.losses = torch.zeros(2, device=self.device)  # of the whole job since the last line:
        # their sum, and how many steps were taken
        count = sum(p.numel() for p in self.trained)
        if self.first_step >= self.cfg.max_steps:
            self.log.say(f"all {self.cfg.max_steps} steps are done already")
        self.log.say(f"{self.stage}: {count / 1e6:.2f} M parameters to train on {self.ranks} x "
                     f"{self.machine.name} in {precision_name(self.machine.dtype)}, Muon's "
                     f"products in {precision_name(self.optimizer.dtype)}, into {self.folder}")
        if self.cfg.shard != "none" and not self.sharded:
            self.log.say(f"--shard={self.cfg.shard}: one process has nobody to share with")
        return self.net

    def _join_processes(self, model):
        """The network to call: `model`, alone, sharded, or one of the copies that DDP averages."""
        if self.cfg.compile:
            compile_blocks(model)
        if self.sharded:
            self.optimizer.replace(shard(model, self.cfg.shard, self.machine))
        self.trained = [p for p in model.parameters() if p.requires_grad]
        if self.ranks == 1 or self.sharded or not self.trained:
            return model
        return averaging(model, self.device)

    def steps(self):
        """The step numbers still to do. Saves and ends the program early if asked to stop."""
        self.window = (time.perf_counter(), self.first_step)
        self.watch.start()
        for step in range(self.first_step, self.cfg.max_steps):
            self.optimizer.set_lr(lr_factor(self.cfg, step))
            self.watch.patient = step == self.first_step  # it compiles
            self.watch.passed(f"the beginning of step {step}")
            if step == self.first_step and not (self.cfg.compile or self.step_flops):
                self.counter = flop_counter().__enter__()
            yield step
            self.watch.passed(f"the end of step {step}")
            if step + 1 < self.cfg.max_steps:  # no later save would try the last one again
                self._tell(self.saver.ended())
            if self.machine.any(self.wants_to_stop()) and step + 1 < self.cfg.max_steps:
                self.stop_early(step)
        self.watch.passed("the last step", long=True)
        if self.loader:
            self.loader.close()
        for module in self.model.modules():  # samples come next, and their shapes change all along
            module._compiled_call_impl = None
        if self.sharded:  # nor are they FSDP's kind of call
            self.optimizer.members.clear()
            unshard(self.model)

    def stop_early(self, step, together=True):
        """Save what is done, up to step `step`, and end the program so that it can go on.

        together: whether every process is here; one that is not could not take part in saving.
        """
        self.watch.stop()
        if step >= self.first_step and (together or self.ranks == 1):
            self.save(step)
            self.end_saving()
            self.log.say(f"stopped after step {step} and saved; the same command goes on")
        else:
            self.log.say("stopped; the same command goes on from the newest checkpoint")
        alone = self.wants_to_stop.asked is None  # a signal to torchrun reaches every process
        if self.machine.any(alone) if together else alone:
            end_torchrun()
        self.machine.leave()
        sys.exit(STOPPED_EARLY)

    def forward(self, micro):
        """Context of one forward pass: autocast, and gradients shared on the last micro-batch."""
        stack = contextlib.ExitStack()
        last = micro == self.accumulate - 1
        self.watch.passed(f"the forward pass of micro-batch {micro}")
        if self.sharded:  # summed inside a node every time, as whole gradients may not fit
            self.net.set_is_last_backward(last)
            self.net.set_requires_all_reduce(last)
        elif self.ranks > 1 and self.trained and not last:
            stack.enter_context(self.net.no_sync())
        stack.enter_context(self.machine.autocast())
        return stack

    def backward(self, loss):
        """Gradients of `loss`, this micro-batch's share of the whole job's mean loss.

        DDP and FSDP average over processes; times their number it is the sum.
        """
        self.loss += loss.detach()
        self.fp16.scale(loss * self.ranks).backward()

    def update(self, step):
        """Clip and step; a step that would do harm (guard.Guard) changes nothing and is counted.

        Nothing here makes the host wait for a GPU, which would let the GPU run dry.
        """
        self.watch.passed(f"the backward passes of step {step}")
        for member in self.optimizer.members:
            self.fp16.unscale_(member)
        limit = self.cfg.grad_clip or float("inf")
        self.grad_norm = whole(torch.nn.utils.clip_grad_norm_(self.trained, limit))
        loss = self.machine.sum(self.loss.clone())
        bad = self.guard.unusual(step, loss, self.grad_norm)
        self.optimizer.step(skip=bad)
        self.losses += torch.where(bad, 0.0, torch.stack((loss, torch.ones_like(loss))))
        self.loss.zero_()
        if self.fp16.is_enabled():
            self.fp16.update()
        self.optimizer.zero_grad()
        if self.counter:  # all that the first step computed, in this process
            self.counter.__exit__(None, None, None)
            self.step_flops, self.counter = self.counter.get_total_flops() * self.ranks, None
        if step == self.first_step + WARM_STEPS:
            gc.collect()
            gc.freeze()  # what is here now stays: later collections need not look at it
            if self.machine.is_main and not self.sharded and not self.saver.job:
                self.saver.start(self.saver.copy, self._state())  # allocates, in the background
        self.watch.passed(f"the update of step {step}", long=True)

    def progress(self, step):
        """Every `log_every` steps: one printed line and one row of log.jsonl."""
        if not self.due(step, self.cfg.log_every):
            return
        figures = torch.stack((*self.losses, self.grad_norm, self.guard.count))
        losses, taken, grad_norm, skipped = figures.tolist()  # the one wait for the device
        now, (then, first) = time.perf_counter(), self.window
        steps = step + 1 - first
        seconds = (now - then) / steps
        rate = self.per_step / seconds
        left = (self.cfg.max_steps - step - 1) * seconds
        loss = losses / taken if taken else float("nan")
        figures = dict(loss=loss, grad_norm=grad_norm,
                       lr=lr_factor(self.cfg, step), ms=seconds * 1e3,
                       mfu=rate * self.flops / self.peak, dollars=self.dollars())
        figures[f"{self.unit}_per_s"] = rate
        self.log.say(f"step {step:5d} | loss {loss:.4f} | "
                     f"norm {figures['grad_norm']:.2f} | lr x{figures['lr']:.3f} | "
                     f"{seconds * 1e3:.0f} ms | {rate:,.0f} {self.unit}/s | "
                     f"mfu {figures['mfu']:.0%} | {left / 60:.1f} min left | "
                     f"${figures['dollars']:.2f}")
        if skipped:
            self.note(*self.guard.told(self._rows_of))
            self.guard.check()
        self.log.add(step, figures)
        self.losses.zero_()
        release_free_memory()
        self.window = (now, step + 1)

    def _rows_of(self, step):
        """Which rows a step read, in words."""
        rows = sorted(self.loader.rows_of(step).tolist()) if self.loader else []
        some = ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if rows[8:] else "")
        return f"; it read the rows {some} of {self.loader.dataset.name}" if rows else ""

    def dollars(self):
        return self.cfg.dollars_per_hour * self.ranks * (time.time() - self.began) / 3600

    def record(self, step, **figures):
        """Print and log figures of an evaluation; they go into the next checkpoint as well."""
        self.metrics.update(figures)
        text = " | ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.log.say(f"step {step:5d} | {text}")
        self.log.add(step, figures)
        self.window = (time.perf_counter(), step + 1)  # evaluation is not training time
        self.losses.zero_()

    def due(self, step, every):
        """Whether something done every so many steps is due after this one; the last always is."""
        return step + 1 == self.cfg.max_steps or (every > 0 and (step + 1) % every == 0)

    def save(self, step):
        """Write a checkpoint that has done step `step`, unless it is the last one written.

        The state is copied aside; a thread writes the copy. Sharded, all wait until it is written.
        """
        self._tell(self.saver.ended(wait=True))  # of this step too: one that failed is tried again
        if not self.machine.any(step != self.saved):  # only the main process knows of a failure
            return
        self.saved = step
        state = self._state()
        if self.sharded:
            self._save_shard(step)
        if self.machine.is_main:
            m, (gpu_gb, host_gb) = self.metrics, peak_memory_gb(self.device)
            m.update(seconds=time.time() - self.began, dollars=self.dollars(),
                     tflop=(step + 1) * (self.step_flops or self.per_step * self.flops) / 1e12,
                     peak_gpu_gb=max(gpu_gb, m.get("peak_gpu_gb", 0)),
                     peak_rss_gb=max(host_gb, m.get("peak_rss_gb", 0)))
            info = dict(stage=self.stage, **self.info, step=step + 1, settings=self.settings,
                        tokenizer=self.tokenizer.fingerprint, tokenizer_name=self.tokenizer.name,
                        precision=precision_name(self.machine.dtype),
                        muon_precision=precision_name(self.optimizer.dtype),
                        processes=self.ranks, metrics=dict(m), origins=self.origins)
            copy = self.saver.copy(state)
            self.saver.start(checkpoint.save, self.folder, step + 1, copy["weights"], info,
                             self.tokenizer, {**copy["training"], "step": step + 1},
                             begun=self.sharded, keep_every=self.cfg.keep_every)
        if self.sharded:
            self.end_saving()
        self.machine.barrier()

    def _state(self):
        """What a checkpoint holds, in the main process; every process must ask."""
        training = dict(fp16=self.fp16.state_dict(), rng=torch.get_rng_state(),
                        guard=self.guard.state_dict())
        training.update({} if self.sharded else {"optimizer": self.optimizer.state_dict()})
        return {"weights": whole_weights(self.model, self.machine.is_main), "training": training}

    def _save_shard(self, step):
        """Write this process's share of the optimizer's state into the checkpoint to be."""
        if self.machine.is_main:
            checkpoint.begin(self.folder, step + 1)
        self.machine.barrier()
        number = number_of_shard(self.model)
        if number is not None:
            checkpoint.save_shard(self.folder, step + 1, number, self.optimizer.state_dict())
        self.machine.barrier()

    def _tell(self, error):
        """Say that a checkpoint could not be written: training is worth going on."""
        if isinstance(error, UserError):
            self.log.say(f"{error}; going on, the next save tries again")
            self.saved = None
        elif error:
            raise error

    def end_saving(self):
        """Wait until the checkpoint is written; raises if it could not be."""
        error = self.saver.ended(wait=True)
        if error:
            raise error
        self.machine.barrier()

    def finish(self, samples=(), data=()):
        """Write the report card: samples of report.Sample, and the data folders that were read."""
        self.end_saving()
        self.watch.stop()
        n_lost = self.machine.sum(torch.tensor(float(self.n_lost), device=self.device)).item()
        if n_lost:
            self.note(f"{n_lost:.0f} times a chat was left out because its picture had gone")
        if self.machine.is_main:
            report_run(self, samples, data)
        self.log.say(f"done: {self.folder} (report.html, report.md, log.jsonl, the checkpoint)")
        self.machine.leave()
