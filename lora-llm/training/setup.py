"""From a run's settings to its parts: specs of base and data, splits, collators, columns."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch
from peft import PeftModel

from adapters.weights import attach_lora, trainable_parameters
from base.layers import Positions, positions_notices, positions_of
from base.loading import bf16_products, compute_dtype, fit_embeddings, load_base
from base.origin import local_base
from base.spec import BaseSpec
from settings.flags import Settings
from text.collator import CausalCollator
from text.conversations import conversation_format
from text.formats import Format
from text.mmlu import Row, load_mmlu
from text.packing import PackedCollator, check_base_keeps_samples_apart, pack, packing_notice, uses_varlen_kernel
from text.sources import Splits, load_splits
from text.spec import DataSpec
from text.streams import StreamedRowError, load_streamed_splits
from text.templates import template_format
from text.usable import Cuts, Limit, usable_rows
from training.forgetting import GeneralText
from training.losses import RowLoss
from training.shadows import EXAMPLE, ExampleCollator, ShadowAdapters, with_examples

Column = Callable[[], Optional[float]]


def fetch_base(settings: Settings) -> None:
    """Make the base a folder that can be loaded: a packaged base or a GGUF file is converted once.

    Raises as local_base.
    """
    model, training = settings.model, settings.training
    dtype = base_spec(settings).stored_dtype if training.bits in (16, 32) else torch.bfloat16
    hub = {"cache_dir": training.cache_dir, "token": model.use_auth_token or None}
    with training.main_process_first(desc="the base model"):
        model.model_name_or_path = local_base(model.model_name_or_path, dtype, model.gguf_file, **hub)


def base_spec(settings: Settings) -> BaseSpec:
    """What of the settings the base is loaded by."""
    model, training = settings.model, settings.training
    recomputes = training.activation_checkpointing
    return BaseSpec(
        model.model_name_or_path,
        training.bits,
        compute=compute_dtype(training.bf16, training.fp16),
        quant_type=training.quant_type,
        double_quant=training.double_quant,
        device=None if training.use_cpu else training.device,
        spread_MB=training.max_memory_MB if training.world_size == 1 else None,
        checkpointing=training.activation_checkpointing_kwargs if recomputes else None,
        for_lora=not training.full_finetune,
        attention="flash_attention_2" if packs_for_varlen(settings) else None,
        cache_dir=training.cache_dir,
        trust_remote_code=model.trust_remote_code,
        token=model.use_auth_token,
    )


def data_spec(settings: Settings, tokenizer: Any) -> DataSpec:
    """What of the settings the text is read by. tokenizer: its chat template may be used."""
    data, training = settings.data, settings.training
    template, conversations = data.prompt_template, _conversations(settings, tokenizer)
    return DataSpec(
        data.dataset,
        template_format(template, tokenizer, conversations) if template else data.dataset_format,
        eval_dataset=data.eval_dataset,
        eval_dataset_size=data.eval_dataset_size,
        test_dataset_size=data.test_dataset_size,
        max_train_samples=data.max_train_samples,
        max_eval_samples=data.max_eval_samples,
        train_subject=data.train_subject,
        mmlu_dir=data.mmlu_dir,
        cache_dir=training.cache_dir,
        seed=training.seed if training.data_seed is None else training.data_seed,
        train=training.do_train,
        evaluate=training.do_eval or training.do_predict,
        conversations=conversations,
    )


def _conversations(settings: Settings, tokenizer: Any) -> Optional[Format]:
    """What reads conversations, None where only their last answer is learnt."""
    if settings.data.learn_turns == "last" or tokenizer is None:
        return None
    return conversation_format(tokenizer)


def conversation_limit(settings: Settings) -> Limit:
    """How much of a conversation is trained on."""
    data = settings.data
    tokens = data.source_max_len + data.target_max_len
    if data.packing == "samples" and data.seq_length < tokens:
        return Limit(data.seq_length, "--seq_length")
    return Limit(tokens, "--source_max_len or --target_max_len")


# --------------------------------------------------------------------------------------------- text


def read_splits(settings: Settings, tokenizer: Any) -> Splits:
    """The rows of a run. Raises ValueError or FileNotFoundError, also where the rule decides on
    rows that there are not."""
    spec, stop = data_spec(settings, tokenizer), settings.stop
    splits = load_streamed_splits(spec) if settings.data.streaming else load_splits(spec)
    if stop.calculate_cs and stop.needs_heldout and splits.evaluation is None:
        raise ValueError(
            f"--stop_rule {stop.stop_rule} decides on held-out examples: add --do_eval with --eval_dataset FILE or "
            "--eval_dataset_size, or choose a rule that needs none"
        )
    return splits


@dataclass(frozen=True)
class Ready:
    """Splits that can be trained on, and the tokens of their longest row after all cuts.

    examples: the training rows that shadows hold folds out of; they are not packed. None without.
    """

    splits: Splits
    longest: int
    examples: Optional[Any]


def ready_splits(settings: Settings, splits: Splits, collator: CausalCollator) -> Ready:
    """The splits without rows of which nothing is learnt; packed, or with lengths to group by.

    Training rows get the number of their example where shadows need it. Notices say what is cut and
    left out. Raises ValueError where nothing would be trained on.
    """
    data, training, longest = settings.data, settings.training, [0]
    sequence = data.seq_length if data.packing == "samples" else None
    cuts = Cuts(collator, sequence_tokens=sequence, conversations=conversation_limit(settings))
    tally = None if splits.tally is None else replace(splits.tally, cuts=cuts)

    def usable(rows: Any, cuts: Cuts, what: str) -> Any:
        if rows is None:
            return None
        if tally is not None and not hasattr(rows, "__len__"):  # a stream
            return rows.filter(tally.learns)
        rows, sizes, notices = usable_rows(rows, cuts, what)
        settings.notices.extend(notices)
        longest.extend(cuts.kept(size) for size in sizes)
        if training.group_by_length:  # what the Trainer groups by
            rows = rows.add_column(training.length_column_name, [size.kept for size in sizes])
        return rows

    train = usable(splits.train, cuts, "training")
    if data.packing == "wrapped":
        longest = [0]  # a sequence is as long as --seq_length
    examples = None
    if train is not None and settings.stop.shadows:
        train = examples = with_examples(train, settings.stop.shadows, training.seed)
    if train is not None and data.packing:
        train = _packed(settings, train, collator)
    check_trains(settings, train)
    held_out = usable(splits.evaluation, Cuts(collator), "held-out")
    test = usable(splits.test, Cuts(collator), "test")
    return Ready(replace(splits, train=train, evaluation=held_out, test=test, tally=tally), max(longest), examples)


def _packed(settings: Settings, rows: Any, collator: CausalCollator) -> Any:
    """The training rows as packed sequences. Raises ValueError where none has a learnt token."""
    data = settings.data
    packed = pack(rows, collator, data.packing, data.seq_length, [EXAMPLE] if settings.stop.shadows else ())
    if data.streaming:
        return packed
    if not len(packed):
        raise ValueError(f"no token of the {len(rows)} training examples is learnt; raise --target_max_len")
    settings.notices.append(packing_notice(len(rows), packed, data.seq_length))
    return packed


def check_trains(settings: Settings, rows: Any) -> None:
    """Raises ValueError where --dataloader_drop_last leaves no batch of the rows to train on."""
    training = settings.training
    batch = training.per_device_train_batch_size * training.world_size
    if rows is None or settings.data.streaming or not training.dataloader_drop_last or len(rows) >= batch:
        return
    raise ValueError(
        f"--dataloader_drop_last: {len(rows)} training {'sequences' if settings.data.packing else 'examples'} are "
        f"fewer than a batch of {batch}, so nothing would be trained; lower --per_device_train_batch_size, or leave "
        "--dataloader_drop_last out"
    )


def check_positions(settings: Settings, longest: int, model: torch.nn.Module) -> None:
    """What is longer than the base has positions: a notice, or ValueError where there are no more.

    Raises ValueError too where the base cannot keep packed samples apart.
    """
    data, positions = settings.data, positions_of(model)
    if data.packing == "samples" and not packs_for_varlen(settings):
        check_base_keeps_samples_apart(model)
    elif data.packing == "wrapped" and positions is not None and data.seq_length > positions.count:
        raise ValueError(
            f"--seq_length {data.seq_length}: the base has {positions.count} positions, and a wrapped sequence uses all"
        )
    settings.notices.extend(positions_notices(positions, longest, "--source_max_len and --target_max_len"))


def read_general_text(settings: Settings, tokenizer: Any) -> Optional[GeneralText]:
    """The passages of --forgetting_data, None without it."""
    data, batch_size = settings.data, settings.training.per_device_eval_batch_size
    if not data.forgetting_data:
        return None
    return GeneralText(data.forgetting_data, tokenizer, data.max_forgetting_samples, batch_size)


def read_mmlu(settings: Settings) -> Optional[list[Row]]:
    """The questions of --do_mmlu_eval, None without it."""
    training, limit = settings.training, settings.training.max_mmlu_samples
    if not training.do_mmlu_eval:
        return None
    options = {"dataset": training.mmlu_dataset, "split": training.mmlu_split, "limit": limit}
    return load_mmlu(settings.data.mmlu_dir, **options, cache_dir=training.cache_dir)


def packs_for_varlen(settings: Settings) -> bool:
    """Whether packed samples go through flash attention's kernel for several lengths."""
    training = settings.training
    varlen = uses_varlen_kernel(training.use_cpu, training.bf16 or training.fp16)
    return settings.data.packing == "samples" and varlen and not settings.stop.shadows  # these need a row a sequence


