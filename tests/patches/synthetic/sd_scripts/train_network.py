"""A miniature with the structure of sd-scripts' train_network.py (loops, names, saves), written for
these tests.

It trains a toy model for real, so that a patched copy of it stops for real.
"""

import argparse
import math
import os

import torch
from library import train_util
from networks import lora


def train(args):
    torch.manual_seed(args.seed)
    accelerator = train_util.Accelerator(args.gradient_accumulation_steps)
    model = lora.ToyModel()
    network = lora.Network(model, args.network_dim, args.network_alpha)
    network.apply_to(model, train_text=not args.network_train_unet_only)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate)
    batches = torch.randn(args.batches, 4, 8, generator=torch.Generator().manual_seed(1))
    train_dataloader = list(batches)
    accelerator.prepare(network, optimizer)
    train_util.resume_from_local_or_hf_if_specified(accelerator, args)

    epochs = math.ceil(args.max_train_steps * args.gradient_accumulation_steps / len(train_dataloader))
    metadata = {}

    def save_model(file_name, to_save, steps, epoch_no, force_sync_upload=False):
        metadata["ss_steps"], metadata["ss_epoch"] = str(steps), str(epoch_no)
        os.makedirs(args.output_dir, exist_ok=True)
        to_save.save_weights(os.path.join(args.output_dir, file_name), None, metadata)

    global_step = 0
    for epoch in range(epochs):
        for number, batch in enumerate(train_dataloader):
            with accelerator.accumulate(number + 1 == len(train_dataloader)):
                loss = model.loss(batch)
                loss.backward()
                print("loss", loss.item().hex())
                if accelerator.sync_gradients:
                    optimizer.step()
                    optimizer.zero_grad()
            if accelerator.sync_gradients:
                global_step += 1
                if args.save_every_n_steps and global_step % args.save_every_n_steps == 0:
                    save_model(f"{args.output_name}-step{global_step:08d}.safetensors", network, global_step, epoch)
            if args.max_train_steps <= global_step:
                break
        print("end of epoch", epoch + 1)

    if args.save_state:
        accelerator.save_state(os.path.join(args.output_dir, f"{args.output_name}-state"))
    if accelerator.is_main_process:
        save_model(f"{args.output_name}.safetensors", network, global_step, epochs, force_sync_upload=True)
    print("the end")


def setup_parser():
    parser = argparse.ArgumentParser()
    for name, kind, default in (
        ("seed", int, 0), ("network_dim", int, 2), ("network_alpha", float, 1.0), ("learning_rate", float, 0.02),
        ("batches", int, 8), ("max_train_steps", int, 40), ("save_every_n_steps", int, None),
        ("output_dir", str, "out"),
        ("output_name", str, "lora"), ("gradient_accumulation_steps", int, 1), ("resume", str, None),
        ("network_module", str, "networks.lora"), ("optimizer_type", str, "AdamW"),
        ("save_model_as", str, "safetensors"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--network_train_unet_only", action="store_true")
    parser.add_argument("--save_state", action="store_true")
    return parser


if __name__ == "__main__":
    train(setup_parser().parse_args())
