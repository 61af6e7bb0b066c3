"""Makes the embedded base language model of this folder, stage by stage:

    python make_tiny_base.py collect      # Debian packages -> train.jsonl, heldout.jsonl
                                          # (network: apt-get download)
    python make_tiny_base.py tokenizer    # byte-level BPE, token ids, unigram counts
    python make_tiny_base.py train        # --device cpu|cuda
    python make_tiny_base.py evaluate     # held-out perplexity of it and of the unigram; samples

Each stage reads what the one before left in --work_dir; what belongs beside the model goes to
--out_dir. README.md says which settings, machine and time made the committed weights.
"""

import argparse
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import collect_text
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 4096
CONTEXT_TOKENS = 512
SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
PASSAGES = 60  # in general_text.jsonl
PROMPTS = (
    "It was a cold morning, and",
    "The function returns",
    "A river is",
    "And the king said to them,",
    "To love is",
)


def model_config() -> LlamaConfig:
    """A Llama of 6.2 million parameters: small enough for a LoRA run in minutes on two cores."""
    ids = {name + "_id": place for place, name in enumerate(SPECIAL_TOKENS) if name != "unk_token"}
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        **ids,
    )


def read_texts(path: Path) -> list[dict[str, str]]:
    """The records of a jsonl file that an earlier stage wrote."""
    return [json.loads(line) for line in require(path).read_text(encoding="utf-8").splitlines()]


