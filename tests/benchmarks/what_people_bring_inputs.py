"""The inputs of what_people_bring.py: what a person gives to which tool, and the right answer.

Words in braces stand for places: {llm} and {sd} are the embedded bases, {parts} what
what_people_bring_parts.py made. Kinds are those of the page.
"""

from dataclasses import dataclass, field

LLM, MULTI, ASK, MERGE = "es_lora_llm.py", "multi_lora.py", "generate_text.py", "merge_adapter.py"
JUDGE, REPLAY = "judge_checkpoints.py", "cs_replay.py"
LDM, SDXL, SAMPLE, FOLD, EXTRACT = (
    "es_lora_ldm.py",
    "es_lora_sdxl.py",
    "sample_images.py",
    "merge_lora.py",
    "extract_lora.py",
)
RESIZE, TAG, CAPTION = "prepare/resize_images.py", "prepare/tag_wd14.py", "prepare/caption_images.py"
DEMO = "demo_app.py"
OF_LLM = (LLM, MULTI, ASK, MERGE, JUDGE, REPLAY)


@dataclass(frozen=True)
class Part:
    """A file or folder of {parts}, to be copied."""

    name: str


@dataclass(frozen=True)
class Input:
    """files: {name: a text, bytes, rows of a jsonl, or a Part}. words: the command's; their tool's
    usual ones come first. code and says: the right exit code, and words of the right message."""

    kind: str
    tool: str
    given: str
    words: str
    code: int
    says: str
    files: dict = field(default_factory=dict)
    online: bool = False


# What a tool is given before the words of an input.
USUAL = {
    LLM: "--bits 32 --use_cpu --lora_r 4 --max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 "
    "--save_strategy no --report_to none --output_dir out",
    MULTI: "--bits 32 --use_cpu --output_dir out --config",
    ASK: "--bits 32 --max_new_tokens 4",
    MERGE: "--bits 32 --output merged",
    LDM: "--resolution 64,64 --network_dim 4 --seed 1 --max_train_steps 1 --max_data_loader_n_workers 0 "
    "--caption_extension .txt --output_dir out",
    SDXL: "--resolution 64,64 --output_dir out --caption_extension .txt",
    SAMPLE: "--device cpu --out pictures",
    EXTRACT: "--device cpu --save_to extracted.safetensors",
    CAPTION: "--yes",
}
TINY = "--model_name_or_path {llm} "
SD = "--pretrained_model_name_or_path {sd} "
ROW = {"input": "q", "output": "a"}
LATE = {"input": "word " * 200, "output": "answer"}
LONG = {"input": "q", "output": "one more word " * 400}
TALK = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
LATE_TALK = {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "a"}]}
CAT = {"data/1_cat/a.png": Part("ldm/a.png"), "data/1_cat/b.png": Part("ldm/b.png"), "data/1_cat/b.txt": "a cat"}
MARK = "\ufeff"
HEADER = {"format": "cs-history/1", "cs_interval": 1, "window": 2, "steps_per_epoch": 4, "decided_on": "lm"}


def trained(kind, given, words, code, says, **files):
    return Input(kind, LLM, given, TINY + words, code, says, {"rows.jsonl": [ROW, ROW], **named(files)})


def pictured(kind, given, words, code, says, files=None):
    return Input(kind, LDM, given, f"{SD} --train_data_dir data {words}", code, says, {**CAT, **(files or {})})


def jobs(kind, given, text, code, says, **files):
    return Input(kind, MULTI, given, "jobs.toml --base_model {llm}", code, says, {"jobs.toml": text, **named(files)})


def named(files):
    """rows_jsonl -> rows.jsonl."""
    return {name.replace("_", "."): content for name, content in files.items()}


def job(name, data, more=""):
    return f'[[jobs]]\nname = "{name}"\ndataset = "{data}"\nrank = 4\nmax_steps = 2\naccumulation = 1\n{more}\n'


