"""A miniature with the structure of diffusers' DreamBooth LoRA scripts (one main, PEFT layers,
states in checkpoint-N), written for these tests.

It trains a toy denoiser and text encoder for real, so that a patched copy of it stops for real.
"""

import argparse
import math
import os

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from transformers import BertConfig, BertModel


class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_out = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x, text):
        return self.to_out(torch.tanh(self.to_q(x) + text))


class ToyPipeline:
    @classmethod
    def save_lora_weights(cls, save_directory, unet_lora_layers=None, text_encoder_lora_layers=None, metadata=None):
        os.makedirs(save_directory, exist_ok=True)
        parts = {"unet": unet_lora_layers or {}, "text_encoder": text_encoder_lora_layers or {}}
        tensors = {f"{part}.{name}": value for part, layers in parts.items() for name, value in layers.items()}
        file = os.path.join(save_directory, "pytorch_lora_weights.safetensors")
        save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata or {})


def collated(modules):
    return {"metadata": {"parts": " ".join(sorted(modules))}}


def parse_args(input_args=None):
    parser = argparse.ArgumentParser()
    for name, kind, default in (
        ("output_dir", str, "out"), ("seed", int, 0), ("learning_rate", float, 0.02), ("max_train_steps", int, 40),
        ("gradient_accumulation_steps", int, 1), ("checkpointing_steps", int, 500), ("save_dtype", str, "float32"),
        ("resume_from_checkpoint", str, None),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--train_text_encoder", action="store_true")
    parser.add_argument("--save_copies", action="store_true")
    if input_args is not None:
        args = parser.parse_args(input_args)
    else:
        args = parser.parse_args()
    return args


def main(args):
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps, cpu=True)
    torch.manual_seed(args.seed)
    unet = Denoiser()
    text_encoder = BertModel(
        BertConfig(
            vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    unet.requires_grad_(False)
    text_encoder.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_out"]), unet)
    trained = [value for value in unet.parameters() if value.requires_grad]
    if args.train_text_encoder:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["query", "value"]), text_encoder)
        trained += [value for value in text_encoder.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)
    noise = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 8, generator=noise) for _ in range(8)]
    unet, optimizer = accelerator.prepare(unet, optimizer)
    if args.train_text_encoder:
        text_encoder = accelerator.prepare(text_encoder)
    train_dataloader = batches
    target = torch.randn(4, 8, generator=noise)

    steps_an_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    args.num_train_epochs = math.ceil(args.max_train_steps / steps_an_epoch)
    global_step, first_epoch = 0, 0
    if args.resume_from_checkpoint:
        accelerator.load_state(os.path.join(args.output_dir, args.resume_from_checkpoint))
        global_step = int(args.resume_from_checkpoint.split("-")[1])
        first_epoch = global_step // steps_an_epoch

    for epoch in range(first_epoch, args.num_train_epochs):
        for batch in train_dataloader:
            with accelerator.accumulate(unet):
                text = text_encoder(torch.tensor([[1, 2]])).last_hidden_state.mean(1)
                loss = (unet(batch, text) - target).pow(2).mean()
                accelerator.backward(loss)
                print("loss", loss.item().hex())
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                global_step += 1
                if global_step % args.checkpointing_steps == 0:
                    folder = os.path.join(args.output_dir, f"checkpoint-{global_step}")
                    accelerator.save_state(folder)
                    layers = {"unet_lora_layers": get_peft_model_state_dict(accelerator.unwrap_model(unet))}
                    ToyPipeline.save_lora_weights(folder, **layers)
            if global_step >= args.max_train_steps:
                break
        print("end of epoch", epoch + 1)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        modules = {"unet": accelerator.unwrap_model(unet).to(getattr(torch, args.save_dtype))}
        unet_lora_layers = get_peft_model_state_dict(modules["unet"])
        if args.save_copies:
            unet_lora_layers = {name: value.clone() for name, value in unet_lora_layers.items()}
        text_encoder_lora_layers = None
        if args.train_text_encoder:
            modules["text_encoder"] = accelerator.unwrap_model(text_encoder)
            text_encoder_lora_layers = get_peft_model_state_dict(modules["text_encoder"])
        ToyPipeline.save_lora_weights(
            save_directory=args.output_dir,
            unet_lora_layers=unet_lora_layers,
            text_encoder_lora_layers=text_encoder_lora_layers,
            **collated(modules),
        )
    accelerator.end_training()
    print("the end")


if __name__ == "__main__":
    main(parse_args())
