"""LoRA fine-tuning of a language model (QLoRA by default) that stops at its turning point.

    python es_lora_llm.py --model_name_or_path FOLDER --dataset FILE.jsonl --early_stop --output_dir
    OUTPUT

Exit codes: 0 trained to budget or stopped early; 2 bad arguments, configuration or data; 3 training
diverged; 130 interrupted.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import quiet_libraries  # noqa: F401  (first, before the libraries speak)
from early_stop_callback import LAST, TURNING_POINT, EarlyStopCallback, TrainingLoss
from tqdm import tqdm
from transformers import TrainerCallback, set_seed

from adapters.folders import CHAT
from adapters.weights import trainable_parameters
from base.layers import positions_of
from base.loading import load_tokenizer
from es_lora.command_line import last_state_named, reported, shown_path
from es_lora.files import refuse_in_the_way, write_folder_whole
from es_lora.folder_lock import locked
from es_lora.hugging_face.peft_models import restore_finite, save_adapter
from es_lora.hugging_face.processes import check_same_on_all
from es_lora.outcome import Outcome, in_order
from settings.flags import Settings
from settings.parsing import parse_arguments
from text.collator import CausalCollator
from text.conversations import with_chat_template
from text.mmlu import Row
from text.sources import Splits
from training.checkpoints import (
    FILES,
    FOLDERS,
    check_fits,
    checkpoint_to_resume,
    complete_checkpoints,
    delete_earlier_run,
)
from training.heldout import WeightScores
from training.predictions import write_predictions
from training.results import forgetting_sentence, go_on_command, leave_results, next_commands
from training.scores import MMLUCallback, MMLUScorer
from training.setup import (
    announcement,
    base_spec,
    check_positions,
    columns_of_rule,
    fetch_base,
    history_header,
    load_model,
    read_general_text,
    read_mmlu,
    read_splits,
    ready_splits,
    training_collator,
)
from training.shadows import ShadowAdapters
from training.trainer import EndOfStreamCallback, InterruptCallback, LoraTrainer, TrainingDiverged


@dataclass(frozen=True)
class Run:
    """Everything a run needs, ready to train."""

    settings: Settings
    splits: Splits
    collator: CausalCollator
    trainer: LoraTrainer
    scores: WeightScores
    interrupt: InterruptCallback
    early_stop: Optional[EarlyStopCallback]
    shadows: Optional[ShadowAdapters]
    mmlu: Optional[MMLUCallback]
    resume: Optional[str]
    say: Callable[[str], None]

    @property
    def model(self) -> Any:
        return self.trainer.model

    @property
    def output_dir(self) -> Path:
        return Path(self.settings.training.output_dir)

    @property
    def is_main(self) -> bool:
        return self.trainer.is_world_process_zero()


# ------------------------------------------------------------------------------------------- set up


def set_up(settings: Settings) -> Run:
    """Load and check everything before the first step. Raises ValueError or FileNotFoundError on
    bad input."""
    training, data = settings.training, settings.data
    resume = checkpoint_to_resume(settings)
    set_seed(training.seed)
    training.eval_on_start = training.do_eval and resume is None
    if data.streaming:
        training.accelerator_config.dispatch_batches = False  # every process reads the stream and takes its share
    fetch_base(settings)
    tokenizer = load_tokenizer(base_spec(settings))
    splits = read_splits(settings, tokenizer)
    tokenizer = with_chat_template(tokenizer) if splits.chats else tokenizer
    collator = CausalCollator(tokenizer, data.source_max_len, data.target_max_len, training.train_on_source)
    mmlu_rows, general_text = read_mmlu(settings), read_general_text(settings, tokenizer)
    ready = ready_splits(settings, splits, collator)
    splits = ready.splits
    if hasattr(splits.train, "__len__"):  # of a stream every process reads its own part
        check_same_on_all("training examples", splits.train, training)
    model = load_model(settings, tokenizer)
    check_positions(settings, ready.longest, model)
    if resume is not None and not training.full_finetune:
        check_fits(resume, model)
    if general_text is not None:
        general_text.cut(positions_of(model))
    if training.overwrite_output_dir and resume is None and training.do_train and training.process_index == 0:
        delete_earlier_run(Path(training.output_dir))
    shadows = None
    if ready.examples is not None:
        shadows = ShadowAdapters(settings, model, ready.examples, len(splits.train), collator, resume)
    interrupt, loss = InterruptCallback(), TrainingLoss()
    callbacks: list[TrainerCallback] = [interrupt, *([shadows] if shadows is not None else [])]
    if data.streaming and not data.packing_repeat:
        callbacks.append(EndOfStreamCallback())
    trainer = LoraTrainer(
        model=model,
        args=training,
        data_collator=training_collator(settings, collator, model),
        train_dataset=splits.train,
        eval_dataset=splits.evaluation,
        processing_class=tokenizer,
        callbacks=callbacks,
        observe_loss=loss.add,
        shadows=shadows,
    )
    scores, early_stop = WeightScores(trainer, splits.evaluation, general_text), None
    say = tqdm.write if training.process_index == 0 else lambda text: None
    if settings.stop.calculate_cs:
        early_stop = EarlyStopCallback(
            settings.stop,
            header=history_header(settings),
            say=say,
            before_restore=scores.score_last,
            log_scalar=trainer.log_scalar,
            columns=columns_of_rule(settings, splits, collator, model, shadows),
            training_loss=loss,
            report=False,  # finish() writes this trainer's own
        )
        trainer.add_callback(early_stop)
        trainer.add_to_checkpoints(early_stop)
    mmlu = mmlu_callback(settings, trainer, tokenizer, mmlu_rows) if mmlu_rows is not None else None
    return Run(settings, splits, collator, trainer, scores, interrupt, early_stop, shadows, mmlu, resume, say)


def mmlu_callback(settings: Settings, trainer: LoraTrainer, tokenizer: Any, rows: list[Row]) -> MMLUCallback:
    """The callback that scores MMLU, with prompts that the base has positions for."""
    training, positions = settings.training, positions_of(trainer.model)
    longest = training.mmlu_source_max_len
    if positions is not None and positions.hard:
        longest = min(longest, positions.count)
    callback = MMLUCallback(trainer, MMLUScorer(tokenizer, rows, longest, training.per_device_eval_batch_size))
    trainer.add_callback(callback)
    return callback


# -------------------------------------------------------------------------------------------- train


def train(run: Run) -> Outcome:
    """Train to the stop or the budget; how it ended. The model then holds the weights to keep."""
    for line in announcement(run.settings, run.splits, run.model):
        run.say(line)
    run.scores.score_general_text("before")
    diverged = None
    try:
        run.trainer.train(resume_from_checkpoint=run.resume)
    except TrainingDiverged as error:
        diverged = str(error)
    for line in run.splits.tally.lines() if run.splits.tally is not None else ():
        run.say(line)
    early_stop, state = run.early_stop, run.trainer.state
    if state.global_step == 0 and diverged is None and not run.interrupt.interrupted:
        raise ValueError(f"nothing was trained: no token of {run.splits.source} is learnt; raise --target_max_len")
    decision, plan = (early_stop.decision, early_stop.plan) if early_stop is not None else (None, None)
    diverged = diverged or (early_stop.diverged if early_stop is not None else None)
    name = "budget_reached" if early_stop is None or decision is not None else "no_turning_point"
    if diverged is not None:
        name = "diverged"
    elif run.interrupt.interrupted:
        name = "interrupted"
    elif early_stop is not None and early_stop.stopped:
        name = "stopped_early"
    seed = run.settings.training.seed
    return Outcome(name, state.global_step, state.max_steps, plan=plan, decision=decision, diverged=diverged, seed=seed)


# ------------------------------------------------------------------------------------------- finish


def finish(run: Run, outcome: Outcome, argv: Sequence[str], seconds: float) -> None:
    """Score and save what is kept, write result.json and report.html, and say how to go on."""
    scores, last = run.scores, outcome.last_step
    scores.note_start()
    if outcome.name == "diverged":
        kept = restore_finite(run.model, last, run.early_stop.monitor if run.early_stop is not None else None)
        if kept is not None:
            _save(run, outcome, "kept", "adapter", kept, averaged=False if kept == last else None)
    elif outcome.name == "stopped_early":
        outcome.saved("last", LAST, last)
        if outcome.keeps_last:
            scores.kept_is_last()
        else:
            scores.score_kept()
            run.early_stop.note_heldout(outcome.decision.keep_step, scores.heldout["kept"], outcome.averages)
        _save(run, outcome, "kept", "adapter", outcome.decision.keep_step)
    elif outcome.name != "interrupted":
        _keep_full_run(run, outcome)
    test_loss = _score_and_answer_test(run) if outcome.exit_code == 0 else None
    if not run.is_main:
        return
    outcome.heldout, outcome.seconds = in_order(scores.heldout), seconds
    outcome.shadows = run.shadows.training.cost(seconds) if run.shadows is not None else None
    outcome.extra = {
        "test_loss": test_loss,
        "forgetting": scores.general_text.summary() if scores.general_text is not None else None,
        "mmlu": run.mmlu.results if run.mmlu is not None else [],
        "trainable_parameters": trainable_parameters(run.model),
    }
    if run.early_stop is not None and outcome.name != "interrupted":
        run.early_stop.monitor.close()
    leave_results(run.output_dir, outcome, run.settings)
    commands = next_commands(outcome.name, run.output_dir, Path(__file__).resolve(), argv)
    print(*outcome.last_lines(run.output_dir, [forgetting_sentence(outcome)], commands), sep="\n")


def _keep_full_run(run: Run, outcome: Outcome) -> None:
    """The full run was asked for: its last weights are kept, or their average and the last ones
    beside it. Those of a turning point lie beside them."""
    scores, early_stop, decision = run.scores, run.early_stop, outcome.decision
    loss = scores.score_last()
    if early_stop is not None:
        early_stop.note_heldout(outcome.last_step, loss)
    if outcome.keeps_average_of_all:
        _save(run, outcome, "last", LAST, outcome.last_step)
        early_stop.hold_average(run.settings.training, run.model)
        scores.score_kept(name="average")
        early_stop.note_heldout(outcome.last_step, scores.heldout["average"], averaged=True)
    _save(run, outcome, "kept", "adapter", outcome.last_step)
    if decision is None:
        return
    with early_stop.turning_point_in(run.model):
        if outcome.keeps_last:
            scores.kept_is_last()
        else:
            scores.score_kept(alone=run.settings.training.world_size > 1)
        _save(run, outcome, "turning_point", TURNING_POINT, decision.keep_step)


def _save(run: Run, outcome: Outcome, what: str, name: str, step: int, averaged: Optional[bool] = None) -> None:
    """Save the model's weights, which are those of `step`, and the tokenizer with them.
    averaged: whether they are an average; None: as Outcome.saved."""
    training = run.settings.training
    folder = run.output_dir / ("model" if training.full_finetune else name)
    outcome.saved(what, folder.name, step, averaged)
    if not run.is_main:
        return
    save_tokenizer = run.collator.tokenizer.save_pretrained
    if training.full_finetune:
        write_folder_whole(folder, lambda aside: (run.model.save_pretrained(str(aside)), save_tokenizer(str(aside))))
    else:
        base = {"bits": training.bits, "quant_type": training.quant_type, "double_quant": training.double_quant}
        facts = {
            **outcome.facts(what),
            "base": base,
            "prompt_template": CHAT if run.splits.chats else run.settings.data.prompt_template,
        }
        save_adapter(run.model, folder, facts, also=save_tokenizer)


def _score_and_answer_test(run: Run) -> Optional[float]:
    """The loss on the test split, which is scored once, here; None without one. --do_predict
    answers too."""
    test, loss = run.splits.test, None
    if test is not None:
        loss = run.trainer.evaluate(test, metric_key_prefix="test")["test_loss"]
    _predict(run)
    return loss


def _predict(run: Run) -> None:
    rows = run.splits.test if run.splits.test is not None else run.splits.evaluation
    if run.settings.training.do_predict and run.is_main and rows is not None:
        write_predictions(run.settings, run.model, run.collator.tokenizer, rows)


def evaluate_only(run: Run) -> None:
    """--do_train False: score and predict with the base as it is."""
    loss = run.scores.heldout_loss("eval")
    if loss is not None:
        run.say(f"Held-out loss {loss:.4f}, perplexity {math.exp(min(loss, 50)):.2f}.")
    if run.mmlu is not None:
        score = run.mmlu.scorer.score(run.model)
        run.say(f"MMLU accuracy {100 * score['accuracy']:.1f}% of {score['count']} questions.")
    _predict(run)


# --------------------------------------------------------------------------------------------- main


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command line; the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return reported("es_lora_llm", lambda: _run(argv))


def _run(argv: list[str]) -> int:
    started, code = time.monotonic(), 0
    settings = parse_arguments(argv)
    with output_folder_held(settings), last_state_named(lambda: how_to_go_on(settings, argv)):
        run = set_up(settings)
        if settings.training.do_train:
            outcome = train(run)
            finish(run, outcome, argv, time.monotonic() - started)
            code = outcome.exit_code
        else:
            evaluate_only(run)
        run.trainer.leave_process_group()
    return code


def output_folder_held(settings: Settings) -> AbstractContextManager:
    """The output folder is this run's alone, and nothing in it is in the way."""
    training = settings.training
    refuse_in_the_way(training.output_dir, FILES, FOLDERS)
    if training.process_index or not (training.do_train or training.do_predict):
        return nullcontext()
    return locked(training.output_dir, "es_lora_llm", lambda text: tqdm.write(text))


def how_to_go_on(settings: Settings, argv: Sequence[str]) -> str:
    """What is said of the newest whole checkpoint when the machine has failed."""
    whole = complete_checkpoints(Path(settings.training.output_dir), settings.stop.calculate_cs)
    if not whole:
        return "No checkpoint has been saved: start anew (--save_steps saves some)."
    command = go_on_command(Path(__file__).resolve(), argv)
    return f"The last whole state is {shown_path(whole[-1])}. Go on with: {command}"


if __name__ == "__main__":
    sys.exit(main())
