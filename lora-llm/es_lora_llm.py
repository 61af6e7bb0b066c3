"""LoRA fine-tuning of a language model (QLoRA by default) that stops at its turning point.

    python es_lora_llm.py --model_name_or_path FOLDER --dataset FILE.jsonl --early_stop --output_dir OUTPUT

Exit codes: 0 trained to budget or stopped early; 2 bad arguments, configuration or data; 3 training diverged; 130 interrupted.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import quiet_libraries  # noqa: F401  (first, before the libraries speak)
import torch
from early_stop_callback import EarlyStopCallback
from tqdm import tqdm
from transformers import TrainerCallback, set_seed

from adapters.weights import attach_lora, trainable_parameters
from base.loading import bf16_products, fit_embeddings, load_base, load_tokenizer
from es_lora.files import write_text_whole
from es_lora.peft_models import restore_finite, save_adapter
from es_lora.processes import heard_by_all
from es_lora.rules import RULES
from settings.flags import Settings
from settings.parsing import parse_arguments
from text.collator import CausalCollator
from text.mmlu import load_mmlu
from text.packing import PackedCollator, check_base_keeps_samples_apart, pack, packing_notice, uses_varlen_kernel
from text.sources import Splits, load_splits
from text.streams import StreamedRowError, load_streamed_splits
from text.templates import template_format
from training.checkpoints import checkpoint_to_resume, delete_earlier_run
from training.forgetting import GeneralText
from training.losses import PROBE_ROWS, RowLoss
from training.results import EXIT_CODES, next_commands, verdict_sentence, versions, write_result, write_run_report
from training.scores import MMLUCallback, MMLUScorer
from training.shadows import ExampleCollator, ShadowAdapters, with_examples
from training.trainer import EndOfStreamCallback, InterruptCallback, LoraTrainer, TrainingDiverged


@dataclass
class Run:
    """Everything a run needs, ready to train."""

    settings: Settings
    splits: Splits
    collator: CausalCollator
    model: Any
    trainer: LoraTrainer
    interrupt: InterruptCallback
    early_stop: Optional[EarlyStopCallback]
    mmlu: Optional[MMLUCallback]
    resume: Optional[str]
    argv: list[str]
    parameters: dict[str, Any]
    general_text: Optional[GeneralText] = None
    heldout: dict[str, Optional[float]] = field(default_factory=dict)
    diverged_reason: Optional[str] = None
    diverged_kept: Optional[str] = None

    @property
    def output_dir(self) -> Path:
        return Path(self.settings.training.output_dir)

    @property
    def is_main(self) -> bool:
        return self.trainer.is_world_process_zero()

    def say(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)


# ------------------------------------------------------------------------------------------------ set up


def set_up(settings: Settings, argv: list[str]) -> Run:
    """Load and check everything before the first step. Raises ValueError or FileNotFoundError on bad input."""
    training = settings.training
    resume = checkpoint_to_resume(settings)
    set_seed(training.seed)
    flat = settings.flat()
    training.eval_on_start = training.do_eval and resume is None
    tokenizer = load_tokenizer(
        settings.model.model_name_or_path,
        cache_dir=training.cache_dir,
        trust_remote_code=settings.model.trust_remote_code,
        token=settings.model.use_auth_token,
    )
    if flat.prompt_template:
        flat.dataset_format = template_format(flat.prompt_template, tokenizer)
    splits = load_streamed_splits(flat) if flat.streaming else load_splits(flat)
    _check_rows_of_rule(settings, splits)
    if settings.early_stop.shadows and splits.train is not None:
        splits.train = with_examples(splits.train, settings)
    collator = CausalCollator(tokenizer, settings.data.source_max_len, settings.data.target_max_len, training.train_on_source)
    mmlu_rows = load_mmlu(flat) if training.do_mmlu_eval else None
    general_text = _general_text(settings, tokenizer)
    if training.overwrite_output_dir and resume is None and training.do_train and training.process_index == 0:
        delete_earlier_run(Path(training.output_dir))
    training.packed_varlen = settings.data.packing == "samples" and uses_varlen_kernel(training)
    base = load_base(settings)
    fit_embeddings(base, tokenizer)
    model = base if training.full_finetune else attach_lora(base, training)
    if training.group_by_length:
        _add_lengths(splits, collator, training.length_column_name)
    if settings.data.packing:
        _pack(settings, splits, collator, model)
    run = _assemble(settings, splits, collator, model, mmlu_rows, resume, argv)
    run.general_text = general_text
    return run


def _pack(settings: Settings, splits: Splits, collator: CausalCollator, model: Any) -> None:
    """Pack the training samples; evaluation keeps single ones. Raises ValueError where the base cannot be trained so."""
    data = settings.data
    positions = getattr(model.config, "max_position_embeddings", None)
    if data.packing == "samples" and not settings.training.packed_varlen:
        check_base_keeps_samples_apart(model)
    elif data.packing == "wrapped" and positions is not None and data.seq_length > positions:
        raise ValueError(f"--seq_length {data.seq_length}: the base has {positions} positions, and a wrapped sequence uses all")
    if splits.train is None:
        return
    samples, splits.train = splits.train, pack(splits.train, collator, data.packing, data.seq_length)
    if not data.streaming:
        settings.notices.append(packing_notice(len(samples), splits.train, data.seq_length))


def _add_lengths(splits: Splits, collator: CausalCollator, column: str) -> None:
    """What the Trainer groups by: the tokens of every example, in a column."""
    for name in ("train", "evaluation", "test"):
        rows = getattr(splits, name)
        if rows is not None:
            setattr(splits, name, rows.add_column(column, collator.lengths(rows)))


def _assemble(settings, splits, collator, model, mmlu_rows, resume, argv) -> Run:
    training = settings.training
    interrupt, early_stop, mmlu = InterruptCallback(), None, None
    callbacks: list[TrainerCallback] = [interrupt]
    if settings.early_stop.calculate_cs:
        early_stop = _early_stop_callback(settings)
        callbacks.append(early_stop)
    if settings.data.streaming:
        training.accelerator_config.dispatch_batches = False  # every process reads the stream and takes its share
        if not settings.data.packing_repeat:
            callbacks.append(EndOfStreamCallback())
    trainer = LoraTrainer(
        model=model,
        args=training,
        data_collator=_training_collator(settings, collator),
        train_dataset=splits.train,
        eval_dataset=splits.evaluation,
        processing_class=collator.tokenizer,
        callbacks=callbacks,
    )
    trainer.early_stop = early_stop
    if settings.early_stop.shadows and splits.train is not None:
        _add_shadows(trainer, settings, splits, collator, resume)
    if mmlu_rows is not None:
        scorer = MMLUScorer(collator.tokenizer, mmlu_rows, training.mmlu_source_max_len, training.per_device_eval_batch_size)
        mmlu = MMLUCallback(trainer, scorer)
        trainer.add_callback(mmlu)
    run = Run(settings, splits, collator, model, trainer, interrupt, early_stop, mmlu, resume, argv, trainable_parameters(model))
    if early_stop is not None:
        early_stop.columns.update(_columns_of_rule(run))
        early_stop.say = run.say
        early_stop.before_restore = lambda: _score_last(run)
        early_stop.log_scalar = trainer.log_scalar
    return run


def _check_rows_of_rule(settings: Settings, splits: Splits) -> None:
    """Raises ValueError where the rule decides on the loss of examples that there are not."""
    stop, data = settings.early_stop, settings.data
    needs = RULES[stop.stop_rule].needs if stop.calculate_cs else ()
    if "probe_loss" in needs and (data.packing or data.streaming):
        raise ValueError(f"--stop_rule {stop.stop_rule} follows single examples: leave out --packing and --streaming")
    if "heldout_loss" in needs and splits.evaluation is None:
        raise ValueError(
            f"--stop_rule {stop.stop_rule} decides on held-out examples: add --do_eval with --eval_dataset FILE or "
            "--eval_dataset_size, or choose a rule that needs none"
        )


def _columns_of_rule(run: Run) -> dict[str, Any]:
    """{column: function} of what the rule needs beyond the usual measurements."""
    training, needs = run.settings.training, RULES[run.settings.early_stop.stop_rule].needs
    rows = {}
    if "heldout_loss" in needs:
        rows["heldout_loss"] = list(run.splits.evaluation)
    if "probe_loss" in needs and run.splits.train is not None:
        rows["probe_loss"] = [run.splits.train[index] for index in range(min(PROBE_ROWS, len(run.splits.train)))]
    size, autocast = training.per_device_eval_batch_size, run.trainer.compute_loss_context_manager
    return {name: RowLoss(run.model, run.collator, of, size, autocast) for name, of in rows.items()}


def _add_shadows(trainer: LoraTrainer, settings: Settings, splits: Splits, collator: CausalCollator, resume: Any) -> None:
    """Shadow adapters beside the main one, and their column in the history."""
    autocast = trainer.compute_loss_context_manager
    trainer.shadows = ShadowAdapters(settings, trainer.model, splits.train, collator, autocast, resume)
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(callbacks.index(trainer.early_stop), trainer.shadows)  # whose file in a checkpoint is the last one
    trainer.early_stop.columns["shadow_loss"] = lambda: trainer.shadows.score(trainer.early_stop.plan.cs_interval)


def _training_collator(settings: Settings, collator: CausalCollator) -> Any:
    data = settings.data
    if settings.early_stop.shadows:
        return ExampleCollator(collator)
    if data.packing:
        return PackedCollator(collator, data.packing, data.seq_length, settings.training.packed_varlen)
    return collator


def _general_text(settings: Settings, tokenizer: Any) -> Optional[GeneralText]:
    data, batch_size = settings.data, settings.training.per_device_eval_batch_size
    if not data.forgetting_data:
        return None
    return GeneralText(data.forgetting_data, tokenizer, data.max_forgetting_samples, batch_size)


def _early_stop_callback(settings: Settings) -> EarlyStopCallback:
    stop, training = settings.early_stop, settings.training
    return EarlyStopCallback(
        early_stop=stop.early_stop,
        stop_rule=stop.stop_rule,
        cs_interval=settings.cs_interval,
        window_size=settings.window_size,
        valley=stop.valley,
        rule_value=stop.rule_value,
        cs_reduction=stop.cs_reduction,
        cs_component=stop.cs_component,
        snapshot_disk_gb=stop.snapshot_disk_gb,
        report=False,  # finish() writes this trainer's own
        header={
            "model": settings.model.model_name_or_path,
            "dataset": settings.data.dataset,
            "bits": training.bits,
            "lora_r": training.lora_r,
            "learning_rate": training.learning_rate,
            "seed": training.seed,
        },
    )


# ------------------------------------------------------------------------------------------------ train


def train(run: Run) -> str:
    """Train to the stop or the budget and return the outcome; the model then holds the weights to keep."""
    _announce(run)
    _score_general_text(run, "before")
    try:
        run.trainer.train(resume_from_checkpoint=run.resume)
    except TrainingDiverged as error:
        return _diverged(run, str(error))
    if run.interrupt.interrupted:
        return "interrupted"
    if run.early_stop is None:
        return "budget_reached"
    if run.early_stop.diverged is not None:
        return _diverged(run, run.early_stop.diverged)
    if run.early_stop.stopped(run.settings.training):
        return "stopped_early"
    decided = heard_by_all(int(run.early_stop.decision is not None), run.settings.training)
    return "budget_reached" if decided else "no_turning_point"


def _announce(run: Run) -> None:
    training, count = run.settings.training, run.parameters
    packed = "packed training" if run.settings.data.packing else "training"
    sizes = {packed: run.splits.train, "evaluation": run.splits.evaluation, "test": run.splits.test}
    counts = {name: len(rows) if hasattr(rows, "__len__") else "streamed" for name, rows in sizes.items() if rows is not None}
    present = ", ".join(f"{count} {name}" for name, count in counts.items())
    run.say(f"Data: {present} examples ({run.splits.format}) from {run.splits.source}.")
    where = "CPU" + (bf16_products() if training.bf16 else "") if training.use_cpu else str(training.device)
    run.say(f"Base: {run.settings.model.model_name_or_path}, {training.bits} bits, on {where}.")
    run.say(f"Trainable parameters: {count['trainable']:,} of {count['total']:,} ({count['percent']} %).")
    for notice in run.settings.notices:
        run.say(notice)
    run.say(f"Everything goes to {run.output_dir.resolve()}; watch it with: tensorboard --logdir {run.output_dir.resolve()}")


def _loss(run: Run, name: str) -> Optional[float]:
    """Held-out loss of the weights as they are, or None without evaluation examples."""
    if run.splits.evaluation is None:
        return None
    return run.trainer.evaluate(metric_key_prefix=name)[f"{name}_loss"]


def _score_general_text(run: Run, name: str) -> None:
    """Loss on the general text of --forgetting_data, of the weights as they are."""
    if run.general_text is not None and run.is_main:
        with run.trainer.compute_loss_context_manager():
            run.general_text.losses[name] = run.general_text.loss(run.model)


def _score_last(run: Run) -> None:
    """Held-out loss of the last step, before the weights of the turning point are put back."""
    _score_general_text(run, "last")
    state = run.trainer.state
    known = [log["eval_loss"] for log in state.log_history if log["step"] == state.global_step and "eval_loss" in log]
    run.heldout["last"] = known[-1] if known else _loss(run, "last")
    if run.is_main and run.heldout["last"] is not None and not known:
        run.early_stop.monitor.note("evaluation", state.global_step, heldout_loss=run.heldout["last"])


def _diverged(run: Run, reason: str) -> str:
    """Put the last finite weights back: those at hand if the loss went first, else the newest snapshot."""
    run.diverged_reason = reason
    last = run.trainer.state.global_step
    kept = restore_finite(run.model, last, run.early_stop.monitor if run.early_stop is not None else None)
    if kept == last:
        run.diverged_kept = "The weights of that moment are finite and kept."
    elif kept is not None:
        run.diverged_kept = f"The weights of step {kept}, the last finite ones measured, are kept."
    return "diverged"


# ------------------------------------------------------------------------------------------------ the end


def finish(run: Run, outcome: str, seconds: float) -> dict[str, Any]:
    """Evaluate and save what is kept, write result.json and report.html; the result, on every process."""
    training, state, early_stop = run.settings.training, run.trainer.state, run.early_stop
    decision = early_stop.decision if early_stop is not None else None
    at_start = [log["eval_loss"] for log in state.log_history if log["step"] == 0 and "eval_loss" in log]
    run.heldout["before"] = at_start[0] if at_start else None
    facts = early_stop.facts(state.global_step) if early_stop is not None else {"last_step": state.global_step}
    facts["outcome"] = outcome
    facts["base"] = {"bits": training.bits, "quant_type": training.quant_type, "double_quant": training.double_quant}
    adapters: dict[str, str] = {}
    if outcome == "stopped_early":
        run.heldout["kept"] = _loss(run, "kept")
        _score_general_text(run, "kept")
        _save(run, "adapter", facts, adapters)
        adapters["last"] = "adapter-last"
    elif outcome in ("budget_reached", "no_turning_point"):
        _score_last_of_full_run(run)
        _save(run, "adapter", facts, adapters)
        if early_stop is not None and heard_by_all(int(decision is not None), training):
            _save_turning_point(run, facts, adapters)
    elif outcome == "diverged" and run.diverged_kept:
        _save(run, "adapter", facts, adapters)
    test_loss = None
    if outcome in ("stopped_early", "budget_reached", "no_turning_point"):
        if run.splits.test is not None:
            test_loss = run.trainer.evaluate(run.splits.test, metric_key_prefix="test")["test_loss"]
        if training.do_predict:
            _predict(run)
    return _report(run, outcome, adapters, test_loss, seconds) if run.is_main else {"outcome": outcome}


def _score_last_of_full_run(run: Run) -> None:
    if run.early_stop is not None:
        _score_last(run)
    else:
        run.heldout["last"] = _loss(run, "last")
        _score_general_text(run, "last")


def _save(run: Run, name: str, facts: dict[str, Any], adapters: dict[str, str]) -> None:
    adapters["kept" if name == "adapter" else name.removeprefix("adapter-")] = name
    if not run.is_main:
        return
    if run.settings.training.full_finetune:
        run.model.save_pretrained(str(run.output_dir / "model"))
        run.collator.tokenizer.save_pretrained(str(run.output_dir / "model"))
        adapters["kept"] = "model"
    else:
        save_adapter(run.model, run.output_dir / name, facts)
        run.collator.tokenizer.save_pretrained(str(run.output_dir / name))


def _save_turning_point(run: Run, facts: dict[str, Any], adapters: dict[str, str]) -> None:
    """The full run was asked for and has a turning point: its weights beside the last ones."""
    with run.early_stop.turning_point_in(run.model):
        if run.settings.training.world_size == 1:
            run.heldout["kept"] = _loss(run, "kept")
        _score_general_text(run, "kept")
        _save(run, "adapter-turning-point", facts, adapters)


def _predict(run: Run) -> None:
    """--do_predict: answers to the test examples, or else the evaluation examples, into predictions.jsonl."""
    rows = run.splits.test if run.splits.test is not None else run.splits.evaluation
    if not run.is_main or rows is None:
        return
    training, tokenizer = run.settings.training, run.collator.tokenizer
    config = run.settings.generation.config(run.settings.generation_use_cache)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    sources = CausalCollator(tokenizer, run.settings.data.source_max_len, run.settings.data.target_max_len, False, True)
    run.model.eval()
    lines = []
    for start in tqdm(range(0, len(rows), training.per_device_eval_batch_size), desc="Predictions"):
        batch = [rows[index] for index in range(start, min(start + training.per_device_eval_batch_size, len(rows)))]
        inputs = {name: tensor.to(run.model.device) for name, tensor in sources(batch).items()}
        with torch.no_grad():
            generated = run.model.generate(**inputs, generation_config=config)
        answers = tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        lines += [
            {"input": row["input"], "output": row["output"], "prediction": answer.strip()} for row, answer in zip(batch, answers)
        ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text_whole(run.output_dir / "predictions.jsonl", text)


def _report(run: Run, outcome: str, adapters: dict[str, str], test_loss: Optional[float], seconds: float) -> dict[str, Any]:
    state, early_stop = run.trainer.state, run.early_stop
    decision = early_stop.decision if early_stop is not None else None
    monitor = early_stop.monitor if early_stop is not None else None
    kept_step = state.global_step if adapters.get("kept") else None
    if decision is not None and outcome == "stopped_early":
        kept_step = decision.keep_step
        if run.heldout.get("kept") is not None:
            monitor.note("evaluation", kept_step, heldout_loss=run.heldout["kept"])
    facts = {
        "last_step": state.global_step,
        "budget_steps": state.max_steps,
        "heldout": run.heldout,
        "diverged": run.diverged_reason,
        "diverged_kept": run.diverged_kept or "No finite weights had been measured, so no adapter is kept.",
    }
    per_epoch = monitor.rule.settings.steps_per_epoch if monitor is not None else 1
    result = {
        "outcome": outcome,
        "verdict": verdict_sentence(outcome, facts, decision, per_epoch),
        "kept_step": kept_step,
        "turning_step": decision.keep_step if decision is not None else None,
        "detection_step": decision.detected_step if decision is not None else None,
        "last_step": state.global_step,
        "budget_steps": state.max_steps,
        "reason": decision.reason if decision is not None else None,
        "adapters": adapters,
        "heldout": run.heldout,
        "test_loss": test_loss,
        "forgetting": run.general_text.summary() if run.general_text is not None else None,
        "mmlu": run.mmlu.results if run.mmlu is not None else [],
        "shadows": run.trainer.shadows.training.cost(seconds) if run.trainer.shadows is not None else None,
        "trainable_parameters": run.parameters,
        "seconds": round(seconds, 1),
        "seed": run.settings.training.seed,
        "settings": run.settings.values(),
        "versions": versions(),
    }
    write_result(run.output_dir, result)
    if monitor is not None and outcome != "interrupted":
        monitor.close()
    has_report = write_run_report(run.output_dir, {**result, "settings": run.settings.values(True)}, decision)
    _last_words(run, result, has_report)
    return result


def _last_words(run: Run, result: dict[str, Any], has_report: bool) -> None:
    print(f"\n{result['verdict']}")
    if result["reason"]:
        print(f"Why: {result['reason']}")
    if result["forgetting"]:
        print(result["forgetting"]["sentence"] or "General text: nothing was scored after training.")
    if result["shadows"]:
        print(result["shadows"]["sentence"])
    for name, folder in result["adapters"].items():
        print(f"{name + ':':15} {run.output_dir.resolve() / folder}")
    print(f"{'result:':15} {run.output_dir.resolve() / 'result.json'}")
    if has_report:
        print(f"{'picture:':15} {run.output_dir.resolve() / 'report.html'}")
    for line in next_commands(result["outcome"], run.output_dir.resolve(), Path(__file__).resolve(), run.argv):
        print(line)


def main(argv: Optional[Sequence[str]] = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    started = time.monotonic()
    try:
        settings = parse_arguments(argv)
        run = set_up(settings, argv)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"es_lora_llm: {error}", file=sys.stderr)
        return 2
    outcome = "evaluated"
    if settings.training.do_train:
        try:
            outcome = train(run)
        except StreamedRowError as error:
            print(f"es_lora_llm: {error}", file=sys.stderr)
            return 2
        finish(run, outcome, time.monotonic() - started)
    else:
        evaluate_only(run)
    leave_process_group(run)
    return EXIT_CODES[outcome]


def leave_process_group(run: Run) -> None:
    """End the collectives of all processes before the interpreter ends.

    The DDP wrapper goes first: were it the last to hold the group, gloo's threads would be joined with the interpreter
    locked, and one of them may be waiting for it to let go of the tensors of the last collective.
    """
    if not torch.distributed.is_initialized():
        return
    run.trainer.model_wrapped = run.trainer.model
    run.trainer.accelerator.free_memory()
    torch.distributed.destroy_process_group()


def evaluate_only(run: Run) -> None:
    """--do_train False: score and predict with the base as it is."""
    if run.splits.evaluation is not None:
        loss = _loss(run, "eval")
        run.say(f"Held-out loss {loss:.4f}, perplexity {math.exp(min(loss, 50)):.2f}.")
    if run.mmlu is not None:
        score = run.mmlu.scorer.score(run.model)
        run.say(f"MMLU accuracy {100 * score['accuracy']:.1f}% of {score['count']} questions.")
    if run.settings.training.do_predict:
        _predict(run)


if __name__ == "__main__":
    sys.exit(main())