def bytes_of(text, coding):
    return text.encode(coding)


DATA = "--dataset rows.jsonl "
A1 = [
    trained(
        "A1",
        "packed prompts, all longer than the sequence",
        DATA + "--packing --seq_length 32",
        2,
        "no token of the 3 training examples is learnt",
        rows_jsonl=[LATE] * 3,
    ),
    trained(
        "A1",
        "packed prompts, half of them longer",
        DATA + "--packing --seq_length 32",
        0,
        "Left out: 2 of 4 training examples",
        rows_jsonl=[LATE, ROW] * 2,
    ),
    trained(
        "A1",
        "a conversation whose answer lies behind the cut",
        DATA + "--source_max_len 40 --target_max_len 9",
        0,
        "Left out: 1 of 3 training examples",
        rows_jsonl=[TALK, LATE_TALK, TALK],
    ),
    trained(
        "A1",
        "only such conversations",
        DATA + "--source_max_len 40 --target_max_len 9",
        2,
        "no token of the 2 training examples is learnt",
        rows_jsonl=[LATE_TALK] * 2,
    ),
    trained(
        "A1",
        "a stream with late answers",
        DATA + "--streaming --cs_interval 1 --window_size 2 --packing --seq_length 32",
        0,
        "Left out: 2 of 6 examples read of the stream",
        rows_jsonl=[LATE, ROW, ROW] * 2,
    ),
    trained(
        "A1",
        "held-out conversations that are all cut",
        DATA + "--do_eval --eval_dataset held.jsonl --source_max_len 40 --target_max_len 9",
        2,
        "no token of the 1 held-out examples is learnt",
        rows_jsonl=[TALK] * 2,
        held_jsonl=[LATE_TALK],
    ),
    trained(
        "A1",
        "an empty answer",
        DATA,
        2,
        "1 row(s) have an empty output, first at line 2",
        rows_jsonl=[ROW, {"input": "q", "output": " "}],
    ),
    jobs(
        "A1",
        "two jobs, one of late conversations alone",
        job("good", "rows.jsonl") + job("late", "late.jsonl", "source_max_len = 40\ntarget_max_len = 9"),
        2,
        "late: not trained: no token of the 2 training examples is learnt",
        rows_jsonl=[ROW] * 2,
        late_jsonl=[LATE_TALK] * 2,
    ),
]
A2 = [
    trained(
        "A2",
        "U+2028 and U+0085 within a row",
        DATA,
        0,
        "Data: 2 training examples",
        rows_jsonl='{"input":"a\u2028b","output":"c\u0085d"}\n{"input":"e","output":"f"}\n',
    ),
    Input(
        "A2",
        ASK,
        "a prompt with U+2028, whose halves alone fit the positions",
        "--base {parts}/llm/table --prompts p.txt",
        2,
        "the base has 64 positions",
        {"p.txt": "word " * 40 + "\u2028" + "word " * 40 + "\n"},
    ),
    pictured(
        "A2",
        "a caption with U+2028",
        "--shuffle_caption",
        0,
        "'a cat on a mat'",
        {"data/1_cat/a.txt": "a cat\u2028on a mat"},
    ),
    pictured(
        "A2",
        "metadata.jsonl with U+0085 and a form feed",
        "",
        0,
        "Trained to its budget",
        {"data/1_cat/metadata.jsonl": '{"file_name":"a.png","text":"a\u0085b\x0c"}\n'.replace("\x0c", "\\f")},
    ),
    Input(
        "A2",
        SAMPLE,
        "a prompt with a vertical tab",
        "--base {sd} --prompts p.txt",
        0,
        "pictures",
        {"p.txt": "a cat\x0bon a mat --s 1\n"},
    ),
]
A3 = [
    trained(
        "A3",
        "a jsonl with a byte order mark",
        DATA,
        0,
        "Data: 1 training examples",
        rows_jsonl=MARK + '{"input":"a","output":"b"}\n',
    ),
    trained(
        "A3",
        "a csv with a byte order mark",
        "--dataset rows.csv",
        0,
        "Data: 1 training examples",
        rows_csv=MARK + "input,output\na,b\n",
    ),
    trained(
        "A3",
        "a jsonl in UTF-16",
        DATA,
        2,
        "rows.jsonl, line 1 is not UTF-8 text",
        rows_jsonl=bytes_of('{"input":"a","output":"b"}\n', "utf-16"),
    ),
    jobs("A3", "jobs.toml with a byte order mark", MARK + job("a", "rows.jsonl"), 0, "a: ", rows_jsonl=[ROW] * 2),
    pictured(
        "A3",
        "a configuration with a byte order mark",
        "--config_file run.toml",
        0,
        "1 batches and 1 steps an epoch",
        {"run.toml": MARK + "train_batch_size = 2\n"},
    ),
    Input(
        "A3",
        SAMPLE,
        "a prompt file with a byte order mark",
        "--base {sd} --prompts p.txt",
        0,
        "pictures",
        {"p.txt": MARK + "a cat --s 1\n"},
    ),
    Input(
        "A3",
        REPLAY,
        "a history with a byte order mark",
        "cs_history.jsonl --rule second-valley",
        0,
        "second-valley",
        {
            "cs_history.jsonl": bytes_of(MARK, "utf-8") + b'{"format":"cs-history/1","cs_interval":1,"window":2,'
            b'"steps_per_epoch":4,"reduction":"row","decided_on":"lm","rule":"second-valley"}\n'
            b'{"step":1,"epoch":0.25,"cs":{"lm":0.1}}\n'
        },
    ),
]
A4 = [
    trained(
        "A4",
        "a column that no format reads",
        DATA,
        0,
        "columns that are not used: notes",
        rows_jsonl=[{**ROW, "notes": "keep"}],
    ),
    trained(
        "A4",
        "pairs with a system text",
        DATA,
        0,
        "columns that are not used: system",
        rows_jsonl=[{**ROW, "system": "be kind"}],
    ),
    trained(
        "A4",
        "alpaca's columns with a history",
        DATA,
        0,
        "history",
        rows_jsonl=[{"instruction": "x", "input": "", "output": "y", "history": [["a", "b"]]}],
    ),
    jobs(
        "A4",
        "a column that no format reads",
        job("a", "rows.jsonl"),
        0,
        "columns that are not used: notes",
        rows_jsonl=[{**ROW, "notes": "keep"}],
    ),
]
A5 = [
    trained(
        "A5", "answers beyond --target_max_len", DATA, 0, "Cut off: 2 of 2 training answers", rows_jsonl=[LONG] * 2
    ),
    trained(
        "A5",
        "prompts beyond --source_max_len",
        DATA + "--source_max_len 20",
        0,
        "Cut off: 1 of 2 training prompts",
        rows_jsonl=[LATE, ROW],
    ),
    trained(
        "A5",
        "answers of a stream beyond --target_max_len",
        DATA + "--streaming --cs_interval 1 --window_size 2",
        0,
        "Cut off: 2 of 2 examples read of the stream",
        rows_jsonl=[LONG] * 2,
    ),
    jobs(
        "A5",
        "answers of a job that are cut",
        job("a", "rows.jsonl"),
        0,
        "a: Cut off: 2 of 2 training answers",
        rows_jsonl=[LONG] * 2,
    ),
    pictured(
        "A5",
        "a caption of 120 tags",
        "",
        0,
        "captions are cut at 75 tokens",
        {"data/1_cat/a.txt": ", ".join(f"tag{number}" for number in range(120))},
    ),
    pictured(
        "A5",
        "a caption of two paragraphs",
        "",
        0,
        "captions have several lines",
        {"data/1_cat/a.txt": "A cat.\n\nThe light is soft.\n"},
    ),
    Input("A5", SAMPLE, "a prompt of 100 words", "--base {sd} --prompt {long}", 0, "prompts are cut at 75 tokens"),
]
A6 = [
    pictured(
        "A6", "a picture that ends in .jfif", "", 0, "3 batches and 3 steps", {"data/1_cat/c.jfif": Part("ldm/c.jpg")}
    ),
    pictured("A6", "a caption that ends in .TXT", "", 0, "--prompt 'a tabby'", {"data/1_cat/a.TXT": "a tabby"}),
    pictured(
        "A6",
        "pictures in a folder below",
        "",
        0,
        "1 images in folders below it are not used",
        {"data/1_cat/more/c.jpg": Part("ldm/c.jpg")},
    ),
    pictured(
        "A6", "a .heic picture", "", 0, "1 .heic files are not read", {"data/1_cat/c.heic": Part("ldm/note.heic")}
    ),
    pictured(
        "A6",
        "a caption without a picture",
        "",
        0,
        "1 caption files have no picture of their name",
        {"data/1_cat/dog.txt": "a dog"},
    ),
    Input(
        "A6",
        RESIZE,
        "a folder of pictures and folders",
        "photos out --size 64",
        0,
        "1 pictures in folders below it are left out",
        {"photos/a.png": Part("ldm/a.png"), "photos/more/c.jpg": Part("ldm/c.jpg")},
    ),
    Input(
        "A6",
        RESIZE,
        "a picture that is none",
        "photos out --size 64",
        2,
        "torn.png",
        {"photos/torn.png": Part("ldm/torn.png")},
    ),
]
A7 = [
    Input("A7", MERGE, "an adapter with a NaN", "--adapter {parts}/llm/nan_adapter --base {llm}", 2, "holds NaN"),
    Input(
        "A7", ASK, "an adapter with a NaN", "--adapter {parts}/llm/nan_adapter --base {llm} --prompt q", 2, "holds NaN"
    ),
    Input("A7", JUDGE, "adapters with a NaN", "{parts}/llm/nan_run --base {llm} --steps_per_epoch 10", 2, "holds NaN"),
    Input(
        "A7",
        LLM,
        "a base with a NaN, in 4 bits",
        "--model_name_or_path {parts}/llm/nan --bits 4 --dataset rows.jsonl",
        2,
        "holds NaN",
        {"rows.jsonl": [ROW]},
    ),
    Input(
        "A7",
        MULTI,
        "a base with a NaN",
        "jobs.toml --base_model {parts}/llm/nan",
        2,
        "holds NaN",
        {"jobs.toml": job("a", "rows.jsonl"), "rows.jsonl": [ROW]},
    ),
    Input(
        "A7", FOLD, "a LoRA with a NaN", "--sd_model {sd} --models {parts}/ldm/nan.safetensors --save_to m", 2, "NaN"
    ),
    Input("A7", SAMPLE, "a LoRA with a NaN", "--base {sd} --lora {parts}/ldm/nan.safetensors --prompt cat", 2, "NaN"),
    Input("A7", EXTRACT, "a tuned model with a NaN", "--model_org {sd} --model_tuned {parts}/ldm/nan_vae", 2, "NaN"),
    Input(
        "A7",
        LDM,
        "a base with a NaN in its VAE",
        "--pretrained_model_name_or_path {parts}/ldm/nan_vae --train_data_dir data",
        2,
        "NaN",
        CAT,
    ),
    Input(
        "A7",
        LDM,
        "a single file with a NaN",
        "--pretrained_model_name_or_path {parts}/ldm/nan_file.safetensors --train_data_dir data",
        2,
        "model.diffusion_model.out.2.bias",
        CAT,
    ),
    pictured("A7", "a LoRA with a NaN to go on from", "--network_weights {parts}/ldm/nan.safetensors", 2, "NaN"),
]
A8 = [
    trained(
        "A8",
        "--dataloader_drop_last with fewer rows than a batch",
        DATA + "--dataloader_drop_last True",
        2,
        "fewer than a batch of 2",
        rows_jsonl=[ROW],
    ),
    trained("A8", "--max_steps 0", DATA + "--max_steps 0", 2, "nothing would be trained"),
    jobs(
        "A8",
        "max_steps = 0",
        job("a", "rows.jsonl").replace("max_steps = 2", "max_steps = 0"),
        2,
        "max_steps = 0: must be at least 1",
        rows_jsonl=[ROW],
    ),
    pictured("A8", "--max_train_steps 0", "--max_train_steps 0", 2, "--max_train_steps 0 is not allowed"),
    Input(
        "A8",
        SDXL,
        "--max_train_steps 0",
        "--pretrained_model_name_or_path x --train_data_dir data --max_train_steps 0",
        2,
        "--max_train_steps 0 is not allowed",
        CAT,
    ),
    Input(
        "A8",
        LDM,
        "a folder with 0 repeats",
        SD + "--train_data_dir data",
        2,
        "0_cat has 0 repeats",
        {"data/0_cat/a.png": Part("ldm/a.png")},
    ),
    Input(
        "A8",
        LDM,
        "validation_split = 1.0",
        "--pretrained_model_name_or_path {sd} --dataset_config data.toml",
        2,
        "there are no training images",
        {
            **CAT,
            "data.toml": "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'data/1_cat'\n"
            "validation_split = 1.0\n",
        },
    ),
]
A9 = [
    pictured(
        "A9",
        "tags parted by ; and shuffled",
        "--caption_separator ; --shuffle_caption",
        0,
        "red; blue",
        {"data/1_cat/a.txt": "red; blue"},
    ),
]
A10 = [
    Input("A10", JUDGE, "DoRA adapters", "{parts}/llm/dora_run --base {llm} --steps_per_epoch 10", 0, "magnitude"),
    Input(
        "A10",
        FOLD,
        "a LoRA with a bundled embedding",
        "--sd_model {sd} --models {parts}/ldm/bundled.safetensors --save_to m",
        0,
        "(mycat) are left out",
    ),
    Input(
        "A10",
        SAMPLE,
        "the same",
        "--base {sd} --lora {parts}/ldm/bundled.safetensors --prompt 'a cat --s 1'",
        0,
        "(mycat) are left out",
    ),
    pictured(
        "A10", "the same to go on from", "--network_weights {parts}/ldm/bundled.safetensors", 0, "(mycat) are left out"
    ),
]
TABLE = "--model_name_or_path {parts}/llm/table "
HARD = "the base has 64 positions"
B = [
    Input("B", LLM, "rows beyond learnt positions", TABLE + DATA, 2, HARD, {"rows.jsonl": [LATE] * 2}),
    Input(
        "B",
        LLM,
        "the same as a stream",
        TABLE + DATA + "--streaming --cs_interval 1 --window_size 2",
        2,
        HARD,
        {"rows.jsonl": [LATE] * 2},
    ),
    Input(
        "B",
        MULTI,
        "one job beyond learnt positions, one within",
        "jobs.toml --base_model {parts}/llm/table",
        2,
        "late: not trained: ",
        {"jobs.toml": job("late", "late.jsonl") + job("good", "rows.jsonl"), "late.jsonl": [LATE], "rows.jsonl": [ROW]},
    ),
    Input("B", ASK, "a prompt beyond learnt positions", "--base {parts}/llm/table --prompt {long}", 2, HARD),
    trained(
        "B",
        "rows beyond rotary positions",
        DATA + "--source_max_len 4000",
        0,
        "Beyond its positions",
        rows_jsonl=[{"input": "word " * 3000, "output": "a"}],
    ),
    Input(
        "B",
        LLM,
        "a chat template that raises",
        "--model_name_or_path {parts}/llm/refusing " + DATA,
        2,
        "rows.jsonl, line 1: the chat template",
        {"rows.jsonl": [TALK]},
    ),
    Input(
        "B", ASK, "a chat template that raises", "--base {parts}/llm/refusing --prompt q", 2, "refuses the conversation"
    ),
    Input("B", LLM, "a torn base", "--model_name_or_path {parts}/llm/torn " + DATA, 2, "torn", {"rows.jsonl": [ROW]}),
    Input(
        "B",
        LLM,
        "a torn tokenizer",
        "--model_name_or_path {parts}/llm/torn_words " + DATA,
        2,
        "torn_words",
        {"rows.jsonl": [ROW]},
    ),
    Input("B", MERGE, "a torn adapter", "--adapter {parts}/llm/torn_adapter --base {llm}", 2, "torn_adapter"),
    Input(
        "B",
        ASK,
        "an adapter of another base",
        "--adapter {parts}/llm/other_adapter --base {llm} --prompt q",
        2,
        "other_adapter",
    ),
    Input(
        "B", MERGE, "an adapter of another base", "--adapter {parts}/llm/other_adapter --base {llm}", 2, "other_adapter"
    ),
    Input("B", JUDGE, "a torn base", "{parts}/llm/run --base {parts}/llm/torn --steps_per_epoch 10", 2, "torn"),
    Input("B", JUDGE, "another base", "{parts}/llm/run --base {parts}/llm/table --steps_per_epoch 10", 2, "table"),
    Input(
        "B",
        MULTI,
        "a torn base",
        "jobs.toml --base_model {parts}/llm/torn",
        2,
        "torn",
        {"jobs.toml": job("a", "rows.jsonl"), "rows.jsonl": [ROW]},
    ),
    Input(
        "B",
        EXTRACT,
        "a single file without a VAE",
        "--model_org {sd} --model_tuned {parts}/ldm/no_vae.safetensors",
        2,
        "--vae",
    ),
    Input("B", SDXL, "a base of SD 1.x", SD + "--train_data_dir data --max_train_steps 1", 2, "SDXL", CAT),
    Input(
        "B",
        REPLAY,
        "a history torn in its last line",
        "cs_history.jsonl --rule second-valley",
        0,
        "second-valley",
        {
            "cs_history.jsonl": '{"format":"cs-history/1","cs_interval":1,"window":2,"steps_per_epoch":4,'
            '"reduction":"row","decided_on":"lm","rule":"second-valley"}\n{"step":1,"epoch":0.25,"cs":{"lm":0.1}}\n{"st'
        },
    ),
    Input("B", JUDGE, "a folder without adapters", ". --base {llm}", 2, "no"),
    Input(
        "B",
        REPLAY,
        "a history whose header lacks a field",
        "cs_history.jsonl --rule second-valley",
        2,
        "its header lacks window",
        {"cs_history.jsonl": [{key: value for key, value in HEADER.items() if key != "window"}]},
    ),
    Input(
        "B",
        REPLAY,
        "a history that is none",
        "cs_history.jsonl",
        2,
        "cs_history.jsonl",
        {"cs_history.jsonl": "step,cs\n1,2\n"},
    ),
    Input(
        "B",
        LDM,
        "a single file without a VAE",
        "--pretrained_model_name_or_path {parts}/ldm/no_vae.safetensors --train_data_dir data",
        2,
        "--vae",
        CAT,
    ),
    Input(
        "B",
        FOLD,
        "a single file without a VAE",
        "--sd_model {parts}/ldm/no_vae.safetensors --models {parts}/ldm/lora.safetensors --save_to m",
        2,
        "--vae",
    ),
    Input("B", SAMPLE, "a folder without a U-Net", "--base {parts}/ldm/no_unet --prompt cat", 2, "unet"),
    Input(
        "B",
        FOLD,
        "a torn LoRA",
        "--sd_model {sd} --models {parts}/ldm/torn.safetensors --save_to m",
        2,
        "torn.safetensors",
    ),
    Input(
        "B",
        FOLD,
        "a LoRA of another program's layers",
        "--sd_model {sd} --models {parts}/ldm/stranger.safetensors --save_to m",
        2,
        "stranger.safetensors",
    ),
    pictured("B", "a torn picture", "", 2, "--skip_bad_images", {"data/1_cat/c.png": Part("ldm/torn.png")}),
    Input(
        "B",
        LDM,
        "only torn pictures, to be skipped",
        SD + "--train_data_dir data --skip_bad_images",
        2,
        "there are no training images",
        {"data/1_cat/c.png": Part("ldm/torn.png")},
    ),
]
GUI = (
    'epoch = 1\nmax_train_steps = 1\nnoise_offset_type = "Original"\ndynamo_backend = "no"\nmax_token_length = 75\n'
    'lr_scheduler_type = ""\nvae = ""\nsample_prompts = ""\nsave_every_n_steps = 0\nnetwork_args = []\n'
)
WINDOWS = 'train_data_dir = "C:\\pictures\\cats"\n'
C = [
    pictured(
        "C",
        "a configuration of kohya_ss's GUI",
        "--config_file gui.toml",
        0,
        "Trained to its budget",
        {"gui.toml": GUI},
    ),
    pictured(
        "C",
        "the same with its default attention",
        "--config_file gui.toml",
        0,
        "sdpa computes the same attention",
        {"gui.toml": GUI + "xformers = true\n"},
    ),
    Input("C", LDM, "the 1_cat folder itself", SD + "--train_data_dir data/1_cat", 0, "it alone is used", CAT),
    Input(
        "C",
        LDM,
        "a folder of pictures without repeats",
        SD + "--train_data_dir data",
        2,
        "10_cats",
        {"data/cats/a.png": Part("ldm/a.png")},
    ),
    Input("C", LDM, "the folder above", SD + "--train_data_dir .", 2, "give --train_data_dir", CAT),
    Input("C", MERGE, "a checkpoint of qlora", "--adapter {parts}/llm/qlora/checkpoint-30 --base {llm}", 0, "merged"),
    Input(
        "C", ASK, "a checkpoint of qlora", "--adapter {parts}/llm/qlora/checkpoint-30 --base {llm} --prompt q", 0, ""
    ),
    Input("C", JUDGE, "a run of qlora", "{parts}/llm/qlora --base {llm} --steps_per_epoch 10", 0, "checkpoint-"),
    Input("C", MERGE, "adapter_model.bin", "--adapter {parts}/llm/pickled --base {llm}", 2, "convert it: python -c"),
    Input("C", ASK, "adapter_model.bin", "--adapter {parts}/llm/pickled --base {llm} --prompt q", 2, "convert it"),
    Input("C", JUDGE, "a run of adapter_model.bin", "{parts}/llm/pickled_run --base {llm}", 2, "convert it"),
    Input(
        "C",
        FOLD,
        "text encoder keys without text_model.",
        "--sd_model {sd} --models {parts}/ldm/short.safetensors --save_to m",
        0,
        "m",
    ),
    Input(
        "C",
        FOLD,
        "a U-Net LoRA in PEFT's naming",
        "--sd_model {sd} --models {parts}/ldm/peft.safetensors --save_to m",
        0,
        "m",
    ),
    trained(
        "C",
        "half a surrogate pair",
        DATA,
        2,
        "half a surrogate pair",
        rows_jsonl='{"input":"a \\ud83d","output":"b"}\n',
    ),
    trained(
        "C",
        "a csv with semicolons",
        "--dataset rows.csv",
        0,
        "Data: 1 training examples",
        rows_csv="input;output\na;b\n",
    ),
    trained(
        "C",
        'rows under {"data": [...]}',
        "--dataset rows.json",
        0,
        "Data: 1 training examples",
        rows_json='{"data": [{"input": "a", "output": "b"}]}',
    ),
    trained(
        "C",
        "a jsonl in latin-1",
        DATA,
        2,
        "rows.jsonl, line 1 is not UTF-8",
        rows_jsonl=bytes_of('{"input":"caf\u00e9","output":"b"}\n', "latin-1"),
    ),
    pictured(
        "C",
        "a caption in latin-1",
        "",
        2,
        "a.txt, line 1 is not UTF-8",
        {"data/1_cat/a.txt": bytes_of("caf\u00e9", "latin-1")},
    ),
    pictured(
        "C",
        "JSON in place of TOML",
        "--config_file run.toml",
        2,
        "It is JSON: convert it",
        {"run.toml": '{"network_dim": 8}'},
    ),
    jobs("C", "JSON in place of TOML", '{"jobs": [{"name": "a"}]}', 2, "It is JSON: name the file .json"),
    pictured(
        "C", "a Windows path in a configuration", "--config_file run.toml", 2, "single quotes", {"run.toml": WINDOWS}
    ),
    jobs("C", "a Windows path in a job", job("a", "C:\\data\\rows.jsonl"), 2, "single quotes"),
    jobs("C", "a path with \\t in a job", job("a", "data\\train.jsonl"), 2, "single quotes"),
    trained("C", "a Deep Lake set that is not there", "--dataset deeplake:lake", 2, "deeplake"),
    Input("C", TAG, "a tagger that is not there", "data/1_cat --model none.onnx", 2, "none.onnx", CAT),
    Input(
        "C", CAPTION, "no model for the local captioner", "data/1_cat --captioner local --model none", 2, "none", CAT
    ),
    Input("C", CAPTION, "no key for a service", "data/1_cat --captioner openai", 2, "OPENAI_API_KEY", CAT),
    Input("C", DEMO, "the page started as a program", "", 2, "streamlit run"),
]
D = [
    pictured(
        "D",
        "a caption of 90 tags",
        "",
        0,
        "tag0, tag1",
        {f"data/1_cat/{name}.txt": ", ".join(f"tag{number}" for number in range(90)) for name in "ab"},
    ),
    trained(
        "D", "unknown columns", DATA, 2, "the columns 'answer', 'prompt': ", rows_jsonl=[{"prompt": "a", "answer": "b"}]
    ),
    trained("D", "one example", DATA, 0, "memorising would make them", rows_jsonl=[ROW]),
    pictured("D", "weights of another rank", "--network_weights {parts}/ldm/wide.safetensors", 2, "--dim_from_weights"),
    trained("D", "a misspelt flag", DATA + "--lora_rnak 8", 2, "--lora_rnak"),
    pictured("D", "a misspelt flag", "--network_dmi 8", 2, "did you mean --network_dim"),
    Input(
        "D",
        LLM,
        "a hub name without a network",
        "--model_name_or_path nobody/nothing " + DATA,
        2,
        "nobody/nothing: no tokenizer there",
        {"rows.jsonl": [ROW]},
        online=True,
    ),
    trained(
        "D",
        "a data set's hub name without a network",
        "--dataset nobody/nothing",
        2,
        "cannot load 'nobody/nothing'",
    ),
    Input(
        "D",
        SAMPLE,
        "a hub name without a network",
        "--base nobody/nothing --prompt cat",
        2,
        "give a local path",
        online=True,
    ),
    Input(
        "D",
        SDXL,
        "a hub name without a network",
        "--pretrained_model_name_or_path nobody/nothing --train_data_dir data --max_train_steps 1",
        2,
        "give a local path",
        CAT,
        online=True,
    ),
    Input(
        "D",
        TAG,
        "a tagger's hub name without a network",
        "data/1_cat --repo_id nobody/nothing",
        2,
        "cannot be had from the hub",
        CAT,
        online=True,
    ),
]
INPUTS = [*A1, *A2, *A3, *A4, *A5, *A6, *A7, *A8, *A9, *A10, *B, *C, *D]