def require(path: Path) -> Path:
    """The path, or a FileNotFoundError that names the stage order."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run the stages in order (collect, tokenizer, train, evaluate)")
    return path


def collect(args: argparse.Namespace) -> None:
    """Stage 1: text, its split, the list of sources, and passages that measure forgetting later."""
    args.work_dir.mkdir(parents=True, exist_ok=True)
    collect_text.collect(args.work_dir, args.heldout_percent, args.seed)
    collect_text.write_text(args.out_dir / "sources.json", (args.work_dir / "sources.json").read_text(encoding="utf-8"))
    passages = choose_passages(read_texts(args.work_dir / "heldout.jsonl"), args.seed)
    collect_text.write_text(
        args.out_dir / "general_text.jsonl",
        "".join(json.dumps(passage, ensure_ascii=False) + "\n" for passage in passages),
    )


def choose_passages(records: Sequence[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """PASSAGES held-out texts of 500 to 1,400 characters, as evenly over sources as can be."""
    by_source = {}
    for place in np.random.default_rng(seed).permutation(len(records)):
        passage = ""
        for paragraph in records[place]["text"].split("\n\n"):
            if passage and len(passage) + len(paragraph) > 1400:
                break
            passage += ("\n\n" if passage else "") + paragraph
        if 500 <= len(passage) <= 1400:
            source = records[place]["source"]
            by_source.setdefault(source, []).append({"text": passage, "source": source})
    turns = itertools.zip_longest(*(by_source[source] for source in sorted(by_source)))
    return [passage for turn in turns for passage in turn if passage][:PASSAGES]


def make_tokenizer(args: argparse.Namespace) -> None:
    """Stage 2: train the tokenizer on the training split; encode both splits; count unigrams."""
    splits = {side: read_texts(args.work_dir / f"{side}.jsonl") for side in ("train", "heldout")}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator((record["text"] for record in splits["train"]), trainer, length=len(splits["train"]))
    bos = SPECIAL_TOKENS["bos_token"]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bpe.token_to_id(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=CONTEXT_TOKENS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )
    tokenizer.save_pretrained(args.out_dir)
    settings_path = args.out_dir / "tokenizer_config.json"
    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 and 5 both know
    collect_text.write_text(settings_path, json.dumps(settings, indent=2) + "\n")
    eos = tokenizer.eos_token_id
    for side, records in splits.items():
        encoded = bpe.encode_batch([record["text"] for record in records])  # each begins with bos
        ids = np.concatenate([np.array(text.ids + [eos], dtype=np.uint16) for text in encoded])
        np.save(args.work_dir / f"{side}_tokens.npy", ids)
        print(f"{side}: {len(ids):,} tokens in {len(records):,} documents")
        if side == "train":
            counts = np.bincount(ids, minlength=VOCAB_SIZE)
            collect_text.write_text(args.out_dir / "unigram_counts.json", json.dumps(counts.tolist()) + "\n")


def load_tokens(path: Path) -> torch.Tensor:
    """Token ids of a split, int64, (N,)."""
    return torch.from_numpy(np.load(require(path)).astype(np.int64))


def whole_windows(tokens: torch.Tensor) -> torch.Tensor:
    """Consecutive windows, (N // CONTEXT_TOKENS, CONTEXT_TOKENS); the rest is dropped."""
    return tokens[: len(tokens) // CONTEXT_TOKENS * CONTEXT_TOKENS].view(-1, CONTEXT_TOKENS)


def shuffled_windows(tokens: torch.Tensor, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches (batch_size, CONTEXT_TOKENS); each epoch cuts anew and shuffles."""
    random = np.random.default_rng(seed)
    while True:
        offset = int(random.integers(CONTEXT_TOKENS))
        windows = whole_windows(tokens[offset:])
        order = torch.from_numpy(random.permutation(len(windows))).to(tokens.device)
        for start in range(0, len(windows) - batch_size + 1, batch_size):
            yield windows[order[start : start + batch_size]]


def learning_rate_factor(progress: float, warmup: float = 0.02, floor: float = 0.02) -> float:
    """Linear warm-up, then a cosine from 1 to floor; progress runs from 0 to 1."""
    if progress < warmup:
        return progress / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def train(args: argparse.Namespace) -> None:
    """Stage 3: AdamW, cosine schedule; ends with the tokens or minutes, whichever is first."""
    torch.manual_seed(args.seed)
    tokens = load_tokens(args.work_dir / "train_tokens.npy").to(args.device)
    validation = load_tokens(args.work_dir / "heldout_tokens.npy")[: 64 * CONTEXT_TOKENS].to(args.device)
    model = LlamaForCausalLM(model_config()).to(args.device)
    optimizer = decaying_matrices(model, args)
    forward = torch.compile(model) if args.compile else model
    bf16 = args.precision == "bf16"
    batches = shuffled_windows(tokens, args.batch_size, args.seed)
    steps = max(1, int(args.tokens // (args.batch_size * CONTEXT_TOKENS)))
    log, started, progress, step, running = [], time.monotonic(), 0.0, 0, []
    with tqdm(total=steps, unit="step", mininterval=5) as bar:
        while progress < 1.0:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * learning_rate_factor(progress)
            batch = next(batches)  # (B, CONTEXT_TOKENS)
            with torch.autocast(args.device, dtype=torch.bfloat16, enabled=bf16):
                loss = forward(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            running.append(loss.detach())
            step += 1
            bar.update()
            if step % args.log_every == 0 or step == 1:  # not every step: reading the loss waits for the GPU
                train_loss = torch.stack(running).mean().item()
                if not math.isfinite(train_loss):
                    raise ValueError(
                        f"the loss is {train_loss} at step {step}: lower --learning_rate (it was {args.learning_rate})"
                    )
                validation_loss = mean_loss(model, validation)
                losses = {"train_loss": round(train_loss, 4), "validation_loss": round(validation_loss, 4)}
                log.append({"step": step, "seconds": round(time.monotonic() - started, 1), **losses})
                bar.set_postfix(train=f"{train_loss:.3f}", validation=f"{validation_loss:.3f}")
                running = []
            time_used = (time.monotonic() - started) / (60 * args.max_minutes) if args.max_minutes else 0.0
            progress = max(step / steps, time_used)
    seconds = time.monotonic() - started
    save_model(model, args.out_dir)
    trained_tokens = step * args.batch_size * CONTEXT_TOKENS
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(seconds),
        "steps": step,
        "tokens": trained_tokens,
        "tokens_per_second": round(trained_tokens / seconds),
        "epochs": round(trained_tokens / len(tokens), 2),
        "ended_by": "tokens" if step >= steps else "minutes",
        "log": log,
    }
    write_figures(args.out_dir, "training", {**figures, **circumstances(args)})


SETTINGS = "tokens max_minutes batch_size learning_rate weight_decay seed precision compile".split()


def circumstances(args: argparse.Namespace) -> dict[str, Any]:
    """What a training ran on and with: hardware, settings, versions."""
    on_cpu = f"CPU, {torch.get_num_threads()} threads"
    modules = {"torch": torch, "transformers": transformers}
    return {
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else on_cpu,
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "versions": {
            "python": platform.python_version(),
            **{name: module.__version__ for name, module in modules.items()},
        },
    }


def decaying_matrices(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and none on norms."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    norms = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


def save_model(model: LlamaForCausalLM, out_dir: Path) -> None:
    """bf16 safetensors, config.json and generation_config.json."""
    model = model.to(torch.bfloat16)
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(out_dir)


@torch.no_grad()
def mean_loss(model: torch.nn.Module, tokens: torch.Tensor, batch_size: int = 16) -> float:
    """Mean next-token loss in nats over consecutive windows; the first token is not scored."""
    windows = whole_windows(tokens)
    total, training = 0.0, model.training
    model.eval()
    for batch in windows.split(batch_size):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()  # (B, CONTEXT_TOKENS - 1, V)
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    model.train(training)
    return total / (len(windows) * (CONTEXT_TOKENS - 1))


def unigram_loss(counts: Sequence[int], tokens: torch.Tensor) -> float:
    """Mean loss in nats of the training split's unigram, add-one smoothed, as mean_loss scores."""
    log_probabilities = np.log((np.asarray(counts) + 1.0) / (np.sum(counts) + len(counts)))
    windows = whole_windows(tokens)
    return -float(log_probabilities[windows[:, 1:].numpy()].mean())


def evaluate(args: argparse.Namespace) -> None:
    """Stage 4: perplexities on the held-out split, a few samples, into figures.json."""
    heldout = load_tokens(args.work_dir / "heldout_tokens.npy")
    counts = json.loads(require(args.out_dir / "unigram_counts.json").read_text())
    model = LlamaForCausalLM.from_pretrained(require(args.out_dir), dtype=torch.float32).to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.out_dir)
    started = time.monotonic()
    loss, baseline = mean_loss(model, heldout.to(args.device)), unigram_loss(counts, heldout)
    torch.manual_seed(args.seed)
    samples = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(args.device)
        output = model.generate(**ids, max_new_tokens=60, do_sample=True, temperature=0.8, top_p=0.95)
        samples.append(tokenizer.decode(output[0], skip_special_tokens=True))
    write_figures(
        args.out_dir,
        "evaluation",
        {
            "heldout_tokens": len(heldout),
            "model_loss": round(loss, 4),
            "model_perplexity": round(math.exp(loss), 2),
            "unigram_loss": round(baseline, 4),
            "unigram_perplexity": round(math.exp(baseline), 1),
            "unigram_over_model": round(math.exp(baseline - loss), 1),
            "seconds": round(time.monotonic() - started),
            "samples": samples,
        },
    )


def write_figures(out_dir: Path, part: str, figures: dict[str, Any]) -> None:
    """Puts one part of figures.json in place and prints it."""
    path = out_dir / "figures.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[part] = figures
    collect_text.write_text(path, json.dumps(known, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({name: value for name, value in figures.items() if name != "log"}, indent=1, ensure_ascii=False))


def parse_arguments() -> argparse.Namespace:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("stage", choices=list(STAGES))
    add("--work_dir", type=Path, default=here.parents[1] / "output" / "tiny_base", help="packages, text and token ids")
    add("--out_dir", type=Path, default=here, help="where the model's folder is written")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--heldout_percent", type=float, default=2.0)
    add("--tokens", type=float, default=4e8, help="training tokens (with repetition)")
    add("--max_minutes", type=float, help="ends the schedule early if time runs out first")
    add("--batch_size", type=int, default=128, help=f"windows of {CONTEXT_TOKENS} tokens a step")
    add("--learning_rate", type=float, default=2e-3)
    add("--weight_decay", type=float, default=0.1)
    add("--log_every", type=int, default=100, help="steps between validations")
    add(
        "--precision",
        choices=("bf16", "fp32"),
        default="bf16" if torch.cuda.is_available() else "fp32",
        help="of the matrix products; bf16 on a CPU only pays where its cores have bf16 arithmetic",
    )
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    return parser.parse_args()


STAGES = {"collect": collect, "tokenizer": make_tokenizer, "train": train, "evaluate": evaluate}


def main() -> int:
    args = parse_arguments()
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        STAGES[args.stage](args)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
