"""A miniature with the structure of musubi-tuner's network trainer (a class, its steps in methods),
written for these tests.

It trains a toy model for real, so that a patched copy of it stops for real.
"""

import math
import os

import torch
from musubi_tuner import toy_accelerator, toy_network


class NetworkTrainer:
    def resume_from_local_or_hf_if_specified(self, accelerator, args):
        toy_accelerator.resume_from_local_or_hf_if_specified(accelerator, args)

    def train(self, args):
        torch.manual_seed(args.seed)
        accelerator = toy_accelerator.Accelerator(args.gradient_accumulation_steps)
        model = toy_network.ToyModel()
        network = toy_network.Network(model, args.network_dim, args.network_alpha)
        network.apply_to(model, train_text=False)
        optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate)
        batches = torch.randn(args.batches, 4, 8, generator=torch.Generator().manual_seed(1))
        accelerator.prepare(network, optimizer)
        self._resume(args, accelerator)
        self._run(args, accelerator, model, network, optimizer, list(batches))

    def _resume(self, args, accelerator):
        self.resume_from_local_or_hf_if_specified(accelerator, args)

    def _run(self, args, accelerator, model, network, optimizer, train_dataloader):
        epochs = math.ceil(args.max_train_steps * args.gradient_accumulation_steps / len(train_dataloader))
        global_step, metadata = 0, {}

        def save_model(file_name, to_save, steps, epoch_no, force_sync_upload=False):
            metadata["ss_steps"], metadata["ss_epoch"] = str(steps), str(epoch_no)
            os.makedirs(args.output_dir, exist_ok=True)
            to_save.save_weights(os.path.join(args.output_dir, file_name), None, metadata)

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

        if args.save_state:
            accelerator.save_state(os.path.join(args.output_dir, f"{args.output_name}-state"))
        if accelerator.is_main_process:
            save_model(f"{args.output_name}.safetensors", network, global_step, epochs, force_sync_upload=True)
        print("the end")