def training_collator(settings: Settings, collator: CausalCollator, model: torch.nn.Module) -> Callable[..., Any]:
    """What makes the trainer's batches: packed rows, rows with examples, or single samples."""
    data, positions = settings.data, positions_of(model)
    if data.packing:
        packed = PackedCollator(collator, data.packing, data.seq_length, packs_for_varlen(settings))
        return ExampleCollator(packed) if settings.stop.shadows else packed
    if settings.stop.shadows:
        return ExampleCollator(collator)
    if data.streaming and positions is not None and positions.hard:
        return _within(positions, collator)
    return collator


def _within(positions: Positions, collator: CausalCollator) -> Callable[..., Any]:
    """The collator of a stream, whose rows are only seen as they come."""

    def collate(rows: Any) -> dict[str, torch.Tensor]:
        batch = collator(rows)
        try:
            positions_notices(positions, batch["input_ids"].shape[1], "--source_max_len and --target_max_len")
        except ValueError as error:
            raise StreamedRowError(str(error)) from None
        return batch

    return collate


def load_model(settings: Settings, tokenizer: Any) -> torch.nn.Module:
    """The base, with a fresh LoRA unless it is trained itself."""
    base = load_base(base_spec(settings))
    fit_embeddings(base, tokenizer)
    return base if settings.training.full_finetune else with_lora(settings, base)


