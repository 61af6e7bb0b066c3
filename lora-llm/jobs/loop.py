"""The loop of multi_lora.py: rounds of fused passes; jobs end, and others take their slots."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch

from adapters.fused_lora import FusedLora
from base.layers import check_rank, linear_layers, linear_shape, lora_target_names
from es_lora.command_line import NotedSignals, fault_of_machine, told
from es_lora.files import read_text, write_text_whole
from es_lora.inputs.json_text import parsed_json
from es_lora.outcome import RESULT_FORMAT, RESULT_NAME
from jobs.config import Job
from jobs.data import Example, JobData, collate
from jobs.processes import KnownToAll, Processes
from jobs.run import JobRun
from jobs.scheduler import LORA_BYTES, JobQueue, Limits, MemoryNeed, split_round, waiting_order
from jobs.states import SavedRound, forget_states, state_folder
from training.losses import row_losses

SAVING_SHARE = 0.05  # of the time, that saving after the end of a job may take
FAILED_NAME = "failed.json"  # in the folder of a job that ended by a failure of its own


def memory_need(base: torch.nn.Module, data: JobData) -> MemoryNeed:
    """What this job takes while it trains. Raises ValueError for target modules the base lacks."""
    layers, targets = linear_layers(base), data.job.target_modules
    names = lora_target_names(base, targets if isinstance(targets, str) else ",".join(targets))
    check_rank(base, names, data.job.rank, "rank")
    parameters = data.job.rank * sum(sum(linear_shape(layers[name])) for name in names)
    rows = min(data.job.batch_size, len(data.train))
    return MemoryNeed(LORA_BYTES * parameters, rows * data.longest)


class ForwardFailed(KnownToAll):
    """A pass that failed before any process was left a gradient; its cause says why."""


class FusedTraining:
    """Trains jobs over one base until none is left.

    base: frozen, on its device. facts: {"model", "bits", ...} for headers and results.
    precision: torch.bfloat16 for autocast, or None. save_minutes: how often states are saved.
    say: takes sentences for the person; ended: is given every result."""

    def __init__(
        self,
        base: torch.nn.Module,
        tokenizer: Any,
        output_dir: Path,
        processes: Processes,
        limits: Limits,
        *,
        facts: dict[str, Any],
        precision: Optional[torch.dtype] = None,
        save_minutes: float = 10.0,
        say: Callable[[str], None] = print,
        ended: Callable[[dict[str, Any]], None] = lambda result: None,
    ):
        self.base, self.output_dir, self.processes, self.limits = base, output_dir, processes, limits
        self.facts, self.precision, self.save_seconds = facts, precision, 60 * save_minutes
        self.say, self.ended = say, ended
        self.fused = FusedLora(base)
        self.active: list[tuple[JobRun, MemoryNeed]] = []
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.passes = 0
        self.round = SavedRound()  # what a resumed run goes on from
        self._ended: list[Path] = []  # folders of jobs that have ended since that was saved
        self._saving_seconds = 0.0

    def train(self, jobs: Sequence[tuple[JobData, MemoryNeed]], saved: Optional[SavedRound] = None) -> bool:
        """Train all; False where Ctrl-C or SIGTERM ended it, with every state saved.

        saved: the round to go on from; None: a new run."""
        self.round = saved or SavedRound()
        order = waiting_order([data.job.priority for data, _ in jobs])
        # What had begun before an interruption goes on before anything new, as it would have.
        order.sort(key=lambda index: jobs[index][0].job.name not in self.round.active)
        queue = JobQueue(self.limits, [jobs[index] for index in order])
        if saved is not None:
            self._go_on(saved)
        else:
            self._save_all()  # so that what ends before the first state is known to belong to no round
        self.base.train()
        saved_at = time.monotonic()
        try:
            with NotedSignals() as signals:
                while True:
                    for data, need in queue.admit([need for _, need in self.active]):
                        self._try(data.job, partial(self._start, data, need))
                    if not self.active:
                        self._save_all()
                        return True
                    self._round()
                    self._end_jobs()
                    stop = self.processes.any(signals.interrupted)
                    if stop or self._is_to_save(time.monotonic() - saved_at):
                        self._save_all()
                        saved_at = time.monotonic()
                    if stop:
                        return False
        finally:
            self.fused.close()

    # --------------------------------------------------------------------------- admission and ends

    def _folder(self, data: JobData) -> Path:
        return self.output_dir / data.job.name

    def _start(self, data: JobData, need: MemoryNeed) -> None:
        number = self.round.active.get(data.job.name)
        if number is None and self.processes.writes:
            shutil.rmtree(self._folder(data), ignore_errors=True)  # begun after the round that the run goes on from
        (self._folder(data) / FAILED_NAME).unlink(missing_ok=True)
        state = None if number is None else state_folder(self._folder(data), number)
        run = JobRun(data, self.fused, self._folder(data), self.processes, self.facts, self.score, state)
        self.active.append((run, need))
        budget = f"{data.total_steps} steps of {len(data.train)} examples from {data.source}"
        begins = f"starts; budget {budget}" if state is None else f"goes on from step {run.step}"
        self.say(f"{data.job.name}: {begins}.")
        for notice in data.notices if state is None else ():
            self.say(f"{data.job.name}: {notice}")
        run.score_start()

    def _end_jobs(self) -> None:
        for entry in [entry for entry in self.active if entry[0].ended_as is not None]:
            self.active.remove(entry)
            self._try(entry[0].job, partial(self._finish, entry[0]))

    def _finish(self, run: JobRun) -> None:
        result = run.finish(run.data.tokenizer.save_pretrained)
        self.round.active.pop(run.job.name, None)
        self.round.ended.append(run.job.name)
        self._ended.append(run.folder)
        if result:
            self.say(f"{result['name']}: {result['verdict']}")
            self.ended(result)

    def _try(self, job: Job, act: Callable[[], Any]) -> None:
        """Do something for a job; where it fails, it ends alone, and the others go on. Raises what
        is a fault of the machine, which is none of this job."""
        failure = self.processes.failure(act)
        if failure is not None and fault_of_machine(failure) is not None:
            raise failure
        if failure is not None:
            self._end_failed(job, failure)

    def _end_failed(self, job: Job, error: BaseException) -> None:
        """Take a job out, with the reason in its folder and on the screen."""
        reason = told(error)
        for entry in [entry for entry in self.active if entry[0].job is job]:
            self.active.remove(entry)
            if entry[0].monitor is not None:
                entry[0].monitor.close()
        self.fused.adapters.pop(job.name, None)
        if self.processes.writes:
            result = json.dumps(refused_result(job, reason), ensure_ascii=False)
            write_text_whole(self.output_dir / job.name / FAILED_NAME, result)
        self.say(f"{job.name}: not trained: {reason}")

    # -------------------------------------------------------------------------------------- a round

    def _round(self) -> None:
        """One micro-batch of every active job, in as few passes as the limits allow."""
        runs = [run for run, _ in self.active]
        batches = [run.micro_batch() for run in runs]
        sizes = [(len(batch), max(len(example.ids) for example in batch)) for batch in batches]
        max_tokens = self.limits.max_tokens([need for _, need in self.active])
        for indices in split_round(sizes, self.limits.max_rows, max_tokens, self.limits.pass_tokens):
            self._pass_or_each([runs[index] for index in indices], [batches[index] for index in indices])

    def _pass_or_each(self, runs: Sequence[JobRun], batches: Sequence[Sequence[Example]]) -> None:
        """One pass for all; where it fails before a gradient is left, one for each: only the job at
        fault ends."""
        passes = [run.adapter.passes for run in runs]
        failure = self.processes.failure(lambda: self._pass(runs, batches))
        if failure is None:
            return
        if fault_of_machine(failure) is not None:
            raise failure
        cause = failure.__cause__ if isinstance(failure, ForwardFailed) else None
        if cause is None or len(runs) == 1:
            for run in runs:
                self._end_failed(run.job, cause or failure)
            return
        for run, batch, count in zip(runs, batches, passes):
            run.adapter.passes = count
            self._pass_or_each([run], [batch])

    def _pass(self, runs: Sequence[JobRun], batches: Sequence[Sequence[Example]]) -> None:
        """One pass, forward and backward, for several jobs; each takes its loss and step if due."""
        started = time.monotonic()
        weights = [run.loss_weight() for run in runs]
        losses = self.processes.summed(self._losses(runs, [self.processes.share(batch) for batch in batches], weights))
        values = losses.tolist()
        seconds, rows = time.monotonic() - started, sum(map(len, batches))
        self.passes += 1
        for run, batch, loss in zip(runs, batches, values):
            self._try(run.job, partial(run.take, loss, seconds * len(batch) / rows))

    def _losses(
        self, runs: Sequence[JobRun], batches: Sequence[Sequence[Example]], weights: Sequence[float]
    ) -> torch.Tensor:
        """The weighted loss of each job (jobs,), detached; gradients are left in the adapters."""
        losses = torch.zeros(len(runs), device=self.processes.device)
        with self.fused.rows([(run.job.name, len(part)) for run, part in zip(runs, batches)]):
            each = self._forward([example for batch in batches for example in batch])  # (rows,)
            if each is None:
                return losses
            counts = torch.tensor([len(part) for part in batches], device=losses.device)
            owner = torch.arange(len(runs), device=losses.device).repeat_interleave(counts)
            losses = losses.index_add(0, owner, each) * torch.tensor(weights, device=losses.device)
            losses.sum().backward()
        return losses.detach()

    def _forward(self, examples: Sequence[Example]) -> Optional[torch.Tensor]:
        """The loss of each example (rows,); None where this process's share has none.

        Raises ForwardFailed, on all processes, before any of them goes backward."""
        losses = []

        def forward() -> None:
            if not examples:  # of a micro-batch smaller than the number of processes
                return
            batch = {name: tensor.to(self.processes.device) for name, tensor in collate(examples, self.pad_id).items()}
            labels = batch.pop("labels")
            with self._autocast():
                logits = self.base(**batch, use_cache=False).logits  # (rows, T, vocabulary)
            losses.append(row_losses(logits, labels))

        failure = self.processes.failure(forward)
        if failure is not None:
            raise ForwardFailed(str(failure)) from failure
        return losses[0] if losses else None

    def _autocast(self) -> Any:
        return torch.autocast(self.processes.device.type, self.precision) if self.precision else nullcontext()

    @torch.no_grad()
    def score(self, adapter: str, examples: Sequence[Example]) -> float:
        """Mean loss a target token of an adapter as it is; random state and base's mode stay."""
        ordered = sorted(examples, key=lambda example: len(example.ids))
        total = 0.0
        self.base.eval()
        for start in range(0, len(ordered), self.limits.max_rows):
            part = ordered[start : start + self.limits.max_rows]
            batch = {name: tensor.to(self.processes.device) for name, tensor in collate(part, self.pad_id).items()}
            labels = batch.pop("labels")
            with self.fused.rows([(adapter, len(part))], counted=False), self._autocast():
                total += row_losses(self.base(**batch, use_cache=False).logits, labels).sum().item()
        self.base.train()
        return total / sum(example.targets for example in examples)

    # -------------------------------------------------------------------------------------- states

    def _is_to_save(self, seconds: float) -> bool:
        """Whether to save now, so long after the last time. The end of a job is a moment for it,
        where that costs little: what has ended is not trained once more after a kill."""
        cheap = self._saving_seconds < SAVING_SHARE * seconds
        return seconds > self.save_seconds or (bool(self._ended) and cheap)

    def _save_all(self) -> None:
        """Save the round of all jobs: their states first, then the file that names them, and only
        then what came before is deleted."""
        started = time.monotonic()
        numbers = [(run, run.save()) for run, _ in self.active]
        written = [(run, number) for run, number in numbers if number is not None]
        self.round.active.update({run.job.name: number for run, number in written})
        # A base with dropout of its own draws from the global random state.
        self.round.random, self.round.passes = torch.get_rng_state().tolist(), self._cut_by()
        self.round.write(self.output_dir, self.processes.index)
        for run, number in written:
            run.forget_older(number)
        while self._ended and self.processes.writes:
            forget_states(self._ended.pop())
        self._ended.clear()
        self._saving_seconds = time.monotonic() - started

    def _cut_by(self) -> dict[str, Any]:
        """What decides whose rows share a pass."""
        return {**asdict(self.limits), "processes": self.processes.count, "together": self.processes.together}

    def _go_on(self, saved: SavedRound) -> None:
        """Draw random numbers as before, and say where the passes may be others than before."""
        if saved.random:
            torch.set_rng_state(torch.tensor(saved.random, dtype=torch.uint8))
        spread = self.processes.count > 1 and not self.processes.together
        if saved.active and (spread or saved.passes != self._cut_by()):
            why = "jobs are spread over processes anew" if spread else "the bounds of a pass are others, or not known"
            self.say(
                f"Going on: {why}, so that rows of other jobs may share a pass. The results may differ in their last "
                "bits from those of a run that was not interrupted."
            )


def refused_result(job: Job, reason: str) -> dict[str, Any]:
    """What the overview says of a job that could not be trained."""
    return {"name": job.name, "group": job.group, "outcome": "refused", "reason": reason, "heldout": {}}


def job_result(folder: Path) -> dict[str, Any]:
    """The result of a job that has ended, or the reason that it could not be trained."""
    failed = folder / FAILED_NAME
    return parsed_json(read_text(failed)) if failed.is_file() else finished_result(folder)


def finished_result(folder: Path) -> Optional[dict[str, Any]]:
    """The result of an ended job, or None. Raises ValueError for one of an earlier version."""
    file = folder / RESULT_NAME
    if not file.is_file():
        return None
    try:
        result = parsed_json(read_text(file))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); delete its folder to train this job anew") from None
    if not isinstance(result, dict) or result.get("format") != RESULT_FORMAT:
        raise ValueError(
            f"{file} is of an earlier version: end that run with it, or start anew in another --output_dir"
        )
    return result