def with_lora(settings: Settings, base: torch.nn.Module) -> PeftModel:
    """The base with the LoRA that the settings ask for."""
    training = settings.training
    return attach_lora(
        base,
        rank=training.lora_r,
        alpha=training.lora_alpha,
        dropout=training.lora_dropout,
        modules=training.lora_modules,
        bias=training.lora_bias,
    )


def columns_of_rule(
    settings: Settings,
    splits: Splits,
    collator: CausalCollator,
    model: torch.nn.Module,
    shadows: Optional[ShadowAdapters],
) -> dict[str, Column]:
    """{column: function} of the history, of what is recorded beyond the usual measurements."""
    columns: dict[str, Column] = {}
    if shadows is not None:
        columns[shadows.training.column] = shadows.score
    if settings.stop.needs_heldout:
        size = settings.training.per_device_eval_batch_size
        columns["heldout_loss"] = RowLoss(model, collator, list(splits.evaluation), size)
    return columns


def history_header(settings: Settings) -> dict[str, Any]:
    """What the first line of the history says of the run."""
    training = settings.training
    return {
        "model": settings.model.model_name_or_path,
        "dataset": settings.data.dataset,
        "bits": training.bits,
        "lora_r": training.lora_r,
        "learning_rate": training.learning_rate,
        "seed": training.seed,
    }


def announcement(settings: Settings, splits: Splits, model: torch.nn.Module) -> list[str]:
    """What is said before the first step: data, base, what is trained, notices, the folder."""
    training, count = settings.training, trainable_parameters(model)
    packed = "packed training" if settings.data.packing else "training"
    sizes = {packed: splits.train, "evaluation": splits.evaluation, "test": splits.test}
    counts = {
        name: len(rows) if hasattr(rows, "__len__") else "streamed" for name, rows in sizes.items() if rows is not None
    }
    present = ", ".join(f"{count} {name}" for name, count in counts.items())
    in_bf16 = training.bf16 or training.bits == 16
    where = "CPU" + (bf16_products() if in_bf16 else "") if training.use_cpu else str(training.device)
    folder = Path(training.output_dir).resolve()
    return [
        f"Data: {present} examples ({splits.format}) from {splits.source}.",
        f"Base: {settings.model.model_name_or_path}, {training.bits} bits, on {where}.",
        f"Trainable parameters: {count['trainable']:,} of {count['total']:,} ({count['percent']} %).",
        *settings.notices,
        f"Everything goes to {folder}; watch it with: tensorboard --logdir {folder}",
    ]
